"""Tile sizes, from tables: nothing is tuned while a network runs."""

from dataclasses import dataclass, replace
from functools import cache
from math import log2

import torch

from dynexec.kernels.measured_tiles import CONVOLUTIONS, GROUPED, PAIRS


@dataclass(frozen=True)
class Tile:
    """Tile of a matrix product: ``bm`` pixels by ``bn`` channels, ``bk`` terms of the sum at a time."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    programs: int  # that a multiprocessor runs at once
    tma: bool = False  # whether the hardware copies the weights block by block (Hopper), in `conv`


# {largest number of output channels: {largest number of pixels: tile}}, None: more. For 16-bit numbers; estimates, by
# what the machine code uses.
_AMPERE = {
    16: {None: Tile(128, 16, 32, 4, 4, 3)},
    32: {None: Tile(128, 32, 32, 4, 4, 2)},
    64: {4096: Tile(64, 64, 32, 4, 4, 2), None: Tile(128, 64, 32, 4, 4, 2)},
    None: {1024: Tile(64, 64, 32, 4, 4, 2), None: Tile(128, 128, 32, 8, 4, 1)},
}
# {largest number of channels between two convolutions: tile}; only benchmarks use the last one.
_AMPERE_PAIRS = {64: Tile(64, 64, 32, 4, 3, 2), 128: Tile(64, 64, 32, 4, 3, 1), 256: Tile(64, 32, 32, 8, 3, 1)}


def choose_tile(pixels, channels, taps, depth, dtype, architecture, grouped=False):
    """Return the tile for a convolution from ``depth`` to ``channels`` channels with ``taps`` weights per pair of them.

    ``pixels``: of the output, if all samples keep the block. ``architecture``: 90 for Hopper, where, as on the large
    Blackwell GPUs, the tile is that of the most similar measured convolution; others get Ampere's, 80 and 86.
    ``grouped``: for `grouped_conv`, in which all samples have work.
    """
    if not _is_large(architecture):
        tile = _find(_find(_AMPERE, channels), pixels)
    else:
        tile = _nearest(taps > 1, grouped, pixels, channels, taps * depth)
    if dtype == torch.float32 and _is_large(architecture):
        wide = tile.bm * tile.bn >= 128 * 128  # which is more than the registers hold
        tile = replace(tile, bn=tile.bn // 2 if wide else tile.bn, programs=min(tile.programs, 2), tma=False)
    return _narrow(tile, depth, dtype)


def choose_pair_tile(pixels, middle, depth, dtype, architecture):
    """Return the tile for two convolutions in one kernel with up to 256 channels between them."""
    if not _is_large(architecture):
        tile = _find(_AMPERE_PAIRS, middle)
    else:
        tile = _nearest_pair(pixels, middle)
    tile = _narrow(tile, depth, dtype)
    return replace(tile, bn=tile.bn // 2, stages=2, programs=1) if dtype == torch.float32 else tile


def _is_large(architecture):
    """Whether multiprocessors have the shared memory that Hopper's tiles need: workstations' (sm_120) do not."""
    return architecture // 10 in (9, 10)


@cache
def _nearest(window, grouped, *sizes):
    """Return the measured tile whose sizes differ least, among those with a window of several pixels or without."""
    rows = [row for row in (*(GROUPED if grouped else ()), *CONVOLUTIONS) if (row[0] > 1) == window]
    row = min(rows, key=lambda row: _distance((row[1], row[2], row[0] * row[3]), sizes))
    tile = Tile(*row[4])
    # Whether copying weights in blocks wins was measured for each kernel by itself.
    return tile if not grouped or row in GROUPED else replace(tile, tma=False)


@cache
def _nearest_pair(pixels, middle):
    middle = min((row[1] for row in PAIRS if row[1] >= middle), default=256)  # a tile holds them all
    return Tile(*min((row for row in PAIRS if row[1] == middle), key=lambda row: _distance(row[:1], (pixels,)))[2])


def _distance(measured, sizes):
    return sum(log2(a / b) ** 2 for a, b in zip(measured, sizes, strict=True))


def _find(table, size):
    return next(value for largest, value in table.items() if largest is None or size <= largest)


def _narrow(tile, depth, dtype):
    """Narrow the steps: float32 takes twice the memory, and with few channels a step need not read many."""
    bk = tile.bk // 2 if dtype == torch.float32 else tile.bk
    while bk > 16 and bk // 2 >= depth:
        bk //= 2
    return replace(tile, bk=bk)
