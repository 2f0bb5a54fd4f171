"""Takes samples out of a batch and puts their results back, with a single copy in the backward pass.

The two steps belong together: where rows were taken out, their gradient is complete and replaces what comes from
behind. Two separate ops of :mod:`dynexec.ops` would have to write zeros over those rows and add two gradients of the
whole batch. The same holds where a batch is split up completely.
"""

from functools import reduce

import torch
from torch.autograd import Function, forward_ad

from dynexec import dispatch, ops
from dynexec.gradients import gather_gradient, gather_rows, needed, scatter_rows
from dynexec.reference import empty_rows


def split_rows(x, index):
    """Return ``(x[index], rest)``, no row twice; ``rest`` looks like ``x`` and is for :func:`merge_rows` only."""
    return _Split.apply(x, index) if _backward_only(x) else (ops.gather_rows(x, index), x)


def merge_rows(rest, index, rows, shortcut=None, *, relu=False):
    """Return a copy of the ``x`` of :func:`split_rows` in which ``rows`` replace the rows ``index``.

    If ``shortcut``, the other result of :func:`split_rows`, is given, it is added to ``rows``. ``relu`` applies a ReLU
    to the rows that are written.
    """
    # Under autocast a branch may be narrower than its shortcut; torch.where, the reference, widens too.
    if rest.dtype != rows.dtype:
        dtype = torch.promote_types(rest.dtype, rows.dtype)
        rest, rows = rest.to(dtype), rows.to(dtype)
    if not _backward_only(rest, rows):
        return ops.scatter_rows(rest, index, rows, add=shortcut is not None, relu=relu)
    ops.check_scatter(rest, index, rows, shortcut is not None, relu)
    return _Merge.apply(rest, index, rows, None if shortcut is None else shortcut.to(rows.dtype), relu)


def part_rows(x, indices):
    """Return ``[x[index] for index in indices]``, where each row of ``x`` is in exactly one ``index``."""
    if _backward_only(x):
        return _Part.apply(x, *indices)
    return [ops.gather_rows(x, index) for index in indices]


def join_rows(parts, indices):
    """Undo :func:`part_rows`; the result is laid out like the largest of ``parts``."""
    for rows, index in zip(parts, indices, strict=True):
        ops.check_scatter(parts[0], index, rows, False, False)
    if _backward_only(*parts):
        return _Join.apply(indices, *parts)
    y = empty_rows(max(parts, key=len), sum(map(len, indices)))
    for rows, index in zip(parts, indices, strict=True):
        y = ops.scatter_rows_(y, index, rows)
    return y


def _backward_only(*tensors):
    """Whether at most an ordinary backward pass may follow: no tangents, and no ``torch.func`` transform."""
    plain = forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active()
    return plain and needed(*tensors)


# Without setup_context, with which PyTorch inspects the signature of forward in every call. torch.func needs it, and
# gets the ops instead.
class _Split(Function):
    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.num_samples = len(x)
        ctx.set_materialize_grads(False)
        return dispatch.gather_rows(x, index), x.view_as(x)

    @staticmethod
    def backward(ctx, grad_rows, grad_rest):
        (index,) = ctx.saved_tensors
        if grad_rows is None and grad_rest is None:  # what is behind stops the gradient
            return None, None
        if grad_rows is None:  # no gradient comes through the branch
            grad_rows = empty_rows(grad_rest, len(index)).zero_()
        if grad_rest is None:
            return _place_rows(ctx.num_samples, [index], [grad_rows]), None
        return scatter_rows(grad_rest, index, grad_rows), None


class _Merge(Function):
    @staticmethod
    def forward(ctx, rest, index, rows, shortcut, relu):
        ctx.adds = shortcut is not None
        output, passed = dispatch.merge_rows(rest, index, rows, ctx.adds, relu)
        ctx.save_for_backward(index, passed if relu else None)
        return output

    @staticmethod
    def backward(ctx, grad):
        index, passed = ctx.saved_tensors
        grad_rows = gather_gradient(grad, index, passed)
        # The rows that split_rows took out are not zeroed in the gradient of the rest: it replaces them.
        return grad, None, grad_rows, grad_rows if ctx.adds else None, None


class _Part(Function):
    @staticmethod
    def forward(ctx, x, *indices):
        ctx.save_for_backward(*indices)
        ctx.set_materialize_grads(False)
        return tuple(dispatch.gather_rows(x, index) for index in indices)

    @staticmethod
    def backward(ctx, *grads):
        indices = ctx.saved_tensors
        nothing = all(grad is None for grad in grads)
        grad_x = None if nothing else _place_rows(sum(map(len, indices)), indices, grads)
        return grad_x, *[None] * len(indices)


class _Join(Function):
    @staticmethod
    def forward(ctx, indices, *parts):
        ctx.save_for_backward(*indices)
        return _place_rows(sum(map(len, indices)), indices, parts)

    @staticmethod
    def backward(ctx, grad):
        return None, *(gather_rows(grad, index) for index in ctx.saved_tensors)


def _is_batch(x):
    """Whether a tensor has a hidden batch dimension, from ``torch.vmap`` or ``is_grads_batched``."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x) or torch._C._functorch.is_legacy_batchedtensor(x)


def _place_rows(num_samples, indices, parts):
    """Put rows in their places, with zeros elsewhere and for parts that are None."""
    known = [(index, rows) for index, rows in zip(indices, parts, strict=True) if rows is not None]
    some = max((rows for _, rows in known), key=len)  # where there are no rows, the layout means nothing
    # Gradients in batches have no rule for what writes in place, and gradients of gradients need a graph.
    if _is_batch(some) or needed(*(rows for _, rows in known)):
        y = some.new_zeros(num_samples, *some.shape[1:])
        return reduce(lambda y, part: y.index_copy(0, part[0].long(), part[1]), known, y)
    y = empty_rows(some, num_samples)
    if sum(len(index) for index, _ in known) < num_samples:
        y.zero_()
    for index, rows in known:
        dispatch.scatter_rows_(y, index, rows, False, False)
    return y
