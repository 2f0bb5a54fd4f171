"""Imports point one way, kernels stand alone, and importing dynexec brings nothing that is optional."""

import ast
import subprocess
import sys
from pathlib import Path

import dynexec

PACKAGE = Path(dynexec.__file__).parent
KERNELS = PACKAGE.parent / "kernels"
# Imports go to an earlier line, or stay inside one name; a line's own names may not import each other in a circle.
LAYERS = [
    {"kernels", "reference", "native", "files"},
    {"dispatch"},
    {"gradients"},
    {"ops"},
    {"route", "measure"},
    {"nn", "policy"},
    {"convert", "models"},
    {"executors"},
    {"deployment"},
    {"info", "report"},
    {"cli"},
    {"__main__"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def modules():
    """(first name below dynexec, path) of every module but the package's own front."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path != PACKAGE / "__init__.py":
            yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path
    if KERNELS.is_dir():
        yield from (("kernels", path) for path in sorted(KERNELS.rglob("*.py")))


def imports(path):
    """First names below dynexec that a module imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("dynexec."))


def test_imports_point_one_way():
    edges = {(source, target) for source, path in modules() for target in imports(path) if source != target}
    edges -= {("native", "_C"), ("native", "_cuda")}
    unknown = {name for edge in edges for name in edge} - LAYER.keys()
    assert not unknown, f"{sorted(unknown)}: not a module of a known layer, or a name taken from dynexec itself"
    back = [(source, target) for source, target in sorted(edges) if LAYER[source] < LAYER[target]]
    assert not back
    assert not [(source, target) for source, target in edges if (target, source) in edges]


def test_kernels_need_torch_and_triton_only():
    targets = {target for name, path in modules() if name == "kernels" for target in imports(path)}
    assert targets == {"kernels"}


def test_importing_dynexec_brings_torch_and_numpy_only():
    optional = ("triton", "rich", "matplotlib", "jinja2", "sklearn", "onnxruntime", "openvino", "torchvision", "timm")
    code = f"""
import sys, torch, torch.utils.flop_counter  # these bring Triton, where it is installed
before = set(sys.modules)
import dynexec
print([name for name in {optional} if name in set(sys.modules) - before])
assert dynexec.models.list_models() and dynexec.policy and dynexec.measure and dynexec.nn and dynexec.ops
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr
