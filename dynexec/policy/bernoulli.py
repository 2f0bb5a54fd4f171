"""Independent Bernoulli decisions, one per sample and block."""

from math import isnan

import torch

from dynexec.ops import check_floating


def threshold(probabilities):
    """Decide deterministically: keep a block if its probability is at least 0.5.

    No rule keeps at least one block: a sample may drop them all (BlockDrop, section 3).

    Parameters
    ----------
    probabilities : float tensor ``[N, L]`` or ``[L]``

    Returns
    -------
    bool tensor of the same shape

    Raises
    ------
    TypeError
        If ``probabilities`` is not a floating-point tensor.
    ValueError
        If a probability is NaN, below 0 or above 1. Checked on the CPU only, because elsewhere the check would wait for
        the device; there a NaN keeps the block, so that a broken policy costs time but not accuracy.
    """
    check_probabilities(probabilities)
    return ~(probabilities < 0.5)


def explore(probabilities, exploration):
    """Bound probabilities away from 0 and 1: ``p' = a * p + (1 - a) * (1 - p)`` with ``a = exploration``.

    Parameters
    ----------
    probabilities : float tensor
        Between 0 and 1.
    exploration : float in [0, 1]
        ``a``; 1 leaves the probabilities as they are, 0.5 makes every decision a coin toss. The paper trains with 0.8,
        that is, with p' between 0.2 and 0.8 (BlockDrop, section 3).

    Raises
    ------
    TypeError, ValueError
        As in :func:`threshold`, and if ``exploration`` is not between 0 and 1.
    """
    check_probabilities(probabilities)
    if not 0.0 <= exploration <= 1.0:
        raise ValueError(f"exploration must be between 0 and 1, got {exploration}")
    return exploration * probabilities + (1.0 - exploration) * (1.0 - probabilities)


def sample(probabilities, *, generator=None, exploration=1.0):
    """Draw decisions: each block is kept independently, with its (bounded) probability.

    Parameters
    ----------
    probabilities : float tensor ``[N, L]``
        Between 0 and 1.
    generator : torch.Generator, optional
        On the device of ``probabilities``; the same state draws the same decisions.
    exploration : float
        See :func:`explore`.

    Returns
    -------
    bool tensor ``[N, L]``

    Raises
    ------
    TypeError, ValueError
        As in :func:`explore`.
    """
    return torch.bernoulli(explore(probabilities, exploration).detach(), generator=generator).bool()


def log_probability(probabilities, decisions, *, exploration=1.0):
    """Compute the log-probability that :func:`sample` draws ``decisions``, per sample and block.

    Parameters
    ----------
    probabilities : float tensor ``[N, L]``
    decisions : bool tensor ``[N, L]``
    exploration : float
        The one that the decisions were sampled with.

    Returns
    -------
    float tensor ``[N, L]``
        Differentiable with respect to ``probabilities``, and finite: probabilities are first moved away from exactly 0
        and 1 by the smallest step of their dtype.

    Raises
    ------
    TypeError, ValueError
        As in :func:`explore`, and if ``decisions`` is not bool of the same shape.

    Notes
    -----
    Equivalent to ``torch.distributions.Bernoulli(explore(probabilities, exploration)).log_prob(decisions)``.
    """
    bounded = clamp_open(explore(probabilities, exploration))
    check_drawn(decisions, tuple(probabilities.shape), " like the probabilities")
    return torch.where(decisions, bounded, 1.0 - bounded).log()


def check_probabilities(probabilities):
    """Raise unless ``probabilities`` is a floating-point tensor, in [0, 1] where that can be read without waiting."""
    check_floating(probabilities, "probabilities", "[N, L] or [L]")
    if not _readable(probabilities):
        return
    low, high = (bound.item() for bound in probabilities.detach().aminmax())  # NaN if there is one
    if not 0.0 <= low <= high <= 1.0:
        shape = tuple(probabilities.shape)
        if isnan(low):
            raise ValueError(f"probabilities {shape} hold NaN: expected numbers between 0 and 1 {_DIVERGED}")
        raise ValueError(
            f"probabilities {shape} hold {low if low < 0 else high:g}: expected numbers between 0 and 1 "
            "(are these logits? take their sigmoid first)"
        )


def check_logits(logits):
    """Raise unless ``logits`` is a floating-point tensor, free of NaN where that can be read without waiting."""
    check_numbers(logits, "logits", "[..., choices]")


def check_softmax(logits):
    """:func:`check_logits`, and raise unless ``logits`` have a softmax: none is inf, nor are all choices -inf.

    A single choice of -inf is allowed: it is never taken.
    """
    check_logits(logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have choices, [..., choices], got shape {tuple(logits.shape)}")
    if _readable(logits) and not bool(logits.amax(-1).isfinite().all()):
        raise ValueError(
            f"logits {tuple(logits.shape)} hold inf, or -inf for all choices: expected numbers {_DIVERGED}"
        )


def check_numbers(values, name, shape):
    """:func:`check_logits` for any ``values``; ``name`` and ``shape``, a text, describe them in messages."""
    check_floating(values, name, shape)
    if _readable(values) and bool(values.isnan().any()):
        raise ValueError(f"{name} {tuple(values.shape)} hold NaN: expected numbers {_DIVERGED}")


_DIVERGED = "(has the policy network diverged, or were its images NaN?)"


def _readable(values):
    """Whether there are values that can be read without waiting for a device."""
    return values.device.type == "cpu" and values.numel() > 0 and not torch.compiler.is_compiling()


def check_drawn(decisions, shape, like=""):
    """Raise unless ``decisions`` are bool of ``shape``, a tuple in which None stands for any size."""
    if not isinstance(decisions, torch.Tensor):
        raise TypeError(f"decisions must be a bool tensor {_text(shape)}, got {type(decisions).__name__}")
    fits = len(shape) == decisions.dim() and all(a in (None, b) for a, b in zip(shape, decisions.shape))
    if decisions.dtype != torch.bool or not fits:
        hint = ""
        if decisions.requires_grad:
            hint = ", which require grad: drawn decisions pass none, see dynexec.policy.gumbel_softmax for some that do"
        raise ValueError(
            f"decisions must be bool {_text(shape)}{like}, got {decisions.dtype} {tuple(decisions.shape)}{hint}"
        )


def _text(shape):
    return str(shape).replace("None", "N")


def clamp_open(probabilities):
    """Clamp to the open interval (0, 1), so that logarithms are finite."""
    step = torch.finfo(probabilities.dtype).eps
    return probabilities.clamp(step, 1.0 - step)
