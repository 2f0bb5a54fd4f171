"""What a :class:`LaunchProgram` launches, for the model in :mod:`dynexec.measure.roofline`."""

from dataclasses import replace
from math import ceil

from dynexec.executors.launches import BUCKETS
from dynexec.measure.roofline import Layer, layer_seconds

_OURS = (0, 0, 0)  # the tile of a kernel of ours that has none
# What a conditional node takes, as a kernel that moves nothing: setting its value, and starting the body.
_NODE = Layer(0, 0, 0, 0, 0)


def program_seconds(gpu, program, samples, kept, dtype, executor):
    """What a program takes by the model; arguments as for :func:`launches`."""
    return sum(layer_seconds(gpu, *launch) for launch in launches(program, samples, kept, dtype, executor))


def launches(program, samples, kept, dtype, executor="fused", architecture=90):
    """The launches of a program, each as a Layer and the number of samples that it works on.

    Parameters
    ----------
    program : LaunchProgram
    samples : int
        Of the batch.
    kept : sequence of int
        How many of them keep the block of each column.
    dtype : torch.dtype
    executor : str
        One of the program's, or "static": the library's convolutions, and no decisions.
    architecture : int
        The GPU's, 10 times its compute capability.
    """
    found, number = [], 0
    what = program, samples, dtype, architecture
    while number < len(program.instructions):
        step = program.instructions[number]
        number += 1
        if step.op == "gate" and executor != "static":
            numbers = range(number, number + step.gated)
            found += _gated(numbers, kept[step.column], executor, *what)
            number += step.gated
        elif step.op not in ("gate", "load", "store"):
            found.append((_layer(number - 1, (), step.op == "conv", *what), samples))
    return found


def _gated(numbers, count, executor, program, samples, dtype, architecture):
    """Of the instructions behind a gate that so many samples pass."""
    what = program, samples, dtype, architecture
    if executor == "fused":
        return [(_layer(number, program.pairs, False, *what), count) for number in numbers]
    if executor == "conditional":
        found = [replace(_layer(number, program.pairs, False, *what), dependent=False) for number in numbers]
        return [(_NODE, 1), *((layer, count) for layer in found if count)]
    before = {id(value) for step in program.instructions[: numbers[0]] for value in step.values}
    found, gathered, together = [], set(), samples
    if executor == "bucketed":
        size = ceil(samples / BUCKETS)
        together = min(ceil(count / size) * size, samples)
        found.append((_NODE, 1))
        if count == 0:
            return found
    for number in numbers:
        step = program.instructions[number]
        last = id(step.output) in before
        if together == samples:
            library = step.op == "conv" and not last
            found.append((_layer(number, (), library, *what), samples if library else count))
            continue
        for value in (step.input, step.other):
            if value is not None and id(value) in before - gathered:
                found.append((_copy(value, dtype), together))
                gathered.add(id(value))
        found.append((_layer(number, (), step.op == "conv", *what), together))
        found += [(_copy(step.output, dtype), count)] * last
    return found


def _copy(value, dtype):
    """Of the rows of a block that are gathered or written back."""
    return Layer(value.pixels, value.channels, 0, 2 * dtype.itemsize * value.channels * value.pixels, 0, _OURS)


def _layer(number, pairs, library, program, samples, dtype, architecture):
    """Of one instruction, as one of ``pairs`` if it is, and by the library or a kernel of ours."""
    from dynexec.kernels.configs import choose_pair_tile, choose_tile  # importing Triton takes a second

    step = program.instructions[number]
    pixels, channels, reduction, weights, tile = step.output.pixels, step.output.channels, 0, 0, _OURS
    # What lies between a pair is neither written nor read.
    between = [step.output] if number in pairs else [step.input] if number - 1 in pairs else []
    traffic = sum(value.channels * value.pixels for value in step.values if value not in between)
    if step.op in ("conv", "depthwise"):
        weights = step.conv.shape[0] * step.conv.shape[1] * step.kernel[0] * step.kernel[1]
    if step.op == "conv":
        reduction = weights // channels
        tile = choose_tile(samples * pixels, channels, step.input.channels, dtype, architecture)
        if between:
            tile = choose_pair_tile(between[0].channels, step.input.channels, dtype, architecture)
        tile = None if library else (tile.bm, min(tile.bn, channels), tile.programs)
    size, launched = dtype.itemsize, number - 1 not in pairs
    return Layer(pixels, channels, reduction, size * traffic, size * weights, tile, launched)
