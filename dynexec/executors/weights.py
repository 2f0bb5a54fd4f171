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

    def conv(self, conv, op, tile=0):
        """Positions of weights and bias of a :class:`PackedConv` that runs as ``op``; Winograd has a ``tile``."""
        key = id(conv), op, tile
        if key not in self._positions:
            if op == "depthwise":
                weight = self._pad(conv.weight.permute(1, 2, 3, 0))
            elif op == "winograd":
                planes = _winograd(conv.weight, tile).permute(2, 3, 1, 0).flatten(0, 1)
                weight = torch.cat([self._pack(plane) for plane in planes])
            else:
                weight = self._pack(conv.weight.permute(2, 3, 1, 0).flatten(0, 2))
            self._positions[key] = conv, (self._add(weight), self._add(self._pad(conv.bias)))
        return self._positions[key][1]

    def tensor(self):
        """All of them, float32; nothing can be added any more."""
        if self._tensor is None:
            self._tensor = torch.cat([torch.zeros(0), *self._parts])
            self._parts = None
        return self._tensor

    def _add(self, values):
        self._parts.append(values.reshape(-1))
        self._size += values.numel()
        return self._size - values.numel()

    def _pad(self, values):
        return F.pad(values, (0, -values.shape[-1] % self.width))

    def _pack(self, rows):
        """[reduction, channels] as panels, flat."""
        rows = self._pad(rows)
        vectors = rows.shape[1] // self.width
        widths = [_PANEL * self.width] * (max(1, vectors // 2) - 1)
        widths.append(rows.shape[1] - sum(widths))
        return torch.cat([part.reshape(-1) for part in rows.split(widths, dim=1)])


# By tile, from a kernel of 3 to 4 or 6 values: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
# 2016, 4.1 and 4.3.
_WINOGRAD = {
    2: [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
    4: [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
}


def _winograd(weight, tile):
    """[channels out, channels in, 3, 3] to [..., tile + 2, tile + 2]."""
    transform = torch.tensor(_WINOGRAD[tile], dtype=torch.float64)
    return (transform @ weight.double() @ transform.t()).float()
