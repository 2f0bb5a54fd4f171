"""The CUDA sources: they compile, and on a GPU conditional nodes do what they should."""

import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import dynexec
from dynexec import native
from dynexec.executors.conditional import Conditional, conditional_missing

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None or not SOURCES, reason="needs nvcc and the source tree")
needs_gpu = pytest.mark.skipif(conditional_missing() is not None, reason=str(conditional_missing()))


def check_registers(output):
    """What ptxas says of the kernels with ``-v``."""
    found = re.findall(r"properties for (\w+)\n\D*\d+ bytes stack frame, (\d+) bytes spill stores", output)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", output)]
    assert found and max(registers) <= 128  # 512 threads may have as many
    # With a policy before it, the network in one block of threads has a few words too many.
    for name, spills in found:
        assert int(spills) <= (128 if re.search("run_resident.*Li1ELb1E", name) else 0), name


STRICT = ("-Xptxas=-v", "-Werror=all-warnings")


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_cuda_sources_compile_for_ampere(source, tmp_path):
    options = ("-std=c++17", *STRICT, "-gencode", "arch=compute_80,code=sm_80")
    command = [NVCC, *options, "-c", source, "-o", tmp_path / "out.o"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    check_registers(result.stderr)


@needs_nvcc
def test_the_module_builds_for_hopper_and_says_what_is_wrong(tmp_path):
    """As setup.py builds it where torch has CUDA; without a GPU its calls fail, with CUDA's words."""
    pybind11 = pytest.importorskip("pybind11")
    settings = {
        "DYNEXEC_CUDA": "ON",
        "CMAKE_CUDA_COMPILER": NVCC,
        "CMAKE_CUDA_ARCHITECTURES": "90-real",
        "CMAKE_CUDA_FLAGS": " ".join(STRICT),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "DYNEXEC_TORCH_DIR": Path(torch.__file__).parent,
        "DYNEXEC_OUTPUT_DIR": tmp_path / "out",
    }
    options = [f"-D{name}={value}" for name, value in settings.items()]
    for command in (["-G", "Ninja", "-S", ROOT, "-B", tmp_path / "build", *options], ["--build", tmp_path / "build"]):
        more = ["--target", "_cuda"] if command[0] == "--build" else []
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        result = subprocess.run(
            ["cmake", *command, *more], capture_output=True, text=True, timeout=300, env=os.environ | {"PATH": path}
        )
        assert result.returncode == 0, result.stdout + result.stderr
    check_registers(result.stdout)
    code = """
import _cuda
for call in (lambda: _cuda.insert_conditional(0, 0, 0, 2), lambda: _cuda.end_body(1)):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "out"), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    first, second = result.stdout.splitlines()
    assert first.startswith("insert_conditional: one body where size is 0")
    assert second.startswith("cudaStreamEndCapture: ")


def test_without_a_gpu_there_is_a_reason():
    if not torch.cuda.is_available():
        assert native.cuda_missing() == "torch sees no GPU"


def test_a_native_module_that_does_not_load_is_missing(tmp_path, monkeypatch):
    library = tmp_path / f"_cuda{EXTENSION_SUFFIXES[0]}"
    library.write_text("built for another machine")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dynexec, "__path__", [str(tmp_path)])
    monkeypatch.delattr(dynexec, "_cuda", raising=False)
    monkeypatch.delitem(sys.modules, "dynexec._cuda", raising=False)
    reason = native.cuda_missing.__wrapped__()
    assert reason.startswith(f"{library.name} does not load: ") and "\n" not in reason


@needs_gpu
@pytest.mark.parametrize("count", [0, 1, 3])
def test_if_runs_its_body_where_there_are_rows(count):
    offset = torch.tensor([2, 2], dtype=torch.int32, device="cuda")
    value, conditional, graph = torch.zeros(1, device="cuda"), Conditional(offset.device), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        value.add_(1)
        with conditional.if_any(offset):
            value.add_(10)
        value.mul_(2)
    offset[1] += count
    graph.replay()
    assert value.item() == (22 if count else 2)


@needs_gpu
@pytest.mark.parametrize("count, body", [(0, 0), (1, 1), (8, 1), (9, 2), (1000, 2)])
def test_switch_runs_the_body_of_the_count(count, body):
    offset = torch.tensor([0, count], dtype=torch.int32, device="cuda")
    value, conditional, graph = torch.zeros(1, device="cuda"), Conditional(offset.device), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        conditional.switch(offset, 8, [lambda number=number: value.fill_(number) for number in range(3)])
    value.fill_(-1)
    graph.replay()
    assert value.item() == body


@needs_gpu
def test_functions_of_a_switch_may_allocate():
    """Memory that nothing else gets, also between and after captures."""
    offset = torch.zeros(2, dtype=torch.int32, device="cuda")
    x, conditional, graph = torch.randn(8, 256, device="cuda"), Conditional(offset.device), torch.cuda.CUDAGraph()
    weight, results = torch.randn(256, 256, device="cuda"), torch.zeros(3, 8, 256, device="cuda")
    functions = [lambda number=number: results[number].copy_((x * number) @ weight) for number in range(3)]
    for _ in range(2):  # the libraries' workspaces
        conditional.switch(offset, 1, functions)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(4):
            conditional.switch(offset, 1, functions)
    others = [torch.full((8, 256), 3.0, device="cuda") for _ in range(64)]
    for number in (0, 2, 1):
        offset[1] = number
        results.fill_(-1)
        graph.replay()
        torch.testing.assert_close(results[number], (x * number) @ weight, rtol=1e-2, atol=1e-2)
        assert all((results[other] == -1).all() for other in {0, 1, 2} - {number})
    assert all((other == 3).all() for other in others)
