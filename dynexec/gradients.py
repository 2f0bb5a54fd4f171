"""Derivatives of the row ops, as ``autograd.Function`` around them: gradients, and forward-mode tangents.

The derivatives are built from the ops themselves, and so have derivatives in turn.
"""

import torch
from torch.autograd import Function, forward_ad

from dynexec import dispatch, reference


def gather_rows(x, index):
    """The op, entering autograd only where a derivative may be needed."""
    if _hides_gradient(x):
        return x.index_select(0, index)
    return _apply(_GatherRows, x, index) if needed(x) else dispatch.gather_rows(x, index)


def scatter_rows(destination, index, rows, add=False, relu=False, *, in_place=False):
    """The op, entering autograd only where a derivative may be needed."""
    if not in_place and _hides_gradient(destination, rows):
        rows = rows + destination.index_select(0, index) if add else rows
        return destination.index_copy(0, index.long(), torch.relu(rows) if relu else rows)
    if needed(destination, rows):
        return _apply(_ScatterRows, destination, index, rows, add, relu, in_place)
    if in_place:
        count_write(destination)
    elif not relu:
        return dispatch.merge_rows(destination, index, rows, add, relu)[0]
    else:  # without the mask, which nobody would read
        destination = destination.clone()
    dispatch.scatter_rows_(destination, index, rows, add, relu)
    return destination


def needed(*tensors):
    """Whether autograd is needed: a tensor requires grad, or forward mode or a ``torch.func`` transform is active."""
    if _in_forward_mode() or torch._C._are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _hides_gradient(*tensors):
    """Whether these are batched gradients that may be differentiated again, which only torch's own ops support."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return any(torch._C._functorch.is_legacy_batchedtensor(x) for x in tensors)


def count_write(x):
    """Tell autograd that ``x`` was written to."""
    # Library ops don't, and autograd relies on it to notice that a tensor it saved was overwritten.
    if not (torch.compiler.is_compiling() or x.is_inference()):
        torch.autograd.graph.increment_version(x)


def gather_gradient(grad, index, passed):
    """Return rows of ``grad``, zero where the ReLU did not pass; ``passed`` is None if there was no ReLU."""
    if passed is not None and not (needed(grad) or _hides_gradient(grad)):
        return dispatch.gather_passed(grad, index, passed)
    rows = gather_rows(grad, index)
    return rows if passed is None else rows.masked_fill(~passed, 0)


def nested_tangents():
    """Context for the body of a jvp, which PyTorch runs with forward mode off, so that tangents can have tangents."""
    return forward_ad._set_fwd_grad_enabled(True)


class _GatherRows(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, index):
        return dispatch.gather_rows(x, index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, index = inputs
        ctx.save_for_backward(index)
        ctx.save_for_forward(index)
        ctx.num_samples = x.shape[0]

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        if _hides_gradient(grad):
            return grad.new_zeros(ctx.num_samples, *grad.shape[1:]).index_add(0, index, grad), None
        return reference.empty_rows(grad, ctx.num_samples).zero_().index_add_(0, index, grad), None


class _GatherRowsForwardMode(_GatherRows):
    @staticmethod
    def jvp(ctx, tangent, _):
        (index,) = ctx.saved_tensors
        with nested_tangents():
            return gather_rows(tangent, index)


class _ScatterRows(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(destination, index, rows, add, relu, in_place):
        if not in_place:
            return dispatch.merge_rows(destination, index, rows, add, relu)[0]
        dispatch.scatter_rows_(destination, index, rows, add, relu)
        return destination

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, index, _, ctx.add, relu, ctx.in_place = inputs
        if ctx.in_place:
            ctx.mark_dirty(output)
        # A bool per element, not the output: that may be overwritten in place later. NaN passes, as in relu.
        passed = dispatch.gather_rows(output, index).bool() if relu else None
        ctx.save_for_backward(index, passed)
        ctx.save_for_forward(index, passed)

    @staticmethod
    def backward(ctx, grad):
        index, passed = ctx.saved_tensors
        grad_rows, grad_destination = gather_gradient(grad, index, passed), grad
        if ctx.needs_input_grad[0] and (passed is not None or not ctx.add):
            grad_destination = scatter_rows(grad, index, grad_rows if ctx.add else torch.zeros_like(grad_rows))
        return grad_destination, None, grad_rows, None, None, None


class _ScatterRowsForwardMode(_ScatterRows):
    @staticmethod
    def jvp(ctx, destination, _, rows, *others):
        index, passed = ctx.saved_tensors
        with nested_tangents():
            if ctx.add:
                rows = rows + gather_rows(destination, index)
            if passed is not None:
                rows = rows.masked_fill(~passed, 0)
            return scatter_rows(destination, index, rows, in_place=ctx.in_place)


# Apart, because torch.compile refuses a Function that has a jvp, even where nothing asks for it.
_FORWARD_MODE = {_GatherRows: _GatherRowsForwardMode, _ScatterRows: _ScatterRowsForwardMode}


def _in_forward_mode():
    # Inside a level any tensor may be dual, and be wrapped by a torch.func transform besides: autograd sorts them out.
    return forward_ad._current_level >= 0


def _apply(function, *arguments):
    return (_FORWARD_MODE[function] if _in_forward_mode() else function).apply(*arguments)
