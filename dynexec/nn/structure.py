"""Reads from a block's traced forward how it splits into residual branch, shortcut and activation.

No class names and no third-party imports: a block is whatever computes ``activation(residual(x) + shortcut(x))`` with
convolutions in its residual branch, as the residual blocks of torchvision's, timm's and most people's networks do.
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
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_IN_PLACE_OPERATORS = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
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
    """Whether a call does something else than the type's own forward, or its backward pass, if that is asked."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return True
    return backward and bool(module._backward_hooks or module._backward_pre_hooks)


class Adapter:
    """Says how blocks of a type split; subclass it for a block that cannot be read from its trace.

    As it is, ``Adapter(MyBlock)`` stands for an identity shortcut: a kept sample runs the block's own ``forward``, a
    dropped one keeps its value.

    Parameters
    ----------
    block_type : type or tuple of types
        The blocks it is for.
    """

    def __init__(self, block_type):
        types = block_type if isinstance(block_type, tuple) else (block_type,)
        if not all(isinstance(one, type) for one in types):
            raise TypeError(f"block_type must be a type or a tuple of types, got {block_type!r}")
        self.block_type = block_type

    def residual_layers(self, block):
        """The residual branch as callables applied in order; None: only the block's ``forward`` as a whole is known."""
        return None

    def shortcut_layers(self, block):
        """The shortcut of ``block`` as callables applied in order; empty: the identity. Not empty needs
        ``residual_layers``."""
        return []

    def activation_layer(self, block):
        """What ``block`` does after the addition of its shortcut, or None for nothing; only asked if it has
        ``residual_layers``."""
        return None


@dataclass(frozen=True)
class Step:
    """One operation of a branch: a submodule, function or tensor method, applied to one tensor and constants."""

    kind: str
    target: object
    args: tuple = ()
    kwargs: tuple = ()

    def bind(self, block):
        """The step as a callable on a tensor. A submodule is looked up now, so a replaced one is found."""
        function = self.module(block)
        if function is None:
            function = getattr(torch.Tensor, self.target) if self.kind == "call_method" else self.target
        args, kwargs = self.args, dict(self.kwargs)
        return (lambda x: function(x, *args, **kwargs)) if args or kwargs else function

    def module(self, block):
        """The submodule it calls, or None."""
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
    """Why a module does not split."""


class NoSkip(NotABlock):
    """It is no residual block at all, as most modules are not."""


def is_candidate(module):
    """Whether a module could be a block: its forward is not one of torch's own, and there is a convolution inside."""
    forward = getattr(type(module).forward, "__module__", None) or ""
    return (
        not isinstance(module, CONVOLUTIONS)
        and not forward.startswith("torch.nn.")
        and any(isinstance(child, CONVOLUTIONS) for child in module.modules())
    )


def read_structure(block):
    """Trace ``block`` and return its :class:`TracedAdapter`; raise :class:`NotABlock` with the reason if it has none.

    The trace is taken in evaluation and in training mode; where they differ, only a block with an identity shortcut
    is accepted. The block is left as it was.
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
    """Calls the block with one input, so that its other parameters keep their defaults as plain values."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block.forward(x)  # not its hooks: they stay on the block and run around its call


class BlockTracer(Tracer):
    """Goes into the forward of one block, and into none of the modules that it calls."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def is_leaf_module(self, module, name):
        return module is not self.block

    def proxy(self, node):
        return _Proxy(node, self)


class _Proxy(fx.Proxy):
    """Records ``y += 1`` as what writes in place; fx takes it for ``y = y + 1``."""

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
    """Whether ``node`` adds two different values, neither of them a constant nor scaled."""
    return (
        node.op in ("call_function", "call_method")
        and node.target in _ADDITIONS
        and len(node.args) == len(node.all_input_nodes) == 2
        and not node.kwargs
    )


def _branch(block, node, x):
    """The steps from ``x`` to ``node``: () for x itself, None where the way is not a plain sequence."""
    steps = []
    while node is not x:
        step = _step(node)
        if step is None:
            return None
        steps.append(step)
        node = node.args[0]
    return () if all(_does_nothing(step.module(block)) for step in steps) else tuple(reversed(steps))


def _step(node):
    """``node`` as a step, or None where it is not an operation on its first argument and constants."""
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
    """Whether ``node`` writes to its input ``x``, or hands its memory on, as an Identity does, to one that writes."""
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
        if node.target in _IN_PLACE_OPERATORS or in_place_name or node.kwargs.get("inplace") is True:
            return True
        if name not in _VIEWS:
            return False
    return any(overwrites(block, user, node) for user in node.users)


def _writes_unseen(graph):
    """Whether something is called whose result leads nowhere, as ``self.relu(y)`` in place where ``y`` goes on."""
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
    """``module``, or if it is a Sequential what it applies in order."""
    return [layer for child in module for layer in _layers(child)] if isinstance(module, nn.Sequential) else [module]


def _convolutions(block, step):
    module = step.module(block)
    return 0 if module is None else sum(isinstance(layer, CONVOLUTIONS) for layer in module.modules())
