"""The native code for CPUs under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

The engine alone, without Python; row ops and ``plan`` in the tests of the ops.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from engine_cases import run, write_cases
from engine_programs import needs_engine

import dynexec
from dynexec.executors.engine import vector_width

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc"
FLAGS = {"kernels_avx2": ["-mavx2", "-mfma"], "kernels_avx512": ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mfma"]}
KERNELS = {4: "kernels_generic", 8: "kernels_avx2", 16: "kernels_avx512"}  # by floats per vector
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
    """run_programs, built with a sanitizer; but for kernels that the cases do not run, which take minutes."""
    sources = [path for kind in ("engine", "kernels_") for path in (SOURCES / "cpu").glob(f"{kind}*.cpp")]
    objects = [folder / f"{source.stem}.o" for source in sources]
    idle = set(KERNELS.values()) - {KERNELS[vector_width()]}

    def compile_object(source, target):
        flags = FLAGS.get(source.stem, []) if platform.machine() in ("x86_64", "AMD64") else []
        how = ["-O0"] if source.stem in idle else checked(sanitizer)
        compile_one(source, ["-c", "-o", target, *flags, *how], sanitizer)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_object, sources, objects))
    program = folder / "run_programs"
    main = SOURCES / "testing" / "run_programs.cpp"
    compile_one(main, [*objects, "-o", program, "-pthread", *checked(sanitizer)], sanitizer)
    return program


def checked(sanitizer):
    return ["-O1", "-g1", f"-fsanitize={SANITIZERS[sanitizer]}", "-fno-sanitize-recover=all"]


def compile_one(source, arguments, sanitizer):
    result = subprocess.run(["g++", "-std=c++20", source, *arguments], capture_output=True, text=True)
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


@pytest.mark.skipif(sys.platform != "linux", reason="loads the sanitizers' libraries before Python's")
def test_row_ops_under_sanitizers(tmp_path):
    package, torch_folder = tmp_path / "dynexec", Path(torch.__file__).parent
    package.mkdir()
    for path in Path(dynexec.__file__).parent.iterdir():
        if not path.name.startswith(("libdynexec_cpu", "__pycache__")):
            (package / path.name).symlink_to(path)
    sources = [SOURCES / "cpu" / f"{name}.cpp" for name in ("rows", "plan")]
    abi = re.search(r"set\(torch_abi (\w+)\)", (ROOT / "CMakeLists.txt").read_text())[1]
    torch_flags = [f"-DTORCH_TARGET_VERSION={abi}", "-isystem", torch_folder / "include", f"-L{torch_folder / 'lib'}"]
    library = ["-fPIC", "-shared", *torch_flags, "-ltorch_cpu", "-o", package / "libdynexec_cpu.so"]
    compile_one(sources[0], [*sources[1:], *library, *checked("address")], "address")
    found = [run("g++", f"-print-file-name=lib{name}.so").strip() for name in ("asan", "ubsan")]
    environment = {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(tmp_path)}
    environment = os.environ | environment | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    loads = run(sys.executable, "-c", "import dynexec; print(dynexec.__file__)", env=environment, cwd=tmp_path)
    assert loads.strip() == str(package / "__init__.py")
    here = Path(__file__).parent
    tests = [here / "test_ops.py", f"{here / 'test_ops_torch.py'}::test_called_past_their_checks"]
    options = ["-qs", "-p", "no:cacheprovider", "-k", "not portable"]
    output = run(sys.executable, "-m", "pytest", *options, *tests, env=environment, cwd=tmp_path)
    assert int(re.search(r"(\d+) passed", output)[1]) > 400 and "skipped" not in output
