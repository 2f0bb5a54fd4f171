"""Small networks in the styles that people use, and random BatchNorm statistics for them."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import dynexec


class BasicBlock(nn.Module):
    """As in torchvision: one ReLU module for all, an optional ``downsample``."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """As in timm: named activations, an attention slot, drop path, stride on the 3x3, average-pooled shortcut."""

    def __init__(self, inputs, outputs, stride=1, attention=False):
        super().__init__()
        width = outputs // 4
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.drop_block = nn.Identity()
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.se = SqueezeExcite(outputs) if attention else None
        self.drop_path = None
        self.act3 = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride != 1 else nn.Identity()
            self.downsample = nn.Sequential(pool, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        shortcut = x
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.drop_block(self.bn2(self.conv2(x))))
        x = self.bn3(self.conv3(x))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act3(x)


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.reduce = nn.Conv2d(channels, 4, 1)
        self.expand = nn.Conv2d(4, channels, 1)

    def forward(self, x):
        scale = F.relu(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.expand(scale))


class InvertedResidual(nn.Module):
    """As in MobileNetV2 and EfficientNet-Lite: ReLU6, a skip only where the shape stays, nothing after it."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        hidden = 3 * inputs
        self.skip = stride == 1 and inputs == outputs
        self.expand = nn.Sequential(nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.ZeroPad2d(1),
            nn.Conv2d(hidden, hidden, 3, stride, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, inputs, drop_connect_rate=None):
        x = self.project(self.depthwise(self.expand(inputs)))
        if self.skip:
            if drop_connect_rate:
                x = x * (1 - drop_connect_rate)
            x = x + inputs
        return x


class Network(nn.Module):
    """Stem, blocks, head. ``stages`` is a list of lists of blocks."""

    def __init__(self, width, stages, outputs, classes=5):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.layers = nn.Sequential(*(nn.Sequential(*stage) for stage in stages))
        self.head = nn.Linear(outputs, classes)

    def forward(self, x):
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


def naive_forward(model, x, decisions):
    """What a converted ``model`` must compute, from an unconverted one: sample by sample, block by block.

    A dropped block is its shortcut with no activation; a block that has no skip connection always runs.
    """
    outputs = []
    for sample, keep in zip(x.split(1), decisions.tolist(), strict=True):
        h, columns = model.stem(sample), iter(keep)
        for block in (block for stage in model.layers for block in stage):
            if getattr(block, "skip", True) and not next(columns):
                h = h if getattr(block, "downsample", None) is None else block.downsample(h)
            else:
                h = block(h)
        assert next(columns, None) is None
        outputs.append(model.head(h.mean((2, 3))))
    return torch.cat(outputs) if outputs else model(x)


def torchvision_style():
    stages = [[BasicBlock(8, 8), BasicBlock(8, 8)], [BasicBlock(8, 16, 2), BasicBlock(16, 16), BasicBlock(16, 16)]]
    return finish(Network(8, stages, 16))


def timm_style():
    stages = [
        [Bottleneck(8, 16), Bottleneck(16, 16), Bottleneck(16, 16, attention=True)],
        [Bottleneck(16, 32, 2), Bottleneck(32, 32), Bottleneck(32, 32)],
    ]
    return finish(Network(8, stages, 32))


def mobilenet_style():
    stages = [[InvertedResidual(8, 8), InvertedResidual(8, 8)], [InvertedResidual(8, 12, 2), InvertedResidual(12, 12)]]
    return finish(Network(8, stages, 12))


STYLES = {"torchvision": torchvision_style, "timm": timm_style, "mobilenet": mobilenet_style}


def finish(model, seed=0):
    """Random BatchNorm statistics and affine parameters (the defaults hide folding errors), evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
            ):
                tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


def images(n, size=13, layout=torch.contiguous_format):
    """Fresh random images, of an odd size."""
    return torch.randn(n, 3, size, size).contiguous(memory_format=layout)


def converted(style="torchvision", dtype=torch.float32):
    """(converted model, unconverted twin, L)"""
    model = STYLES[style]().to(dtype)
    twin = copy.deepcopy(model)
    return model, twin, dynexec.convert(model).num_blocks


def run(model, x, decisions, mode="exact"):
    """``model(x)`` under the decisions, without gradients."""
    with torch.no_grad(), dynexec.decide(decisions, mode=mode):
        return model(x)


def decision_patterns(n, num_blocks):
    """(name, bool ``[n, num_blocks]``) from keeping nothing to keeping all."""
    one = torch.zeros(n, num_blocks, dtype=torch.bool)
    one[n // 2] = True
    yield "none", torch.zeros(n, num_blocks, dtype=torch.bool)
    yield "all", torch.ones(n, num_blocks, dtype=torch.bool)
    yield "one sample", one
    yield "all but one", ~one
    yield "one block", torch.eye(num_blocks, dtype=torch.bool)[:1].repeat(n, 1)
    for keep in (0.25, 0.5, 0.9):
        yield f"keep {keep}", torch.rand(n, num_blocks) < keep


class Policy(nn.Module):
    """Keep probabilities from the mean colour."""

    def __init__(self, num_blocks):
        super().__init__()
        self.logit = nn.Linear(3, num_blocks)

    def forward(self, images):
        return torch.sigmoid(self.logit(images.mean((2, 3))))
