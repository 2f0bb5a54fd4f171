"""The curriculum over blocks: the policy decides for the last blocks first (BlockDrop, section 3)."""

from math import isfinite

import torch

from dynexec.ops import check_bool
from dynexec.policy.bernoulli import check_drawn


def curriculum_mask(num_blocks, epoch, *, blocks_per_epoch=1):
    """Return which blocks the policy decides for in an epoch: the last ``1 + epoch * blocks_per_epoch``.

    Parameters
    ----------
    num_blocks : int
        L.
    epoch : int
        From 0.
    blocks_per_epoch : float
        Number of blocks that each epoch adds: 1 in the paper. With small data sets, which have few steps per epoch, a
        fraction keeps training at each length for longer.

    Returns
    -------
    bool tensor ``[L]``, True where trained; on the CPU

    Raises
    ------
    ValueError
        If ``num_blocks`` is below 1, or ``epoch`` or ``blocks_per_epoch`` is below 0, infinite or NaN.
    """
    if not num_blocks >= 1:
        raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
    if not (0 <= epoch and 0 <= blocks_per_epoch and isfinite(epoch * blocks_per_epoch)):
        raise ValueError(
            f"epoch and blocks_per_epoch must be finite and at least 0, got {epoch} and {blocks_per_epoch}"
        )
    trained = min(num_blocks, 1 + int(epoch * blocks_per_epoch))
    return torch.arange(num_blocks) >= num_blocks - trained


def force_untrained(decisions, trained):
    """Keep, in ``decisions``, every block that the curriculum has not reached yet.

    Parameters
    ----------
    decisions : bool tensor ``[N, L]``
    trained : bool tensor ``[L]``
        From :func:`curriculum_mask`.

    Raises
    ------
    TypeError, ValueError
        If ``decisions`` is not bool ``[N, L]``, or ``trained`` not bool ``[L]``.
    """
    check_bool(trained, "trained", "[L]")
    if trained.dim() != 1:
        raise ValueError(f"trained must be bool [L], got shape {tuple(trained.shape)}")
    check_drawn(decisions, (None, len(trained)))
    return decisions | ~trained.to(decisions.device)


def check_trained(trained, num_blocks):
    """Raise TypeError unless ``trained`` is a bool tensor, ValueError unless it has one entry per block."""
    check_bool(trained, "trained", f"[{num_blocks}]")
    if trained.shape != (num_blocks,):
        raise ValueError(f"trained must have shape {(num_blocks,)}, got {tuple(trained.shape)}")
