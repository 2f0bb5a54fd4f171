"""The curriculum over blocks: decide for the last blocks first (BlockDrop, section 3)."""

import torch


def curriculum_mask(num_blocks, epoch, *, blocks_per_epoch=1):
    """Which blocks the policy decides for in this epoch: the last ``1 + epoch * blocks_per_epoch``.

    Parameters
    ----------
    num_blocks : int
        L.
    epoch : int
        From 0.
    blocks_per_epoch : float
        How many blocks each epoch adds: 1 in the paper. Small data sets have few steps per epoch; a fraction lets
        them stay longer at each length.

    Returns
    -------
    bool tensor ``[L]``, True where trained; on the CPU
    """
    if epoch < 0 or blocks_per_epoch < 0:
        raise ValueError(f"epoch and blocks_per_epoch must be at least 0, got {epoch} and {blocks_per_epoch}")
    trained = min(num_blocks, 1 + int(epoch * blocks_per_epoch))
    return torch.arange(num_blocks) >= num_blocks - trained


def force_untrained(decisions, trained):
    """Decisions with every block on that the curriculum has not reached yet.

    Parameters
    ----------
    decisions : bool tensor ``[N, L]``
    trained : bool tensor ``[L]``
        From :func:`curriculum_mask`.
    """
    return decisions | ~trained.to(decisions.device)
