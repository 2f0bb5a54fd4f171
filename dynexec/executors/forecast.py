"""What a :class:`LaunchProgram` launches, for the model in :mod:`dynexec.measure.roofline`."""

from dynexec.kernels.configs import choose_pair_tile, choose_tile
from dynexec.measure.roofline import Layer


def layers(program, samples, dtype, architecture=90):
    """The launches of a program for a batch of so many samples, as a list of Layer."""
    found, column, gate_ends = [], None, 0
    for number, step in enumerate(program.instructions):
        column = column if number < gate_ends else None
        if step.op == "gate":
            column, gate_ends = step.column, number + 1 + step.gated
        elif step.op not in ("load", "store"):
            found.append(_layer(program, number, step, samples, dtype, column, architecture))
    return found


def _layer(program, number, step, samples, dtype, column, architecture):
    pixels, channels, reduction, weights = step.output.pixels, step.output.channels, 0, 0
    # What lies between a pair is neither written nor read.
    between = [step.output] if number in program.pairs else [step.input] if number - 1 in program.pairs else []
    traffic = sum(value.channels * value.pixels for value in step.values if value not in between)
    if step.op in ("conv", "depthwise"):
        weights = step.conv.shape[0] * step.conv.shape[1] * step.kernel[0] * step.kernel[1]
    tile = (0, 0, 0)
    if step.op == "conv":
        reduction = weights // channels
        tile = choose_tile(samples * pixels, channels, step.input.channels, dtype, architecture)
        if between:
            tile = choose_pair_tile(between[0].channels, step.input.channels, dtype, architecture)
        tile = None if column is None else (tile.bm, min(tile.bn, channels), tile.programs)
    size, launched = dtype.itemsize, number - 1 not in program.pairs
    return Layer(pixels, channels, reduction, size * traffic, size * weights, tile, column, launched)
