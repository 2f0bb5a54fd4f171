"""Losses of policies that choose by Gumbel-softmax: the cost of the choices, and how evenly they are used (AR-Net)."""

import torch
import torch.nn.functional as F

from dynexec.ops import check_floating


def expected_cost(weights, costs):
    """Compute the average cost of the choices: a scalar, in the unit of ``costs``.

    ``(weights.mean((0, 1)) * costs).sum()`` (Meng et al., ECCV 2020).

    Parameters
    ----------
    weights : float tensor ``[N, T, A]``
        Drawn per sample and step, see :func:`dynexec.policy.gumbel_softmax`; gradients reach them.
    costs : float tensor ``[A]`` or sequence of float
        One per choice. In AR-Net: for a backbone its multiply-adds per frame in 1e9, for all other choices 0.

    Raises
    ------
    TypeError, ValueError
        If ``weights`` is not a float tensor of three dimensions, or ``costs`` does not have one number per choice.
    """
    _check_weights(weights)
    costs = torch.as_tensor(costs, dtype=weights.dtype, device=weights.device)
    if costs.shape != weights.shape[2:]:
        raise ValueError(f"costs must be one per choice, ({weights.shape[2]},), got shape {tuple(costs.shape)}")
    return (weights.mean((0, 1)) * costs).sum()


def usage_imbalance(weights):
    """Measure how far the choices are from being used equally often: a scalar, 0 if they are (Meng et al., ECCV 2020).

    This is the Euclidean norm of ``usage - usage.mean()``, where ``usage`` is the share of each choice in the sum of
    all ``weights``, float ``[N, T, A]``. TypeError or ValueError if ``weights`` is not such a tensor, or is empty.
    """
    _check_weights(weights)
    usage = weights.sum((0, 1)) / weights.sum()
    return torch.linalg.vector_norm(usage - usage.mean())


def efficiency_loss(logits, labels, weights, costs, *, accuracy=0.95, efficiency=0.05, balance=3.0):
    """AR-Net's loss: ``accuracy * cross_entropy + efficiency * (expected_cost + balance * usage_imbalance)``.

    Parameters
    ----------
    logits : float tensor ``[N, classes]``
        The network's output under ``weights``.
    labels : int64 tensor ``[N]``
    weights, costs
        See :func:`expected_cost`.
    accuracy, efficiency, balance : float
        Weights of the terms; the defaults are those published for the ResNet network.

    Returns
    -------
    scalar

    Raises
    ------
    TypeError, ValueError
        As in :func:`expected_cost`.
    """
    cost = expected_cost(weights, costs) + balance * usage_imbalance(weights)
    return accuracy * F.cross_entropy(logits, labels) + efficiency * cost


def _check_weights(weights):
    check_floating(weights, "weights", "[N, T, choices]")
    if weights.dim() != 3 or weights.numel() == 0:
        raise ValueError(f"weights must be [N, T, choices] and not empty, got shape {tuple(weights.shape)}")
