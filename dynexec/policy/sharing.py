"""Losses and curriculum for decisions of tasks that share a network (AdaShare, Sun et al., NeurIPS 2020)."""

import torch
from torch.nn.functional import log_softmax

from dynexec.policy.bernoulli import check_logits
from dynexec.policy.curriculum import check_trained


def sparsity_loss(logits, *, trained=None, weighted=False):
    """Cross-entropy between the logits and "skip", averaged over layers and summed over tasks: a scalar.

    Parameters
    ----------
    logits : float tensor ``[T, L, 2]`` or ``[N, T, L, 2]``
        Per task and layer; column 0 executes, column 1 skips. Averaged over samples.
    trained : bool tensor ``[L]``, optional
        Layers that count, at least one: from :func:`dynexec.policy.curriculum_mask`.
    weighted : bool
        Multiply by 2 (l + 1) / L for layer l from 0: the published setting ``diff_sparsity_weights`` without
        ``is_sharing``. With both, as in all published configurations, the term is not weighted.

    Raises
    ------
    TypeError, ValueError
        If ``logits`` is not a floating-point tensor of such a shape or, on the CPU, holds NaN; or if ``trained`` is not
        bool ``[L]``, or is all False.

    Notes
    -----
    Equivalent to ``sum(F.cross_entropy(task, torch.ones(L, dtype=torch.int64)) for task in logits)``.
    """
    _check(logits)
    loss = -log_softmax(logits, -1)[..., 1]
    if weighted:
        loss = loss * 2 * _rising(loss)
    if trained is not None:
        check_trained(trained, loss.shape[-1])
        loss = loss[..., trained.to(loss.device)]
        if loss.shape[-1] == 0:
            raise ValueError("trained must hold at least one layer that counts, got none")
    return loss.mean(-1).sum(-1).mean()


def sharing_loss(logits, *, weighted=True):
    """Sum the distances between the tasks' logits to execute, over pairs of tasks and over layers: a scalar.

    Parameters
    ----------
    logits : float tensor ``[T, L, 2]`` or ``[N, T, L, 2]``
        As in :func:`sparsity_loss`. All layers count, however far the curriculum is.
    weighted : bool
        Weight layer l from 0 by (l + 1) / L, as the published code does with ``diff_sparsity_weights``; otherwise by 1.

    Raises
    ------
    TypeError, ValueError
        If ``logits`` is not a floating-point tensor of such a shape or, on the CPU, holds NaN.

    Notes
    -----
    Equivalent, with ``a = logits[..., 0]``, to
    ``sum((weights * (a[i] - a[j]).abs()).sum() for i in range(T) for j in range(i))``.
    """
    _check(logits)
    execute = logits[..., 0]
    tasks = execute.shape[-2]
    one, other = torch.triu_indices(tasks, tasks, 1, device=execute.device)
    distance = (execute[..., one, :] - execute[..., other, :]).abs()
    if weighted:
        distance = distance * _rising(distance)
    return distance.sum((-2, -1)).mean()


def open_untrained(weights, trained):
    """Set the weights of execution to 1 for every layer that the curriculum has not reached yet.

    The counterpart of :func:`dynexec.policy.force_untrained` for weights. The published curriculum adds a layer every
    ``speed`` policy epochs: ``trained = curriculum_mask(L, epoch // speed)``.

    Parameters
    ----------
    weights : float tensor ``[T, L]`` or ``[N, T, L]``
    trained : bool tensor ``[L]``

    Returns
    -------
    float tensor like ``weights``; gradients flow to the trained layers only

    Raises
    ------
    TypeError, ValueError
        If ``trained`` is not bool ``[L]``.
    """
    check_trained(trained, weights.shape[-1])
    return weights.masked_fill(~trained.to(weights.device), 1.0)


def _check(logits):
    check_logits(logits)
    if logits.dim() not in (3, 4) or logits.shape[-1] != 2 or 0 in logits.shape:
        raise ValueError(f"logits must have shape [T, L, 2] or [N, T, L, 2], got {tuple(logits.shape)}")


def _rising(layers):
    """Return ``(l + 1) / L`` for the last dimension of ``layers``."""
    count = layers.shape[-1]
    return torch.arange(1, count + 1, dtype=layers.dtype, device=layers.device) / count
