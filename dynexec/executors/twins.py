"""Blocks with two sets of weights on a GPU: a convolution is one launch, in which each sample has its own weights."""

import torch

from dynexec.executors.proof import matrix_precision

_SAME = ("op", "kernel", "stride", "dilation", "padding", "divisor", "activation")


def find_twins(instructions):
    """Return ``{number of the first gate: number of the second}`` of neighbours that differ only in their weights."""
    found = {}
    for number, gate in enumerate(instructions):
        after = number + 1 + gate.gated
        if gate.op != "gate" or after >= len(instructions):
            continue
        second = instructions[after]
        columns = second.op == "gate" and (second.column, second.choice) == (gate.column, 1 - gate.choice)
        if columns and _alike(*(instructions[i + 1 : i + 1 + instructions[i].gated] for i in (number, after))):
            found[number] = after
    return found


def _alike(first, second):
    """Whether two lists of instructions differ only in their weights and in where they keep their own values."""
    if len(first) != len(second):
        return False
    partner = {}
    for a, b in zip(first, second, strict=True):
        if any(getattr(a, name) != getattr(b, name) for name in _SAME) or (a.conv is None) != (b.conv is None):
            return False
        if a.conv is not None and (a.conv.shape, a.conv.geometry) != (b.conv.shape, b.conv.geometry):
            return False
        for x, y in ((a.input, b.input), (a.other, b.other), (a.output, b.output)):
            if (x is None) != (y is None):
                return False
            if x is not None and (partner.setdefault(id(x), y) is not y or x.shape != y.shape):
                return False
    return True


class Twins:
    """Runs the twin gates of programs, which share its weights across image sizes.

    Parameters
    ----------
    weights : callable
        Returns those of a convolution, as (weights, biases in float32, ...).
    """

    def __init__(self, weights):
        self.weights, self._stacked, self._groups = weights, {}, {}

    def run(self, pairs, frame, index, offset, run_alone):
        """Run ``pairs`` of instructions on samples grouped by choice, int32 ``index`` ``[N]`` and ``offset`` ``[3]``.

        ``run_alone(step, frame, rows)`` runs all but convolutions: what has no weights on all samples at once,
        depthwise convolutions one set of weights after the other.
        """
        for first, second in pairs:
            frame.values[id(second.output)] = frame.output(first.output)
            if first.op == "conv":
                self._convolve(first, second, frame, index, offset)
            elif first.conv is None:
                run_alone(first, frame, {})
            else:
                for choice, step in enumerate((first, second)):
                    run_alone(step, frame, {"index": index, "offset": offset[choice:]})

    def _convolve(self, first, second, frame, index, offset):
        from dynexec.kernels.grouped import grouped_conv

        x, out, other = (frame.read(value) for value in (first.input, first.output, first.other))
        weight, bias = self.stack(first.conv, second.conv)
        grouped_conv(
            _pixels(x), weight, bias, _pixels(out), self._describe(x, out), index, offset,
            stride=tuple(first.stride), padding=tuple(first.padding), dilation=tuple(first.dilation),
            activation=first.activation, residual=None if other is None else _pixels(other),
            precision=matrix_precision(x.dtype),
        )  # fmt: skip

    def stack(self, first, second):
        """Return weights and biases of two convolutions as the kernel takes them, laid out once."""
        if id(first) not in self._stacked:
            found = [self.weights(conv) for conv in (first, second)]
            weight = torch.stack([weight.permute(0, 2, 3, 1).contiguous() for weight, *_ in found])
            stacked = weight.permute(0, 1, 4, 2, 3), torch.stack([bias for _, bias, *_ in found])
            self._stacked[id(first)] = (first, second), stacked  # held, or the identity would not
        return self._stacked[id(first)][1]

    def _describe(self, x, out):
        """Return the groups as the kernel takes them: samples of one size, with the first and the second weights."""
        key = (*x.shape[2:], *out.shape[2:], x.device)
        if key in self._groups:
            return self._groups[key]
        sizes = [*x.shape[2:], *out.shape[2:], 0, 0]
        groups = torch.tensor([[*sizes, 0], [*sizes, 1]], dtype=torch.int32)
        if x.device.type != "cuda":
            self._groups[key] = groups
        elif not torch.cuda.is_current_stream_capturing():
            self._groups[key] = groups.to(x.device)
        else:  # of a size that is first seen in somebody's graph, whose memory this is
            return groups.pin_memory().to(x.device, non_blocking=True)
        return self._groups[key]


def _pixels(x):
    """Return a channels_last batch as ``[pixels, channels]``."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
