"""The reward of a policy."""

import torch

from dynexec.policy.bernoulli import check_drawn


def usage_reward(decisions, correct, *, penalty=-1.0):
    """Reward decisions that keep few blocks if the prediction is right; give a penalty if it is wrong.

    ``1 - (kept / L) ** 2`` where ``correct``, else ``penalty`` (BlockDrop, section 3).

    Parameters
    ----------
    decisions : bool tensor ``[N, L]``
    correct : bool tensor ``[N]``
        Whether the prediction under these decisions is right. Where there are no labels, agreement with the full
        network can be used instead.
    penalty : float
        The reward of a wrong prediction, at most 0. The published settings are -1 for the curriculum and -5 or -10 for
        joint fine-tuning: the more negative, the more blocks are kept.

    Returns
    -------
    float tensor ``[N]``, between ``penalty`` and 1

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid.
    """
    check_drawn(decisions, (None, None))
    if not isinstance(correct, torch.Tensor):
        raise TypeError(f"correct must be a bool tensor [N], got {type(correct).__name__}")
    if correct.shape != decisions.shape[:1] or correct.dtype != torch.bool:
        raise ValueError(
            f"correct must be bool [N] for decisions [N, L], got {correct.dtype} {tuple(correct.shape)} "
            f"for decisions {tuple(decisions.shape)}"
        )
    if not penalty <= 0:
        raise ValueError(f"penalty is the reward of a wrong prediction and must be at most 0, got {penalty}")
    usage = decisions.float().mean(1)
    return torch.where(correct, 1.0 - usage.square(), penalty)
