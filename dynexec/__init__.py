"""Execute dynamic neural networks as fast as their FLOP counts promise."""

import importlib.util

# kernels/ lies beside this package in the source tree and inside it only once installed.
if importlib.util.find_spec("dynexec.kernels") is None:
    raise ImportError(f"dynexec at {__path__[0]} is a source tree that is not installed: run `pip install -e .` there")

from dynexec import measure, models, nn, ops, policy
from dynexec.convert import Conversion, convert, revert
from dynexec.deployment import load, save
from dynexec.executors import FrozenNetwork, freeze
from dynexec.nn import Adapter, decide
from dynexec.route import Route

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Conversion",
    "FrozenNetwork",
    "Route",
    "convert",
    "decide",
    "freeze",
    "load",
    "measure",
    "models",
    "nn",
    "ops",
    "policy",
    "revert",
    "save",
]
