"""Heads of tasks that share their features."""

import torch
import torch.nn.functional as F
from torch import nn


class Heads(nn.ModuleList):
    """Heads of tasks that read the same column, as one: ``[rows, ...]`` to ``[rows, sum of C_t]``.

    Several are one matrix product: each is a ``Sequential`` that ends in a ``Linear``, and what precedes that is the
    same in all and has nothing to learn, see :func:`can_join`.
    """

    def forward(self, x):
        if len(self) == 1:
            return self[0](x)
        for layer in list(self[0])[:-1]:
            x = layer(x)
        last = [head[-1] for head in self]
        bias = None if last[0].bias is None else torch.cat([layer.bias for layer in last])
        return F.linear(x, torch.cat([layer.weight for layer in last]), bias)


def can_join(heads):
    """Whether heads may run as one :class:`Heads` of several."""
    if not all(type(head) is nn.Sequential and type(head[-1]) is nn.Linear for head in heads):
        return False
    before = [head[:-1] for head in heads]
    learns = any(next(layers.parameters(), None) is not None for layers in before)
    draws = any(isinstance(layer, nn.modules.dropout._DropoutNd) for layer in before[0].modules())
    alike = len({str(layers) for layers in before}) == 1 and len({head[-1].bias is None for head in heads}) == 1
    return alike and not learns and not draws


def count_classes(head, task):
    """How many outputs the head of a task has; TypeError if it has no linear layer that says so."""
    linear = [m for m in head.modules() if isinstance(m, nn.Linear)] if isinstance(head, nn.Module) else []
    if not linear:
        raise TypeError(f"heads[{task}] must be a module with a Linear layer, got {type(head).__name__}")
    return linear[-1].out_features
