"""What a :class:`LaunchProgram` launches, for the model in :mod:`dynexec.measure.roofline`."""

from dataclasses import replace
from math import log, sqrt

from dynexec.executors.launch_program import in_one_pass, is_long
from dynexec.executors.resident import cluster_size, read_network
from dynexec.measure.roofline import Layer, layer_seconds

_ARCHITECTURE = 90  # whose tiles are assumed: Hopper's
_OURS = (0, 0, 0)  # the tile of a kernel of ours that has none
# What a conditional node takes, as a kernel that moves nothing: setting its value, and starting the body.
_NODE = Layer(0, 0, 0, 0, 0)
# Of the resident kernel: the share of the GPU's rate that mma.sync reaches, an estimate; the time of a convolution,
# with loads and barriers, over that of its products, by stage: their mean, and what each further block of a cluster
# adds, as measured on an H200.
_WARP_PRODUCTS = 0.62
_RESIDENT_FACTORS = (1.8, 2.3, 3.05)
_CLUSTER_GAIN = 0.08


def program_seconds(gpu, program, samples, kept, dtype, executor):
    """Predict the seconds of a program by the model; arguments as for :func:`launches`; also for ``resident``."""
    if executor == "resident":
        return _resident_seconds(gpu, program, samples, kept)
    if executor == "switched":
        names = ("static",) if all(count == samples for count in kept) else ("dense", "fused")
        bodies = (program_seconds(gpu, program, samples, kept, dtype, name) for name in names)
        return layer_seconds(gpu, _NODE, 1) + min(bodies)
    return sum(layer_seconds(gpu, *launch) for launch in launches(program, samples, kept, dtype, executor))


def launches(program, samples, kept, dtype, executor="fused"):
    """Return the launches of a program, each as a Layer and the number of samples that it works on.

    Parameters
    ----------
    program : LaunchProgram
    samples : int
        Batch size.
    kept : sequence of int
        How many samples keep the block of each column.
    dtype : torch.dtype
    executor : str
        One of the program's, or "static": the library's convolutions, without decisions.
    """
    found, number = [], 0
    what = program, samples, dtype
    while number < len(program.instructions):
        step = program.instructions[number]
        number += 1
        if executor == "fused" and number - 1 in program.twins:
            second = program.twins[number - 1]
            # One launch for all samples, but for depthwise convolutions one for each set of weights.
            for other in range(number, second):
                each = program.instructions[other].op == "depthwise"
                counts = (samples - kept[step.column], kept[step.column]) if each else (samples,)
                found += [(_layer(other, (), False, *what, grouped=True), count) for count in counts]
            number = second + 1 + program.instructions[second].gated
        elif step.op == "gate" and executor != "static":
            numbers = range(number, number + step.gated)
            count = kept[step.column] if step.choice else samples - kept[step.column]
            found += _gated(numbers, count, executor, *what)
            number += step.gated
        elif step.op not in ("gate", "load", "store"):
            library = step.op == "conv" and (executor == "static" or in_one_pass(step))
            found.append((_layer(number - 1, (), library, *what), samples))
    return found


def _gated(numbers, count, executor, program, samples, dtype):
    """Return the launches of the instructions after a gate that ``count`` samples pass."""
    what = program, samples, dtype
    if executor == "fused":
        return [(_layer(number, program.pairs, False, *what), count) for number in numbers]
    if executor == "conditional":
        found = [replace(_layer(number, program.pairs, False, *what), dependent=False) for number in numbers]
        return [(_NODE, 1), *((layer, count) for layer in found if count)]
    # ``dense``: the library's of all samples, but for most of what writes to where the shortcut lies.
    before = {id(value) for step in program.instructions[: numbers[0]] for value in step.values}
    found = []
    for number in numbers:
        step = program.instructions[number]
        in_place = id(step.output) in before
        library = step.op == "conv" and (not in_place or is_long(step, samples))
        found.append((_layer(number, (), library, *what), samples if library else count))
        if library and in_place:
            moved = 2 * dtype.itemsize * step.output.channels * step.output.pixels
            found.append((Layer(step.output.pixels, step.output.channels, 0, moved, 0, _OURS), samples - count))
    return found


def _resident_seconds(gpu, program, samples, kept):
    """Predict the seconds of the kernel that runs whole networks; 0, which is not used, for those that it refuses."""
    try:
        convs, _, blocks = read_network(program.instructions, program.programs.columns)
    except ValueError:
        return 0.0
    stages = [stage for stage, depth in enumerate(blocks) for _ in range(depth)]
    flops = 2 * 9 * convs[1].shape[0] * convs[1].shape[1] * program.instructions[0].output.pixels  # of each convolution
    conv = flops / (_WARP_PRODUCTS * gpu.flops / gpu.multiprocessors)
    work = samples * _RESIDENT_FACTORS[0] * conv
    work += sum(2 * count * _RESIDENT_FACTORS[stage] * conv for stage, count in zip(stages, kept, strict=True))
    # A few multiprocessors are left over in the groups that clusters must lie in.
    together = cluster_size(
        samples, {size: (gpu.multiprocessors - 4) // size for size in (2, 4)} if gpu.clusters else {}
    )
    places = gpu.multiprocessors // together
    seconds = work / min(samples, places) / (1 + _CLUSTER_GAIN * (together - 1))
    if samples <= places:  # the sample that keeps the most ends last; of more samples it begins first
        share = max(sum(kept) / (samples * len(kept)), 1 / len(kept))
        spread = sqrt((1 - share) / (share * len(kept)))  # of the number of blocks that samples keep, over its mean
        seconds *= 1 + spread * sqrt(1.5 * log(samples))  # about the largest of so many draws
    return gpu.launch + seconds


def _layer(number, pairs, library, program, samples, dtype, grouped=False):
    """Return the Layer of one instruction, which may be one of ``pairs``, by the library or a kernel of dynexec."""
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
        taps, depth = reduction // step.input.channels, step.input.channels
        tile = choose_tile(samples * pixels, channels, taps, depth, dtype, _ARCHITECTURE, grouped)
        if between:
            tile = choose_pair_tile(samples * pixels, between[0].channels, step.input.channels, dtype, _ARCHITECTURE)
        tile = None if library else (tile.bm, min(tile.bn, channels), tile.programs)
    size, launched, shares = dtype.itemsize, number - 1 not in pairs, not grouped and not between
    return Layer(pixels, channels, reduction, size * traffic, size * weights, tile, launched, shares=shares)
