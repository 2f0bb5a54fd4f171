"""MobileNetV2 (Sandler et al., CVPR 2018), with the parameter names of torchvision's."""

import torch.nn.functional as F
from torch import nn

#: Expansion, channels, blocks, stride of the first of them (table 2 of the paper).
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
NUM_FEATURES = 1280


def conv_bn_relu6(in_channels, channels, kernel, stride=1, groups=1):
    """Return the layers of a convolution with BatchNorm and ReLU6."""
    conv = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU6()]


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution and 1x1 projection, plus the input where shapes allow.

    Parameters
    ----------
    in_channels, channels, stride, expansion : int
    flat : bool
        Parameter names: ``conv.0, conv.1, conv.3, ...`` in one sequence; otherwise ``conv.0.0, conv.0.1, conv.1.0``,
        nested as in torchvision.
    """

    def __init__(self, in_channels, channels, stride, expansion, *, flat=False):
        super().__init__()
        hidden = expansion * in_channels
        groups = [conv_bn_relu6(in_channels, hidden, 1)] if expansion != 1 else []
        groups.append(conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden))
        last = [nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels)]
        layers = [layer for group in groups for layer in group] if flat else [nn.Sequential(*group) for group in groups]
        self.conv = nn.Sequential(*layers, *last)
        self.skips = stride == 1 and in_channels == channels

    def forward(self, x):
        return x + self.conv(x) if self.skips else self.conv(x)


class MobileNetV2(nn.Module):
    """``features.0 .. features.18`` and, with classes, ``classifier.1``: images to ``[N, 1280 or classes]``.

    Parameters
    ----------
    in_channels : int
    num_classes : int, optional
        None: no classifier; the output is the pooled features.
    dropout : float
        Before the classifier, in training.
    """

    def __init__(self, *, in_channels=3, num_classes=None, dropout=0.2):
        super().__init__()
        layers = [nn.Sequential(*conv_bn_relu6(in_channels, 32, 3, 2))]
        channels = 32
        for expansion, width, count, stride in STAGES:
            for number in range(count):
                layers.append(InvertedResidual(channels, width, stride if number == 0 else 1, expansion))
                channels = width
        layers.append(nn.Sequential(*conv_bn_relu6(channels, NUM_FEATURES, 1)))
        self.features = nn.Sequential(*layers)
        if num_classes is not None:
            self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(NUM_FEATURES, num_classes))
        initialize(self)

    def forward(self, images):
        x = F.adaptive_avg_pool2d(self.features(images), 1).flatten(1)
        return self.classifier(x) if hasattr(self, "classifier") else x


def initialize(module):
    """Initialise weights for training from scratch."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0.0, 0.01)
            nn.init.zeros_(layer.bias)
