"""Residual blocks that run only on the samples that the active ``decide`` keeps.

Every such block computes ``activation(residual(x) + shortcut(x))`` for a kept sample and ``shortcut(x)``, with no
activation, for a dropped one (BlockDrop, Wu et al., CVPR 2018, section 3; Veit et al., NIPS 2016, section 4.1).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from inspect import signature

import torch
from torch import nn

from dynexec.gradients import nested_tangents
from dynexec.measure.ranges import part_range, profiling
from dynexec.nn.batch_norm import (
    HoldsBatchNorm,
    batch_norms,
    explain_batch_norm,
    hold_batch_norm,
    meets_other_processes,
    split_at_statistics,
    uses_batch_statistics,
)
from dynexec.nn.context import active_execution
from dynexec.nn.recomputation import check_recomputation, marked
from dynexec.nn.rows import merge_rows, split_rows
from dynexec.nn.structure import TracedAdapter, hooked


@dataclass(frozen=True)
class Placement:
    """A block's place in its model: its column of the decisions, its name, and what BatchNorm takes statistics over.

    Attributes
    ----------
    column : int
        Column of the decisions, from 0.
    num_columns : int
        L, the number of columns.
    batch_norm : {"all", "kept", "frozen"}
        See :func:`dynexec.convert`.
    by_convert : bool
        Whether :func:`dynexec.convert` assigned it, so that :func:`dynexec.revert` removes it.
    name : str
        Name of the block in its model.
    """

    column: int
    num_columns: int
    batch_norm: str = "all"
    by_convert: bool = False
    name: str = ""


class DynamicBlock(HoldsBatchNorm):
    """Mixin for an ``nn.Module`` that obeys the active ``decide`` once it has a ``placement``.

    A subclass describes its computation by three methods. ``residual_layers`` returns the residual branch as callables
    to apply in order (None: not known as a sequence, which requires an identity shortcut). ``shortcut_layers`` returns
    the same for the shortcut (empty: identity). ``activation_layer`` returns what follows the addition (None: nothing).
    A block with an identity shortcut runs ``forward_dense`` on its kept samples, with all arguments of the call, unless
    its BatchNorm computes statistics over all samples: then the layers up to the last such BatchNorm run on every
    sample.
    """

    placement: Placement | None = None

    def residual_layers(self) -> list[Callable] | None:
        return None

    def shortcut_layers(self) -> list[Callable]:
        return []

    def activation_layer(self) -> Callable | None:
        return None

    def forward_dense(self, *args, **kwargs):
        """Run the block on all samples; in a converted block this is the model's own ``forward``."""
        return super().forward(*args, **kwargs)

    def forward(self, *args, **kwargs):
        execution = active_execution()
        if self.placement is not None and not torch.compiler.is_compiling():
            check_recomputation(self, execution)
        if self.training and self.placement is not None and self.placement.batch_norm == "frozen":
            # What is registered in the block, ``train`` holds; a shortcut may be registered elsewhere.
            hold_batch_norm(*self.shortcut_layers())
        if execution is None or self.placement is None:
            return self.forward_dense(*args, **kwargs)
        if not args:  # the input was given by name
            bound = signature(super().forward).bind(**kwargs)
            args, kwargs = bound.args, bound.kwargs
        if not profiling() or execution.mode != "exact" or is_traced(args[0]):
            return marked(self, self.forward_decided(execution, args[0], args[1:], kwargs))
        execution.check(args[0], self.placement.num_columns)
        samples, name = len(args[0]), self.placement.name or f"block {self.placement.column}"
        with part_range(name, "block", execution.route(samples).count(self.placement.column), samples):
            return marked(self, self.forward_decided(execution, args[0], args[1:], kwargs))

    def forward_decided(self, execution, x, args, kwargs):
        """Run the block on ``x`` under ``execution``, the active :class:`decide`."""
        return _run(self, execution, x, args, kwargs)


def _run(block, execution, x, args, kwargs):
    placement, shortcuts = block.placement, block.shortcut_layers()
    execution.check(x, placement.num_columns)
    others = (*args, *kwargs.values())
    if others and (shortcuts or any(isinstance(value, torch.Tensor) for value in others)):
        # A tensor may belong to the samples, or be a shortcut of its own: nobody says.
        kinds = ", ".join(type(value).__name__ for value in (x, *others))
        raise TypeError(
            f"inside decide a block takes one tensor, and other arguments only if its shortcut is the identity; the "
            f"{type(block).__name__} of column {placement.column} got {kinds}"
        )
    if computes_all(block, execution, x):
        return _select(block, x, execution.column(placement.column), shortcuts, args, kwargs)
    route = execution.route(x.shape[0])
    kept = route.count(placement.column)
    if kept == x.shape[0] and kept:
        return block.forward_dense(x, *args, **kwargs)
    index, dense, layers = route.group(placement.column), [], None
    if placement.batch_norm == "all" and uses_batch_statistics(block):
        split = None if others else _split(block, shortcuts)
        if split is None:
            return _select(block, x, execution.column(placement.column), shortcuts, args, kwargs)
        dense, layers = split
    elif shortcuts or _is_plain(block):
        layers = block.residual_layers()
    try:
        if layers is None:
            return _compact_whole(block, x, index, args, kwargs)
        return _compact(block, x, index, shortcuts, dense, layers)
    except ValueError as error:
        explain_batch_norm(error, placement, f"{kept} of {x.shape[0]} samples kept by")
        raise


def computes_all(block, execution, x):
    """Whether a block must compute every sample: sizes must not depend on decisions, or the decisions are weights."""
    if execution.mode == "exact" and not is_traced(x):
        return False
    if block.placement.batch_norm == "kept" and uses_batch_statistics(block):
        raise RuntimeError(
            f'batch_norm="kept" takes batch statistics over kept samples, but the block of column '
            f"{block.placement.column} computes all of them in capacity mode, in soft mode and where it is traced: use "
            'exact mode in eager execution, batch_norm="all" or "frozen", or model.eval()'
        )
    return True


def _select(block, x, keep, shortcuts, args, kwargs):
    """Compute every sample, then choose: as published code does, and the reference for all other ways."""
    shortcut, version = apply_layers(shortcuts, x), _version(x)
    if shortcuts:
        full = _finish(block, _apply_branch(block, block.residual_layers(), x, shortcuts) + shortcut)
    else:
        # A forward that is not known as a sequence may overwrite its input, which dropped samples need.
        full = block.forward_dense(x.clone() if block.residual_layers() is None else x, *args, **kwargs)
        _check_unwritten(block, x, version)
    if full.shape != shortcut.shape:
        raise _unequal(block, full, shortcut)
    return choose(keep, full, shortcut)


def _unequal(block, output, shortcut):
    return ValueError(
        f"the {type(block).__name__} of column {block.placement.column} gives {tuple(output.shape)} and its shortcut "
        f"{tuple(shortcut.shape)}: a block that can be dropped needs equal shapes"
    )


def _version(x):
    """Return how often ``x`` was written to, or None where this is not counted."""
    return None if is_traced(x) or x.is_inference() else x._version


def _check_unwritten(block, x, version):
    """Raise ValueError if ``x``, which dropped samples keep, was written to since ``version``."""
    if _version(x) != version:
        kind = type(block).__name__
        raise ValueError(
            f"the {kind} of column {block.placement.column} overwrites its input inside one of its layers: convert it "
            f"with match=dynexec.Adapter({kind.removeprefix('Dynamic')}), then it gets a copy"
        )


def _apply_branch(block, layers, x, shortcuts):
    """Apply the residual branch's ``layers``; a trace does not show if ``shortcuts`` read ``x`` before or after."""
    if not (shortcuts and isinstance(getattr(block, "_dynexec_adapter", None), TracedAdapter)):
        return apply_layers(layers, x)
    version = _version(x)
    output = apply_layers(layers, x)
    if _version(x) != version:
        raise ValueError(
            f"the {type(block).__name__} of column {block.placement.column} overwrites its input, which its shortcut "
            f"reads, inside one of its layers: let that layer give a new tensor"
        )
    return output


def choose(decisions, chosen, other):
    """Return ``chosen`` where ``decisions``, ``[N]`` or ``[1]``, are True, else ``other``; float ones mix the two."""
    decisions = decisions.reshape(-1, *[1] * (chosen.dim() - 1))
    if decisions.dtype == torch.bool:
        return torch.where(decisions, chosen, other)
    decisions = decisions.to(chosen.dtype)
    return chosen * decisions + other * (1 - decisions)


def _split(block, shortcuts):
    """Split the residual branch into (layers that need every sample for statistics, layers after them), or None."""
    layers, adapter = block.residual_layers(), getattr(block, "_dynexec_adapter", None)
    # An adapter that somebody wrote need not say what follows the addition of an identity.
    if layers is None or not (shortcuts or adapter is None or isinstance(adapter, TracedAdapter)):
        return None
    return split_at_statistics(layers, block, shortcuts)


def _compact(block, x, index, shortcuts, dense, layers):
    """Run ``dense`` layers on every sample and the ``layers`` after them on the kept ones: gather, run, scatter.

    The result never shares memory with ``x``.
    """
    shortcut, residual = apply_layers(shortcuts, x), x
    if dense:
        version = _version(x)
        residual = _apply_branch(block, dense, x, shortcuts)
        if shortcut is x or torch._C._is_alias_of(shortcut, x):
            _check_unwritten(block, x, version)
        if not layers:
            residual = _broadcast(block, residual, shortcut)
    if len(index) == 0 and not meets_other_processes(*dense, *layers):
        return with_zero_gradients(shortcut, block)
    shortcut_rows, rest = split_rows(shortcut, index)
    rows = shortcut_rows if residual is shortcut else split_rows(residual, index)[0]
    rows = _broadcast(block, _apply_branch(block, layers, rows, () if dense else shortcuts), shortcut_rows)
    activation = block.activation_layer()
    if activation is None or _is_plain_relu(activation):
        return merge_rows(rest, index, rows, shortcut_rows, relu=activation is not None)
    return merge_rows(rest, index, activation(rows + shortcut_rows))


def _broadcast(block, output, shortcut):
    """Broadcast the output of a branch as the addition would."""
    if output.shape == shortcut.shape:
        return output
    try:
        return output.expand_as(shortcut)
    except RuntimeError:
        raise _unequal(block, output, shortcut) from None


def _compact_whole(block, x, index, args, kwargs):
    """:func:`_compact` with the block's own forward, of which only the identity shortcut is known."""
    if len(index) == 0 and not meets_other_processes(block):
        return with_zero_gradients(x, block)
    rows, rest = split_rows(x, index)
    output = block.forward_dense(rows, *args, **kwargs)
    if output.shape != rows.shape:
        raise _unequal(block, output, rows)
    return merge_rows(rest, index, output)


def _finish(block, total):
    activation = block.activation_layer()
    return total if activation is None else activation(total)


class ResidualBlock(DynamicBlock, nn.Module):
    """Base of dynexec's own residual blocks: ``relu(residual(x) + shortcut(x))``, or ``shortcut(x)`` where dropped.

    A subclass creates its layers and returns them from ``residual_layers``.

    Parameters
    ----------
    shortcut : nn.Module, optional
        Applied to the input of every sample; None is the identity. It is referenced but not registered: the code that
        builds the block registers it, because published checkpoints store shortcuts beside the blocks.
    """

    def __init__(self, shortcut=None):
        super().__init__()
        self._shortcut = (shortcut,)  # a tuple hides the module from nn.Module's registration

    def shortcut_layers(self):
        return [] if self._shortcut[0] is None else [self._shortcut[0]]

    def activation_layer(self):
        return torch.relu

    def forward_dense(self, x):
        return _finish(self, apply_layers(self.residual_layers(), x) + apply_layers(self.shortcut_layers(), x))


def apply_layers(layers, x):
    """Apply callables in order."""
    return reduce(lambda value, layer: layer(value), layers, x)


def dynamic_blocks(module):
    """Return all dynamic blocks of ``module`` in registration order, placed or not: list of :class:`DynamicBlock`."""
    return [block for block in module.modules() if isinstance(block, DynamicBlock)]


def count_blocks(module):
    """Return L, the number of dynamic blocks of ``module`` that have a column of the decisions."""
    return sum(block.placement is not None for block in dynamic_blocks(module))


def assign_columns(module, *, batch_norm="all"):
    """Give every dynamic block of ``module`` its column, in registration order.

    Parameters
    ----------
    module : nn.Module
        Built from dynamic blocks, such as :class:`ResidualBlock`. For other blocks use :func:`dynexec.convert`.
    batch_norm : {"all", "kept", "frozen"}
        Which samples their BatchNorm computes its statistics over in training; see :func:`dynexec.convert`.

    Returns
    -------
    int
        L, the number of dynamic blocks.

    Raises
    ------
    ValueError
        If ``batch_norm`` is unknown, or is "frozen" and a BatchNorm has no running statistics.
    """
    blocks = {name: block for name, block in module.named_modules() if isinstance(block, DynamicBlock)}
    place(blocks, batch_norm)
    return len(blocks)


def place(blocks, batch_norm="all", *, by_convert=False):
    """Give ``blocks``, a dict by name, their columns, in its order."""
    check_batch_norm(batch_norm, blocks)
    for column, (name, block) in enumerate(blocks.items()):
        block.placement = Placement(column, len(blocks), batch_norm, by_convert, name)
        if batch_norm == "frozen":
            hold_batch_norm(block)


def check_batch_norm(batch_norm, blocks):
    """Raise ValueError unless ``batch_norm`` is a known setting that ``blocks`` support."""
    if batch_norm not in ("all", "kept", "frozen"):
        raise ValueError(f'batch_norm must be "all" or "kept" (samples), or "frozen", got {batch_norm!r}')
    for name, block in blocks.items() if batch_norm == "frozen" else ():
        if any(norm.running_mean is None for norm in batch_norms(block)):
            where = f"block {name!r}" if name else "the model itself"
            raise ValueError(
                f'batch_norm must be "all" or "kept", got "frozen": a BatchNorm of {where} has no running '
                f"statistics to freeze (track_running_stats=False)"
            )


def _is_plain(block):
    """Whether ``forward_dense`` does just what the layers say."""
    return getattr(type(block), "forward_dense", None) is ResidualBlock.forward_dense


def _is_plain_relu(layer):
    """Whether ``layer`` is a ReLU that is neither hooked nor patched, so that the scatter may apply it instead."""
    if layer is torch.relu:
        return True
    return type(layer) is nn.ReLU and not hooked(layer, backward=True)


def is_traced(x):
    """Whether this call has no values to read, so that sizes must not depend on decisions."""
    return torch.compiler.is_compiling() or x.device.type == "meta" or torch.jit.is_tracing()


class _ZeroGradients(torch.autograd.Function):
    """A copy whose backward gives every parameter a zero gradient, as computing on no samples would."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, *parameters):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.parameters = inputs[1:]

    @staticmethod
    def backward(ctx, gradient):
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.parameters)

    @staticmethod
    def jvp(ctx, tangent, *parameters):
        with nested_tangents():
            return tangent.clone()


def with_zero_gradients(x, *parts):
    """Return a copy of ``x``, as for any other decisions; in backward the parameters of ``parts`` get zero gradients.

    Those of ``parts`` that are plain functions have no parameters.
    """
    # A copy also because an in-place layer behind the block must not reach the block's input.
    parameters = []
    if torch.is_grad_enabled():
        having = (part for part in parts if hasattr(part, "parameters"))
        parameters = [parameter for part in having for parameter in part.parameters() if parameter.requires_grad]
    return _ZeroGradients.apply(x, *parameters) if parameters else x.clone()
