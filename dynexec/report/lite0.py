"""EfficientNet-Lite0 with a small policy network: a pretrained network that was not trained to have blocks dropped.

The policy was trained by ``examples/train_lite0_policy.py`` with agreement with the full network as its reward; its
weights come with dynexec, those of the network itself with an optional package.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from dynexec.measure import count_flops
from dynexec.models.blockdrop import BasicBlock, BlockDropPolicy, SegmentedResNet
from dynexec.nn import DynamicNetwork
from dynexec.report.media import normalize
from dynexec.report.nets import NETS, build

NUM_BLOCKS = 9
POLICY_WEIGHTS = Path(__file__).parent / "data" / "lite0_policy.pt"
#: The policy was trained on scenes of the clip "bikes" before this frame; the scenes from here on it has not seen.
FIRST_HELD_OUT_FRAME = 137
_BATCH = 16
_SHIFT = 4


def lite0_policy():
    """Build the untrained policy, 3 % of Lite0's FLOPs: images ``[N, 3, 224, 224]`` to probabilities ``[N, 9]``."""
    features = SegmentedResNet(BasicBlock, [1, 1, 1, 1], (12, 24, 48, 96), large_images=True)
    return BlockDropPolicy(features, NUM_BLOCKS, halve=True)


def load_lite0(policy_weights=POLICY_WEIGHTS):
    """Load EfficientNet-Lite0 with its ImageNet weights, converted, and its trained policy.

    Parameters
    ----------
    policy_weights : path, optional
        None: the policy stays untrained.

    Returns
    -------
    DynamicNetwork
        In evaluation mode.
    """
    policy = lite0_policy().requires_grad_(False)
    if policy_weights is not None:
        policy.load_state_dict(torch.load(policy_weights, weights_only=True))
    return DynamicNetwork(build(NETS["efficientnet_lite0"]), policy).eval()


@dataclass(frozen=True)
class Agreement:
    """How a policy compares with the full network, and with dropping as many blocks without looking.

    Attributes
    ----------
    decisions : bool tensor ``[N, L]``
        The policy's.
    labels : int64 tensor ``[N]``
        Predictions of the full network.
    agrees : bool tensor ``[N]``
        Whether the network under the policy predicts the same.
    random : float
        Share that agrees if every image keeps as many blocks as the policy keeps for it, but random ones.
    static : float
        Share that agrees if every image keeps the blocks that the policy keeps most often, rounded to its mean number.
    shifted : float
        Share that agrees if the full network sees the image moved by four pixels: the agreement to be expected for
        images that the network is unsure of.
    saving : float
        Theoretical share of FLOPs saved, with the policy network charged.
    """

    decisions: torch.Tensor
    labels: torch.Tensor
    agrees: torch.Tensor
    random: float
    static: float
    shifted: float
    saving: float

    @property
    def rate(self):
        """Share of images on which the predictions are the same."""
        return self.agrees.double().mean().item()

    @property
    def kept(self):
        """Blocks kept per image, int64 ``[N]``."""
        return self.decisions.sum(1)


def judge(net, frozen, images, *, draws=5, progress=None):
    """Compare a policy with the full network on images without labels.

    Parameters
    ----------
    net : DynamicNetwork
        Its FLOPs are counted.
    frozen : FrozenNetwork
        Made of ``net``; computes everything.
    images : uint8 or float tensor ``[N, 3, H, W]``
        uint8 ones are normalised in batches.
    draws : int
        How often random decisions are drawn.
    progress : callable, optional
        Called with the share done, 0 to 1.

    Returns
    -------
    Agreement
    """
    passes, done = 4 + draws, 0

    def run(decisions, images=images):
        nonlocal done
        predicted, taken = [], []
        for start in range(0, len(images), _BATCH):
            given = decisions if decisions is None or decisions.dim() == 1 else decisions[start : start + _BATCH]
            logits, used = frozen(as_float(images[start : start + _BATCH]), given, return_decisions=True)
            predicted.append(logits.argmax(1))
            taken.append(used)
        done += 1
        if progress is not None:
            progress(done / passes)
        return torch.cat(predicted), torch.cat(taken)

    everything = torch.ones(frozen.num_blocks, dtype=torch.bool)
    labels, _ = run(everything)
    predicted, decisions = run(None)

    def share(decisions, images=images):
        return (run(decisions, images)[0] == labels).double().mean().item()

    generator = torch.Generator().manual_seed(0)
    orders = [torch.rand(decisions.shape, generator=generator).argsort(1) for _ in range(draws)]
    random = sum(share(decisions.gather(1, order)) for order in orders) / draws
    number = round(decisions.sum().item() / len(decisions))
    favourites = torch.zeros_like(everything).index_fill(0, decisions.float().mean(0).topk(number).indices, True)
    shifted = torch.cat([images[..., :1].expand(*images.shape[:-1], _SHIFT), images[..., :-_SHIFT]], dim=-1)
    saving = count_flops(net, as_float(images[:1])).saving(decisions)
    return Agreement(
        decisions, labels, predicted == labels, random, share(favourites), share(everything, shifted), saving
    )


def as_float(images):
    """Normalise uint8 images; return others as they are."""
    return normalize(images) if images.dtype == torch.uint8 else images
