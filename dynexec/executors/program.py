"""Programs for the CPU engine: a part of a network as convolutions on buffers that stay in the caches.

The engine (``csrc/cpu``) runs a program for a group of samples at a time: every instruction for some samples, with
blocks skipped by decision. Nothing is gathered or scattered, since its convolutions read and write pixels through
pointers (the indirect convolution of Dukhan, 2019). A program is a list of integers and one tensor of packed weights:

* version, floats per vector, columns of the decisions, number of slots, of phases, of buffers, of instructions;
* per phase: first instruction, end, samples that run through it together;
* per buffer: slot or -1, phase or -1, channels, pitch, height, width, border at the top, left, bottom, right;
* per instruction: operation, input, output, other input, position of weights and of bias, activation, kernel (2),
  stride (2), dilation (2), padding at the top and on the left, divisor, how many of the next ones run with it on bands
  of rows. A gate has its column as input, as output the first instruction after those that only some samples run, and
  as other input the decision, 0 or 1, that these have in that column.

Positions in the weights count floats. A convolution's weights are
``[panel][kernel h][kernel w][channels in][channels of the panel]``, a depthwise one's
``[kernel h][kernel w][channels]``, channels padded with zeros to whole vectors. Winograd's F(4x4, 3x3) takes a
convolution's weights; the engine transforms them itself.
"""

import torch

from dynexec.executors.engine import Program
from dynexec.executors.instructions import Builder, count_readers
from dynexec.executors.weights import Weights

_VERSION = 3
# Their places are the codes.
_OPS = ("load", "store", "conv", "winograd", "depthwise", "max", "sum", "add", "multiply", "gate")
_ACTIVATIONS = (None, "relu", "relu6", "silu", "hardswish", "sigmoid")
_PIXELS = 512  # of a phase's samples, so that weights are read often enough for each time they are fetched
_LARGEST_GROUP = 8
_LARGEST_WINDOW = 4096  # inputs of a pooling
_WINOGRAD_TILE = 4  # output pixels in a row and in a column, from 36 products
_WINOGRAD_CHANNELS = 16  # at least: of fewer, the transforms would take longer than what they save
_WINOGRAD_SHARE = 0.75  # of the direct algorithm's products, at most: tiles stand over the edges of small images
# Where a 1x1, a depthwise and a 1x1 convolution follow each other with at least this many floats between them, they run
# on bands of rows: what is between them would leave the cache.
BAND_FLOATS = 256 * 1024


class Programs:
    """Makes the programs of one segment, for all image sizes.

    Parameters
    ----------
    columns : int
        Number of columns of the decisions.
    winograd : bool
        As for :class:`ProgramBuilder`.
    """

    def __init__(self, columns, winograd=True):
        self.columns, self.winograd = columns, winograd
        self.weights = Weights()

    def builder(self):
        """Return a builder for one program."""
        return ProgramBuilder(self.weights, self.columns, self.winograd)

    def finish(self, builder):
        """Return the program of what a builder has collected."""
        return Program(builder.finish(), self.weights.tensor(), builder.instructions)

    def renew(self, program, executor):
        """Return the same program without the workspace that it keeps, made for the largest batch so far."""
        return Program(program.code, self.weights.tensor(), program.instructions)


class ProgramBuilder(Builder):
    """A builder of programs for the engine.

    Parameters
    ----------
    weights : Weights
    columns : int
        Number of columns of the decisions.
    winograd : bool
        Whether 3x3 convolutions may run by Winograd's algorithm.
    band_floats : int
        Least number of floats between instructions that run on bands of rows.
    """

    def __init__(self, weights, columns, winograd=True, band_floats=BAND_FLOATS):
        super().__init__(columns)
        self.weights, self.winograd, self.band_floats = weights, winograd, band_floats

    def pool(self, x, kind, kernel, *args, **kwargs):
        return None if kernel[0] * kernel[1] > _LARGEST_WINDOW else super().pool(x, kind, kernel, *args, **kwargs)

    def _choose(self, conv, op, size, even):
        if conv.dtype != torch.float32:
            return None
        return "winograd" if op == "conv" and self._suits_winograd(conv, size) else op

    def _suits_winograd(self, conv, size):
        _, stride, dilation, groups = conv.geometry
        _, depth, *kernel = conv.shape
        if (kernel, list(stride), list(dilation), groups) != ([3, 3], [1, 1], [1, 1], 1) or depth < _WINOGRAD_CHANNELS:
            return False
        tiles = -(-size[0] // _WINOGRAD_TILE) * -(-size[1] // _WINOGRAD_TILE)
        return self.winograd and 36 * tiles <= _WINOGRAD_SHARE * 9 * size[0] * size[1]

    def finish(self):
        """Return the program as int64 tensor."""
        phases = self._phases()
        phase_of = [number for number, (first, end, _) in enumerate(phases) for _ in range(first, end)]
        _find_bands(self.instructions, phase_of, self.band_floats)
        _join_labels(self.instructions)
        buffers = _place(self.instructions, phases, phase_of, self.weights.width)
        code = [_VERSION, self.weights.width, self.columns, 1 + max(slot for _, slot, _ in buffers.values())]
        code += [len(phases), len(buffers), len(self.instructions)]
        for phase in phases:
            code += phase
        numbers = {key: number for number, key in enumerate(buffers)}
        for value, slot, phase in buffers.values():
            pitch = value.channels if value.packed else value.channels + -value.channels % self.weights.width
            code += [slot, phase, value.channels, pitch, value.height, value.width, *value.border]
        for number, step in enumerate(self.instructions):
            of = [-1 if value is None else numbers[id(value)] for value in (step.input, step.output, step.other)]
            if step.op == "gate":
                of = [step.column, number + 1 + step.gated, step.choice]
            code += [_OPS.index(step.op), *of, step.weights, step.bias, _ACTIVATIONS.index(step.activation)]
            code += [*step.kernel, *step.stride, *step.dilation, *step.padding, step.divisor, step.bands]
        return torch.tensor(code, dtype=torch.int64)

    def _emit(self, instruction):
        step = instruction
        for value in step.values if step.op != "load" else ():
            # Only convolutions read packed pixels, as what they convolve; nothing writes them but a load.
            value.packed &= step.op == "conv" and value is step.input and value is not step.other
        if step.conv is not None:
            for d in (0, 1):
                size = step.output.shape[d + 1]
                computed = size + (-size % _WINOGRAD_TILE if step.op == "winograd" else 0)  # in whole tiles
                reach = (computed - 1) * step.stride[d] + (step.kernel[d] - 1) * step.dilation[d] + 1
                border, before = step.input.border, step.padding[d]
                border[d] = max(border[d], before)
                border[d + 2] = max(border[d + 2], reach - before - step.input.shape[d + 1])
            step.weights, step.bias = self.weights.conv(step.conv, step.op == "depthwise")
        return super()._emit(step)

    def _phases(self):
        """Return [first, end, samples] of runs of units that need the same number of samples together."""
        borders = [*self.units, len(self.instructions)]
        phases = []
        for first, end in zip([0, *borders], borders, strict=False):
            if first == end:
                continue
            pixels = max((value.pixels for step in self.instructions[first:end] for value in step.values), default=1)
            samples = min(_LARGEST_GROUP, -(-_PIXELS // pixels))
            if phases and phases[-1][2] == samples:
                phases[-1][1] = end
            else:
                phases.append([first, end, samples])
        return phases


def _find_bands(instructions, phase_of, floats):
    """Mark where a 1x1, a depthwise and a 1x1 convolution follow each other, or two of these."""
    readers = count_readers(instructions)
    ends = {number + step.gated for number, step in enumerate(instructions) if step.op == "gate"}

    def follows(number):
        """Whether the next instruction, and no other, reads this one's result, and both may run together."""
        step, after = instructions[number : number + 2]
        inner = step.output is not None and readers[id(step.output)] == 1 and after.input is step.output
        return inner and phase_of[number] == phase_of[number + 1] and number not in ends

    taken = -1  # the last instruction of the group before
    for number, step in enumerate(instructions):
        if step.op != "depthwise":
            continue
        before, after = instructions[number - 1], instructions[min(number + 1, len(instructions) - 1)]
        expands = number - 1 > taken and before.is_pointwise and before.other is None and follows(number - 1)
        projects = after.is_pointwise and follows(number) and not any(step.output.border)
        # The last one may overwrite the first one's input only row by row.
        source, result = (before if expands else step).input, (after if projects else step).output
        if source is result and not (expands and step.stride[0] == 1):
            continue
        between = [value for value, inner in ((step.input, expands), (step.output, projects)) if inner]
        if sum(value.channels * value.pixels for value in between) >= max(floats, 1):
            instructions[number - expands].bands = expands + projects
            taken = number + projects


def _join_labels(instructions):
    """Make instructions that run on bands together one part."""
    for number, step in enumerate(instructions):
        group = instructions[number : number + step.bands + 1]
        (first, kind), (last, _) = step.part, group[-1].part
        for member in group if first != last else ():
            member.part = f"{first} .. {last}", kind


def _place(instructions, phases, phase_of, width):
    """Return ``{id: (value, slot or -1, phase or -1)}``: values whose lives do not overlap may share a slot."""
    lives, between, group = {}, set(), range(0)
    for number, step in enumerate(instructions):
        if step.bands:
            group = range(number, number + step.bands + 1)
            between |= {id(instructions[i].output) for i in group[:-1]}
        for value in step.values:
            _, first, _ = lives.get(id(value), (value, number, number))
            # What runs on bands uses all of its values together.
            lives[id(value)] = (value, min(first, group[0]), group[-1]) if number in group else (value, first, number)
    placed, slots = {}, []  # slots: [end of life, floats]
    for key, (value, first, last) in sorted(lives.items(), key=lambda item: item[1][1]):
        phase = phase_of[first] if phase_of[first] == phase_of[last] else -1
        if key in between:
            placed[key] = value, -1, phase
            continue
        if phase < 0:  # a phase runs several times before the next one
            first, last = phases[phase_of[first]][0], phases[phase_of[last]][1]
        top, left, bottom, right = value.border
        pixels = (top + value.height + bottom) * (left + value.width + right)
        floats = pixels * (value.channels + width) * (phases[phase][2] if phase >= 0 else _LARGEST_GROUP)
        free = [slot for slot, (end, _) in enumerate(slots) if end < first]
        fitting = [slot for slot in free if slots[slot][1] >= floats]
        if fitting:
            slot = min(fitting, key=lambda slot: slots[slot][1])
        elif free:
            slot = max(free, key=lambda slot: slots[slot][1])
        else:
            slot = len(slots)
            slots.append([0, 0])
        slots[slot] = [last, max(slots[slot][1], floats)]
        placed[key] = value, slot, phase
    return placed
