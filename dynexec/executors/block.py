"""One frozen block: its packed branches, and how it runs on some rows of a batch."""

import inspect
from contextlib import suppress
from itertools import count

import torch
from torch import fx, nn

from dynexec import dispatch
from dynexec.executors.recent import IMAGE_SIZES, Recent
from dynexec.executors.rewrite import pack
from dynexec.measure.ranges import part_range
from dynexec.nn.experts import ExpertBlock
from dynexec.nn.residual import DynamicBlock, apply_layers
from dynexec.nn.structure import OneInput
from dynexec.nn.tracing import Tracer
from dynexec.reference import empty_rows


class FrozenBlock:
    """The parts of a dynamic block, in evaluation mode.

    ``shortcut(x)`` is what a dropped sample becomes (None: it stays x). ``body(x, s)`` is what a kept sample becomes,
    ``activation(residual(x) + s)`` with ``s`` its shortcut (x itself for an identity); it may overwrite ``s``. In a
    block with two sets of weights ``body`` is for samples with a True decision, ``other`` for the others, and ``s`` is
    only where both write to: x itself, or what ``shortcut(x)`` allocates.

    Parameters
    ----------
    name : str
    block : DynamicBlock
        Not changed.
    input_shape : tuple of int
        ``[C, H, W]`` of its input.
    dtype : torch.dtype
    device : torch.device
    args, kwargs : tuple, dict
        Constants that its model passes besides the input. Only a block with an identity shortcut may have them.
    """

    def __init__(self, name, block, input_shape, dtype, device, args=(), kwargs=None):
        self.name, self.column = name, block.placement.column
        self.input_shape, self.dtype, self.device = tuple(input_shape), dtype, device
        x = self.example(2)
        self.shortcut, self.other = None, None
        s = x
        if isinstance(block, ExpertBlock):
            self._pack_experts(block, x, args, kwargs or {})
            return
        if block.shortcut_layers():
            self.shortcut = pack_module(_Shortcut(block), x)
            if self.shortcut(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
                self.shortcut = pack_module(_Copied(block), x)  # bodies write where the shortcut is, and still read x
            s = self.shortcut(x)
        overwritten = ("s",) if self.shortcut else ("x", "s")
        self.body = pack_module(_Body(block, args, kwargs or {}), x, s, may_overwrite=overwritten)
        self.output_shape = tuple(s.shape[1:])
        self.signature = f"{self.input_shape} shortcut: {describe(self.shortcut)} body: {describe(self.body)}"

    def _pack_experts(self, block, x, args, kwargs):
        branches = (_Branch(branch, args, kwargs) for branch in (block.forward_dense, block.expert()))
        self.other, self.body = (pack_module(branch, x, x) for branch in branches)
        y = self.body(x, x)
        self.output_shape = tuple(y.shape[1:])
        if y.shape != x.shape:
            self.shortcut = _Output(self.body)
        self.signature = f"{self.input_shape} other: {describe(self.other)} body: {describe(self.body)}"

    def bodies(self):
        """Return (decision, function) for samples with a True decision, and with a False one if these run anything."""
        return [(1, self.body)] if self.other is None else [(0, self.other), (1, self.body)]

    def run_shortcut(self, x):
        """Return what bodies write to: the shortcut of ``x``, which is ``x`` itself for an identity."""
        if self.shortcut is None:
            return x
        with part_range(self.name, "shortcut", len(x), len(x)):
            return self.shortcut(x)

    def graphs(self):
        """Return the graphs of its parts, as far as these could be packed."""
        modules = [getattr(function, "__self__", None) for function in (self.shortcut, self.body, self.other)]
        return [module.graph for module in modules if isinstance(module, fx.GraphModule)]

    def example(self, rows):
        """Return random input with that many rows."""
        x = torch.rand(rows, *self.input_shape, dtype=self.dtype, device=self.device)
        return x.contiguous(memory_format=torch.channels_last)


def run_all(body, x, s, chunk):
    """Compute ``body`` for every row of ``x`` into ``s``, ``chunk`` rows at a time; return ``s``."""
    if len(x) > chunk:
        return run_slice(body, x, s, 0, len(x), chunk)
    y = body(x, s)
    return s if y is s else s.copy_(y)


def run_slice(body, x, s, start, stop, chunk):
    """Compute the rows ``start:stop`` of ``x`` into the same rows of ``s``, ``chunk`` at a time; return ``s``."""
    for a in range(start, stop, chunk):
        b = min(a + chunk, stop)
        rows = s[a:b]
        y = body(rows if x is s else x[a:b], rows)
        if y is not rows:
            rows.copy_(y)
    return s


def run_rows(body, x, s, index, chunk):
    """Compute the rows ``index`` (int32, ascending) of ``x`` into the same rows of ``s``; return ``s``."""
    if index.device.type == "cpu":  # of another device this would wait
        first, last = int(index[0]), int(index[-1])
        if last - first + 1 == len(index):
            return run_slice(body, x, s, first, last + 1, chunk)
    for part in index.split(chunk):
        rows = dispatch.gather_rows(x, part)
        shortcuts = rows if x is s else dispatch.gather_rows(s, part)
        dispatch.scatter_rows_(s, part, body(rows, shortcuts), False, False)
    return s


class _Shortcut(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block
        # A block need not own its shortcut, but tracing wants to.
        self.shortcut = nn.ModuleList(layer for layer in block.shortcut_layers() if isinstance(layer, nn.Module))

    def forward(self, x):
        return apply_layers(self.block.shortcut_layers(), x)


class _Copied(_Shortcut):
    def forward(self, x):
        return super().forward(x).clone()


class _Body(_Shortcut):
    def __init__(self, block, args, kwargs):
        super().__init__(block)
        self.args, self.kwargs = args, kwargs

    def forward(self, x, s):
        layers = self.block.residual_layers()
        if layers is None or self.args or self.kwargs:
            return self.block.forward_dense(x, *self.args, **self.kwargs)
        activation = self.block.activation_layer()
        y = apply_layers(layers, x) + (s if self.block.shortcut_layers() else x)
        return y if activation is None else activation(y)


class _Output:
    """Allocates what a body writes to, for images of any size."""

    def __init__(self, body):
        self.body, self.rows = body, Recent(IMAGE_SIZES)

    def __call__(self, x):
        rows = self.rows.find(tuple(x.shape[1:]), lambda: self.body(x[:1], x[:1])[:0])
        return empty_rows(rows, len(x))


class _Branch(nn.Module):
    """A branch of a block with two sets of weights, called as a body."""

    def __init__(self, branch, args, kwargs):
        super().__init__()
        self.branch, self.args, self.kwargs = branch, args, kwargs
        self.module = getattr(branch, "__self__", None)  # of a method: tracing wants to own what it meets

    def forward(self, x, s):
        return self.branch(x, *self.args, **self.kwargs)


class _Tracer(Tracer):
    """Traces into every module except torch's own, placed dynamic blocks and, if ``coarse``, any but containers."""

    def __init__(self, coarse):
        super().__init__()
        self.coarse = coarse

    def is_leaf_module(self, module, name):
        if isinstance(module, DynamicBlock) and module.placement is not None:
            return True
        if self.coarse and not any(isinstance(m, DynamicBlock) and m.placement for m in module.modules()):
            return type(module).forward is not nn.Sequential.forward
        return super().is_leaf_module(module, name)


def trace(module):
    """Return the graph of ``module``, traced as deeply as possible; raises what tracing raises if that fails.

    Parameters of its forward that have defaults keep them.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    if any(
        parameter.default is not parameter.empty or parameter.kind is parameter.VAR_POSITIONAL
        for parameter in parameters
    ):
        for coarse in (False, True):
            with suppress(Exception):  # tracing runs the module's own Python on stand-ins: anything may be raised
                return _unwrapped(_Tracer(coarse).trace(wrapper := OneInput(module)), wrapper)
    try:
        return _Tracer(coarse=False).trace(module)
    except Exception:
        return _Tracer(coarse=True).trace(module)


def _unwrapped(graph, wrapper):
    """Turn the graph of a :class:`OneInput` into one of its module."""
    module, moved = wrapper.block, {}
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        if node.target.startswith("block."):
            node.target = node.target.removeprefix("block.")
            node._rename(node.name.removeprefix("block_"))
        else:  # a constant of the forward, which the tracer keeps on the wrapper
            if node.target not in moved:
                name = next(name for number in count() if not hasattr(module, name := f"_tensor_constant{number}"))
                setattr(module, name, getattr(wrapper, node.target))
                moved[node.target] = name
            node.target = moved[node.target]
    return graph


def pack_module(module, *example, may_overwrite=()):
    """Trace ``module``, pack its convolutions and return it as a function; what cannot be traced runs as it is."""
    try:
        graph = trace(module)
    except Exception:
        return module
    return pack(module, graph, *example, may_overwrite=may_overwrite).forward


def describe(function):
    """Describe what a packed function computes, as text: equal for equal work."""
    module = getattr(function, "__self__", function)
    if not isinstance(module, fx.GraphModule):
        return str(module)
    return "; ".join(f"{n.name}={_describe_target(module, n)}{n.args}" for n in module.graph.nodes)


def _describe_target(module, node):
    if node.op == "call_module":
        return repr(module.get_submodule(node.target))
    name = getattr(node.target, "__qualname__", node.target)  # repr of a function: another address in every process
    return f"{getattr(node.target, '__module__', None)}.{name}"
