"""SpotTune: pre-trained or fine-tuned weights, per image and block (Guo et al., CVPR 2019)."""

import re

import torch
import torch.nn.functional as F
from torch import nn

from dynexec.models.arguments import check_counts
from dynexec.models.blockdrop import pool_shortcut
from dynexec.models.checkpoints import Checkpoint, check_mapping, rename, shorten, without_prefix
from dynexec.models.inert import state_of
from dynexec.models.resnet import check_images, initialize_convolutions
from dynexec.nn import DynamicNetwork, ExpertBlock, assign_columns, dynamic_blocks
from dynexec.policy import draw, gumbel_softmax

WIDTHS = (64, 128, 256)
STEM_WIDTH = 32


class Branch(nn.Module):
    """``relu(residual(x) + shortcut(x))`` with two 3x3 convolutions, under the published parameter names.

    Parameters
    ----------
    in_channels, channels, stride : int
    shortcut : nn.Module, optional
        Without parameters; None is the identity.
    """

    def __init__(self, in_channels, channels, stride, shortcut=None):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False))
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = shortcut

    def forward(self, x):
        residual = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        return torch.relu(residual + (x if self.shortcut is None else self.shortcut(x)))


class SpotBlock(ExpertBlock, Branch):
    """The pre-trained branch, with the fine-tuned one beside it.

    Parameters
    ----------
    fine_tuned : Branch
        Referenced, not registered: published checkpoints store it elsewhere.
    """

    def __init__(self, *arguments, fine_tuned):
        super().__init__(*arguments)
        self._fine_tuned = (fine_tuned,)  # a tuple hides the module from nn.Module's registration

    def expert(self):
        return self._fine_tuned[0]


class SpotTuneResNet(nn.Module):
    """The residual network of SpotTune: ``conv1, bn1, blocks.{s}.{b}.*, bn2.0, linear`` and ``parallel_blocks``.

    No ReLU follows the stem. Every segment halves the image; its shortcut does so by average pooling, and then appends
    channels of zeros. BatchNorm and ReLU follow the last block.

    Parameters
    ----------
    blocks, widths : sequences of int
        Per segment.
    stem_width, in_channels : int
    num_outputs : int
    choices : bool
        Whether blocks have a second, fine-tuned set of weights, ``parallel_blocks``.
    """

    def __init__(self, blocks, widths, num_outputs, *, stem_width=STEM_WIDTH, in_channels=3, choices=True):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, stem_width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.blocks = nn.ModuleList()
        parallel = nn.ModuleList()
        channels = stem_width
        for depth, width in zip(blocks, widths, strict=True):
            arguments = [(channels, width, 2, pool_shortcut(channels, width, 2))]
            arguments += [(width, width, 1)] * (depth - 1)
            channels = width
            fine_tuned = [Branch(*arguments) for arguments in arguments] if choices else []
            parallel.append(nn.ModuleList(fine_tuned))
            if choices:
                segment = [SpotBlock(*a, fine_tuned=b) for a, b in zip(arguments, fine_tuned, strict=True)]
            else:
                segment = [Branch(*a) for a in arguments]
            self.blocks.append(nn.ModuleList(segment))
        if choices:
            self.parallel_blocks = parallel
        self.bn2 = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.linear = nn.Linear(channels, num_outputs)
        initialize_convolutions(self)

    def forward(self, images):
        x = self.bn1(self.conv1(images))
        for segment in self.blocks:
            for block in segment:
                x = block(x)
        return self.linear(F.adaptive_avg_pool2d(self.bn2(x), 1).flatten(1))


class SpotTunePolicy(nn.Module):
    """Predicts the probability that the fine-tuned weights run, per image and block (section 3.2).

    Parameters
    ----------
    network : SpotTuneResNet
        With two outputs per block: one for the pre-trained and one for the fine-tuned weights.
    """

    def __init__(self, network):
        super().__init__()
        self.network = network

    def logits(self, images):
        """Map images to logits ``[N, L, 2]``; the second column is that of the fine-tuned weights."""
        return self.network(images).unflatten(1, (-1, 2))

    def forward(self, images):
        """Map images to probabilities ``[N, L]``: ``softmax(logits)[..., 1]``."""
        y = self.network(images)
        return torch.sigmoid(y[:, 1::2] - y[:, 0::2])

    def sample(self, images, *, generator=None):
        """Draw decisions bool ``[N, L]``, as the published code does in training and at test time."""
        return draw(self.logits(images), generator=generator).bool()

    def sample_soft(self, images, *, temperature=5.0, generator=None):
        """Draw 0 or 1 per image and block as float ``[N, L]``, for ``soft_decisions``: gradients reach the policy.

        This is the straight-through Gumbel-softmax; the published temperature is 5 throughout.
        """
        return gumbel_softmax(self.logits(images), temperature, hard=True, generator=generator)[..., 1]


class SpotTune(DynamicNetwork):
    """A residual network in which every block runs either its pre-trained or its fine-tuned weights, per image.

    ``net(images)`` follows the policy: fine-tuned where its probability is at least 0.5. ``net(images, decisions=...)``
    replays bool ``[N, L]`` or ``[L]``, True for fine-tuned. In training, gradients reach the policy through
    ``net(images, soft_decisions=net.policy.sample_soft(images))``.

    Parameters
    ----------
    backbone : SpotTuneResNet
    policy : SpotTunePolicy
    """

    def __init__(self, backbone, policy):
        num_blocks = assign_columns(backbone)
        if policy.network.linear.out_features != 2 * num_blocks:
            raise ValueError(
                f"policy gives {policy.network.linear.out_features} logits, but backbone has {num_blocks} blocks: it "
                "must be two for each"
            )
        super().__init__(backbone, policy)
        self.num_blocks = num_blocks

    def forward(self, images, decisions=None, *, return_decisions=False, soft_decisions=None, mode="exact"):
        """Run one of the two sets of weights in every block.

        Parameters
        ----------
        images : float tensor ``[N, C, H, W]``
            Every segment must be able to halve height and width.
        decisions : bool tensor ``[N, L]`` or ``[L]``, optional
            True: the fine-tuned weights. If neither these nor soft decisions are given, the policy decides.
        return_decisions, soft_decisions, mode
            As in :class:`dynexec.nn.DynamicNetwork`.

        Returns
        -------
        float tensor ``[N, classes]``, or ``(output, decisions)``

        Raises
        ------
        TypeError, ValueError
            If ``images`` has the wrong type or size; also as in :class:`dynexec.nn.DynamicNetwork`.
        """
        backbone = getattr(self.backbone, "module", self.backbone)  # in a wrapper that trains it on several devices
        check_images(images, backbone.conv1.in_channels, 2 ** len(backbone.blocks))
        options = {"return_decisions": return_decisions, "soft_decisions": soft_decisions, "mode": mode}
        return super().forward(images, decisions, **options)

    def freeze_pretrained(self, batch_norm=False):
        """Stop training the pre-trained branches: their convolutions and, on request, the parameters of BatchNorm.

        The published code freezes the convolutions only; scales, biases and running statistics of the pre-trained
        BatchNorms keep changing.

        Parameters
        ----------
        batch_norm : bool
            Also freeze the scales and biases.

        Returns
        -------
        list of Parameter
            The frozen parameters.
        """
        kinds = (nn.Conv2d, nn.BatchNorm2d) if batch_norm else (nn.Conv2d,)
        layers = [m for block in dynamic_blocks(self.backbone) for m in block.modules() if isinstance(m, kinds)]
        return [parameter.requires_grad_(False) for layer in layers for parameter in layer.parameters()]

    saved_as_modules = True

    def read_official(self, checkpoint, given):
        """Read the :class:`Checkpoint` in a published file; see :func:`dynexec.models.load_official`.

        The authors saved whole modules, ``{"net": net, "agent": agent}``, and pre-trained networks under other names as
        ``{"net": net}`` alone; mappings of parameters are accepted in place of modules. The ``parallel_blocks`` of the
        agent have no function and are dropped. A pre-trained network is loaded into both sets of weights, except for
        its classifier, as in the published code.
        """
        if "net" not in checkpoint:
            raise ValueError(
                f"{given} has the entries {shorten(map(repr, checkpoint))}: expected 'net' and 'agent' (SpotTune), or "
                "'net' alone (pre-trained)"
            )
        parts, dropped, absent = {}, [], ()
        state = _state(checkpoint["net"], "backbone", f"{given}['net']", given)
        if any(key.startswith("pre_layers_conv.") for key in state):
            state = rename(state, _name_of_pretrained)
            dropped = [key for key in state if key.startswith("linear.")]
            own = self.backbone.state_dict()
            state |= {f"parallel_{key}": value for key, value in state.items() if key.startswith("blocks.")}
            state |= {key: own[key] for key in dropped if key in own}
        parts["backbone"] = self.backbone, state
        if "agent" in checkpoint:
            state = _state(checkpoint["agent"], "policy", f"{given}['agent']", given)
            dropped += [key for key in state if key.startswith("parallel_blocks.")]
            parts["policy"] = self.policy.network, {key: state[key] for key in state if key not in set(dropped)}
        else:
            absent = ("policy",)
        info = {key: value for key, value in checkpoint.items() if key not in ("net", "agent")}
        return Checkpoint(parts, absent, dropped, info)


def _state(entry, part, name, given):
    """Return the parameters of an entry, which is a module or a mapping of them."""
    state = state_of(entry)
    if state is None:
        check_mapping(entry, part, name, given)
        state = entry
    return without_prefix(state)


_PRETRAINED_NAMES = (
    (r"pre_layers_conv\.conv\.", "conv1."),
    (r"pre_layers_conv\.bns\.0\.", "bn1."),
    (r"layer(\d)\.(\d+)\.conv1\.conv\.", r"blocks.\1.\2.conv1."),
    (r"layer(\d)\.(\d+)\.conv1\.bns\.0\.", r"blocks.\1.\2.bn1."),
    (r"layer(\d)\.(\d+)\.conv2\.1\.conv\.", r"blocks.\1.\2.conv2.1."),
    (r"layer(\d)\.(\d+)\.conv2\.1\.bns\.0\.", r"blocks.\1.\2.bn2."),
    (r"end_bns\.0\.0\.", "bn2.0."),
    (r"linears\.0\.", "linear."),
)


def _name_of_pretrained(key):
    """Return dynexec's name of a parameter of the pre-training code, whose layers are numbered from 1."""
    for pattern, ours in _PRETRAINED_NAMES:
        if match := re.match(pattern, key):
            key = match.expand(ours) + key[match.end() :]
            break
    return re.sub(r"^blocks\.(\d)", lambda found: f"blocks.{int(found[1]) - 1}", key)


def spottune_resnet26(*, num_classes=10, blocks=(4, 4, 4), widths=WIDTHS, stem_width=STEM_WIDTH, in_channels=3):
    """Build SpotTune's ResNet-26 with its policy network, or a smaller one of its kind; images ``[N, 3, H, W]``.

    Parameters
    ----------
    num_classes : int
    blocks, widths : sequences of int
        Per segment.
    stem_width, in_channels : int

    Returns
    -------
    SpotTune
        Untrained: both sets of weights are drawn independently.

    Raises
    ------
    ValueError
        If ``blocks`` and ``widths`` differ in length, or a number is below 1.
    """
    if len(blocks) != len(widths):
        raise ValueError(f"blocks and widths need one entry per segment, got {tuple(blocks)} and {tuple(widths)}")
    check_counts(blocks=blocks, widths=widths, num_classes=num_classes, stem_width=stem_width, in_channels=in_channels)
    like = {"stem_width": stem_width, "in_channels": in_channels}
    backbone = SpotTuneResNet(blocks, widths, num_classes, **like)
    policy = SpotTuneResNet([1] * len(widths), widths, 2 * sum(blocks), choices=False, **like)
    return SpotTune(backbone, SpotTunePolicy(policy))
