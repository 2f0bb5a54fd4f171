"""Tasks that share a network's blocks as long as their decisions agree."""

from dataclasses import dataclass

import numpy as np
import torch

from dynexec import ops


@dataclass(frozen=True, eq=False)
class SharingPlan:
    """Which rows exist before each block of a chain in which every task skips blocks of its own.

    A row is a sample with one history of decisions: tasks that decided alike so far have the same features and share
    the row. Where they disagree, it splits in two: one row runs the block and one skips it. The plan is the trie of
    these histories, written as row numbers.

    Rows come in groups. Before the first block there is one group (decisions for all samples) or one per sample. After
    a block, the rows that ran it come first and those that skipped it second, each in the order of the rows that they
    come from. Neighbours thus stay neighbours, and most selections are slices.

    Attributes
    ----------
    blocks : tuple of L pairs ``(run, skip)``
        The groups that run the block, and those that skip it: a slice if they are consecutive, otherwise an int64
        tensor, or None if there are none. A group whose tasks disagree is in both. The rows before the next block are
        those of ``run`` followed by those of ``skip``.
    tasks : tuple of T selections
        The groups of each task after the last block, in the order of the samples.
    group : int
        Number of rows in a group: N if decisions hold for all samples, otherwise 1.
    """

    blocks: tuple
    tasks: tuple
    group: int

    @classmethod
    def from_decisions(cls, decisions, num_samples, device=None):
        """Compile decisions, waiting once for the device that they are on.

        Parameters
        ----------
        decisions : bool tensor ``[T, L]`` or ``[N, T, L]``
            True: the task runs the block.
        num_samples : int
            N, the number of rows before the first block.
        device : torch.device, optional
            Device of the rows; default that of ``decisions``.

        Raises
        ------
        TypeError, ValueError
            If dtype or shape is invalid.
        """
        check_task_decisions(decisions)
        if decisions.dim() == 3 and len(decisions) != num_samples:
            raise ValueError(f"decisions must be for {num_samples} samples, got {tuple(decisions.shape)}")
        device = decisions.device if device is None else device
        executes = decisions.detach().cpu().numpy()
        executes = executes[None] if executes.ndim == 2 else executes
        groups, num_tasks, num_blocks = executes.shape
        row = np.repeat(np.arange(groups)[:, None], num_tasks, axis=1)
        count, blocks = groups, []
        for block in range(num_blocks):
            keys, inverse = np.unique(row + count * ~executes[:, :, block], return_inverse=True)
            ran = int(np.searchsorted(keys, count))
            blocks.append((_select(keys[:ran], device), _select(keys[ran:] - count, device)))
            row, count = inverse.reshape(row.shape), len(keys)
        tasks = tuple(_select(row[:, task], device) for task in range(num_tasks))
        return cls(tuple(blocks), tasks, num_samples if decisions.dim() == 2 else 1)

    def take(self, x, groups):
        """Return the rows of ``x`` that a selection stands for; a view if it is a slice."""
        if not isinstance(groups, slice):
            return ops.gather_rows(x.unflatten(0, (-1, self.group)), groups).flatten(0, 1)
        start, stop = groups.start * self.group, groups.stop * self.group
        return x if stop - start == len(x) else x[start:stop]


def count_shared_rows(decisions):
    """Count how many rows a sample has before each block, and how many of them run it.

    Parameters
    ----------
    decisions : bool tensor ``[T, L]`` or ``[N, T, L]``
        True: the task runs the block.

    Returns
    -------
    rows, running : int64 tensors ``[L]`` or ``[N, L]``
        Distinct histories before the block, and how many of them have a task that runs it. Without sharing these would
        be T and ``decisions.sum(-2)``.
    """
    check_task_decisions(decisions)
    same = decisions.unsqueeze(-2) == decisions.unsqueeze(-3)  # [..., task, other task, L]
    same = same.long().cumprod(-1).bool()
    earlier = torch.ones(same.shape[-2], same.shape[-2], dtype=torch.bool, device=same.device).tril(-1)
    first = ~(same & earlier.unsqueeze(-1)).any(-2)  # of the tasks with this history, up to and including the block
    running = (first & decisions).sum(-2)
    after = first.sum(-2)
    return torch.cat([torch.ones_like(after[..., :1]), after[..., :-1]], -1), running


def check_task_decisions(decisions):
    """Raise TypeError or ValueError unless ``decisions`` is a bool tensor ``[T, L]`` or ``[N, T, L]``."""
    kind = getattr(decisions, "dtype", type(decisions).__name__)
    if kind != torch.bool:
        raise TypeError(f"decisions must be a bool tensor [T, L] or [N, T, L], got {kind}")
    if decisions.dim() not in (2, 3) or 0 in decisions.shape:
        raise ValueError(f"decisions must have shape [T, L] or [N, T, L], got {tuple(decisions.shape)}")


def _select(groups, device):
    """Return row numbers in their shortest form: None, a slice, or a tensor."""
    if len(groups) == 0:
        return None
    first, last = int(groups[0]), int(groups[-1])
    if last - first + 1 == len(groups) and (np.diff(groups) == 1).all():
        return slice(first, last + 1)
    return torch.from_numpy(groups).to(device)
