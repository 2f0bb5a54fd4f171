"""freeze gives what the model gives, or says that it cannot: odd code around blocks, hooks, NaN, half precision."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
import toys
from engine_programs import needs_engine
from torch import nn

import dynexec
from dynexec.executors.proof import relative_error
from dynexec.executors.segment import Segment
from dynexec.nn import ResidualBlock, assign_columns


def test_error_is_relative_and_never_nan():
    reference = torch.tensor([1.0, -4.0])
    assert relative_error(reference, reference) == 0.0
    assert relative_error(torch.tensor([2.0, -4.0]), reference) == pytest.approx(0.25)
    for wrong in (torch.tensor([float("nan"), -4.0]), torch.tensor([1.0]), torch.tensor([float("inf"), -4.0])):
        assert relative_error(wrong, reference) == float("inf")


class Around(nn.Module):
    """A block, and behind it a residual connection that ``change`` treats in its own way."""

    def __init__(self, change):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = toys.BasicBlock(8, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.change = change

    def forward(self, x):
        x = self.block(self.stem(x))
        y = self.conv(x)
        return y + self.change(x)


def in_place(x):
    return x.sub_(0.5)


@pytest.mark.parametrize(
    "change", [F.relu_, torch.relu_, in_place, nn.ReLU(inplace=True), lambda x: F.relu(x, inplace=True)]
)
def test_in_place_changes_of_a_value_that_was_read_before(change):
    model = toys.finish(Around(change))
    dynexec.convert(model)
    frozen = dynexec.freeze(model, toys.images(2))
    x, decisions = toys.images(3), torch.tensor([[True], [False], [True]])
    with torch.no_grad(), dynexec.decide(decisions):
        expected = model(x)
    assert torch.allclose(frozen(x, decisions), expected, rtol=1e-4, atol=1e-5)


def test_hooks_of_the_whole_model_are_refused():
    model = toys.torchvision_style()
    dynexec.convert(model)
    model.register_forward_hook(lambda module, inputs, output: output + 1)
    with pytest.raises(RuntimeError, match="hooks"):
        dynexec.freeze(model, toys.images(2))


def test_a_forward_of_one_instance_is_run():
    model = toys.torchvision_style()
    dynexec.convert(model)
    conv = model.layers[0][0].conv1
    conv.forward = lambda x: -nn.Conv2d.forward(conv, x)
    frozen = dynexec.freeze(model, toys.images(2))
    x, decisions = toys.images(3), torch.ones(5, dtype=torch.bool)
    with torch.no_grad(), dynexec.decide(decisions):
        expected = model(x)
    assert torch.allclose(frozen(x, decisions), expected, rtol=1e-4, atol=1e-5)


def test_a_diverged_network_is_refused():
    model = toys.torchvision_style()
    dynexec.convert(model)
    with torch.no_grad():
        model.layers[0][0].conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="differs by inf"):
        dynexec.freeze(model, toys.images(2), executor="compact")


class Amplified(nn.Module):
    """Rounding errors of its network, times some thousand."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return torch.sin(5000 * self.network(x) / 3)


def test_rounding_that_the_network_amplifies_is_no_difference():
    model = toys.torchvision_style()
    num_blocks = dynexec.convert(model).num_blocks
    model = Amplified(model)
    frozen = dynexec.freeze(model, toys.images(2))
    x, decisions = toys.images(3), torch.rand(3, num_blocks) < 0.5
    with torch.no_grad(), dynexec.decide(decisions):
        expected = model(x)
        exact = copy.deepcopy(model).double()(x.double())
    rounding = (expected - exact).abs().max()
    assert rounding > 1e-5
    assert (frozen(x, decisions) - exact).abs().max() < 20 * rounding


class Overflowing(nn.Module):
    """One output is infinite in float32 and finite in float64."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        y = self.network(x)
        return torch.cat([y, (y[:, :1].abs() + 1) * 1e30 * 1e30], dim=1)


@pytest.mark.parametrize(("around", "difference"), [(Amplified, 0.05), (Overflowing, 100)])
def test_no_more_than_rounding_is_let_through(around, difference):
    model = toys.torchvision_style()
    dynexec.convert(model)
    model = around(model)
    model.register_forward_hook(lambda module, inputs, output: output + difference)
    with pytest.raises(RuntimeError, match="differs by"):
        dynexec.freeze(model, toys.images(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("own", [False, True])
def test_half_precision(dtype, own):
    model = toys.torchvision_style()  # with random BatchNorm statistics
    num_blocks = dynexec.convert(model).num_blocks
    x, decisions = toys.images(3), torch.rand(3, num_blocks) < 0.5
    with torch.no_grad(), dynexec.decide(decisions):
        expected = model(x)
    frozen = dynexec.freeze(model.to(dtype) if own else model, toys.images(2), dtype=None if own else dtype)
    output = frozen(x, decisions)
    assert output.dtype == dtype
    assert (output.float() - expected).abs().max() < 0.03 * expected.abs().max()


def test_bad_arguments_are_named():
    model = toys.torchvision_style()
    dynexec.convert(model)
    x = toys.images(2)
    with pytest.raises(TypeError, match="model.module"):
        dynexec.freeze(nn.DataParallel(model), x)
    with pytest.raises(TypeError, match="dtype must be"):
        dynexec.freeze(model, x, dtype="bf16")
    with pytest.raises(TypeError, match="policy must be"):
        dynexec.freeze(model, x, policy=3)
    for name, value in (("winograd", "off"), ("batch_invariant", None), ("measure", 1), ("keep_memory", 0)):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got {value!r}"):
            dynexec.freeze(model, x, **{name: value})
    frozen = dynexec.freeze(model, x)
    with pytest.raises(TypeError, match="model must be the original one, got a FrozenNetwork"):
        dynexec.freeze(frozen, x)
    for wrong, kind in ((None, TypeError), (x[0], ValueError)):
        with pytest.raises(kind, match=r"x must be a .*tensor \[N, C, H, W\]"):
            frozen(wrong, torch.ones(5, dtype=torch.bool))


@pytest.mark.parametrize("entries", ["[]", "null", "each null", "each wrong"])
def test_a_cost_cache_with_foreign_entries_is_measured_anew(tmp_path, entries):
    model = toys.torchvision_style()
    dynexec.convert(model)
    path = tmp_path / "costs.json"
    dynexec.freeze(model, toys.images(2), cost_cache=path)
    stored = json.loads(path.read_text())
    kept = set(stored["entries"])
    if entries.startswith("each"):
        value = None if entries == "each null" else {"chunk": 0, "engine": -1}
        path.write_text(json.dumps(stored | {"entries": dict.fromkeys(kept, value)}))
    else:
        path.write_text(json.dumps(stored | {"entries": json.loads(entries)}))
    dynexec.freeze(model, toys.images(2), cost_cache=path)
    assert set(json.loads(path.read_text())["entries"]) == kept
    assert "null" not in path.read_text()


class View(nn.Module):
    def forward(self, x):
        return x.view_as(x)


@pytest.mark.parametrize("shortcut", [nn.Identity(), View()])
@pytest.mark.parametrize("executor", [None, "masked", "compact", "grouped"])
def test_a_shortcut_that_shares_its_inputs_memory(shortcut, executor):
    class Single(ResidualBlock):
        def __init__(self):
            super().__init__(shortcut)
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def residual_layers(self):
            return [self.conv]

    model = toys.finish(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Single(), Single()))
    assign_columns(model)
    frozen = dynexec.freeze(model, toys.images(2), executor=executor)
    x, decisions = toys.images(4), torch.tensor([[True, True], [False, True], [True, False], [False, False]])
    with torch.no_grad(), dynexec.decide(decisions):
        expected = model(x)
    assert torch.allclose(frozen(x, decisions), expected, rtol=1e-4, atol=1e-5)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.conv(x))


class NamedLikeOurs(nn.Module):
    """Its modules have names that we might use."""

    def __init__(self):
        super().__init__()
        self.x, self.plan, self.route = nn.Conv2d(3, 4, 3), Plain(), nn.Linear(4, 2)

    def forward(self, x):
        return self.route(self.plan(self.x(x)).mean((2, 3)))


class ArgumentLikeOurs(NamedLikeOurs):
    def forward(self, route, x=None):
        return super().forward(route)


@needs_engine
@pytest.mark.parametrize("kind", [NamedLikeOurs, ArgumentLikeOurs])
def test_names_that_mean_something_here(kind):
    model = toys.finish(kind())
    dynexec.convert(model)
    frozen = dynexec.freeze(model, toys.images(3), executor="resident")
    x, decisions = toys.images(3), torch.tensor([[True], [False], [True]])
    assert relative_error(frozen(x, decisions), toys.run(model, x, decisions)) < 1e-5


@pytest.mark.parametrize("name", ["class", 'quo"te', "two\nlines", "a b"])
def test_names_that_are_none_in_python(name):
    model = toys.finish(nn.Sequential())
    model.add_module("stem", nn.Conv2d(3, 4, 3))
    model.add_module(name, Plain())
    dynexec.convert(model)
    x, decisions = toys.images(3), torch.tensor([[True], [False], [True]])
    try:
        frozen = dynexec.freeze(model, x)
    except ValueError as error:
        assert f"torch.fx needs names as Python has them, got {name!r}" in str(error)
    else:
        assert relative_error(frozen(x, decisions), toys.run(model, x, decisions)) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_example_is_finite(value):
    model, x = toys.torchvision_style(), toys.images(2)
    dynexec.convert(model)
    x[1, 0, 0, 0] = value
    with pytest.raises(ValueError, match="example_input must be finite"):
        dynexec.freeze(model, x)


@needs_engine
def test_another_default_dtype():
    model = toys.torchvision_style()
    num_blocks = dynexec.convert(model).num_blocks
    policy = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_blocks), nn.Sigmoid()
    )
    x, decisions = toys.images(3), torch.rand(3, num_blocks) < 0.5
    torch.set_default_dtype(torch.float64)
    try:
        frozen = dynexec.freeze(model, x, executor="resident", policy=policy)
        assert relative_error(frozen(x, decisions), toys.run(model, x, decisions)) < 1e-5
        assert torch.equal(frozen(x, return_decisions=True)[1], policy(x) >= 0.5)
    finally:
        torch.set_default_dtype(torch.float32)


def break_segments(monkeypatch, broken):
    """Segments add 1 to what they give where ``broken(segment, x)``."""
    run = Segment.__call__
    monkeypatch.setattr(Segment, "__call__", lambda self, x, route: run(self, x, route) + float(broken(self, x)))


@needs_engine
@pytest.mark.parametrize(
    ("broken", "executor"),
    [
        (lambda segment, x: len(x) == 1, "resident"),  # all threads share the layers of a single sample
        (lambda segment, x: segment.executor == "fused" and len(x) > 1, "fused"),
        (lambda segment, x: segment.executor == "resident", "resident"),
    ],
)
def test_every_schedule_of_the_engine_is_compared(monkeypatch, broken, executor):
    break_segments(monkeypatch, broken)
    model = toys.timm_style()
    dynexec.convert(model)
    assert f"engine not used: {executor}: its output differs" in dynexec.freeze(model, toys.images(4)).explain()
    with pytest.raises(RuntimeError, match=f"executor '{executor}' cannot run this network: its output"):
        dynexec.freeze(model, toys.images(4), executor=executor)


@needs_engine
def test_as_many_samples_as_threads_are_compared(monkeypatch):
    break_segments(monkeypatch, lambda segment, x: len(x) == 5)
    model = toys.timm_style()
    dynexec.convert(model)
    threads = torch.get_num_threads()
    try:
        for count, refused in ((5, True), (4, False)):
            torch.set_num_threads(count)
            assert ("engine not used" in dynexec.freeze(model, toys.images(8)).explain()) == refused
    finally:
        torch.set_num_threads(threads)


@needs_engine
@pytest.mark.parametrize("samples", [1, 4])
def test_a_policy_that_the_engine_gets_wrong_runs_by_layer(monkeypatch, samples):
    break_segments(monkeypatch, lambda segment, x: segment.maker.columns == 0 and len(x) == samples)
    model = toys.timm_style()
    num_blocks = dynexec.convert(model).num_blocks
    pooled = nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, num_blocks, 1))
    policy = toys.finish(nn.Sequential(pooled, nn.Flatten(), nn.Sigmoid()))
    x = toys.images(4)
    for executor in (None, "resident"):
        frozen = dynexec.freeze(model, x, policy=policy, executor=executor)
        with torch.no_grad():
            assert torch.allclose(frozen.policy(x[:samples]), policy(x[:samples]), atol=1e-5)


class Optional(toys.Network):
    """Its other parameters have defaults, one of which is compared with None."""

    def __init__(self):
        super().__init__(4, [[toys.BasicBlock(4, 4), toys.BasicBlock(4, 4)]], 4)

    def forward(self, x, features=False, *, scale=None):
        x = self.layers(self.stem(x))
        x = x if scale is None else x * scale
        return x if features else self.head(x.mean((2, 3)))


class Constant(toys.Network):
    """Makes a tensor in its forward, and has a module by the name of what it is wrapped in to be traced."""

    def __init__(self):
        super().__init__(4, [[toys.BasicBlock(4, 4)]], 4)
        self.block, self._tensor_constant0 = nn.Conv2d(4, 4, 1), 3.0

    def forward(self, x, factor=2.0):
        x = self.block(self.stem(x)) + torch.full((1,), 0.5) * factor
        return self.head(self.layers(x).mean((2, 3)) + torch.ones(1) * self._tensor_constant0)


class Several(toys.Network):
    def __init__(self):
        super().__init__(4, [[toys.BasicBlock(4, 4)]], 4)

    def forward(self, *xs):
        return super().forward(xs[0])


class Patched(toys.Network):
    """Its forward is a function of the instance, which calls the method: of a copy, the one of the original."""

    def __init__(self):
        super().__init__(4, [[toys.BasicBlock(4, 4)]], 4)
        forward = super().forward
        self.forward = lambda x, features=False: forward(x)


@pytest.mark.parametrize("executor", [None, "masked", "compact", "fused", "resident"])
@pytest.mark.parametrize("kind", [Optional, Constant, Several, Patched])
@needs_engine
def test_other_parameters_keep_their_defaults(kind, executor):
    model, x = toys.finish(kind()), toys.images(3, size=9)
    blocks = dynexec.convert(model).num_blocks
    decisions = torch.rand(3, blocks) < 0.5
    frozen = dynexec.freeze(model, x, executor=executor)
    torch.testing.assert_close(frozen(x, decisions), toys.run(model, x, decisions), rtol=1e-4, atol=1e-5)


class Second(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(toys.BasicBlock(4, 4))

    def forward(self, x, other):
        return self.layers(x) + other


class Perceptron(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.linear = nn.Linear(features, features)

    def forward(self, x):
        return x + self.linear(x)


@pytest.mark.parametrize(
    "model, words",
    [(Second, "its forward takes x, other, and may take images only"),
     (lambda: nn.Sequential(nn.Flatten(2), Perceptron(81)), r"block 1 takes \(2, 3, 81\), not images \[N, C, H, W\]")],
)  # fmt: skip
def test_what_is_no_network_of_images_is_named(model, words):
    model = model().eval()
    match = dynexec.Adapter(Perceptron) if isinstance(model, nn.Sequential) else None
    assert dynexec.convert(model, match=match).num_blocks == 1
    channels = 3 if isinstance(model, nn.Sequential) else 4
    with pytest.raises(ValueError, match=words):
        dynexec.freeze(model, torch.randn(2, channels, 9, 9))
