"""Independent Bernoulli decisions, one per sample and block."""

import torch


def threshold(probabilities):
    """Decide deterministically: keep a block where its probability is at least 0.5.

    There is no rule that keeps at least one block: a sample may drop them all (BlockDrop, section 3).

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
        If one is NaN. Checked on the CPU only, because elsewhere it would wait for the device; there a NaN keeps
        the block, so that a broken policy costs time and not accuracy.
    """
    check_probabilities(probabilities)
    return ~(probabilities < 0.5)


def explore(probabilities, exploration):
    """Bound probabilities away from 0 and 1: ``p' = a * p + (1 - a) * (1 - p)`` with ``a = exploration``.

    Parameters
    ----------
    probabilities : float tensor
    exploration : float in [0, 1]
        ``a``; 1 leaves the probabilities as they are, 0.5 makes every decision a coin toss. The paper trains with
        0.8, that is, with p' between 0.2 and 0.8 (BlockDrop, section 3).
    """
    if not 0.0 <= exploration <= 1.0:
        raise ValueError(f"exploration must be between 0 and 1, got {exploration}")
    return exploration * probabilities + (1.0 - exploration) * (1.0 - probabilities)


def sample(probabilities, *, generator=None, exploration=1.0):
    """Draw decisions: each block is kept with its (bounded) probability, independently.

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
        As :func:`threshold`.
    """
    check_probabilities(probabilities)
    return torch.bernoulli(explore(probabilities.detach(), exploration), generator=generator).bool()


def log_probability(probabilities, decisions, *, exploration=1.0):
    """Log of the probability that :func:`sample` draws ``decisions``, per sample and block.

    Parameters
    ----------
    probabilities : float tensor ``[N, L]``
    decisions : bool tensor ``[N, L]``
    exploration : float
        The one that the decisions were sampled with.

    Returns
    -------
    float tensor ``[N, L]``, differentiable in ``probabilities``. Finite: probabilities are first moved away from
    exactly 0 and 1 by the smallest step of their dtype.

    Equivalent to ``torch.distributions.Bernoulli(explore(probabilities, exploration)).log_prob(decisions)``.
    """
    if decisions.dtype != torch.bool or decisions.shape != probabilities.shape:
        raise ValueError(
            f"decisions must be bool {tuple(probabilities.shape)} like the probabilities, "
            f"got {decisions.dtype} {tuple(decisions.shape)}"
        )
    bounded = clamp_open(explore(probabilities, exploration))
    return torch.where(decisions, bounded, 1.0 - bounded).log()


def check_probabilities(probabilities):
    """Raise unless ``probabilities`` is a floating-point tensor, free of NaN where that can be seen without waiting."""
    _check(probabilities, "probabilities", "[N, L] or [L]", "numbers between 0 and 1")


def check_logits(logits):
    """As :func:`check_probabilities`, for ``logits``."""
    _check(logits, "logits", "[..., choices]", "numbers")


def _check(values, name, shape, expected):
    if not isinstance(values, torch.Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
        raise TypeError(f"{name} must be a floating-point tensor {shape}, got {kind}")
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if bool(values.isnan().any()):
        raise ValueError(
            f"{name} {tuple(values.shape)} hold NaN: expected {expected} "
            "(has the policy network diverged, or were its images NaN?)"
        )


def clamp_open(probabilities):
    """Clamp to the open interval (0, 1), so that logarithms are finite."""
    step = torch.finfo(probabilities.dtype).eps
    return probabilities.clamp(step, 1.0 - step)
