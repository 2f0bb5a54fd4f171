"""The native engine for CPUs: whether it is available, its instruction set, and the programs that it holds."""

import platform
import weakref

import torch

from dynexec import dispatch, native


def engine_missing():
    """Return why there is no engine here, or None."""
    return dispatch.native_missing


def instruction_set():
    """Return the instruction set that the engine's inner loops were compiled for, or None without an engine."""
    if engine_missing():
        return None
    baseline = "NEON" if platform.machine().lower() in ("aarch64", "arm64") else "SSE2"
    return {4: baseline, 8: "AVX2", 16: "AVX-512"}[vector_width()]


def peak_rate():
    """Measure the most floating-point operations per second that one thread can do with this instruction set."""
    return torch.ops.dynexec.peak_rate(torch.zeros(1, dtype=torch.int64))


def vector_width():
    """Return the number of floats per vector."""
    return torch.ops.dynexec.vector_width(torch.zeros(1, dtype=torch.int64))


class Program:
    """A program that the engine has checked and holds: ``program(x, decisions)``."""

    def __init__(self, code, weights, instructions=()):
        self.instructions = instructions  # that the code was made of, for a profile
        self.code, self.num_weights = code, weights.numel()
        self.handle = torch.ops.dynexec.make_program(code, weights)
        weakref.finalize(self, native.free_program, self.handle)

    @property
    def signature(self):
        """What it computes, as text."""
        return str(self.code.tolist())

    def __call__(self, x, decisions, group=0, together=False):
        """Run the program.

        Parameters
        ----------
        x : float32 tensor ``[N, C, H, W]``
            In any memory format.
        decisions : bool tensor ``[N, columns]``, or a Route of such; None if nothing is decided
        group : int
            Number of samples that go through the program together; 0: what suits the batch.
        together : bool
            Whether all threads work on one group, instead of each on its own.

        Returns
        -------
        float32 tensor ``[N, C, H, W]``, channels_last
        """
        return torch.ops.dynexec.run_program(x, *self._arguments(x, decisions), group, together)

    def profile(self, x, decisions, group=0, together=False):
        """Run the program; also return what every thread did: int64 ``[spans, 5]``, in order of threads and of time.

        A span holds the numbers of the thread and of the instruction, the number of samples, and begin and end in
        nanoseconds since the start of the call. Instructions that run together on bands of rows share one span, that of
        the first.
        """
        return torch.ops.dynexec.profile_program(x, *self._arguments(x, decisions), group, together)

    def _arguments(self, x, decisions):
        if decisions is None:
            decisions = x.new_empty((len(x), 0), dtype=torch.bool)
        return getattr(decisions, "decisions", decisions), self.handle
