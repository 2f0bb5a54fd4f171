"""The CPU engine on processors that this machine is not: AArch64 with NEON, emulated."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from engine_cases import run
from engine_programs import needs_engine

SOURCES = Path(__file__).parent.parent / "csrc"
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")

pytestmark = [
    needs_engine,
    pytest.mark.skipif(not SOURCES.exists(), reason="needs the source tree"),
    pytest.mark.skipif(None in (COMPILER, EMULATOR), reason="needs aarch64-linux-gnu-g++ and qemu-aarch64"),
]


def test_aarch64(tmp_path):
    program = tmp_path / "run_programs"
    engine = [SOURCES / "testing" / "run_programs.cpp", *(SOURCES / "cpu").glob("engine*.cpp")]
    flags = ["-std=c++20", "-O2", "-static", "-pthread", "-o", program]
    run(COMPILER, *flags, *engine, SOURCES / "cpu" / "kernels_generic.cpp")
    folder = tmp_path / "programs"
    folder.mkdir()
    # Vectors of four floats, as NEON's.
    script = Path(__file__).with_name("engine_cases.py")
    run(sys.executable, script, folder, env={**os.environ, "DYNEXEC_KERNELS": "0"})
    cases = list(folder.iterdir())
    assert f"{len(cases)} programs ran" in run(EMULATOR, program, *cases)
