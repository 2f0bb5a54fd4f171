"""Programs of the CPU engine for tests: made of a few instructions, run, compared; and a mark for what needs it."""

import pytest
import torch
import torch.nn.functional as F

from dynexec.executors.engine import Program, engine_missing
from dynexec.executors.packing import PackedConv
from dynexec.executors.program import BAND_FLOATS, ProgramBuilder
from dynexec.executors.weights import Weights

needs_engine = pytest.mark.skipif(engine_missing() is not None, reason=f"no engine: {engine_missing()}")
NOTHING = torch.zeros(0, 0, dtype=torch.bool)


def packed(weight, bias, stride=1, padding=0, dilation=1, groups=1, activation=None):
    pairs = [(value, value) if isinstance(value, int) else tuple(value) for value in (stride, padding, dilation)]
    return PackedConv("conv", weight, bias, *pairs, groups, activation, False, (1, weight.shape[1] * groups, 32, 32))


def program(*args, **options):
    """The program that :func:`build` makes, ready to run."""
    return Program(*build(*args, **options))


def build(emit, shape, columns=0, winograd=True, band_floats=BAND_FLOATS):
    """Code and weights of the program that ``emit(builder, x)`` makes of a batch of ``shape`` [C, H, W]."""
    weights = Weights()
    builder = ProgramBuilder(weights, columns, winograd, band_floats)
    builder.begin_unit()
    builder.store(emit(builder, builder.load(*shape)))
    return builder.finish(), weights.tensor()


def run(made, x, **schedule):
    return made(x, NOTHING.new_empty(len(x), 0), **schedule)


def close(actual, expected, tolerance=1e-5, scale=None):
    scale = scale or (float(expected.abs().max()) if expected.numel() else 1.0)
    assert actual.shape == expected.shape
    assert float((actual.double() - expected).abs().max() if expected.numel() else 0.0) <= tolerance * max(scale, 1e-3)


class Inverted:
    """Random layers of an inverted residual block, with or without its expansion, projection and sum."""

    def __init__(self, inputs, channels, outputs, kernel, stride, dilation, expand, project, residual):
        channels = channels if expand else inputs
        padding = (kernel - 1) * dilation // 2

        def draw(*shape, **options):
            return packed(torch.randn(shape) / shape[1] ** 0.5, torch.randn(shape[0]), **options)

        self.layers = []
        if expand:
            self.layers.append((draw(channels, inputs, 1, 1, activation="relu6"), 1))
        options = {"stride": stride, "padding": padding, "dilation": dilation, "activation": "silu"}
        self.layers.append((draw(channels, 1, kernel, kernel, groups=channels, **options), channels))
        if project:
            self.layers.append((draw(inputs if residual else outputs, channels, 1, 1), 1))
        self.residual = residual

    def emit(self, builder, x, in_place=False):
        y = x
        for number, (layer, _) in enumerate(self.layers):
            last = self.residual and number == len(self.layers) - 1
            y = builder.conv(layer, y, x if last else None, out=x if last and in_place else None)
        return y

    def expected(self, x):
        y = x
        for layer, groups in self.layers:
            padding, stride, dilation, _ = layer.geometry
            y = F.conv2d(y, layer.weight.double(), layer.bias.double(), stride, padding, dilation, groups)
            y = {"relu6": F.relu6, "silu": F.silu, None: lambda y: y}[layer.activation](y)
        return x + y if self.residual else y
