"""Micro-benchmarks of row moves and planning: ``pytest bench/test_rows.py``, one thread.

A tiny tensor shows the cost of a call, the block-sized ones the cost of the bytes.
"""

import pytest
import torch

from dynexec import Route, ops

# name -> (samples, shape of a row): a call, ResNet-110's last stage, ResNet-101's third.
SIZES = {"tiny": (8, (16,)), "64x8x8": (64, (64, 8, 8)), "1024x14x14": (16, (1024, 14, 14))}
MODES = {"replace": {}, "add, relu": {"add": True, "relu": True}}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def half_kept(size):
    samples, row = SIZES[size]
    x = torch.randn(samples, *row)
    if len(row) == 3:
        x = x.to(memory_format=torch.channels_last)
    index = torch.randperm(samples)[: samples // 2].sort().values.int()
    return x, index, x[index]


@pytest.mark.parametrize("size", SIZES)
def test_gather(benchmark, size):
    x, index, rows = half_kept(size)
    benchmark(ops.gather_rows, x, index, out=rows)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_scatter(benchmark, size, mode):
    x, index, rows = half_kept(size)
    benchmark(ops.scatter_rows_, x, index, rows, **MODES[mode])


@pytest.mark.parametrize("samples,blocks", [(1, 54), (16, 33), (64, 54), (100, 1000), (1_000_000, 3)])
def test_plan(benchmark, samples, blocks):
    benchmark(ops.plan, torch.rand(samples, blocks) < 0.5, 2)


@pytest.mark.parametrize("samples,blocks", [(1, 54), (16, 33), (64, 54)])
def test_route(benchmark, samples, blocks):
    benchmark(Route.from_decisions, torch.rand(samples, blocks) < 0.5)
