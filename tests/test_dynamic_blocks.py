"""Each sample gets exactly the blocks that were decided for it, whatever the dtype, layout, keep and arguments."""

import copy

import odd_blocks
import pytest
import torch
import toys
from torch import nn
from toys import converted, decision_patterns, run

import dynexec
from dynexec.nn import ResidualBlock, assign_columns

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}


def assert_close(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["exact", "capacity"])
@pytest.mark.parametrize("style", toys.STYLES)
def test_equals_the_naive_loop_over_samples(style, mode):
    model, twin, num_blocks = converted(style)
    for n in (1, 2, 5):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = toys.images(n, layout=layout)
            for name, decisions in decision_patterns(n, num_blocks):
                untouched = x.clone()
                with torch.no_grad():
                    expected = toys.naive_forward(twin, x, decisions)
                assert_close(run(model, x, decisions, mode), expected)
                assert torch.equal(x, untouched), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["exact", "capacity"])
def test_dtypes(dtype, mode):
    for style in toys.STYLES:
        model, twin, num_blocks = converted(style, dtype)
        x, decisions = toys.images(4).to(dtype), torch.rand(4, num_blocks) < 0.5
        with torch.no_grad():
            assert_close(run(model, x, decisions, mode), toys.naive_forward(twin, x, decisions))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", ["exact", "capacity"])
def test_memory_layout_is_kept(mode, layout):
    model, _, num_blocks = converted("timm")
    model = model.to(memory_format=layout)
    layouts = []
    for stage in model.layers:
        for block in stage:
            block.register_forward_hook(
                lambda module, args, output: layouts.append(output.is_contiguous(memory_format=layout))
            )
    x = toys.images(4, layout=layout)
    for _, decisions in decision_patterns(4, num_blocks):
        run(model, x, decisions, mode)
    assert len(layouts) == 8 * num_blocks and all(layouts)


def spoil(module, args, output):
    output[1] = torch.nan


def test_nan_in_a_dropped_branch_is_not_seen():
    block = odd_blocks.EmptyShortcut().eval()
    dynexec.convert(block)
    x, keep = torch.randn(3, 4, 5, 5), torch.tensor([[True], [False], [True]])
    expected = run(block, x, keep)
    block.conv.register_forward_hook(spoil)
    assert torch.equal(run(block, x, keep, "capacity"), expected)


@pytest.mark.parametrize("mode", ["exact", "capacity"])
def test_nan_stays_in_its_sample(mode):
    model, twin, num_blocks = converted()
    x, decisions = toys.images(4), torch.ones(4, num_blocks, dtype=torch.bool)
    decisions[1] = False
    expected = toys.naive_forward(twin, x, decisions).detach()
    x[1] = torch.nan
    actual = run(model, x, decisions, mode)
    kept = [0, 2, 3]
    assert_close(actual[kept], expected[kept])
    assert actual[1].isnan().all()


@pytest.mark.parametrize("style", toys.STYLES)
def test_a_block_never_gives_its_input_back(style):
    model, _, num_blocks = converted(style)
    shared = []
    for stage in model.layers:
        for block in stage:
            block.register_forward_hook(
                lambda module, args, output: shared.append(output.data_ptr() == args[0].data_ptr())
            )
    for _, decisions in decision_patterns(3, num_blocks):
        run(model, toys.images(3), decisions)
    assert shared and not any(shared)


def test_other_arguments_reach_the_block():
    block = odd_blocks.OptionalArguments().eval()
    twin = copy.deepcopy(block)
    dynexec.convert(block)
    x, shift = torch.randn(4, 4, 5, 5), torch.randn(4)
    keep = torch.tensor([[True], [False], [True], [False]])
    for mode in ("exact", "capacity"):
        with dynexec.decide(keep, mode=mode):
            plain, scaled = (torch.where(keep[:, :, None, None], twin(x, scale=scale), x) for scale in (None, 3.0))
            assert_close(block(features=x), plain)
            assert_close(block(x, scale=3.0), scaled)
            assert_close(block(x, 3.0), scaled)
            assert_close(block(scale=3.0, features=x), scaled)
            with pytest.raises(TypeError, match="takes one tensor, .* of column 0 got Tensor, float, Tensor"):
                block(x, 3.0, shift=shift)
    assert torch.equal(block(features=x, shift=shift), twin(x, shift=shift))


def test_other_arguments_of_a_block_with_a_projection():
    block = odd_blocks.OptionalScaleProjection().eval()
    twin = copy.deepcopy(block)
    dynexec.convert(block)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x, 2.0), twin(x, 2.0))
    with dynexec.decide(torch.ones(1).bool()), pytest.raises(TypeError, match="of column 0 got Tensor, float"):
        block(x, scale=2.0)


@pytest.mark.parametrize("mode", ["exact", "capacity"])
def test_an_adapter_that_overlooks_a_change_of_shape(mode):
    model = nn.Sequential(toys.InvertedResidual(4, 4, 2)).eval()
    dynexec.convert(model, dynexec.Adapter(toys.InvertedResidual))
    with pytest.raises(ValueError, match=r"shape|\(2, 4, 3, 3\) and its shortcut \(2, 4, 5, 5\)"):
        run(model, torch.randn(2, 4, 5, 5), torch.tensor([[True], [False]]), mode)


class Projects(ResidualBlock):
    """A shortcut of its own, and nothing, or a given activation, after the addition."""

    def __init__(self, activation=None):
        super().__init__(nn.Conv2d(4, 6, 1))
        self.conv, self.activation = nn.Conv2d(4, 6, 3, padding=1), activation

    def residual_layers(self):
        return [self.conv]

    def activation_layer(self):
        return self.activation


@pytest.mark.parametrize("mode", ["exact", "capacity"])
@pytest.mark.parametrize("activation", [None, torch.relu, nn.ReLU(), nn.ReLU6(), torch.tanh])
def test_what_follows_the_addition_of_a_projection(activation, mode):
    block = Projects(activation)
    assign_columns(block)
    x, keep = torch.randn(4, 4, 5, 5), torch.tensor([[True], [False], [True], [False]])
    shortcut = block.shortcut_layers()[0](x)
    full = block.conv(x) + shortcut
    assert (full < -0.1).any() and (shortcut < -0.1).any()  # a ReLU would show
    full = full if activation is None else activation(full)
    assert_close(run(block, x, keep, mode), torch.where(keep[:, :, None, None], full, shortcut).detach())


@pytest.mark.parametrize("style", toys.STYLES)
def test_autocast_and_inference_mode(style):
    model, twin, num_blocks = converted(style)
    x = toys.images(4)
    for _, decisions in decision_patterns(4, num_blocks):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            expected = toys.naive_forward(twin, x, decisions)
            for mode in ("exact", "capacity"):
                torch.testing.assert_close(run(model, x, decisions, mode), expected, rtol=0.05, atol=0.05)
        with torch.inference_mode():
            assert_close(run(model, x, decisions), toys.naive_forward(twin, x, decisions))


def test_autocast_into_a_wider_shortcut():
    for kind in (toys.BasicBlock, toys.InvertedResidual):
        block = toys.finish(kind(8, 8))
        dynexec.convert(block)
        x, keep = torch.randn(4, 8, 5, 5), torch.tensor([[True], [False], [True], [False]])
        with torch.autocast("cpu", torch.bfloat16):
            exact, capacity = run(block, x, keep), run(block, x, keep, "capacity")
        assert exact.dtype == capacity.dtype == torch.float32
        assert torch.equal(exact[1], x[1])
        torch.testing.assert_close(exact, capacity, rtol=0.05, atol=0.05)


class Widens(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = odd_blocks.conv()

    def forward(self, x):
        return x + self.conv(x).float()


@pytest.mark.parametrize("mode", ["exact", "capacity"])
def test_a_branch_wider_than_its_shortcut(mode):
    block = Widens().bfloat16()
    x, keep = torch.randn(2, 4, 5, 5).bfloat16(), torch.tensor([[True], [False]])
    expected = torch.where(keep[:, :, None, None], block(x), x)
    dynexec.convert(block)
    torch.testing.assert_close(run(block, x, keep, mode), expected)
