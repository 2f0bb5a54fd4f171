"""Sizes of tiles, from small tables: nothing is tuned while a network runs.

Their values are estimates, by what the machine code uses and what the roofline model expects (docs/gpu-notes.md), not
yet by time on a GPU: with sums shared by several programs, large tiles win down to about a thousand pixels.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tile:
    """Of a matrix product: ``bm`` pixels by ``bn`` channels, ``bk`` terms of the sum at a time."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    programs: int  # that a multiprocessor runs at once


# {largest number of output channels: {largest number of pixels: tile}}, None: more. For 16-bit numbers.
_HOPPER = {
    16: {None: Tile(128, 16, 64, 4, 4, 3)},
    32: {None: Tile(128, 32, 64, 4, 4, 3)},
    64: {4096: Tile(64, 64, 64, 4, 4, 3), None: Tile(128, 64, 64, 4, 4, 2)},
    None: {1024: Tile(64, 64, 64, 4, 4, 3), None: Tile(128, 128, 64, 8, 4, 1)},
}
_AMPERE = {
    16: {None: Tile(128, 16, 32, 4, 4, 3)},
    32: {None: Tile(128, 32, 32, 4, 4, 2)},
    64: {4096: Tile(64, 64, 32, 4, 4, 2), None: Tile(128, 64, 32, 4, 4, 2)},
    None: {1024: Tile(64, 64, 32, 4, 4, 2), None: Tile(128, 128, 32, 8, 4, 1)},
}
# {largest number of channels between two convolutions: tile}.
_HOPPER_PAIRS = {64: Tile(128, 64, 64, 8, 4, 2), 128: Tile(128, 64, 64, 8, 3, 1), 256: Tile(64, 64, 64, 8, 3, 1)}
_AMPERE_PAIRS = {64: Tile(64, 64, 32, 4, 3, 2), 128: Tile(64, 64, 32, 4, 3, 1), 256: Tile(64, 32, 32, 8, 3, 1)}


def choose_tile(pixels, channels, depth, dtype, architecture):
    """The tile for a convolution of up to ``pixels`` output pixels from ``depth`` to ``channels`` channels.

    ``architecture``: 80 and 86 for Ampere, 90 for Hopper.
    """
    return _narrow(_find(_find(_HOPPER if architecture >= 90 else _AMPERE, channels), pixels), depth, dtype)


def choose_pair_tile(middle, depth, dtype, architecture):
    """The tile for two convolutions in one kernel with up to 256 channels between them."""
    tile = _narrow(_find(_HOPPER_PAIRS if architecture >= 90 else _AMPERE_PAIRS, middle), depth, dtype)
    return replace(tile, bn=tile.bn // 2, stages=2, programs=1) if dtype == torch.float32 else tile


def _find(table, size):
    return next(value for largest, value in table.items() if largest is None or size <= largest)


def _narrow(tile, depth, dtype):
    """float32 takes twice the memory; of a few channels a step need not read many."""
    bk = tile.bk // 2 if dtype == torch.float32 else tile.bk
    while bk > 16 and bk // 2 >= depth:
        bk //= 2
    return replace(tile, bk=bk)
