"""Loads the native part, if it was built, and reports why it is missing otherwise."""

import ctypes
import importlib.util
import os
from functools import cache
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent
# Written by setup.py.
FAILURE, CUDA_FAILURE = PACKAGE / "native_build_failure.txt", PACKAGE / "cuda_build_failure.txt"


def load():
    """Register the native CPU ops, whose schemas must be defined already.

    Returns
    -------
    str or None
        Why the portable implementation stays in use; None if the native one was registered.
    """
    if os.environ.get("DYNEXEC_NATIVE") == "0":
        return "left out by DYNEXEC_NATIVE=0"
    library = next(PACKAGE.glob("libdynexec_cpu.*"), None)
    if library is None:
        if FAILURE.exists():
            return f"the build failed: {FAILURE.read_text().strip()}"
        return "built without torch: `pip install --no-build-isolation .` builds it where torch is installed"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} does not load: {error}"
    return None


@cache
def cuda_missing():
    """Return why :func:`cuda` is not available, or None."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    spec = importlib.util.find_spec("dynexec._cuda")
    if spec is None:
        if CUDA_FAILURE.exists():
            return f"the build failed: {CUDA_FAILURE.read_text().strip()}"
        return (
            "built without CUDA: `pip install --no-build-isolation .` builds it where torch has CUDA and nvcc is found"
        )
    try:
        cuda()
    except ImportError as error:
        return f"{Path(spec.origin).name} does not load: {error}"
    return None


def cuda():
    """Return the native module for GPUs."""
    from dynexec import _cuda

    return _cuda


@cache
def _library():
    return ctypes.CDLL(str(next(PACKAGE.glob("libdynexec_cpu.*"))))


def free_program(handle):
    """Free a program of the CPU engine."""
    _library().dynexec_free_program(ctypes.c_int64(handle))


def build_facts():
    """Return how the native part was built (compiler, flags, torch), or None if there is none."""
    try:
        from dynexec import _C
    except ImportError:
        return None
    return {name: getattr(_C, name) for name in ("compiler", "flags", "torch")}
