"""Blocks as people write them, in place or not, drawn at random: what is kept is what they compute themselves."""

import copy

import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dynexec

WIDTH = 4
LAYERS = {
    "convolution": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
    "batch norm": lambda: nn.BatchNorm2d(WIDTH),
    "group norm": lambda: nn.GroupNorm(2, WIDTH),
    "silu": nn.SiLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "tanh in place": lambda: Hidden(),
    "dropout": lambda: nn.Dropout(0.0),
    "pool": lambda: nn.AdaptiveAvgPool2d(1),
}
SHORTCUTS = {"identity": nn.Identity, "projection": lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 1))}
seeds = st.integers(0, 2**31 - 1)
ALIASED = ["assigned", "assigned", "assigned", "ignored", "plus one", "times two, under another name"]


class Hidden(nn.Module):
    """Nothing outside says that it writes in place."""

    def forward(self, x):
        return torch.tanh_(x)


class Written(nn.Module):
    """Layers one after the other, each of which was written down in some way, and a shortcut before or after them."""

    def __init__(self, layers, ways, shortcut, first, ending):
        super().__init__()
        self.layers = nn.ModuleList(LAYERS[name]() for name in ("convolution", *layers))
        self.ways, self.first, self.ending = ("assigned", *ways), first, ending
        self.shortcut, self.activation = SHORTCUTS[shortcut](), nn.ReLU(inplace=True)

    def forward(self, x):
        if self.first:
            shortcut = self.shortcut(x)
        y = x
        for layer, way in zip(self.layers, self.ways, strict=True):
            if way == "ignored":
                layer(y)
                continue
            y = layer(y)
            if way == "plus one":
                y += 1
            elif way == "times two, under another name":
                z = y
                z *= 2
        y = y + (shortcut if self.first else self.shortcut(x))
        if self.ending == "ignored":
            self.activation(y)
        return self.activation(y) if self.ending == "assigned" else y


@st.composite
def blocks(draw):
    layers = draw(st.lists(st.sampled_from(sorted(LAYERS)), max_size=4))
    ways = draw(st.lists(st.sampled_from(ALIASED), min_size=len(layers), max_size=len(layers)))
    if draw(st.booleans()):  # or nothing would ever come first
        layers, ways = [*layers, "convolution"], [*ways, "assigned"]
    ending = draw(st.sampled_from(["none", "assigned", "ignored"]))
    return toys.finish(Written(layers, ways, draw(st.sampled_from(sorted(SHORTCUTS))), draw(st.booleans()), ending))


def run(block, function, x, gradients):
    """Output, the gradients of the input and the parameters if they are asked for, and buffers."""
    x = x.clone().requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        y = function(x * 1)  # which a block may overwrite
    found = [y.detach()]
    if gradients:
        block.zero_grad()
        y.square().sum().backward()
        found += [x.grad, *(torch.zeros_like(p) if p.grad is None else p.grad for p in block.parameters())]
    return [*found, *block.buffers()]


@settings(max_examples=150, deadline=None)
@given(
    blocks(),
    st.sampled_from(["eval", "all", "kept", "frozen"]),
    st.sampled_from(["exact", "capacity"]),
    st.lists(st.booleans(), min_size=5, max_size=5),
    st.booleans(),
    seeds,
)
def test_kept_samples_get_what_the_block_computes(block, norm, mode, keep, gradients, seed):
    block, keep = nn.Sequential(block).double(), torch.tensor(keep)
    if norm == "kept" and (mode == "capacity" or keep.sum() < 2):
        return  # refused, or one value per channel
    original = copy.deepcopy(block)
    dense, shortcut = original[0], original[0].shortcut
    x = torch.randn(len(keep), WIDTH, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    try:
        dynexec.convert(block, batch_norm="all" if norm == "eval" else norm)
    except ValueError:
        assert type(shortcut) is not nn.Identity
        return
    block.train(norm != "eval")
    original.train(norm in ("all", "kept"))

    def choose(x):
        dropped = shortcut(x)
        kept = dense(x[keep].clone()) if norm == "kept" else dense(x.clone())[keep]
        return dropped.index_copy(0, keep.nonzero().flatten(), kept)

    def decide(x):
        with dynexec.decide(keep[:, None], mode=mode):
            return block(x)

    try:
        expected = run(original, choose, x, gradients)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # by the block as it was written
        return
    try:
        actual = run(block, decide, x, gradients)
    except ValueError as error:
        assert "overwrites its input" in str(error)
        return
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
