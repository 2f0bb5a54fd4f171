"""The parts in a profile of a :class:`FrozenNetwork`, and the cost of each per sample."""

from dataclasses import dataclass
from math import prod

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from dynexec.executors.emit import layer_name
from dynexec.executors.packing import PackedConv
from dynexec.executors.segment import Segment
from dynexec.executors.stage import Stage

POLICY = "policy", "policy"


@dataclass
class Work:
    """Work of a part: FLOPs per sample, bytes of its input and output, and bytes of weights."""

    flops: int = 0
    traffic: int = 0
    weights: int = 0


def find_parts(frozen, x):
    """Return ``{(name, kind): Work}`` of a frozen network, in the order in which it runs, for images like ``x``."""
    x, parts = x[:1], {}
    if frozen.policy is not None:
        parts[POLICY] = Work(traffic=_bytes(x, frozen.policy(x)))
        _count_function(parts[POLICY], frozen.policy, x)
    everything = torch.ones(1, frozen.num_blocks, dtype=torch.bool, device=x.device)
    _Network(frozen.network.__self__, parts).run(x, frozen.plan(everything))
    return parts


def columns(frozen):
    """Return the column of the decisions by name of the block."""
    stages = [*frozen.stages, *(stage for segment in frozen.segments for stage in segment.stages)]
    return {block.name: block.column for stage in stages for block in stage.blocks}


class _Network(fx.Interpreter):
    """Runs a frozen graph and records its parts."""

    def __init__(self, module, parts):
        super().__init__(module)
        self.parts = parts

    def run_node(self, node):
        if not node.op.startswith("call"):
            return super().run_node(node)
        if isinstance(node.target, Stage):
            return self._run_stage(node.target, self.env[node.args[0]])
        if not isinstance(node.target, Segment):
            work = self.parts.setdefault((layer_name(node), "layer"), Work())
            y = _count_node(work, self, node, super().run_node)
            work.traffic += _bytes(*(self.env[value] for value in node.all_input_nodes), y)
            return y
        x = self.env[node.args[0]]
        groups = {}
        for step in _instructions(node.target, x):
            groups.setdefault(step.part, []).append(step)
        for part, steps in groups.items():
            work = self.parts.setdefault(part, Work())
            ends = [value for value in (steps[0].input, steps[-1].output) if value is not None]
            work.traffic += x.element_size() * sum(value.channels * value.pixels for value in ends)
            for step in steps:
                _count_conv(work, step.conv, step.output, x)
        return super().run_node(node)

    def _run_stage(self, stage, x):
        for block in stage.blocks:
            s = x
            if block.shortcut is not None:
                s = block.shortcut(x)
                work = self.parts[block.name, "shortcut"] = Work(traffic=_bytes(x, s))
                _count_function(work, block.shortcut, x)
            for choice, body in block.bodies():
                work = self.parts[block.name, "block" if choice else "other"] = Work(traffic=_bytes(x, s))
                y = _count_function(work, body, x.clone(), s.clone())  # which a body may overwrite
            x = y
        return x


class _Function(fx.Interpreter):
    """Runs a packed graph and adds its cost to one part."""

    def __init__(self, module, work):
        super().__init__(module)
        self.work = work

    def run_node(self, node):
        if not node.op.startswith("call"):
            return super().run_node(node)
        if isinstance(node.target, Segment):
            x = self.env[node.args[0]]
            for step in _instructions(node.target, x):
                _count_conv(self.work, step.conv, step.output, x)
            return super().run_node(node)
        return _count_node(self.work, self, node, super().run_node)


def count_part(function, row):
    """Count the :class:`Work` of a packed function, or of an unpacked module, for ``row``, a tensor ``[1, ...]``."""
    work = Work()
    work.traffic = _bytes(row, _count_function(work, function, row))
    return work


def _count_function(work, function, *arguments):
    """Add the cost of a packed function, or of an unpacked module, to ``work``; return its result."""
    module = getattr(function, "__self__", function)
    if isinstance(module, fx.GraphModule):
        return _Function(module, work).run(*arguments)
    if isinstance(module, torch.nn.Module):
        work.weights += sum(_bytes(parameter) for parameter in module.parameters())
    counter = FlopCounterMode(display=False)
    with counter:
        y = function(*arguments)
    work.flops += counter.get_total_flops()
    return y


def _count_node(work, interpreter, node, run_node):
    """Add the cost of a node that neither a program nor a stage runs to ``work``; return its value."""
    if isinstance(node.target, PackedConv):
        y = run_node(node)
        _count_packed(work, node.target, y.shape[0] * y.shape[2] * y.shape[3], y.element_size())
        return y
    if node.op == "call_module":
        layer = interpreter.fetch_attr(node.target)
        work.weights += sum(_bytes(parameter) for parameter in layer.parameters())
    counter = FlopCounterMode(display=False)
    with counter:
        y = run_node(node)
    work.flops += counter.get_total_flops()
    return y


def _count_conv(work, conv, output, x):
    if conv is not None:
        _count_packed(work, conv, len(x) * output.pixels, x.element_size())


def _count_packed(work, conv, pixels, size):
    work.flops += 2 * prod(conv.shape) * pixels
    work.weights += size * (prod(conv.shape) + conv.shape[0])


def _instructions(segment, x):
    return [step for step in segment.find_program(x).instructions if step.op != "gate"]


def _bytes(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))
