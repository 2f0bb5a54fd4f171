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
        ("--cases vit:0", "must be a whole number of 1 or more"),
        ("--cases foo:1", "'foo:1'"),
        ("--cases", "expected at least one"),
        ("--rounds 0", "must be a whole number of 1 or more"),
        ("--write --cases vit:2", "--write is for all cases"),
    ],
    "training": [
        ("--batch -1", "must be a whole number of 1 or more"),
        ("--batch 0", "must be a whole number of 1 or more"),
        ("--size 0", "must be a whole number of 1 or more"),
        ("--seconds nan", "must be a finite number of 0 or more"),
        ("--device foo", "invalid choice: 'foo'"),
        ("--only nothing", "no network is called 'nothing'"),
        ("--write --only bottleneck", "--write is for all networks"),
    ],
    "fuzz": [
        ("--seconds 0", "must be more than 0"),
        ("--seconds -1", "must be more than 0"),
        ("--seconds nan", "must be more than 0"),
        ("--only 3", "--only needs one target"),
        ("--only 3 routes images", "--only needs one target"),
    ],
}


@pytest.mark.parametrize("name, words, message", [(name, *case) for name, cases in WRONG.items() for case in cases])
def test_wrong_arguments(script, capsys, monkeypatch, name, words, message):
    module, main = script(name)
    for measures in ("measure", "measure_apart", "run_batch", "run_process"):
        monkeypatch.setattr(module, measures, lambda *a: pytest.fail("it was measured"), raising=False)
    with pytest.raises(SystemExit) as end:
        main(*words.split())
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_training_on_a_missing_gpu(script, capsys):
    with pytest.raises(SystemExit):
        script("training")[1]("--device", "cuda")
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_fuzz_repeats_one_input_and_says_whether_it_fails(script, capsys, monkeypatch):
    module, main = script("fuzz")

    def attempt(generator):
        if generator.initial_seed() == 7 * 1_000_003 + 3:
            raise AssertionError("wrong answer")
        return "right"

    monkeypatch.setitem(module.TARGETS, "toy", lambda folder: attempt)
    assert main("--seed", "7", "--only", "2", "toy") == 0
    assert main("--seed", "7", "--only", "3", "toy") == 1
    assert '"is": "failure", "text": "AssertionError: wrong answer"' in capsys.readouterr().out


def test_fuzz_tries_one_input_at_least(script, monkeypatch):
    module, _ = script("fuzz")
    monkeypatch.setattr(module, "run_process", lambda target, seed, first, seconds: [{"number": first, "is": "right"}])
    counts, failures = module.fuzz("toy", 0, 1e-9)
    assert counts["right"] >= 1 and not failures
