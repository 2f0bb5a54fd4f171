"""Routes: the groups of decisions, what the host knows of them, and what is refused."""

import dataclasses

import pytest
import torch

from dynexec import Route, ops


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("samples,blocks", [(0, 3), (1, 1), (1, 54), (7, 5), (64, 54), (3, 1000)])
def test_groups_are_the_samples_that_take_a_choice(samples, blocks, keep):
    decisions = torch.rand(samples, blocks) < keep
    route = Route.from_decisions(decisions)
    assert (route.num_samples, route.num_blocks, route.exact, route.choices) == (samples, blocks, True, 2)
    assert route.counts == tuple((samples - kept, kept) for kept in decisions.sum(0).tolist())
    for block in range(blocks):
        for choice in range(2):
            expected = (decisions[:, block] == bool(choice)).nonzero().flatten()
            group = route.group(block, choice)
            assert group.dtype == torch.int32
            assert torch.equal(group.long(), expected)
            assert route.count(block, choice) == len(expected)
    if blocks:
        assert torch.equal(route.group(0), route.group(0, 1))
        assert route.group(0).untyped_storage().data_ptr() == route.index.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_many_choices(dtype):
    decisions = torch.randint(5, (33, 7)).to(dtype)
    route = Route.from_decisions(decisions, choices=5)
    for block in range(7):
        for choice in range(5):
            assert route.group(block, choice).tolist() == (decisions[:, block] == choice).nonzero().flatten().tolist()
    assert all(sum(counts) == 33 for counts in route.counts)


def test_more_choices_than_the_dtype_holds():
    route = Route.from_decisions(torch.tensor([[255]], dtype=torch.uint8), choices=300)
    assert (route.count(0, 255), route.count(0, 0), route.count(0, 299)) == (1, 0, 0)


def test_one_row_for_all_samples_and_other_views():
    row = torch.tensor([True, False, True])
    route = Route.from_decisions(row.expand(4, 3))
    assert [route.group(block).tolist() for block in range(3)] == [[0, 1, 2, 3], [], [0, 1, 2, 3]]


def test_large_batches():
    decisions = torch.rand(1_000_000, 2) < 0.5
    route = Route.from_decisions(decisions)
    assert torch.equal(route.group(1).long(), decisions[:, 1].nonzero().flatten())


def test_device_route_never_reads_the_device():
    # A tensor on "meta" has no values: reading one raises.
    decisions = torch.zeros(6, 4, dtype=torch.bool, device="meta")
    route = Route.from_decisions(decisions, exact=False)
    assert (route.num_samples, route.num_blocks, route.exact, route.counts) == (6, 4, False, None)
    assert route.index.shape == (4, 6)
    assert route.offset.shape == (4, 3)
    for ask in (route.group, route.count):
        with pytest.raises(RuntimeError, match="device route"):
            ask(0)


def test_device_route_equals_the_exact_one():
    decisions = torch.rand(9, 4) < 0.5
    exact, device = Route.from_decisions(decisions), Route.from_decisions(decisions, exact=False)
    assert torch.equal(exact.index, device.index)
    assert torch.equal(exact.offset, device.offset)


def test_exact_route_waits_for_the_device_once(monkeypatch):
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor.shape) or tolist(tensor))
    Route.from_decisions(torch.rand(9, 4) < 0.5)
    assert reads == [(4, 3)]


def test_values_a_device_could_not_check_are_found_with_the_counts(monkeypatch):
    decisions = torch.zeros(6, 4, dtype=torch.int64)
    index, offset = ops.plan(decisions, 2)
    decisions[3, 1] = 2
    offset[1, 1:] = 5

    class OnDevice(torch.Tensor):
        device = torch.device("cuda")

    monkeypatch.setattr(ops, "plan", lambda decisions, choices: (index, offset))
    with pytest.raises(ValueError, match=r"decisions must be in 0\.\.1, got 2 at \[3, 1\]"):
        Route.from_decisions(decisions.as_subclass(OnDevice))


B = torch.zeros(3, 2, dtype=torch.bool)
WRONG = [
    (B.float(), 2, TypeError, "torch.float32: threshold probabilities first, probabilities >= 0.5$"),
    (torch.full((3, 2), torch.nan), 2, TypeError, r"threshold probabilities first.* \(these hold NaN\)"),
    (B[0], 2, ValueError, r"decisions must have shape \[N, L\], got \(2,\)"),
    (B.to(torch.complex64), 2, TypeError, "decisions must be a bool or integer tensor"),
    ([[True]], 2, TypeError, "decisions must be a bool or integer tensor.*got list"),
    (B, 3, ValueError, "choices must be 2 for bool decisions, got 3"),
    (B, 2.0, TypeError, "choices must be an int, got 2.0"),
    (B, None, TypeError, "choices must be an int, got None"),
    (B.int(), "2", TypeError, "choices must be an int, got '2'"),
    (B.int() + 2, 2, ValueError, r"decisions must be in 0\.\.1, got 2 at \[0, 0\]"),
]


@pytest.mark.parametrize("decisions,choices,error,message", WRONG, ids=[case[3] for case in WRONG])
def test_wrong_decisions(decisions, choices, error, message):
    with pytest.raises(error, match=message):
        Route.from_decisions(decisions, choices=choices)


def test_wrong_block_or_choice():
    route = Route.from_decisions(B)
    for block, choice, name in ((2, 1, "block"), (-1, 1, "block"), (0, 2, "choice"), (0, -1, "choice")):
        for ask in (route.group, route.count):
            with pytest.raises(ValueError, match=f"{name} must be in 0..1, got"):
                ask(block, choice)


def test_route_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Route.from_decisions(B).choices = 3
