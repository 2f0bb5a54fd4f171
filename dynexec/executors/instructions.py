"""Parts of a network as instructions on buffers, for whatever runs them: the CPU engine or a GPU's kernels."""

from collections import Counter
from dataclasses import dataclass, field

from dynexec.executors.packing import PackedConv, PackedLinear


@dataclass(eq=False)
class Value:
    """A buffer: ``[channels, height, width]`` per sample, and what the instructions that read it need around it."""

    channels: int
    height: int
    width: int
    packed: bool = False  # pixels follow each other without padding to whole vectors, as in an image of 3 channels
    border: list = field(default_factory=lambda: [0, 0, 0, 0])  # top, left, bottom, right
    pooled: bool = False  # all pixels of an image of any size are in this one

    @property
    def shape(self):
        """``[channels, height, width]``."""
        return self.channels, self.height, self.width

    @property
    def pixels(self):
        """Number of pixels of a sample."""
        return self.height * self.width


@dataclass
class Instruction:
    """An operation on one or two values, and where the result goes.

    ``op`` is "load", "store", "conv", "winograd", "depthwise", "max", "sum", "add", "multiply" or "gate".
    """

    op: str
    input: Value | None
    output: Value | None
    other: Value | None = None
    conv: PackedConv | PackedLinear | None = None
    activation: str | None = None
    kernel: tuple = (1, 1)
    stride: tuple = (1, 1)
    dilation: tuple = (1, 1)
    padding: tuple = (0, 0)
    divisor: int = 0
    column: int = 0  # gate
    choice: int = 1  # gate: the decision that passes it
    gated: int = 0  # gate: how many instructions
    weights: int = 0  # for the engine: where they and the bias are
    bias: int = 0
    bands: int = 0  # for the engine: how many of the next ones run with this one on bands of rows
    part: tuple = ("", "layer")  # name and kind (as of a Span) of what it belongs to

    @property
    def values(self):
        """All values that it reads or writes."""
        return [value for value in (self.input, self.output, self.other) if value is not None]

    @property
    def is_pointwise(self):
        """Whether it is a convolution that computes each pixel from the one at the same place."""
        same = self.op == "conv" and self.input.shape[1:] == self.output.shape[1:]
        return same and (*self.kernel, *self.stride, *self.padding) == (1, 1, 1, 1, 0, 0)


def count_readers(instructions):
    """Count how many instructions read each value, by its identity; one that reads it twice counts twice."""
    return Counter(id(value) for step in instructions for value in (step.input, step.other) if value is not None)


class Builder:
    """Collects instructions; every method returns the value that it makes, or None if it cannot.

    Parameters
    ----------
    columns : int
        Number of columns of the decisions.
    """

    def __init__(self, columns):
        self.columns = columns
        self.instructions, self.units = [], []  # units: first instruction of what belongs together
        self.unknown = None  # what could not be emitted last, as text

    def load(self, channels, height, width):
        """Read the samples from outside."""
        return self._emit(Instruction("load", None, Value(channels, height, width, packed=True)))

    def store(self, value):
        """Pass the samples to the outside."""
        self.instructions.append(Instruction("store", value, None))

    def conv(self, conv, x, other=None, out=None, zeros=(0, 0, 0, 0)):
        """Apply a :class:`PackedConv` to ``x``, add ``other``, and write to ``out`` or a new value.

        ``zeros`` (top, left, bottom, right) surround ``x`` before the convolution's own padding. ``out`` may be
        ``other``.
        """
        padding, stride, dilation, groups = conv.geometry
        channels, depth, *kernel = conv.shape
        depthwise = groups == x.channels == channels and depth == 1 and groups > 1
        before = [padding[d] + zeros[d] for d in (0, 1)]
        after = [padding[d] + zeros[d + 2] for d in (0, 1)]
        size = _output_size(x, kernel, stride, dilation, before, after)
        if min(size) < 1 or depth * groups != x.channels or (other is not None and other.shape != (channels, *size)):
            return None
        if groups != 1 and not (depthwise and other is None):
            return None
        op = self._choose(conv, "depthwise" if depthwise else "conv", size, before == after)
        if op is None:
            return None
        value = out if out is not None else Value(channels, *size)
        return self._emit(Instruction(op, x, value, other, conv, conv.activation, kernel, stride, dilation, before))

    def _choose(self, conv, op, size, even):
        """Return the operation that runs a convolution, itself "conv" or "depthwise"; None: unsupported.

        ``size`` is that of its output, ``even`` whether it has the same padding on both sides.
        """
        raise NotImplementedError

    def pool(self, x, kind, kernel, stride, padding=(0, 0), divisor=0, ceil=False):
        """Pool by ``kind`` "max" or "sum"; sums are divided by ``divisor``, or by their number of inputs if it is 0."""
        after = padding
        if ceil:  # one more window where it begins within the input or the padding before it
            reach = [x.shape[d + 1] + 2 * padding[d] - kernel[d] for d in (0, 1)]
            more = [-reach[d] % stride[d] for d in (0, 1)]
            fits = [reach[d] + more[d] - padding[d] < x.shape[d + 1] for d in (0, 1)]
            after = [padding[d] + more[d] * fits[d] for d in (0, 1)]
        size = _output_size(x, kernel, stride, (1, 1), padding, after)
        if min(size) < 1:
            return None
        output = Value(x.channels, *size)
        return self._emit(Instruction(kind, x, output, None, None, None, kernel, stride, (1, 1), padding, divisor))

    def add(self, x, other=None, activation=None, channels=None, out=None):
        """Compute ``activation(x + other)``, with zeros for further ``channels``."""
        if other is not None and other.shape != x.shape:
            return None
        value = out if out is not None else Value(channels or x.channels, x.height, x.width)
        return self._emit(Instruction("add", x, value, other, activation=activation))

    def multiply(self, x, factors):
        """Multiply ``x`` by one factor per sample and channel."""
        if factors.shape != (x.channels, 1, 1):
            return None
        return self._emit(Instruction("multiply", x, Value(*x.shape), factors))

    def gate(self, column, choice=1):
        """Run what follows, up to :meth:`end_gate`, for the samples whose decision in ``column`` is ``choice``."""
        self.instructions.append(Instruction("gate", None, None, column=column, choice=choice))
        return len(self.instructions) - 1

    def end_gate(self, gate):
        self.instructions[gate].gated = len(self.instructions) - gate - 1

    def label(self, first, name, kind):
        """Assign the instructions from number ``first`` on to this part of the network."""
        for step in self.instructions[first:]:
            step.part = name, kind

    def begin_unit(self):
        """Keep what follows in one phase."""
        self.units.append(len(self.instructions))

    def mark(self):
        """Return the current position, for :meth:`back`."""
        borders = {id(value): list(value.border) for step in self.instructions for value in step.values}
        return len(self.instructions), len(self.units), borders

    def back(self, mark):
        """Remove what was emitted since ``mark``."""
        instructions, units, borders = mark
        del self.instructions[instructions:], self.units[units:]
        for step in self.instructions:
            for value in step.values:
                value.border = list(borders.get(id(value), value.border))

    def _emit(self, instruction):
        self.instructions.append(instruction)
        return instruction.output


def _output_size(x, kernel, stride, dilation, before, after):
    sizes = zip(x.shape[1:], kernel, stride, dilation, before, after, strict=True)
    return tuple((size + first + last - (k - 1) * step - 1) // s + 1 for size, k, s, step, first, last in sizes)
