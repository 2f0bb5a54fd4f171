"""BlockDrop: residual networks with a policy network that drops blocks per image (Wu et al., CVPR 2018)."""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from dynexec.models.arguments import check_counts
from dynexec.models.checkpoints import Checkpoint, check_mapping, rename, shorten, without_prefix
from dynexec.models.resnet import check_images, initialize_convolutions
from dynexec.nn import DynamicNetwork, ResidualBlock, assign_columns
from dynexec.policy import sample


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions; the first has the stride."""

    expansion = 1

    def __init__(self, in_channels, width, stride, shortcut=None):
        super().__init__(shortcut)
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def residual_layers(self):
        return [self.conv1, self.bn1, torch.relu, self.conv2, self.bn2]


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions, with four times as many channels out as inside; the 3x3 one has the stride."""

    expansion = 4

    def __init__(self, in_channels, width, stride, shortcut=None):
        super().__init__(shortcut)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)

    def residual_layers(self):
        return [self.conv1, self.bn1, torch.relu, self.conv2, self.bn2, torch.relu, self.conv3, self.bn3]


class PadChannels(nn.Module):
    """Append ``extra`` channels of zeros: ``[N, C, H, W]`` to ``[N, C + extra, H, W]``."""

    def __init__(self, extra):
        super().__init__()
        self.extra = extra

    def forward(self, x):
        return F.pad(x, (0, 0, 0, 0, 0, self.extra))

    def extra_repr(self):
        return f"{self.extra}"


def pool_shortcut(in_channels, channels, stride):
    """Return the shortcut of the CIFAR networks: average pooling, then channels of zeros; it has no parameters."""
    if stride == 1 and channels == in_channels:
        return nn.Sequential()
    return nn.Sequential(nn.AvgPool2d(stride), PadChannels(channels - in_channels))


def conv_shortcut(in_channels, channels, stride):
    """Return the shortcut of the ImageNet networks: 1x1 convolution and batch norm."""
    if stride == 1 and channels == in_channels:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


class SegmentedResNet(nn.Module):
    """A residual network made of segments of blocks, with the parameter names of the published checkpoints.

    These are ``conv1, bn1, blocks.{segment}.{block}.*, ds.{segment}.*, fc``. The shortcut of a segment's first block is
    registered in ``ds``; all other shortcuts are identities. Segments after the first halve height and width.

    Parameters
    ----------
    block : type
        :class:`BasicBlock` or :class:`Bottleneck`.
    blocks, widths : sequences of int
        Per segment.
    large_images : bool
        True: 7x7 stem with stride 2 and max pooling, convolutional shortcuts. False: 3x3 stem, pooling shortcuts.
    in_channels : int
    num_classes : int, optional
        None: no ``fc``; the output is the pooled features ``[N, features]``.
    """

    def __init__(self, block, blocks, widths, *, large_images=False, in_channels=3, num_classes=None):
        super().__init__()
        if len(blocks) != len(widths) or min(blocks, default=0) < 1:
            raise ValueError(
                f"blocks and widths need one positive entry per segment, got {tuple(blocks)} and {tuple(widths)}"
            )
        channels = widths[0]
        kernel, stride = (7, 2) if large_images else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.stem_pool = nn.MaxPool2d(3, 2, padding=1) if large_images else nn.Identity()
        self.blocks = nn.ModuleList()
        self.ds = nn.ModuleList()
        make_shortcut = conv_shortcut if large_images else pool_shortcut
        for segment, (depth, width) in enumerate(zip(blocks, widths)):
            stride = 2 if segment else 1
            shortcut = make_shortcut(channels, width * block.expansion, stride)
            first = block(channels, width, stride, shortcut if len(shortcut) else None)
            channels = width * block.expansion
            self.blocks.append(nn.ModuleList([first, *(block(channels, width, 1) for _ in range(depth - 1))]))
            self.ds.append(shortcut)
        self.num_features = channels
        if num_classes is not None:
            self.fc = nn.Linear(channels, num_classes)
        initialize_convolutions(self)

    def forward(self, images):
        x = self.stem_pool(torch.relu(self.bn1(self.conv1(images))))
        for segment in self.blocks:
            for block in segment:
                x = block(x)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.fc(x) if hasattr(self, "fc") else x


class BlockDropPolicy(nn.Module):
    """Predicts keep probabilities for all blocks from the image, before the network runs.

    Parameters
    ----------
    features : SegmentedResNet
        A small one without ``fc``; all its blocks always run.
    num_blocks : int
        L, the number of blocks to decide for.
    halve : bool
        Average-pool the images by 2 first, as the ImageNet policy does.
    """

    def __init__(self, features, num_blocks, *, halve=False):
        super().__init__()
        self.features = features
        self.logit = nn.Linear(features.num_features, num_blocks)
        # A value head that neither published training script uses: here so that checkpoints load whole.
        self.vnet = nn.Linear(features.num_features, 1)
        self.halve = halve

    def forward(self, images):
        """Map images ``[N, C, H, W]`` to keep probabilities ``[N, L]``."""
        if self.halve:
            images = F.avg_pool2d(images, 2)
        return torch.sigmoid(self.logit(self.features(images)))

    def sample(self, images, *, generator=None, exploration=1.0):
        """Draw decisions bool ``[N, L]`` from the probabilities; arguments as in :func:`dynexec.policy.sample`."""
        return sample(self(images), generator=generator, exploration=exploration)


class BlockDrop(DynamicNetwork):
    """A residual network whose blocks are kept or dropped per image.

    ``net(images)`` follows the policy (a block is kept if its probability is at least 0.5, and none need be kept);
    ``net(images, decisions=...)`` replays bool ``[N, L]`` or ``[L]``. A dropped block is its shortcut without the ReLU:
    the identity, except in a segment's first block.

    Parameters
    ----------
    backbone : SegmentedResNet
    policy : BlockDropPolicy
    """

    def __init__(self, backbone, policy):
        num_blocks = assign_columns(backbone)
        if policy.logit.out_features != num_blocks:
            raise ValueError(
                f"policy decides for {policy.logit.out_features} blocks, but backbone has {num_blocks}: "
                "they must be equal"
            )
        super().__init__(backbone, policy)
        self.num_blocks = num_blocks

    def forward(self, images, decisions=None, *, return_decisions=False, soft_decisions=None, mode="exact"):
        """Run the blocks that the decisions keep.

        Parameters
        ----------
        images : float tensor ``[N, C, H, W]``
            With pooling shortcuts (CIFAR), every segment but the first must be able to halve height and width.
        decisions : bool tensor ``[N, L]`` or ``[L]``, optional
            If neither these nor soft decisions are given, the policy decides.
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
        pools = any(isinstance(layer, nn.AvgPool2d) and not layer.ceil_mode for layer in backbone.ds.modules())
        check_images(images, backbone.conv1.in_channels, 2 ** (len(backbone.blocks) - 1) if pools else 1)
        options = {"return_decisions": return_decisions, "soft_decisions": soft_decisions, "mode": mode}
        return super().forward(images, decisions, **options)

    def read_official(self, checkpoint, given):
        """Read the :class:`Checkpoint` in a mapping of any published layout; see :func:`dynexec.models.load_official`.

        Layouts: fine-tuned (``agent`` and ``resnet``), curriculum (``agent`` only: the backbone is left alone), oldest
        (``net`` for ``agent``), and base networks (``state_dict``, or the bare mapping that torchvision publishes, with
        names like ``layer1.0.downsample.0``). The unused ``features.fc`` of old policies is dropped.
        """
        states, info = _split(checkpoint, given)
        parts, dropped = {}, []
        for name in ("backbone", "policy"):
            if name in states:
                state, unused = _rename(without_prefix(states[name]), name)
                dropped += unused
                parts[name] = getattr(self, name), state
        absent = tuple(name for name in ("backbone", "policy") if name not in parts)
        return Checkpoint(parts, absent, dropped, info)


def _split(checkpoint, given):
    """Return the state of each part of the network, and the checkpoint's other entries; ``given`` is for errors."""
    parts = {}
    if "state_dict" in checkpoint or "resnet" in checkpoint:
        parts["backbone"] = "state_dict" if "state_dict" in checkpoint else "resnet"
    if "state_dict" in checkpoint:  # an "agent" beside it may be anything
        parts |= {"policy": "agent"} if isinstance(checkpoint.get("agent"), Mapping) else {}
    elif "agent" in checkpoint or "net" in checkpoint:
        parts["policy"] = "agent" if "agent" in checkpoint else "net"
    if not parts:
        if checkpoint and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
            check_mapping(checkpoint, "backbone", given, given)
            return {"backbone": checkpoint}, {}
        raise ValueError(
            f"{given} has the entries {shorten(map(repr, checkpoint))}: expected 'agent' and 'resnet' (fine-tuned), "
            "'agent' or 'net' (policy only), 'state_dict' (base network), or parameters by name"
        )
    for part, entry in parts.items():
        check_mapping(checkpoint[entry], part, f"{given}[{entry!r}]", given)
    info = {key: value for key, value in checkpoint.items() if key not in parts.values()}
    return {part: checkpoint[entry] for part, entry in parts.items()}, info


def _rename(state, part):
    """Return the state under dynexec's names, and the names that are dropped."""
    if part == "policy":
        dropped = [key for key in state if key.startswith("features.fc")]
        return {key: value for key, value in state.items() if key not in dropped}, dropped
    return rename(state, _name_in_backbone), []


def _name_in_backbone(key):
    if (match := re.match(r"layer(\d+)\.(?:0\.downsample|(\d+))\.(.*)", key)) is None:
        return key
    segment, block, rest = int(match[1]) - 1, match[2], match[3]
    return f"ds.{segment}.{rest}" if block is None else f"blocks.{segment}.{block}.{rest}"


def blockdrop_resnet(
    blocks,
    widths,
    *,
    block=BasicBlock,
    policy_widths=None,
    large_images=False,
    in_channels=3,
    num_classes=10,
):
    """Build a BlockDrop network of any size.

    Parameters
    ----------
    blocks, widths : sequences of int
        Number of residual blocks, and channels of their 3x3 convolutions, per segment.
    block : type
        :class:`BasicBlock` or :class:`Bottleneck`.
    policy_widths : sequence of int, optional
        Channels of the policy network, which has one basic block per segment; default ``widths``.
    large_images : bool
        See :class:`SegmentedResNet`; the policy then sees the images at half size.
    in_channels, num_classes : int

    Returns
    -------
    BlockDrop
        Untrained.

    Raises
    ------
    ValueError
        If ``blocks`` and ``widths`` differ in length, or a number is below 1.
    """
    policy_widths = tuple(widths) if policy_widths is None else tuple(policy_widths)
    check_counts(blocks=blocks, widths=widths, in_channels=in_channels, num_classes=num_classes)
    check_counts(policy_widths=policy_widths)
    backbone = SegmentedResNet(
        block, blocks, widths, large_images=large_images, in_channels=in_channels, num_classes=num_classes
    )
    features = SegmentedResNet(
        BasicBlock, [1] * len(policy_widths), policy_widths, large_images=large_images, in_channels=in_channels
    )
    return BlockDrop(backbone, BlockDropPolicy(features, sum(blocks), halve=large_images))


CIFAR_WIDTHS = (16, 32, 64)

#: The published networks: name to arguments of :func:`blockdrop_resnet`.
PUBLISHED = {
    "blockdrop_resnet32_cifar10": dict(blocks=(5, 5, 5), widths=CIFAR_WIDTHS, num_classes=10),
    "blockdrop_resnet32_cifar100": dict(blocks=(5, 5, 5), widths=CIFAR_WIDTHS, num_classes=100),
    "blockdrop_resnet110_cifar10": dict(blocks=(18, 18, 18), widths=CIFAR_WIDTHS, num_classes=10),
    "blockdrop_resnet110_cifar100": dict(blocks=(18, 18, 18), widths=CIFAR_WIDTHS, num_classes=100),
    "blockdrop_resnet101_imagenet": dict(
        blocks=(3, 4, 23, 3), widths=(64, 128, 256, 512), block=Bottleneck, large_images=True, num_classes=1000
    ),
}
