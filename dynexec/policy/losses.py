"""Losses that train a Bernoulli policy by REINFORCE with a self-critical baseline (BlockDrop, section 3)."""

import torch
import torch.nn.functional as F

from dynexec.policy.bernoulli import check_numbers, check_probabilities, clamp_open, explore, log_probability


def reinforce_loss(probabilities, decisions, advantage, *, exploration=1.0, trained=None):
    """Minus the advantage times the log-probability of the decisions, summed over blocks.

    Its gradient, averaged over decisions drawn by :func:`dynexec.policy.sample`, is that of minus the expected
    reward (Williams, 1992). Any baseline that does not depend on the drawn decisions leaves that average alone and
    lowers its variance; the self-critical one is the reward of the thresholded policy (Rennie et al., CVPR 2017).

    Parameters
    ----------
    probabilities : float tensor ``[N, L]``
        What the policy gave, before exploration.
    decisions : bool tensor ``[N, L]``
        Drawn from them with the same ``exploration``.
    advantage : float tensor ``[N]``
        Reward minus baseline. No gradient flows through it.
    exploration : float
        See :func:`dynexec.policy.explore`.
    trained : bool tensor ``[L]``, optional
        Blocks that count; the others were forced on and say nothing about the policy.

    Returns
    -------
    float tensor ``[N]``

    Raises
    ------
    TypeError, ValueError
        As :func:`dynexec.policy.log_probability`, and if ``advantage`` or ``trained`` is not what it should be. Values,
        NaN among advantages, are checked on the CPU only.
    """
    _check_two_dimensions(probabilities)
    check_numbers(advantage, "advantage", "[N]")
    if advantage.shape != probabilities.shape[:1]:
        raise ValueError(f"advantage must have shape {tuple(probabilities.shape[:1])}, got {tuple(advantage.shape)}")
    loss = -log_probability(probabilities, decisions, exploration=exploration) * advantage.detach()[:, None]
    return _of_trained(loss, trained).sum(1)


def entropy_term(probabilities, *, exploration=1.0, trained=None):
    """``-p' log p'`` summed over blocks, with p' the bounded probability.

    This is half of a Bernoulli entropy, as published: its largest value is at p' = 1/e, so besides keeping decisions
    undecided it leans towards dropping.

    Parameters
    ----------
    probabilities : float tensor ``[N, L]``
    exploration : float
        See :func:`dynexec.policy.explore`.
    trained : bool tensor ``[L]``, optional
        As in :func:`reinforce_loss`. Without it, blocks that the curriculum has not reached start at 1/e, dropped.

    Returns
    -------
    float tensor ``[N]``

    Raises
    ------
    TypeError, ValueError
        As :func:`dynexec.policy.explore`, and if ``trained`` is not what it should be.
    """
    _check_two_dimensions(probabilities)
    bounded = clamp_open(explore(probabilities, exploration))
    entropy = -bounded * bounded.log()
    return _of_trained(entropy, trained).sum(1)


def curriculum_loss(probabilities, decisions, advantage, *, exploration=0.8, entropy=0.1, trained=None):
    """Loss of the first stage, in which only the policy is trained: a scalar, the mean over samples.

    ``mean(reinforce_loss - entropy * entropy_term)``.

    Parameters
    ----------
    probabilities, decisions, advantage, exploration, trained
        As in :func:`reinforce_loss`, with its errors.
    entropy : float
        Weight of :func:`entropy_term`, the published code's beta.
    """
    reinforce = reinforce_loss(probabilities, decisions, advantage, exploration=exploration, trained=trained)
    return (reinforce - entropy * entropy_term(probabilities, exploration=exploration, trained=trained)).mean()


def finetuning_loss(probabilities, decisions, advantage, logits, labels, *, exploration=0.8):
    """Loss of the second stage, in which policy and backbone are trained together: a scalar.

    The sum over samples of :func:`reinforce_loss`, plus the mean cross-entropy of the sampled path. The two reach
    different parameters: decisions pass no gradient, so the first moves the policy and the second the backbone.

    Parameters
    ----------
    probabilities, decisions, advantage, exploration
        As in :func:`reinforce_loss`, with its errors.
    logits : float tensor ``[N, classes]``
        The backbone's output under ``decisions``.
    labels : int64 tensor ``[N]``
    """
    reinforce = reinforce_loss(probabilities, decisions, advantage, exploration=exploration)
    return reinforce.sum() + F.cross_entropy(logits, labels)


def _check_two_dimensions(probabilities):
    check_probabilities(probabilities)
    if probabilities.dim() != 2:
        raise ValueError(f"probabilities must be [N, L], got shape {tuple(probabilities.shape)}")


def _of_trained(terms, trained):
    """``terms`` ``[N, L]``, those of blocks that are not ``trained`` times 0."""
    if trained is None:
        return terms
    if not isinstance(trained, torch.Tensor) or trained.dtype != torch.bool:
        kind = trained.dtype if isinstance(trained, torch.Tensor) else type(trained).__name__
        raise TypeError(f"trained must be a bool tensor [L], got {kind}")
    if trained.shape != terms.shape[1:]:
        raise ValueError(f"trained must have shape {tuple(terms.shape[1:])}, got {tuple(trained.shape)}")
    return terms * trained.to(terms.device)
