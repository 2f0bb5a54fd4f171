"""A frozen network under threads: the same outputs whoever calls it, and memory that stops growing."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import toys
from engine_programs import needs_engine

import dynexec
from dynexec.executors.engine import engine_missing
from dynexec.executors.recent import IMAGE_SIZES, Recent
from dynexec.executors.stage import EXECUTORS
from dynexec.models import create_model

THREADS = 4
EVERYWHERE = [None, *EXECUTORS, *(() if engine_missing() else ("fused", "resident"))]


@pytest.fixture(autouse=True)
def many_switches():
    """Python goes to another thread a thousand times as often, so that one which must not be interrupted shows it."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(function, calls):
    """Results of ``function(number)`` for every number below ``calls``, from threads that begin at once."""
    barrier = threading.Barrier(THREADS)

    def work(thread):
        barrier.wait()
        return [(number, function(number)) for number in range(thread, calls, THREADS)]

    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(pair for part in pool.map(work, range(THREADS)) for pair in part)
    return [found[number] for number in range(calls)]


@pytest.mark.parametrize("executor", EVERYWHERE)
def test_equal_outputs_whoever_calls(executor):
    model, twin, blocks = toys.converted()
    frozen = dynexec.freeze(model, toys.images(4), executor=executor)
    asked = []
    for number in range(60):
        n = (1, 4, 2, 7, 3, 9)[number % 6]
        asked.append((toys.images(n, size=11 + number % 3), torch.rand(n, blocks) < (0.2, 0.5, 0.9)[number % 3]))
    with torch.no_grad():
        expected = [toys.naive_forward(twin, *given) for given in asked]
    for number, actual in enumerate(together(lambda number: frozen(*asked[number]), len(asked))):
        torch.testing.assert_close(actual, expected[number], rtol=1e-4, atol=1e-5)
    if frozen.stages:
        calls = sum(sum(stage.used.values()) for stage in frozen.stages)
        assert calls == len(frozen.stages) * sum(-(-len(x) // (frozen.samples_at_once or len(x))) for x, _ in asked)


def test_the_policy_and_networks_of_parts():
    nets = [
        create_model("blockdrop_resnet32_cifar10", blocks=(1, 2, 1), widths=(4, 8, 8)),
        create_model("adashare_resnet18", num_classes=[3, 2], blocks=(1, 1, 1, 1), widths=(4, 8, 8, 8)),
    ]
    asked = [torch.randn(1 + number % 5, 3, 32, 32) for number in range(40)]
    for net in map(toys.finish, nets):
        frozen = dynexec.freeze(net, asked[3])
        alone = [frozen(x) for x in asked]
        for actual, expected in zip(together(lambda number: frozen(asked[number]), len(asked)), alone):  # noqa: B023
            torch.testing.assert_close(actual, expected)


@needs_engine
def test_with_several_threads_inside():
    """Callers whose layers are shared by all threads of the engine, more than there are cores."""
    torch.set_num_threads(2)
    try:
        model, twin, blocks = toys.converted()
        frozen = dynexec.freeze(model, toys.images(4), executor="fused")
        asked = [(toys.images(1 + n % 5), torch.rand(1 + n % 5, blocks) < 0.5) for n in range(40)]
        with torch.no_grad():
            expected = [toys.naive_forward(twin, *given) for given in asked]
        for actual, right in zip(together(lambda number: frozen(*asked[number]), len(asked)), expected):
            torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(1)


def test_what_was_used_last_is_kept_and_made_once():
    kept, made = Recent(3), []

    def make(key):
        made.append(key)
        time.sleep(1e-4)  # others go on, unless they wait
        return -key

    for key in (1, 2, 3, 1, 4):
        assert kept.find(key, lambda key=key: make(key)) == -key
    assert list(kept) == [3, 1, 4] and made == [1, 2, 3, 4]
    kept.clear()
    made.clear()
    found = together(lambda number: kept.find(number % 7, lambda: make(number % 7)), 1000)
    assert found == [-(number % 7) for number in range(1000)] and len(kept) == 3
    made.clear()
    assert set(together(lambda _: kept.find(100, lambda: make(100)), 100)) == {-100} and made == [100]


@needs_engine
def test_programs_of_few_image_sizes_are_kept():
    model, twin, blocks = toys.converted()
    frozen = dynexec.freeze(model, toys.images(2), executor="resident")
    keep = torch.rand(2, blocks) < 0.5
    for size in (*range(9, 9 + 2 * IMAGE_SIZES), 9):
        x = toys.images(2, size=size)
        with torch.no_grad():
            torch.testing.assert_close(frozen(x, keep), toys.naive_forward(twin, x, keep), rtol=1e-4, atol=1e-5)
    assert all(len(segment.programs) == IMAGE_SIZES for segment in frozen.segments)


# Pages that twenty new image sizes took, each with every batch size, after twenty others.
MEMORY = """
import sys, threading, torch
sys.path.insert(0, {tests!r})
import toys, dynexec
torch.set_num_threads(1)
pages = lambda: int(open("/proc/self/statm").read().split()[1])
model, _, blocks = toys.converted()
frozen = dynexec.freeze(model, toys.images(8), executor="resident")

def work(calls, sizes):
    for call in range(calls):
        n = 1 + call % 16
        frozen(toys.images(n, size=sizes[call // 16 % len(sizes)]), torch.rand(n, blocks) < 0.5)

def together(calls, sizes):
    threads = [threading.Thread(target=work, args=(calls, sizes)) for _ in range(3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()

together(320, range(29, 49))
before = pages()
together(320, range(9, 29))
print(pages() - before)
"""


@pytest.mark.skipif(engine_missing() is not None or sys.platform != "linux", reason="no engine, or no /proc")
def test_memory_does_not_grow_with_batch_and_image_sizes():
    program = MEMORY.format(tests=str(Path(__file__).parent))
    one_heap = os.environ | {"MALLOC_ARENA_MAX": "1"}  # or each thread fills its own, how far depends on the load
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=one_heap)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 2000, "8 MB"
