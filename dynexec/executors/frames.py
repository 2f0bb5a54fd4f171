"""The tensors of one call of a :class:`LaunchProgram`."""

import torch


class Frame:
    """The values of one call.

    ``dense``: convolutions in gates are the library's, on all samples, except short ones that write over existing
    values. ``static``: there are no gates; every sample keeps every block. ``others``, if ``dense``: index and offset
    of the rows that do not pass the gate that the current instruction is behind.
    """

    def __init__(self, x, workspace, dense=False, static=False):
        self.x, self.workspace, self.dense, self.static, self.values = x, workspace, dense, static, {}
        self.others = None

    def get(self, value):
        """Return the tensor of a value, or None if there is none yet."""
        return self.values.get(id(value))

    def read(self, value):
        """Return the tensor of a value that an instruction reads; None for None."""
        return None if value is None else self.values[id(value)]

    def output(self, value):
        """Return a tensor to write a value to, a new one if there is none yet."""
        if id(value) not in self.values:
            shape = len(self.x), *value.shape
            new = torch.empty(shape, dtype=self.x.dtype, device=self.x.device, memory_format=torch.channels_last)
            self.values[id(value)] = new
        return self.values[id(value)]
