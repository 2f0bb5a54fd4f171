"""Reference definitions of the ops in plain torch, and their implementation on devices that have no other.

A *row* is ``x[n]``, of any shape. Results keep the memory layout of a row (a channels_last batch stays channels_last),
which ``index_select`` and ``index_copy`` on the tensor itself would lose.
"""

import torch
import torch.nn.functional as F


def gather_rows(x, index):
    """``x[index]``; see :func:`dynexec.ops.gather_rows`."""
    return gather_rows_out(x, index, empty_rows(x, index.shape[0]))


def gather_rows_out(x, index, out):
    """Write ``x[index]`` to ``out`` and return it."""
    if has_dense_rows(x) and x.stride()[1:] == out.stride()[1:]:
        torch.index_select(flat_rows(x), 0, index, out=flat_rows(out))
        return out
    return out.copy_(x[index])


def scatter_rows(destination, index, rows, *, add=False, relu=False):
    """Return a copy of ``destination`` with rows ``index`` replaced; see :func:`dynexec.ops.scatter_rows`."""
    return scatter_rows_(destination.clone(), index, rows, add=add, relu=relu)


def scatter_rows_(destination, index, rows, *, add=False, relu=False):
    """Replace rows ``index`` of ``destination`` in place; see :func:`dynexec.ops.scatter_rows_`."""
    if add:
        rows = rows + gather_rows(destination, index)
    if relu:
        rows = torch.relu(rows)
    destination[index] = rows
    return destination


def merge_rows(rest, index, rows, *, add, relu):
    """Return the result of :func:`scatter_rows`, and a mask of the new elements that the ReLU passed.

    The mask is bool, shaped like ``rows``, and empty without ``relu``. NaN counts as passed, as in relu.
    """
    output = scatter_rows(rest, index, rows, add=add, relu=relu)
    if relu:
        return output, gather_rows(output, index).bool()
    return output, rest.new_empty(0, dtype=torch.bool)


def gather_passed(x, index, passed):
    """``x[index]`` where ``passed``, else 0: the gradient of :func:`merge_rows` with respect to ``rows``."""
    rows = gather_rows(x, index)
    return torch.where(passed, rows, torch.zeros_like(rows))


def plan(decisions, choices):
    """Sample numbers grouped by choice, and the group borders, per block; see :func:`dynexec.ops.plan`."""
    by_block = decisions.t().long().contiguous()  # narrower integers do not hold every choice
    index = torch.argsort(by_block, dim=1, stable=True).int()
    offset = index.new_zeros(by_block.shape[0], choices + 1)
    for choice in range(choices):
        offset[:, choice + 1] = offset[:, choice] + (by_block == choice).sum(dim=1)
    return index, offset


def has_dense_rows(x):
    """Whether each row of ``x`` is one gap-free stretch of memory, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride()[1:], x.shape[1:]) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def empty_rows(x, count, dtype=None):
    """Return an uninitialised tensor ``[count, ...]`` for rows of ``x``.

    Strides are kept if the rows of ``x`` are dense, and contiguous otherwise. ``dtype`` defaults to that of ``x``.
    """
    row = x.shape[1:]
    strides = x.stride()[1:] if has_dense_rows(x) else contiguous_strides(row)
    return x.new_empty_strided((count, *row), (max(row.numel(), 1), *strides), dtype=dtype)


def contiguous_strides(shape):
    """Return the row-major strides of ``shape``."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= max(size, 1)
    return strides


def flat_rows(x):
    """View dense rows as ``[N, elements per row]``, in memory order."""
    return x.as_strided((x.shape[0], x.shape[1:].numel()), (x.stride(0), 1))


ACTIVATIONS = {
    None: lambda x: x,
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
}


def conv_rows_(out, x, weight, bias, rows, *, activation=None, residual=None, **geometry):
    """Set ``out[rows] = activation(conv2d(x[rows], weight, bias, **geometry) + residual[rows])``; return ``out``."""
    y = F.conv2d(x[rows], weight, bias, **geometry)
    out[rows] = ACTIVATIONS[activation](y if residual is None else y + residual[rows])
    return out


def combine_rows_(out, x, rows, *, add=None, multiply=None, activation=None):
    """Set ``out[rows] = activation(x[rows] + add[rows])``, or with ``* multiply[rows]``; further channels become 0."""
    y = x[rows]
    y = y + add[rows] if add is not None else y * multiply[rows] if multiply is not None else y
    y = ACTIVATIONS[activation](y)
    out[rows] = F.pad(y, (0, 0, 0, 0, 0, out.shape[1] - y.shape[1]))
    return out


def pool_rows_(out, x, rows, kind, kernel, *, stride, padding=(0, 0), divisor=0):
    """Pool ``x[rows]`` into ``out[rows]``: "max", or "sum" divided by ``divisor`` (0: by the number of inputs)."""
    h, w = out.shape[2:]
    after = [(size - 1) * s + k - p for size, s, k, p in zip((h, w), stride, kernel, padding)]
    after = [max(a - size, 0) for a, size in zip(after, x.shape[2:])]  # the last window may stand over the edge
    pad = (padding[1], after[1], padding[0], after[0])
    x = x[rows]
    if kind == "max":
        out[rows] = F.max_pool2d(F.pad(x, pad, value=-torch.inf), kernel, stride)[:, :, :h, :w]
        return out
    ones = F.pad(torch.ones_like(x[:, :1]), pad)
    sums, inputs = (F.avg_pool2d(t, kernel, stride, divisor_override=1)[:, :, :h, :w] for t in (F.pad(x, pad), ones))
    out[rows] = sums / (divisor or inputs)
    return out
