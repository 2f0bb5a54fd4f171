"""The CPU engine alone, without Python, under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

import platform
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
import toys
from engine_programs import Inverted
from engine_programs import build as build_program
from torch import nn

import dynexec
from dynexec.executors.engine import Program, engine_missing
from dynexec.models import create_model

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc"
FLAGS = {"kernels_avx2": ["-mavx2", "-mfma"], "kernels_avx512": ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mfma"]}
SANITIZERS = {"address": "address,undefined", "thread": "thread"}

pytestmark = [
    pytest.mark.skipif(engine_missing() is not None, reason=f"no engine: {engine_missing()}"),
    pytest.mark.skipif(shutil.which("g++") is None or not SOURCES.exists(), reason="needs g++ and the source tree"),
]


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
    write_case(path, segment.programs[shape].code, segment.weights.tensor(), columns, shape)


def write_bands(path):
    """Inverted residual blocks on bands of rows, in place and with stride 2."""
    block, smaller = Inverted(12, 200, 12, 5, 1, 1, True, True, True), Inverted(12, 40, 9, 3, 2, 1, True, True, False)

    def emit(builder, x):
        x = builder.add(x)
        gate = builder.gate(0)
        block.emit(builder, x, in_place=True)
        builder.end_gate(gate)
        return smaller.emit(builder, x)

    write_case(path, *build_program(emit, (12, 29, 23), 1, band_floats=1), 1, (12, 29, 23))


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


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    paths = [folder / "bands"]
    write_bands(paths[0])
    for name, model, shape in networks():
        paths.append(folder / name)
        write_network(paths[-1], name, model, shape)
    return paths


def build(folder, sanitizer):
    """run_programs, built with a sanitizer."""
    names = [path.stem for kind in ("engine", "kernels_") for path in (SOURCES / "cpu").glob(f"{kind}*.cpp")]
    objects = []
    for name in names:
        objects.append(folder / f"{name}.o")
        flags = FLAGS.get(name, []) if platform.machine() in ("x86_64", "AMD64") else []
        compile_one(SOURCES / "cpu" / f"{name}.cpp", ["-c", "-o", objects[-1], *flags], sanitizer)
    program = folder / "run_programs"
    compile_one(SOURCES / "testing" / "run_programs.cpp", [*objects, "-o", program, "-pthread"], sanitizer)
    return program


def compile_one(source, arguments, sanitizer):
    command = ["g++", "-std=c++20", "-O1", "-g1", f"-fsanitize={SANITIZERS[sanitizer]}", "-fno-sanitize-recover=all"]
    result = subprocess.run([*command, source, *arguments], capture_output=True, text=True)
    if "cannot find" in result.stderr:
        pytest.skip(f"no run-time library of the {sanitizer} sanitizer")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_engine_under_sanitizers(cases, tmp_path, sanitizer):
    program = build(tmp_path, sanitizer)
    result = subprocess.run([program, *cases], capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert f"{len(cases)} programs ran" in result.stdout
