"""Drives CMakeLists.txt where torch is importable; any failure leaves a pure-Python package that says why."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
FAILURE, CUDA_FAILURE = "native_build_failure.txt", "cuda_build_failure.txt"  # read by dynexec/native.py
LIBRARIES = ("_C.*", "_cuda.*", "libdynexec_cpu.*")


class BuildNative(build_ext):
    """Build every native library in one CMake run, into the package."""

    def run(self):
        package = ROOT / "dynexec" if self.inplace else Path(self.build_lib).resolve() / "dynexec"
        package.mkdir(parents=True, exist_ok=True)
        for old in (path for pattern in (*LIBRARIES, FAILURE, CUDA_FAILURE) for path in package.glob(pattern)):
            old.unlink()
        try:
            build(package, Path(self.build_temp).resolve())
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            reason = explain(error)
            (package / FAILURE).write_text(reason + "\n")
            print(f"dynexec: the native part was not built, the package works without it: {reason}", file=sys.stderr)

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


def build(package, work):
    """Configure and build in ``work``; put the libraries into ``package``."""
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    import pybind11
    import torch

    settings = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "DYNEXEC_TORCH_DIR": Path(torch.__file__).parent,
        "DYNEXEC_TORCH_VERSION": torch.__version__,
        "DYNEXEC_OUTPUT_DIR": work / "libraries",
    }
    cuda = cuda_settings(torch)
    try:
        compile_in(cmake, work, settings | cuda)
    except subprocess.CalledProcessError as error:
        if cuda["DYNEXEC_CUDA"] == "OFF":
            raise
        (package / CUDA_FAILURE).write_text(explain(error) + "\n")
        print(f"dynexec: the CUDA sources were not built: {explain(error)}", file=sys.stderr)
        shutil.rmtree(work)
        compile_in(cmake, work, settings | {"DYNEXEC_CUDA": "OFF"})
    for pattern in LIBRARIES:
        for library in (work / "libraries").glob(pattern):
            shutil.copy2(library, package)


def compile_in(cmake, work, settings):
    """Configure and build."""
    run([cmake, "-G", "Ninja", "-S", ROOT, "-B", work, *(f"-D{name}={value}" for name, value in settings.items())])
    run([cmake, "--build", work])


def cuda_settings(torch):
    """Settings for the CUDA sources: they are built where torch has CUDA and the compiler is there.

    ``TORCH_CUDA_ARCH_LIST`` names the architectures, as for every extension of torch ("8.0;9.0+PTX").
    """
    folders = [os.path.join(home, "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))
    if torch.version.cuda is None or nvcc is None or cuda_release(nvcc) < 13:
        return {"DYNEXEC_CUDA": "OFF"}
    settings = {"DYNEXEC_CUDA": "ON", "CMAKE_CUDA_COMPILER": nvcc}
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").strip(";"):
        names = (name.replace(".", "") for name in listed.split(";"))
        settings["CMAKE_CUDA_ARCHITECTURES"] = ";".join(
            name.removesuffix("+PTX") if name.endswith("+PTX") else f"{name}-real" for name in names
        )
    return settings


def cuda_release(nvcc):
    """Major version of a CUDA compiler; 0 where it does not run."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    found = re.search(r"release (\d+)", text)
    return int(found.group(1)) if found else 0


def find_tool(name):
    """Path of a program; one that pip installed beside this Python comes first, as it is the newer."""
    path = shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))
    if path is None:
        raise FileNotFoundError(f"{name} not found: pip install cmake ninja pybind11, then install dynexec again")
    return path


def run(command):
    """Run a command, show its output as it comes, and keep it for the reason of a failure."""
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, [str(part) for part in command], "".join(lines))


def explain(error):
    """One line: what the tools called an error first, or the exception itself."""
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    lines = [line.strip() for line in error.output.splitlines()]
    first = next((number for number, line in enumerate(lines) if "error" in line.lower()), -1)
    return " ".join(line for line in lines[first:][:8] if line)[:400]


def torch_is_importable():
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


setup(
    packages=[
        *find_packages(include=["dynexec", "dynexec.*"]),
        *(f"dynexec.{name}" for name in find_packages(include=["kernels", "kernels.*"])),
    ],
    # Without torch there is nothing to build against, and the wheel is a pure one.
    ext_modules=[Extension("dynexec._C", sources=[])] if torch_is_importable() else [],
    cmdclass={"build_ext": BuildNative},
)
