"""Checks of the numbers that networks are built with."""

from collections.abc import Iterable


def check_counts(*, least=1, **counts):
    """Raise ValueError, naming the argument, unless each is an int of at least ``least``, or a sequence of such ints.

    torch accepts sizes of 0; such a network fails only when it runs, or gives nothing.
    """
    for name, given in counts.items():
        for number in given if isinstance(given, Iterable) else (given,):
            if isinstance(number, bool) or not hasattr(number, "__index__") or number < least:
                raise ValueError(f"{name} must be at least {least}, and whole, got {number!r}")
