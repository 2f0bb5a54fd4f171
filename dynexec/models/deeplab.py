"""The dilated residual network and the heads of DeepLab, as used by multi-task networks.

Parameter names are those of the published AdaShare checkpoints: ``blocks.{segment}.{block}.*, ds.{segment}.*``, and
``stem.*`` for their ``conv1`` and ``bn1``.
"""

import torch
from torch import nn

from dynexec.models.resnet import initialize_convolutions
from dynexec.nn.residual import with_zero_gradients

#: Per segment, before widths: an image's features keep an eighth of its size.
STRIDES = (1, 2, 1, 1)
DILATIONS = (1, 1, 2, 4)
RATES = (6, 12, 18, 24)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, both dilated; the first has the stride.

    Computes ``relu(residual(x) + x)``, or ``residual(x)`` alone if the shortcut is not the identity. Such a shortcut
    belongs to the segment, because rows that skip the block need it, too.
    """

    expansion = 1

    def __init__(self, in_channels, width, stride, dilation, *, identity):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.identity = identity

    def forward(self, x):
        residual = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(residual + x) if self.identity else residual


class Bottleneck(nn.Module):
    """1x1, dilated 3x3 and 1x1 convolutions, with four times as many channels out as inside; the first has the stride.

    Otherwise like :class:`BasicBlock`. Weights and biases of its BatchNorms start frozen (``requires_grad`` False), as
    published.
    """

    expansion = 4

    def __init__(self, in_channels, width, stride, dilation, *, identity):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.identity = identity
        for norm in (self.bn1, self.bn2, self.bn3):
            norm.requires_grad_(False)

    def forward(self, x):
        residual = torch.relu(self.bn1(self.conv1(x)))
        residual = torch.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        return torch.relu(residual + x) if self.identity else residual


class Stem(nn.Module):
    """7x7 convolution and pooling, each of which halves the size; pooling rounds up."""

    def __init__(self, in_channels, width):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1, ceil_mode=True)

    def forward(self, images):
        return self.maxpool(torch.relu(self.bn1(self.conv1(images))))


class DilatedResNet(nn.Module):
    """Segments of residual blocks, of which only the second has a stride; the last two are dilated.

    Parameters
    ----------
    block : type
        :class:`BasicBlock` or :class:`Bottleneck`.
    blocks, widths : sequences of int
        Per segment, at most four.
    in_channels : int
    """

    def __init__(self, block, blocks, widths, *, in_channels=3):
        super().__init__()
        if len(blocks) != len(widths) or not 1 <= len(blocks) <= len(STRIDES) or min(*blocks, *widths) < 1:
            raise ValueError(
                f"blocks and widths need one positive entry for each of one to {len(STRIDES)} segments, "
                f"got {tuple(blocks)} and {tuple(widths)}"
            )
        channels = widths[0]
        self.stem = Stem(in_channels, channels)
        self.blocks = nn.ModuleList()
        self.ds = nn.ModuleList()
        for depth, width, stride, dilation in zip(blocks, widths, STRIDES, DILATIONS):
            outputs = width * block.expansion
            identity = stride == 1 and channels == outputs and dilation == 1
            self.ds.append(None if identity else conv_shortcut(channels, outputs, stride))
            first = block(channels, width, stride, dilation, identity=identity)
            others = [block(outputs, width, 1, dilation, identity=True) for _ in range(depth - 1)]
            self.blocks.append(nn.ModuleList([first, *others]))
            channels = outputs
        self.num_features = channels
        initialize_convolutions(self)

    def chain(self):
        """Yield pairs of block and shortcut in the order of execution; None for a shortcut that is the identity."""
        for segment, shortcut in zip(self.blocks, self.ds):
            for number, block in enumerate(segment):
                yield block, None if number else shortcut

    def forward(self, images):
        """Map images ``[N, C, H, W]`` to features, with all blocks."""
        x = self.stem(images)
        for block, shortcut in self.chain():
            x = block(x) if shortcut is None else torch.relu(block(x) + shortcut(x))
        return x

    def run_shared(self, images, plan):
        """Compute the features of each task, a list of T tensors, under a :class:`dynexec.nn.tasks.SharingPlan`.

        A row that runs a block becomes ``relu(residual(x) + shortcut(x))``, one that skips it ``shortcut(x)``.
        """
        x = self.stem(images)
        for (block, shortcut), (run, skip) in zip(self.chain(), plan.blocks):
            # Every row goes on, so its shortcut is needed whatever it does, and once where it does both.
            s = x if shortcut is None else shortcut(x)
            parts = []
            if run is None and torch.is_grad_enabled():
                s = with_zero_gradients(s, block)
            if run is not None:
                y = block(plan.take(x, run))
                parts.append(y if shortcut is None else torch.relu_(y + plan.take(s, run)))
            if skip is not None:
                parts.append(plan.take(s, skip))
            x = parts[0] if len(parts) == 1 else torch.cat(parts)
        return [plan.take(x, rows) for rows in plan.tasks]

    def run_soft(self, images, weights):
        """Compute the features of one task with all blocks, mixing ``w * relu(residual(x) + s) + (1 - w) * s``.

        ``weights`` is float ``[L]`` or ``[N, L]``, and ``s`` is ``shortcut(x)``.
        """
        x = self.stem(images)
        weights = weights.to(x)
        for number, (block, shortcut) in enumerate(self.chain()):
            s = x if shortcut is None else shortcut(x)
            y = block(x) if shortcut is None else torch.relu(block(x) + s)
            weight = weights[..., number].reshape(-1, 1, 1, 1)
            x = y * weight + s * (1 - weight)
        return x

    def input_shapes(self, height, width):
        """Return ``[C, H, W]`` of the input of each block, and of the features, for images of that size."""
        size = [((pixels - 1) // 2 + 1) // 2 + 1 for pixels in (height, width)]
        shapes = [(self.stem.conv1.out_channels, *size)]
        for block, _ in self.chain():
            stride = block.conv1.stride[0]
            size = [(pixels - 1) // stride + 1 for pixels in size]
            last = block.conv3 if hasattr(block, "conv3") else block.conv2
            shapes.append((last.out_channels, *size))
        return shapes


class Branch(nn.Module):
    """One of a head's dilated branches: ``conv1, conv2, conv3`` with biases, and dropout between them."""

    def __init__(self, in_channels, width, outputs, rate):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=rate, dilation=rate)
        self.conv2 = nn.Conv2d(width, width, 1)
        self.conv3 = nn.Conv2d(width, outputs, 1)
        self.dropout = nn.Dropout()

    def forward(self, x):
        x = self.dropout(torch.relu(self.conv1(x)))
        x = self.dropout(torch.relu(self.conv2(x)))
        return self.conv3(x)


class Head(nn.Module):
    """The sum of four branches of different dilation: features ``[N, C, h, w]`` to ``[N, outputs, h, w]``."""

    def __init__(self, in_channels, width, outputs):
        super().__init__()
        self.branches = nn.ModuleList(Branch(in_channels, width, outputs, rate) for rate in RATES)

    def forward(self, x):
        y = self.branches[0](x)
        for branch in self.branches[1:]:
            y = y + branch(x)
        return y


def conv_shortcut(in_channels, channels, stride):
    """Return a 1x1 convolution with batch norm."""
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
