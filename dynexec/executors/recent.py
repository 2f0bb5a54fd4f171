"""Values that are made when first needed, and kept for the few sizes that were used last."""

from threading import Lock

IMAGE_SIZES = 8  # for so many of them programs are kept


class Recent(dict):
    """A dict of at most ``most`` entries that drops the least recently used one. Any thread may call ``find``.

    Parameters
    ----------
    most : int
    """

    def __init__(self, most):
        super().__init__()
        self.most, self._lock = most, Lock()

    def find(self, key, make):
        """Return the entry ``key``, made by ``make()`` if there is none; other threads wait meanwhile."""
        with self._lock:
            if key in self:
                value = self.pop(key)
            else:
                value = make()
                if len(self) == self.most:
                    del self[next(iter(self))]
            self[key] = value  # the last one again
            return value
