"""Sharing plans: rows are distinct histories, in an order that makes slices of them; and how many there are."""

import pytest
import torch

from dynexec.nn.tasks import SharingPlan, count_shared_rows

SIZES = [(1, 1, 1), (1, 3, 5), (4, 1, 3), (5, 2, 6), (7, 5, 9)]


def histories(decisions):
    """For each block the distinct (sample, decisions before it), by brute force; one more at the end."""
    samples, tasks, blocks = decisions.shape
    return [
        {(n, tuple(decisions[n, t, :block].tolist())) for n in range(samples) for t in range(tasks)}
        for block in range(blocks + 1)
    ]


def follow(plan, x, blocks):
    """Rows that carry the history that made them: a running block appends 1, a skipped one 0."""
    counts = []
    for block in range(blocks):
        run, skip = plan.blocks[block]
        parts = []
        for groups, mark in ((run, 1.0), (skip, 0.0)):
            if groups is not None:
                rows = plan.take(x, groups).clone()
                rows[:, block + 1] = mark
                parts.append(rows)
        counts.append((len(x), 0 if run is None else len(parts[0])))
        x = torch.cat(parts)
    return [plan.take(x, groups) for groups in plan.tasks], counts


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9, 1.0])
def test_every_task_gets_rows_of_its_own_history_and_none_is_computed_twice(size, keep):
    samples, tasks, blocks = size
    decisions = torch.rand(size) < keep
    plan = SharingPlan.from_decisions(decisions, samples)
    x = torch.full((samples, blocks + 1), -1.0)
    x[:, 0] = torch.arange(samples)
    leaves, counts = follow(plan, x, blocks)
    expected = torch.cat([x[:, None, :1].expand(samples, tasks, 1), decisions.float()], 2)
    for task, rows in enumerate(leaves):
        assert torch.equal(rows, expected[:, task])
    distinct = histories(decisions)
    for block, (rows, running) in enumerate(counts):
        assert rows == len(distinct[block])
        assert running == sum(history[-1] for _, history in distinct[block + 1])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9, 1.0])
def test_counts(size, keep):
    samples, _, blocks = size
    decisions = torch.rand(size) < keep
    rows, running = count_shared_rows(decisions)
    assert rows.shape == running.shape == (samples, blocks)
    for n in range(samples):
        distinct = histories(decisions[n : n + 1])
        assert rows[n].tolist() == [len(level) for level in distinct[:-1]]
        assert running[n].tolist() == [sum(h[-1] for _, h in level) for level in distinct[1:]]
        assert all(torch.equal(a[n], b) for a, b in zip((rows, running), count_shared_rows(decisions[n])))


def test_decisions_for_all_samples_are_decisions_per_sample():
    decisions = torch.rand(3, 6) < 0.6
    plan = SharingPlan.from_decisions(decisions, 4)
    each = SharingPlan.from_decisions(decisions.expand(4, 3, 6), 4)
    assert (plan.group, each.group) == (4, 1)
    x = torch.cat([torch.arange(4.0)[:, None], torch.full((4, 6), -1.0)], 1)
    for rows, others in zip(follow(plan, x, 6)[0], follow(each, x, 6)[0]):
        assert torch.equal(rows, others)


def test_nothing_is_copied_while_tasks_agree():
    decisions = torch.tensor([[True, False, True, True], [True, False, True, False]])
    plan = SharingPlan.from_decisions(decisions, 3)
    assert plan.blocks[:3] == ((slice(0, 1), None), (None, slice(0, 1)), (slice(0, 1), None))
    assert plan.blocks[3] == (slice(0, 1), slice(0, 1))  # it splits: the row that runs comes first
    assert plan.tasks == (slice(0, 1), slice(1, 2))
    x = torch.rand(3, 2)
    assert plan.take(x, slice(0, 1)) is x
    x = torch.rand(6, 2)
    assert plan.take(x, slice(1, 2)).data_ptr() == x[3:].data_ptr()


def test_rows_that_are_no_neighbours_are_gathered_in_their_layout():
    decisions = torch.tensor([[[True, True]], [[True, False]], [[True, True]]])
    plan = SharingPlan.from_decisions(decisions, 3)
    run, skip = plan.blocks[1]
    assert run.tolist() == [0, 2] and skip == slice(1, 2)
    (back,) = plan.tasks
    assert back.tolist() == [0, 2, 1]  # in the order of the samples
    x = torch.rand(3, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    rows = plan.take(x, run)
    assert torch.equal(rows, x[[0, 2]]) and rows.is_contiguous(memory_format=torch.channels_last)


def test_rows_may_be_elsewhere_than_decisions():
    plan = SharingPlan.from_decisions(torch.tensor([[[True]], [[False]], [[True]]]), 3, torch.device("meta"))
    assert plan.blocks[0][0].device.type == "meta"


@pytest.mark.parametrize(
    ("decisions", "error", "message"),
    [
        ([[True]], TypeError, r"bool tensor \[T, L\] or \[N, T, L\], got list"),
        (torch.ones(2, 3), TypeError, "got torch.float32"),
        (torch.ones(2, 3, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.ones(3, dtype=torch.bool), ValueError, r"must have shape .*, got \(3,\)"),
        (torch.ones(2, 0, dtype=torch.bool), ValueError, r"got \(2, 0\)"),
        (torch.ones(3, 2, 4, dtype=torch.bool), ValueError, r"decisions must be for 5 samples, got \(3, 2, 4\)"),
    ],
)
def test_bad_decisions(decisions, error, message):
    with pytest.raises(error, match=message):
        SharingPlan.from_decisions(decisions, 5)
