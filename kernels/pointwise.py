"""Additions, products and pooling of some rows: what remains between convolutions."""

import triton
import triton.language as tl

from dynexec.kernels.device import ONCE, activate, begin, count_rows, fill, find_pixels, launch_options

_PIXELS, _CHANNELS = 32, 64  # of a tile


@triton.jit(**ONCE)
def _combine(
    x_ptr,  # [N, PIXELS, C]
    other_ptr,  # as x to add, [N, C] to multiply, or nothing
    out_ptr,  # [N, PIXELS, K]
    index_ptr,  # int32 [N]: row numbers, or nothing
    offset_ptr,  # int32 [2]: the first of them to work on, and the end, or nothing
    samples,  # N
    PIXELS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    OPERATION: tl.constexpr,
    GATHERED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    start, count = count_rows(offset_ptr, samples, GATHERED)
    pixels = count * PIXELS
    tiles_c: tl.constexpr = (K + BC - 1) // BC
    for tile in tl.range(tl.program_id(0), tl.cdiv(pixels, BM) * tiles_c, tl.num_programs(0)):
        tile_m = tile // tiles_c
        channel = ((tile - tile_m * tiles_c) * BC + tl.arange(0, BC))[None, :]
        sample, pixel, valid = find_pixels(tile_m * BM, pixels, start, index_ptr, PIXELS, BM, GATHERED)
        place = (sample * PIXELS + pixel)[:, None]
        mask = valid[:, None] & (channel < C)
        y = tl.load(x_ptr + place * C + channel, mask=mask, other=0.0).to(tl.float32)
        if OPERATION == "add":
            y += tl.load(other_ptr + place * C + channel, mask=mask, other=0.0).to(tl.float32)
        elif OPERATION == "multiply":
            y *= tl.load(other_ptr + sample[:, None] * C + channel, mask=mask, other=0.0).to(tl.float32)
        y = activate(y, ACTIVATION)
        if K != C:
            y = tl.where(channel < C, y, 0.0)
        tl.store(out_ptr + place * K + channel, y.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (channel < K))


def combine(x, out, *, add=None, multiply=None, activation=None, index=None, offset=None):
    """Set ``out[n] = activation(x[n] + add[n])``, or ``* multiply[n]`` instead, for the rows ``n``; return ``out``.

    All are channels_last ``[N, C, H, W]``, except ``multiply``, ``[N, C, 1, 1]``; further channels of ``out`` become
    zero. ``out`` may be ``x`` or ``add``. ``index`` and ``offset`` are as for :func:`conv`.
    """
    n, c, h, w = x.shape
    k = out.shape[1]
    if n == 0:
        return out
    operation = "add" if add is not None else "multiply" if multiply is not None else "none"
    other = add if add is not None else multiply
    tiles = triton.cdiv(n * h * w, _PIXELS) * triton.cdiv(k, _CHANNELS)
    _combine[fill(x.device, tiles, 8)](
        x, other, out, index, offset, n, h * w, c, k, _PIXELS, _CHANNELS, operation, index is not None, activation,
        num_warps=4, **launch_options(x.device),
    )  # fmt: skip
    return out


@triton.jit(**ONCE)
def _pool(
    x_ptr,  # [N, H, W, C]
    out_ptr,  # [N, OH, OW, C]
    index_ptr,  # int32 [N]: row numbers, or nothing
    offset_ptr,  # int32 [2]: the first of them to work on, and the end, or nothing
    samples,  # N
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DIVISOR: tl.constexpr,  # of sums; 0: the number of inputs
    BM: tl.constexpr,
    BC: tl.constexpr,
    MAX: tl.constexpr,
    GATHERED: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    start, count = count_rows(offset_ptr, samples, GATHERED)
    pixels = count * (OH * OW)
    tiles_c: tl.constexpr = (C + BC - 1) // BC
    for tile in tl.range(tl.program_id(0), tl.cdiv(pixels, BM) * tiles_c, tl.num_programs(0)):
        tile_m = tile // tiles_c
        channel = ((tile - tile_m * tiles_c) * BC + tl.arange(0, BC))[None, :]
        sample, pixel, valid = find_pixels(tile_m * BM, pixels, start, index_ptr, OH * OW, BM, GATHERED)
        row = pixel // OW
        top = row * SH - PH
        left = (pixel - row * OW) * SW - PW
        start_ptr = x_ptr + (sample * (H * W * C) + (top * W + left) * C)[:, None] + channel
        inputs = tl.zeros((BM,), tl.float32)
        y = tl.full((BM, BC), float("-inf") if MAX else 0.0, tl.float32)
        for tap in range(0, KH * KW):
            kh = tap // KW
            kw = tap - kh * KW
            inside = valid & (top + kh >= 0) & (top + kh < H) & (left + kw >= 0) & (left + kw < W)
            mask = inside[:, None] & (channel < C)
            if MAX:
                x = tl.load(start_ptr + (kh * W + kw) * C, mask=mask, other=float("-inf")).to(tl.float32)
                y = tl.maximum(y, x, propagate_nan=tl.PropagateNan.ALL)
            else:
                y += tl.load(start_ptr + (kh * W + kw) * C, mask=mask, other=0.0).to(tl.float32)
                inputs += inside.to(tl.float32)
        if not MAX:
            y = y / (DIVISOR if DIVISOR else inputs[:, None])
        place = ((sample * (OH * OW) + pixel) * C)[:, None] + channel
        tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (channel < C))


@triton.jit(**ONCE)
def _mean(
    x_ptr,  # [N, PIXELS, C]
    out_ptr,  # [N, C]
    index_ptr,  # int32 [N]: row numbers, or nothing
    offset_ptr,  # int32 [2]: the first of them to work on, and the end, or nothing
    samples,  # N
    divisor,
    PIXELS: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    GATHERED: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    start, count = count_rows(offset_ptr, samples, GATHERED)
    tiles_c: tl.constexpr = (C + BC - 1) // BC
    for tile in tl.range(tl.program_id(0), count * tiles_c, tl.num_programs(0)):
        row = tile // tiles_c
        channel = (tile - row * tiles_c) * BC + tl.arange(0, BC)
        sample = row.to(tl.int64)
        if GATHERED:
            sample = tl.load(index_ptr + start + row).to(tl.int64)
        acc = tl.zeros((BM, BC), tl.float32)
        for first in range(0, PIXELS, BM):
            pixel = first + tl.arange(0, BM)
            place = (sample * PIXELS + pixel)[:, None] * C + channel[None, :]
            mask = (pixel < PIXELS)[:, None] & (channel < C)[None, :]
            acc += tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        y = tl.sum(acc, 0) / divisor
        tl.store(out_ptr + sample * C + channel, y.to(out_ptr.dtype.element_ty), mask=channel < C)


def pool(x, out, kind, kernel, *, stride, padding=(0, 0), divisor=0, index=None, offset=None):
    """Pool the rows ``n`` of ``x`` ``[N, C, H, W]`` into those of ``out`` ``[N, C, OH, OW]``; return ``out``.

    ``kind`` is "max", or "sum" of the inputs of a window divided by ``divisor``, or by their number if that is 0.
    Padding is no input. ``index`` and ``offset`` are as for :func:`conv`.
    """
    n, c, h, w = x.shape
    oh, ow = out.shape[2:]
    if n == 0:
        return out
    tiles_c = triton.cdiv(c, _CHANNELS)
    if kind == "sum" and (oh, ow, *kernel, *padding) == (1, 1, h, w, 0, 0):
        _mean[fill(x.device, n * tiles_c, 8)](
            x, out, index, offset, n, float(divisor or h * w), h * w, c, _PIXELS, _CHANNELS, index is not None,
            num_warps=4, **launch_options(x.device),
        )  # fmt: skip
        return out
    tiles = triton.cdiv(n * oh * ow, _PIXELS) * tiles_c
    _pool[fill(x.device, tiles, 8)](
        x, out, index, offset, n, h, w, c, oh, ow, *kernel, *stride, *padding, divisor, _PIXELS, _CHANNELS,
        kind == "max", index is not None, num_warps=4, **launch_options(x.device),
    )  # fmt: skip
    return out
