"""From the output of a policy to decisions, and the estimators that train it.

Plain functions on tensors: nothing here depends on a model or on how blocks are executed.
"""

from dynexec.policy.bernoulli import explore, log_probability, sample, threshold
from dynexec.policy.curriculum import curriculum_mask, force_untrained
from dynexec.policy.efficiency import efficiency_loss, expected_cost, usage_imbalance
from dynexec.policy.gumbel import draw, exponential_temperature, gumbel_softmax
from dynexec.policy.losses import curriculum_loss, entropy_term, finetuning_loss, reinforce_loss
from dynexec.policy.modalities import modality_cost, modality_loss
from dynexec.policy.rates import keep_rates
from dynexec.policy.rewards import usage_reward
from dynexec.policy.sharing import open_untrained, sharing_loss, sparsity_loss

__all__ = [
    "curriculum_loss",
    "curriculum_mask",
    "draw",
    "efficiency_loss",
    "entropy_term",
    "expected_cost",
    "exponential_temperature",
    "explore",
    "finetuning_loss",
    "force_untrained",
    "gumbel_softmax",
    "keep_rates",
    "log_probability",
    "modality_cost",
    "modality_loss",
    "open_untrained",
    "reinforce_loss",
    "sample",
    "sharing_loss",
    "sparsity_loss",
    "threshold",
    "usage_imbalance",
    "usage_reward",
]
