"""AdaShare: tasks that each run their own blocks of one shared network (Sun et al., NeurIPS 2020, section 3)."""

import re
from dataclasses import dataclass

import torch
from torch import nn

from dynexec.measure.flops import FlopCount, count_call
from dynexec.models.adashare_policy import InstancePolicy, TaskPolicy
from dynexec.models.arguments import check_counts
from dynexec.models.checkpoints import Checkpoint, check_mapping, rename, shorten, without_prefix
from dynexec.models.deeplab import BasicBlock, Bottleneck, DilatedResNet, Head
from dynexec.nn import RoutedNetwork
from dynexec.nn.tasks import SharingPlan, check_task_decisions, count_shared_rows
from dynexec.ops import check_dtype, check_floating

#: Depth to block and number of blocks per segment.
DEPTHS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}


@dataclass(frozen=True)
class AdaShareFlops(FlopCount):
    """FLOPs of one image. A multiply-add counts as two; only convolutions and matrix products count.

    Attributes
    ----------
    stem : int
    block, shortcut : tuples of L ints
        The residual branch of each block, and its shortcut, which every row needs whether it runs the block or not: 0
        for an identity.
    head : tuple of T ints
        Per task.
    policy : int
        The policy network of the instance variant; 0 if the logits are parameters.
    """

    stem: int
    block: tuple[int, ...]
    shortcut: tuple[int, ...]
    head: tuple[int, ...]
    policy: int = 0

    @property
    def one_pass(self):
        """The backbone once, with all blocks and without heads: the cost of hard sharing."""
        return self.stem + sum(self.block) + sum(self.shortcut)

    @property
    def dense(self):
        """The backbone once per task, with all blocks, and the heads; without the policy."""
        return len(self.head) * self.one_pass + sum(self.head)

    def of(self, decisions):
        """Count the FLOPs that each image needs under ``decisions``: shared rows once, heads, and policy.

        Parameters
        ----------
        decisions : bool tensor ``[T, L]`` or ``[N, T, L]``

        Returns
        -------
        float64 tensor, a scalar or ``[N]``
        """
        return self.backbone(decisions) + sum(self.head) + self.policy

    def backbone(self, decisions, *, shared=True):
        """:meth:`of` for the backbone alone; with ``shared`` False once per task, without the blocks that it skips."""
        check_task_decisions(decisions)
        tasks, blocks = len(self.head), len(self.block)
        if decisions.shape[-2:] != (tasks, blocks):
            raise ValueError(
                f"decisions must be bool [{tasks}, {blocks}] or [N, {tasks}, {blocks}], got {tuple(decisions.shape)}"
            )
        if shared:
            rows, running = count_shared_rows(decisions)
        else:
            running = decisions.sum(-2)
            rows = torch.full_like(running, tasks)
        block, shortcut = (
            torch.tensor(flops, dtype=torch.float64, device=decisions.device) for flops in (self.block, self.shortcut)
        )
        stem = self.stem if shared else tasks * self.stem
        return stem + running.double() @ block + rows.double() @ shortcut


class AdaShare(RoutedNetwork):
    """A network for dense predictions of T tasks, which decides per task which blocks of the backbone run.

    ``net(images)`` returns a list of T maps ``[N, C_t, h, w]``, at an eighth of the images' size and not upsampled.
    ``decisions`` are bool ``[T, L]``, for all images, or ``[N, T, L]``: True runs the block. A skipped block is its
    shortcut without a ReLU. Tasks whose decisions agree from the first block on share features, which are computed
    once; published code runs the whole backbone once per task.

    ``soft_decisions`` are the weights of running, float of the same shapes; the weights of skipping are 1 minus these.
    The backbone then runs once per task with all blocks, as published.

    If neither is given, the policy decides: it runs a block if that is at least as probable as skipping it.

    In training, BatchNorm sees the rows that run together under hard decisions, and each task's own pass under soft
    ones, as in the published code.

    Parameters
    ----------
    backbone : DilatedResNet
    heads : sequence of modules
        One per task.
    policy : TaskPolicy or InstancePolicy
        For the same numbers of tasks and blocks.
    """

    def __init__(self, backbone, heads, policy):
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(heads)
        self.policy = policy
        self.num_tasks, self.num_blocks = len(self.heads), sum(1 for _ in backbone.chain())
        if (policy.num_tasks, policy.num_blocks) != (self.num_tasks, self.num_blocks):
            raise ValueError(
                f"policy decides for {policy.num_tasks} tasks and {policy.num_blocks} blocks, but there are "
                f"{self.num_tasks} heads and {self.num_blocks} blocks"
            )
        self.in_channels = backbone.stem.conv1.in_channels

    def forward(self, images, decisions=None, *, return_decisions=False, soft_decisions=None):
        """Compute a map per task.

        Parameters
        ----------
        images : float tensor ``[N, C, H, W]``
        decisions : bool tensor ``[T, L]`` or ``[N, T, L]``, optional
            If neither these nor soft decisions are given, the policy decides.
        return_decisions : bool
            Also return the decisions, or weights, that were used.
        soft_decisions : float tensor ``[T, L]`` or ``[N, T, L]``, optional
            In place of decisions: the weights of running each block.

        Returns
        -------
        list of T float tensors ``[N, C_t, h, w]``, or ``(output, decisions)``

        Raises
        ------
        TypeError, ValueError
            If an argument is invalid, or both kinds of decisions are given.
        """
        self.check_inputs(images)
        if soft_decisions is not None:
            if decisions is not None:
                raise ValueError("decisions and soft_decisions must not be given both")
            used = soft_decisions
            check_floating(used, "soft_decisions", "[T, L] or [N, T, L]")
            self._check_shape(used, "soft_decisions", len(images))
            features = [self.backbone.run_soft(images, soft_decisions[..., t, :]) for t in range(self.num_tasks)]
        else:
            used = self.policy.decide(images) if decisions is None else decisions
            check_task_decisions(used)
            self._check_shape(used, "decisions", len(images))
            features = self.backbone.run_shared(images, SharingPlan.from_decisions(used, len(images), images.device))
        maps = [head(x) for head, x in zip(self.heads, features)]
        return (maps, used) if return_decisions else maps

    def part_names(self):
        """Return the names of the parts. An instance policy is not one of them: it runs as it is."""
        names = ["backbone.stem"]
        for segment, (blocks, shortcut) in enumerate(zip(self.backbone.blocks, self.backbone.ds)):
            names += [] if shortcut is None else [f"backbone.ds.{segment}"]
            names += [f"backbone.blocks.{segment}.{number}" for number in range(len(blocks))]
        return names + [f"heads.{task}" for task in range(self.num_tasks)]

    def example_decisions(self, inputs):
        """Return decisions with all blocks, with different blocks per task, and with different blocks per image."""
        size = self.num_tasks, self.num_blocks
        alternating = torch.arange(size[0])[:, None] + torch.arange(size[1]) // 2
        drawn = torch.rand(len(inputs), *size, generator=torch.Generator().manual_seed(0)) < 0.5
        return [torch.ones(size, dtype=torch.bool), alternating % 2 == 0, drawn]

    def run_dense(self, inputs):
        """Run the backbone once per task, with all blocks."""
        return self(inputs, soft_decisions=inputs.new_ones(self.num_tasks, self.num_blocks))

    def check_inputs(self, inputs):
        """Raise TypeError or ValueError unless ``inputs`` is a float tensor ``[N, C, H, W]`` of at least one image."""
        check_floating(inputs, "images", f"[N, {self.in_channels}, H, W]")
        if inputs.dim() != 4 or inputs.shape[1] != self.in_channels or 0 in inputs.shape:
            raise ValueError(
                f"images must have shape [N, {self.in_channels}, H, W] with N at least 1, got {tuple(inputs.shape)}"
            )
        check_dtype(inputs, "images", next((p.dtype for p in self.parameters()), inputs.dtype))

    def count_flops(self, inputs):
        """Count the :class:`AdaShareFlops` of one image like ``inputs``, of which only shape and dtype matter."""
        self.check_inputs(inputs)
        shape, dtype = tuple(inputs.shape[1:]), inputs.dtype
        shapes = self.backbone.input_shapes(*shape[1:])
        chain = list(zip(self.backbone.chain(), shapes))
        return AdaShareFlops(
            stem=count_call(self.backbone.stem, 1, *shape, dtype=dtype),
            block=tuple(count_call(block, 1, *size, dtype=dtype) for (block, _), size in chain),
            shortcut=tuple(0 if ds is None else count_call(ds, 1, *size, dtype=dtype) for (_, ds), size in chain),
            head=tuple(count_call(head, 1, *shapes[-1], dtype=dtype) for head in self.heads),
            policy=count_call(self.policy, 1, *shape, dtype=dtype) if self.policy.per_image else 0,
        )

    def read_official(self, checkpoint, given):
        """Read the :class:`Checkpoint` in a mapping of any published layout; see :func:`dynexec.models.load_official`.

        ``{'mtl-net': parameters, ...}``, or the parameters by name. The parallel blocks of the instance variant's
        policy network have no function and are dropped. The states of its two optimizers are left out of ``info``.

        A re-trained checkpoint was not re-trained with the logits that it contains, but with the decisions of the
        policy file beside it, see :func:`read_policy`.
        """
        info = {}
        if "mtl-net" in checkpoint:
            state = checkpoint["mtl-net"]
            check_mapping(checkpoint, "network", given, given)
            check_mapping(state, "network", f"{given}['mtl-net']", given)
            info = {key: value for key, value in checkpoint.items() if key not in ("mtl-net", "weights", "alphas")}
        elif checkpoint and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
            state = checkpoint
            check_mapping(state, "network", given, given)
        else:
            raise ValueError(
                f"{given} has the entries {shorten(map(repr, checkpoint))}: expected 'mtl-net', or parameters by name"
            )
        state = without_prefix(state)
        dropped = [key for key in state if key.startswith(("policynet.parallel_blocks.", "policynet.parallel_ds."))]
        state = rename({key: value for key, value in state.items() if key not in dropped}, _own_name)
        return Checkpoint({"network": (self, state)}, (), dropped, info)

    def _check_shape(self, decisions, name, samples):
        size = self.num_tasks, self.num_blocks
        if decisions.shape not in (size, (samples, *size)):
            raise ValueError(
                f"{name} must have shape {size} or {(samples, *size)}: images, tasks and blocks; "
                f"got {tuple(decisions.shape)}"
            )


def _own_name(key):
    """Return dynexec's name of an official parameter."""
    key = re.sub(r"^backbone\.(conv1|bn1)\.", r"backbone.stem.\1.", key)
    key = re.sub(r"^task(\d+)_fc1_c(\d+)\.", lambda m: f"heads.{int(m[1]) - 1}.branches.{m[2]}.", key)
    return re.sub(r"^(?:(task\d+_logits)$|policynet\.(.+))", lambda m: f"policy.{m[1] or m[2]}", key)


def adashare_resnet(
    depth,
    *,
    num_classes,
    blocks=None,
    widths=(64, 128, 256, 512),
    head_width=1024,
    in_channels=3,
    instance_policy=False,
    policy_widths=(32, 64, 128, 256),
):
    """Build an AdaShare network of any size.

    Parameters
    ----------
    depth : {18, 34, 101}
        Type and number of the blocks.
    num_classes : sequence of int
        Channels of each task's map.
    blocks, widths : sequences of int
        Per segment; ``blocks`` defaults to that of ``depth``.
    head_width : int
        Channels inside the heads.
    in_channels : int
    instance_policy : bool
        Whether a policy network decides per image. Otherwise decisions are parameters, the same for all images.
    policy_widths : sequence of int
        Channels of the policy network: stem, then one block each.

    Returns
    -------
    AdaShare
        Untrained.

    Raises
    ------
    ValueError
        If ``depth`` is unknown, ``blocks`` and ``widths`` differ in length, or a number is below 1.
    """
    if depth not in DEPTHS:
        raise ValueError(f"depth must be one of {tuple(DEPTHS)}, got {depth!r}")
    if isinstance(num_classes, int) or len(num_classes) == 0:
        raise ValueError(f"num_classes must be a sequence of positive ints, one per task, got {num_classes!r}")
    check_counts(num_classes=num_classes, head_width=head_width, in_channels=in_channels, policy_widths=policy_widths)
    block, default = DEPTHS[depth]
    backbone = DilatedResNet(block, default if blocks is None else blocks, widths, in_channels=in_channels)
    heads = [Head(backbone.num_features, head_width, classes) for classes in num_classes]
    size = len(heads), sum(1 for _ in backbone.chain())
    policy = InstancePolicy(*size, policy_widths, in_channels=in_channels) if instance_policy else TaskPolicy(*size)
    return AdaShare(backbone, heads, policy)
