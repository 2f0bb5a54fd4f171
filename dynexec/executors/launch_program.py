"""A program for a GPU: a part of a network as launches of the kernels in :mod:`dynexec.kernels`.

Inside a gate dynexec's kernels read and write in place the samples that keep the block. Only the device knows how many
these are, so nothing waits for them, and the launches are the same for all decisions. What all samples run (stems,
shortcuts and classifiers) is left to the library, except for convolutions for which it needs several passes.
"""

from contextlib import nullcontext
from math import floor

import torch
import torch.nn.functional as F

from dynexec.executors.frames import Frame
from dynexec.executors.instructions import count_readers
from dynexec.executors.proof import matrix_precision
from dynexec.executors.twins import find_twins
from dynexec.measure.ranges import part_range
from dynexec.reference import ACTIVATIONS

# Where ``dense`` leaves the last convolution of a block to the library as well, and then copies the dropped rows back:
# 1x1, with sums of so many terms and so many products. There our kernel takes up to a third longer on an H200.
_DEEP, _LONG = 128, 4e9
# Of the channels between two convolutions that run as one kernel. With more, only a few multiprocessors would get work.
_LARGEST_MIDDLE = 128


def most_dropped(switch_at, pairs):
    """Return how many of the (sample, block) pairs may be dropped if the share ``switch_at`` must be kept."""
    return floor((1.0 - switch_at) * pairs + 1e-6)


class LaunchProgram:
    """Instructions as launches: ``program(x, route)``.

    Parameters
    ----------
    instructions : list of Instruction
    programs : LaunchPrograms
    """

    def __init__(self, instructions, programs):
        self.instructions, self.programs = instructions, programs
        self.pairs, self.twins = _find_pairs(instructions), find_twins(instructions)
        self._unfused, self._resident = [], None
        last = {}
        for number, step in enumerate(instructions):
            last |= {id(value): number for value in step.values}
        self._last_uses = [[] for _ in instructions]
        for key, number in last.items():
            self._last_uses[number].append(key)
        # A tensor of the caller's must not be written to.
        loaded = next(step.output for step in instructions if step.op == "load")
        self._copies_input = any(step.output is loaded and step.op != "load" for step in instructions)
        for step in instructions:  # weights are laid out now, not in the first call
            if step.conv is not None:
                programs.weights(step.conv, step.op == "depthwise")
        for first, second in self.twins.items():
            for step, other in self._pairs(first, second):
                if step.op == "conv":
                    programs.twins.stack(step.conv, other.conv)

    @property
    def signature(self):
        """What it computes, as text."""
        return "; ".join(
            f"{step.op} {[value.shape for value in step.values]} {step.kernel} {step.stride} {step.activation}"
            for step in self.instructions
        )

    def __call__(self, x, route, executor="fused", switch_at=1.0):
        """Run the program.

        Parameters
        ----------
        x : tensor ``[N, C, H, W]``
        route : Route
            May be a device route.
        executor : {"fused", "resident", "conditional", "dense", "switched"}
            ``resident``: the whole network in one launch, if :class:`Resident` supports it. ``conditional``: a graph
            leaves out blocks that no sample keeps, which pays only for very few samples. ``dense``: the library's
            convolutions on all samples; but the last one of a block is dynexec's, in place on the samples that keep it,
            or, if it is long, a copy of the others follows it. With most samples kept it takes about as long as a dense
            network. ``switched``: a graph holds ``dense``, ``fused`` and, for when nothing is dropped, the static
            network, and chooses among them on the device.
        switch_at : float
            ``switched`` is ``dense`` if at least this share of (sample, block) pairs is kept.

        Returns
        -------
        tensor ``[N, C, H, W]``, channels_last
        """
        from dynexec.kernels.device import plain_launches

        captured = x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if executor == "resident" and captured and self.programs.resident is None:
            executor = "fused"  # what would be packed now would be part of that graph
        if executor == "resident":
            try:
                return self.resident()(x, route.decisions)
            except ValueError:
                if self is self.programs.first:
                    raise
                executor = "fused"  # for another size of images than that which it was chosen for
        conditional = self.programs.take_conditional(x, executor)
        if executor == "switched":
            return self._run_switched(x, route, switch_at, conditional)
        # Dependent launches are edges of a kind that conditional nodes do not have: none may lead to one or away.
        with nullcontext() if conditional is None else plain_launches():
            return self._launch(x, route, executor, conditional)

    def _launch(self, x, route, executor, conditional=None):
        workspace = self.programs.take_workspace(x.device)
        frame = Frame(x, workspace, dense=executor == "dense", static=executor == "static")
        number = 0
        while (step := self.instructions[number]).op != "store":
            if step.op == "gate":
                if number in self.twins and executor == "fused":
                    with part_range(step.part[0], "both", None, len(x)):
                        number = self._run_twins(number, self.twins[number], frame, route)
                    continue
                gated = range(number + 1, number + 1 + step.gated)
                with part_range(*step.part, None, len(x)):
                    if frame.static:  # every sample keeps every block
                        for each in gated if step.choice else ():
                            self._run(each, self.instructions[each], frame, {})
                    else:
                        index, offset = route.index[step.column], route.offset[step.column]
                        if frame.dense:
                            frame.others = {"index": index, "offset": offset[1 - step.choice :]}
                        self._run_gated(gated, frame, index, offset[step.choice :], conditional)
            else:
                with part_range(*step.part, None, len(x)):
                    self._run(number, step, frame, {})
            number += 1 + step.gated
        return frame.values[id(step.input)]

    def _run_switched(self, x, route, switch_at, conditional):
        """Run ``fused`` if more pairs are dropped than may be, else ``dense``, or the static network if none is."""
        from dynexec.kernels.plan import find_body

        result = self.instructions[-1].input
        shape = len(x), *result.shape
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        pairs = len(x) * len(route.offset)
        body = find_body(route.offset, most_dropped(switch_at, pairs))
        functions = [lambda name=name: y.copy_(self._launch(x, route, name)) for name in ("static", "dense", "fused")]
        if conditional is not None:
            conditional.switch(body, 1, functions)
        else:  # in the interpreter
            functions[int(body[1])]()
        return y

    def resident(self):
        """Return the network for the kernel that runs it whole; ValueError if the kernel does not support it."""
        if self._resident is None:
            self._resident = self.programs.take_resident(self.instructions)
        return self._resident

    def _run_gated(self, numbers, frame, index, offset, conditional):
        """Run the instructions ``numbers`` after a gate, on the rows ``index[offset[0] : offset[1]]`` that pass it."""
        if conditional is not None:  # nothing may be allocated inside
            for number in set(numbers) - self.pairs:
                frame.output(self.instructions[number].output)
        with nullcontext() if conditional is None else conditional.if_any(offset):
            for number in numbers:
                self._run(number, self.instructions[number], frame, {"index": index, "offset": offset})

    def _run_twins(self, first, second, frame, route):
        """Run both gates of a block with two sets of weights; return the number of the instruction after them."""
        ahead = second - first
        pairs, column = self._pairs(first, second), self.instructions[first].column
        self.programs.twins.run(pairs, frame, route.index[column], route.offset[column], self._run_alone)
        for number in range(first + 1, second + ahead):
            self._forget(number, frame)
        return second + ahead

    def _pairs(self, first, second):
        """Return pairs of instructions behind twin gates: one for samples with a False decision, one for the others."""
        ahead = second - first
        pairs = [(self.instructions[number], self.instructions[number + ahead]) for number in range(first + 1, second)]
        return [(b, a) for a, b in pairs] if self.instructions[first].choice else pairs

    def _run(self, number, step, frame, rows):
        if step.op == "load":
            y = frame.x.contiguous(memory_format=torch.channels_last)
            frame.values[id(step.output)] = y.clone() if self._copies_input and y is frame.x else y
        elif frame.dense or frame.static:
            self._run_alone(step, frame, rows)
        elif number in self.pairs:
            self._run_pair(step, self.instructions[number + 1], frame, rows)
        elif number - 1 not in self.pairs:
            self._run_alone(step, frame, rows)
        self._forget(number, frame)

    def _forget(self, number, frame):
        for key in self._last_uses[number]:
            frame.values.pop(key, None)  # the middle of a pair never was

    def _run_alone(self, step, frame, rows):
        from dynexec.kernels import conv, depthwise, pointwise

        x, other = frame.read(step.input), frame.read(step.other)
        into = frame.get(step.output)
        alone = self.programs.library_alone or in_one_pass(step)
        by_library = (into is None or frame.static) and (frame.dense if rows else alone)
        if step.op == "conv" and by_library and is_plain(step):
            frame.values[id(step.output)] = self._run_by_library(step, x, other)
            return
        if rows and frame.dense and is_long(step, len(x)):
            frame.values[id(step.output)] = y = self._run_by_library(step, x, other)
            pointwise.combine(into, y, **frame.others)
            return
        out = frame.output(step.output)
        geometry = {"stride": tuple(step.stride), "padding": tuple(step.padding)}
        more = {"dilation": tuple(step.dilation), "activation": step.activation}
        if step.op == "conv":
            weight, bias, _ = self.programs.weights(step.conv)
            more |= {"residual": other, "precision": matrix_precision(x.dtype), "workspace": frame.workspace}
            conv.conv(x, weight, bias, out, **geometry, **more, **rows)
        elif step.op == "depthwise":
            weight, bias, _ = self.programs.weights(step.conv, depthwise=True)
            depthwise.depthwise(x, weight, bias, out, **geometry, **more, **rows)
        elif step.op in ("max", "sum"):
            pointwise.pool(x, out, step.op, step.kernel, divisor=step.divisor, **geometry, **rows)
        else:
            pointwise.combine(x, out, **{step.op: other}, activation=step.activation, **rows)

    def _run_by_library(self, step, x, other):
        fused = x.device.type == "cuda" and step.activation == "relu" and len(x) > 0 and step not in self._unfused
        weights = self.programs.weights(step.conv)
        try:
            return _run_by_library(step, x, other, weights, fused)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # cuDNN has no fused one for some numbers of channels
            if not fused:
                raise
            self._unfused.append(step)
            return _run_by_library(step, x, other, weights, False)

    def _run_pair(self, first, last, frame, rows):
        from dynexec.kernels.bottleneck import conv_pair

        conv_pair(
            frame.read(first.input), *self.programs.weights(first.conv)[:2],
            *self.programs.weights(last.conv)[:2], frame.output(last.output), stride=tuple(first.stride),
            padding=tuple(first.padding), dilation=tuple(first.dilation), middle_activation=first.activation,
            activation=last.activation, residual=frame.get(last.other),
            precision=matrix_precision(frame.x.dtype), **rows,
        )  # fmt: skip


def _find_pairs(instructions):
    """Return the numbers of the convolutions in gates that run as one kernel with the 1x1 convolution after them."""
    readers = count_readers(instructions)
    pairs, gate_ends = set(), 0
    for number, (step, after) in enumerate(zip(instructions, instructions[1:], strict=False)):
        if step.op == "gate":
            gate_ends = number + 1 + step.gated
        if number + 1 >= gate_ends or (step.op, after.op) != ("conv", "conv"):
            continue
        between = step.output
        only = after.input is between and after.other is not between and readers[id(between)] == 1
        if only and after.is_pointwise and step.kernel[0] * step.kernel[1] > 1 and after.output is not step.input:
            if step.other is None and between.channels <= _LARGEST_MIDDLE:
                pairs.add(number)
    return pairs


def in_one_pass(step):
    """Whether the library runs a convolution with bias and activation in one pass, or is worth several.

    The only activation it supports is ReLU. A product of each pixel alone takes about as long as reading and writing
    it.
    """
    return step.activation == "relu" or tuple(step.kernel) != (1, 1) or step.output.pixels == 1


def is_long(step, samples):
    """Whether the library and a copy of the dropped samples take less time than our kernel, if these are few."""
    long = samples * step.output.pixels * step.output.channels * step.input.channels >= _LONG
    return long and step.is_pointwise and step.input.channels >= _DEEP


def is_plain(step):
    """Whether the library can run a convolution: it needs the same padding on both sides."""
    size = [
        (step.input.shape[d + 1] + 2 * step.padding[d] - step.dilation[d] * (step.kernel[d] - 1) - 1) // step.stride[d]
        + 1
        for d in (0, 1)
    ]
    return tuple(size) == step.output.shape[1:]


def _run_by_library(step, x, other, weights, fused):
    """Run a convolution on all samples, into new memory; ``fused``: cuDNN's with bias, addition and ReLU."""
    weight, _, bias = weights
    geometry = step.stride, step.padding, step.dilation, 1
    if x.shape[2:] == (1, 1) and weight.shape[2:] == (1, 1):
        y = F.linear(x.flatten(1), weight.flatten(1), bias)[:, :, None, None]
    elif fused:
        if other is None:
            return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        return torch.cudnn_convolution_add_relu(x, weight, other, 1.0, bias, *geometry)
    else:
        y = F.conv2d(x, weight, bias, *geometry)
    y = ACTIVATIONS[step.activation](y if other is None else y + other)
    return y.contiguous(memory_format=torch.channels_last)  # as the kernels read it
