"""What ``explain`` says of layers and policies that run otherwise than one would wish, and why."""

import numpy as np
import pytest
import torch
import toys
from test_routed import choice
from torch import nn

import dynexec
from dynexec.executors import routed
from dynexec.executors.engine import engine_missing
from dynexec.executors.segment import Segment

needs_engine = pytest.mark.skipif(engine_missing() is not None, reason=str(engine_missing()))


class Unknown(nn.Module):
    """Layers that the engine does not know, outside of blocks and within one, of one input and of two."""

    def __init__(self):
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3), nn.Softplus()
        self.blocks = nn.Sequential(toys.BasicBlock(8, 8), toys.BasicBlock(8, 8), toys.BasicBlock(8, 8))
        self.blocks[1].relu = nn.Softplus()
        self.wide = nn.Conv2d(8, 8, 3, padding=1, groups=2)

    def forward(self, x):
        x = self.stem(x)
        y = torch.tanh(self.wide(self.blocks(self.act(x))))
        return x + torch.maximum(x, y)  # that addition it knows


@needs_engine
def test_sizes_of_numpy_are_known():
    size = np.int64(2)
    model = nn.Sequential(nn.MaxPool2d((size, size), size), toys.BasicBlock(3, 3))
    dynexec.convert(model)
    assert "by PyTorch" not in dynexec.freeze(model, torch.randn(2, 3, 16, 16), executor="resident").explain()


@needs_engine
def test_layers_that_the_engine_does_not_know_are_named():
    model, x = toys.finish(Unknown()), torch.randn(2, 3, 16, 16)
    dynexec.convert(model)
    names = "act (Softplus), relu (Softplus) of block blocks.1, wide (torch.float32, 2 groups), tanh and 1 more"
    with pytest.raises(RuntimeError) as error:
        dynexec.freeze(model, x, executor="resident")
    assert str(error.value).endswith(f"it does not know {names}")
    assert f"by PyTorch, being unknown to the engine: {names}" in dynexec.freeze(model, x).explain().splitlines()
    model.wide = nn.Identity()
    names = "act (Softplus), relu (Softplus) of block blocks.1, tanh, maximum"
    assert f"by PyTorch, being unknown to the engine: {names}" in dynexec.freeze(model, x).explain().splitlines()


class Stubborn(toys.Policy):
    """Looks at values, which cannot be traced."""

    def forward(self, images):
        return super().forward(images if images.sum() > 0 else -images)


def make_policy(num_blocks, *layers):
    pooled = nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, num_blocks, 1), nn.Flatten()
    return toys.finish(nn.Sequential(nn.Conv2d(3, 16, 3), *layers, *pooled, nn.Sigmoid()))


def notes(frozen):
    return [line for line in frozen.explain().splitlines() if line.startswith("policy: ")]


@needs_engine
def test_a_policy_that_does_not_run_by_the_engine_says_why(monkeypatch):
    model, x = toys.timm_style(), toys.images(4)
    num_blocks = dynexec.convert(model).num_blocks

    def freeze(policy, executor=None):
        frozen = dynexec.freeze(model, x, policy=policy, executor=executor)
        with torch.no_grad():
            assert torch.allclose(frozen.policy(x), policy(x), atol=1e-5)
        return frozen

    stubborn = freeze(toys.finish(Stubborn(num_blocks)))
    (why,) = notes(stubborn)
    assert why.startswith("policy: it cannot be traced (TraceError: symbolically traced variables")
    assert "policy: as it is" in stubborn.explain()
    assert notes(freeze(toys.finish(toys.Policy(num_blocks)))) == ["policy: no convolution"]
    policy = make_policy(num_blocks)
    assert notes(freeze(policy, "compact")) == ["policy: executor is 'compact'"]
    assert notes(freeze(policy, "resident")) == []
    assert notes(freeze(make_policy(num_blocks, nn.Softplus()), "resident")) == [
        "policy: unknown to the engine: 1 (Softplus)"
    ]
    run = Segment.__call__
    monkeypatch.setattr(Segment, "__call__", lambda self, x, route: run(self, x, route) + (self.maker.columns == 0))
    (why,) = notes(freeze(policy, "resident"))
    assert why.startswith("policy: by the engine its output differs by ")


@needs_engine
def test_a_slow_engine_says_how_slow(monkeypatch):
    """Measured times are given here: the engine takes two seconds for a policy, its layers one."""
    times = iter((2.0, 1.0))
    monkeypatch.setattr("dynexec.executors.function.seconds", lambda run, device: next(times))
    model, x = toys.timm_style(), toys.images(4)
    policy = make_policy(dynexec.convert(model).num_blocks)
    frozen = dynexec.freeze(model, x, policy=policy)
    assert notes(frozen) == ["policy: by the engine 2000.00 ms, by layer 1000.00 ms (measured)"]


@needs_engine
def test_one_is_singular():
    model, x = toys.finish(nn.Sequential(nn.Conv2d(3, 4, 3), toys.BasicBlock(4, 4))), toys.images(2)
    dynexec.convert(model)
    lines = dynexec.freeze(model, x, executor="resident").explain().splitlines()
    assert lines[0].startswith("1 block, 1 segment of the engine (") and ", 1 block, for images" in lines[-1]
    frozen = dynexec.freeze(model, x, executor="masked")
    frozen.samples_at_once = 1
    text = frozen.explain()
    assert text.startswith("1 block, 0 segments, 1 stage by layer, torch.float32, 1 sample at once")
    assert "\nstage 0: 1 block 1 .. 1, rows" in text
    part = dynexec.freeze(choice(), x, executor="fused").explain().splitlines()[0]
    assert part.startswith("nets.0: 1 segment of 5 instructions, 0 other layers")


def test_a_part_says_why():
    assert routed.FrozenPart(nn.ReLU(), "it is odd").explain() == "as it is (it is odd)"
