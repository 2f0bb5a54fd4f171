"""Fully-adaptive feature sharing: many tasks on a tree of shared trunks (Lu et al., CVPR 2017, section 3)."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dynexec.measure.flops import FlopCount, count_call, evaluation_mode
from dynexec.models.sharing_heads import Heads, can_join, count_classes
from dynexec.models.sharing_tree import SharingTree
from dynexec.nn import RoutedNetwork
from dynexec.ops import check_bool, check_dtype, check_floating
from dynexec.route import Route


@dataclass(frozen=True, eq=False)
class SharingFlops(FlopCount):
    """FLOPs of one image. A multiply-add counts as two; only convolutions and matrix products count.

    Attributes
    ----------
    dense : int
        T separate networks, one per task, that share nothing.
    parts : tuple of int
        Each part, in the order of ``part_names()``.
    needs : bool tensor ``[T, parts]``
        Which parts each task needs.
    stages : tuple of int
        One column of each layer.
    policy : int
        0: nothing is decided from the images.
    """

    dense: int
    parts: tuple[int, ...]
    needs: torch.Tensor
    stages: tuple[int, ...]
    policy: int = 0

    @property
    def tree(self):
        """All tasks on the tree."""
        return sum(self.parts)

    def of(self, decisions):
        """Count the FLOPs that the wanted tasks need.

        Parameters
        ----------
        decisions : bool tensor ``[T]`` or ``[N, T]``

        Returns
        -------
        float64 tensor, a scalar or ``[N]``
        """
        tasks = len(self.needs)
        _check_wanted(decisions, tasks)
        needed = (decisions[..., None] & self.needs.to(decisions.device)).any(-2)
        return needed.double() @ torch.tensor(self.parts, dtype=torch.float64, device=decisions.device)


class FeatureSharing(RoutedNetwork):
    """A sequential network whose layers are shared by groups of tasks, in a tree.

    ``net(images)`` returns a list of T tensors ``[N, C_t]``, one per task. Each trunk, the layers between two
    branchings, runs once on the images that need it. So do the heads; where possible, those that read the same column
    run as one matrix product.

    Decisions say which tasks are wanted: bool ``[T]``, or ``[N, T]`` to choose for each image. What no wanted task
    needs does not run, and the rows of an unwanted task are zeros. Decisions come from the caller: the tree is the same
    for all images and the network decides nothing, so it has no policy, and by default all tasks are wanted. A task is
    wanted or not, so ``soft_decisions`` have no meaning.

    In training mode BatchNorm's statistics are those of the images that run through a column.

    Equivalent, for task t, to its own sequential network: ``head_t(stage_L(...stage_1(images)))`` with the columns that
    hold t.

    Parameters
    ----------
    stages : sequence of L entries
        The layers, starting at the images. An entry is a module, of which each further column gets a copy, or a
        sequence (list, tuple or ``ModuleList``) of one module per column. None may change its input in place: siblings
        read it.
    heads : sequence of T modules
        From the last layer's output to ``[N, C_t]``, by at least one ``Linear``, of which the last one has C_t outputs.
        None may change its input in place either.
    tree : SharingTree or its layers, optional
        Groups of tasks per layer. Default: all tasks share all layers.

    Attributes
    ----------
    tree : SharingTree
        ``print(net.tree)`` shows it, ``net.tree.draw(path)`` draws it.
    trunks : ModuleDict
        ``{first layer}_{column}`` -> ``Sequential`` of its layers.
    heads : ModuleDict
        First of its tasks -> :class:`Heads`.

    Raises
    ------
    TypeError, ValueError
        If an entry is not a module, or their numbers do not match the layers, columns or tasks of the tree.
    """

    def __init__(self, stages, heads, tree=None):
        super().__init__()
        stages, heads = list(stages), list(heads)
        if not stages or not heads:
            raise ValueError(f"stages and heads must not be empty, got {len(stages)} and {len(heads)}")
        if tree is None:
            tree = SharingTree.shared(len(stages), len(heads))
        self.tree = tree if isinstance(tree, SharingTree) else SharingTree(tree)
        if (self.tree.num_layers, self.tree.num_tasks) != (len(stages), len(heads)):
            raise ValueError(
                f"tree has {self.tree.num_layers} layers and {self.tree.num_tasks} tasks, but there are {len(stages)} "
                f"stages and {len(heads)} heads"
            )
        columns = [_columns(stage, depth, len(self.tree.layers[depth])) for depth, stage in enumerate(stages)]
        self.num_classes = tuple(count_classes(head, task) for task, head in enumerate(heads))
        self.trunks = nn.ModuleDict()
        self._trunks = self.tree.trunks()
        for trunk in self._trunks:
            task = trunk.tasks[0]
            layers = [columns[depth][self.tree.column_of(depth, task)] for depth in range(trunk.start, trunk.stop)]
            self.trunks[_name(trunk)] = nn.Sequential(*layers)
        self._leaves = [  # of every group of heads the trunk that it reads, and its tasks
            (number, tasks)
            for number, trunk in enumerate(self._trunks)
            if trunk.stop == len(stages)
            for tasks in ([trunk.tasks] if can_join([heads[t] for t in trunk.tasks]) else [(t,) for t in trunk.tasks])
        ]
        self.heads = nn.ModuleDict({str(tasks[0]): Heads(heads[task] for task in tasks) for _, tasks in self._leaves})
        first = next(layer for layer in self.trunks["0_0"].modules() if not list(layer.children()))
        self.in_channels = first.in_channels if isinstance(first, nn.Conv2d) else None
        users = [trunk.tasks for trunk in self._trunks] + [tasks for _, tasks in self._leaves]
        self._num_parts = len(users)
        needs = [[task in tasks for tasks in users] for task in range(len(heads))]
        # Last a column per task: the host then knows how many images want it from the same transfer.
        needs = torch.cat([torch.tensor(needs), torch.eye(len(heads), dtype=torch.bool)], 1)
        self.register_buffer("_needs", needs, persistent=False)

    @property
    def num_tasks(self):
        """T, the number of tasks."""
        return len(self.num_classes)

    def columns(self, depth):
        """Return the modules of layer ``depth``, one per column."""
        self.tree.check_depth(depth)
        found = {}
        for trunk in self._trunks:
            if trunk.start <= depth < trunk.stop:
                column = self.tree.column_of(depth, trunk.tasks[0])
                found[column] = self.trunks[_name(trunk)][depth - trunk.start]
        return [found[column] for column in range(len(found))]

    def task_heads(self):
        """Return the heads, one module per task."""
        found = {task: head for _, tasks in self._leaves for task, head in zip(tasks, self.heads[str(tasks[0])])}
        return [found[task] for task in range(self.num_tasks)]

    def forward(self, inputs, decisions=None, *, return_decisions=False, soft_decisions=None):
        """Compute the outputs of the wanted tasks.

        Parameters
        ----------
        inputs : float tensor ``[N, C, ...]``
            N at least 1.
        decisions : bool tensor ``[T]`` or ``[N, T]``, optional
            The wanted tasks; default all.
        return_decisions : bool
            Also return the decisions.
        soft_decisions : None

        Returns
        -------
        list of T tensors ``[N, C_t]``, zero where not wanted; or ``(output, decisions)``

        Raises
        ------
        TypeError, ValueError
            If an argument is invalid.
        """
        self.check_inputs(inputs)
        if soft_decisions is not None:
            raise ValueError("soft_decisions must be None: tasks are wanted or not, give decisions")
        if decisions is None:
            decisions = torch.ones(self.num_tasks, dtype=torch.bool, device=inputs.device)
        _check_wanted(decisions, self.num_tasks, len(inputs), inputs.device)
        wanted = decisions.expand(len(inputs), -1)
        route = Route.from_decisions((wanted[:, :, None] & self._needs).any(1))
        outputs = [None] * self.num_tasks
        for number, trunk in enumerate(self._trunks):
            if trunk.parent is None:
                self._run_trunk(number, inputs, None, route, wanted, outputs)
        for task, classes in enumerate(self.num_classes):
            if outputs[task] is None:
                outputs[task] = inputs.new_zeros(len(inputs), classes)
        return (outputs, decisions) if return_decisions else outputs

    def _run_trunk(self, number, x, held, route, wanted, outputs):
        """Run a trunk and everything above it; ``x`` has the rows ``held`` of the batch (None: all)."""
        rows = route.group(number)
        if len(rows) == 0:
            return
        x = self.trunks[_name(self._trunks[number])](_take(x, held, rows))
        for child, other in enumerate(self._trunks):
            if other.parent == number:
                self._run_trunk(child, x, rows, route, wanted, outputs)
        for group, (leaf, tasks) in enumerate(self._leaves, len(self._trunks)):
            chosen = route.group(group)
            if leaf == number and len(chosen):
                y = self.heads[str(tasks[0])](_take(x, rows, chosen))
                classes = [self.num_classes[task] for task in tasks]
                if y.shape != (len(chosen), sum(classes)):
                    raise ValueError(f"heads must give [N, C_t], got shape {tuple(y.shape)} for {sum(classes)} classes")
                if len(chosen) < route.num_samples:
                    y = y.new_zeros(route.num_samples, y.shape[1]).index_copy(0, chosen.long(), y)
                for task, output in zip(tasks, y.split(classes, 1)):
                    if route.count(self._num_parts + task) < len(chosen):
                        output = output.masked_fill(~wanted[:, task, None], 0.0)
                    outputs[task] = output

    def part_names(self):
        """Return the names of the trunks, then of the heads."""
        return [f"trunks.{name}" for name in self.trunks] + [f"heads.{name}" for name in self.heads]

    def example_decisions(self, inputs):
        """Return all tasks; none; a third of them, which differs from image to image; and the other two thirds."""
        everything = torch.ones(self.num_tasks, dtype=torch.bool, device=inputs.device)
        samples, tasks = (torch.arange(count, device=inputs.device) for count in (len(inputs), self.num_tasks))
        third = (samples[:, None] + tasks) % 3 == 0
        return [everything, ~everything, third, ~third]

    def run_dense(self, inputs):
        """Run one task after the other, sharing nothing."""
        tasks = torch.eye(self.num_tasks, dtype=torch.bool, device=inputs.device)
        return [self(inputs, wanted)[task] for task, wanted in enumerate(tasks)]

    def check_inputs(self, inputs):
        """Raise TypeError or ValueError unless ``inputs`` is a float tensor ``[N, C, ...]`` with N at least 1."""
        expected = f"[N, {self.in_channels}, H, W]" if self.in_channels else "[N, ...]"
        check_floating(inputs, "inputs", expected)
        shape = tuple(inputs.shape)
        fits = len(shape) == 4 and shape[1] == self.in_channels if self.in_channels else len(shape) >= 2
        if not fits or len(inputs) == 0:
            raise ValueError(f"inputs must be {expected} with at least one sample, got shape {shape}")
        check_dtype(inputs, "inputs", next((p.dtype for p in self.parameters()), inputs.dtype))

    def count_flops(self, inputs):
        """Count the FLOPs of one image as :class:`SharingFlops`; only the shape of ``inputs`` matters.

        ``dense`` is T separate networks; ``of(decisions)`` is what the tree runs for the wanted tasks.
        """
        self.check_inputs(inputs)
        stages, parts, outputs = {}, [], []
        device = next((p.device for p in self.parameters()), inputs.device)
        with evaluation_mode(self), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            for trunk in self._trunks:
                if trunk.parent is None:
                    x = torch.empty((1, *inputs.shape[1:]), dtype=inputs.dtype, device=device)
                else:
                    x = outputs[trunk.parent]
                parts.append(0)
                for depth, layer in enumerate(self.trunks[_name(trunk)], trunk.start):
                    flops = count_call(layer, *x.shape, dtype=x.dtype)
                    parts[-1] += flops
                    stages.setdefault(depth, flops)
                    x = layer(x)
                outputs.append(x)
        dense = 0
        for leaf, tasks in self._leaves:
            heads = [count_call(head, *outputs[leaf].shape, dtype=inputs.dtype) for head in self.heads[str(tasks[0])]]
            parts.append(sum(heads))
            dense += sum(heads)
        dense += sum(len(trunk.tasks) * flops for trunk, flops in zip(self._trunks, parts))
        needs = self._needs[:, : self._num_parts]
        return SharingFlops(dense, tuple(parts), needs, tuple(stages[depth] for depth in sorted(stages)))


def _take(x, held, rows):
    """Take the ``rows`` of the batch out of ``x``, which has the rows ``held`` (ascending; None: all)."""
    if len(rows) == len(x):
        return x
    return x[rows if held is None else torch.searchsorted(held, rows)]


def _name(trunk):
    return f"{trunk.start}_{trunk.column}"


def _columns(stage, depth, count):
    """Return the modules of one layer."""
    if isinstance(stage, nn.Module) and not isinstance(stage, nn.ModuleList):
        return [stage, *(copy.deepcopy(stage) for _ in range(count - 1))]
    columns = list(stage) if isinstance(stage, (list, tuple, nn.ModuleList)) else []
    if not columns or not all(isinstance(column, nn.Module) for column in columns):
        raise TypeError(f"stages[{depth}] must be a module or a sequence of modules, got {type(stage).__name__}")
    if len(columns) != count:
        raise ValueError(f"stages[{depth}] has {len(columns)} modules, but tree has {count} columns there")
    return columns


def _check_wanted(decisions, tasks, samples=None, device=None):
    """Raise TypeError or ValueError unless ``decisions`` are bool ``[T]`` or ``[N, T]`` on the device."""
    check_bool(decisions, "decisions", f"[{tasks}] or [N, {tasks}]")
    shape = tuple(decisions.shape)
    if len(shape) not in (1, 2) or shape[-1] != tasks or len(shape) == 2 and samples not in (None, shape[0]):
        expected = "N" if samples is None else samples
        raise ValueError(f"decisions must be bool [{tasks}] or [{expected}, {tasks}], got shape {shape}")
    if device is not None and decisions.device != device:
        raise ValueError(f"decisions must be on {device}, where the inputs are, got {decisions.device}")
