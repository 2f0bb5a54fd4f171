"""FLOPs of AR-Net under decisions, and the accounting that its authors published."""

from dataclasses import dataclass

import torch

from dynexec.measure.flops import FlopCount, count_call
from dynexec.models.arnet_policy import check_decisions, rule
from dynexec.models.efficientnet import EfficientNet

#: 1e9 multiply-adds that the authors' table has for EfficientNets at 224 pixels. They are those of the nominal sizes.
PUBLISHED_GMAC = {"b0": 0.39, "b1": 0.70, "b2": 1.00, "b3": 1.80}


@dataclass(frozen=True)
class ARNetFlops(FlopCount):
    """FLOPs of one video. A multiply-add counts as two; convolutions, linear layers and the LSTM count.

    Attributes
    ----------
    backbone : tuple of int
        Each backbone with its head, per frame that chose it.
    lite : int
        The linear layer of a lite prediction, per frame that chose it.
    features, choice : int
        The policy's features with the LSTM, and its choice among actions, per frame that it sees.
    skips : tuple of int
    num_frames : int
    cheap : bool
        Whether the policy leaves out skipped frames.
    published_gmac : tuple of float
        Charge of the authors' tables per frame, in 1e9 multiply-adds: each backbone, then the policy with its LSTM.
    """

    backbone: tuple[int, ...]
    lite: int
    features: int
    choice: int
    skips: tuple[int, ...]
    num_frames: int
    cheap: bool
    published_gmac: tuple[float, ...]

    @property
    def dense(self):
        """Every prediction of every frame: all backbones, and the lite one with the features that it is made from."""
        return self.num_frames * (sum(self.backbone) + self.features + self.lite)

    @property
    def policy(self):
        """The policy on every frame. Its features are those of the lite prediction, which ``dense`` counts as well."""
        return self.num_frames * (self.features + self.choice)

    @property
    def costs(self):
        """Cost per action, for :func:`dynexec.policy.efficiency_loss`: 1e9 multiply-adds for backbones, otherwise 0."""
        return tuple(flops / 2e9 for flops in self.backbone) + (0.0,) * (1 + len(self.skips))

    def of(self, decisions):
        """Count the FLOPs that each video needs under its ``decisions``, int64 ``[N, T]``: float64 ``[N]``.

        The policy is charged for every frame that it sees: in exact mode all, in cheap mode all that are not skipped.
        """
        actions, skipped = self._ruled(decisions)
        seen = ~skipped if self.cheap else torch.ones_like(skipped)
        per_action = (*self.backbone, self.lite, *(0 for _ in self.skips))
        chosen = torch.tensor(per_action, dtype=torch.float64)[actions].sum(1)
        return chosen + seen.sum(1) * float(self.features + self.choice)

    def published(self, decisions):
        """Compute the cost of ``decisions`` by the authors' accounting: 1e9 multiply-adds per frame, a float.

        A skip of k charges 1/k of the policy to each frame that it rules, even if the video ends before the skip does;
        ``choice`` and lite predictions are free; constants are those of ``published_gmac``.
        """
        actions, _ = self._ruled(decisions)
        *backbones, policy = self.published_gmac
        per_action = [gmac + policy for gmac in backbones] + [policy] + [policy / skip for skip in self.skips]
        return torch.tensor(per_action, dtype=torch.float64)[actions].mean().item()

    def _ruled(self, decisions):
        spans = (1,) * (len(self.backbone) + 1) + self.skips
        return rule(check_decisions(decisions, ("N", self.num_frames), len(spans)), spans)


def count_arnet(net):
    """Count the :class:`ARNetFlops` of an :class:`dynexec.models.arnet.ARNet`."""
    policy, backbone, published, dtype = net.policy, [], [], net.policy.linear.weight.dtype
    for model, head, size in zip(net.base_model_list, net.new_fc_list, net.resolutions):
        backbone.append(count_call(model, 1, 3, size, size, dtype=dtype) + 2 * head.weight.numel())
        table = isinstance(model, EfficientNet)
        published.append(PUBLISHED_GMAC[model.variant] * (size / 224) ** 2 if table else backbone[-1] / 2e9)
    size, width = policy.resolution, policy.rnn.input_size
    features = count_call(policy.lite_backbone, 1, 3, size, size, dtype=dtype)
    # The authors count a linear layer on the features, and an LSTM of as many units as there are features.
    published.append(features / 2e9 + (width * net.num_classes + 2 * width**2) / 1e9)
    lstm = 2 * (policy.rnn.weight_ih.numel() + policy.rnn.weight_hh.numel())
    return ARNetFlops(
        backbone=tuple(backbone),
        lite=2 * policy.lite_fc.weight.numel(),
        features=features + lstm,
        choice=2 * policy.linear.weight.numel(),
        skips=policy.skips,
        num_frames=net.num_frames,
        cheap=policy.cheap,
        published_gmac=tuple(published),
    )
