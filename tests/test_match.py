"""convert's ``match``: which modules are converted, and adapters for blocks that cannot be traced."""

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
from dynexec.nn import dynamic_blocks

HALF = torch.tensor([[True, False], [False, True], [True, True], [False, False]])


class NotTorchvision(toys.BasicBlock):
    pass


def strange_stage():
    stage = [toys.BasicBlock(8, 8), NotTorchvision(8, 8), toys.BasicBlock(8, 8)]
    return toys.finish(toys.Network(8, [stage], 8))


@pytest.mark.parametrize(
    "match, names",
    [
        (None, ["0.0", "0.1", "0.2"]),
        (toys.BasicBlock, ["0.0", "0.1", "0.2"]),
        (NotTorchvision, ["0.1"]),
        ("layers.0.[02]", ["0.0", "0.2"]),
        ("layers.0.*", ["0.0", "0.1", "0.2"]),
        (lambda name, module: name.endswith("2"), ["0.2"]),
        (["*.2", NotTorchvision], ["0.1", "0.2"]),
        (("*.2", NotTorchvision), ["0.1", "0.2"]),
        ((toys.Bottleneck, NotTorchvision), ["0.1"]),
    ],
)
def test_match(match, names):
    model = strange_stage()
    reference = copy.deepcopy(model)
    conversion = dynexec.convert(model, match)
    assert [row[1] for row in conversion.converted] == [f"layers.{name}" for name in names]
    x = toys.images(2)
    none = torch.zeros(2, len(names), dtype=torch.bool)
    expected = reference.stem(x)
    for number, block in enumerate(reference.layers[0]):
        expected = expected if f"0.{number}" in names else block(expected)
    torch.testing.assert_close(run(model, x, none), reference.head(expected.mean((2, 3))))


@pytest.mark.parametrize(
    "match, error, message",
    [
        ("layer9.*", ValueError, "no residual block that fits match='layer9.*'"),
        (nn.Linear, ValueError, r"head \(Linear\): .*takes a dynexec.Adapter"),
        ([], ValueError, "no residual block"),
        (3, TypeError, "match must be a type.*got int"),
        (["layers.*", 3.5], TypeError, "match must be a type.*got float"),
        (dynexec.Adapter, TypeError, r"got its class: Adapter\(block_type\)"),
    ],
)
def test_match_errors(match, error, message):
    model = toys.torchvision_style()
    with pytest.raises(error, match=message):
        dynexec.convert(model, match)
    assert not dynamic_blocks(model)


class PreActivation(dynexec.Adapter):
    """The branches of a block that cannot be traced."""

    def residual_layers(self, block):
        return [block.conv, torch.tanh]

    def shortcut_layers(self, block):
        return [block.project]

    def activation_layer(self, block):
        return torch.sigmoid


class ProjectsByData(odd_blocks.DataDependent):
    def __init__(self):
        super().__init__()
        self.project = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        if x.abs().max() < 1e9:
            return torch.sigmoid(torch.tanh(self.conv(x)) + self.project(x))
        raise FloatingPointError


@pytest.mark.parametrize("mode", ["exact", "capacity"])
def test_adapter_for_a_block_that_cannot_be_traced(mode):
    model = nn.Sequential(odd_blocks.DataDependent(), ProjectsByData()).eval()
    with pytest.raises(ValueError, match=r"0 \(DataDependent\): its forward cannot be traced \(.*control flow"):
        dynexec.convert(model)
    reference = copy.deepcopy(model)
    conversion = dynexec.convert(model, [PreActivation(ProjectsByData), dynexec.Adapter(odd_blocks.DataDependent)])
    assert [row[3] for row in conversion.converted] == ["identity", "projection"]
    x = torch.randn(4, 4, 5, 5)
    h = torch.where(HALF[:, 0].reshape(-1, 1, 1, 1), reference[0](x), x)
    expected = torch.where(HALF[:, 1].reshape(-1, 1, 1, 1), reference[1](h), reference[1].project(h))
    torch.testing.assert_close(run(model, x, HALF, mode), expected)
    torch.testing.assert_close(run(pickle.loads(pickle.dumps(model)), x, HALF, mode), expected)


def test_adapter_with_a_shortcut_needs_the_residual_branch():
    class Half(dynexec.Adapter):
        def shortcut_layers(self, block):
            return [block.project]

    with pytest.raises(ValueError, match="Half gives shortcut_layers, which need residual_layers"):
        dynexec.convert(shallow(ProjectsByData()), Half(ProjectsByData))
