"""Strategies for running a frozen chain of blocks, and ``freeze``, which chooses among them."""

from dynexec.executors.freeze import freeze
from dynexec.executors.frozen import FrozenNetwork

__all__ = ["FrozenNetwork", "freeze"]
