"""What the Triton kernels become for each architecture: registers, memory, instructions. Needs no GPU.

    python bench/machine_code.py            # print the table
    python bench/machine_code.py --write    # and record it: bench/machine_code.jsonl and docs/gpu-notes.md
    python bench/machine_code.py --check    # and compare with what is recorded

Exit status 1 if something is worse; then nothing is recorded.

Worse is: a spill or a stack; no tensor-core instruction, asynchronous copy, 16-byte access or wait for the kernel
before where one belongs; more registers or shared memory than leaves room for the programs that a multiprocessor
shall run at once; 10 % more registers, shared memory or instructions of the main loop than recorded.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from dynexec.files import replacing
from dynexec.kernels.bottleneck import conv_pair
from dynexec.kernels.configs import Tile, choose_pair_tile, choose_tile
from dynexec.kernels.conv import Workspace, conv
from dynexec.kernels.depthwise import depthwise
from dynexec.kernels.grouped import grouped_conv
from dynexec.kernels.offline import compile_launches, inspect
from dynexec.kernels.plan import find_body, plan
from dynexec.kernels.pointwise import combine, pool
from dynexec.kernels.rows import move_rows
from dynexec.report.tables import write_generated

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "bench" / "machine_code.jsonl"
NOTES = ROOT / "docs" / "gpu-notes.md"
# Bytes of shared memory of a multiprocessor; each program takes another KB.
SHARED = {80: 164 * 1024, 86: 100 * 1024, 90: 228 * 1024}
REGISTERS = 64 * 1024
GROWTH = 1.1
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
COLUMNS = ("registers", "stack", "spills", "shared", "tensor_core", "async_copies", "wide", "narrow", "waits", "loop")


def cases(architecture):
    """{name: (launch, its Tile or None)}, the kernels at the shapes of the networks they are for."""
    found = {}
    for dtype in (HALF, BRAIN, SINGLE):
        few = dtype != HALF
        for n in (256,) if few else (256, 4):
            for shape in [(256, 256, 3, 1, 14), (256, 1024, 1, 1, 14)] if few else CONVOLUTIONS:
                add_conv(found, architecture, dtype, n, *shape)
        for middle, size in ((64, 56), (128, 28), (256, 14)):
            add_pair(found, architecture, dtype, middle, size)
        for channels, size in ((64, 36), (128, 18), (256, 9)):
            add_grouped(found, architecture, dtype, channels, size)
            if architecture >= 90 and (dtype, channels) == (HALF, 256):
                add_grouped(found, architecture, dtype, channels, size, tma=True)
    rows, passed = (tensor(64, 4096), tensor(32, 4096), numbers(32)), tensor(32, 4096, dtype=torch.bool)
    found["gather rows"] = partial(move_rows, *rows, scatter=False), None
    found["gather rows that passed"] = partial(move_rows, *rows, passed, scatter=False), None
    activated = {"scatter": True, "add": True, "relu": True}
    found["scatter rows, add, ReLU"] = partial(move_rows, *rows, **activated), None
    found["scatter rows, add, ReLU, what passed"] = partial(move_rows, *rows, passed, **activated), None
    found["plan, 256 x 54"] = partial(plan, tensor(256, 54, dtype=torch.bool), 2), None
    found["plan, which body of a switch, 54 blocks"] = partial(find_body, numbers(54, 3), 99), None
    for kernel, c, size in ((3, 144, 56), (5, 240, 28)):
        x, weight = tensor(64, c, size, size), tensor(c, 1, kernel, kernel)
        padding = (kernel // 2,) * 2
        call = partial(depthwise, x, weight, floats(c), x, padding=padding, activation="relu6", **some_rows(64))
        found[f"depthwise {kernel}x{kernel}, {c} channels"] = call, None
    x = tensor(64, 240, 28, 28)
    found["add, ReLU"] = partial(combine, x, x, add=x, activation="relu", **some_rows(64)), None
    found["multiply"] = partial(combine, x, x, multiply=tensor(64, 240, 1, 1), **some_rows(64)), None
    pooled = tensor(64, 240, 1, 1)
    found["mean of all pixels"] = partial(pool, x, pooled, "sum", (28, 28), stride=(28, 28), **some_rows(64)), None
    add_rest(found, architecture)
    return found


def add_rest(found, architecture):
    """Of all samples, without an index; and what must compile without being fast: odd channels, one sample."""
    x, small = tensor(64, 240, 28, 28), tensor(64, 240, 14, 14)
    window = {"stride": (2, 2), "padding": (1, 1)}
    found["max of 3x3, all samples"] = partial(pool, x, small, "max", (3, 3), **window), None
    found["mean of 3x3, all samples"] = partial(pool, x, small, "sum", (3, 3), **window), None
    found["mean of all pixels, all samples"] = (
        partial(pool, x, tensor(64, 240, 1, 1), "sum", (28, 28), stride=(28, 28)),
        None,
    )
    found["copy, all samples"] = partial(combine, x, x), None
    found["copy"] = partial(combine, x, x, **some_rows(64)), None
    found["more channels, odd ones, all samples"] = partial(combine, tensor(64, 15, 9, 9), tensor(64, 31, 9, 9)), None
    for name, n, c, k in (("all samples", 64, 256, 256), ("odd channels, all samples", 64, 15, 31)):
        tile = choose_tile(n * 196, k, 9, c, HALF, architecture)
        out = tensor(n, k, 14, 14)
        call = partial(
            conv, tensor(n, c, 14, 14), tensor(k, c, 3, 3), floats(k), out, padding=(1, 1), residual=out, tile=tile
        )
        found[f"3x3, {c} to {k} channels, {name}, {label(tile)}, float16"] = call, tile if c == 256 else None
    few = partial(conv, tensor(64, 2048, 7, 7), tensor(4, 2048, 1, 1), floats(4), tensor(64, 4, 7, 7),
                  workspace=Workspace(torch.device("meta")), **some_rows(64))  # fmt: skip
    if architecture >= 90:  # fewer than a tile holds, of sums that are shared
        found["1x1, 2048 to 4 channels, float16"] = few, None
    one = partial(depthwise, tensor(1, 15, 9, 9), tensor(15, 1, 3, 3), floats(15), tensor(1, 15, 9, 9), padding=(1, 1))
    found["depthwise 3x3, 15 channels, one sample"] = one, None
    tile = choose_pair_tile(81, 20, 20, HALF, architecture)
    found["3x3 and 1x1, odd channels, one sample"] = partial(
        conv_pair, tensor(1, 20, 9, 9), tensor(20, 20, 3, 3), floats(20), tensor(31, 20, 1, 1), floats(31),
        tensor(1, 31, 9, 9), padding=(1, 1), tile=tile,
    ), None  # fmt: skip


# Channels in and out, kernel, stride, size of the output.
CONVOLUTIONS = [
    (16, 16, 3, 1, 32),
    (32, 32, 3, 1, 16),
    (64, 64, 3, 1, 56),
    (128, 128, 3, 1, 28),
    (256, 256, 3, 1, 14),
    (256, 256, 3, 2, 14),
    (1024, 256, 1, 1, 14),
    (256, 1024, 1, 1, 14),
]


def add_conv(found, architecture, dtype, n, c, k, kernel, stride, size):
    tile = choose_tile(n * size * size, k, kernel**2, c, dtype, architecture)
    adds = kernel == 1 and k > c
    out = tensor(n, k, size, size, dtype=dtype)
    call = partial(
        conv, tensor(n, c, stride * size, stride * size, dtype=dtype), tensor(k, c, kernel, kernel, dtype=dtype),
        floats(k), out, stride=(stride, stride), padding=(kernel // 2,) * 2, activation="relu",
        residual=out if adds else None, workspace=Workspace(torch.device("meta")), tile=tile, **some_rows(n),
    )  # fmt: skip
    name = f"{kernel}x{kernel}{'/2' if stride > 1 else ''}, {c} to {k} channels, {size}x{size}{', add' if adds else ''}"
    found[f"{name}, {label(tile)}, {short(dtype)}"] = call, tile


def add_pair(found, architecture, dtype, middle, size):
    tile = choose_pair_tile(64 * size * size, middle, middle, dtype, architecture)
    out = tensor(64, 4 * middle, size, size, dtype=dtype)
    call = partial(
        conv_pair, tensor(64, middle, size, size, dtype=dtype), tensor(middle, middle, 3, 3, dtype=dtype),
        floats(middle), tensor(4 * middle, middle, 1, 1, dtype=dtype), floats(4 * middle), out, padding=(1, 1),
        activation="relu", residual=out, tile=tile, **some_rows(64),
    )  # fmt: skip
    found[f"3x3 and 1x1, {middle} to {4 * middle} channels, {label(tile)}, {short(dtype)}"] = call, tile


def add_grouped(found, architecture, dtype, channels, size, tma=False):
    x, groups = tensor(64 * size * size, channels, dtype=dtype), numbers(2, 7)
    tile = choose_tile(len(x), channels, 9, channels, dtype, architecture, grouped=True)
    tile = replace(tile, tma=tma or tile.tma)
    weight = tensor(2 * channels, channels, 3, 3, dtype=dtype).unflatten(0, (2, channels))
    call = partial(
        grouped_conv, x, weight, floats(2, channels), x, groups,
        numbers(64), numbers(3), padding=(1, 1), activation="relu", tile=tile,
    )  # fmt: skip
    found[f"3x3 of groups, {channels} channels, {label(tile)}, {short(dtype)}"] = call, tile


def tensor(*shape, dtype=HALF):
    found = torch.empty(shape, dtype=dtype, device="meta")
    return found.to(memory_format=torch.channels_last) if len(shape) == 4 else found


def floats(*shape):
    return tensor(*shape, dtype=SINGLE)


def numbers(*shape):
    return tensor(*shape, dtype=torch.int32)


def some_rows(n):
    return {"index": numbers(n), "offset": numbers(2)}


def label(tile):
    return f"{tile.bm}x{tile.bn}x{tile.bk} w{tile.warps} s{tile.stages}{' TMA' if tile.tma else ''}"


def short(dtype):
    return str(dtype).removeprefix("torch.")


def measure(job):
    """A row of the table."""
    architecture, name = job
    call, tile = cases(architecture)[name]
    (compiled,) = compile_launches(call, architecture)
    return {"kernel": name, "architecture": architecture, **inspect(compiled)}, tile


def problems(row, tile, recorded):
    """What is wrong with a row, as a list of texts; ``recorded`` is the row of the time before, or None."""
    found = [f"{row[what]} {what}" for what in ("stack", "spills") if row[what]]
    programs = tile.programs if isinstance(tile, Tile) else 1
    if row["kernel"].startswith("3x3 of groups, 64 channels, 128x64x64 w8 s3"):
        programs = 2  # the fastest that was measured, though of the three that are launched one has to wait
    if 32 * row["warps"] * programs * row["registers"] > REGISTERS:
        found.append(f"{row['registers']} registers leave no room for {programs} programs")
    if programs * (row["shared"] + 1024) > SHARED[row["architecture"]]:
        found.append(f"{row['shared']} bytes of shared memory leave no room for {programs} programs")
    wanted = [("tensor_core", tile), ("async_copies", tile), ("waits", row["architecture"] >= 90 and waits(row))]
    found += [f"no {what}" for what, needed in wanted if needed and not row[what]]
    anyhow = any(word in row["kernel"] for word in ("plan", "odd", "15 channels"))
    # Of rows: a row number, and a constant or the first row and the end.
    if "rows" in row["kernel"] and row["narrow"] > 3 or not row["wide"] and not anyhow:
        found.append(f"{row['narrow']} narrow accesses of global memory")
    for what in ("registers", "loop", "shared"):
        if recorded is not None and row[what] > GROWTH * recorded[what]:
            found.append(f"{what} {row[what]}, recorded {recorded[what]}")
    return found


def waits(row):
    """Whether the kernel waits for the one before: all but those that are launched on their own."""
    return "plan" not in row["kernel"] and "rows" not in row["kernel"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="record it")
    parser.add_argument("--check", action="store_true", help="compare with what is recorded")
    parser.add_argument("--architectures", nargs="+", type=int, default=list(SHARED), choices=list(SHARED))
    args = parser.parse_args()
    if args.write and set(args.architectures) != set(SHARED):
        parser.error("--write records all architectures")
    recorded = {}
    if RECORD.exists():
        rows = map(json.loads, RECORD.read_text().splitlines())
        recorded = {(row["kernel"], row["architecture"]): row for row in rows}
    jobs = [(architecture, name) for architecture in args.architectures for name in cases(architecture)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(measure, jobs))
    lines = [f"| kernel | sm | {' | '.join(what.replace('_', ' ') for what in COLUMNS)} |\n"]
    lines.append(f"|---|---{'|---:' * len(COLUMNS)}|\n")
    bad = []
    for row, tile in results:
        key = row["kernel"], row["architecture"]
        lines.append(f"| {key[0]} | {key[1]} | {' | '.join(str(row[what]) for what in COLUMNS)} |\n")
        before = recorded.get(key) if args.check else None
        found = problems(row, tile, before)
        if args.check and before is None:
            found.append("not recorded")
        bad += [f"{key[0]}, sm_{key[1]}: {problem}" for problem in found]
    print("".join(lines), end="")
    print("\n".join(bad), file=sys.stderr)
    if args.write and bad:
        print("Nothing is recorded.", file=sys.stderr)
    elif args.write:
        with replacing(RECORD) as file:
            file.write("".join(json.dumps(row) + "\n" for row, _ in results))
        write_generated(NOTES, "machine code", "".join(lines))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
