"""Gather and scatter of whole rows: one kernel, its direction a constant."""

import triton
import triton.language as tl

from dynexec.kernels.device import fill

_BLOCK = 2048  # elements: 16 bytes for each of 256 threads, of 16-bit numbers


# One compilation for all numbers of rows, and for offsets and parts of an index of any alignment.
@triton.jit(do_not_specialize=["M", "FIRST"], do_not_specialize_on_alignment=["index_ptr", "offset_ptr"])
def _move(
    whole_ptr,  # [N, size], rows at whole_stride
    part_ptr,  # [M, size], rows at part_stride: row i belongs to row index[i] of whole
    index_ptr,  # int32 or int64 [M]
    offset_ptr,  # int32 [2]: the first row to move, and the end, both FIRST too large; or nothing
    M,
    FIRST,
    size,
    whole_stride,
    part_stride,
    SCATTER: tl.constexpr,
    ADD: tl.constexpr,
    RELU: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pieces = tl.cdiv(size, BLOCK)
    start = 0
    if BOUNDED:
        start = tl.load(offset_ptr) - FIRST
        M = tl.load(offset_ptr + 1) - FIRST
    for unit in tl.range(start * pieces + tl.program_id(0), M * pieces, tl.num_programs(0)):
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
            tl.store(whole, value, mask=inside)
        else:
            tl.store(part, tl.load(whole, mask=inside), mask=inside)


def move_rows(whole, part, index, *, scatter, add=False, relu=False, offset=None, first=0):
    """``part[:] = whole[index]``, or with ``scatter`` ``whole[index] = relu(part + whole[index])`` as far as asked.

    ``whole`` ``[N, size]`` and ``part`` ``[M, size]`` have elements of a row side by side; ``index`` int32 or int64
    ``[M]``, without duplicates for a scatter. With ``offset``, int32 ``[2]`` on the device, only the rows from
    ``offset[0] - first`` to ``offset[1] - first`` of ``part`` and ``index`` are moved.
    """
    rows, size = part.shape
    if rows and size:
        grid = fill(part.device, rows * triton.cdiv(size, _BLOCK), 8)
        strides = whole.stride(0), part.stride(0)
        _move[grid](
            whole, part, index, offset, rows, first, size, *strides, SCATTER=scatter, ADD=add, RELU=relu,
            BOUNDED=offset is not None, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
