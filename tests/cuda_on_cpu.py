"""Builds the programs that run CUDA kernels on a CPU, by csrc/testing/simt.h."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "csrc" / "testing"


def build(folder, name, sources=SOURCES, optimise="-O2"):
    """The program ``<name>.cpp`` of the sources."""

    def compile_one(source):
        command = ["g++", "-std=c++20", optimise, "-Wall", "-Wextra", "-Werror", "-c", sources / f"{source}.cpp"]
        result = subprocess.run([*command, "-o", folder / f"{source}.o"], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return folder / f"{source}.o"

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, ("simt", "simt_hardware", name)))
    subprocess.run(["g++", *objects, "-o", folder / name], check=True)
    return folder / name
