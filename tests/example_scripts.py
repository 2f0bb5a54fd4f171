"""The scripts in examples/ as modules, and a mark for the tests that need them."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

needs_examples = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs the source tree")


def load_example(name):
    """``examples/<name>.py`` as a new module, which is not registered."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)  # as where it is run: some import what they share
        spec.loader.exec_module(module)
    return module
