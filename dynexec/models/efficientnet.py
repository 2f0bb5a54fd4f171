"""EfficientNet (Tan and Le, ICML 2019), with the parameter names of the ``efficientnet_pytorch`` package."""

import math

import torch
import torch.nn.functional as F
from torch import nn

#: Blocks, kernel, stride of the first of them, expansion, channels: those of b0, which the other variants scale.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
#: Width factor, depth factor, nominal image size.
VARIANTS = {"b0": (1.0, 1.0, 224), "b1": (1.0, 1.1, 240), "b2": (1.1, 1.2, 260), "b3": (1.2, 1.4, 300)}


def same_padding(size, kernel, stride):
    """Return the zeros before and after ``size`` pixels for a convolution to output ``ceil(size / stride)`` pixels."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def padded_conv(in_channels, channels, kernel, stride, size, groups=1):
    """Return a padding module and a convolution that together are a "same" convolution of images of ``size`` pixels."""
    before, after = same_padding(size, kernel, stride)
    even = before == after
    pad = nn.Identity() if even else nn.ZeroPad2d((before, after, before, after))
    conv = nn.Conv2d(in_channels, channels, kernel, stride, before if even else 0, groups=groups, bias=False)
    return pad, conv


def batch_norm(channels):
    """Return a BatchNorm with the constants of the published networks."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class MBConv(nn.Module):
    """1x1 expansion, depthwise convolution, squeeze and excitation, 1x1 projection; plus the input where shapes allow.

    Parameters
    ----------
    in_channels, channels, kernel, stride, expansion : int
    size : int
        The image size that its padding is computed for.
    drop : float
        Probability that a sample loses the residual in training (stochastic depth).
    """

    def __init__(self, in_channels, channels, kernel, stride, expansion, size, drop=0.0):
        super().__init__()
        hidden = expansion * in_channels
        if expansion != 1:
            self._expand_conv = nn.Conv2d(in_channels, hidden, 1, bias=False)
            self._bn0 = batch_norm(hidden)
        self._pad, self._depthwise_conv = padded_conv(hidden, hidden, kernel, stride, size, groups=hidden)
        self._bn1 = batch_norm(hidden)
        squeezed = max(1, in_channels // 4)
        self._se_reduce = nn.Conv2d(hidden, squeezed, 1)
        self._se_expand = nn.Conv2d(squeezed, hidden, 1)
        self._project_conv = nn.Conv2d(hidden, channels, 1, bias=False)
        self._bn2 = batch_norm(channels)
        self.skips = stride == 1 and in_channels == channels
        self.drop = drop

    def forward(self, x):
        y = F.silu(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        y = F.silu(self._bn1(self._depthwise_conv(self._pad(y))))
        scale = self._se_expand(F.silu(self._se_reduce(F.adaptive_avg_pool2d(y, 1))))
        y = self._bn2(self._project_conv(y * torch.sigmoid(scale)))
        if not self.skips:
            return y
        if self.training and self.drop:
            keep = 1.0 - self.drop
            y = y * torch.rand(len(y), 1, 1, 1, dtype=y.dtype, device=y.device).add(keep).floor() / keep
        return y + x


class EfficientNet(nn.Module):
    """``_conv_stem, _bn0, _blocks.{i}.*, _conv_head, _bn1``: images ``[N, C, H, W]`` to pooled features.

    Convolutions with stride pad for the nominal size of the variant (b0 224, b1 240, b2 260, b3 300), whatever the size
    of the images, as trained weights expect.

    Parameters
    ----------
    variant : {"b0", "b1", "b2", "b3"}
    padding_by : {"layer", "image"}
        What a layer's padding is computed for: its own input when the network's input has the nominal size, as in the
        package from version 0.7 on, or the nominal size itself, as in earlier versions. Both are the same for b0; on b1
        and b3 one or two layers differ by a pixel. Weights do not tell which version they were trained with.
    in_channels : int

    Raises
    ------
    ValueError
        If the variant or padding is unknown.
    """

    def __init__(self, variant="b0", *, padding_by="layer", in_channels=3):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        if padding_by not in ("layer", "image"):
            raise ValueError(f"padding_by must be 'layer' or 'image', got {padding_by!r}")
        self.variant = variant
        width, depth, nominal = VARIANTS[variant]

        def after(size, stride):
            return math.ceil(size / stride) if padding_by == "layer" else size

        channels, size = _round(32 * width), nominal
        self._pad, self._conv_stem = padded_conv(in_channels, channels, 3, 2, size)
        self._bn0 = batch_norm(channels)
        size = after(size, 2)
        counts = [math.ceil(depth * stage[0]) for stage in STAGES]
        self._blocks = nn.ModuleList()
        for (_, kernel, stride, expansion, outputs), count in zip(STAGES, counts):
            outputs = _round(outputs * width)
            for number in range(count):
                step = stride if number == 0 else 1
                drop = 0.2 * len(self._blocks) / sum(counts)
                self._blocks.append(MBConv(channels, outputs, kernel, step, expansion, size, drop))
                channels, size = outputs, after(size, step)
        self.num_features = _round(1280 * width)
        self._conv_head = nn.Conv2d(channels, self.num_features, 1, bias=False)
        self._bn1 = batch_norm(self.num_features)

    def forward(self, images):
        x = F.silu(self._bn0(self._conv_stem(self._pad(images))))
        for block in self._blocks:
            x = block(x)
        x = F.silu(self._bn1(self._conv_head(x)))
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def _round(channels):
    """Round to the nearest multiple of 8, but to no less than nine tenths of ``channels``."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
