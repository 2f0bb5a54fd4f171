"""Stochastic depth that computes only the kept samples (Huang et al., ECCV 2016)."""

from contextlib import suppress
from numbers import Real

import torch
from torch import nn

from dynexec.nn.batch_norm import meets_other_processes
from dynexec.nn.residual import is_traced, with_zero_gradients
from dynexec.nn.rows import merge_rows, split_rows
from dynexec.reference import empty_rows

DRAWS = ("bernoulli", "fixed")


class SubsetDropPath(nn.Module):
    """Stochastic depth on a residual branch, computed in training for the kept samples only.

    ``drop_path(x, branch)`` is ``x + DropPath(drop_prob)(branch(x))``, with timm's DropPath: every sample keeps its
    branch with probability ``1 - drop_prob``, and a kept branch is divided by that. Where DropPath computes the branch
    for all samples and multiplies by 0, this module gathers the kept samples, runs the branch on them, and adds the
    result to their rows of a copy of ``x``. In evaluation mode and at rate 0 it is ``x + branch(x)``.

    Parameters
    ----------
    drop_prob : float
        Probability that a sample drops its branch, ``0 <= drop_prob < 1``. May be changed at any time, as by a
        schedule.
    draw : {"bernoulli", "fixed"}
        "bernoulli": independently for every sample, as in DropPath. "fixed": always ``round(N * (1 - drop_prob))`` of N
        samples, at least one, chosen uniformly and scaled by N over their number: equal in expectation, and every step
        costs the same (Oquab et al., "DINOv2", 2023, section 5).
    generator : torch.Generator, optional
        A CPU generator. Default: torch's default one.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid.

    Notes
    -----
    *BatchNorm* inside the branch sees, and computes its training statistics over, the kept samples only; with DropPath
    it sees all samples. Apart from rounding this is the only difference from DropPath. Otherwise, row i of the branch's
    output must depend on row i of its input alone, and the branch must not write to its input.

    *Draws* are made on the host, whatever the device, so that no step waits for one. On a CPU and with "bernoulli" they
    are those that DropPath would make with the same seed, provided that the branch itself draws nothing.

    *Fixed shapes*: ``torch.compile``, ``torch.export``, ``torch.jit.trace``, meta tensors and CUDA graph capture cannot
    follow random sizes. There the branch runs on all samples and is masked, as in DropPath, and a ``generator`` is a
    RuntimeError.

    *Activation checkpointing* runs the forward again and restores the default generator for it, so that it draws the
    same samples. It does not restore a ``generator`` passed here: drawing from that in a backward pass is a
    RuntimeError.
    """

    def __init__(self, drop_prob=0.0, *, draw="bernoulli", generator=None):
        super().__init__()
        _check_rate(drop_prob)
        if draw not in DRAWS:
            raise ValueError(f"draw must be one of {DRAWS}, got {draw!r}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(f"generator must be of the CPU, where draws are made, got one of {generator.device}")
        self.drop_prob, self.draw, self.generator = drop_prob, draw, generator

    def forward(self, x, branch=None):
        """Compute ``x + branch(x)`` with stochastic depth.

        Parameters
        ----------
        x : floating-point tensor ``[N, ...]``
            N samples of any shape and memory layout: maps ``[N, C, H, W]``, tokens ``[N, T, D]``.
        branch : nn.Module or other callable, optional
            Maps some rows of ``x``, ``[M, ...]``, to as many rows of the same shape. If no sample is kept, a module is
            not called and its parameters get zero gradients, which DistributedDataParallel needs; any other callable,
            whose parameters are not known, is called with no rows (M = 0). None: ``x`` is the output of a branch that
            has run already, and is masked and divided, as by DropPath.

        Returns
        -------
        tensor ``[N, ...]``
            In the memory layout of ``x`` if samples are dropped. A new tensor, except that without ``branch`` it is
            ``x`` itself in evaluation mode and at rate 0.

        Raises
        ------
        TypeError, ValueError
            If the output of the branch is invalid, if ``drop_prob`` was set out of range, or if the kept samples give a
            BatchNorm one value per channel, on which it cannot train.
        """
        _check_rate(self.drop_prob)
        if not self.training or self.drop_prob == 0:
            return x if branch is None else x + _run(branch, x, x)
        fixed_shapes = needs_fixed_shapes(x)
        if self.generator is not None:
            self._check_repeatable(fixed_shapes)
        device = x.device if fixed_shapes else "cpu"
        keep, scale = draw_samples(x.shape[0], self.drop_prob, self.draw, self.generator, device)
        if branch is None:
            return _mask(x, keep, scale)
        if fixed_shapes:
            return x + _mask(_run(branch, x, x), keep, scale)
        return add_branch(x, x, branch, keep, scale)

    def _check_repeatable(self, fixed_shapes):
        if fixed_shapes:
            raise RuntimeError("generator must be None where the forward is traced or captured: torch cannot follow it")
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "generator must be None under activation checkpointing: the forward that runs again in the backward "
                "pass would draw other samples; of torch's default generator checkpointing restores the state"
            )

    def extra_repr(self):
        return f"drop_prob={self.drop_prob:.3g}, draw={self.draw!r}"


def _check_rate(drop_prob):
    if not isinstance(drop_prob, Real):
        raise TypeError(f"drop_prob must be a number, got {type(drop_prob).__name__}")
    if not 0 <= drop_prob < 1:
        raise ValueError(f"drop_prob must be 0 <= drop_prob < 1, got {drop_prob}")


def needs_fixed_shapes(x):
    """Whether sizes must not depend on a draw: ``x`` is traced or has no values, or a CUDA graph is being captured."""
    return is_traced(x) or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def draw_samples(num_samples, drop_prob, draw="bernoulli", generator=None, device="cpu"):
    """Return which samples are kept, bool ``[N]``, and the factor for their branch that makes up for the others."""
    if draw == "fixed":
        count = max(1, round(num_samples * (1 - drop_prob)))
        return torch.randperm(num_samples, generator=generator, device=device) < count, num_samples / count
    # As DropPath draws: the same seed gives the same samples.
    keep = torch.empty(num_samples, device=device).bernoulli_(1 - drop_prob, generator=generator)
    return keep.bool(), 1 / (1 - drop_prob)


def add_branch(shortcut, x, branch, keep, scale, *, branch_first=False):
    """Return ``shortcut + scale * branch(x)`` for the samples in ``keep``, ``shortcut`` for the others, in new memory.

    ``shortcut`` and ``x`` are ``[N, ...]``; ``keep`` is bool ``[N]`` on the host. ``branch`` is called with the kept
    rows of ``x``. With ``branch_first`` the result is laid out like ``branch(x) + shortcut``.
    """
    index = keep.nonzero().flatten()
    kept = len(index)
    if kept == 0 and hasattr(branch, "parameters") and not meets_other_processes(*branch.modules()):
        return with_zero_gradients(shortcut, branch)
    if kept and kept == len(keep):
        rows = _run(branch, x, shortcut) * scale
        return rows + shortcut if branch_first else shortcut + rows
    index = index.to(x.device, non_blocking=True)
    shortcut_rows, rest = split_rows(shortcut, index)
    rows = shortcut_rows if x is shortcut else split_rows(x, index)[0]
    rows = _run(branch, rows, shortcut) * scale
    if branch_first and kept and rows.stride()[1:] != rest.stride()[1:]:
        # What follows would run in the layout of the shortcut, and be slower where the branch changes it for a reason.
        rest = empty_rows(rows, len(rest), rest.dtype).copy_(rest)
    return merge_rows(rest, index, rows, shortcut_rows)


def _run(branch, rows, shortcut):
    """Return ``branch(rows)``, after checking that it can be added to rows of ``shortcut``."""
    version = None if torch.compiler.is_compiling() or rows.is_inference() else rows._version
    try:
        output = branch(rows)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"the branch got {len(rows)} of {len(shortcut)} samples, which give its BatchNorm one value per channel, "
            f"and it cannot train on that: take larger batches or a smaller drop_prob ({error})"
        ) from error
    if version is not None and rows._version != version:
        raise ValueError("branch must not write to its input, the shortcut: it has an operation in place")
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"branch must give a tensor, got {type(output).__name__}")
    expected = (len(rows), *shortcut.shape[1:])
    if output.shape[:1] == expected[:1] and output.dim() == len(expected):  # the addition may have broadcast it
        with suppress(RuntimeError):
            output = output.expand(expected)
    if output.shape != expected:
        raise ValueError(f"branch must give {expected}, rows to be added to the shortcut, got {tuple(output.shape)}")
    return output


def _mask(rows, keep, scale):
    """Apply DropPath to ``rows``: multiply the kept ones by ``scale``, the others by 0."""
    factor = keep.to(rows.device, rows.dtype, non_blocking=True) * scale
    return rows * factor.reshape(-1, *[1] * (rows.dim() - 1))
