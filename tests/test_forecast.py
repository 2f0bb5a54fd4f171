"""What the model is asked about a network: its launches, by executor."""

from functools import partial

import pytest
import torch
import toys

import dynexec
from dynexec.executors import launch_program
from dynexec.executors.forecast import launches, program_seconds
from dynexec.executors.launches import LaunchPrograms
from dynexec.executors.partition import pack_stages
from dynexec.executors.segment import make_segments
from dynexec.measure.roofline import H100

pytest.importorskip("triton", reason="needs Triton, whose kernels' tiles are asked about")
BATCH = 64


@pytest.fixture(scope="module")
def program():
    """Three basic blocks of two convolutions each, the second one of which writes in place."""
    model = toys.finish(torch.nn.Sequential(*(toys.BasicBlock(16, 16) for _ in range(3))))
    dynexec.convert(model)
    with torch.no_grad():
        network, stages = pack_stages(model, torch.randn(1, 16, 32, 32), None, 1)
        _, (segment,) = make_segments(network, partial(LaunchPrograms, 3))
    (found,) = segment.programs.values()
    return found


def counts(program, executor, kept):
    """(samples, whether it computes, whether by the library) of each launch."""
    found = launches(program, BATCH, [kept, 0, 0], torch.float16, executor)
    return [(samples, layer.reduction > 0, layer.tile is None) for layer, samples in found]


OURS, LIBRARY = (True, False), (True, True)


@pytest.mark.parametrize(
    "executor, kept, first",
    [
        ("static", 9, [(64, *LIBRARY)] * 2),
        ("fused", 9, [(9, *OURS)] * 2),
        ("dense", 9, [(64, *LIBRARY), (9, *OURS)]),
    ],
)
def test_launches_of_a_block(program, executor, kept, first):
    found = counts(program, executor, kept)
    assert found[: len(first)] == first
    assert len(found) == len(first) + 4


def test_dense_leaves_long_convolutions_to_the_library(monkeypatch):
    """And then copies the dropped samples back."""
    model = toys.finish(torch.nn.Sequential(toys.Bottleneck(16, 16)))
    dynexec.convert(model)
    with torch.no_grad():
        network, _ = pack_stages(model, torch.randn(1, 16, 32, 32), None, 1)
        _, (segment,) = make_segments(network, partial(LaunchPrograms, 1))
    (program,) = segment.programs.values()
    before = [(BATCH, *LIBRARY)] * 2 + [(9, False, False)]
    assert counts(program, "dense", 9) == [*before, (9, *OURS)]
    monkeypatch.setattr(launch_program, "_DEEP", 1)
    monkeypatch.setattr(launch_program, "_LONG", 1)
    assert counts(program, "dense", 9) == [*before, (BATCH, *LIBRARY), (BATCH - 9, False, False)]


def test_seconds_grow_with_what_is_kept(program):
    for executor in ("fused", "dense", "switched"):
        times = [program_seconds(H100, program, 4096, [n] * 3, torch.float16, executor) for n in (0, 1024, 3072, 3584)]
        assert times == sorted(times) and times[0] < times[-1]
    found = {
        name: [program_seconds(H100, program, 4096, [n] * 3, torch.float16, name) for n in (1024, 4095)]
        for name in ("fused", "dense", "switched")
    }
    for fused, dense, switched in zip(*found.values(), strict=True):
        assert min(fused, dense) < switched < 1.1 * min(fused, dense)
    static, switched = (
        program_seconds(H100, program, 4096, [4096] * 3, torch.float16, name) for name in ("static", "switched")
    )
    assert times[0] < static < switched < 1.1 * static


def test_both_sets_of_weights_are_one_launch():
    """For all samples, however many of them take which; two gates in every other executor."""
    model = toys.finish(torch.nn.Sequential(toys.BasicBlock(16, 16)))
    dynexec.convert(model, fine_tune="nothing")
    with torch.no_grad():
        network, _ = pack_stages(model, torch.randn(1, 16, 32, 32), None, 1)
        _, (segment,) = make_segments(network, partial(LaunchPrograms, 1))
    (program,) = segment.programs.values()
    before = launches(program, BATCH, [9], torch.float16, "static")
    outside = len(before) - 4
    assert [samples for _, samples in launches(program, BATCH, [9], torch.float16, "fused")][outside:] == [64, 64]
    found = [samples for _, samples in launches(program, BATCH, [9], torch.float16, "conditional")][outside:]
    assert found == [1, 55, 55, 1, 9, 9]
