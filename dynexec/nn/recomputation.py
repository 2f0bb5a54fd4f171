"""Detects activation checkpointing that recomputes blocks in the backward pass without the decisions they obeyed.

The gradients would be those of another network, and PyTorch does not notice if all shapes agree. With
``use_reentrant=False`` it compares what is saved for the backward pass, so blocks that obey decisions save a mark. With
``use_reentrant=True`` nothing is saved; instead, blocks that obeyed decisions in their last forward without gradients
are remembered.
"""

from weakref import WeakSet

import torch
from torch.autograd import Function

_decided = WeakSet()  # blocks that obeyed decisions in their last forward without gradients


def check_recomputation(block, execution):
    """Raise RuntimeError if a reentrant checkpoint repeats a forward without the decisions that it obeyed."""
    if torch._C._current_graph_task_id() == -1:  # not in a backward pass
        if not torch.is_grad_enabled():
            (_decided.discard if execution is None else _decided.add)(block)
    elif execution is None and block in _decided and not _saves_elsewhere():
        raise RuntimeError(
            f"the {type(block).__name__} is computed again in a backward pass, without the decisions of its forward: "
            "give checkpoint use_reentrant=False and context_fn=lambda: (nullcontext(), dynexec.decide(decisions)), or "
            "enter decide within the function that is checkpointed"
        )


def marked(block, output):
    """Return ``output``; where it may matter, also save a mark of the block's column for the backward pass."""
    if not torch.compiler.is_compiling() and output.grad_fn is not None and _saves_elsewhere():
        mark = _Mark.apply(torch.empty(0, requires_grad=True), block.placement.column)
        output.grad_fn.metadata["dynexec mark"] = mark  # lives as long as what the output was made by
    return output


def _saves_elsewhere():
    """Whether other code keeps what is saved for the backward pass, as a non-reentrant checkpoint does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class _Mark(Function):
    """Saves a tensor of a shape that no layer saves."""

    @staticmethod
    def forward(ctx, like, column):
        ctx.save_for_backward(torch.empty((0, 7, 5, 3, column + 1), dtype=torch.uint8))
        return like.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None
