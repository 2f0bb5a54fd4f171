"""convert: what is found, how it is split, and what is said about the rest."""

import copy
import pickle

import odd_blocks
import pytest
import torch
import toys
from odd_blocks import shallow
from torch import nn
from toys import run

import dynexec
from dynexec.nn import ResidualBlock

HALF = torch.tensor([[True, False], [False, True], [True, True], [False, False]])


class ResidualAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return x + self.conv(x.mean((2, 3), keepdim=True))


class Group(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + self.conv(self.blocks(x))


def test_nested_blocks():
    attentive = toys.BasicBlock(8, 8)
    attentive.bn2 = nn.Sequential(attentive.bn2, ResidualAttention())
    model = finish_stage([attentive, Group(toys.BasicBlock(8, 8), toys.BasicBlock(8, 8))])
    names = [row[1] for row in dynexec.convert(model).converted]
    assert names == ["layers.0.0", "layers.0.1.blocks.0", "layers.0.1.blocks.1"]
    dynexec.revert(model)
    names = [row[1] for row in dynexec.convert(model, [dynexec.Adapter(Group), ResidualAttention]).converted]
    assert names == ["layers.0.0.bn2.1", "layers.0.1"]


def test_summary_names_columns_and_reasons():
    conversion = dynexec.convert(toys.timm_style())
    assert [row[:2] for row in conversion.converted] == [
        (column, f"layers.{column // 3}.{column % 3}") for column in range(6)
    ]
    assert [row[3] for row in conversion.converted] == ["projection", "identity", "identity"] * 2
    text = str(dynexec.convert(toys.mobilenet_style()))
    assert "3 blocks converted: decisions are bool [N, 3]" in text
    assert "column   2  layers.1.1 (InvertedResidual, identity shortcut)" in text
    assert "layers.1.0 (InvertedResidual): no skip connection" in text


def finish_stage(blocks):
    return toys.finish(toys.Network(8, [blocks], 8))


def test_argument_errors():
    model = toys.torchvision_style()
    with pytest.raises(TypeError, match="model must be an nn.Module, got function"):
        dynexec.convert(toys.torchvision_style)
    with pytest.raises(ValueError, match='batch_norm must be "all" or "kept"'):
        dynexec.convert(model, batch_norm="none")
    with pytest.raises(TypeError, match="block_type must be a type"):
        dynexec.Adapter("BasicBlock")
    with pytest.raises(ValueError, match="no residual block"):
        dynexec.convert(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    dynexec.convert(model)
    with pytest.raises(ValueError, match="obeys decisions already: call dynexec.revert"):
        dynexec.convert(model)


@pytest.mark.parametrize("mode", ["exact", "capacity"])
@pytest.mark.parametrize(
    "kind",
    [
        odd_blocks.LayerScale,
        odd_blocks.AddsInPlace,
        odd_blocks.ReluInPlaceFirst,
        odd_blocks.ReluInPlaceBehindIdentity,
        odd_blocks.ReluInPlaceOfAView,
        odd_blocks.ReluInPlaceUnassigned,
        odd_blocks.AddsInPlaceToTwoNames,
        odd_blocks.ActivationUnassigned,
        odd_blocks.ResidualSequential,
        odd_blocks.EmptyShortcut,
        odd_blocks.SquareBranch,
        odd_blocks.OptionalArguments,
        odd_blocks.StoresOutput,
        odd_blocks.TrainsDifferently,
        odd_blocks.PrivateNames,
        odd_blocks.OwnState,
    ],
)
def test_odd_blocks_with_an_identity_shortcut(kind, mode):
    model = shallow(kind())
    reference = copy.deepcopy(model)
    keys = set(vars(model[1]))
    conversion = dynexec.convert(model)
    assert [row[1:] for row in conversion.converted] == [("1", kind.__name__, "identity")]
    assert set(vars(model[1])) - keys == {"_dynexec_adapter", "placement"}
    copy.deepcopy(model)  # nothing that the tracer left behind is in the way
    x = torch.randn(4, 3, 5, 5)
    h = reference[0](x)
    for keep in (HALF[:, 0], HALF[:, 0] & HALF[:, 1], torch.zeros(4).bool(), torch.ones(4).bool()):
        expected = torch.where(keep.reshape(-1, 1, 1, 1), reference[1](h.clone()), h)
        torch.testing.assert_close(run(model, x, keep[:, None], mode), expected)
    assert torch.equal(model(x), reference(x))


@pytest.mark.parametrize("mode", ["exact", "capacity"])
@pytest.mark.parametrize(
    "kind",
    [odd_blocks.ReluInPlaceUnassigned, odd_blocks.AddsInPlaceToTwoNames, odd_blocks.ActivationUnassigned],
)
def test_what_is_overwritten_unseen_is_in_training_too(kind, mode):
    """Where a block is taken apart at its BatchNorm."""
    model = shallow(kind()).train()
    reference = copy.deepcopy(model)
    dynexec.convert(model)
    x, keep = torch.randn(4, 3, 5, 5), HALF[:, :1]
    h = reference[0](x)
    expected = torch.where(keep[:, :, None, None], reference[1](h.clone()), h)
    with dynexec.decide(keep, mode=mode):
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("mode", ["exact", "capacity"])
def test_functional_projection(mode):
    model = toys.finish(shallow(odd_blocks.PooledProjection()))
    reference = copy.deepcopy(model)
    assert dynexec.convert(model).converted == ((0, "1", "PooledProjection", "projection"),)
    x = torch.randn(4, 3, 5, 5)
    h, keep = reference[0](x), HALF[:, :1]
    shortcut = reference[1].project(torch.max_pool2d(h, 2, 2, ceil_mode=True))
    expected = torch.where(keep[:, :, None, None], reference[1](h), shortcut)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(run(copied, x, keep, mode), expected)


@pytest.mark.parametrize(
    "kind, reason",
    [
        (odd_blocks.ScaledAddition, "no skip connection"),
        (odd_blocks.KeywordAddition, "no skip connection"),
        (odd_blocks.Squares, "a branch is not a plain sequence of layers"),
        (odd_blocks.ReluInPlaceProjection, "an in-place layer overwrites its input"),
        (odd_blocks.ReluInPlaceBehindIdentityProjection, "an in-place layer overwrites its input"),
        (odd_blocks.ReluInPlaceUnassignedProjection, "it ignores what a call gives, which may write in place"),
        (odd_blocks.AddsInPlaceToTwoNamesProjection, "it ignores what a call gives, which may write in place"),
        (odd_blocks.ProjectsWithDropout, "its forward differs between training and evaluation"),
        (odd_blocks.TakenName, "it has an attribute 'placement', a name that dynexec needs"),
        (odd_blocks.TakenMethod, "it has an attribute 'residual_layers', a name that dynexec needs"),
    ],
)
def test_reasons(kind, reason):
    with pytest.raises(ValueError, match=rf"1 \({kind.__name__}\): .*{reason}"):
        dynexec.convert(shallow(kind()))


def test_graphs_and_patched_blocks_are_refused():
    model = toys.torchvision_style()
    for traced in (torch.fx.symbolic_trace(model), torch.jit.trace(model, toys.images(1))):
        with pytest.raises(ValueError, match="the model itself .*: a traced or scripted graph has no blocks"):
            dynexec.convert(traced)
    for block in (block for stage in model.layers for block in stage):
        block.forward = block.forward
    with pytest.raises(ValueError, match="its forward is replaced on the object"):
        dynexec.convert(model)


class Sealed(odd_blocks.EmptyShortcut):
    def __init_subclass__(cls):
        raise TypeError("no subclasses")


def test_a_class_that_cannot_be_swapped_changes_nothing():
    model = nn.Sequential(odd_blocks.EmptyShortcut(), Sealed())
    conversion = dynexec.convert(model)
    assert conversion.skipped == (("1", "Sealed", "its class cannot be swapped (no subclasses)"),)
    assert type(model[1]) is Sealed


def test_a_whole_model_may_be_a_block_and_a_block_may_run_twice():
    block = odd_blocks.EmptyShortcut().eval()
    conversion = dynexec.convert(block)
    assert "column   0  the model itself (EmptyShortcut, identity shortcut)" in str(conversion)
    x = torch.randn(4, 4, 5, 5)
    assert torch.equal(run(block, x, torch.zeros(4, 1).bool()), x)
    model = odd_blocks.TwoBlocks().eval()
    reference = copy.deepcopy(model)
    assert dynexec.convert(model).num_blocks == 1
    keep = HALF[:, :1]
    torch.testing.assert_close(run(model, x, keep), torch.where(keep[:, :, None, None], reference(x), x))


class Own(ResidualBlock):
    def __init__(self):
        super().__init__()
        self.conv = odd_blocks.conv()

    def residual_layers(self):
        return [self.conv]


def test_own_blocks_are_numbered_with_the_converted_ones():
    model = nn.Sequential(Own(), odd_blocks.EmptyShortcut(), Own()).eval()
    x = torch.randn(2, 4, 5, 5)
    with dynexec.decide(torch.zeros(2, 3, dtype=torch.bool)):
        dense = model(x)  # no block has a column yet
    conversion = dynexec.convert(model)
    assert [row[1:] for row in conversion.converted] == [
        ("0", "Own", "identity"),
        ("1", "EmptyShortcut", "identity"),
        ("2", "Own", "identity"),
    ]
    assert torch.equal(run(model, x, torch.zeros(2, 3, dtype=torch.bool)), x)
    assert dynexec.revert(model) == 3
    assert torch.equal(model(x), dense)
    assert dynexec.convert(model, "[01]").num_blocks == 2
    torch.testing.assert_close(run(model, x, torch.zeros(2, 2, dtype=torch.bool)), model[2](x))


@pytest.mark.parametrize("mode", ["exact", "capacity"])
@pytest.mark.parametrize("batch_norm", ["all", "kept"])
@pytest.mark.parametrize("training", [False, True])
def test_a_block_that_turns_out_to_overwrite_what_its_shortcut_reads(training, batch_norm, mode):
    model = shallow(odd_blocks.ReluInPlaceHiddenProjection()).train(training)
    assert dynexec.convert(model, batch_norm=batch_norm).converted[0][3] == "projection"
    error, message = ValueError, "overwrites its input, which its shortcut reads, inside one of its layers"
    if training and mode == "capacity" and batch_norm == "kept":
        error, message = RuntimeError, "use exact mode"
    with pytest.raises(error, match=message), dynexec.decide(HALF[:, :1], mode=mode):
        model(torch.randn(4, 3, 5, 5))


def test_a_block_that_turns_out_to_overwrite_its_input():
    model, x, keep = shallow(odd_blocks.ReluInPlaceHidden()).train(), torch.randn(4, 3, 5, 5), HALF[:, :1]
    reference = copy.deepcopy(model)
    dynexec.convert(model)
    for decisions in (keep, torch.zeros_like(keep)):
        with pytest.raises(ValueError, match=r"DynamicReluInPlaceHidden of column 0 overwrites .*Adapter\(ReluInPlace"):
            run(model, x, decisions)
    dynexec.revert(model)
    dynexec.convert(model, match=dynexec.Adapter(odd_blocks.ReluInPlaceHidden))
    h = reference[0](x)
    torch.testing.assert_close(run(model, x, torch.zeros_like(keep)), h)
