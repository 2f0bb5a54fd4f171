"""Measured peak rates of a device: arithmetic and memory."""

import time
from functools import cache

import torch

# Of the matrices and of the copy on a CPU; on a GPU eight times as many, or starting it would be part of the time.
_SIZE = 1024
_BYTES = 128 * 2**20  # far more than caches hold
_REPEATS, _BUDGET = 10, 1.0  # runs of which the least time counts, unless they take more seconds than that


def matrix_rate(device, dtype):
    """Measure the floating-point operations per second of a large matrix product, with torch's current thread count."""
    return _matrix_rate(device, dtype, torch.get_num_threads())


def copy_rate(device):
    """Measure the bytes per second, read plus written, of a large copy, with torch's current thread count."""
    return _copy_rate(device, torch.get_num_threads())


@cache
def _matrix_rate(device, dtype, threads):
    size = 8 * _SIZE if device.type == "cuda" else _SIZE
    generator = torch.Generator(device).manual_seed(0)
    # A GPU multiplies ones faster than anything else.
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.zeros_like(a)
    return 2 * size**3 / _least_seconds(lambda: torch.mm(a, b, out=out), device)


@cache
def _copy_rate(device, threads):
    size = 8 * _BYTES if device.type == "cuda" else _BYTES
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _least_seconds(lambda: target.copy_(source), device)


def _least_seconds(function, device):
    times = []
    while len(times) < _REPEATS and sum(times) < _BUDGET:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
