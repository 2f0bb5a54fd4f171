"""Convolutions of several groups of samples in one launch, each with its own weights and image size."""

import triton
import triton.language as tl

from dynexec.kernels.configs import choose_tile
from dynexec.kernels.conv import describe_weights
from dynexec.kernels.device import architecture, begin, fill, find_pixels, inside_bits, launch_options
from dynexec.kernels.tiles import finish_tile, sum_taps

FIELDS = 7  # of a group


@triton.jit
def _grouped_conv(
    x_ptr,  # [pixels, C]: the images of all groups
    weight_ptr,  # [weight sets, K, KH, KW, C], of the dtype of x
    weight_descriptor,  # of the same memory, [weight sets * K, KH * KW * C] in blocks [BN, BK], or nothing
    bias_ptr,  # float32 [weight sets, K]
    residual_ptr,  # as out, or nothing; may be out itself
    out_ptr,  # [pixels, K]
    index_ptr,  # int32 [N]: sample numbers, group by group
    offset_ptr,  # int32 [groups + 1]: where each group's begin
    group_ptr,  # int32 [groups, FIELDS]: H, W, OH, OW, first pixel in x, first pixel in out, weight set
    groups,
    C: tl.constexpr,
    K: tl.constexpr,
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
    FIELDS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    tiles_n: tl.constexpr = (K + BN - 1) // BN
    all_columns: tl.constexpr = K % BN == 0
    steps: tl.constexpr = KH * KW * ((C + BK - 1) // BK)
    tiles = 0
    for group in range(0, groups):
        tiles += _tiles_of(group, offset_ptr, group_ptr, FIELDS, BM)
    for tile in tl.range(tl.program_id(0), tiles * tiles_n, tl.num_programs(0)):
        tile_m = tile // tiles_n
        first_column = (tile - tile_m * tiles_n) * BN
        columns = first_column + tl.arange(0, BN)
        # The group that the tile is in: the last one that begins at it or before it, and has any.
        found = 0
        first = 0
        begins = 0
        for group in range(0, groups):
            of_group = _tiles_of(group, offset_ptr, group_ptr, FIELDS, BM)
            if (tile_m >= begins) & (of_group > 0):
                found = group
                first = begins
            begins += of_group
        description = group_ptr + found * FIELDS
        H = tl.load(description)
        W = tl.load(description + 1)
        OH = tl.load(description + 2)
        OW = tl.load(description + 3)
        start = tl.load(offset_ptr + found)
        pixels = (tl.load(offset_ptr + found + 1) - start) * (OH * OW)
        weights = tl.load(description + 6).to(tl.int64)
        if TMA:
            of_weights = weight_descriptor
            first_row = weights.to(tl.int32) * K + first_column
        else:
            of_weights = weight_ptr + (weights * K + columns) * (KH * KW * C)
            first_row = 0
        sample, pixel, valid = find_pixels((tile_m - first) * BM, pixels, start, index_ptr, OH * OW, BM, True)
        row = pixel // OW
        top = row * SH - PH
        left = (pixel - row * OW) * SW - PW
        acc = sum_taps(
            tl.zeros((BM, BN), tl.float32),
            x_ptr + (tl.load(description + 4) + sample * (H * W) + top * W + left) * C,
            tl.where(valid, inside_bits(top, left, H, W, KH, KW, DH, DW), 0),
            of_weights,
            first_row,
            columns < K,
            0,
            steps,
            W, C, KH, KW, DH, DW, BK, all_columns, PRECISION, TMA,
        )  # fmt: skip
        place = (tl.load(description + 5) + sample * (OH * OW) + pixel) * K
        finish_tile(
            acc,
            bias_ptr + weights * K,
            residual_ptr,
            out_ptr,
            place,
            valid,
            columns,
            K,
            RESIDUAL,
            ACTIVATION,
            all_columns,
        )


@triton.jit
def _tiles_of(group, offset_ptr, group_ptr, FIELDS: tl.constexpr, BM: tl.constexpr):
    count = tl.load(offset_ptr + group + 1) - tl.load(offset_ptr + group)
    description = group_ptr + group * FIELDS
    return tl.cdiv(count * tl.load(description + 2) * tl.load(description + 3), BM)


def grouped_conv(
    x,
    weight,
    bias,
    out,
    groups,
    index,
    offset,
    *,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    activation=None,
    residual=None,
    tile=None,
    precision="tf32",
):
    """Convolve each group of samples with its own weights, in one launch; return ``out``.

    Sample ``n`` of group ``g`` is the image at pixel ``first + n * H * W`` of ``x``, as the group says.

    Parameters
    ----------
    x : tensor ``[pixels, C]``
        float16, bfloat16 or float32.
    weight : tensor ``[weight sets, K, C, KH, KW]``, each channels_last
    bias : float32 tensor ``[weight sets, K]``
    out : tensor ``[pixels, K]``
        Shares no memory with ``x``.
    groups : int32 tensor ``[groups, 7]``
        Per group: height and width of its images, height and width of their results, first pixel in ``x``, first pixel
        in ``out``, weight set.
    index : int32 tensor ``[N]``
        Sample numbers, group after group.
    offset : int32 tensor ``[groups + 1]``
        Group ``g`` has the samples ``index[offset[g] : offset[g + 1]]``.
    stride, padding, dilation, activation, residual, tile, precision
        As for :func:`conv`.
    """
    (_, c), (_, k, _, kh, kw) = x.shape, weight.shape
    if len(index) == 0 or len(groups) == 0:
        return out
    tile = tile or choose_tile(len(out), k, kh * kw, c, x.dtype, architecture(x.device), grouped=True)
    grid = fill(x.device, (triton.cdiv(len(out), tile.bm) + len(groups)) * triton.cdiv(k, tile.bn), tile.programs)
    descriptor = describe_weights(weight.flatten(0, 1), tile) if k % tile.bn == 0 else None
    _grouped_conv[grid](
        x, weight, descriptor, bias, residual, out, index, offset, groups, len(groups),
        c, k, kh, kw, *stride, *padding, *dilation,
        tile.bm, tile.bn, tile.bk, FIELDS, residual is not None, activation, precision,
        descriptor is not None,
        num_warps=tile.warps, num_stages=tile.stages, **launch_options(x.device),
    )  # fmt: skip
    return out
