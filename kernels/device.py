"""What the kernels share: which rows to work on, activations, windows at image borders, grid sizes."""

from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
import triton
import triton.language as tl

# For ``triton.jit``: one compilation for all numbers, and for offsets of any block: every fourth is aligned.
ONCE = {
    "do_not_specialize": ["samples", "most", "multiprocessors"],
    "do_not_specialize_on_alignment": ["index_ptr", "offset_ptr"],
}


@triton.jit
def count_rows(offset_ptr, samples, GATHERED: tl.constexpr):
    """Return the position of the first row number to work on, and how many there are."""
    start = 0
    count = samples
    if GATHERED:
        start = tl.load(offset_ptr)
        count = tl.load(offset_ptr + 1) - start
    return start, count


@triton.jit
def find_pixels(first, pixels, start, index_ptr, PIXELS, BLOCK: tl.constexpr, GATHERED: tl.constexpr):
    """Return the sample (int64), number within it, and validity of the pixels ``first``.. of all rows together."""
    number = first + tl.arange(0, BLOCK)
    valid = number < pixels
    row = number // PIXELS
    sample = row
    if GATHERED:
        sample = tl.load(index_ptr + start + row, mask=valid, other=0)
    return sample.to(tl.int64), number - row * PIXELS, valid


@triton.jit
def inside_bits(top, left, H, W, KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr):
    """Return, for windows that begin at (top, left), bit ``kh * KW + kw``: whether that tap is inside the image."""
    one_row: tl.constexpr = (1 << KW) - 1
    one_column: tl.constexpr = ((1 << (KH * KW)) - 1) // one_row
    rows = top * 0
    columns = left * 0
    for kh in tl.static_range(KH):
        inside = (top + kh * DH >= 0) & (top + kh * DH < H)
        rows |= tl.where(inside, one_row << (kh * KW), 0)
    for kw in tl.static_range(KW):
        inside = (left + kw * DW >= 0) & (left + kw * DW < W)
        columns |= tl.where(inside, one_column << kw, 0)
    return rows & columns


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Apply the activation in float32; NaN stays NaN, as in torch."""
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        x = tl.clamp(x, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "hardswish":
        x = x * tl.clamp(x + 3.0, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL) / 6.0
    elif ACTIVATION == "sigmoid":
        x = tl.sigmoid(x)
    else:
        tl.static_assert(ACTIVATION is None)
    return x


@triton.jit
def begin(PDL: tl.constexpr):
    """Begin a program, even one without work: nothing may be read before the previous kernel is done.

    The next kernel may be placed on the device at once: all programs of this one are there, and it waits likewise.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@cache
def multiprocessors(device):
    """Return the number of multiprocessors of a GPU, or a stand-in where the interpreter runs kernels on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


_assumed = ContextVar("assumed", default=90)


@contextmanager
def assume_architecture(number):
    """Context manager that sets the architecture for launches on other devices than GPUs."""
    token = _assumed.set(number)
    try:
        yield
    finally:
        _assumed.reset(token)


def architecture(device):
    """Return the architecture of a GPU, 90 for sm_90, by which tiles are chosen."""
    return _capability(device) if device.type == "cuda" else _assumed.get()


@cache
def _capability(device):
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


_plain = ContextVar("plain", default=False)


@contextmanager
def plain_launches():
    """Context manager to launch kernels without regard to the previous one, for graphs where it may be no kernel."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def launch_options(device):
    """Return whether kernels may be placed before the previous one is done (Hopper and later), and how to ask."""
    if device.type == "cpu" or architecture(device) < 90 or _plain.get():
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


def fill(device, tiles, per_multiprocessor):
    """Return a grid: one program per tile, but not more than the device runs at once."""
    return (max(1, min(tiles, per_multiprocessor * multiprocessors(device))),)
