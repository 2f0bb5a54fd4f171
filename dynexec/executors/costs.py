"""Costs of the parts of a frozen block, measured once and cached on disk."""

import importlib.metadata
import json
import logging
import os
import stat
import time
from bisect import bisect_left
from functools import cache, partial
from hashlib import sha256
from pathlib import Path

import torch

from dynexec import ops
from dynexec.executors.block import run_all
from dynexec.files import replacing
from dynexec.measure.environment import processor_name

_VERSION = 1  # of the file
_LARGEST = 16  # rows; beyond, time grows linearly because blocks run in chunks
_CHUNKS = (32, 16, 8, 4)
_QUEUED, _WARM_UP = 4, 0.03  # calls of a run on a GPU; seconds of such runs before the first that counts
_REPEATS, _BUDGET = 5, 0.2  # runs of which the least time counts, unless they take more seconds than that
_ROWS = {str(rows) for rows in range(1, _LARGEST + 1)}
_log = logging.getLogger(__name__)


@cache
def _library_version():
    return importlib.metadata.version("dynexec")


class MissingTime(ValueError):
    """Raised for what would have to be measured and may not be."""


class CostCache:
    """Measured costs, kept in one JSON file per user; a missing file is an empty cache.

    A damaged or foreign file counts as empty, with a warning on the log ``dynexec.executors.costs``; given as ``path``,
    it stays as it is, since it may be anything. An invalid entry is measured again. Entries hold for one processor,
    thread count, version of dynexec and torch, and layout of this file: all of these are in the key.

    Parameters
    ----------
    path : path, optional
        Default: ``$XDG_CACHE_HOME/dynexec/costs.json`` (``~/.cache`` without the variable); nothing is kept if the user
        has no home.
    measure : bool
        False: an entry missing from the file is an error.
    """

    def __init__(self, path=None, measure=True):
        if path is not None and not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"cost_cache must be a path or None, got {path!r}")
        self._asked_for = path is not None
        self.path = Path(path) if path is not None else _default_path()
        self.entries, problem, foreign = self._read()
        if problem is not None:
            what = "ignored, and stays as it is" if foreign and self._asked_for else "ignored"
            _log.warning("cost cache %s is %s: %.200s", self.path, what, problem)
        self._changed, self._measure = False, measure

    def key(self, *signature):
        """Return the key of what ``signature`` says was measured, on this machine and with these versions."""
        # Virtual machines may hide the model, which alone does not say how wide vectors are.
        processor = f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}"
        machine = (_VERSION, _library_version(), torch.__version__, processor, torch.get_num_threads())
        return " | ".join(map(str, (*machine, *signature)))

    def get(self, key, valid, make):
        """Return the entry ``key``, or ``make()`` if there is none for which ``valid(entry)``."""
        known = key in self.entries
        if not known or not valid(self.entries[key]):
            if not self._measure:
                raise MissingTime(
                    f"cost_cache {str(self.path)!r} holds no times for {key:.200}: freeze with measure=True first, "
                    "a batch and images of this size, on this machine, with this number of threads and these versions "
                    "of dynexec and torch"
                )
            if known:
                _log.warning("cost cache %s: measuring anew what its entry does not fit: %.200s", self.path, key)
            self.entries[key] = make()
            self._changed = True
        return self.entries[key]

    def save(self):
        """Write new entries, keeping those that others wrote meanwhile.

        A place that cannot be written is not an error, but is a warning on the log if it is not the default one.
        """
        if not self._changed or self.path is None:
            return
        try:
            if self.path.exists() and not self.path.is_file():
                raise OSError("it is no file")
            entries, _, foreign = self._read()
            if foreign and self._asked_for:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"version": _VERSION, "entries": entries | self.entries})
            with replacing(self.path) as file:
                file.write(text)
        except (OSError, ValueError) as error:  # of a name with a NUL
            if self._asked_for:
                _log.warning("cost cache %s cannot be written: %s: %s", self.path, type(error).__name__, error)

    def _read(self):
        """Return the entries in the file, why there are none or None, and whether it may be something else's file."""
        if self.path is None:
            return {}, None, False
        text = None
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):  # reading a pipe may wait for ever
                return {}, "it is no file", False
            text = self.path.read_bytes()
            stored = json.loads(text)
        except FileNotFoundError:
            return {}, None, False
        except (OSError, ValueError, RecursionError) as error:
            return {}, f"{type(error).__name__}: {error}", text != b"" and os.path.isfile(self.path)
        if not isinstance(stored, dict) or stored.keys() != {"version", "entries"}:
            return {}, "it is the file of something else", True
        if type(stored["version"]) is not int or stored["version"] != _VERSION:
            return {}, f"its version is {stored['version']!r:.40}, not {_VERSION}", False
        entries = stored["entries"]
        return (entries, None, False) if isinstance(entries, dict) else ({}, "its entries are not named", False)


def _default_path():
    """Return the user's file, or None if the user has no home, as in some containers."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return home / "dynexec" / "costs.json"


class Curve:
    """Seconds as a function of the number of rows: measured points, with straight lines between and beyond them."""

    def __init__(self, points):
        self.points = sorted((int(rows), float(seconds)) for rows, seconds in points.items())
        self._known = {0: 0.0}

    def __call__(self, rows):
        if rows not in self._known:
            self._known[rows] = self._interpolate(rows)
        return self._known[rows]

    def _interpolate(self, rows):
        if len(self.points) == 1:
            return self.points[0][1] * rows / self.points[0][0]
        i = min(max(bisect_left([n for n, _ in self.points], rows), 1), len(self.points) - 1)
        (n0, t0), (n1, t1) = self.points[i - 1 : i + 1]
        return max(t0 + (t1 - t0) * (rows - n0) / (n1 - n0), 0.0)


class BlockCost:
    """Seconds of the parts of one frozen block, as functions of the number of rows.

    ``body`` computes rows; with ``both``, of the samples that keep the block and of the others. ``move`` gathers and
    scatters rows, ``select`` is what ``masked`` adds to put dropped rows back, ``shortcut`` is the shortcut of all
    rows. ``chunk`` is how many rows ``body`` takes at a time.
    """

    def __init__(self, chunk, body, move, select, shortcut, both=False):
        self.chunk, self.both = chunk, both
        self.curves = tuple(map(Curve, (body, move, select, shortcut)))
        self.body, self.move, self.select, self.shortcut = self.curves


def device_name(device):
    """Return what a cache's key needs besides the processor: nothing for a CPU, or the name of the GPU."""
    return (torch.cuda.get_device_name(device),) if device.type == "cuda" else ()


def digest(value):
    """Shorten a long text, or a value whose text is long, for a cache's key."""
    return sha256(str(value).encode()).hexdigest()


def are_times(names):
    """Return a check for :meth:`CostCache.get`: whether an entry has seconds for each of these names."""
    return lambda entry: (
        isinstance(entry, dict) and entry.keys() == set(names) and all(_is_time(time) for time in entry.values())
    )


def measure_block(block, batch, cache):
    """Return the :class:`BlockCost` of ``block`` up to about ``batch`` rows, from ``cache`` or measured now."""
    key = cache.key(block.signature, block.dtype, batch, *device_name(block.device))
    return BlockCost(**cache.get(key, _is_cost, lambda: _measure(block, batch)))


def _is_cost(entry):
    """Whether an entry is a result of :func:`_measure`, read from a file or not."""
    return (
        isinstance(entry, dict)
        and entry.keys() == {"chunk", "both", "body", "move", "select", "shortcut"}
        and type(entry["chunk"]) is int
        and entry["chunk"] in _CHUNKS
        and isinstance(entry["both"], bool)
        and all(map(_are_points, (entry["body"], entry["move"], entry["select"], entry["shortcut"])))
    )


def _are_points(points):
    """Whether these are seconds by numbers of rows, which JSON turned into texts."""
    return (
        isinstance(points, dict)
        and 0 < len(points)
        and all(str(rows) in _ROWS for rows in points)
        and all(_is_time(seconds) for seconds in points.values())
    )


def _is_time(seconds):
    """Whether a value from a file is a time: a float of at least 0 and below one day."""
    return isinstance(seconds, float) and 0 <= seconds < 86400


def _measure(block, batch):
    timed = partial(seconds, device=block.device)
    most = min(batch, _LARGEST)
    sizes = sorted({2**i for i in range(most.bit_length())} | {most})
    x = block.example(min(batch, max(_CHUNKS)))
    s = _shortcut(block, x)
    # The largest chunk that holds the batch stands for all larger ones.
    sizes_of_chunk = [size for size in _CHUNKS if size < 2 * batch] or [_CHUNKS[-1]]
    chunks = {size: timed(lambda size=size: run_all(block.body, x, s, size)) for size in sizes_of_chunk}
    fastest = min(chunks.values())
    chunk = next(size for size in chunks if chunks[size] <= 1.03 * fastest)
    entry = {"chunk": chunk, "both": block.other is not None, "body": {}, "move": {}, "select": {}, "shortcut": {}}
    for n in sizes:
        rows = x[:n]
        s = _shortcut(block, rows)
        index = torch.arange(n, dtype=torch.int32, device=block.device).flip(0)  # no rows in order to profit from
        entry["body"][n] = timed(lambda rows=rows, s=s: run_all(block.body, rows, s, chunk))
        entry["move"][n] = timed(lambda s=s, index=index: ops.scatter_rows_(s, index, ops.gather_rows(s, index)))
        if block.shortcut is not None:
            entry["move"][n] += timed(lambda rows=rows, index=index: ops.gather_rows(rows, index))
            entry["shortcut"][n] = timed(lambda rows=rows: block.shortcut(rows))
        keep = (torch.arange(n, device=block.device) % 2 == 0).reshape(-1, *[1] * (s.dim() - 1))
        entry["select"][n] = timed(lambda s=s, keep=keep: torch.where(keep, s.clone(), s))
    if block.shortcut is None:
        entry["shortcut"] = {1: 0.0}
    return entry


def _shortcut(block, x):
    return x if block.shortcut is None else block.shortcut(x)


def seconds(function, device=None):
    """Measure the seconds of ``function()`` on ``device``, as the least of a few runs: noise only ever adds."""
    warm = time.perf_counter() + _WARM_UP if device is not None and device.type == "cuda" else 0.0
    time_call(function, device)
    while time.perf_counter() < warm:  # an idle GPU has lowered its clock
        time_call(function, device)
    best, start = float("inf"), time.perf_counter()
    for _ in range(_REPEATS):
        best = min(best, time_call(function, device))
        if time.perf_counter() - start > _BUDGET:
            break
    return best


def time_call(function, device=None):
    """Measure the seconds of ``function()`` on ``device``.

    A GPU's own clock times calls back to back: the host's time to launch one counts if the GPU waits for it.
    """
    if device is None or device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        function()  # so that the clock starts while the GPU is at work
        begin.record()
        for _ in range(_QUEUED):
            function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / _QUEUED
