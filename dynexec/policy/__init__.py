"""From what a policy gives to decisions, and the estimators that train it.

Plain functions on tensors: nothing here knows a model, nor how a block is executed.
"""

from dynexec.policy.bernoulli import explore, log_probability, sample, threshold
from dynexec.policy.curriculum import curriculum_mask, force_untrained
from dynexec.policy.gumbel import draw, exponential_temperature, gumbel_softmax
from dynexec.policy.losses import curriculum_loss, entropy_term, finetuning_loss, reinforce_loss
from dynexec.policy.rewards import usage_reward

__all__ = [
    "curriculum_loss",
    "curriculum_mask",
    "draw",
    "entropy_term",
    "exponential_temperature",
    "explore",
    "finetuning_loss",
    "force_untrained",
    "gumbel_softmax",
    "log_probability",
    "reinforce_loss",
    "sample",
    "threshold",
    "usage_reward",
]
