"""From keep probabilities to decisions, and the estimator that trains them (BlockDrop, Wu et al., CVPR 2018).

Plain functions on tensors: nothing here knows a model, nor how a block is executed.
"""

from dynexec.policy.bernoulli import explore, log_probability, sample, threshold
from dynexec.policy.curriculum import curriculum_mask, force_untrained
from dynexec.policy.losses import curriculum_loss, entropy_term, finetuning_loss, reinforce_loss
from dynexec.policy.rewards import usage_reward

__all__ = [
    "curriculum_loss",
    "curriculum_mask",
    "entropy_term",
    "explore",
    "finetuning_loss",
    "force_untrained",
    "log_probability",
    "reinforce_loss",
    "sample",
    "threshold",
    "usage_reward",
]
