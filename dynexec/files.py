"""Files that are replaced whole."""

import os
import uuid
from contextlib import contextmanager


@contextmanager
def replacing(path, mode="w", partial=None):
    """Open a file that takes the place of ``path`` at the end of the ``with`` statement.

    Whenever this is interrupted, the old file or the new one is there, whole; after an exception inside, the old one,
    and nothing beside it. A device or a pipe, as ``/dev/stdout``, is written to.

    Parameters
    ----------
    path : path
        Its folder must exist. A link stays one: what it leads to is replaced.
    mode : {"w", "wb"}
    partial : path, optional
        The file that is written meanwhile, in the same folder. Default: one of a new name, since several processes may
        write at once. One that always has the same name is what a killed process leaves behind at most once.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, mode) as file:
            yield file
        return
    target = os.path.realpath(path)
    partial = f"{target}.{uuid.uuid4().hex}.part" if partial is None else partial
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
