"""Interleaved timing, under a clock that the candidates themselves advance."""

import gc

import pytest
import torch

from dynexec.measure import timing
from dynexec.measure.timing import Timing, compare


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        wall = cpu = 0.0

        def candidate(self, seconds, *, threads=1, log=None, name=""):
            """Takes ``seconds`` (a number or a function of the call number) and logs its name."""
            calls = iter(range(10**9))

            def call():
                taken = seconds(next(calls)) if callable(seconds) else seconds
                self.wall += taken
                self.cpu += threads * taken
                if log is not None:
                    log.append(name)

            return call

    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.wall)
    monkeypatch.setattr(timing.time, "process_time", lambda: clock.cpu)
    return clock


def test_candidates_take_turns(clock):
    log = []
    candidates = {name: clock.candidate(1.0, log=log, name=name) for name in "ABC"}
    result = compare(candidates, baseline="A", seconds=0, min_rounds=3, max_rounds=3)
    assert "".join(log[:6]) == "AABBCC"  # warm-up
    assert "".join(log[6:]) == "ABAC" * 3  # the baseline has two turns a round
    assert result.rounds == 3 and list(result.timings) == ["A", "B", "C"]
    assert all(len(timing.wall) == 3 for timing in result.timings.values())


def test_medians_percentiles_and_cpu_time(clock):
    durations = [9.0, 9.0, *range(1, 12)]  # two of warm-up
    result = compare(
        {"steady": clock.candidate(2.0, threads=4), "varying": clock.candidate(lambda n: durations[n])},
        seconds=0,
        min_rounds=11,
        max_rounds=11,
    )
    varying = result.timings["varying"]
    assert varying.median == pytest.approx(6.0)
    assert (varying.p10, varying.p90) == pytest.approx((2.0, 10.0))
    assert result.timings["steady"].median == pytest.approx(2.0)
    assert result.timings["steady"].cpu_median == pytest.approx(8.0)
    assert result.spread == pytest.approx(0.0)


def test_spread_is_what_the_baseline_differs_from_itself(clock):
    # Warm-up, then alternately its first and its second turn of a round.
    result = compare({"A": clock.candidate(lambda n: 1.0 if n < 2 or n % 2 == 0 else 1.25)}, seconds=0)
    assert result.spread == pytest.approx(0.25)


def test_fast_candidates_repeat_within_a_turn(clock):
    log = []
    candidates = {
        "fast": clock.candidate(0.002, log=log, name="f"),
        "slow": clock.candidate(0.5, log=log, name="s"),
    }
    result = compare(candidates, baseline="slow", seconds=0, min_rounds=1, max_rounds=1)
    assert len(result.timings["fast"].wall) == 10 and len(result.timings["slow"].wall) == 1
    assert log.count("f") == 2 + 1 + 10  # warm-up, one to settle, ten timed
    assert log.count("s") == 2 + 2


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 5), (25.0, 13), (1e9, 20)])
def test_rounds_follow_the_time_given(clock, seconds, rounds):
    result = compare({"A": clock.candidate(1.0)}, seconds=seconds, min_rounds=5, max_rounds=20)
    assert result.rounds == rounds


def test_progress_rises_and_names_the_turn(clock):
    seen = []
    compare({"A": clock.candidate(1.0), "B": clock.candidate(1.0)}, seconds=30, progress=lambda *a: seen.append(a))
    shares = [share for share, _ in seen]
    assert shares == sorted(shares) and shares[0] == 0.0 and 0.8 < shares[-1] <= 1.0
    assert {name for _, name in seen} == {"warming up A", "warming up B", "A", "B"}


def test_garbage_collection_is_back_after_an_error(clock):
    calls = []

    def fails():
        calls.append(gc.isenabled())
        clock.wall += 1.0
        if len(calls) == 3:
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        compare({"A": fails})
    assert calls == [True, True, False] and gc.isenabled()


@pytest.mark.parametrize(
    ("candidates", "options", "message"),
    [
        ({}, {}, "at least one"),
        ({"A": int}, {"baseline": "B"}, "baseline must be one of"),
        ({"A": int}, {"min_rounds": 0}, "min_rounds"),
        ({"A": int}, {"min_rounds": 3, "max_rounds": 2}, "max_rounds"),
    ],
)
def test_wrong_arguments(candidates, options, message):
    with pytest.raises(ValueError, match=message):
        compare(candidates, **options)


def test_real_time():
    result = compare({"A": lambda: sum(range(1000))}, seconds=0)
    times = result.timings["A"]
    assert isinstance(times, Timing) and 0 < times.p10 <= times.median <= times.p90


def test_a_gpus_clock_takes_the_time_of_a_turn(clock, monkeypatch):
    """The host is done long before the device: its clock must not count."""
    device = {"time": 0.0}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = device["time"]

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    def launch():
        device["time"] += 0.004
        clock.wall += 0.001

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    result = compare({"a": launch}, device=torch.device("cuda"), seconds=0.0, min_rounds=3)
    assert result.timings["a"].median == pytest.approx(0.004)
    assert len(result.timings["a"].wall) == 3  # a mean per turn
    assert compare({"a": launch}, seconds=0.0, min_rounds=3).timings["a"].median == pytest.approx(0.001)
