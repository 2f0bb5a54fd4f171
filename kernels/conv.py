"""Convolutions of some rows, as a matrix product whose left side is read from the images (implicit GEMM)."""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from dynexec.kernels.configs import choose_tile
from dynexec.kernels.device import (
    ONCE,
    architecture,
    begin,
    count_rows,
    fill,
    find_pixels,
    inside_bits,
    launch_options,
    multiprocessors,
)
from dynexec.kernels.tiles import finish_tile, sum_taps

MAX_SPLIT = 8  # programs that share one tile's sum
TERMS = 1024  # of a sum that each of them should have at least
CELLS = 128 * 128  # of a tile that is shared
MAX_TAPS = 31  # of a window: a bit of an int32 each


@triton.jit(**ONCE)
def _conv(
    x_ptr,  # [N, H, W, C]
    weight_ptr,  # [K, KH, KW, C], of the dtype of x
    weight_descriptor,  # of the same memory, [K, KH * KW * C] in blocks [BN, BK], or nothing
    bias_ptr,  # float32 [K]
    residual_ptr,  # as out, or nothing; may be out itself
    out_ptr,  # [N, OH, OW, K]
    index_ptr,  # int32 [N]: row numbers, or nothing
    offset_ptr,  # int32 [2]: the first of them to work on, and the end, or nothing
    partial_ptr,  # float32 [programs, BM, BN]: parts of sums
    arrived_ptr,  # int32 [programs]: how many parts of a tile are there; 0 before and after
    samples,  # N
    most,  # programs that share one tile's sum
    multiprocessors,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
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
    SHARED: tl.constexpr,
    GATHERED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    start, count = count_rows(offset_ptr, samples, GATHERED)
    pixels = count * (OH * OW)
    tiles_n: tl.constexpr = (K + BN - 1) // BN
    all_columns: tl.constexpr = K % BN == 0
    steps: tl.constexpr = KH * KW * ((C + BK - 1) // BK)
    tiles = tl.cdiv(pixels, BM) * tiles_n
    # Where few tiles are left after the last full round, multiprocessors would be idle: several programs share the sum
    # of each. How many depends on the number of kept samples, and so does the order of the additions.
    full = 0
    rest = tiles
    if SHARED:
        rest = tiles % tl.num_programs(0)
        full = tiles - rest
    split = tl.minimum(tl.maximum(multiprocessors // tl.maximum(rest, 1), 1), most)  # 1 if not SHARED
    for unit in tl.range(tl.program_id(0), full + rest * split, tl.num_programs(0)):
        tile = (unit - full) // split
        part = unit - full - tile * split
        parts = split
        if SHARED:
            whole = unit < full
            tile = tl.where(whole, unit, full + tile)
            part = tl.where(whole, 0, part)
            parts = tl.where(whole, 1, split)
        tile_m = tile // tiles_n
        first_column = (tile - tile_m * tiles_n) * BN
        columns = first_column + tl.arange(0, BN)
        sample, pixel, valid = find_pixels(tile_m * BM, pixels, start, index_ptr, OH * OW, BM, GATHERED)
        row = pixel // OW
        top = row * SH - PH
        left = (pixel - row * OW) * SW - PW
        if KH * KW == 1 and PH == 0 and PW == 0 and (OH - 1) * SH < H and (OW - 1) * SW < W:
            bits = valid.to(tl.int32)
        else:
            bits = tl.where(valid, inside_bits(top, left, H, W, KH, KW, DH, DW), 0)
        place = (sample * (OH * OW) + pixel) * K
        if TMA:
            weights = weight_descriptor
        else:
            weights = weight_ptr + columns.to(tl.int64) * (KH * KW * C)
        acc = sum_taps(
            tl.zeros((BM, BN), tl.float32),
            x_ptr + sample * (H * W * C) + (top * W + left) * C,
            bits,
            weights,
            first_column,
            columns < K,
            steps * part // parts,
            steps * (part + 1) // parts,
            W, C, KH, KW, DH, DW, BK, all_columns, PRECISION, TMA,
        )  # fmt: skip
        if SHARED:
            if parts > 1:
                acc, last = _add_parts(acc, partial_ptr, arrived_ptr, tile - full, part, parts, BM, BN)
                valid = valid & last  # a branch around what follows is more than Triton 3.6 compiles for few channels
        finish_tile(acc, bias_ptr, residual_ptr, out_ptr, place, valid, columns, K, RESIDUAL, ACTIVATION, all_columns)


@triton.jit
def _add_parts(acc, partial_ptr, arrived_ptr, tile, part, split, BM: tl.constexpr, BN: tl.constexpr):
    """Store a part of a sum; the program that stores the last one adds all in order, so results are reproducible."""
    cells = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    first_ptr = partial_ptr + (tile * split).to(tl.int64) * (BM * BN) + cells
    tl.store(first_ptr + part * (BM * BN), acc)
    tl.debug_barrier()  # all threads' stores come before the one atomic that announces them
    last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu") == split - 1
    acc = tl.zeros((BM, BN), tl.float32)
    for other in range(0, tl.where(last, split, 0)):
        acc += tl.load(first_ptr + other * (BM * BN))
    tl.store(arrived_ptr + tile, 0, mask=last)
    return acc, last


def conv(
    x,
    weight,
    bias,
    out,
    *,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    activation=None,
    residual=None,
    index=None,
    offset=None,
    workspace=None,
    tile=None,
    precision="tf32",
):
    """Compute ``out[n] = activation(conv2d(x[n], weight) + bias + residual[n])`` for the rows ``n``; return ``out``.

    Parameters
    ----------
    x : tensor ``[N, C, H, W]``, channels_last
        float16, bfloat16 or float32.
    weight : tensor ``[K, C, KH, KW]``, channels_last
        Of the dtype of ``x``; at most :data:`MAX_TAPS` taps.
    bias : float32 tensor ``[K]``
    out : tensor ``[N, K, OH, OW]``, channels_last
        Shares no memory with ``x``.
    activation : {None, "relu", "relu6", "silu", "hardswish", "sigmoid"}
    residual : tensor like ``out``, optional
        May be ``out`` itself.
    index, offset : int32 tensors ``[N]`` and ``[2]``, optional
        Which rows: ``index[offset[0] : offset[1]]``; all if not given.
    workspace : Workspace, optional
        Lets several programs add parts of one sum if few tiles are left for the last round; without it results do not
        depend on the rest of the batch.
    tile : Tile, optional
        Default: that of :func:`choose_tile`.
    precision : {"tf32", "ieee"}
        How float32 is multiplied.
    """
    n, c, h, w = x.shape
    k, _, kh, kw = weight.shape
    oh, ow = out.shape[2:]
    assert kh * kw <= MAX_TAPS, f"a window of {kh * kw} taps"
    if n == 0:
        return out
    tile = tile or choose_tile(n * oh * ow, k, kh * kw, c, x.dtype, architecture(x.device))
    most, partial, arrived = 1, None, None
    if workspace is not None and tile.bm * tile.bn <= CELLS:
        most = min(max(kh * kw * c // TERMS, 1), MAX_SPLIT)
    if most > 1:
        partial, arrived = workspace.partial, workspace.arrived
    grid = fill(x.device, triton.cdiv(n * oh * ow, tile.bm) * triton.cdiv(k, tile.bn) * most, tile.programs)
    descriptor = describe_weights(weight, tile)
    _conv[grid](
        x, weight, descriptor, bias, residual, out, index, offset, partial, arrived, n, most, multiprocessors(x.device),
        h, w, c, k, oh, ow, kh, kw, *stride, *padding, *dilation,
        tile.bm, tile.bn, tile.bk, most > 1, index is not None, residual is not None, activation, precision,
        descriptor is not None,
        num_warps=tile.warps, num_stages=tile.stages, **launch_options(x.device),
    )  # fmt: skip
    return out


def describe_weights(weight, tile):
    """Return a descriptor for the hardware that copies tensor blocks (TMA), or None if tile or weights rule it out."""
    k, c, kh, kw = weight.shape
    whole = c % tile.bk == 0 and k % tile.bn == 0 and weight.data_ptr() % 16 == 0
    if not tile.tma or not whole:
        return None
    rows = weight.permute(0, 2, 3, 1).view(k, kh * kw * c)
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [tile.bn, tile.bk])


class Workspace:
    """Memory for the parts of sums on one device, shared by kernels that run one after the other.

    It never moves, so that a CUDA graph may hold it.
    """

    def __init__(self, device):
        # Sums are shared while all their parts are worked on at once, one by each multiprocessor.
        self.partial = torch.empty(CELLS * multiprocessors(device), device=device)
        self.arrived = torch.zeros(multiprocessors(device), dtype=torch.int32, device=device)
