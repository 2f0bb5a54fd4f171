"""What is made when it is first needed, kept for the few sizes that were used last."""

from threading import Lock

IMAGE_SIZES = 8  # for so many of them programs are kept


class Recent(dict):
    """A dict of at most ``most`` entries: the one not used for longest gives way. ``find`` may be called by any thread.

    Parameters
    ----------
    most : int
    """

    def __init__(self, most):
        super().__init__()
        self.most, self._lock = most, Lock()

    def find(self, key, make):
        """The entry ``key``, from ``make()`` where there is none; meanwhile other threads wait."""
        with self._lock:
            if key in self:
                value = self.pop(key)
            else:
                value = make()
                if len(self) == self.most:
                    del self[next(iter(self))]
            self[key] = value  # the last one again
            return value
