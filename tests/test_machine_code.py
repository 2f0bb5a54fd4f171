"""What the Triton kernels become for each architecture, and that broken ones do not pass the tests."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kernel_cases  # noqa: F401 - skips where there is no Triton
import pytest

from dynexec import kernels

ROOT = Path(__file__).parents[1]
KERNELS = Path(kernels.__file__).parent
# Runs tests with the kernels of another folder.
RUN = """
import importlib.util, sys, pytest
spec = importlib.util.spec_from_file_location("dynexec.kernels", sys.argv[1] + "/__init__.py")
sys.modules["dynexec.kernels"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["dynexec.kernels"])
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""
MUTATIONS = {
    "the border of images": ("tiles.py", "inside = ((bits >> tap) & 1) != 0", "inside = (bits >> 4) != 0", "conv"),
    "the number of rows": ("device.py", "count = tl.load(offset_ptr + 1) - start", "count = samples", "conv"),
    "the first of the rows": ("device.py", "index_ptr + start + row", "index_ptr + row", "conv"),
    "the last part of a sum": ("conv.py", "where(last, split, 0)", "where(last, split - 1, 0)", "conv"),
    "the reset of arrivals": ("conv.py", "tl.store(arrived_ptr + tile, 0, mask=last)", "pass", "conv"),
    "the tiles of the last round": ("conv.py", "unit, full + tile)", "unit, tile)", "only_sums"),
    "which tiles are shared": ("conv.py", "multiprocessors // tl.maximum(rest, 1)", "1", "only_sums"),
    "the places of parts": ("conv.py", "arrived_ptr, tile - full, part", "arrived_ptr, tile, part", "only_sums"),
    "who writes a sum": ("conv.py", "valid = valid & last", "valid = valid & (part == 0)", "conv"),
    "the residual": ("tiles.py", "    if RESIDUAL:", "    if False:", "conv_adds"),
    "the carry of a plan": ("plan.py", "start += tl.sum(chosen, 0)", "start += 0", "plan"),
}


@pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="needs the source tree")
def test_machine_code_is_as_recorded():
    """Offline, for every architecture, without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "bench" / "machine_code.py", "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert result.returncode == 0, result.stderr
    assert "float16 | 90 |" in result.stdout


@pytest.fixture
def machine_code(tmp_path, monkeypatch):
    """With two kernels, of which ``rows`` says what they become."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import machine_code

    row = dict.fromkeys(machine_code.COLUMNS, 0) | {"warps": 4, "registers": 64, "wide": 1, "waits": 1}
    rows = {name: {"kernel": name, **row} for name in ("one", "another")}
    monkeypatch.setattr(machine_code, "rows", rows, raising=False)
    monkeypatch.setattr(machine_code, "cases", lambda architecture: rows)
    monkeypatch.setattr(machine_code, "measure", lambda job: ({**rows[job[1]], "architecture": job[0]}, None))
    monkeypatch.setattr(machine_code, "ProcessPoolExecutor", ThreadPoolExecutor)
    for name in ("RECORD", "NOTES"):
        monkeypatch.setattr(machine_code, name, tmp_path / name)
    (tmp_path / "RECORD").write_text("")
    (tmp_path / "NOTES").write_text("<!-- generated: machine code -->\n<!-- end: machine code -->\n")
    return machine_code


@pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="needs the source tree")
def test_only_all_of_the_machine_code_is_recorded_and_only_if_nothing_is_wrong(machine_code, monkeypatch, capsys):
    def run(*options):
        monkeypatch.setattr(sys, "argv", ["machine_code.py", *options])
        return machine_code.main()

    with pytest.raises(SystemExit):
        run("--write", "--architectures", "90")
    assert "all architectures" in capsys.readouterr().err
    machine_code.rows["another"]["spills"] = 3
    assert run("--write") == 1 and "another, sm_80: 3 spills" in capsys.readouterr().err
    assert machine_code.RECORD.read_text() == "" and "another" not in machine_code.NOTES.read_text()
    machine_code.rows["another"]["spills"] = 0
    assert run("--write") == 0 and run("--check", "--architectures", "90") == 0
    assert (
        machine_code.RECORD.read_text().count("another") == 3 and "| another | 86 |" in machine_code.NOTES.read_text()
    )


def run_tests(folder, only, *options):
    command = [sys.executable, "-c", RUN, folder, "-k", only, Path(__file__).parent / "test_kernels.py", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parent)


@pytest.mark.parametrize("what", MUTATIONS)
def test_kernels_without_something_fail(what, tmp_path):
    name, old, new, only = MUTATIONS[what]
    folder = shutil.copytree(KERNELS, tmp_path / "kernels")
    source = (folder / name).read_text()
    assert source.count(old) == 1
    (folder / name).write_text(source.replace(old, new))
    result = run_tests(folder, f"test_{only} and not pair and not grouped")
    assert result.returncode != 0 and "no tests ran" not in result.stdout, result.stdout
    assert "1 failed" in result.stdout or result.returncode < 0, result.stdout + result.stderr


def test_a_copy_of_the_kernels_passes(tmp_path):
    options = ("--shard", "0/4")  # that a copy can pass, a few of them show
    result = run_tests(shutil.copytree(KERNELS, tmp_path / "kernels"), "test_plan or test_conv_adds", *options)
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout + result.stderr
