"""Heads of tasks that share their features."""

import torch
import torch.nn.functional as F
from torch import nn

from dynexec.nn.structure import hooked

# Layers that are what their arguments say: nothing learned, drawn or kept from call to call.
_STATELESS = {
    *(nn.Sequential, nn.Identity, nn.Flatten, nn.Unflatten),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.AvgPool1d, nn.MaxPool1d),
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d),
}


class Heads(nn.ModuleList):
    """Heads of tasks that read the same column, as one: ``[rows, ...]`` to ``[rows, sum of C_t]``.

    Several heads run as one matrix product: each is a ``Sequential`` that ends in a ``Linear``, and the layers before
    that are the same in all and have no parameters, see :func:`can_join`. They run separately while a hook observes one
    of them.
    """

    def forward(self, x):
        if len(self) == 1:
            return self[0](x)
        if any(hooked(module, backward=True) for module in self.modules()):
            return torch.cat([head(x) for head in self], 1)
        for layer in list(self[0])[:-1]:
            x = layer(x)
        last = [head[-1] for head in self]
        bias = None if last[0].bias is None else torch.cat([layer.bias for layer in last])
        return F.linear(x, torch.cat([layer.weight for layer in last]), bias)


def can_join(heads):
    """Whether several heads may run as one :class:`Heads`."""
    if not all(type(head) is nn.Sequential and type(head[-1]) is nn.Linear for head in heads):
        return False
    before = [[_settings(m) for _, m in head[:-1].named_modules(remove_duplicate=False)] for head in heads]
    if any(kind not in _STATELESS for layers in before for kind, _ in layers):
        return False
    return all(layers == before[0] for layers in before) and len({head[-1].bias is None for head in heads}) == 1


def _settings(layer):
    """Return the type of a layer and its arguments."""
    return type(layer), {name: getattr(layer, name) for name in getattr(layer, "__constants__", ())}


def count_classes(head, task):
    """Return how many outputs the head of a task has; TypeError if it has no linear layer to tell."""
    linear = [m for m in head.modules() if isinstance(m, nn.Linear)] if isinstance(head, nn.Module) else []
    if not linear:
        raise TypeError(f"heads[{task}] must be a module with a Linear layer, got {type(head).__name__}")
    return linear[-1].out_features
