"""The bench that runs CUDA kernels on a CPU: what it computes, and the mistakes that it must find."""

import shutil
import subprocess

import pytest
import torch
from cuda_on_cpu import SOURCES, build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None or not SOURCES.exists(), reason="needs g++ and the sources")
SEEDS = [str(seed) for seed in range(1, 11)]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build(tmp_path_factory.mktemp("simt"), "check_simt")


def lines(program, *arguments):
    result = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize(
    "kernel, values",
    {
        "sum": "2016 0, counter 0, 0 products, 0 conflicts",
        "copy": "5 1, counter 0, 0 products, 0 conflicts",
        "copy read by its own thread": "1 5, counter 0, 0 products, 0 conflicts",
        "older group": "1 0, counter 0, 0 products, 0 conflicts",
        "atomic": "0 0, counter 256, 0 products, 0 conflicts",
        "cluster": "11 10, counter 0, 0 products, 0 conflicts",
        "conflicts": "0 0, counter 0, 0 products, 2 conflicts",  # one of each of the two warps
        # Eight rows of 32 bytes lie in the banks of four, four times; of each of four stores four lanes share a bank.
        "product": "0 0, counter 0, 1 products, 16 conflicts",
        "product with a wrong lane": "8 0, counter 0, 1 products, 16 conflicts",
    }.items(),
)
def test_what_it_computes(program, kernel, values):
    assert lines(program, kernel, *SEEDS) == [f"fine: {values}"] * len(SEEDS)


@pytest.mark.parametrize(
    "kernel, errors",
    {
        "sum without barriers": ["reads what nothing wrote", "what another thread"],
        "read, then written": ["writes what another thread reads", "reads what another thread writes"],
        "written by two": ["writes what another thread writes"],
        "copy without a wait": ["uses what is still being copied"],
        "copy without a barrier": [
            "reads what nothing wrote",
            "still being copied",
            "reads what another thread writes",
        ],
        "newer group": ["uses what is still being copied, 4 bytes at 16"],
        "store outside": ["writes outside, 4 bytes at"],
        "misaligned": ["misaligned, 8 bytes at 4 "],
        "not initialised": ["reads what nothing wrote"],
        "global outside": ["thread 63, check_simt.cpp:", "reads outside of every global buffer"],
        "read only": ["writes what is to be read only: 4 bytes at", "of source"],
        "written twice": ["used by two threads: 4 bytes at 0 of 256 of result"],
        "some at a barrier": ["waits at a barrier, where others never come"],
        "a part of a warp": ["waits for its warp, where others never come"],
        "parted ways": ["for something else"],
        "cluster without a barrier": ["reads what nothing wrote", "what another thread"],
        "cluster that may not have begun": ["no barrier of the cluster was before"],
        "copy at the end": ["ends while a copy is under way"],
        "two barriers": ["its warp waits at another barrier"],
        "address of another block": ["block 0, ", "an address of another block", "reads what nothing wrote"],
        "block that is done": ["uses memory of a block that is done"],
    }.items(),
)
def test_what_it_finds(program, kernel, errors):
    found = lines(program, kernel, *SEEDS)
    assert len(found) == len(SEEDS) and not any(line.startswith("fine") for line in found)
    assert all("check_simt.cpp:" in line and any(error in line for error in errors) for line in found)
    assert all(any(error in line for line in found) for error in errors[:1])


def test_numbers_of_16_bits(program, tmp_path):
    """Every one of them, and floats rounded to them, as torch has it."""
    values = torch.randn(20000) * 10 ** torch.empty(20000).uniform_(-9, 6)
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    exact = halves.view(torch.float16).float()
    ties = (exact[1:31743] + exact[:31742]) / 2
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 65504, 65519.9, 65520, 1e30, 2**-24, 2**-25, 3 * 2**-25])
    values = torch.cat([values, exact, ties, -ties, special])
    values = values[~values.isnan()]
    path = tmp_path / "floats"
    path.write_bytes(values.numpy().tobytes())
    lines(program, "floats", path)
    raw = torch.frombuffer(bytearray((tmp_path / "floats.out").read_bytes()), dtype=torch.int16)
    rounded, back = raw[: 2 * len(values)].view(-1, 2), raw[2 * len(values) :].contiguous().view(torch.float32)
    for number, dtype in enumerate((torch.float16, torch.bfloat16)):
        assert torch.equal(rounded[:, number], values.to(dtype).view(torch.int16))
        wanted = halves.view(dtype).float()
        assert torch.equal(back.view(-1, 2)[:, number].nan_to_num(7.5), wanted.nan_to_num(7.5))
