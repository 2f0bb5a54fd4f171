"""Residual blocks that run only on the samples that the active ``decide`` keeps.

Every such block computes ``activation(residual(x) + shortcut(x))`` for a kept sample and ``shortcut(x)``, with no
activation, for a dropped one (BlockDrop, Wu et al., CVPR 2018, section 3; Veit et al., NIPS 2016, section 4.1).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynexec import ops
from dynexec.nn.context import active_execution


@dataclass
class Placement:
    """Where a block stands in its model: its column of the decisions, and how it treats batch statistics."""

    column: int
    num_columns: int
    batch_norm: str = "all"


class DynamicBlock:
    """Mixin for an ``nn.Module``: obeys the active ``decide`` once it has a ``placement``.

    A subclass says how it computes through three methods. ``residual_layers`` is the residual branch as callables
    applied in order (None: not known as a sequence, kept samples then run ``forward_dense`` as a whole, which needs an
    identity shortcut). ``shortcut_layers`` is the same for the shortcut (empty: identity). ``activation_layer`` is
    what follows the addition (None: nothing).
    """

    placement: Placement | None = None

    def residual_layers(self) -> list[Callable] | None:
        return None

    def shortcut_layers(self) -> list[Callable]:
        return []

    def activation_layer(self) -> Callable | None:
        return None

    def forward_dense(self, x, *args, **kwargs):
        """The block for all samples; a converted block has its model's own ``forward`` here."""
        return super().forward(x, *args, **kwargs)

    def forward(self, x, *args, **kwargs):
        execution = active_execution()
        if execution is None or self.placement is None:
            return self.forward_dense(x, *args, **kwargs)
        execution.check(x, self.placement.num_columns)
        if execution.mode == "capacity" or torch.compiler.is_compiling():
            return self._select(x, execution.column(self.placement.column), args, kwargs)
        route = execution.route(x.shape[0])
        kept = route.count(self.placement.column)
        if kept == x.shape[0] and kept:
            return self.forward_dense(x, *args, **kwargs)
        if self.placement.batch_norm == "all" and _updates_batch_norm(self):
            return self._select(x, execution.column(self.placement.column), args, kwargs)
        return self._compact(x, route.group(self.placement.column), kept, args, kwargs)

    def _select(self, x, keep, args, kwargs):
        """Compute every sample, then choose: the published code's way, and the reference for every other."""
        shortcut = apply_layers(self.shortcut_layers(), x)
        layers = self.residual_layers()
        if layers is None:
            full = self.forward_dense(x, *args, **kwargs)
        else:
            full = apply_layers(layers, x) + shortcut
            if (activation := self.activation_layer()) is not None:
                full = activation(full)
        return torch.where(keep.reshape(-1, *[1] * (full.dim() - 1)), full, shortcut)

    def _compact(self, x, index, kept, args, kwargs):
        """Compute the kept samples only: gather, run, scatter."""
        shortcuts, layers = self.shortcut_layers(), self.residual_layers()
        shortcut = apply_layers(shortcuts, x)
        if kept == 0:
            return _with_zero_gradients(shortcut, self)
        rows = ops.gather_rows(x, index)
        if layers is None:
            return ops.scatter_rows(x, index, self.forward_dense(rows, *args, **kwargs))
        if not shortcuts:
            rows = apply_layers(layers, rows) + rows
            if (activation := self.activation_layer()) is not None:
                rows = activation(rows)
            return ops.scatter_rows(x, index, rows)
        activation = self.activation_layer()
        rows = apply_layers(layers, rows)
        if activation is None or _is_plain_relu(activation):
            return ops.scatter_rows(shortcut, index, rows, add=True, relu=activation is not None)
        return ops.scatter_rows(shortcut, index, activation(rows + ops.gather_rows(shortcut, index)))


class ResidualBlock(DynamicBlock, nn.Module):
    """A residual block of our own: ``relu(residual(x) + shortcut(x))``, or ``shortcut(x)`` where dropped.

    A subclass creates its layers and returns them from ``residual_layers``.

    Parameters
    ----------
    shortcut : nn.Module, optional
        Applied to the input of every sample; None is the identity. It is referenced, not registered: whoever builds
        the block registers it, because published checkpoints keep shortcuts beside the blocks.
    """

    def __init__(self, shortcut=None):
        super().__init__()
        self._shortcut = (shortcut,)  # a tuple hides the module from nn.Module's registration

    def shortcut_layers(self):
        return [] if self._shortcut[0] is None else [self._shortcut[0]]

    def activation_layer(self):
        return torch.relu

    def forward_dense(self, x):
        return torch.relu(apply_layers(self.residual_layers(), x) + apply_layers(self.shortcut_layers(), x))


def apply_layers(layers, x):
    """Apply callables in order."""
    return reduce(lambda value, layer: layer(value), layers, x)


def dynamic_blocks(module):
    """All dynamic blocks of ``module``, in registration order (placed or not)."""
    return [block for block in module.modules() if isinstance(block, DynamicBlock)]


def assign_columns(module, *, batch_norm="all"):
    """Give every dynamic block of ``module`` its column, in registration order; return their number L."""
    check_batch_norm(batch_norm)
    blocks = dynamic_blocks(module)
    for column, block in enumerate(blocks):
        block.placement = Placement(column, len(blocks), batch_norm)
    return len(blocks)


def check_batch_norm(batch_norm):
    """Raise ValueError unless ``batch_norm`` names one of the two ways to take batch statistics."""
    if batch_norm not in ("all", "kept"):
        raise ValueError(f'batch_norm must be "all" or "kept" (samples), got {batch_norm!r}')


def _is_plain_relu(layer):
    """Whether the scatter may apply it instead: a ReLU that nobody hooked."""
    if layer is torch.relu:
        return True
    hooked = isinstance(layer, nn.Module) and (
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    )
    return type(layer) is nn.ReLU and not hooked


def _updates_batch_norm(block):
    return any(isinstance(module, _BatchNorm) and module.training for module in block.modules())


class _ZeroGradients(torch.autograd.Function):
    """Identity whose backward gives every parameter a gradient of zeros, as computing on no sample does."""

    @staticmethod
    def forward(ctx, x, *parameters):
        ctx.parameters = parameters
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.parameters)


def _with_zero_gradients(x, block):
    if not torch.is_grad_enabled():
        return x
    parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
    return _ZeroGradients.apply(x, *parameters) if parameters else x
