"""Two processes on one machine, by gloo: equal to one process, and what happens when one of them is lost."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo"
)

WORKER = Path(__file__).with_name("distributed_worker.py")
if torch.distributed.is_available():
    from distributed_worker import CASES, WORLD
else:
    CASES, WORLD = {}, 2


def start(folder, *arguments):
    """The worker in both processes, which find each other by a file."""
    return [
        subprocess.Popen(
            [sys.executable, WORKER, folder, str(rank), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(WORLD)
    ]  # fmt: skip


def end(processes, seconds):
    """What each process printed; those that still run after that time are killed, and fail the test."""
    deadline = time.monotonic() + seconds
    try:
        return [process.communicate(timeout=max(0.1, deadline - time.monotonic()))[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What became of each case in each process."""
    folder = tmp_path_factory.mktemp("distributed")
    printed = end(start(folder), 150)
    files = [folder / f"{rank}.json" for rank in range(WORLD)]
    found = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    missing = "the process did not get there:\n"
    return [{**dict.fromkeys(CASES, missing + text), **cases} for text, cases in zip(printed, found)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, results):
    for rank, cases in enumerate(results):
        assert cases[case] is None, f"process {rank}:\n{cases[case]}"


@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_a_lost_process_ends_the_others(fault, tmp_path):
    survivor, lost = start(tmp_path, fault)
    try:
        (printed,) = end([survivor], 100)
    finally:
        lost.kill()
        lost.communicate()
    assert survivor.returncode not in (0, None)
    reasons = "Connection closed by peer|Connection reset by peer|Timed out waiting|Application timeout"
    assert re.search(reasons, printed), printed
