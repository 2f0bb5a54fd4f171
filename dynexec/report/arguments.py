"""Types of command-line arguments, for argparse."""

import math
import sys
from argparse import ArgumentTypeError
from pathlib import Path

from dynexec.report.experiment import PUBLISHED

_MOST_THREADS = 1024  # with ever more, torch ends the process


def positive(text):
    """An int of 1 or more."""
    return _number(text, int, 1, math.inf, "a whole number of 1 or more")


def threads(text):
    """An int from 1 to 1024."""
    return _number(text, int, 1, _MOST_THREADS, f"a whole number from 1 to {_MOST_THREADS}")


def seconds(text):
    """A finite float of 0 or more."""
    return _number(text, float, 0.0, sys.float_info.max, "a finite number of 0 or more")


def _number(text, kind, low, high, expected):
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise ArgumentTypeError(f"must be {expected}, got {text!r}")
    return value


def file(text):
    """A path that is not a folder."""
    path = Path(text)
    if path.is_dir():
        raise ArgumentTypeError(f"must be a file, but {text!r} is a folder")
    return path


def keep_share(text):
    """A float from 0 to 1, or the word :data:`PUBLISHED`."""
    if text == PUBLISHED:
        return text
    return _number(text, float, 0.0, 1.0, f"a share between 0 and 1, or {PUBLISHED!r}")
