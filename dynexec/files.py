"""Atomic replacement of files."""

import os
import uuid
from contextlib import contextmanager


@contextmanager
def replacing(path, mode="w", suffix=None):
    """Open a file that replaces ``path`` when the ``with`` statement ends.

    If this is interrupted at any point, either the old file or the new one is there, complete. An exception inside
    leaves the old file, and nothing beside it. A device or a pipe, such as ``/dev/stdout``, is written to directly.

    Parameters
    ----------
    path : path
        Its folder must exist. A link stays a link: its target is replaced.
    mode : {"w", "wb"}
    suffix : str, optional
        Appended to the name of the replaced file, it names the file written meanwhile. Default: a new one each time,
        since several processes may write at once. With a fixed one, killed processes leave at most one file behind.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, mode) as file:
            yield file
        return
    target = os.path.realpath(path)
    partial = target + (f".{uuid.uuid4().hex}.part" if suffix is None else suffix)
    try:
        with open(partial, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        if os.path.lexists(partial):
            os.unlink(partial)
        raise
