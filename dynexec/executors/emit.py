"""Instructions for the nodes of a packed graph, for the CPU engine and for a GPU's kernels alike."""

import operator
import re

import torch
import torch.nn.functional as F
from torch import fx, nn

from dynexec.executors.instructions import Value
from dynexec.executors.packing import PackedConv, PackedLinear
from dynexec.executors.rewrite import ACTIVATION_CALLS, ACTIVATION_MODULES, pair
from dynexec.executors.stage import Stage
from dynexec.nn.structure import ADDITIONS, hooked

_SIGMOIDS = (torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_")
_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")


class _Padded:
    """A value surrounded by zeros: top, left, bottom, right. Only convolutions read it."""

    def __init__(self, value, zeros):
        self.value, self.zeros = value, zeros


class Flat:
    """A value of one pixel as ``[N, channels]``; ``fixed``: one pixel for every image size that the model can take."""

    def __init__(self, value, fixed):
        self.value, self.fixed = value, fixed


def emit_nodes(builder, nodes, modules, values, out=None):
    """Emit instructions for ``nodes``, keeping their values, until one is not supported; return whether all were.

    ``out`` is the value that the last node must write to. ``builder.unknown`` names the unsupported node.
    """
    for node in nodes:
        mark = builder.mark()
        builder.begin_unit()
        value = _emit(builder, node, modules, values, out if node is nodes[-1] else None)
        if value is None:
            if not isinstance(node.target, Stage):  # of a stage what is inside of it
                builder.unknown = _describe(node, modules)
            builder.back(mark)
            return False
        values[node] = value
        if not isinstance(node.target, Stage):  # its blocks have names of their own
            builder.label(mark[0], layer_name(node), "layer")
    return True


def layer_name(node):
    """Return the name of a layer outside of blocks in a profile."""
    return node.name.removeprefix("packed_")


def _describe(node, modules):
    """Describe a node as its model's author knows it."""
    if node.op == "call_module":
        module = modules[node.target]
        return f"{node.target} ({'Linear' if isinstance(module, PackedLinear) else type(module).__name__})"
    if isinstance(node.target, PackedConv):
        return f"{layer_name(node)} ({node.target.dtype}, {node.target.geometry[3]} groups)"
    return getattr(node.target, "__name__", str(node.target))


def _emit(builder, node, modules, values, out):
    """Return the value of ``node``, or None if there is no instruction for it."""
    target = modules.get(node.target) if node.op == "call_module" else node.target
    inputs = [values.get(arg) for arg in node.args if isinstance(arg, fx.Node)]
    if isinstance(target, Stage):
        return _emit_stage(builder, node, inputs[0]) if out is None and isinstance(inputs[0], Value) else None
    if not inputs or None in inputs or node.op not in ("call_function", "call_method", "call_module"):
        return None
    x, *others = inputs
    if isinstance(x, Flat):
        y = None if others or out is not None else _emit_flat(builder, node, target, x.value)
        return None if y is None else Flat(y, x.fixed or isinstance(target, PackedLinear))
    if isinstance(target, PackedLinear) or any(isinstance(value, Flat) for value in others):
        return None
    if isinstance(target, PackedConv):
        zeros = (0, 0, 0, 0)
        if isinstance(x, _Padded):
            x, zeros = x.value, x.zeros
        if any(isinstance(other, _Padded) for other in others):
            return None
        return builder.conv(target, x, *others, out=out if out is not x else None, zeros=zeros)
    if any(isinstance(value, _Padded) for value in inputs):
        return None
    if isinstance(target, nn.Module):
        return None if others else _emit_module(builder, target, x, out)
    return _emit_call(builder, node, x, others, out)


def _emit_flat(builder, node, target, x):
    if isinstance(target, PackedLinear):
        return builder.conv(target, x) if target.shape[1] == x.channels else None
    if type(target) in ACTIVATION_MODULES or type(target) is nn.Sigmoid:
        return _emit_module(builder, target, x, None)
    if target in ACTIVATION_CALLS or target in _SIGMOIDS:
        return _emit_call(builder, node, x, [], None)
    return None


def _emit_module(builder, module, x, out):
    if hooked(module):
        return None
    kind = type(module)
    if kind in ACTIVATION_MODULES or kind is nn.Sigmoid:
        return builder.add(x, activation=ACTIVATION_MODULES.get(kind, "sigmoid"), out=out)
    if out is not None:
        return None
    if kind is nn.MaxPool2d:
        if module.return_indices or pair(module.dilation) != (1, 1):
            return None
        geometry = pair(module.kernel_size), pair(module.stride), pair(module.padding)
        return builder.pool(x, "max", *geometry, ceil=module.ceil_mode)
    if kind is nn.AvgPool2d:
        geometry = pair(module.kernel_size), pair(module.stride), pair(module.padding)
        divisor = module.divisor_override
        if divisor is None and module.count_include_pad and any(geometry[2]):
            if module.ceil_mode:  # windows at the end count less padding
                return None
            divisor = geometry[0][0] * geometry[0][1]
        return builder.pool(x, "sum", *geometry, divisor or 0, module.ceil_mode)
    if kind is nn.AdaptiveAvgPool2d and pair(module.output_size) == (1, 1):
        return _pool_all(builder, x)
    if kind is nn.Flatten and (module.start_dim, module.end_dim) in ((1, -1), (1, 3)):
        return Flat(x, x.pooled) if x.pixels == 1 else None
    if kind is nn.ZeroPad2d:
        left, right, top, bottom = module.padding
        return _Padded(x, (top, left, bottom, right)) if min(module.padding) >= 0 else None
    return None


def _emit_call(builder, node, x, others, out):
    target, constants = node.target, [arg for arg in node.args if not isinstance(arg, fx.Node)]
    if target in ADDITIONS and len(others) == 1 and not constants and not node.kwargs:
        return builder.add(x, others[0], out=out)
    if target in _PRODUCTS and len(others) == 1 and not constants and not node.kwargs and out is None:
        return builder.multiply(x, others[0]) or builder.multiply(others[0], x)
    if others:
        return None
    if target in ACTIVATION_CALLS and not constants:
        return builder.add(x, activation=ACTIVATION_CALLS[target], out=out)
    if target in _SIGMOIDS and not constants and not node.kwargs:
        return builder.add(x, activation="sigmoid", out=out)
    if out is not None:
        return None
    if target == "clone":
        return builder.add(x)
    if target is F.adaptive_avg_pool2d and _argument(node, 1, "output_size", None) in (1, (1, 1)):
        return _pool_all(builder, x)
    if target in (torch.flatten, "flatten") and x.pixels == 1 and _argument(node, 1, "start_dim", 0) == 1:
        return Flat(x, x.pooled) if _argument(node, 2, "end_dim", -1) in (-1, 3) else None
    if target in (torch.mean, "mean") and node.kwargs.keys() <= {"dim", "keepdim"}:
        dims = _argument(node, 1, "dim", None)
        if isinstance(dims, (tuple, list)) and sorted(d % 4 for d in dims) == [2, 3]:
            y = _pool_all(builder, x)
            return y if y is None or _argument(node, 2, "keepdim", False) else Flat(y, True)
    if target is F.pad and _argument(node, 2, "mode", "constant") == "constant":
        pad = tuple(_argument(node, 1, "pad", ()))
        if _argument(node, 3, "value", None) in (None, 0) and all(isinstance(p, int) and p >= 0 for p in pad):
            if len(pad) == 6 and not any(pad[:5]):
                return builder.add(x, channels=x.channels + pad[5])
            if len(pad) == 4:
                return _Padded(x, (pad[2], pad[0], pad[3], pad[1]))
    return None


def _pool_all(builder, x):
    y = builder.pool(x, "sum", x.shape[1:], x.shape[1:])
    if y is not None:
        y.pooled = True
    return y


def _emit_stage(builder, node, x):
    if len(node.args[0].users) > 1:  # blocks overwrite it
        x = builder.add(x)
        builder.label(-1, "copy", "layer")
    for block in node.target.blocks:
        builder.unknown = "a part"
        x = _emit_block(builder, block, x)
        if x is None:
            # Of a block's parts these are the names of what they are wrapped in.
            builder.unknown = re.sub(r"^(block|module)[._]", "", builder.unknown) + f" of block {block.name}"
            return None
    return x


def _emit_block(builder, block, x):
    """Give all samples the block's shortcut; those that keep the block have its result written to the same place.

    In a block with two sets of weights each sample runs one, and both write their results to one place.
    """
    builder.begin_unit()
    s, first = x, len(builder.instructions)
    if block.other is not None and block.shortcut is not None:
        s = None  # what the first body makes
    elif block.shortcut is not None and (s := _emit_function(builder, block.shortcut, [x])) is None:
        return None
    builder.label(first, block.name, "shortcut")
    for choice, body in block.bodies():
        gate = builder.gate(block.column, choice)
        y = _emit_function(builder, body, [x, s], out=s)
        s = y if s is None else s
        if not isinstance(y, Value) or y.shape != s.shape:
            return None
        if y is not s:
            builder.add(y, out=s)
        builder.end_gate(gate)
        builder.label(gate, block.name, "block" if choice else "other")
    return s


def _emit_function(builder, function, inputs, out=None):
    """Return what a packed function makes of ``inputs``, written to ``out`` if possible."""
    module = getattr(function, "__self__", None)
    if not isinstance(module, fx.GraphModule):
        return None
    nodes = list(module.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    values = dict(zip(placeholders, inputs, strict=True))
    (result,) = nodes[-1].args
    work = [node for node in nodes if node.op not in ("placeholder", "output")]
    # The last node may overwrite `out` only where that is its other input or nothing reads it any more.
    if out is not None and (not work or work[-1] is not result or _reads(work[-1], values, out) == "input"):
        out = None
    modules = dict(module.named_modules())
    units = len(builder.units)
    if not emit_nodes(builder, work, modules, values, out):
        return None
    del builder.units[units:]  # a block stays in one phase
    return values.get(result) if isinstance(result, fx.Node) else None


def _reads(node, values, out):
    """Whether ``node`` reads ``out`` as its first "input", as an "other" one, or not at all (None)."""
    read = [values.get(arg) is out for arg in node.args if isinstance(arg, fx.Node)]
    if not any(read):
        return None
    return "input" if read[0] and isinstance(node.target, PackedConv) else "other"


def _argument(node, position, name, default):
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
