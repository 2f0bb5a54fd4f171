"""Which programs run whole segments of a network on a device, and in which ways."""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch

from dynexec import dispatch
from dynexec import kernels as package
from dynexec.executors.conditional import conditional_missing
from dynexec.executors.engine import engine_missing, instruction_set
from dynexec.executors.forecast import program_seconds
from dynexec.executors.launches import LaunchPrograms
from dynexec.executors.program import Programs
from dynexec.measure.roofline import H100

#: Executors of the engine and of the kernels.
ENGINE_EXECUTORS = ("resident", "fused")
KERNEL_EXECUTORS = ("fused", "resident", "conditional", "dense", "switched")


@dataclass(frozen=True)
class Backend:
    """What runs segments on one kind of device.

    Attributes
    ----------
    name : str
    runs_on : str
        An instruction set, or a GPU.
    missing : str or None
        Why it cannot be used here.
    executors : dict
        The executors of its programs, by name: the arguments with which programs are called.
    plans : bool
        Whether its programs need a Route rather than only the decisions.
    strict : bool
        Whether one wrong executor rules out all, since they share their code.
    version : tuple
        Version of what runs; part of the key of cached times.
    programs : callable
        ``programs(columns)`` makes the programs of a segment.
    up_to : dict
        Largest number of samples with which an executor is tried, unless it is asked for.
    expected : callable or None
        ``expected(program, samples, kept, dtype, executor)``: seconds by a model, without measuring.
    """

    name: str
    runs_on: str
    missing: str | None
    executors: dict
    plans: bool
    strict: bool
    version: tuple
    programs: Callable
    up_to: dict
    expected: Callable | None


def engine(winograd):
    """Return the engine for CPUs."""
    executors = {name: {"together": name == "fused"} for name in ENGINE_EXECUTORS}
    missing = engine_missing() and f"no native code, {engine_missing()}"
    programs = partial(Programs, winograd=winograd)
    return Backend("engine", instruction_set(), missing, executors, False, True, (), programs, {}, None)


def kernels(device, batch_invariant):
    """Return the Triton kernels for GPUs, which in the interpreter also run on a CPU."""
    programs = partial(LaunchPrograms, batch_invariant=batch_invariant)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreted"
    executors = {name: {"executor": name} for name in KERNEL_EXECUTORS}
    if batch_invariant:
        del executors["switched"]  # what computes a sample depends on the others' decisions
    version = _digest_of_kernels(), batch_invariant, conditional_missing()
    model = H100
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        model = H100.resize(gpu, properties.multi_processor_count, properties.major >= 9)
    missing, expected = dispatch.triton_missing(), partial(program_seconds, model)
    # With more samples hardly a block is kept by none; in the interpreter there are no nodes.
    up_to = {"conditional": 4 if device.type == "cuda" else 0}
    return Backend("Triton kernels", gpu, missing, executors, True, False, version, programs, up_to, expected)


def _digest_of_kernels():
    """Return a digest that changes with the kernels, with what launches them, and with Triton."""
    sources = sorted(Path(package.__file__).parent.glob("*.py"))
    sources += [
        Path(__file__).with_name(f"{name}.py")
        for name in ("launches", "launch_program", "frames", "conditional", "graphs", "resident", "twins")
    ]
    if (module := importlib.util.find_spec("dynexec._cuda")) is not None:
        sources.append(Path(module.origin))
    triton = importlib.metadata.version("triton") if dispatch.triton_missing() is None else ""
    return sha256(triton.encode() + b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def choose_backend(device, winograd, batch_invariant):
    """Return the backend for a ``torch.device``."""
    return kernels(device, batch_invariant) if device.type == "cuda" else engine(winograd)
