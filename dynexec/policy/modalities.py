"""The loss that trains a policy over segments and modalities (AdaMML: Panda et al., ICCV 2021)."""

import torch
import torch.nn.functional as F


def modality_cost(decisions, correct, costs, *, penalty=10.0):
    """Compute the cost of decisions: a penalty where the prediction is wrong, else that of the selected modalities.

    ``sum_m costs[m] * mean_n(correct[n] * u[n, m] ** 2) + mean_n((1 - correct[n]) * penalty)``, where ``u`` is the
    share of segments in which a modality is selected. The second term has no gradient: it only makes costs comparable.

    Parameters
    ----------
    decisions : float tensor ``[N, S, M]``
        Weights whose gradients reach the policy, such as ``gumbel_softmax(logits, temperature, hard=True)[..., 1]``.
    correct : bool tensor ``[N]``
        Whether the prediction under these decisions is right.
    costs : sequence of M floats
        Published values: 1.0 and 0.05 for rgb and sound; 1.0 and 1.0 for rgb and flow; 0.5, 0.05 and 0.8 for rgb, sound
        and flow.
    penalty : float
        Cost of a wrong prediction.

    Returns
    -------
    scalar

    Raises
    ------
    TypeError, ValueError
        If ``decisions`` or ``correct`` is invalid, or ``costs`` does not have one number per modality.
    """
    if not isinstance(decisions, torch.Tensor) or not decisions.is_floating_point() or decisions.dim() != 3:
        kind = (
            f"{decisions.dtype} {tuple(decisions.shape)}"
            if isinstance(decisions, torch.Tensor)
            else type(decisions).__name__
        )
        raise TypeError(f"decisions must be a float tensor [N, S, M] of weights, got {kind}")
    if not isinstance(correct, torch.Tensor):
        raise TypeError(f"correct must be a bool tensor [{len(decisions)}], got {type(correct).__name__}")
    if correct.dtype != torch.bool or correct.shape != decisions.shape[:1]:
        raise ValueError(
            f"correct must be bool [{len(decisions)}] for decisions {tuple(decisions.shape)}, "
            f"got {correct.dtype} {tuple(correct.shape)}"
        )
    if len(costs) != decisions.shape[2]:
        raise ValueError(f"costs must be {decisions.shape[2]} numbers, one per modality, got {len(costs)}")
    usage = decisions.mean(1).square()
    correct = correct.to(decisions.dtype)
    costs = torch.as_tensor(costs, dtype=usage.dtype, device=usage.device)
    return ((correct[:, None] * usage).mean(0) * costs).sum() + (1 - correct).mean() * penalty


def modality_loss(logits, labels, decisions=None, costs=None, *, penalty=10.0):
    """Loss of a training step: cross-entropy plus, where the policy is trained, :func:`modality_cost`. A scalar.

    Parameters
    ----------
    logits : float tensor ``[N, classes]``
        The network's output with ``soft_decisions=decisions``.
    labels : int64 tensor ``[N]``
    decisions, costs, penalty
        As in :func:`modality_cost`; None while only the main networks are trained.

    Raises
    ------
    TypeError, ValueError
        As in :func:`modality_cost`, and if only one of ``decisions`` and ``costs`` is given.
    """
    if (decisions is None) != (costs is None):
        raise ValueError(
            "decisions and costs must be given together, to train the policy, or not at all; "
            f"got only {'costs' if decisions is None else 'decisions'}"
        )
    loss = F.cross_entropy(logits, labels)
    if decisions is None:
        return loss
    return loss + modality_cost(decisions, logits.detach().argmax(-1) == labels, costs, penalty=penalty)
