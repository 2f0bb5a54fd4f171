"""Keeps the memory of freed activations in the process."""

import ctypes
import ctypes.util
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_LARGEST = 2**31 - 1


@cache
def keep_freed_memory():
    """Ask the C library not to give freed memory back to the system, for the whole process; return whether it will.

    PyTorch takes CPU memory from malloc, and by default glibc gives large blocks back as soon as they are freed: every
    call of a network then has its activations mapped and zeroed anew, page by page. Only glibc is asked.
    """
    try:
        library = ctypes.CDLL(ctypes.util.find_library("c"))
        library.gnu_get_libc_version  # noqa: B018 - only glibc has it
        return bool(library.mallopt(_M_TRIM_THRESHOLD, _LARGEST) and library.mallopt(_M_MMAP_THRESHOLD, _LARGEST))
    except (AttributeError, OSError, TypeError):
        return False
