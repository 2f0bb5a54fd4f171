"""Deleting blocks of a trained residual network at test time (Veit et al., NIPS 2016, section 4)."""

from dataclasses import dataclass
from operator import index
from statistics import median

import torch

from dynexec.models.training import evaluate
from dynexec.nn import DynamicNetwork
from dynexec.nn.residual import count_blocks


@dataclass(frozen=True)
class LesionStudy:
    """Classification errors of a network with blocks deleted.

    Attributes
    ----------
    error : float
        Error of the whole network.
    by_block : tuple of float
        Errors with one block deleted, by column.
    by_count : tuple of tuple of float
        Entry k holds one error per random set of k deleted blocks (a single one if there is only one set: 0 and L).
    """

    error: float
    by_block: tuple[float, ...]
    by_count: tuple[tuple[float, ...], ...]


def delete_blocks(model, blocks):
    """Return decisions that keep every block but the given ones, for every sample.

    Parameters
    ----------
    model : nn.Module
        A :class:`dynexec.nn.DynamicNetwork` or a converted model, with L blocks.
    blocks : sequence of int, or integer tensor ``[M]``
        Columns to delete.

    Returns
    -------
    bool tensor ``[L]``, on the CPU: for ``net(images, decisions=...)`` or ``dynexec.decide``.

    Raises
    ------
    TypeError
        If ``blocks`` are not column numbers; a bool mask is not accepted.
    ValueError
        If a column does not exist, or ``model`` has none.
    """
    count = count_blocks(model.backbone if isinstance(model, DynamicNetwork) else model)
    if count == 0:
        raise ValueError(
            f"model must be converted or a DynamicNetwork, got a {type(model).__name__} in which no block has a column"
        )
    blocks = _column_numbers(blocks)
    wrong = [block for block in blocks if not 0 <= block < count]
    if wrong:
        raise ValueError(f"blocks must be columns from 0 to {count - 1}, got {wrong}")
    decisions = torch.ones(count, dtype=torch.bool)
    decisions[blocks] = False
    return decisions


def _column_numbers(blocks):
    blocks = blocks.tolist() if isinstance(blocks, torch.Tensor) else blocks
    try:
        if any(isinstance(block, bool) for block in blocks):
            raise TypeError
        return [index(block) for block in blocks]
    except TypeError:
        raise TypeError(f"blocks must be a sequence of column numbers, got {blocks!r}") from None


def lesion_study(model, images, labels, *, max_deleted=None, draws=10, seed=0, batch_size=512):
    """Measure the error with each single block deleted, and with growing random sets of blocks deleted.

    Parameters
    ----------
    model : nn.Module
        A :class:`dynexec.nn.DynamicNetwork` or a converted model; evaluated without using its policy.
    images : float tensor ``[N, C, H, W]``
    labels : tensor of integers ``[N]``
    max_deleted : int, optional
        Largest number of blocks deleted; default all L.
    draws : int
        Random sets per number of deleted blocks, at least 1.
    seed : int
        The same seed deletes the same sets.
    batch_size : int

    Returns
    -------
    LesionStudy

    Raises
    ------
    TypeError, ValueError
        If images and labels are not what :func:`evaluate` takes, ``draws`` is below 1, ``max_deleted`` is not from 0 to
        L, or ``model`` has no dynamic block with a column.
    """
    net = model if isinstance(model, DynamicNetwork) else DynamicNetwork(model)
    count = count_blocks(net.backbone)
    max_deleted = count if max_deleted is None else max_deleted
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    if not 0 <= max_deleted <= count:
        raise ValueError(f"max_deleted must be between 0 and {count}, got {max_deleted}")
    generator = torch.Generator().manual_seed(seed)

    def error(blocks):
        decisions = delete_blocks(net, blocks).to(images.device)
        return 1.0 - evaluate(net, images, labels, decisions, batch_size=batch_size).accuracy

    by_block = tuple(error([block]) for block in range(count))
    by_count = []
    for deleted in range(max_deleted + 1):
        repeats = 1 if deleted in (0, count) else draws
        sets = [torch.randperm(count, generator=generator)[:deleted].tolist() for _ in range(repeats)]
        by_count.append(tuple(error(blocks) for blocks in sets))
    return LesionStudy(by_count[0][0], by_block, tuple(by_count))


def plot_lesion(study, path=None):
    """Draw a :class:`LesionStudy` as two panels; requires matplotlib.

    Parameters
    ----------
    study : LesionStudy
    path : path, optional
        File to save the figure to, in the format of its suffix.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    single, many = figure.subplots(1, 2)
    single.bar(range(len(study.by_block)), [100 * error for error in study.by_block], color="tab:blue")
    single.axhline(100 * study.error, color="black", linestyle="--", label="no block deleted")
    single.set(xlabel="deleted block", ylabel="test error (%)", title="One block deleted")
    single.legend()
    counts = range(len(study.by_count))
    middle, low, high = ([100 * pick(draws) for draws in study.by_count] for pick in (median, min, max))
    many.plot(counts, middle, marker="o", color="tab:blue", label="median")
    many.fill_between(counts, low, high, alpha=0.25, color="tab:blue", label="range over random sets")
    many.set(xlabel="number of deleted blocks", ylabel="test error (%)", title="Random sets of blocks deleted")
    many.legend()
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
