"""Which programs run whole segments of a network on a device, and in which ways."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from dynexec import dispatch
from dynexec.executors.engine import engine_missing, instruction_set
from dynexec.executors.launches import LaunchPrograms
from dynexec.executors.program import Programs


@dataclass(frozen=True)
class Backend:
    """Of one kind of device.

    Attributes
    ----------
    name : str
    runs_on : str
        An instruction set, or a GPU.
    missing : str or None
        Why it cannot be used here.
    executors : dict
        The executors that its programs are, by name: with which arguments programs are called.
    plans : bool
        Whether its programs need a Route, and not only the decisions.
    programs : callable
        ``programs(columns)`` makes the programs of a segment.
    """

    name: str
    runs_on: str
    missing: str | None
    executors: dict
    plans: bool
    programs: Callable


def engine(winograd):
    """The engine for CPUs."""
    executors = {"resident": {"together": False}, "fused": {"together": True}}
    missing = engine_missing() and f"no native code, {engine_missing()}"
    return Backend("engine", instruction_set(), missing, executors, False, partial(Programs, winograd=winograd))


def kernels(device, batch_invariant):
    """The Triton kernels for GPUs, which in the interpreter run on a CPU as well."""
    programs = partial(LaunchPrograms, batch_invariant=batch_invariant)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreted"
    executors = {"fused": {}, "dense": {"dense": True}}
    return Backend("Triton kernels", gpu, dispatch.triton_missing(), executors, True, programs)


def choose_backend(device, winograd, batch_invariant):
    """The one for a ``torch.device``."""
    return kernels(device, batch_invariant) if device.type == "cuda" else engine(winograd)
