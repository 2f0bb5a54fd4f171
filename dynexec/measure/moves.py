"""Counts the bytes that gathering and scattering rows moves, while it happens."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dynexec import dispatch  # noqa: F401  which defines the ops

_aten, _ours = torch.ops.aten, torch.ops.dynexec


class MoveCounter(TorchDispatchMode):
    """Within its ``with`` statement, adds up the bytes read and written where rows are gathered and put back.

    It counts row ops and PyTorch's indexing and joining of rows, for floating-point tensors.

    Attributes
    ----------
    bytes : int
        Bytes counted so far.
    paused : bool
        Whether counting is suspended.
    """

    def __init__(self):
        super().__init__()
        self.bytes, self.paused = 0, False

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        if not self.paused and function in _BYTES:
            self.bytes += _BYTES[function](found, *arguments, **(options or {}))
        return found


def _size(tensor):
    return tensor.numel() * tensor.element_size() if tensor.is_floating_point() else 0


def _gathered(found, *arguments, **options):
    return 2 * _size(found)


def _scattered(found, destination, index, rows, add, relu):
    return (3 if add else 2) * _size(rows)


def _joined(found, tensors, dim=0):
    return 2 * _size(found) if dim == 0 else 0


# Those of index_copy and index_add that are not in place copy their first argument before.
_BYTES = {
    _ours.gather_rows.default: _gathered,
    _ours.gather_rows_out.default: lambda found, x, index, out: 2 * _size(out),
    _ours.scatter_rows_.default: _scattered,
    _ours.merge_rows.default: lambda found, rest, index, rows, add, relu: (3 if add else 2) * _size(rows),
    _ours.gather_passed.default: _gathered,
    _aten.index.Tensor: _gathered,
    _aten.index_select.default: _gathered,
    _aten.index_put_.default: lambda found, x, indices, values, *rest: 2 * _size(values),
    _aten.index_copy.default: lambda found, x, dim, index, rows: 2 * (_size(x) + _size(rows)),
    _aten.index_add.default: lambda found, x, dim, index, rows, **rest: 2 * _size(x) + 3 * _size(rows),
    _aten.cat.default: _joined,
}
