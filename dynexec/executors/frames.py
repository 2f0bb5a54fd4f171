"""The tensors of one call of a :class:`LaunchProgram`."""

import torch

from dynexec import dispatch


class Frame:
    """The values of one call."""

    def __init__(self, x, workspace, dense, values=()):
        self.x, self.workspace, self.dense, self.values = x, workspace, dense, dict(values)

    def copy(self):
        """With the same tensors, but forgetting them by itself."""
        return Frame(self.x, self.workspace, self.dense, self.values)

    def get(self, value):
        """A tensor, or None where there is none yet."""
        return self.values.get(id(value))

    def target(self, value):
        """The tensor that an instruction must write to, or None where it may give a new one."""
        return self.get(value)

    def read(self, value):
        """The tensor of a value that an instruction reads; None for None."""
        return None if value is None else self.values[id(value)]

    def output(self, value):
        """A tensor to write to, new where there is none yet."""
        if id(value) not in self.values:
            shape = len(self.x), *value.shape
            new = torch.empty(shape, dtype=self.x.dtype, device=self.x.device, memory_format=torch.channels_last)
            self.values[id(value)] = new
        return self.values[id(value)]


class Part(Frame):
    """The same for some samples, whose rows are gathered when they are read."""

    def __init__(self, whole, index):
        super().__init__(whole.x[: len(index)], whole.workspace, True)
        self.whole, self.index = whole, index

    def target(self, value):
        return None

    def read(self, value):
        if value is not None and id(value) not in self.values:
            self.values[id(value)] = dispatch.gather_rows(self.whole.read(value), self.index)
        return super().read(value)
