"""Tiles of convolutions: their sums over windows and channels, and what follows the sums."""

import triton
import triton.language as tl

from dynexec.kernels.device import activate


@triton.jit
def sum_taps(
    acc,  # float32 [BM, BN], added to
    window_ptr,  # [BM]: first channel of each window's first tap
    bits,  # int32 [BM]: which taps of a window are inside of the image; 0: no pixel at all
    weights,  # [BN]: pointers to the first weight of each output channel, [taps][C]; or a descriptor of all channels'
    first_column,  # of the output channels, for the descriptor
    columns,  # bool [BN]: which output channels there are
    begin,  # first step and end
    end,
    W,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    BK: tl.constexpr,
    ALL_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,  # whether there is a descriptor; then BK divides C, and BN the number of output channels
):
    """Add up the products of pixels and weights, in steps of ``BK`` channels of a tap."""
    of_tap: tl.constexpr = (C + BK - 1) // BK
    k = tl.arange(0, BK)
    x_ptr = window_ptr[:, None] + k[None, :]
    if not TMA:
        w_ptr = weights[None, :] + k[:, None]
    for step in range(begin, end):
        if KH * KW == 1:
            inside = bits != 0
            channel = step * BK
            x_offset = channel
            w_offset = channel
        else:
            tap = step // of_tap
            channel = (step - tap * of_tap) * BK
            kh = tap // KW
            inside = ((bits >> tap) & 1) != 0
            x_offset = (kh * (DH * W) + (tap - kh * KW) * DW) * C + channel
            w_offset = tap * C + channel
        x_mask = inside[:, None]
        if TMA:
            w = weights.load([first_column, w_offset]).T
        elif C % BK != 0:
            there = channel + k < C
            x_mask = x_mask & there[None, :]
            w = tl.load(w_ptr + w_offset, mask=there[:, None] & columns[None, :], other=0.0)
        elif ALL_COLUMNS:
            w = tl.load(w_ptr + w_offset)
        else:
            w = tl.load(w_ptr + w_offset, mask=columns[None, :], other=0.0)
        x = tl.load(x_ptr + x_offset, mask=x_mask, other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def finish_tile(
    acc,  # float32 [BM, BN]
    bias_ptr,  # float32 [K]
    residual_ptr,  # as out, or nothing
    out_ptr,
    place,  # int64 [BM]: first channel of each pixel in out
    valid,  # bool [BM]
    columns,  # [BN]: output channels
    K: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALL_COLUMNS: tl.constexpr,
):
    """Set ``out = activation(acc + bias + residual)``, rounded once."""
    mask = valid[:, None]
    if ALL_COLUMNS:
        bias = tl.load(bias_ptr + columns)
    else:
        bias = tl.load(bias_ptr + columns, mask=columns < K, other=0.0)
        mask = mask & (columns < K)[None, :]
    y = acc + bias[None, :]
    place = place[:, None] + columns[None, :]
    if RESIDUAL:
        y += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, activate(y, ACTIVATION).to(out_ptr.dtype.element_ty), mask=mask)
