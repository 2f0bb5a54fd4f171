"""User-facing ops: argument checks and derivatives around the ops that :mod:`dynexec.dispatch` registers.

:mod:`dynexec.reference` defines what each op computes.
"""

import torch

from dynexec import dispatch, gradients

_INDEX_DTYPES = (torch.int32, torch.int64)
_INTEGER_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def gather_rows(x, index, *, out=None):
    """Gather rows of ``x``, keeping its memory layout (a channels_last batch stays channels_last).

    Parameters
    ----------
    x : tensor ``[N, ...]``
        Any dtype, any row shape.
    index : int32 or int64 tensor ``[M]``
        Row numbers, ``0 <= index < N``. Duplicates are allowed; their gradients add up.
    out : tensor ``[M, ...]``, optional
        Tensor to write the result to, of the dtype and row shape of ``x``. It must not be expanded nor share memory
        with ``x``, and cannot be given where a derivative may be needed.

    Returns
    -------
    tensor ``[M, ...]``
        Its rows have the strides of those of ``x`` if these are free of gaps in memory; otherwise it is contiguous.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not match.
    IndexError
        If a row number is out of range. Checked on a CPU only; on other devices the behaviour is undefined.

    Notes
    -----
    Equivalent to ``x[index]``. Has derivatives of any order, in reverse and forward mode.
    """
    _check_rows(x, "x", index)
    if out is None:
        return gradients.gather_rows(x, index)
    if gradients.needed(x):
        raise ValueError(
            "out must be None where a derivative may be needed: x requires grad, or forward mode or a transform of "
            "torch.func is on"
        )
    _check_match(out, "out", x, "x", index)
    _check_writable(out, "out")
    dispatch.gather_rows_out(x, index, out)
    gradients.count_write(out)
    return out


def scatter_rows(destination, index, rows, *, add=False, relu=False):
    """Return a copy of ``destination`` in which the rows ``index`` are replaced by ``rows``.

    Parameters
    ----------
    destination : tensor ``[N, ...]``
        Any row shape; floating point if ``add`` or ``relu`` is set.
    index : int32 or int64 tensor ``[M]``
        Row numbers, ``0 <= index < N``, each at most once (not checked).
    rows : tensor ``[M, ...]``
        Same dtype and row shape as ``destination``.
    add : bool
        Add the row being replaced: the shortcut of a residual block.
    relu : bool
        Apply a ReLU to the rows that are written, after ``add``.

    Returns
    -------
    tensor ``[N, ...]``
        In the memory layout of ``destination``. Rows that are not in ``index`` are bitwise those of ``destination``.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes do not match.
    IndexError
        If a row number is out of range; nothing is written then. Checked on a CPU only; on other devices the behaviour
        is undefined.

    Notes
    -----
    Equivalent to ``y = destination.clone(); y[index] = relu(rows + y[index])``, without the parts that are not asked
    for. 16-bit floats are rounded after the sum, as in torch. Has the same derivatives as :func:`gather_rows`.
    """
    return _scatter(destination, index, rows, add, relu, in_place=False)


def scatter_rows_(destination, index, rows, *, add=False, relu=False):
    """Write ``rows`` to the rows ``index`` of ``destination``, in place, and return ``destination``.

    Arguments (including ``add`` and ``relu``), errors and derivatives are those of :func:`scatter_rows`. ``rows`` must
    not share memory with ``destination``, and the rows of ``destination`` must not overlap in memory, as those of an
    expanded tensor do (ValueError).

    Notes
    -----
    Equivalent to ``destination[index] = relu(rows + destination[index])``, without the parts that are not asked for.
    Where a gradient is needed, continue with the returned tensor: ``torch.compile`` of torch 2.10 tracks the write
    through that one only.
    """
    return _scatter(destination, index, rows, add, relu, in_place=True)


def plan(decisions, choices):
    """Group the samples by choice, for all blocks at once.

    Parameters
    ----------
    decisions : bool or integer tensor ``[N, L]``
        The choice of each sample in each block, ``0 <= decisions < choices``.
    choices : int
        Number of choices; 2 for bool decisions.

    Returns
    -------
    index : int32 tensor ``[L, N]``
        Sample numbers per block: those of choice 0 first, then choice 1, and so on; ascending within a group.
    offset : int32 tensor ``[L, choices + 1]``
        Group ``c`` of block ``l`` is ``index[l, offset[l, c] : offset[l, c + 1]]``.

    Raises
    ------
    TypeError, ValueError
        If dtype, shape or a value is invalid, or the decisions are batched by ``torch.vmap``. Values are checked on a
        CPU only; on other devices an invalid value leaves the last offset of its block below N.

    Notes
    -----
    Equivalent to ``decisions.t().argsort(dim=1, stable=True)`` and the cumulative sums of the counts per choice.
    """
    if not isinstance(decisions, torch.Tensor):
        raise TypeError(f"decisions must be a bool or integer tensor [N, L], got {type(decisions).__name__}")
    check_dense(decisions, "decisions")
    if decisions.dtype not in _INTEGER_DTYPES:
        raise TypeError(f"decisions must be a bool or integer tensor [N, L], got {decisions.dtype}")
    if decisions.dim() != 2:
        raise ValueError(f"decisions must have shape [N, L], got {tuple(decisions.shape)}")
    if not torch.compiler.is_compiling() and _is_batched(decisions):
        raise ValueError(
            "decisions must be those of one batch, got several under torch.vmap, whose groups differ in size: "
            'call it for each, or decide with mode="capacity" or "soft", which computes every sample'
        )
    check_choices(choices)
    if choices < 1 or (decisions.dtype == torch.bool and choices < 2):
        raise ValueError(f"choices must be at least 1, and at least 2 for bool decisions, got {choices}")
    return dispatch.plan(decisions, choices)


def _is_batched(x):
    """Whether ``x`` is batched by ``torch.vmap``, possibly beneath other ``torch.func`` transforms."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def kind_of(value):
    """Return a tensor's dtype, or the type name of any other value: for errors."""
    return value.dtype if isinstance(value, torch.Tensor) else type(value).__name__


def counted(number, noun):
    """Return a number of things in words: "1 block", "2 blocks"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def check_floating(value, name, shape):
    """Raise TypeError unless ``value`` is a floating-point tensor; ``shape``, a text, is for the message."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor {shape}, got {kind_of(value)}")


def check_dtype(x, name, dtype):
    """Raise TypeError unless ``x`` has ``dtype``, that of the parameters, or autocast converts it to what it needs."""
    device = x.device.type
    converted = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if x.dtype != dtype and not (converted and x.is_floating_point()):
        raise TypeError(f"{name} must be {dtype}, as the parameters are, got {x.dtype}")


def check_bool(value, name, shape):
    """Raise TypeError unless ``value`` is a bool tensor; ``shape``, a text, is for the message."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor {shape}, got {kind_of(value)}")


def check_dense(x, name):
    """Raise TypeError if a tensor is sparse, nested or otherwise not strided."""
    if x.is_nested or x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")


def check_choices(choices):
    """Raise TypeError unless ``choices`` is an int."""
    if not isinstance(choices, int) or isinstance(choices, bool):
        raise TypeError(f"choices must be an int, got {choices!r}")


def _check_rows(x, name, index):
    if not (isinstance(x, torch.Tensor) and isinstance(index, torch.Tensor)):
        raise TypeError(f"{name} and index must be tensors, got {type(x).__name__} and {type(index).__name__}")
    check_dense(x, name)
    check_dense(index, "index")
    if x.dim() == 0:
        raise ValueError(f"{name} must have rows: shape [N, ...], got a tensor of no dimensions")
    if index.dtype not in _INDEX_DTYPES:
        raise TypeError(f"index must be int32 or int64, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"index must have shape [M], got {tuple(index.shape)}")
    if index.device != x.device:
        raise ValueError(f"index must be on the device of {name}, {x.device}, got {index.device}")


def _check_match(rows, name, x, x_name, index):
    if not isinstance(rows, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(rows).__name__}")
    check_dense(rows, name)
    if rows.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of {x_name}, {x.dtype}, got {rows.dtype}")
    if rows.shape[1:] != x.shape[1:] or rows.shape[:1] != index.shape:
        raise ValueError(
            f"{name} must have shape {(index.shape[0], *x.shape[1:])}: one row of {x_name} per element of index, "
            f"got {tuple(rows.shape)}"
        )
    if rows.device != x.device:
        raise ValueError(f"{name} must be on the device of {x_name}, {x.device}, got {rows.device}")


def _check_writable(x, name):
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return
    reach = 0  # of the dimensions so far, from the first element on
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size > 1):
        if stride <= reach:
            raise ValueError(
                f"{name} must not be expanded, nor have rows or elements that overlap in memory in other ways: got "
                f"shape {tuple(x.shape)} with strides {x.stride()}"
            )
        reach += (size - 1) * stride


def check_scatter(destination, index, rows, add, relu):
    """Raise TypeError or ValueError unless ``rows`` can replace the rows ``index`` of ``destination``."""
    _check_rows(destination, "destination", index)
    _check_match(rows, "rows", destination, "destination", index)
    if (add or relu) and not destination.is_floating_point():
        raise TypeError(f"destination must be floating point where add or relu is asked, got {destination.dtype}")


def _scatter(destination, index, rows, add, relu, in_place):
    check_scatter(destination, index, rows, add, relu)
    if in_place:
        _check_writable(destination, "destination")
    return gradients.scatter_rows(destination, index, rows, add, relu, in_place=in_place)
