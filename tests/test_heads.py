"""Heads of frozen networks: what of pooling, flattening and Linear layers the engine takes in, and that it is right."""

import pytest
import torch
import torch.nn.functional as F
import toys
from engine_programs import needs_engine
from torch import nn

import dynexec

pytestmark = needs_engine


class Network(nn.Module):
    """Two blocks and a head, given as a module or a function of the module."""

    def __init__(self, head, channels=16):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(toys.BasicBlock(channels, channels), toys.BasicBlock(channels, channels))
        self.conv, self.fc = nn.Conv2d(channels, channels, 1), nn.Linear(channels, 7)
        self.head = head

    def forward(self, x):
        y = self.blocks(self.stem(x))
        return self.head(y) if isinstance(self.head, nn.Module) else self.head(self, y, x)


def pooled(y):
    return F.adaptive_avg_pool2d(y, 1)


TAKEN = {
    "flatten": lambda net, y, x: net.fc(torch.flatten(pooled(y), 1)),
    "flatten by name": lambda net, y, x: net.fc(torch.flatten(pooled(y), start_dim=1)),
    "method": lambda net, y, x: net.fc(pooled(y).flatten(1)),
    "mean": lambda net, y, x: net.fc(y.mean((2, 3))),
    "mean from behind": lambda net, y, x: net.fc(torch.mean(y, dim=[-1, -2])),
    "view": lambda net, y, x: net.fc(pooled(y).view(y.size(0), -1)),
    "view with the input's size": lambda net, y, x: net.fc(pooled(y).view(x.shape[0], -1)),
    "reshape": lambda net, y, x: net.fc(pooled(y).reshape(x.size()[0], -1)),
    "no classifier": lambda net, y, x: torch.flatten(pooled(y), 1),
    "sigmoid": lambda net, y, x: torch.sigmoid(net.fc(pooled(y).flatten(1))),
    "two layers": nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 40, bias=False), nn.ReLU(), nn.Dropout(), nn.Linear(40, 5)
    ),
}
LEFT = {
    "more than one pixel": nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.LazyLinear(5)),
    "one pixel of this size only": lambda net, y, x: torch.flatten(F.avg_pool2d(y, 13), 1),
    "one pixel of this size only, as a module": nn.Sequential(nn.AvgPool2d(13), nn.Flatten()),
    "keepdims": lambda net, y, x: net.fc(net.conv(y.mean((2, 3), keepdims=True)).flatten(1)),
    "view of one dimension": lambda net, y, x: y.mean((1, 2, 3)).view(y.size(0), -1),
    "view of another batch": lambda net, y, x: net.fc(
        torch.cat([pooled(y), x.mean() * pooled(y)]).view(y.size(0), -1)[:, :16]
    ),
    "view by a constant's size": lambda net, y, x: net.fc(pooled(y).view(-1, net.fc.weight.size(1))),
    "softmax": lambda net, y, x: F.softmax(net.fc(pooled(y).flatten(1)), 1),
    "mean of channels": lambda net, y, x: y.mean(1),
    "two sums": lambda net, y, x: net.fc(y.mean((2, 3))) + net.fc(y.amax((2, 3))),
    "in parts": lambda net, y, x: pooled(y).view(y.size(0), 2, -1),
}


def expect(model, frozen, x, decisions):
    with torch.no_grad(), dynexec.decide(decisions):
        expected = model(x)
    actual = frozen(x, decisions)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    return actual


def check(model, samples=(1, 3, 20)):
    toys.finish(model)
    dynexec.convert(model)
    frozen = dynexec.freeze(model, toys.images(3), executor="resident")
    for n in samples:
        for layout in (torch.contiguous_format, torch.channels_last):
            for keep in (0.0, 0.5, 1.0):
                expect(model, frozen, toys.images(n, layout=layout), torch.rand(n, 2) < keep)
    return frozen


def is_whole(frozen):
    """Whether the network is one call of the engine."""
    graph = frozen.network.__self__.graph
    return [node.op for node in graph.nodes] == ["placeholder", "placeholder", "call_function", "output"]


@pytest.mark.parametrize("name", TAKEN)
def test_the_engine_runs_up_to_the_end(name):
    frozen = check(Network(TAKEN[name]), (0, 1, 3, 20) if "view" not in name and name != "reshape" else (1, 3, 20))
    assert is_whole(frozen) and not list(frozen.network.__self__.parameters())
    x, decisions = toys.images(20), torch.rand(20, 2) < 0.5
    whole = frozen(x, decisions)
    for part in (slice(3, 4), slice(5, 12)):
        assert torch.equal(frozen(x[part], decisions[part]), whole[part])


@pytest.mark.parametrize("name", LEFT)
def test_other_heads_run_as_they_are(name):
    model = Network(LEFT[name])
    with torch.no_grad():
        model(toys.images(2))  # makes the lazy layer
    assert not is_whole(check(model, (2, 3)))


@pytest.mark.parametrize("name", ["flatten", "mean", "view", "two layers"])
def test_images_of_another_size(name):
    model = Network(TAKEN[name])
    frozen = check(model)
    for size in (5, 22):
        expect(model, frozen, torch.randn(3, 3, size, size), torch.rand(3, 2) < 0.5)


@pytest.mark.parametrize("name", ["one pixel of this size only", "one pixel of this size only, as a module"])
def test_a_flattened_map_may_have_more_pixels_in_larger_images(name):
    model = Network(LEFT[name])
    frozen = check(model)
    expect(model, frozen, torch.randn(3, 3, 26, 26), torch.rand(3, 2) < 0.5)


def test_a_classifier_that_larger_images_do_not_fit():
    model = Network(nn.Sequential(nn.AvgPool2d(13), nn.Flatten(), nn.Linear(16, 5)))
    frozen = check(model)
    with pytest.raises(ValueError, match="does not fit this network"):
        frozen(torch.randn(3, 3, 26, 26), torch.ones(3, 2, dtype=torch.bool))


def test_a_flattened_batch_may_be_empty():
    """torch refuses to view nothing as [0, -1]."""
    model = Network(TAKEN["view"])
    toys.finish(model)
    dynexec.convert(model)
    frozen = dynexec.freeze(model, toys.images(3))
    assert frozen(toys.images(0), torch.ones(0, 2, dtype=torch.bool)).shape == (0, 7)


@pytest.mark.parametrize("kind", ["hook", "forward", "subclass", "parametrized"])
def test_a_layer_that_does_something_else_is_called(kind):
    model = Network(TAKEN["flatten"])
    if kind == "hook":
        model.fc.register_forward_hook(lambda module, inputs, output: output + 1)
    elif kind == "forward":
        model.fc.forward = lambda x: nn.Linear.forward(model.fc, x) + 1
    elif kind == "parametrized":
        nn.utils.parametrizations.weight_norm(model.fc)
    else:
        model.fc = type("Shifted", (nn.Linear,), {"forward": lambda self, x: F.linear(x, self.weight) + 1})(16, 7)
    assert not is_whole(check(model))


@pytest.mark.parametrize("name", ["clone", "relu", "sigmoid"])
def test_a_linear_layer_on_maps_is_no_activation_of_its_name(name):
    class Maps(Network):
        def __init__(self):
            super().__init__(None)
            self.add_module(name, nn.Linear(13, 13))

        def forward(self, x):
            y = self.blocks(self.stem(x))
            return self.fc(getattr(self, name)(y).mean((2, 3)))

    assert not is_whole(check(Maps()))


def test_an_activation_that_does_something_else_is_called():
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 5))
    head[3].register_forward_hook(lambda module, inputs, output: output + 1)
    check(Network(head))


def test_one_layer_used_twice():
    check(Network(lambda net, y, x: net.fc(y.mean((2, 3))) + net.fc(net.stem(x).mean((2, 3)))))


def test_classifiers_on_both_sides_of_something_unknown():
    class Two(Network):
        def __init__(self):
            super().__init__(None)
            self.inner = nn.Linear(16, 16)

        def forward(self, x):
            y = self.blocks(self.stem(x))
            return self.fc(F.layer_norm(self.inner(y.mean((2, 3))), (16,)))

    check(Two())


def test_the_input_of_blocks_that_something_else_reads():
    class Twice(Network):
        def forward(self, x):
            y = self.stem(x)
            return self.fc((self.blocks(y) + y).mean((2, 3)))

    assert is_whole(check(Twice(None)))


@pytest.mark.parametrize("head", ["view of another batch", "keepdims"])
def test_policies(head):
    model = Network(TAKEN["flatten"])
    dynexec.convert(toys.finish(model))
    policy = toys.finish(Network(lambda net, y, x: torch.sigmoid(LEFT[head](net, y, x)[:, :2])))
    x = toys.images(4)
    frozen = dynexec.freeze(model, x, policy=policy)
    with torch.no_grad():
        torch.testing.assert_close(frozen.policy(x), policy(x), rtol=1e-4, atol=1e-5)
