"""The CPU engine alone, without Python, under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engine_cases import run, write_cases
from engine_programs import needs_engine

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc"
FLAGS = {"kernels_avx2": ["-mavx2", "-mfma"], "kernels_avx512": ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mfma"]}
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
MUTATIONS = {"address": 600, "thread": 100}  # of each program

pytestmark = [
    needs_engine,
    pytest.mark.skipif(shutil.which("g++") is None or not SOURCES.exists(), reason="needs g++ and the source tree"),
]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return write_cases(tmp_path_factory.mktemp("programs"))


def build(folder, sanitizer):
    """run_programs, built with a sanitizer."""
    sources = [path for kind in ("engine", "kernels_") for path in (SOURCES / "cpu").glob(f"{kind}*.cpp")]
    objects = [folder / f"{source.stem}.o" for source in sources]

    def compile_object(source, target):
        flags = FLAGS.get(source.stem, []) if platform.machine() in ("x86_64", "AMD64") else []
        compile_one(source, ["-c", "-o", target, *flags], sanitizer)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_object, sources, objects))
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
    assert f"{len(cases)} programs ran" in run(program, *cases)
    small = [case for case in cases if case.stat().st_size < 1 << 19]
    output = run(program, "--mutate", str(MUTATIONS[sanitizer]), *small)
    ran, refused = (int(re.search(rf"(\d+) {what}", output)[1]) for what in ("ran,", "refused"))
    assert ran > len(small) * MUTATIONS[sanitizer] / 10 and refused > len(small) * MUTATIONS[sanitizer] / 10
