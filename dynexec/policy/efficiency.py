"""Losses of policies that choose by Gumbel-softmax: what the choices cost, and how evenly they are made (AR-Net)."""

import torch
import torch.nn.functional as F


def expected_cost(weights, costs):
    """What the choices cost on average: a scalar, in the unit of ``costs``.

    ``(weights.mean((0, 1)) * costs).sum()`` (Meng et al., ECCV 2020).

    Parameters
    ----------
    weights : float tensor ``[N, T, A]``
        Drawn per sample and step, see :func:`dynexec.policy.gumbel_softmax`; gradients reach them.
    costs : float tensor ``[A]`` or sequence of float
        Per choice. AR-Net: of a backbone its multiply-adds per frame in 1e9, of all else 0.

    Raises
    ------
    TypeError, ValueError
        If ``weights`` are no float tensor of three dimensions, or ``costs`` are not one number per choice.
    """
    _check_weights(weights)
    costs = torch.as_tensor(costs, dtype=weights.dtype, device=weights.device)
    if costs.shape != weights.shape[2:]:
        raise ValueError(f"costs must be one per choice, ({weights.shape[2]},), got shape {tuple(costs.shape)}")
    return (weights.mean((0, 1)) * costs).sum()


def usage_imbalance(weights):
    """How far the choices are from being used equally often: a scalar, 0 if they are (Meng et al., ECCV 2020).

    The Euclidean norm of ``usage - usage.mean()``, with ``usage`` the share of each choice in the sum of all
    ``weights``, float ``[N, T, A]``. TypeError or ValueError if they are none, or empty.
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
        As published for the ResNet network.

    Returns
    -------
    scalar

    Raises
    ------
    TypeError, ValueError
        As :func:`expected_cost`.
    """
    cost = expected_cost(weights, costs) + balance * usage_imbalance(weights)
    return accuracy * F.cross_entropy(logits, labels) + efficiency * cost


def _check_weights(weights):
    if not isinstance(weights, torch.Tensor) or not weights.is_floating_point():
        kind = weights.dtype if isinstance(weights, torch.Tensor) else type(weights).__name__
        raise TypeError(f"weights must be a floating-point tensor [N, T, choices], got {kind}")
    if weights.dim() != 3 or weights.numel() == 0:
        raise ValueError(f"weights must be [N, T, choices] and not empty, got shape {tuple(weights.shape)}")
