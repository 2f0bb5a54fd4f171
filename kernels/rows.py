"""Gather and scatter of whole rows: one kernel, its direction a constant."""

import triton
import triton.language as tl

from dynexec.kernels.device import fill

_BLOCK = 2048  # elements: 16 bytes for each of 256 threads, of 16-bit numbers


# One compilation for all numbers of rows, and for parts of an index of any alignment.
@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["index_ptr"])
def _move(
    whole_ptr,  # [N, size], rows at whole_stride
    part_ptr,  # [M, size], rows at part_stride: row i belongs to row index[i] of whole
    index_ptr,  # int32 or int64 [M]
    passed_ptr,  # bool [M, size], gap-free, or None: a scatter writes which elements its ReLU passed, a gather obeys
    M,
    size,
    whole_stride,
    part_stride,
    SCATTER: tl.constexpr,
    ADD: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pieces = tl.cdiv(size, BLOCK)
    for unit in tl.range(tl.program_id(0), M * pieces, tl.num_programs(0)):
        row = unit // pieces
        element = (unit - row * pieces) * BLOCK + tl.arange(0, BLOCK)
        inside = element < size
        whole = whole_ptr + tl.load(index_ptr + row).to(tl.int64) * whole_stride + element
        part = part_ptr + row.to(tl.int64) * part_stride + element
        if SCATTER:
            value = tl.load(part, mask=inside)
            if ADD:  # rounded to the dtype before the ReLU, as torch does; the result is the same
                value += tl.load(whole, mask=inside)
            if RELU:
                value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
            if passed_ptr is not None:
                tl.store(passed_ptr + row.to(tl.int64) * size + element, value != 0, mask=inside)  # true for NaN
            tl.store(whole, value, mask=inside)
        else:
            value = tl.load(whole, mask=inside)
            if passed_ptr is not None:
                passed = tl.load(passed_ptr + row.to(tl.int64) * size + element, mask=inside, other=0)
                value = tl.where(passed, value, 0.0)
            tl.store(part, value, mask=inside)


def move_rows(whole, part, index, passed=None, *, scatter, add=False, relu=False):
    """Set ``part[:] = whole[index]`` or, if ``scatter``, ``whole[index] = relu(part + whole[index])`` as far as asked.

    ``whole`` ``[N, ...]`` and ``part`` ``[M, ...]`` have rows with the same layout in memory, without gaps inside;
    ``index`` is int32 or int64 ``[M]``, without duplicates for a scatter. ``passed`` is bool like ``part``, without
    gaps: a scatter with ``relu`` writes there which elements the ReLU passed; a gather reads it and sets the others to
    0.
    """
    rows, size = len(part), part.shape[1:].numel()
    if rows and size:
        grid = fill(part.device, rows * triton.cdiv(size, _BLOCK), 8)
        strides = whole.stride(0), part.stride(0)
        _move[grid](
            whole, part, index, passed, rows, size, *strides,
            SCATTER=scatter, ADD=add, RELU=relu, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
