"""``bench/gpu.sh`` to its end, without a GPU."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import kernel_cases  # noqa: F401 - skips where there is no Triton
import pytest
import torch

from dynexec import decide
from dynexec.kernels import offline
from dynexec.report import nets
from dynexec.report.rows import read_rows

STEPS = ("tests", "warm_up", "headline", "timeline", "systems", "training", "rates", "compiled")
SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.sh"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source tree")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    before = signal.getsignal(signal.SIGTERM)
    yield __import__("gpu")
    signal.signal(signal.SIGTERM, before)  # which its main changes


def test_dry_run(gpu, tmp_path, monkeypatch):
    environment = os.environ | {"PYTHON": sys.executable, "MINUTES": "30"}
    command = ["bash", SCRIPT, tmp_path, "--dry"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert 200 < int(re.match(r"tests, (\d+) s at most", result.stdout)[1]) <= 270  # of what is left
    end = json.loads(result.stdout.splitlines()[-1])
    assert end["steps"] == dict.fromkeys(STEPS, 0)
    assert "| frozen | 0.5 |" in (tmp_path / "training.txt").read_text()
    timeline = (tmp_path / "timeline.txt").read_text()
    assert "fused, keep 0.5: " in timeline and timeline.count(" us between them") == 3
    rows = read_rows(tmp_path / "gpu.jsonl")
    assert sorted((row["net"], row["decisions"]) for row in rows) == [("tiny", "bernoulli"), ("tiny", "published")]
    assert all({"dynexec", "masked eager", "dense eager"} <= row["milliseconds"].keys() for row in rows)
    rates = [json.loads(line) for line in (tmp_path / "rates.jsonl").read_text().splitlines()]
    assert not [rate for rate in rates if "failed" in rate]
    assert sum("dynexec_us" in rate for rate in rates) == 2 and sum("one_us" in rate for rate in rates) == 1
    assert " passed" in (tmp_path / "tests.txt").read_text()
    assert "tiny" in (tmp_path / "summary.md").read_text()
    measured = [tmp_path / name for name in ("gpu.jsonl", "rates.jsonl")]
    before = [path.read_text() for path in measured]
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), "--dry", "--steps", "headline", "systems", "rates"])
    assert gpu.main() == 0
    assert [path.read_text() for path in measured] == before  # what is measured is not measured again


FAKE_PYTHON = """#!/bin/bash
echo "$*" >>calls
case "$*" in
  "-c import dynexec._C") exit 1 ;;
  "-m pip "*) echo "pip says why"; [ -n "$WORKS" -a -n "$PIP_BREAK_SYSTEM_PACKAGES" ] && touch installed ;;
  "-c import dynexec, dynexec.kernels.offline") [ -n "$IMPORTS" -a -e dynexec/kernels/conv.py ] ;;
  "-m dynexec info") [ -e installed -o -n "$PYTHONPATH" ] ;;
esac
"""


@pytest.mark.parametrize(("works", "imports", "code"), [("1", "", 0), ("", "1", 0), ("", "", 1)])
def test_an_installation_that_pip_refuses(works, imports, code, tmp_path):
    for name in ("bench", "kernels", "dynexec"):
        (tmp_path / name).mkdir()
    (tmp_path / "kernels" / "conv.py").touch()
    script, python = tmp_path / "bench" / "gpu.sh", tmp_path / "python"
    script.write_text(SCRIPT.read_text())
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": python, "PYTHONPATH": "", "WORKS": works, "IMPORTS": imports}
    result = subprocess.run(["bash", script, tmp_path / "out"], capture_output=True, text=True, env=environment)
    assert result.returncode == code
    assert ("pip says why" in result.stderr and "setuptools 77" in result.stderr) == (not works)
    calls = (tmp_path / "calls").read_text()
    assert ("bench/gpu.py" in calls) == (code == 0) and calls.count("-m pip ") == 1


def test_a_network_is_done_when_all_its_keep_rates_are(gpu, tmp_path, monkeypatch):
    (tmp_path / "gpu.jsonl").touch()
    names = ["dynexec", *(baseline.name for baseline in gpu.choose_baselines(8, False, False))]
    half = {"milliseconds": dict.fromkeys(names[::2]), "failed": names[1::4]}
    half["unavailable"] = dict.fromkeys(names[3::4], "not installed")
    rows = [{"net": net, "batch": 8, "keep": keep, **half} for net in "ab" for keep in gpu.KEEPS][:-1]
    rows += [{**row, "net": "e", "unavailable": dict.fromkeys(names[3::4], "not asked for")} for row in rows[:5]]
    rows += [{**row, "net": "c", "failed": []} for row in rows[:1]] + [{**row, "net": "c"} for row in rows[1:5]]
    started = []
    monkeypatch.setattr(gpu, "read_rows", lambda path: rows)
    monkeypatch.setattr(gpu.subprocess, "call", lambda command: started.append(command[4:6]) or 0)
    assert gpu.networks(tmp_path, False, [(net, 8) for net in "abcde"], False) == 0
    # One lacks a keep rate, one a baseline, one everything, one baselines that it was not asked for.
    assert started == [["b", "8"], ["c", "8"], ["d", "8"], ["e", "8"]]


@pytest.mark.parametrize("error", [0.0, torch.nan, torch.inf])
def test_wrong_outputs_are_failures_without_a_time(error, gpu, tmp_path, monkeypatch):
    """Of the kernel that runs a network whole, and of others; and its decisions are the same each time."""
    import gpu_rates

    decided, rates = [], gpu_rates.Rates(tmp_path, dry=True)

    def launch(x, decisions, blocks):
        decided.append(decisions)
        return torch.ones(len(x), 10) + (error if blocks > 1 else 0.0)

    network = SimpleNamespace(resident=lambda: SimpleNamespace(launch=launch))
    monkeypatch.setattr(gpu_rates, "program", lambda *_: (54, network))
    monkeypatch.setattr(gpu_rates, "program_seconds", lambda *_: 1.0)
    monkeypatch.setattr(gpu_rates, "KEEPS", (0.5,))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    rates.dry, rates.seconds = False, lambda call: 1.0
    rates.resident()
    rows = [json.loads(line) for line in rates.path.read_text().splitlines()]
    wrong = [row for row in rows if error and "1 blocks" not in row["name"]]
    assert len(rows) > 10 and rates.failed == bool(error)
    assert [row for row in rows if row.get("failed") == "its output differs"] == wrong
    assert [row for row in rows if "us" not in row] == wrong
    first, decided[:] = decided[:], []
    rates.known.clear()
    rates.resident()
    assert all(map(torch.equal, first, decided)) and not torch.equal(first[-1][0], first[-1][1])


def test_a_way_that_cannot_run_leaves_a_timeline_of_the_others(gpu, monkeypatch, capsys):
    import gpu_timeline

    def without_a_graph(images, decisions):
        raise RuntimeError("no CUDA graph")

    def run(model, images, decisions):
        with decide(decisions):
            return model.backbone(images)

    def prepare(model, images, *_):
        return {"dense cuDNN": partial(without_a_graph, images), "fused": partial(run, model, images)}, []

    monkeypatch.setattr(gpu_timeline, "build", lambda net: gpu.tiny())
    monkeypatch.setattr(gpu_timeline, "prepare", prepare)
    monkeypatch.setattr(sys, "argv", ["gpu_timeline.py", "resnet32", "2", "--keep", "1.0", "--dry"])
    with torch.inference_mode():
        assert gpu_timeline.main() == 1
    printed = capsys.readouterr().out
    assert "dense cuDNN, keep 1.0: no CUDA graph\nfused, keep 1.0: " in printed and printed.count(" between them") == 1


def test_warm_up_builds_a_network_once_and_without_values(gpu, monkeypatch):
    built, calls, program = [], [], gpu.program
    monkeypatch.setattr(gpu, "HEADLINE", [("resnet32", 2), ("resnet32", 4)])
    monkeypatch.setattr(gpu, "program", lambda *what: built.append(what) or program(*what))
    monkeypatch.setattr(gpu, "compile_launches", lambda call, *how: calls.append((call.func, how)))
    monkeypatch.setattr(nets, "randomize_batch_norm", lambda *_: pytest.fail("statistics that nobody needs"))
    assert gpu.compile_share(1, 3) == []
    assert built == [("resnet32", torch.device("meta"))]
    assert {how for _, how in calls} == {(gpu.choose_architecture(), (1, 3))}
    kernels = [getattr(function, "__name__", "program") for function, _ in calls]
    assert kernels == 2 * [*3 * ["program"], "plan", *2 * ["find_body"]]


def test_equal_launches_are_compiled_by_one_process():
    def share(*arguments, constant=False, once=False):
        parameter = SimpleNamespace(is_constexpr=constant, do_not_specialize=once, do_not_specialize_on_alignment=once)
        kernel = SimpleNamespace(fn=SimpleNamespace(__name__="kernel"), params=[parameter] * 2)
        return offline.share_of(kernel, arguments, {"num_warps": 4}, 1000)

    x = torch.empty(64, device="meta")
    assert share(x, 2) == share(torch.empty(8, 8, device="meta"), 3) != share(x[1:], 2)
    assert share(x, 16, once=True) == share(x[1:], 3, once=True)
    assert share(x, 2, constant=True) != share(x, 3, constant=True)
    assert len({share(x, 1), share(x, 2), share(x, 16), share(x.half(), 1), share(None, 1), share(None)}) == 6


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_what_an_interrupted_run_started_is_ended(number, error, gpu, tmp_path, monkeypatch):
    ours, theirs = os.pipe()  # at its end when no process has the other end

    def first(folder, dry, seconds):
        return 0

    def second(folder, dry, seconds):
        return subprocess.call(["bash", "-c", f"echo begun >&{theirs}; sleep 60"], pass_fds=[theirs])

    def interrupt():
        if os.read(ours, 6):
            os.kill(os.getpid(), number)

    def unexpected(*_):
        raise RuntimeError("nobody handles the signal")

    monkeypatch.setattr(gpu, "STEPS", [(first, 0.5), (second, 0.5)])
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), "--dry"])
    signal.signal(signal.SIGTERM, unexpected)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its jobs behind ``&`` ignore it
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(error):
            gpu.main()
    finally:
        signal.signal(signal.SIGINT, before)
        os.close(theirs)
        thread.join()
    assert select.select([ours], [], [], 5.0)[0] and os.read(ours, 6) == b""
    os.close(ours)
    assert (tmp_path / "summary.md").read_text() == "no rows\n"  # of the step before


def test_tests_that_run_too_long_say_what_failed_and_are_ended(gpu):
    wait = gpu.wait
    begin = "import signal, sys, time; print(1, flush=True); "
    commands = [
        begin + "sys.exit(3)",
        begin + "signal.signal(signal.SIGINT, lambda *_: sys.exit(4)); time.sleep(60)",
        begin + "signal.signal(signal.SIGINT, lambda *_: (time.sleep(0.5), sys.exit(5))); time.sleep(60)",
        begin + "signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)",
    ]
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for code in commands]
    for process in processes:
        process.stdout.readline()
    start = time.monotonic()
    assert wait(processes, start + 1.0, patience=2.0) == [3, 4, 5, -signal.SIGKILL]
    assert 2.5 < time.monotonic() - start < 15.0
    for process in processes:
        process.stdout.close()
