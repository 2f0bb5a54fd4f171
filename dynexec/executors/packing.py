"""Convolutions that do everything around them in the same pass: folded BatchNorm, activation, residual addition."""

import torch
import torch.nn.functional as F

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


class PackedLinear:
    """A frozen Linear layer as programs see it: a 1x1 convolution of one pixel."""

    def __init__(self, linear):
        self.geometry, self.activation = ([0, 0], [1, 1], [1, 1], 1), None
        self.weight, self.dtype = linear.weight.detach()[:, :, None, None], linear.weight.dtype
        self.bias = self.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
        self.shape = tuple(self.weight.shape)

    def release(self):
        """Free the weights."""
        self.weight = self.bias = None


class PackedConv:
    """A frozen 2-d convolution: ``activation(conv(x))``, or ``activation(conv(x) + other)`` given ``other``.

    float32 on a CPU runs through oneDNN's fused convolutions, with the weights reordered for it once; anything else
    through ``F.conv2d``. A plain callable, not a module: at small batches the overhead of a call matters.

    Parameters
    ----------
    name : str
        Its name in generated code.
    weight : tensor ``[C_out, C_in / groups, k_h, k_w]``
    bias : tensor ``[C_out]``
    stride, padding, dilation : pairs of int
    groups : int
    activation : key of ACTIVATIONS
    overwrites_other : bool
        Write the result into ``other``, which must not share memory with ``x``.
    input_size : tuple of int
        A typical ``[N, C, H, W]``, for which oneDNN chooses the layout of the weights.
    """

    def __init__(self, name, weight, bias, stride, padding, dilation, groups, activation, overwrites_other, input_size):
        self.__name__ = name
        self.geometry = list(padding), list(stride), list(dilation), groups  # in oneDNN's order
        self.shape, self.activation, self.overwrites_other = tuple(weight.shape), activation, overwrites_other
        self.weight, self.bias, self.dtype = weight, bias, weight.dtype
        function, onednn_name, scalars = ACTIVATIONS[activation]
        self.onednn = weight.dtype == torch.float32 and weight.device.type == "cpu" and onednn_available()
        if not self.onednn:
            self._function, self._constants = function, (weight, bias, stride, padding, dilation, groups)
            return
        mkldnn = torch.ops.mkldnn
        weight = mkldnn._reorder_convolution_weight(weight, *self.geometry, input_size)
        self._unary = mkldnn._convolution_pointwise.default
        self._constants = (weight, bias, *self.geometry)
        self._activation = onednn_name, scalars, ""
        in_place, out_of_place = mkldnn._convolution_pointwise_.binary, mkldnn._convolution_pointwise.binary
        self._binary = in_place if overwrites_other else out_of_place
        self._addition = "add", 1.0, None if activation is None else onednn_name, scalars, ""

    def __repr__(self):
        kind = "oneDNN" if self.onednn else "aten"
        return f"{kind} {self.shape} {self.geometry} {self.activation} overwrites_other={self.overwrites_other}"

    def release(self):
        """Free all weights; it cannot be called any more."""
        self.weight = self.bias = self._constants = None

    def __call__(self, x, other=None):
        if not self.onednn:
            y = F.conv2d(x, *self._constants)
            y = self._function(y if other is None else y + other)
            return other.copy_(y) if self.overwrites_other else y
        if other is None:
            return self._unary(x, *self._constants, *self._activation)
        first, second = (other, x) if self.overwrites_other else (x, other)
        y = self._binary(first, second, *self._constants, *self._addition)
        if y.shape != other.shape:  # which oneDNN does not mind
            raise ValueError(f"x does not fit this network: {tuple(y.shape)} and {tuple(other.shape)} cannot be added")
        return y
