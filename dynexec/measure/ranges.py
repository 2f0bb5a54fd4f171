"""Named ranges for what runs: for torch's profiler and through it NVTX, or for a :class:`Recorder`."""

import threading
import time
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch

_NOTHING = nullcontext()
_LABELS = {
    "block": "{} kept {}/{}",
    "other": "{} other weights {}/{}",
    "both": "{}",
    "shortcut": "{} shortcut",
    "layer": "{}",
}


class _Active(threading.local):
    recorder = None


_active = _Active()


class Span(NamedTuple):
    """A period in which a thread worked on a part of a network, for ``samples`` samples.

    ``begin`` and ``end`` are in nanoseconds. ``kind`` is "block" (the branch of samples with a True decision), "other"
    (the branch of those with a False one, in blocks with two sets of weights), "both" (of these, where one launch runs
    both), "shortcut", "layer", "policy" or "planning"; in routed networks "part", "policy" or "between".
    """

    thread: int
    name: str
    kind: str
    samples: int
    begin: int
    end: int


def profiling():
    """Whether ranges are wanted in this thread. Never while ``torch.compile`` is tracing."""
    if torch.compiler.is_compiling():
        return False
    return _active.recorder is not None or torch.autograd._profiler_enabled()


def part_range(name, kind, samples, total):
    """Return a context for the computation of a part of a network on ``samples`` of ``total`` samples.

    ``kind`` is that of a :class:`Span`; ``samples`` is None if only the device knows it. If no ranges are wanted the
    context does nothing. It never waits for a device.
    """
    if not profiling():
        return _NOTHING
    if _active.recorder is not None:
        return _active.recorder.span(name, kind, samples)
    label = name if samples is None else _LABELS[kind].format(name, samples, total)
    return torch.profiler.record_function(label)


class Recorder:
    """Records the ranges that the thread enters within its ``with`` statement.

    Parameters
    ----------
    device : torch.device
        On a GPU, times are taken by its own clock, with events on the current stream.
    """

    def __init__(self, device):
        self._on_gpu = device.type == "cuda"
        self._found = []

    def __enter__(self):
        self._outer, _active.recorder = _active.recorder, self
        self._start = self.mark()
        return self

    def __exit__(self, *exception):
        _active.recorder = self._outer

    def mark(self):
        """Return the current time, for :meth:`add`."""
        if not self._on_gpu:
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, span):
        """Record a :class:`Span` whose times are marks."""
        self._found.append(span)

    @contextmanager
    def span(self, name, kind, samples):
        """Record what runs inside as a span."""
        begin = self.mark()
        yield
        self.add(Span(0, name, kind, samples, begin, self.mark()))

    def spans(self):
        """Return all spans, with times relative to the start of the ``with`` statement; waits for a GPU."""
        if self._on_gpu:
            torch.cuda.synchronize()
        return tuple(span._replace(begin=self.since(span.begin), end=self.since(span.end)) for span in self._found)

    def since(self, mark):
        """Return the nanoseconds from the start to ``mark``."""
        return round(1e6 * self._start.elapsed_time(mark)) if self._on_gpu else mark - self._start
