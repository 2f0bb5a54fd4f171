"""What digits_adashare.py and digits_spottune.py share: a line of progress, equal outputs before times, tables."""

import sys
from statistics import mean, pstdev

import torch

from dynexec.executors.proof import TOLERANCE, relative_error


class Progress:
    """A line that tells what a seed is at, where somebody may look at it."""

    def __init__(self, seed):
        self.seed, self.live = seed, sys.stdout.isatty()

    def show(self, what):
        """Write ``what`` over the line."""
        if self.live:
            print(f"\r\033[Kseed {self.seed}: {what}", end="", flush=True)

    def done(self, what):
        """Leave ``what`` for good."""
        print(f"{chr(13) if self.live else ''}seed {self.seed}: {what}", flush=True)


def check_equal(name, actual, expected):
    """The largest error of ``actual``, relative to the largest value expected; RuntimeError where they differ."""
    error = relative_error(actual, expected)
    if not error <= TOLERANCE[torch.float32]:
        raise RuntimeError(f"{name} differs from its reference by {error:.1e}: not timed")
    return error


def spread(values, digits=1):
    """Mean and standard deviation."""
    return f"{mean(values):.{digits}f} +- {pstdev(values):.{digits}f}"


def time_lines(runs, slowest, flops=False):
    """Lines of CPU times, means over seeds, how many times as fast as ``slowest`` they are, and errors.

    Parameters
    ----------
    runs : list of dict
        Of each seed; ``inference`` and ``training`` have times by name, in microseconds and milliseconds, ``errors`` by
        name, the ``spread`` of the first time, which was taken twice, and maybe ``flops`` by name.
    slowest : str
    flops : bool
        Whether there is a column of FLOPs.
    """
    lines = []
    for part, unit in (("inference", "microseconds"), ("training", "milliseconds")):
        heading = f"{f'{part}, CPU {unit}':34}{'median':>16}{'times as fast':>16}{'largest error':>16}"
        lines += ["", heading + (f"{'kFLOPs':>9}" if flops else "")]
        for name in runs[0][part][unit]:
            times = [run[part][unit][name] for run in runs]
            ratios = [run[part][unit][slowest] / run[part][unit][name] for run in runs]
            errors = [run[part]["errors"][name] for run in runs if name in run[part]["errors"]]
            error = f"{max(errors):.0e}" if errors else "-"
            lines.append(f"{name:34}{spread(times):>16}{spread(ratios, 2):>16}{error:>16}")
            if flops:
                known = runs[0][part].get("flops")
                lines[-1] += f"{f'{known[name] / 1e3:.0f}' if known else '-':>9}"
        lines.append(f"{'wall clock of the first, twice':34}{max(run[part]['spread'] for run in runs):16.2f}")
    return lines
