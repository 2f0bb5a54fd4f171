"""Training through converted blocks: gradients and batch statistics are those of the published, masked network."""

import copy
import gc
import weakref

import odd_blocks
import pytest
import torch
import toys
from torch import nn
from toys import converted, decision_patterns

import dynexec
from dynexec.nn import ResidualBlock


def gradients(model, x, forward):
    """Gradients of the input and, by name, of the parameters."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    forward(x).square().sum().backward()
    return {"input": x.grad} | {name: parameter.grad for name, parameter in model.named_parameters()}


def inside(model, decisions, mode="exact"):
    def forward(x):
        with dynexec.decide(decisions, mode=mode):
            return model(x)

    return forward


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name] is not None, name
        value = torch.zeros_like(actual[name]) if value is None else value  # the naive loop never met the parameter
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-9, msg=f"{name}: {actual[name] - value}")


@pytest.mark.parametrize("mode", ["exact", "capacity"])
@pytest.mark.parametrize("style", toys.STYLES)
def test_gradients_equal_the_naive_loop(style, mode):
    model, twin, num_blocks = converted(style, torch.float64)
    x = toys.images(4, size=9).double()
    for _, decisions in decision_patterns(4, num_blocks):
        actual = gradients(model, x, inside(model, decisions, mode))
        assert_same(actual, gradients(twin, x, lambda x: toys.naive_forward(twin, x, decisions)))  # noqa: B023


def published_forward(model, x, decisions):
    """Every block on all samples, multiplied by the mask: the published implementations."""
    x, column = model.stem(x), 0
    for block in (block for stage in model.layers for block in stage):
        if getattr(block, "skip", True):
            keep = decisions[:, column].to(x.dtype).reshape(-1, 1, 1, 1)
            downsample, column = getattr(block, "downsample", None), column + 1
            if downsample is None:
                x = keep * block(x) + (1 - keep) * x
            else:
                shared = Shared(downsample(x))  # computed once, as its running statistics are updated once
                block.downsample = shared
                x = keep * block(x) + (1 - keep) * shared.value
                block.downsample = downsample
        else:
            x = block(x)
    return model.head(x.mean((2, 3)))


class Shared(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


@pytest.mark.parametrize("mode", ["exact", "capacity"])
@pytest.mark.parametrize("style", toys.STYLES)
def test_batch_norm_over_all_samples_as_published(style, mode):
    model, twin, num_blocks = converted(style, torch.float64)
    model.train(), twin.train()
    x = toys.images(4, size=9).double()
    for _, decisions in decision_patterns(4, num_blocks):
        actual = gradients(model, x, inside(model, decisions, mode))
        assert_same(actual, gradients(twin, x, lambda x: published_forward(twin, x, decisions)))  # noqa: B023
        expected = dict(twin.named_buffers())
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffer, expected[name], rtol=1e-9, atol=1e-9)
        assert (
            model.stem[1].num_batches_tracked == model.layers[1][1].get_submodule(last_norm(model)).num_batches_tracked
        )


def last_norm(model):
    block = model.layers[1][1]
    return [name for name, module in block.named_modules() if isinstance(module, nn.BatchNorm2d)][-1]


def test_batch_norm_over_kept_samples_is_the_block_on_the_subset():
    for style in toys.STYLES:
        model = toys.STYLES[style]().double().train()
        twin = copy.deepcopy(model)
        dynexec.convert(model, batch_norm="kept")
        block, reference = model.layers[0][1], twin.layers[0][1]
        x = torch.randn(5, block(torch.zeros(5, 16 if style == "timm" else 8, 6, 6).double()).shape[1], 6, 6).double()
        reference.load_state_dict(block.state_dict())
        decisions = torch.ones(5, block.placement.num_columns, dtype=torch.bool)
        kept = torch.tensor([0, 2, 3])
        decisions[:, block.placement.column] = False
        decisions[kept, block.placement.column] = True
        actual = gradients(block, x, inside(block, decisions))
        expected = gradients(reference, x, lambda x: x.index_put((kept,), reference(x[kept])))  # noqa: B023
        assert_same(actual, expected)
        buffers = dict(reference.named_buffers())
        for name, buffer in block.named_buffers():
            torch.testing.assert_close(buffer, buffers[name])


def test_kept_statistics_of_a_projection_take_the_shortcut_over_all():
    block = toys.finish(toys.BasicBlock(4, 8, 2)).double().train()
    twin = copy.deepcopy(block)
    dynexec.convert(block, batch_norm="kept")
    x = torch.randn(5, 4, 6, 6).double()
    kept = torch.tensor([1, 4])
    decisions = torch.zeros(5, 1, dtype=torch.bool)
    decisions[kept] = True

    def by_hand(x):
        shortcut = twin.downsample(x)
        residual = twin.bn2(twin.conv2(twin.relu(twin.bn1(twin.conv1(x[kept])))))
        return shortcut.index_put((kept,), torch.relu(residual + shortcut[kept]))

    assert_same(gradients(block, x, inside(block, decisions)), gradients(twin, x, by_hand))
    buffers = dict(twin.named_buffers())
    for name, buffer in block.named_buffers():
        torch.testing.assert_close(buffer, buffers[name])


def test_one_value_per_channel_is_explained():
    block = toys.finish(toys.BasicBlock(4, 4)).train()
    dynexec.convert(block, batch_norm="kept")
    x, one = torch.randn(3, 4, 1, 1), torch.tensor([[False], [True], [False]])
    with pytest.raises(ValueError, match='batch_norm="kept": 1 of 3 samples kept by the block of column 0.*"all"'):
        inside(block, one)(x)
    assert torch.equal(inside(block, ~one)(x)[1], x[1])
    assert inside(block, one)(torch.randn(3, 4, 2, 1)).shape == (3, 4, 2, 1)
    assert inside(block, one[:0])(x[:0]).shape == (0, 4, 1, 1)
    dynexec.revert(block)
    dynexec.convert(block)
    assert inside(block, one)(x).shape == x.shape


def test_batch_norm_without_running_statistics_counts_as_training():
    block = odd_blocks.EmptyShortcut()
    block.conv = nn.Sequential(block.conv, nn.BatchNorm2d(4, track_running_stats=False))
    twin = copy.deepcopy(block).eval()
    dynexec.convert(block.eval())
    x, keep = torch.randn(4, 4, 5, 5), torch.tensor([[True], [False], [True], [False]])
    torch.testing.assert_close(inside(block, keep)(x), torch.where(keep[:, :, None, None], twin(x), x))


class Own(ResidualBlock):
    def __init__(self, shortcut=None):
        super().__init__(shortcut)
        self.conv = odd_blocks.conv()

    def residual_layers(self):
        return [self.conv]


@pytest.mark.parametrize("needs_input_gradient", [True, False])
def test_zero_kept_samples_give_zero_gradients(needs_input_gradient):
    shortcut = nn.Conv2d(4, 4, 1)
    own = nn.Sequential(Own(), Own(shortcut))
    for model in (odd_blocks.EmptyShortcut(), odd_blocks.PooledProjection().eval(), own):
        dynexec.convert(model)
        width = model(torch.zeros(1, 4, 5, 5)).numel()
        x = torch.randn(3, 4, 5, 5, requires_grad=needs_input_gradient)
        model.zero_grad()
        y = inside(model, torch.zeros(2 if model is own else 1).bool())(x)
        assert y.numel() == 3 * width
        nn.functional.relu(y, inplace=True)  # in place behind a dropped block
        y.sum().backward()
        for name, parameter in model.named_parameters():
            shared = "project" in name
            assert parameter.grad is not None and (shared or not parameter.grad.any()), name
        assert (x.grad is not None) == needs_input_gradient
    assert shortcut.weight.grad.any()


def test_zero_gradients_leave_no_reference_behind():
    block = odd_blocks.EmptyShortcut()
    dynexec.convert(block)
    gc.collect()  # of what torch.fx leaves
    y = inside(block, torch.zeros(1).bool())(torch.randn(2, 4, 5, 5, requires_grad=True))
    weight = weakref.ref(block.conv.weight)
    gc.disable()
    del block, y
    gc.enable()
    assert weight() is None


def test_frozen_layers_get_no_gradient():
    model, twin, num_blocks = converted("torchvision", torch.float64)
    for net in (model, twin):
        net.stem.requires_grad_(False)
        net.layers[0][0].requires_grad_(False)
        net.layers[1][0].conv1.requires_grad_(False)
    x = toys.images(3, size=9).double()
    for _, decisions in decision_patterns(3, num_blocks):
        model.zero_grad(), twin.zero_grad()
        inside(model, decisions)(x).square().sum().backward()
        toys.naive_forward(twin, x, decisions).square().sum().backward()
        for (name, actual), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (actual.grad is not None) == actual.requires_grad, name
            if expected.grad is not None:
                torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch_norm", ["all", "kept", "frozen"])
@pytest.mark.parametrize("style", toys.STYLES)
def test_a_gradient_penalty_has_the_gradients_of_the_naive_loop(style, batch_norm):
    """Second derivatives, of which BatchNorm in training has some of its own."""
    model, twin = (toys.STYLES[style]().double() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    num_blocks = dynexec.convert(model, batch_norm=batch_norm).num_blocks
    dynexec.convert(twin, batch_norm="all" if batch_norm == "kept" else batch_norm)
    if batch_norm != "kept":
        model.train(), twin.train()
    x = toys.images(4, size=9).double()

    def penalize(model, decisions, mode):
        given = x.clone().requires_grad_()
        loss = inside(model, decisions, mode)(given).square().sum()
        (gradient,) = torch.autograd.grad(loss, given, create_graph=True)
        model.zero_grad()
        (loss + gradient.square().sum()).backward()
        return {"input": given.grad} | {name: parameter.grad for name, parameter in model.named_parameters()}

    for _, decisions in decision_patterns(4, num_blocks):
        expected = penalize(twin, decisions.double(), "soft")
        assert_same(penalize(model, decisions, "exact"), expected)


@pytest.mark.parametrize("style", toys.STYLES)
def test_torch_func_differentiates_the_decided_path(style):
    model, twin, num_blocks = converted(style, torch.float64)
    x = toys.images(3, size=9).double()
    tangent = torch.randn_like(x)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, decisions):
        with dynexec.decide(decisions):
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

    for _, decisions in decision_patterns(3, num_blocks):
        _, actual = torch.func.jvp(inside(model, decisions), (x,), (tangent,))
        _, expected = torch.func.jvp(lambda x: toys.naive_forward(twin, x, decisions), (x,), (tangent,))  # noqa: B023
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
        by_name = gradients(model, x, inside(model, decisions))
        del by_name["input"]
        assert_same(torch.func.grad(loss)(parameters, decisions), by_name)


@pytest.mark.parametrize("batch_norm", ["all", "kept"])
@pytest.mark.parametrize("style", toys.STYLES)
def test_a_few_steps_reduce_the_loss(style, batch_norm):
    model = toys.STYLES[style]()
    num_blocks = dynexec.convert(model, batch_norm=batch_norm).num_blocks
    model.train()
    x, target = toys.images(16, size=9), torch.randint(5, (16,))
    decisions = torch.rand(16, num_blocks) < 0.7
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(12):
        with dynexec.decide(decisions):
            loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
