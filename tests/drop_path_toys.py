"""Blocks and networks with stochastic depth in the styles of timm and torchvision."""

import torch
import torch.nn.functional as F
from torch import nn

# Rates that are drawn with, at which all samples are dropped, and none.
ALMOST_1, ALMOST_0 = 1 - 1e-12, 1e-12


class DropPath(nn.Module):
    """As in timm, drawing included."""

    def __init__(self, drop_prob=0.0, scale_by_keep=True):
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
        if keep_prob > 0.0 and self.scale_by_keep:
            mask.div_(keep_prob)
        return x * mask


class StochasticDepth(nn.Module):
    """As in torchvision."""

    def __init__(self, p, mode="row"):
        super().__init__()
        self.p, self.mode = p, mode

    def forward(self, x):
        if not self.training or self.p == 0.0:
            return x
        size = [x.shape[0] if self.mode == "row" else 1] + [1] * (x.ndim - 1)
        noise = x.new_empty(size).bernoulli_(1 - self.p)
        return x * (noise.div_(1 - self.p) if self.p < 1 else noise)


def drop_path(rate):
    """timm's blocks hold no DropPath at rate 0."""
    return DropPath(rate) if rate > 0 else nn.Identity()


class Attention(nn.Module):
    def __init__(self, dim, heads=2):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, attn_mask=None):
        n, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.proj(x.transpose(1, 2).reshape(n, tokens, dim))


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(dim) + 0.5)

    def forward(self, x):
        return x * self.gamma


class ViTBlock(nn.Module):
    """Two branches, each with its LayerScale and DropPath."""

    def __init__(self, dim=8, rate=0.0):
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(dim), Attention(dim), LayerScale(dim)
        self.drop_path1 = drop_path(rate)
        self.norm2, self.ls2, self.drop_path2 = nn.LayerNorm(dim), LayerScale(dim), drop_path(rate)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x, attn_mask=None):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask)))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


class ConvNeXtBlock(nn.Module):
    """The scale is a parameter of the block; the shortcut may be a module."""

    def __init__(self, dim=8, rate=0.0):
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.gamma = nn.Parameter(torch.rand(dim) + 0.5)
        self.drop_path, self.shortcut = drop_path(rate), nn.Identity()

    def forward(self, x):
        shortcut = x
        x = self.conv_dw(x)
        x = x.permute(0, 2, 3, 1)
        x = self.mlp(self.norm(x))
        x = x.permute(0, 3, 1, 2)
        if self.gamma is not None:
            x = x.mul(self.gamma.reshape(1, -1, 1, 1))
        return self.drop_path(x) + self.shortcut(shortcut)


class ResNetBlock(nn.Module):
    """drop_path, None at rate 0, before an addition in place and an activation in place; a projection where needed."""

    def __init__(self, inputs=8, outputs=8, stride=1, rate=0.0):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.act1, self.act2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.drop_path = DropPath(rate) if rate > 0 else None
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        shortcut = x
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act2(x)


class CNBlock(nn.Module):
    """As torchvision's ConvNeXt: the scale before the branch, the shortcut added in place."""

    def __init__(self, dim=8, rate=0.0):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.GELU(), nn.Conv2d(dim, dim, 1))
        self.layer_scale = nn.Parameter(torch.rand(dim, 1, 1))
        self.stochastic_depth = StochasticDepth(rate)

    def forward(self, input):
        result = self.layer_scale * self.block(input)
        result = self.stochastic_depth(result)
        result += input
        return result


def rates(depth, rate):
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


NETWORKS = {
    "vit": lambda: nn.Sequential(nn.Linear(5, 8), *(ViTBlock(rate=rate) for rate in rates(3, 0.6))),
    "convnext": lambda: nn.Sequential(nn.Conv2d(3, 8, 2, 2), *(ConvNeXtBlock(rate=rate) for rate in rates(3, 0.6))),
    "resnet": lambda: nn.Sequential(
        *(nn.Conv2d(3, 8, 3), ResNetBlock(rate=0.0), ResNetBlock(8, 12, 2, rate=0.3), ResNetBlock(12, 12, rate=0.6))
    ),
    "torchvision": lambda: nn.Sequential(nn.Conv2d(3, 8, 2, 2), *(CNBlock(rate=rate) for rate in rates(3, 0.6))),
}


def network(name):
    """The network in float64 and training mode, with random affine parameters and statistics of BatchNorm."""
    torch.manual_seed(0)
    model = NETWORKS[name]().double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5)
    return model


def batch(name, n):
    """Tokens, or maps of an odd size."""
    return torch.randn(n, 7, 5).double() if name == "vit" else torch.randn(n, 3, 11, 9).double()


def frozen(model):
    """The model with its BatchNorm in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def results(model, x, seed, forward=None):
    """The output, and gradients of the input and the parameters, with the draws of ``seed``."""
    model.zero_grad()
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = (forward or model)(x)
    y.square().sum().backward()
    zeros = (torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters())
    return [y.detach(), x.grad, *zeros]


def assert_same(actual, expected, tolerance=1e-10):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def set_rates(model, rate):
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = rate
        elif isinstance(module, StochasticDepth):
            module.p = rate
