"""What is built and installed, seen from outside the source tree. Builds run without isolation and without an index."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt")
FOLDERS = ("dynexec", "kernels", "csrc")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), reason="needs a C++ compiler"
)

# Uses an installed dynexec and says what it found.
PROBE = """
import json, torch, dynexec, dynexec.kernels
from dynexec import info, ops
x = torch.arange(6.0).reshape(3, 2)
index = torch.tensor([2, 0])
assert torch.equal(ops.gather_rows(x, index), x[index])
assert dynexec.Route.from_decisions(x > 2).counts == ((2, 1), (1, 2))
print(json.dumps(info.facts() | {"files": [dynexec.__file__, dynexec.kernels.__file__]}))
"""


def run(command, **changes):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "DYNEXEC_NATIVE")}
    settings = {"capture_output": True, "text": True, "timeout": 600, **changes}
    settings["env"] = environment | changes.get("env", {})
    return subprocess.run([str(part) for part in command], **settings)


def copy_tree(folder):
    """The source tree without anything built in it."""
    folder.mkdir()
    for name in FILES:
        shutil.copy2(ROOT / name, folder)
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*_build_failure.txt")
        )
    return folder


def build_wheel(folder, **env):
    tree = copy_tree(folder / "tree")
    options = ("-v", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    result = run([sys.executable, "-m", "pip", "wheel", *options, tree], env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel, result.stdout + result.stderr


def install(wheel, folder):
    options = ("--no-deps", "--no-index", "--target", folder)
    result = run([sys.executable, "-m", "pip", "install", *options, wheel])
    assert result.returncode == 0, result.stdout + result.stderr


def probe(wheel, folder):
    """Facts about the wheel once installed, away from the source tree."""
    target = folder / "installed"
    install(wheel, target)
    # -S, with its packages by path: the import hook of an editable install would lend this one its files.
    path = os.pathsep.join([str(target), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    result = run([sys.executable, "-S", "-c", PROBE], cwd=folder, env={"PYTHONPATH": path})
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert all(Path(path).is_relative_to(target) for path in facts["files"])
    return facts


def hide_torch(folder):
    """A folder that, on PYTHONPATH, makes torch look absent, as it is in an isolated build."""
    (folder / "hidden").mkdir()
    (folder / "hidden" / "torch.py").write_text("raise ImportError('no torch here')")
    return str(folder / "hidden")


def contents_of(tree):
    package = {path.relative_to(tree).as_posix() for path in (tree / "dynexec").rglob("*") if path.is_file()}
    return package | {f"dynexec/{path.relative_to(tree).as_posix()}" for path in (tree / "kernels").rglob("*.py")}


@needs_compiler
def test_native_wheel(tmp_path):
    wheel, _ = build_wheel(tmp_path, CMAKE_BUILD_TYPE="Debug")  # for its contents; an optimised one takes a minute
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    code = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    libraries = {name for name in code if name.startswith(("dynexec/_C.", "dynexec/libdynexec_cpu."))}
    assert len(libraries) == 2
    assert code - libraries >= contents_of(tmp_path / "tree")
    assert {name.split("/")[0] for name in code} == {"dynexec"}
    assert not [name for name in code if name.endswith((".cpp", ".h", ".txt"))]
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert required
    assert not [line for line in required if "torchvision" in line or "timm" in line]
    facts = probe(wheel, tmp_path)
    assert facts["native"] is None
    assert facts["build"].keys() == {"compiler", "flags", "torch"}


def test_without_torch_at_build_time(tmp_path):
    wheel, _ = build_wheel(tmp_path, PYTHONPATH=hide_torch(tmp_path))
    assert wheel.name.endswith("-py3-none-any.whl")
    facts = probe(wheel, tmp_path)
    assert "built without torch" in facts["native"]
    assert facts["build"] is None


def test_without_a_compiler(tmp_path):
    wheel, output = build_wheel(tmp_path, CXX="/nonexistent/c++")
    said = [line for line in output.splitlines() if "dynexec: the native part was not built" in line]
    assert len(said) == 1
    facts = probe(wheel, tmp_path)
    assert facts["native"].startswith("the build failed: ")
    assert "/nonexistent/c++" in facts["native"]
    assert "\n" not in facts["native"]


def test_source_distribution(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    build = "from setuptools import build_meta; build_meta.build_sdist('..')"
    result = run([sys.executable, "-c", build], cwd=tree, env={"PYTHONPATH": hide_torch(tmp_path)})
    assert result.returncode == 0, result.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert names >= sources | {"CMakeLists.txt", "LICENSE", "kernels/__init__.py", "dynexec/ops.py", "dynexec/py.typed"}
    assert not [name for name in names if name.endswith(".so")]


def test_source_tree_says_it_is_not_installed(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    # -S leaves out site-packages, where an installed one would be.
    result = run([sys.executable, "-S", "-c", "import dynexec"], cwd=tree)
    assert result.returncode == 1
    assert "is a source tree that is not installed: run `pip install -e .` there" in result.stderr.splitlines()[-1]


def test_the_readme_brings_what_a_build_without_isolation_needs():
    """Setuptools of its own: that of a new virtual environment of Python 3.11 is older."""
    (needed,) = re.findall(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    readme = (ROOT / "README.md").read_text()
    (brought,) = re.findall(r"^pip install (.*)\npip install --no-build-isolation", readme, re.MULTILINE)
    assert set(re.findall(r'"(.*?)"', needed)) <= set(shlex.split(brought))


def test_left_out_by_the_environment(tmp_path):
    result = run([sys.executable, "-m", "dynexec", "info", "--json"], cwd=tmp_path, env={"DYNEXEC_NATIVE": "0"})
    assert json.loads(result.stdout)["native"] == "left out by DYNEXEC_NATIVE=0"


def test_info_as_text(tmp_path):
    result = run([sys.executable, "-m", "dynexec", "info"], cwd=tmp_path)
    assert result.returncode == 0
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert {"python", "torch", "dynexec", "devices", "cpu", "native", "graphs", "optional", "absent"} <= lines.keys()


def test_command_line_errors(tmp_path):
    for arguments, message in (([], "required: command"), (["nonsense"], "invalid choice: 'nonsense'")):
        result = run([sys.executable, "-m", "dynexec", *arguments], cwd=tmp_path)
        assert result.returncode == 2
        assert message in result.stderr
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError('no rich', name='rich')")
    result = run([sys.executable, "-m", "dynexec", "bench"], cwd=tmp_path)
    assert result.returncode == 2
    assert "bench needs the package rich: pip install 'dynexec[bench]'" in result.stderr
