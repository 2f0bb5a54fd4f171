"""Reads from a block's traced forward how it splits into residual branch, shortcut and activation.

No class names and no third-party imports: a block is whatever computes ``activation(residual(x) + shortcut(x))`` with
convolutions in its residual branch, like the residual blocks of torchvision, timm and most other libraries.
"""

import operator
import sys
from dataclasses import dataclass
from functools import reduce
from importlib import import_module

import torch
from torch import fx, nn

from dynexec.nn.tracing import Tracer

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
IN_PLACE_OPERATORS = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
# What may give its input itself, or a view of it.
_HAND_ON = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.Flatten,
    nn.Unflatten,
)
_VIEWS = {"view", "reshape", "flatten", "unflatten", "contiguous", "to", "permute", "transpose", "dropout", "dropout2d"}


# What has no effect but its result.
_ASKS = {"getattr", "getitem", "size", "dim", "numel", "len", "eq", "ne", "lt", "le", "gt", "ge", "_assert"}


def hooked(module, *, backward=False):
    """Whether a call does anything besides the type's own forward or, with ``backward``, its backward pass."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return True
    return backward and bool(module._backward_hooks or module._backward_pre_hooks)


class Adapter:
    """Tells how blocks of a type split; subclass it for blocks that cannot be read from their trace.

    Unmodified, ``Adapter(MyBlock)`` stands for an identity shortcut: a kept sample runs the block's own ``forward``, a
    dropped one keeps its value.

    Parameters
    ----------
    block_type : type or tuple of types
        The blocks it applies to.
    """

    def __init__(self, block_type):
        types = block_type if isinstance(block_type, tuple) else (block_type,)
        if not all(isinstance(one, type) for one in types):
            raise TypeError(f"block_type must be a type or a tuple of types, got {block_type!r}")
        self.block_type = block_type

    def residual_layers(self, block):
        """Return the residual branch of ``block`` as callables to apply in order; None: only ``forward`` is known."""
        return None

    def shortcut_layers(self, block):
        """Return the shortcut of ``block`` as callables to apply in order; empty is the identity.

        A shortcut that is not empty requires ``residual_layers``.
        """
        return []

    def activation_layer(self, block):
        """Return what ``block`` applies after adding its shortcut, or None for nothing.

        Only called if ``residual_layers`` are given.
        """
        return None


@dataclass(frozen=True)
class Step:
    """One operation of a branch: a submodule, function or tensor method applied to one tensor and constants."""

    kind: str
    target: object
    args: tuple = ()
    kwargs: tuple = ()

    def bind(self, block):
        """Return the step as a callable on a tensor. Submodules are looked up here, so that a replaced one is found."""
        function = self.module(block)
        if function is None:
            function = getattr(torch.Tensor, self.target) if self.kind == "call_method" else self.target
        args, kwargs = self.args, dict(self.kwargs)
        return (lambda x: function(x, *args, **kwargs)) if args or kwargs else function

    def module(self, block):
        """Return the submodule that the step calls, or None."""
        return reduce(getattr, self.target.split("."), block) if self.kind == "call_module" else None

    def __reduce__(self):
        # A function by its name where that finds it: max_pool2d and its like cannot be pickled as they are.
        target = self.target
        if self.kind == "call_function":
            name = (target.__module__, target.__name__)
            target = name if getattr(sys.modules.get(name[0]), name[1], None) is target else target
        return _load_step, (self.kind, target, self.args, self.kwargs)


def _load_step(kind, target, args, kwargs):
    if isinstance(target, tuple):
        target = getattr(import_module(target[0]), target[1])
    return Step(kind, target, args, kwargs)


class TracedAdapter(Adapter):
    """An :class:`Adapter` read from the trace of one block."""

    def __init__(self, block_type, residual, shortcut, activation):
        super().__init__(block_type)
        self.residual, self.shortcut, self.activation = residual, shortcut, activation

    def residual_layers(self, block):
        return None if self.residual is None else [step.bind(block) for step in self.residual]

    def shortcut_layers(self, block):
        return [step.bind(block) for step in self.shortcut]

    def activation_layer(self, block):
        return None if self.activation is None else self.activation.bind(block)

    def same_split(self, other):
        return (self.residual, self.shortcut, self.activation) == (other.residual, other.shortcut, other.activation)


class NotABlock(Exception):
    """Raised with the reason why a module does not split."""


class NoSkip(NotABlock):
    """The module is no residual block at all, like most modules."""


def is_candidate(module):
    """Whether a module could be a block: its forward is not torch's own, and it contains a convolution."""
    forward = getattr(type(module).forward, "__module__", None) or ""
    return (
        not isinstance(module, CONVOLUTIONS)
        and not forward.startswith("torch.nn.")
        and any(isinstance(child, CONVOLUTIONS) for child in module.modules())
    )


def read_structure(block):
    """Trace ``block`` and return its :class:`TracedAdapter`; raise :class:`NotABlock` with the reason if there is none.

    Traces are taken in evaluation and in training mode; if they differ, only a block with an identity shortcut is
    accepted. The block is left as it was.
    """
    modes = {module: module.training for module in block.modules()}
    attributes = dict(vars(block))
    adapters = []
    try:
        for training in (False, True):
            for module in modes:
                module.training = training
            adapters.append(_split(block, _trace(block)))
    finally:
        vars(block).clear()  # a forward may store what it computes, here the tracer's stand-ins
        vars(block).update(attributes)
        for module, training in modes.items():
            module.training = training
    evaluation, training = adapters
    if evaluation.same_split(training):
        return evaluation
    if evaluation.shortcut or training.shortcut:
        raise NotABlock("its forward differs between training and evaluation, and its shortcut is not the identity")
    return TracedAdapter(type(block), None, (), None)


class OneInput(nn.Module):
    """Calls the block with one input, so that its other parameters keep their default values."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block.forward(x)  # not its hooks: they stay on the block and run around its call


class BlockTracer(Tracer):
    """Traces into the forward of one block, and into none of the modules that it calls."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def is_leaf_module(self, module, name):
        return module is not self.block

    def proxy(self, node):
        return _Proxy(node, self)


class _Proxy(fx.Proxy):
    """Records ``y += 1`` as an in-place write, where fx would record ``y = y + 1``."""

    def __iadd__(self, other):
        return self._record(operator.iadd, other)

    def __isub__(self, other):
        return self._record(operator.isub, other)

    def __imul__(self, other):
        return self._record(operator.imul, other)

    def __itruediv__(self, other):
        return self._record(operator.itruediv, other)

    def _record(self, target, other):
        return self.tracer.create_proxy("call_function", target, (self, other), {})


def _trace(block):
    try:
        return BlockTracer(block).trace(OneInput(block))
    except Exception as error:  # tracing runs the block's own Python on stand-ins: anything may be raised
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NotABlock(f"its forward cannot be traced ({reason})") from error


def _split(block, graph):
    x = next(node for node in graph.nodes if node.op == "placeholder")
    node = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    activation = None
    if isinstance(node, fx.Node) and not is_addition(node) and (activation := _step(node)) is not None:
        node = node.args[0]
    if not (isinstance(node, fx.Node) and is_addition(node)):
        raise NoSkip("no skip connection: its output is not residual(x) + shortcut(x), activated or not")
    first, second = (_branch(block, operand, x) for operand in node.args)
    overwritten = any(overwrites(block, user, x) for user in x.users if user is not node)
    unseen = _writes_unseen(graph)
    if () in (first, second):
        residual = second if first == () else first
        if residual == ():
            raise NotABlock("both operands of its addition are its input")
        return TracedAdapter(type(block), None if overwritten or unseen else residual, (), activation)
    if first is None or second is None:
        raise NotABlock("its shortcut is not the identity, and a branch is not a plain sequence of layers")
    if overwritten:
        raise NotABlock("its shortcut is not the identity, and an in-place layer overwrites its input")
    if unseen:
        raise NotABlock("its shortcut is not the identity, and it ignores what a call gives, which may write in place")
    if first[0] == second[0]:
        raise NotABlock("its residual branch and its shortcut share their first layer")
    counts = [sum(_convolutions(block, step) for step in branch) for branch in (first, second)]
    if counts[0] == counts[1]:
        raise NotABlock(f"its two branches have {counts[0]} convolutions each: which is the shortcut is not clear")
    residual, shortcut = (first, second) if counts[0] > counts[1] else (second, first)
    return TracedAdapter(type(block), residual, shortcut, activation)


def is_addition(node):
    """Whether ``node`` adds two different values, neither of them constant or scaled."""
    return (
        node.op in ("call_function", "call_method")
        and node.target in ADDITIONS
        and len(node.args) == len(node.all_input_nodes) == 2
        and not node.kwargs
    )


def _branch(block, node, x):
    """Return the steps from ``x`` to ``node``: () for x itself, None if they are not a plain sequence."""
    steps = []
    while node is not x:
        step = _step(node)
        if step is None:
            return None
        steps.append(step)
        node = node.args[0]
    return () if all(_does_nothing(step.module(block)) for step in steps) else tuple(reversed(steps))


def _step(node):
    """Return ``node`` as a step, or None if it is not an operation on its first argument and constants."""
    if node.op not in ("call_module", "call_function", "call_method"):
        return None
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    others = []
    fx.node.map_arg((node.args[1:], node.kwargs), others.append)
    if others:
        return None
    target = node.target.removeprefix("block.") if node.op == "call_module" else node.target
    return Step(node.op, target, tuple(node.args[1:]), tuple(sorted(node.kwargs.items())))


def _does_nothing(module):
    if type(module) is nn.Sequential:
        return all(_does_nothing(child) for child in module)
    return type(module) is nn.Identity


def overwrites(block, node, x):
    """Whether ``node`` writes to its input ``x``, or passes its memory on, like an Identity, to a node that does."""
    if node.args[:1] != (x,):
        return False
    if node.op == "call_module":
        module = _step(node).module(block) if _step(node) else None
        for layer in _layers(module):
            if getattr(layer, "inplace", False) is True:
                return True
            if not isinstance(layer, _HAND_ON):
                return False
    else:
        name = node.target if node.op == "call_method" else node.target.__name__
        in_place_name = name.endswith("_") and not name.endswith("__")
        if node.target in IN_PLACE_OPERATORS or in_place_name or node.kwargs.get("inplace") is True:
            return True
        if name not in _VIEWS:
            return False
    return any(overwrites(block, user, node) for user in node.users)


def _writes_unseen(graph):
    """Whether a call's result is unused, as when ``self.relu(y)`` runs in place and ``y`` is used afterwards."""
    leads_on = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in leads_on:
            leads_on.update(node.all_input_nodes)
        elif node.op == "call_module":
            return True
        elif node.op in ("call_function", "call_method"):
            name = node.target if node.op == "call_method" else node.target.__name__
            if name not in _ASKS:
                return True
    return False


def _layers(module):
    """Return ``[module]``, or for a Sequential the modules that it applies in order."""
    return [layer for child in module for layer in _layers(child)] if isinstance(module, nn.Sequential) else [module]


def _convolutions(block, step):
    module = step.module(block)
    return 0 if module is None else sum(isinstance(layer, CONVOLUTIONS) for layer in module.modules())
