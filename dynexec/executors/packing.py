"""Convolutions with everything around them in one pass: folded BatchNorm, activation, residual addition."""

import torch
import torch.nn.functional as F
from torch import nn

# Our name of an activation -> the plain function, oneDNN's name, oneDNN's scalars.
ACTIVATIONS = {
    None: (lambda x: x, "none", []),
    "relu": (torch.relu, "relu", []),
    "relu6": (F.relu6, "hardtanh", [0.0, 6.0]),
    "silu": (F.silu, "swish", []),
    "hardswish": (F.hardswish, "hardswish", []),
}


def onednn_available():
    """Whether torch has the private fused convolutions that its own compiler uses on this CPU."""
    names = ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


class PackedConv(nn.Module):
    """A frozen 2-d convolution: ``activation(conv(x))``, or ``activation(conv(x) + other)`` given ``other``.

    float32 on a CPU goes through oneDNN's fused convolutions, with the weights reordered once for it; anything else
    through ``F.conv2d``.

    Parameters
    ----------
    weight : tensor ``[C_out, C_in / groups, k_h, k_w]``
    bias : tensor ``[C_out]``
    stride, padding, dilation : pairs of int
    groups : int
    activation : key of ACTIVATIONS
    overwrites_other : bool
        Write the result into ``other``, which must not share memory with ``x``.
    input_size : tuple of int, optional
        A typical ``[N, C, H, W]``, for which oneDNN chooses the layout of the weights.
    """

    def __init__(self, weight, bias, stride, padding, dilation, groups, activation, overwrites_other, input_size):
        super().__init__()
        self.geometry = [list(padding), list(stride), list(dilation), groups]  # in oneDNN's order
        self.shape = tuple(weight.shape)
        self.activation, self.overwrites_other = activation, overwrites_other
        self.onednn = weight.dtype == torch.float32 and weight.device.type == "cpu" and onednn_available()
        if self.onednn:
            weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry, input_size)
        self.weight, self.bias = weight, bias

    def extra_repr(self):
        kind = "oneDNN" if self.onednn else "aten"
        return f"{kind}, {self.shape}, {self.geometry}, {self.activation}, overwrites_other={self.overwrites_other}"

    def forward(self, x, other=None):
        function, name, scalars = ACTIVATIONS[self.activation]
        if not self.onednn:
            padding, stride, dilation, groups = self.geometry
            y = F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
            y = function(y if other is None else y + other)
            return other.copy_(y) if self.overwrites_other else y
        mkldnn = torch.ops.mkldnn
        if other is None:
            return mkldnn._convolution_pointwise.default(x, self.weight, self.bias, *self.geometry, name, scalars, "")
        unary = (None if self.activation is None else name, scalars, "")
        if self.overwrites_other:
            return mkldnn._convolution_pointwise_.binary(
                other, x, self.weight, self.bias, *self.geometry, "add", 1.0, *unary
            )
        return mkldnn._convolution_pointwise.binary(
            x, other, self.weight, self.bias, *self.geometry, "add", 1.0, *unary
        )
