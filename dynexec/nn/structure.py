"""Reads from a block's traced forward how it splits into residual branch, shortcut and activation.

No class names and no third-party imports: a block is whatever computes ``activation(residual(x) + shortcut(x))`` with
convolutions in its residual branch, as the residual blocks of torchvision's, timm's and most people's networks do.
"""

import operator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import fx, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


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
        self.block_type = block_type

    def residual_layers(self, block):
        """The residual branch as callables applied in order; None: only the block's ``forward`` as a whole is known."""
        return None

    def shortcut_layers(self, block):
        """The shortcut as callables applied in order; empty: the identity. Not empty needs ``residual_layers``."""
        return []

    def activation_layer(self, block):
        """What follows the addition, or None."""
        return None


@dataclass(frozen=True)
class Step:
    """One operation of a branch: a submodule by name, or a function or tensor method with constant arguments."""

    kind: str
    target: object
    args: tuple = ()
    kwargs: tuple = ()

    def bind(self, block):
        """The step as a callable on a tensor. A submodule is looked up now, so a replaced one is found."""
        if self.kind == "call_module":
            return reduce(getattr, self.target.split("."), block)
        function = getattr(torch.Tensor, self.target) if self.kind == "call_method" else self.target
        args, kwargs = self.args, dict(self.kwargs)
        return lambda x: function(x, *args, **kwargs)

    def convolutions(self, block):
        if self.kind != "call_module":
            return 0
        return sum(isinstance(module, CONVOLUTIONS) for module in self.bind(block).modules())


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


def is_candidate(module):
    """Whether a module could be a block: neither a container nor one of torch's own, with a convolution inside."""
    return (
        not isinstance(module, (*_CONTAINERS, *CONVOLUTIONS))
        and not type(module).__module__.startswith("torch.nn.")
        and any(isinstance(child, CONVOLUTIONS) for child in module.modules())
    )


def read_structure(block):
    """Trace ``block`` and return its :class:`TracedAdapter`; raise :class:`NotABlock` with the reason if it has none.

    The trace is taken in evaluation and in training mode; where they differ, only a block with an identity shortcut
    is accepted, and its kept samples run its own forward.
    """
    modes = {module: module.training for module in block.modules()}
    try:
        adapters = [_split(block, _trace(block.train(training))) for training in (False, True)]
    finally:
        for module, training in modes.items():
            module.training = training
    evaluation, training = adapters
    if evaluation.same_split(training):
        return evaluation
    if evaluation.shortcut or training.shortcut:
        raise NotABlock("its forward differs between training and evaluation, and its shortcut is not the identity")
    return TracedAdapter(type(block), None, (), None)


class _OneInput(nn.Module):
    """Calls the block with one input, so that its other parameters keep their defaults as plain values."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x)


class _BlockTracer(fx.Tracer):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def is_leaf_module(self, module, name):
        plain_sequence = type(module).forward is nn.Sequential.forward
        return module is not self.block and not plain_sequence


def _trace(block):
    try:
        return _BlockTracer(block).trace(_OneInput(block))
    except Exception as error:  # tracing runs the block's own Python on stand-ins: anything may be raised
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NotABlock(f"its forward cannot be traced ({reason})") from error


def _split(block, graph):
    x = next(node for node in graph.nodes if node.op == "placeholder")
    node = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    activation = None
    if isinstance(node, fx.Node) and not _is_addition(node) and len(node.all_input_nodes) == 1:
        activation, node = _step(node), node.all_input_nodes[0]
    if not (isinstance(node, fx.Node) and _is_addition(node)):
        raise NotABlock("no skip connection: its output is not residual(x) + shortcut(x), activated or not")
    first, second = (_branch(block, operand, x) for operand in node.args)
    if () in (first, second):
        residual = second if first == () else first
        if residual == ():
            raise NotABlock("both operands of its addition are its input")
        return TracedAdapter(type(block), residual, (), activation)
    if first is None or second is None:
        raise NotABlock("its shortcut is not the identity, and a branch is not a plain sequence of layers")
    if first[0] == second[0]:
        raise NotABlock("its residual branch and its shortcut share their first layer")
    counts = [sum(step.convolutions(block) for step in branch) for branch in (first, second)]
    if counts[0] == counts[1]:
        raise NotABlock(f"its two branches have {counts[0]} convolutions each: which is the shortcut is not clear")
    residual, shortcut = (first, second) if counts[0] > counts[1] else (second, first)
    return TracedAdapter(type(block), residual, shortcut, activation)


def _is_addition(node):
    return node.op in ("call_function", "call_method") and node.target in _ADDITIONS and len(node.all_input_nodes) == 2


def _branch(block, node, x):
    """The steps from ``x`` to ``node``: () for x itself, None where the way is not a plain sequence."""
    steps = []
    while node is not x:
        if len(node.all_input_nodes) != 1 or node.args[:1] != (node.all_input_nodes[0],):
            return None
        step = _step(node)
        if not (step.kind == "call_module" and type(step.bind(block)) is nn.Identity):
            steps.append(step)
        node = node.all_input_nodes[0]
    return tuple(reversed(steps))


def _step(node):
    target = node.target.removeprefix("block.") if node.op == "call_module" else node.target
    return Step(node.op, target, tuple(node.args[1:]), tuple(sorted(node.kwargs.items())))
