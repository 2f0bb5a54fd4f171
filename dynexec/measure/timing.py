"""Times several ways of computing the same thing against each other.

``torch.utils.benchmark`` times one statement at a time: a change in the machine's clock or load during that time
affects one candidate alone and looks like a difference between them. It also makes two untimed calls before every
measurement, which would triple the cost of taking turns, and does not measure CPU time. Here, candidates take turns.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

# A turn of a fast candidate repeats it for about this long, so that a turn is far above the clock's resolution.
_TURN_SECONDS = 0.02
_MAX_CALLS_PER_TURN = 100
# Below this, what the neighbour leaves behind (caches, threads of another library still spinning) would show in the
# first call of a turn, which is therefore not counted.
_SETTLE_BELOW_SECONDS = 0.1


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate, one entry per timed call.

    Attributes
    ----------
    wall : tuple of float
        Elapsed time.
    cpu : tuple of float
        Computing time of all threads of this process, averaged over the calls of a turn.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def median(self):
        """Median elapsed seconds."""
        return float(np.median(self.wall))

    @property
    def p10(self):
        """10th percentile of the elapsed seconds."""
        return float(np.percentile(self.wall, 10))

    @property
    def p90(self):
        """90th percentile of the elapsed seconds."""
        return float(np.percentile(self.wall, 90))

    @property
    def cpu_median(self):
        """Median CPU seconds: up to the thread count times the elapsed time."""
        return float(np.median(self.cpu))


@dataclass(frozen=True)
class Comparison:
    """Timings taken in turns.

    Attributes
    ----------
    timings : dict of str to Timing
    spread : float
        The baseline is timed twice, as two candidates: the difference between its two medians, relative to the smaller.
        A difference between candidates within it is noise.
    rounds : int
        Number of turns of every candidate.
    """

    timings: dict[str, Timing]
    spread: float
    rounds: int


def compare(
    candidates: dict[str, Callable[[], object]],
    *,
    baseline: str | None = None,
    device: torch.device | None = None,
    seconds: float = 10.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    progress: Callable[[float, str], None] | None = None,
) -> Comparison:
    """Time candidates in turns (A B C A B C ...), after a warm-up of each.

    The caller sets thread counts beforehand.

    Parameters
    ----------
    candidates : dict of str to callable
        What to time, called without arguments.
    baseline : str, optional
        The candidate to time twice for :attr:`Comparison.spread`; default the first.
    device : torch.device, optional
        For a GPU, its own clock times all calls of a turn back to back, and every call counts with their mean.
    seconds : float
        New rounds start until this much time has passed since the first one.
    min_rounds, max_rounds : int
        Fewest and most rounds, whatever the time.
    progress : callable, optional
        Called with the share done (0 to 1) and the name of the candidate whose turn it is.

    Raises
    ------
    ValueError
        If there are no candidates, the baseline is not one of them, or the rounds are not ``1 <= min <= max``.
    """
    if not candidates:
        raise ValueError("candidates must hold at least one callable")
    if baseline is not None and baseline not in candidates:
        raise ValueError(f"baseline must be one of {list(candidates)}, got {baseline!r}")
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(f"rounds must be 1 <= min_rounds <= max_rounds, got {min_rounds} and {max_rounds}")
    progress = progress or (lambda share, name: None)
    turns = []
    for name, call in candidates.items():
        progress(0.0, f"warming up {name}")
        turns.append((_GpuTurn if device is not None and device.type == "cuda" else _Turn)(name, call))
    first = next(turn for turn in turns if turn.name == (baseline or turns[0].name))
    again = first.again()
    # Half a round away from the first, so that both halves of the machine's ups and downs are seen.
    turns.insert((turns.index(first) + len(turns) // 2 + 1) % (len(turns) + 1), again)
    rounds = _take_turns(turns, seconds, min_rounds, max_rounds, progress)
    timings = {turn.name: turn.timing() for turn in turns if turn is not again}
    medians = timings[first.name].median, again.timing().median
    return Comparison(timings, max(medians) / min(medians) - 1.0, rounds)


def _take_turns(turns, seconds, min_rounds, max_rounds, progress):
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(max_rounds):
            elapsed = time.perf_counter() - start
            if done >= min_rounds and elapsed >= seconds:
                return done
            share = min(1.0, elapsed / seconds if seconds else 1.0, done / min_rounds)
            for turn in turns:
                progress(share, turn.name)
                turn.take()
        return max_rounds
    finally:
        if collecting:
            gc.enable()


class _Turn:
    """One candidate and the times of its calls so far."""

    def __init__(self, name, call):
        self.name, self.call = name, call
        self.wall, self.cpu = [], []
        call()
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        once = time.perf_counter() - start
        self.settle = once < _SETTLE_BELOW_SECONDS
        self.calls = max(1, min(_MAX_CALLS_PER_TURN, round(_TURN_SECONDS / max(once, 1e-9))))

    def again(self):
        """Return the same candidate a second time, already warm."""
        turn = object.__new__(type(self))
        turn.__dict__.update(self.__dict__, wall=[], cpu=[])
        return turn

    def wait(self):
        """Wait for what was called."""

    def take(self):
        if self.settle:
            self.call()
        cpu = time.process_time()
        for _ in range(self.calls):
            start = time.perf_counter()
            self.call()
            self.wall.append(time.perf_counter() - start)
        self.cpu.append((time.process_time() - cpu) / self.calls)

    def timing(self):
        return Timing(tuple(self.wall), tuple(self.cpu))


class _GpuTurn(_Turn):
    def wait(self):
        torch.cuda.synchronize()

    def take(self):
        if self.settle:
            self.call()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cpu = time.process_time()
        begin.record()
        for _ in range(self.calls):
            self.call()
        end.record()
        self.cpu.append((time.process_time() - cpu) / self.calls)
        self.wait()
        self.wall.append(begin.elapsed_time(end) / 1e3 / self.calls)
