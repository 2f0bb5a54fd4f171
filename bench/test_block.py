"""One residual block at several keep rates: run ``pytest bench`` (times are printed by pytest-benchmark).

``dense`` is the block without decisions, ``masked`` computes everything and multiplies by the mask, ``compact`` gathers
the kept samples, computes them and scatters them back.
"""

import pytest
import torch

from dynexec import decide
from dynexec.models.blockdrop import BasicBlock, Bottleneck
from dynexec.nn import assign_columns
from dynexec.report.baselines import MaskedEager

SHAPES = {
    "basic 16x32x32": (lambda: BasicBlock(16, 16, 1), (16, 32, 32)),
    "basic 64x8x8": (lambda: BasicBlock(64, 64, 1), (64, 8, 8)),
    "bottleneck 1024x14x14": (lambda: Bottleneck(1024, 256, 1), (1024, 14, 14)),
}
BATCH = 16


@pytest.fixture(params=SHAPES)
def block_and_input(request, benchmark):
    benchmark.group = request.param
    make, shape = SHAPES[request.param]
    block = torch.nn.Sequential(make()).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    assign_columns(block)
    x = torch.randn(BATCH, *shape).contiguous(memory_format=torch.channels_last)
    return block, x


def decisions_of(keep):
    return torch.arange(BATCH).reshape(-1, 1) % 4 < round(4 * keep)


@torch.inference_mode()
def test_dense(benchmark, block_and_input):
    block, x = block_and_input
    benchmark(block, x)


@torch.inference_mode()
def test_masked(benchmark, block_and_input):
    block, x = block_and_input
    masked = MaskedEager(block, x, threads=1)
    benchmark(masked, x, decisions_of(0.5))


@pytest.mark.parametrize("keep", [0.0, 0.25, 0.5, 0.75, 1.0])
@torch.inference_mode()
def test_compact(benchmark, block_and_input, keep):
    block, x = block_and_input
    decisions = decisions_of(keep)

    def run():
        with decide(decisions):
            return block(x)

    with decide(decisions, mode="capacity"):
        expected = block(x)
    torch.testing.assert_close(benchmark(run), expected, rtol=1e-4, atol=1e-4)
