"""Programs of the CPU engine as files for ``csrc/testing/run_programs.cpp``, with what they should give.

As a program, ``python engine_cases.py FOLDER`` writes them for the vectors that DYNEXEC_KERNELS asks for.
"""

import struct
import subprocess
import sys
from pathlib import Path

import torch
import toys
from engine_programs import Inverted, build, packed
from torch import nn

import dynexec
from dynexec.executors.engine import Program
from dynexec.models import create_model


class Mixed(nn.Module):
    """Odd sizes, strides, dilation, padding, depthwise and squeeze-excite blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 20, 5, 2, padding=3, bias=False), nn.BatchNorm2d(20), nn.SiLU())
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.blocks = nn.Sequential(toys.BasicBlock(20, 20), toys.InvertedResidual(20, 20), toys.BasicBlock(20, 36, 2))
        self.dilated = nn.Conv2d(36, 17, 3, padding=2, dilation=2)

    def forward(self, x):
        return torch.relu(self.dilated(self.blocks(self.pool(self.stem(x)))))


def networks():
    yield "mixed", toys.finish(Mixed()), (3, 27, 21)
    yield "timm", toys.timm_style(), (3, 13, 13)
    yield "blockdrop", toys.finish(create_model("blockdrop_resnet32_cifar10")).backbone, (3, 32, 32)


def write_network(path, name, model, shape):
    """The engine's segment of a network."""
    columns = dynexec.convert(model).num_blocks if name != "blockdrop" else 15
    frozen = dynexec.freeze(model, torch.randn(2, *shape), executor="resident")
    (segment,) = frozen.segments
    # The frozen network was compared with the model; the segment's output is what the file expects.
    write_case(path, segment.programs[shape].code, segment.maker.weights.tensor(), columns, shape)


def write_bands(path, rows):
    """Inverted residual blocks on bands of rows, in place and with stride 2."""
    block, smaller = Inverted(12, 200, 12, 5, 1, 1, True, True, True), Inverted(12, 40, 9, 3, 2, 1, True, True, False)

    def emit(builder, x):
        x = builder.add(x)
        gate = builder.gate(0)
        block.emit(builder, x, in_place=True)
        builder.end_gate(gate)
        return smaller.emit(builder, x)

    write_case(path, *build(emit, (12, rows, 23), 1, band_floats=1), 1, (12, rows, 23))


def write_deep(path):
    """Winograd's algorithm with more input channels than are transformed at once, for vectors of 4, 8 and 16 floats.

    With a last panel of three vectors where these have 8.
    """
    first = packed(torch.randn(272, 8, 1, 1) / 8**0.5, torch.randn(272))
    deep = packed(torch.randn(20, 272, 3, 3) / 50, torch.randn(20), padding=1)
    last = packed(torch.randn(20, 20, 3, 3) / 20, torch.randn(20), padding=1)

    def emit(builder, x):
        x = builder.conv(deep, builder.conv(first, x))
        gate = builder.gate(0)
        builder.conv(last, builder.conv(last, x), x, out=x)
        builder.end_gate(gate)
        return x

    write_case(path, *build(emit, (8, 11, 6), 1), 1, (8, 11, 6))


def write_case(path, code, weights, columns, shape):
    """A program, its input, decisions and output in a file for run_programs."""
    samples = 5
    images, decisions = torch.randn(samples, *shape), torch.rand(samples, columns) < 0.6
    output = Program(code, weights)(images, decisions)
    header = (0x64796E65786563, len(code), len(weights), samples, columns, *shape, *output.shape[1:])
    path.write_bytes(
        struct.pack("<11q", *header)
        + code.numpy().tobytes()
        + weights.numpy().tobytes()
        + images.permute(0, 2, 3, 1).contiguous().numpy().tobytes()
        + decisions.byte().contiguous().numpy().tobytes()
        + output.permute(0, 2, 3, 1).contiguous().numpy().tobytes()
    )


def write_dilated(path):
    """Two sets of weights for convolutions many of whose taps are padding."""
    like = {"padding": (5, 7), "dilation": (4, 6), "activation": "relu"}
    convs = [packed(torch.randn(24, 130, 3, 3) / 40, torch.randn(24), **like) for _ in range(2)]

    def emit(builder, x):
        out = None
        for choice, conv in enumerate(convs):
            gate = builder.gate(0, choice)
            out = builder.conv(conv, x, out=out)
            builder.end_gate(gate)
        return out

    write_case(path, *build(emit, (130, 9, 11), 1), 1, (130, 9, 11))


def write_cases(folder):
    """All of them; their paths."""
    paths = []
    for rows in (29, 17):  # stretches of seven and of four rows for four threads
        paths.append(folder / f"bands of {rows} rows")
        write_bands(paths[-1], rows)
    paths.append(folder / "deep")
    write_deep(paths[-1])
    paths.append(folder / "dilated")
    write_dilated(paths[-1])
    for name, model, shape in networks():
        paths.append(folder / name)
        write_network(paths[-1], name, model, shape)
    return paths


def run(*command, **options):
    """What a command prints; it must succeed."""
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


if __name__ == "__main__":
    write_cases(Path(sys.argv[1]))
