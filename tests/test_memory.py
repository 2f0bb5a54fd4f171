"""keep_freed_memory: whether the C library keeps what was freed, seen from the page faults of a process of its own."""

import ctypes
import json
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dynexec.executors import memory

FAULTS = """
import json, resource, torch
from dynexec.executors.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(1 << 24)  # 64 MiB, freed at once: more than glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.ones(1), faults()
given_back = faults()
kept = keep_freed_memory()
faults()
print(json.dumps([given_back, faults(), kept]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked")
def test_freed_memory_is_used_again():
    result = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    given_back, after, kept = json.loads(result.stdout)
    assert kept is True
    assert given_back > 100 and after * 10 < given_back


def answers(*given):
    """A C library whose mallopt gives these answers, and the calls that it got."""
    calls, left = [], list(given)
    library = SimpleNamespace(gnu_get_libc_version=None, mallopt=lambda *call: calls.append(call) or left.pop(0))
    return library, calls


@pytest.mark.parametrize(
    "given, kept",
    [((1, 1), True), ((1, 0), False), ((0, 1, 1), True), ((0, 1, 0), False), ((0, 0), False)],
)
def test_the_trim_threshold_is_raised_only_where_the_other_one_was(monkeypatch, given, kept):
    library, calls = answers(*given)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert memory.keep_freed_memory.__wrapped__() is kept
    mapped, old, trim = (-3, 2**31 - 1), (-3, 32 << 20), (-1, 2**31 - 1)  # -3: M_MMAP_THRESHOLD, -1: M_TRIM_THRESHOLD
    assert calls == ([mapped] if given[0] else [mapped, old]) + [trim] * any(given[:-1])


def test_another_c_library_is_left_alone(monkeypatch):
    library, calls = answers(1, 1)
    del library.gnu_get_libc_version
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert memory.keep_freed_memory.__wrapped__() is False
    assert calls == []
