"""Residual networks for photos (He et al., CVPR 2016), with the parameter names of torchvision's."""

import torch
import torch.nn.functional as F
from torch import nn

from dynexec.models.arguments import check_counts
from dynexec.ops import check_floating


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the first has the stride."""

    expansion = 1

    def __init__(self, in_channels, width, stride, downsample):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x):
        residual = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(residual + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, with four times as many channels out as inside; the 3x3 one has the stride."""

    expansion = 4

    def __init__(self, in_channels, width, stride, downsample):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = downsample

    def forward(self, x):
        residual = torch.relu(self.bn1(self.conv1(x)))
        residual = torch.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        return torch.relu(residual + (x if self.downsample is None else self.downsample(x)))


#: Depth to block and number of blocks per stage.
DEPTHS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(nn.Module):
    """``conv1, bn1, layer1..4.*`` and, with classes, ``fc``: images ``[N, C, H, W]`` to ``[N, features or classes]``.

    Parameters
    ----------
    depth : {18, 34, 50, 101}
    in_channels : int
    num_classes : int, optional
        None: no ``fc``; the output is the pooled features, ``num_features`` of them.
    """

    def __init__(self, depth, *, in_channels=3, num_classes=None):
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"depth must be one of {tuple(DEPTHS)}, got {depth!r}")
        check_counts(in_channels=in_channels, num_classes=1 if num_classes is None else num_classes)
        block, blocks = DEPTHS[depth]
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels = 64
        for stage, count in enumerate(blocks):
            layers = []
            width, stride = 64 << stage, 2 if stage else 1
            for number in range(count):
                step = stride if number == 0 else 1
                downsample = None
                if step != 1 or channels != width * block.expansion:
                    downsample = nn.Sequential(
                        nn.Conv2d(channels, width * block.expansion, 1, step, bias=False),
                        nn.BatchNorm2d(width * block.expansion),
                    )
                layers.append(block(channels, width, step, downsample))
                channels = width * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.num_features = channels
        if num_classes is not None:
            self.fc = nn.Linear(channels, num_classes)
        initialize_convolutions(self)

    def stem(self, images):
        """Map images to the input of ``layer1``, at a quarter of their size."""
        return self.maxpool(torch.relu(self.bn1(self.conv1(images))))

    def forward(self, images):
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(images)))))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.fc(x) if hasattr(self, "fc") else x


def check_images(images, channels, step):
    """Raise unless ``images`` are floating-point ``[N, channels, H, W]`` with H and W multiples of ``step``."""
    check_floating(images, "images", f"[N, {channels}, H, W]")
    if images.dim() != 4 or images.shape[1] != channels or images.shape[2] % step or images.shape[3] % step:
        why = f" with H and W multiples of {step}, as segments halve them" if step > 1 else ""
        raise ValueError(f"images must be [N, {channels}, H, W]{why}, got {tuple(images.shape)}")


def initialize_convolutions(module):
    """Initialise the weights of convolutions for training from scratch (He et al., ICCV 2015)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
