"""Types of command-line arguments, for argparse."""

import math
from argparse import ArgumentTypeError
from pathlib import Path

from dynexec.report.experiment import PUBLISHED

_MOST_THREADS = 1024  # with ever more, torch ends the process


def positive(text):
    """An int of 1 or more."""
    value = int(text)
    if value < 1:
        raise ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def threads(text):
    """An int from 1 to 1024."""
    value = int(text)
    if not 1 <= value <= _MOST_THREADS:
        raise ArgumentTypeError(f"must be from 1 to {_MOST_THREADS}, got {value}")
    return value


def seconds(text):
    """A finite float of 0 or more."""
    value = float(text)
    if not 0.0 <= value < math.inf:
        raise ArgumentTypeError(f"must be 0 or more, got {text}")
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
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= 1.0:
        raise ArgumentTypeError(f"must be a share between 0 and 1, or {PUBLISHED!r}; got {text!r}")
    return value
