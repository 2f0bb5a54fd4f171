"""Packing a traced network: what becomes one convolution, and that it stays right where only a part can."""

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn

import dynexec
from dynexec.executors.block import pack_module
from dynexec.executors.packing import PackedConv
from dynexec.executors.stage import EXECUTORS


class Residual(nn.Module):
    """conv -> BatchNorm -> (+ input) -> activation, as a function of the activation."""

    def __init__(self, activation):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.activation = activation

    def forward(self, x):
        return self.activation(self.bn(self.conv(x)) + x)


def packed_graph(model, x):
    function = pack_module(model, x)
    return function, [node for node in function.__self__.graph.nodes if node.op not in ("placeholder", "output")]


def test_convolution_norm_addition_and_relu_become_one_call():
    function, nodes = packed_graph(toys.finish(Residual(torch.relu)), torch.randn(2, 8, 13, 13))
    assert len(nodes) == 1 and isinstance(nodes[0].target, PackedConv)
    assert nodes[0].target.activation == "relu"


@pytest.mark.parametrize("activation", [torch.relu, F.silu, F.relu6, F.hardswish, nn.ReLU6(), nn.SiLU(), torch.tanh])
def test_any_activation_behind_an_addition(activation):
    model, x = toys.finish(Residual(activation)), 3 * torch.randn(2, 8, 13, 13)
    function, nodes = packed_graph(model, x)
    assert isinstance(nodes[0].target, PackedConv)
    with torch.no_grad():
        assert torch.allclose(function(x), model(x), rtol=1e-4, atol=1e-5)


def test_functional_batch_norm_has_its_own_epsilon():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.bn = nn.BatchNorm2d(8, eps=0.5)

        def forward(self, x):
            bn = self.bn
            return F.batch_norm(self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias)

    model, x = toys.finish(Functional()), torch.randn(2, 8, 13, 13)
    model.bn.running_var.fill_(1e-5)  # as large as the default epsilon
    function, nodes = packed_graph(model, x)
    assert len(nodes) == 1
    with torch.no_grad():
        assert torch.allclose(function(x), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("executor", [None, *EXECUTORS])
def test_a_block_output_that_is_read_twice(executor, tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.first, self.second = toys.BasicBlock(8, 8), toys.BasicBlock(8, 8)

        def forward(self, x):
            x = self.first(self.stem(x))
            return self.second(x) - 3 * x

    model = toys.finish(Twice())
    dynexec.convert(model)
    frozen = dynexec.freeze(model, toys.images(2), executor=executor, cost_cache=tmp_path / "costs.json")
    x = toys.images(4)
    decisions = torch.tensor([[True, True], [False, True], [True, False], [False, False]])
    with torch.no_grad(), dynexec.decide(decisions):
        expected = model(x)
    assert torch.allclose(frozen(x, decisions), expected, rtol=1e-4, atol=1e-5)
