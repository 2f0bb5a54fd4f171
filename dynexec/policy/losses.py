"""Losses that train a Bernoulli policy by REINFORCE with a self-critical baseline (BlockDrop, section 3)."""

import torch.nn.functional as F

from dynexec.policy.bernoulli import check_numbers, check_probabilities, clamp_open, explore, log_probability
from dynexec.policy.curriculum import check_trained


def reinforce_loss(probabilities, decisions, advantage, *, exploration=1.0, trained=None):
    """Compute minus the advantage times the log-probability of the decisions, summed over blocks.

    Averaged over decisions drawn by :func:`dynexec.policy.sample`, its gradient is that of minus the expected reward
    (Williams, 1992). A baseline that does not depend on the drawn decisions leaves this average unchanged and lowers
    its variance; the self-critical baseline is the reward of the thresholded policy (Rennie et al., CVPR 2017).

    Parameters
    ----------
    probabilities : float tensor ``[N, L]``
        The policy's output, before exploration.
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
        As in :func:`dynexec.policy.log_probability`, and if ``advantage`` or ``trained`` is invalid. Values, such as
        NaN in ``advantage``, are checked on the CPU only.
    """
    _check_two_dimensions(probabilities)
    check_numbers(advantage, "advantage", "[N]")
    if advantage.shape != probabilities.shape[:1]:
        raise ValueError(f"advantage must have shape {tuple(probabilities.shape[:1])}, got {tuple(advantage.shape)}")
    loss = -log_probability(probabilities, decisions, exploration=exploration) * advantage.detach()[:, None]
    return _of_trained(loss, trained).sum(1)


def entropy_term(probabilities, *, exploration=1.0, trained=None):
    """Compute ``-p' log p'`` summed over blocks, where p' is the bounded probability.

    This is half of a Bernoulli entropy, as published. Its maximum is at p' = 1/e, so besides keeping decisions
    undecided it favours dropping.

    Parameters
    ----------
    probabilities : float tensor ``[N, L]``
    exploration : float
        See :func:`dynexec.policy.explore`.
    trained : bool tensor ``[L]``, optional
        As in :func:`reinforce_loss`. Without it, blocks that the curriculum has not reached are driven to 1/e, that is,
        to being dropped.

    Returns
    -------
    float tensor ``[N]``

    Raises
    ------
    TypeError, ValueError
        As in :func:`dynexec.policy.explore`, and if ``trained`` is invalid.
    """
    _check_two_dimensions(probabilities)
    bounded = clamp_open(explore(probabilities, exploration))
    entropy = -bounded * bounded.log()
    return _of_trained(entropy, trained).sum(1)


def curriculum_loss(probabilities, decisions, advantage, *, exploration=0.8, entropy=0.1, trained=None):
    """Loss of the first stage, which trains only the policy: a scalar, the mean over samples.

    ``mean(reinforce_loss - entropy * entropy_term)``.

    Parameters
    ----------
    probabilities, decisions, advantage, exploration, trained
        As in :func:`reinforce_loss`, with the same errors.
    entropy : float
        Weight of :func:`entropy_term`, the published code's beta.
    """
    reinforce = reinforce_loss(probabilities, decisions, advantage, exploration=exploration, trained=trained)
    return (reinforce - entropy * entropy_term(probabilities, exploration=exploration, trained=trained)).mean()


def finetuning_loss(probabilities, decisions, advantage, logits, labels, *, exploration=0.8):
    """Loss of the second stage, which trains policy and backbone together: a scalar.

    The sum over samples of :func:`reinforce_loss` plus the mean cross-entropy of the sampled path. The two reach
    different parameters: no gradient passes through decisions, so the first trains the policy and the second the
    backbone.

    Parameters
    ----------
    probabilities, decisions, advantage, exploration
        As in :func:`reinforce_loss`, with the same errors.
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
    """Return ``terms`` ``[N, L]``, multiplied by 0 for blocks that are not ``trained``."""
    if trained is None:
        return terms
    check_trained(trained, terms.shape[1])
    return terms * trained.to(terms.device)
