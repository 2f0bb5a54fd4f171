"""Weights in the order in which the engine reads them."""

import torch
import torch.nn.functional as F

from dynexec.executors.engine import vector_width

_PANEL = 2  # vectors; kPanel in csrc/cpu/kernels.h


class Weights:
    """Packed weights of a program, shared by the programs for all image sizes."""

    def __init__(self):
        self.width = vector_width()
        self._parts, self._size, self._tensor = [], 0, None
        self._positions = {}  # by identity, which holds while the convolution is kept

    def conv(self, conv, depthwise):
        """Return the positions of weights and bias of a :class:`PackedConv` or :class:`PackedLinear`.

        A ``depthwise`` one has its channels side by side, not in panels.
        """
        if id(conv) not in self._positions:
            if depthwise:
                weight = self._pad(conv.weight.permute(1, 2, 3, 0))
            else:
                weight = self._pack(conv.weight.permute(2, 3, 1, 0).flatten(0, 2))
            self._positions[id(conv)] = conv, (self._add(weight), self._add(self._pad(conv.bias)))
        return self._positions[id(conv)][1]

    def tensor(self):
        """Return all weights, float32; nothing can be added afterwards."""
        if self._tensor is None:
            self._tensor = torch.cat([torch.zeros(0, dtype=torch.float32, device="cpu"), *self._parts])
            self._parts = None
        return self._tensor

    def _add(self, values):
        self._parts.append(values.reshape(-1))
        self._size += values.numel()
        return self._size - values.numel()

    def _pad(self, values):
        return F.pad(values, (0, -values.shape[-1] % self.width))

    def _pack(self, rows):
        """Pack ``[reduction, channels]`` into panels, flat."""
        rows = self._pad(rows)
        vectors = rows.shape[1] // self.width
        widths = [_PANEL * self.width] * (max(1, vectors // 2) - 1)
        widths.append(rows.shape[1] - sum(widths))
        return torch.cat([part.reshape(-1) for part in rows.split(widths, dim=1)])
