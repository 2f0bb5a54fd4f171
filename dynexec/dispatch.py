"""Registers the ops with PyTorch's dispatcher: schemas, implementations per device, fakes and FLOP formulas.

The portable implementation is :mod:`dynexec.reference`, behind checks of the values where these can be read without
waiting for a device. Native implementations are registered under the same schemas when their library is loaded,
Triton's where there is a GPU.
"""

import importlib.util
from contextlib import contextmanager, nullcontext

import torch
from torch.utils.flop_counter import register_flop_formula

from dynexec import native, reference

_library = torch.library.Library("dynexec", "DEF")
_library.define("gather_rows(Tensor x, Tensor index) -> Tensor")
_library.define("gather_rows_out(Tensor x, Tensor index, Tensor(a!) out) -> ()")
_library.define("scatter_rows_(Tensor(a!) destination, Tensor index, Tensor rows, bool add, bool relu) -> ()")
# The two that training needs: the ReLU behind a block leaves a bool per element for the backward pass.
_library.define("merge_rows(Tensor rest, Tensor index, Tensor rows, bool add, bool relu) -> (Tensor, Tensor)")
_library.define("gather_passed(Tensor x, Tensor index, Tensor passed) -> Tensor")
_library.define("plan(Tensor decisions, int choices) -> (Tensor, Tensor)")
# The CPU engine, native only: see dynexec/executors/engine.py.
_library.define("vector_width(Tensor like) -> int")
_library.define("peak_rate(Tensor like) -> float")
_library.define("make_program(Tensor code, Tensor weights) -> int")
_library.define("run_program(Tensor x, Tensor decisions, int program, int group, bool together) -> Tensor")
_library.define(
    "profile_program(Tensor x, Tensor decisions, int program, int group, bool together) -> (Tensor, Tensor)"
)


def first_outside(decisions, choices):
    """Return a message naming the first of ``decisions`` outside ``0..choices - 1``, or None. Reads the device."""
    decisions = decisions.long()  # narrower integers may not hold the number of choices
    outside = ((decisions < 0) | (decisions >= choices)).nonzero()
    if len(outside) == 0:
        return None
    sample, block = outside[0].tolist()
    return f"decisions must be in 0..{choices - 1}, got {decisions[sample, block].item()} at [{sample}, {block}]"


def _implement(name, kernel, fake):
    """Register ``kernel`` for every device, ``fake`` for shape inference, and zero FLOPs; return the op."""
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dynexec::{name}", fake, lib=_library)
    op = getattr(torch.ops.dynexec, name)
    # torch's flop counter counts matrix products, convolutions and attention; copies and pointwise work are zero.
    register_flop_formula(op)(_no_flops)
    return op.default


def _no_flops(*args, out_val=None, **kwargs):
    return 0


def _check_range(index, size):
    # Only where looking costs no wait for a device.
    if index.device.type == "cpu" and index.numel():
        smallest, largest = (int(value) for value in index.aminmax())
        if smallest < 0 or largest >= size:
            raise IndexError(f"index must be in 0..{size - 1}, got {smallest if smallest < 0 else largest}")


def _check_writable_rows(x, name):
    if x.shape[0] > 1 and x.stride(0) < x.shape[1:].numel() and reference.has_dense_rows(x):
        raise ValueError(
            f"{name} must not have rows that overlap in memory, got stride {x.stride(0)} for rows of "
            f"{x.shape[1:].numel()}"
        )


def _portable_gather_rows(x, index):
    _check_range(index, x.shape[0])
    return reference.gather_rows(x, index)


def _portable_gather_rows_out(x, index, out):
    _check_range(index, x.shape[0])
    _check_writable_rows(out, "out")
    reference.gather_rows_out(x, index, out)


def _portable_scatter_rows_(destination, index, rows, add, relu):
    _check_range(index, destination.shape[0])
    _check_writable_rows(destination, "destination")
    reference.scatter_rows_(destination, index, rows, add=add, relu=relu)


def _portable_merge_rows(rest, index, rows, add, relu):
    _check_range(index, rest.shape[0])
    return reference.merge_rows(rest, index, rows, add=add, relu=relu)


def _portable_gather_passed(x, index, passed):
    _check_range(index, x.shape[0])
    return reference.gather_passed(x, index, passed)


def _portable_plan(decisions, choices):
    if decisions.device.type == "cpu" and (outside := first_outside(decisions, choices)):
        raise ValueError(outside)
    return reference.plan(decisions, choices)


def _fake_gather_rows(x, index):
    return reference.empty_rows(x, index.shape[0])


def _fake_gather_rows_out(x, index, out):
    return None


def _fake_scatter_rows_(destination, index, rows, add, relu):
    return None


def _fake_merge_rows(rest, index, rows, add, relu):
    passed = reference.empty_rows(rest, index.shape[0], torch.bool) if relu else rest.new_empty(0, dtype=torch.bool)
    return torch.empty_like(rest), passed


def _fake_gather_passed(x, index, passed):
    return reference.empty_rows(x, index.shape[0])


def _fake_plan(decisions, choices):
    samples, blocks = decisions.shape
    index = decisions.new_empty((blocks, samples), dtype=torch.int32)
    return index, decisions.new_empty((blocks, choices + 1), dtype=torch.int32)


gather_rows = _implement("gather_rows", _portable_gather_rows, _fake_gather_rows)
gather_rows_out = _implement("gather_rows_out", _portable_gather_rows_out, _fake_gather_rows_out)
scatter_rows_ = _implement("scatter_rows_", _portable_scatter_rows_, _fake_scatter_rows_)
merge_rows = _implement("merge_rows", _portable_merge_rows, _fake_merge_rows)
gather_passed = _implement("gather_passed", _portable_gather_passed, _fake_gather_passed)
plan = _implement("plan", _portable_plan, _fake_plan)

_MOVABLE = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_MOVABLE |= {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def triton_missing():
    """Return why there are no Triton kernels, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: `pip install 'dynexec[triton]'` on Linux"
    return None


def _triton_gather_rows(x, index):
    out = reference.empty_rows(x, index.shape[0])
    _triton_gather_rows_out(x, index, out)
    return out


def _triton_gather_rows_out(x, index, out):
    _check_writable_rows(out, "out")
    if not _triton_moves(x, index, out, scatter=False):
        reference.gather_rows_out(x, index, out)


def _triton_scatter_rows_(destination, index, rows, add, relu):
    _check_writable_rows(destination, "destination")
    if not _triton_moves(destination, index, rows, scatter=True, add=add, relu=relu):
        reference.scatter_rows_(destination, index, rows, add=add, relu=relu)


def _triton_merge_rows(rest, index, rows, add, relu):
    output, passed = rest.clone(), None
    if relu:
        passed = reference.empty_rows(output, index.shape[0], torch.bool)
    if not _triton_moves(output, index, rows, passed, scatter=True, add=add, relu=relu):
        return reference.merge_rows(rest, index, rows, add=add, relu=relu)
    return output, rest.new_empty(0, dtype=torch.bool) if passed is None else passed


def _triton_gather_passed(x, index, passed):
    out = reference.empty_rows(x, index.shape[0])
    if not _triton_moves(x, index, out, passed, scatter=False):
        return reference.gather_passed(x, index, passed)
    return out


def _triton_moves(whole, index, part, passed=None, **how):
    """Move rows and return True, or return False if the kernel does not support tensors of this kind."""
    from dynexec.kernels.rows import move_rows  # not before it is needed: importing Triton takes a second

    layout = whole.stride()[1:]
    if part.stride()[1:] != layout or not (passed is None or passed.stride()[1:] == layout):
        return False
    if not reference.has_dense_rows(whole):
        return False
    if whole.dtype == torch.bool:
        whole, part = whole.view(torch.uint8), part.view(torch.uint8)
    if whole.dtype not in _MOVABLE:
        return False
    with on_device(whole.device):
        move_rows(whole, part, index.contiguous(), passed, **how)
    return True


def _triton_plan(decisions, choices):
    from dynexec.kernels.plan import plan

    with on_device(decisions.device):
        return plan(decisions, choices)


def on_device(device):
    """Context manager that makes a GPU the current one, which is where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def for_frozen(device):
    """:func:`on_device` with autocast disabled: frozen networks run in their own dtype."""
    with on_device(device):
        if not torch.is_autocast_enabled(device.type):
            yield
            return
        with torch.autocast(device.type, enabled=False):
            yield


if torch.cuda.is_available() and torch.version.hip is None and triton_missing() is None:
    _library.impl("gather_rows", _triton_gather_rows, "CUDA")
    _library.impl("gather_rows_out", _triton_gather_rows_out, "CUDA")
    _library.impl("scatter_rows_", _triton_scatter_rows_, "CUDA")
    _library.impl("merge_rows", _triton_merge_rows, "CUDA")
    _library.impl("gather_passed", _triton_gather_passed, "CUDA")
    _library.impl("plan", _triton_plan, "CUDA")

# Why the native CPU implementations are not in use, or None where they are.
native_missing = native.load()
