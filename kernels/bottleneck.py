"""The last two convolutions of a bottleneck in one kernel: the values between them never leave the multiprocessor."""

import triton
import triton.language as tl

from dynexec.kernels.configs import choose_pair_tile
from dynexec.kernels.device import (
    ONCE,
    activate,
    architecture,
    begin,
    count_rows,
    fill,
    find_pixels,
    inside_bits,
    launch_options,
)
from dynexec.kernels.tiles import finish_tile, sum_taps


@triton.jit(**ONCE)
def _conv_pair(
    x_ptr,  # [N, H, W, C]
    weight_ptr,  # [M, KH, KW, C], of the dtype of x
    bias_ptr,  # float32 [M]
    last_weight_ptr,  # [K, M], of the dtype of x
    last_bias_ptr,  # float32 [K]
    residual_ptr,  # as out, or nothing; may be out itself
    out_ptr,  # [N, OH, OW, K]
    index_ptr,  # int32 [N]: row numbers, or nothing
    offset_ptr,  # int32 [2]: the first of them to work on, and the end, or nothing
    samples,  # N
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
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
    BN: tl.constexpr,
    BK: tl.constexpr,
    MIDDLE: tl.constexpr,  # M, or the next power of two
    GATHERED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MIDDLE_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    start, count = count_rows(offset_ptr, samples, GATHERED)
    pixels = count * (OH * OW)
    steps: tl.constexpr = KH * KW * ((C + BK - 1) // BK)
    all_columns: tl.constexpr = K % BN == 0
    middle = tl.arange(0, MIDDLE)
    for tile in tl.range(tl.program_id(0), tl.cdiv(pixels, BM), tl.num_programs(0)):
        sample, pixel, valid = find_pixels(tile * BM, pixels, start, index_ptr, OH * OW, BM, GATHERED)
        row = pixel // OW
        top = row * SH - PH
        left = (pixel - row * OW) * SW - PW
        acc = sum_taps(
            tl.zeros((BM, MIDDLE), tl.float32),
            x_ptr + sample * (H * W * C) + (top * W + left) * C,
            tl.where(valid, inside_bits(top, left, H, W, KH, KW, DH, DW), 0),
            weight_ptr + middle.to(tl.int64) * (KH * KW * C),
            0,
            middle < M,
            0,
            steps,
            W, C, KH, KW, DH, DW, BK, MIDDLE == M, PRECISION, False,
        )  # fmt: skip
        bias = tl.load(bias_ptr + middle, mask=middle < M, other=0.0)
        between = activate(acc + bias[None, :], MIDDLE_ACTIVATION).to(x_ptr.dtype.element_ty)
        place = (sample * (OH * OW) + pixel) * K
        for first in range(0, K, BN):
            columns = first + tl.arange(0, BN)
            w_ptr = last_weight_ptr + columns[None, :] * M + middle[:, None]
            if all_columns and MIDDLE == M:
                w = tl.load(w_ptr)
            else:
                w = tl.load(w_ptr, mask=(columns < K)[None, :] & (middle < M)[:, None], other=0.0)
            y = tl.dot(between, w, input_precision=PRECISION)
            finish_tile(
                y, last_bias_ptr, residual_ptr, out_ptr, place, valid, columns, K, RESIDUAL, ACTIVATION, all_columns
            )


def conv_pair(
    x,
    weight,
    bias,
    last_weight,
    last_bias,
    out,
    *,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    middle_activation="relu",
    activation=None,
    residual=None,
    index=None,
    offset=None,
    tile=None,
    precision="tf32",
):
    """Compute two calls of :func:`conv`, the second with ``last_weight`` ``[K, M, 1, 1]``; return ``out``.

    The values between them are rounded to the dtype, as in memory. ``weight`` is ``[M, C, KH, KW]``: a tile holds all M
    channels, and there are tiles for up to 256. The other arguments are those of :func:`conv`. Results do not depend on
    the rest of the batch.
    """
    n, c, h, w = x.shape
    m, _, kh, kw = weight.shape
    k, (oh, ow) = out.shape[1], out.shape[2:]
    if n == 0:
        return out
    tile = tile or choose_pair_tile(n * oh * ow, m, c, x.dtype, architecture(x.device))
    grid = fill(x.device, triton.cdiv(n * oh * ow, tile.bm), tile.programs)
    middle = max(16, triton.next_power_of_2(m))
    _conv_pair[grid](
        x, weight, bias, last_weight, last_bias, residual, out, index, offset, n,
        h, w, c, m, k, oh, ow, kh, kw, *stride, *padding, *dilation,
        tile.bm, tile.bn, tile.bk, middle, index is not None, residual is not None, middle_activation, activation,
        precision, num_warps=tile.warps, num_stages=tile.stages, **launch_options(x.device),
    )  # fmt: skip
    return out
