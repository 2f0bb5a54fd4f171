"""Strategies to run a frozen chain of blocks, and ``freeze``, which picks among them."""

from dynexec.executors.freeze import FrozenNetwork, freeze

__all__ = ["FrozenNetwork", "freeze"]
