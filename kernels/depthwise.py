"""Depthwise convolutions of some rows, which are bound by memory, not by multiplications."""

import triton
import triton.language as tl

from dynexec.kernels.device import ONCE, activate, begin, count_rows, fill, find_pixels, inside_bits, launch_options

_PIXELS, _CHANNELS = 32, 64  # of a tile


@triton.jit(**ONCE)
def _depthwise(
    x_ptr,  # [N, H, W, C]
    weight_ptr,  # [KH, KW, C], of the dtype of x
    bias_ptr,  # float32 [C]
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
    DH: tl.constexpr,
    DW: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    GATHERED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    start, count = count_rows(offset_ptr, samples, GATHERED)
    pixels = count * (OH * OW)
    tiles_c: tl.constexpr = (C + BC - 1) // BC
    for tile in tl.range(tl.program_id(0), tl.cdiv(pixels, BM) * tiles_c, tl.num_programs(0)):
        tile_m = tile // tiles_c
        channel = (tile - tile_m * tiles_c) * BC + tl.arange(0, BC)
        there = channel < C
        sample, pixel, valid = find_pixels(tile_m * BM, pixels, start, index_ptr, OH * OW, BM, GATHERED)
        row = pixel // OW
        top = row * SH - PH
        left = (pixel - row * OW) * SW - PW
        bits = tl.where(valid, inside_bits(top, left, H, W, KH, KW, DH, DW), 0)
        window_ptr = x_ptr + (sample * (H * W * C) + (top * W + left) * C)[:, None] + channel[None, :]
        acc = tl.zeros((BM, BC), tl.float32)
        for tap in tl.static_range(KH * KW):
            inside = ((bits >> tap) & 1) != 0
            offset = ((tap // KW) * (DH * W) + (tap % KW) * DW) * C
            x = tl.load(window_ptr + offset, mask=inside[:, None] & there[None, :], other=0.0)
            w = tl.load(weight_ptr + tap * C + channel, mask=there, other=0.0)
            acc += x.to(tl.float32) * w.to(tl.float32)[None, :]
        y = activate(acc + tl.load(bias_ptr + channel, mask=there, other=0.0)[None, :], ACTIVATION)
        place = ((sample * (OH * OW) + pixel) * C)[:, None] + channel[None, :]
        tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=valid[:, None] & there[None, :])


def depthwise(
    x,
    weight,
    bias,
    out,
    *,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    activation=None,
    index=None,
    offset=None,
):
    """Compute ``out[n] = activation(conv2d(x[n], weight, groups=C) + bias)`` for the rows ``n``; return ``out``.

    ``weight`` is ``[C, 1, KH, KW]`` with memory laid out as ``[KH, KW, C]``; the other arguments are those of
    :func:`conv`.
    """
    n, c, h, w = x.shape
    kh, kw = weight.shape[2:]
    oh, ow = out.shape[2:]
    if n == 0:
        return out
    tiles = triton.cdiv(n * oh * ow, _PIXELS) * triton.cdiv(c, _CHANNELS)
    _depthwise[fill(x.device, tiles, 8)](
        x, weight, bias, out, index, offset, n, h, w, c, oh, ow, kh, kw, *stride, *padding, *dilation,
        _PIXELS, _CHANNELS, index is not None, activation, num_warps=4, **launch_options(x.device),
    )  # fmt: skip
    return out
