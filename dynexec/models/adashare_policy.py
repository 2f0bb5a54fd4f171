"""Policies of AdaShare, and the published decisions."""

import io
import os
import pickle
from collections import OrderedDict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from dynexec.models.arguments import check_counts
from dynexec.models.checkpoints import shorten
from dynexec.models.deeplab import BasicBlock, conv_shortcut
from dynexec.models.resnet import initialize_convolutions
from dynexec.policy import draw
from dynexec.policy.bernoulli import check_logits

#: Decisions per task, 1 where it runs the block: the ones that the published code measures its FLOPs with.
PUBLISHED_POLICIES = {
    "cityscapes_2_tasks_resnet34": ("1111100101110111", "1101111110111111"),
    "nyu_v2_2_tasks_resnet18": ("10111111", "11111011"),
    "nyu_v2_3_tasks_resnet34": ("1111110111111111", "1111111110001111", "1111101111001111"),
    "taskonomy_5_tasks_resnet34": (
        "1111111111111111",
        "1111101111110111",
        "1111010111111111",
        "1110111111111111",
        "1111111110010111",
    ),
}


def published_policy(name):
    """Return the decisions, bool ``[T, L]``, of a published network.

    Parameters
    ----------
    name : str
        A key of :data:`PUBLISHED_POLICIES`.

    Raises
    ------
    ValueError
        If the name is unknown; the message lists the known ones.
    """
    if name not in PUBLISHED_POLICIES:
        raise ValueError(f"name must be one of {', '.join(PUBLISHED_POLICIES)}; got {name!r}")
    return torch.tensor([[digit == "1" for digit in task] for task in PUBLISHED_POLICIES[name]])


class SharingPolicy(nn.Module):
    """Base class: ``policy(images)`` returns logits ``[..., T, L, 2]``; column 0 runs the block, column 1 skips it."""

    per_image = False

    def __init__(self, num_tasks, num_blocks):
        super().__init__()
        check_counts(num_tasks=num_tasks, num_blocks=num_blocks)
        self.num_tasks, self.num_blocks = num_tasks, num_blocks

    def probabilities(self, images=None):
        """Return the probability ``[..., T, L]`` of running each block."""
        return self(images).softmax(-1)[..., 0]

    @torch.no_grad()
    def decide(self, images=None):
        """Return decisions bool ``[..., T, L]``: run a block if that is at least as probable as skipping it."""
        logits = self(images)
        check_logits(logits)
        return logits[..., 0] >= logits[..., 1]

    @torch.no_grad()
    def sample(self, images=None, *, generator=None):
        """Draw decisions bool ``[..., T, L]`` from the probabilities."""
        return draw(self(images), generator=generator) == 0


class TaskPolicy(SharingPolicy):
    """Logits that are parameters, ``task1_logits`` and so on, ``[L, 2]`` each: the same decisions for all images.

    They start equal, as published, which runs all blocks. Images are not used and need not be given.
    """

    def __init__(self, num_tasks, num_blocks):
        super().__init__(num_tasks, num_blocks)
        for task in range(num_tasks):
            self.register_parameter(f"task{task + 1}_logits", nn.Parameter(torch.full((num_blocks, 2), 0.5)))

    def forward(self, images=None):
        """Return logits ``[T, L, 2]``."""
        return torch.stack([getattr(self, f"task{task + 1}_logits") for task in range(self.num_tasks)])


class InstancePolicy(SharingPolicy):
    """A small residual network that looks at each image: logits ``[N, T, L, 2]``.

    Parameters
    ----------
    num_tasks, num_blocks : int
    widths : sequence of int
        Channels of the stem and of its blocks, each of which halves the size.
    in_channels : int
    """

    per_image = True

    def __init__(self, num_tasks, num_blocks, widths, *, in_channels=3):
        super().__init__(num_tasks, num_blocks)
        channels, *others = widths
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.blocks, self.ds = nn.ModuleList(), nn.ModuleList()
        for width in others:
            self.blocks.append(nn.ModuleList([BasicBlock(channels, width, 2, 1, identity=False)]))
            self.ds.append(conv_shortcut(channels, width, 2))
            channels = width
        self.bn2 = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.linear = nn.Linear(channels, num_tasks * num_blocks * 2)
        initialize_convolutions(self)

    def forward(self, images):
        x = self.bn1(self.conv1(images))  # no ReLU, as published
        for (block,), shortcut in zip(self.blocks, self.ds):
            x = torch.relu(block(x) + shortcut(x))
        x = self.linear(F.adaptive_avg_pool2d(self.bn2(x), 1).flatten(1))
        return x.view(len(x), self.num_tasks, self.num_blocks, 2)


def read_policy(source):
    """Read the decisions, bool ``[T, L]``, of a policy file, which is published beside a re-trained checkpoint.

    Parameters
    ----------
    source : path or mapping
        A pickle of ``{'task1_policy': tensor [L, 2], ...}``, or that mapping. Column 0 runs a block, column 1 skips it.
        Reading a file never executes code from it.

    Raises
    ------
    TypeError
        If ``source`` has the wrong type.
    OSError
        If the file does not exist or cannot be read.
    ValueError
        If it is damaged, contains anything but tensors, or does not say for every task and block whether to run or
        skip.
    """
    given = "source"
    if isinstance(source, (str, os.PathLike)):
        given = f"source {str(source)!r}"
        source = _unpickle(source, given)
    elif not isinstance(source, Mapping):
        raise TypeError(f"source must be a path or a mapping, got {type(source).__name__}")
    expected = [f"task{number + 1}_policy" for number in range(len(source))] if isinstance(source, Mapping) else []
    if not expected or set(source) != set(expected):
        keys = shorten(map(repr, source)) if isinstance(source, Mapping) else type(source).__name__
        raise ValueError(f"{given} must map 'task1_policy', 'task2_policy', ... to tensors, got {keys}")
    tasks = [source[name] for name in expected]
    for name, task in zip(expected, tasks):
        if not isinstance(task, torch.Tensor) or task.dim() != 2 or task.shape[1:] != (2,) or not len(task):
            shape = tuple(task.shape) if isinstance(task, torch.Tensor) else type(task).__name__
            raise ValueError(f"{given}: {name} must be a tensor [blocks, 2], got {shape}")
        if task.shape != tasks[0].shape or not ((task == 0) | (task == 1)).all() or not (task.sum(1) == 1).all():
            raise ValueError(
                f"{given}: {name} must say 1 0 (run) or 0 1 (skip) for each block, as many as task1_policy"
            )
    return torch.stack([task[:, 0] == 1 for task in tasks])


def _unpickle(path, given):
    with open(path, "rb") as file:
        try:
            return _TensorUnpickler(file).load()
        except Exception as error:  # what a damaged file raises depends on where the damage is
            raise ValueError(f"{given} is not a policy file, or is damaged: {type(error).__name__}: {error}") from error


class _TensorUnpickler(pickle.Unpickler):
    """Reads tensors and plain containers of them; refuses everything else, which could run code."""

    def find_class(self, module, name):
        allowed = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            ("torch.storage", "_load_from_bytes"): _load_storage,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return allowed[module, name]


def _load_storage(data):
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
