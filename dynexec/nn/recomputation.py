"""Finds activation checkpointing that runs blocks again in the backward pass without the decisions that they obeyed.

The gradients would be those of another network, and where all shapes are the same PyTorch does not notice. With
``use_reentrant=False`` it compares what is saved for the backward pass: there blocks that obey decisions save a mark.
With ``use_reentrant=True`` nothing is saved, and it is known of each block how its last forward without gradients was.
"""

from weakref import WeakSet

import torch
from torch.autograd import Function

_decided = WeakSet()  # blocks that obeyed decisions in their last forward without gradients


def check_recomputation(block, execution):
    """Raise RuntimeError where a reentrant checkpoint runs a forward again without the decisions that it obeyed."""
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
    """``output``, beside which a mark of the block's column is saved for the backward pass if that may matter."""
    if not torch.compiler.is_compiling() and output.grad_fn is not None and _saves_elsewhere():
        mark = _Mark.apply(torch.empty(0, requires_grad=True), block.placement.column)
        output.grad_fn.metadata["dynexec mark"] = mark  # lives as long as what the output was made by
    return output


def _saves_elsewhere():
    """Whether somebody else keeps what is saved for the backward pass, as a checkpoint that is not reentrant does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class _Mark(Function):
    """Saves a tensor that no layer saves."""

    @staticmethod
    def forward(ctx, like, column):
        ctx.save_for_backward(torch.empty((0, 7, 5, 3, column + 1), dtype=torch.uint8))
        return like.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None
