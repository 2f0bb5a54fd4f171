"""Blocks that a reader of structure may stumble over; all take and give ``[N, 4, H, W]`` unless they say so."""

import torch
import torch.nn.functional as F
from drop_path_toys import DropPath
from torch import nn


def conv(inputs=4, outputs=4, stride=1):
    return nn.Conv2d(inputs, outputs, 3, stride, 1)


def shallow(block):
    """A model around one block."""
    return nn.Sequential(nn.Conv2d(3, 4, 1), block).eval()


class LayerScale(nn.Module):
    """A parameter in the branch: not a plain sequence of layers. As ConvNeXt."""

    def __init__(self):
        super().__init__()
        self.conv = conv()
        self.gamma = nn.Parameter(torch.full((4, 1, 1), 0.5))

    def forward(self, x):
        return x + self.gamma * self.conv(x)


class AddsInPlace(LayerScale):
    """Writes the sum into its own input."""

    def forward(self, x):
        x += self.gamma * self.conv(x)
        return x


class ReluInPlaceFirst(nn.Module):
    """Overwrites its input before both branches read it."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(inplace=True), conv())

    def forward(self, x):
        return self.body(x) + x


class ReluInPlaceProjection(ReluInPlaceFirst):
    def __init__(self):
        super().__init__()
        self.project = nn.Conv2d(4, 4, 1)
        self.body.append(conv())

    def forward(self, x):
        return self.body(x) + self.project(x)


class ReluInPlaceBehindIdentity(nn.Module):
    """Overwrites its input, which a layer that does nothing hands on. As where a BatchNorm was fused away."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout, self.relu = nn.Sequential(nn.Identity()), nn.Dropout(0.0), nn.ReLU(inplace=True)
        self.body = nn.Sequential(conv(), nn.BatchNorm2d(4), conv())

    def forward(self, x):
        return self.body(self.relu(self.dropout(self.norm(x)))) + x


class ReluInPlaceOfAView(ReluInPlaceBehindIdentity):
    def forward(self, x):
        return self.body(x.flatten(1).relu_().unflatten(1, (4, 5, 5))) + x


class ReluInPlaceHidden(ReluInPlaceBehindIdentity):
    """Only a run of it shows that it overwrites its input."""

    def __init__(self):
        super().__init__()
        self.norm = HiddenRelu()


class ReluInPlaceHiddenProjection(ReluInPlaceHidden):
    def __init__(self):
        super().__init__()
        self.project = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.body(self.norm(x)) + self.project(x)


class HiddenRelu(nn.Module):
    def forward(self, x):
        return torch.relu_(x)


class ReluInPlaceBehindIdentityProjection(ReluInPlaceBehindIdentity):
    def __init__(self):
        super().__init__()
        self.project = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.body(self.relu(self.norm(x))) + self.project(x)


class ReluInPlaceUnassigned(nn.Module):
    """What the ReLU gives is not taken: its input goes on, overwritten."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn, self.relu, self.conv2 = conv(), nn.BatchNorm2d(4), nn.ReLU(inplace=True), conv()
        self.shortcut = nn.Identity()

    def forward(self, x):
        y = self.bn(self.conv1(x))
        self.relu(y)
        return self.conv2(y) + self.shortcut(x)


class AddsInPlaceToTwoNames(ReluInPlaceUnassigned):
    """One tensor under two names, of which the other goes on."""

    def forward(self, x):
        y = z = self.bn(self.conv1(x))
        y += 1
        y *= y
        return self.conv2(z) + self.shortcut(x)


class ReluInPlaceUnassignedProjection(ReluInPlaceUnassigned):
    def __init__(self):
        super().__init__()
        self.shortcut = nn.Conv2d(4, 4, 1)


class AddsInPlaceToTwoNamesProjection(AddsInPlaceToTwoNames):
    def __init__(self):
        super().__init__()
        self.shortcut = nn.Conv2d(4, 4, 1)


class ActivationUnassigned(ReluInPlaceUnassigned):
    def forward(self, x):
        y = self.conv2(self.bn(self.conv1(x))) + self.shortcut(x)
        torch.tanh_(y)
        return y


class ResidualSequential(nn.Sequential):
    """A container with a forward of its own."""

    def __init__(self):
        super().__init__(conv(), nn.ReLU(), conv())

    def forward(self, x):
        return F.relu(super().forward(x) + x)


class EmptyShortcut(nn.Module):
    """An identity written as an empty container."""

    def __init__(self):
        super().__init__()
        self.conv = conv()
        self.shortcut = nn.Sequential()

    def forward(self, x):
        return torch.relu(self.conv(x) + self.shortcut(x))


class ScaledAddition(nn.Module):
    """An addition with a factor is not residual + shortcut."""

    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x):
        return torch.add(self.conv(x), x, alpha=0.5)


class KeywordAddition(ScaledAddition):
    def forward(self, x):
        return torch.add(input=x, other=self.conv(x))


class Squares(ScaledAddition):
    """An operation that uses the same tensor twice."""

    def forward(self, x):
        x = self.conv(x)
        return torch.relu(x * x + torch.add(x, other=x))


class SquareBranch(ScaledAddition):
    def forward(self, x):
        y = self.conv(x)
        return torch.relu(y * y + x)


class PooledProjection(nn.Module):
    """``[N, 4, H, W]`` to ``[N, 6, H/2, W/2]``, with functions that cannot be pickled."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(4, 6, 2), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 6))
        self.project = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))

    def forward(self, x):
        return F.relu(self.body(x) + self.project(F.max_pool2d(x, 2, 2, ceil_mode=True)))


class OptionalArguments(nn.Module):
    """An identity shortcut, and arguments besides the input; ``shift`` holds a value per sample."""

    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, features, scale=None, shift=None):
        y = self.conv(features)
        if scale is not None:
            y = y * scale
        if shift is not None:
            y = y + shift[:, None, None, None]
        return torch.relu(y + features)


class OptionalScaleProjection(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(), conv())
        self.project = nn.Conv2d(4, 4, 1)

    def forward(self, x, scale=None):
        y = self.body(x)
        return (y if scale is None else y * scale) + self.project(x)


class DataDependent(nn.Module):
    """Cannot be traced."""

    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x):
        y = self.conv(x)
        return x + y if y.abs().max() > 1e-9 else x


class StoresOutput(ScaledAddition):
    """Keeps what it computed on itself."""

    last = None

    def forward(self, x):
        self.last = self.conv(x)
        return self.last + x


class TrainsDifferently(ScaledAddition):
    def forward(self, x):
        y = self.conv(x)
        if self.training:
            y = F.dropout(y, 0.5)
        return x + y


class ProjectsWithDropout(OptionalScaleProjection):
    def forward(self, x):
        y = F.dropout(self.body(x), 0.5, self.training)
        return y + self.project(x)


class TakenName(ScaledAddition):
    """Has an attribute that the mixin needs."""

    def __init__(self):
        super().__init__()
        self.placement = "cpu"

    def forward(self, x):
        return x + self.conv(x)


class TakenMethod(ScaledAddition):
    def residual_layers(self, x):
        return self.conv(x)

    def forward(self, x):
        return x + self.residual_layers(x)


class PrivateNames(ScaledAddition):
    """Names that the mixin must leave to the block."""

    def _select(self, x):
        return self.conv(x)

    _compact = _run = _finish = _select

    def forward(self, x):
        return x + self._select(x)


class OwnState(ScaledAddition):
    """Drops attributes it does not know when it is pickled. Trains with stochastic depth."""

    def __init__(self):
        super().__init__()
        self.drop_path = DropPath(0.5)

    def forward(self, x):
        return x + self.drop_path(self.conv(x))

    def __getstate__(self):
        known = ("training", "_parameters", "_buffers", "_modules")
        return {name: value for name, value in super().__getstate__().items() if name in known}

    def __setstate__(self, state):
        nn.Module.__init__(self)
        self.__dict__.update(state)


class OwnReduce(OwnState):
    """Is pickled as a call."""

    def __reduce__(self):
        return _make_own_reduce, (self.conv.weight.data, self.conv.bias.data)


def _make_own_reduce(weight, bias):
    block = OwnReduce()
    block.conv.weight.data, block.conv.bias.data = weight, bias
    return block.eval()


class OwnDeepcopy(OwnState):
    def __deepcopy__(self, memo):
        copied = type(self)()
        copied.load_state_dict(self.state_dict())
        return copied.eval()


class OwnNew(OwnState):
    """Made with arguments that pickle must repeat."""

    def __new__(cls, width):
        block = super().__new__(cls)
        block.__dict__["width_of_new"] = width
        return block

    def __init__(self, width):
        super().__init__()

    def __getnewargs__(self):
        return (4,)


class Slots(OwnState):
    __slots__ = ("note",)


class TwoBlocks(nn.Module):
    """One block, run twice."""

    def __init__(self):
        super().__init__()
        self.block = EmptyShortcut()

    def forward(self, x):
        return self.block(self.block(x))
