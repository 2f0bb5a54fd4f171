"""Turns the decisions of all blocks into groups of samples, and counts how many are dropped, in one launch each."""

import torch
import triton
import triton.language as tl


@triton.jit
def _plan(
    decisions_ptr,  # bool as uint8, or any integer, [N, L]
    index_ptr,  # int32 [L, N]
    offset_ptr,  # int32 [L, choices + 1]
    N,
    choices,
    sample_stride,  # of decisions
    block_stride,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    decisions_ptr += block * block_stride
    index_ptr += block * N
    offset_ptr += block * (choices + 1)
    # A pass per choice, each over all samples: a running sum gives them their places in order.
    start = 0
    for choice in range(0, choices):
        tl.store(offset_ptr + choice, start)
        for first in range(0, N, BLOCK):
            sample = first + tl.arange(0, BLOCK)
            decision = tl.load(decisions_ptr + sample.to(tl.int64) * sample_stride, mask=sample < N, other=0)
            chosen = ((sample < N) & (decision == choice)).to(tl.int32)
            place = start + tl.cumsum(chosen, 0) - chosen
            tl.store(index_ptr + place, sample, mask=chosen != 0)
            start += tl.sum(chosen, 0)
    tl.store(offset_ptr + choices, start)


def plan(decisions, choices):
    """Compute index and offset of a Route, see :func:`dynexec.ops.plan`; decisions outside ``0..choices - 1`` are left
    out.

    Equivalent to ``reference.plan(decisions, choices)``.
    """
    samples, blocks = decisions.shape
    index = decisions.new_empty((blocks, samples), dtype=torch.int32)
    offset = decisions.new_empty((blocks, choices + 1), dtype=torch.int32)
    if blocks:
        if decisions.dtype == torch.bool:
            decisions = decisions.view(torch.uint8)
        size = min(max(triton.next_power_of_2(samples), 32), 1024)
        _plan[(blocks,)](decisions, index, offset, samples, choices, *decisions.stride(), BLOCK=size, num_warps=4)
    return index, offset


@triton.jit
def _find_body(
    offset_ptr,  # int32 [L, choices + 1]
    range_ptr,  # int32 [2]
    most,
    L,
    stride,
    BLOCK: tl.constexpr,
):
    dropped = 0
    for first in range(0, L, BLOCK):
        block = first + tl.arange(0, BLOCK)
        dropped += tl.sum(tl.load(offset_ptr + block * stride + 1, mask=block < L, other=0), 0)
    tl.store(range_ptr, 0)
    tl.store(range_ptr + 1, (dropped > 0).to(tl.int32) + (dropped > most).to(tl.int32))


def find_body(offset, most):
    """Return int32 ``[2]``: first 0; then 0 if no (sample, block) pair is dropped, 1 for up to ``most``, 2 for more.

    ``offset`` is that of :func:`plan`, where decision 0 drops. Equivalent to
    ``dropped = offset[:, 1].sum(); [0, (dropped > 0) + (dropped > most)]``.
    """
    found = offset.new_empty(2)
    _find_body[(1,)](offset, found, most, len(offset), offset.stride(0), BLOCK=128, num_warps=4)
    return found
