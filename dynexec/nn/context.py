"""``decide``: which samples the dynamic blocks inside a ``with`` statement run on."""

import threading
from contextlib import contextmanager

import torch

from dynexec.ops import check_dense, check_floating
from dynexec.route import Route

MODES = ("exact", "capacity", "soft")


class _Active(threading.local):
    # threading.local rather than a ContextVar: torch.compile and torch.export can trace it.
    # A linked list (decide, outer), so that one decide object may be entered by several threads.
    top = None


_active = _Active()


def active_execution():
    """Return the innermost ``decide`` of this thread, or None outside any."""
    return None if _active.top is None else _active.top[0]


@contextmanager
def undecided():
    """Context manager that suspends every surrounding ``decide``."""
    top, _active.top = _active.top, None
    try:
        yield
    finally:
        _active.top = top


def active_route(num_samples=None):
    """Return the :class:`Route` that blocks follow here, or None outside ``decide``.

    Parameters
    ----------
    num_samples : int, optional
        Batch size, needed only if the decisions are one row ``[L]`` shared by all samples.

    Raises
    ------
    ValueError
        If ``num_samples`` is needed and not given.
    """
    execution = active_execution()
    return None if execution is None else execution.route(num_samples)


class decide:
    """Context manager in which dynamic blocks run only on the samples that ``decisions`` keep.

    Thread-safe (each thread sees only its own) and nestable (the innermost applies; on its exit the outer one is back).
    One object may be entered any number of times, also by several threads at once. A ``decide`` entered in one thread
    is not visible in threads started from it. Activation checkpointing runs the forward again during the backward pass,
    possibly in another thread, so pass it the decisions:
    ``checkpoint(f, x, use_reentrant=False, context_fn=lambda: (nullcontext(), decide(decisions)))``.

    Parameters
    ----------
    decisions : bool tensor ``[N, L]`` or ``[L]``, or Route; in soft mode a float tensor
        True where sample n keeps block l, with one column per dynamic block in registration order (that of
        ``model.modules()``). ``[L]`` applies to every sample. A :class:`Route` of two choices is used as it is. In
        exact mode the tensor is copied here, so that changing it later has no effect; in capacity mode every block
        reads it when it runs.
    mode : {"exact", "capacity", "soft"}
        "exact" reads the counts on the host, once for all blocks, and computes only kept samples. "capacity" never
        waits for the device and keeps every shape fixed: blocks compute all samples and select, so it saves no time by
        itself. Under ``torch.compile``, ``torch.export`` and ``torch.jit.trace``, which cannot follow data-dependent
        sizes, and on the meta device, whose tensors have no values, blocks run in capacity mode even if "exact" was
        asked for. "soft" takes weights instead of decisions, 1 for the result of a True decision and 0 for that of a
        False one: blocks compute both for all samples and mix them, as published code does, so that gradients reach the
        weights.

    Raises
    ------
    TypeError
        If ``decisions`` is not a bool tensor, or in soft mode not a floating-point one.
    ValueError
        If its shape is not ``[N, L]`` or ``[L]``, or ``mode`` is unknown; and when a block runs, if N, L or the device
        do not match the model and its input.
    """

    def __init__(self, decisions, *, mode="exact"):
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        self.mode = mode
        self._route = None
        if mode == "soft":
            self.decisions = _check_weights(decisions)
            return
        if isinstance(decisions, Route):
            if decisions.choices != 2:
                raise ValueError(f"decisions must be a Route of 2 choices (dropped, kept), got {decisions.choices}")
            self._route, decisions = decisions, decisions.decisions.bool()
        decisions = check_decisions(decisions)
        # The route is built later. Not in capacity mode: a captured CUDA graph must see a changed buffer.
        self.decisions = decisions.clone() if mode == "exact" else decisions

    def __enter__(self):
        _active.top = (self, _active.top)
        return self

    def __exit__(self, *exception):
        _active.top = _without(self, _active.top)

    def route(self, num_samples):
        """Return the exact Route for a batch of ``num_samples``, built at the first call."""
        route = self._route
        if route is None or not route.exact or (num_samples is not None and route.num_samples != num_samples):
            decisions = self.decisions
            if decisions.dim() == 1:
                if num_samples is None:
                    raise ValueError("num_samples is needed: the decisions are one row [L] shared by all samples")
                decisions = decisions.expand(num_samples, -1)
            with torch.inference_mode(False):  # it may be built while evaluating and be used again in training
                route = self._route = Route.from_decisions(decisions)
        return route

    def column(self, column):
        """Return the decisions of one block: bool ``[N]``, or ``[1]`` if they are shared by all samples."""
        return self.decisions[..., column].reshape(-1)

    def check(self, x, num_columns):
        """Raise ValueError unless the decisions match input ``x`` and a model of ``num_columns`` dynamic blocks."""
        shape, device = tuple(self.decisions.shape), self.decisions.device
        kind = "float" if self.mode == "soft" else "bool"
        if shape[-1] != num_columns:
            raise ValueError(
                f"decisions has {shape[-1]} columns (shape {shape}), but this model has {num_columns} dynamic blocks: "
                f"expected {kind} [N, {num_columns}]"
            )
        if len(shape) == 2 and shape[0] != x.shape[0]:
            raise ValueError(
                f"decisions has {shape[0]} rows (shape {shape}), but a block got a batch of {x.shape[0]} samples: "
                f"expected {kind} [{x.shape[0]}, {num_columns}]"
            )
        if device != x.device:
            raise ValueError(f"decisions is on {device}, but a block got its input on {x.device}: move it there")


def _check_weights(weights):
    check_floating(weights, "decisions", '[N, L] or [L] in mode "soft"')
    if weights.dim() not in (1, 2):
        raise ValueError(f"decisions must have shape [N, L] or [L], got {tuple(weights.shape)}")
    return weights


def _without(execution, top):
    """Return the list ``top`` without its innermost entry of ``execution``: generators may leave out of order."""
    entered, outer = top
    return outer if entered is execution else (entered, _without(execution, outer))


def check_decisions(decisions):
    """Return ``decisions`` if it is a bool tensor ``[N, L]`` or ``[L]``; raise TypeError or ValueError otherwise."""
    if not isinstance(decisions, torch.Tensor):
        raise TypeError(f"decisions must be a bool tensor [N, L] or [L], got {type(decisions).__name__}")
    check_dense(decisions, "decisions")
    if decisions.dtype != torch.bool:
        hint = ""
        if decisions.is_floating_point():
            hint = "; threshold probabilities first: probabilities >= 0.5"
            if not torch.compiler.is_compiling() and bool(decisions.isnan().any()):
                hint += " (these hold NaN)"
            if decisions.requires_grad:
                hint += '; bool decisions pass no gradient on: to train what gave these, give weights in mode="soft"'
        elif not decisions.is_complex():
            hint = "; use decisions.bool() if 1 means keep"
        raise TypeError(f"decisions must be bool [N, L] or [L], got {decisions.dtype} {tuple(decisions.shape)}{hint}")
    if decisions.dim() not in (1, 2):
        raise ValueError(f"decisions must have shape [N, L] or [L], got {tuple(decisions.shape)}")
    return decisions
