"""Keeps the memory of freed activations in the process."""

import ctypes
import ctypes.util
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_LARGEST = 2**31 - 1
_LARGEST_OF_OLD = 32 * 2**20  # of a mapping's threshold: older versions refuse more


@cache
def keep_freed_memory():
    """Ask the C library not to return freed memory to the system, for the whole process; return whether it complies.

    PyTorch takes CPU memory from malloc, and by default glibc returns large blocks to the system as soon as they are
    freed: the activations of every call of a network are then mapped and zeroed again, page by page. Only glibc is
    asked; older versions keep blocks of up to 32 MB.
    """
    try:
        library = ctypes.CDLL(ctypes.util.find_library("c"))
        library.gnu_get_libc_version  # noqa: B018 - only glibc has it
        # This one first: the other alone stops glibc from raising it, and all large blocks would be mapped anew.
        mapped = any(library.mallopt(_M_MMAP_THRESHOLD, most) for most in (_LARGEST, _LARGEST_OF_OLD))
        return bool(mapped and library.mallopt(_M_TRIM_THRESHOLD, _LARGEST))
    except (AttributeError, OSError, TypeError):
        return False
