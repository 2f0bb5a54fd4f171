"""Branches in training: gradients in batches, shapes that the addition broadcasts or cannot add, layers in place."""

import re

import pytest
import torch
import toys
from test_batch_norm import Own
from test_training import assert_same, gradients, inside
from torch import nn

import dynexec
from dynexec.nn import assign_columns


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("batch_norm", ["all", "frozen"])
def test_gradients_in_batches_and_jacobians(batch_norm):
    model = nn.Sequential(Own(), Own(shortcut=nn.Conv2d(4, 4, 1).double())).double()
    num_blocks = assign_columns(model, batch_norm=batch_norm)
    x = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    decisions = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]]).bool()
    assert decisions.shape[1] == num_blocks
    model.train()
    found = {}
    for mode, given in (("exact", decisions), ("soft", decisions.double())):
        model.requires_grad_(False)

        def run(x, mode=mode, given=given):
            with dynexec.decide(given, mode=mode):
                return model(x)

        given_x = x.clone().requires_grad_()
        y = run(given_x.sin()).sin()
        several = torch.eye(y.numel(), dtype=y.dtype)[::17].reshape(-1, *y.shape)
        (rows,) = torch.autograd.grad(y, given_x, several, is_grads_batched=True, create_graph=True)
        found[mode] = [rows, *torch.autograd.grad(rows.square().sum(), given_x)]
        if batch_norm == "frozen":  # running statistics cannot be written inside of a transform
            found[mode] += [
                torch.func.jacrev(lambda x: run(x).sum(0))(x),
                torch.func.jacfwd(lambda scale: run(x * scale).sum(0))(torch.ones((), dtype=x.dtype)),
            ]
    for actual, expected in zip(found["exact"], found["soft"], strict=True):
        torch.testing.assert_close(actual, expected)


class Context(nn.Module):
    """Adds one value per channel, of all pixels, which are taken together before or after BatchNorm."""

    def __init__(self, pool_first):
        super().__init__()
        self.pool_first = pool_first
        self.conv, self.bn, self.pool = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        return torch.relu(
            x + (self.bn(self.conv(self.pool(x))) if self.pool_first else self.pool(self.bn(self.conv(x))))
        )


@pytest.mark.parametrize("batch_norm", ["all", "frozen"])
@pytest.mark.parametrize("pool_first", [True, False])
@pytest.mark.parametrize("match", [None, Context])
def test_a_branch_that_the_addition_broadcasts(match, pool_first, batch_norm):
    model = nn.Sequential(toys.finish(Context(pool_first))).double()
    assert dynexec.convert(model, match=match, batch_norm=batch_norm).num_blocks == 1
    model.train()
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    for kept in ([], [2], [0, 1, 3], range(5)):
        decisions = torch.zeros(5, 1, dtype=torch.bool)
        decisions[list(kept)] = True
        expected = gradients(model, x, inside(model, decisions.double(), "soft"))
        assert_same(gradients(model, x, inside(model, decisions)), expected)


class Reshaped(Own):
    """A branch of another shape than its shortcut."""

    def __init__(self, reshape):
        super().__init__()
        self.reshape = reshape

    def residual_layers(self):
        return [self.conv1, self.reshape, self.bn1]


@pytest.mark.parametrize("training, rows", [(True, 4), (False, 2)])
@pytest.mark.parametrize(
    "reshape, more, height",
    [(lambda x: torch.cat([x, x[:1]]), 1, 5), (lambda x: x[:0], -1, 5), (lambda x: x[:, :, 1:], 0, 4)],
)
def test_a_branch_of_another_shape_is_refused(reshape, more, height, training, rows):
    """BatchNorm's statistics need all rows in training; else the branch gets those that keep the block."""
    block = Reshaped(reshape)
    assign_columns(block)
    block.train(training)
    decisions = torch.tensor([[True], [False], [True], [False]])
    shape = f"({rows + more if more >= 0 else 0}, 4, {height}, 5)"
    message = f"the Reshaped of column 0 gives {shape} and its shortcut ({rows}, 4, 5, 5): a block that can be dropped"
    with pytest.raises(ValueError, match=re.escape(message)), dynexec.decide(decisions):
        block(torch.randn(4, 4, 5, 5))


def test_a_first_layer_in_place_beside_a_projection():
    """The projection has read the input by then, where no gradient needs it again."""

    class First(Own):
        def residual_layers(self):
            return [nn.ReLU(inplace=True), self.conv1, self.bn1]

    block = First(shortcut=nn.Conv2d(4, 4, 1)).requires_grad_(False)
    assign_columns(block)
    block.train()
    x, decisions = torch.randn(4, 4, 5, 5), torch.tensor([[True], [False], [True], [False]])
    with dynexec.decide(decisions):
        actual = block(x.clone())
    with dynexec.decide(decisions, mode="capacity"):
        torch.testing.assert_close(actual, block(x.clone()))


def test_what_has_no_running_statistics_cannot_be_frozen():
    class Own(toys.BasicBlock):
        def __init__(self):
            super().__init__(4, 4)
            self.bn2 = nn.BatchNorm2d(4, track_running_stats=False)

    model = nn.Sequential(toys.BasicBlock(4, 4), Own())
    with pytest.raises(ValueError, match="a BatchNorm of block '1' has no running statistics to freeze"):
        dynexec.convert(model, batch_norm="frozen")
    with pytest.raises(ValueError, match="a BatchNorm of the model itself has no running statistics to freeze"):
        dynexec.convert(Own(), batch_norm="frozen")
    assert type(model[0]) is toys.BasicBlock and type(model[1]) is Own and model[0].bn1.training
    assert dynexec.convert(model, batch_norm="kept").num_blocks == 2
