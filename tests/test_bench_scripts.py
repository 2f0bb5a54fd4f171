"""The programs of bench/ say what is wrong with their arguments, before anything is measured."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"

pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="needs the source tree")


@pytest.fixture
def script(monkeypatch):
    """The module of a program, and its ``main`` with such words behind its name."""
    monkeypatch.syspath_prepend(BENCH)

    def load(name):
        module = import_module(name)

        def main(*words):
            monkeypatch.setattr(sys, "argv", [name, *words])
            return module.main()

        return module, main

    return load


WRONG = {
    "drop_path": [
        ("--cases vit", "'vit'"),
        ("--cases vit:0", "must be 1 or more"),
        ("--cases foo:1", "'foo:1'"),
        ("--cases", "expected at least one"),
        ("--rounds 0", "must be 1 or more"),
        ("--write --cases vit:2", "--write is for all cases"),
    ],
    "training": [
        ("--batch -1", "must be 1 or more"),
        ("--batch 0", "must be 1 or more"),
        ("--size 0", "must be 1 or more"),
        ("--seconds nan", "must be 0 or more"),
        ("--device foo", "invalid choice: 'foo'"),
        ("--only nothing", "no network is called 'nothing'"),
        ("--write --only bottleneck", "--write is for all networks"),
    ],
}


@pytest.mark.parametrize("name, words, message", [(name, *case) for name, cases in WRONG.items() for case in cases])
def test_wrong_arguments(script, capsys, monkeypatch, name, words, message):
    module, main = script(name)
    for measures in ("measure", "measure_apart"):
        monkeypatch.setattr(module, measures, lambda *a: pytest.fail("it was measured"), raising=False)
    with pytest.raises(SystemExit) as end:
        main(*words.split())
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_training_on_a_missing_gpu(script, capsys):
    with pytest.raises(SystemExit):
        script("training")[1]("--device", "cuda")
    assert "torch sees no GPU here" in capsys.readouterr().err
