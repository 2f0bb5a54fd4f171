"""Times tiles of the convolution kernels on a GPU, and makes the table that they are chosen from.

    python bench/tiles.py FOLDER [--kinds grouped] [--dry]    # measure: rows go to FOLDER/tiles.jsonl
    python bench/tiles.py --write bench/tiles.jsonl           # write kernels/measured_tiles.py

A row: per layer, batch size, keep rate and tile the microseconds of a launch, median of replays of a CUDA graph with 20
that need each other; and those of cuDNN's convolution of a batch of just the kept samples. Outputs are compared before
anything is timed. Kinds are single convolutions, pairs as one kernel, and grouped ones: half of the samples each with
one of two sets of weights. Kernels are compiled first, on all cores. ``--dry`` measures tiny layers in Triton's
interpreter.

The table has for each layer and batch size the tile with the least sum of the times at the keep rates, in which many
kept samples count more than few, so that a network that keeps all of them is not slower than a dense one; a tile for
which weights are copied in blocks only where that wins more than 3 %. Of several measurements the last one counts, and
of several GPUs the one that comes last in the file; rows of ``--dry`` do not count. It is written if it has all kinds.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from gpu_rates import LAYERS, TOLERANCE, Rates

from dynexec import reference
from dynexec.files import replacing
from dynexec.kernels.bottleneck import conv_pair
from dynexec.kernels.configs import Tile
from dynexec.kernels.conv import Workspace, conv
from dynexec.kernels.grouped import grouped_conv
from dynexec.kernels.offline import compile_launches

TABLE = Path(__file__).parents[1] / "kernels" / "measured_tiles.py"
# Tiles by what they are tried for: output channels, or 1x1 convolutions with short sums.
TILES = {
    16: [(128, 16, 16, 4, 4, 6), (128, 16, 32, 4, 4, 4), (256, 16, 16, 4, 6, 3)],
    32: [(128, 32, 32, 4, 4, 4), (128, 32, 64, 4, 4, 2), (64, 32, 64, 4, 3, 4)],
    64: [
        (128, 64, 64, 4, 4, 2), (128, 64, 64, 8, 3, 3), (64, 64, 64, 4, 4, 3), (64, 64, 64, 4, 3, 4),
        (64, 32, 64, 4, 4, 4),
    ],
    "short": [
        (64, 64, 64, 4, 3, 4), (64, 64, 64, 4, 2, 4), (64, 128, 64, 4, 2, 3), (128, 64, 64, 4, 2, 3),
        (128, 128, 64, 8, 4, 1), (128, 128, 64, 8, 3, 1),
    ],
    "long": [
        (128, 128, 64, 8, 4, 1), (64, 128, 128, 4, 3, 1), (64, 128, 64, 4, 4, 2), (64, 64, 128, 4, 4, 1),
        (64, 64, 128, 4, 3, 2), (128, 256, 64, 8, 3, 1), (64, 64, 64, 4, 4, 3), (64, 128, 64, 4, 3, 3),
        (64, 256, 64, 8, 4, 1), (64, 256, 64, 8, 4, 1, True), (128, 128, 64, 8, 4, 1, True),
        (64, 128, 128, 4, 3, 1, True), (64, 128, 64, 4, 3, 3, True),
    ],
}  # fmt: skip
PAIR_TILES = {
    64: [(128, 64, 64, 8, 3, 2), (64, 64, 64, 4, 3, 3), (64, 128, 64, 8, 3, 2)],
    128: [(64, 64, 64, 4, 3, 3), (64, 128, 64, 4, 3, 2), (128, 128, 64, 8, 3, 1), (128, 64, 64, 8, 4, 1)],
    256: [(64, 64, 64, 8, 3, 1)],
}  # fmt: skip
GROUPED_TILES = [
    (128, 64, 64, 8, 3, 3), (128, 64, 64, 4, 4, 2), (64, 64, 64, 4, 3, 4), (64, 64, 64, 4, 4, 3),
    (128, 128, 64, 8, 4, 1), (128, 128, 64, 8, 3, 1), (64, 128, 64, 4, 4, 2), (64, 128, 64, 4, 3, 3),
    (64, 128, 64, 4, 3, 2), (64, 256, 64, 8, 4, 1), (64, 256, 64, 8, 3, 1), (64, 128, 128, 4, 3, 1),
    (64, 64, 128, 4, 3, 2), (128, 32, 64, 4, 4, 4), (64, 256, 64, 8, 4, 1, True), (128, 128, 64, 8, 4, 1, True),
    (64, 128, 64, 4, 3, 3, True),
]  # fmt: skip
# Beside the bottlenecks': of the small ResNets, and of EfficientNet-lite.
MORE = [
    *((16, 16, 3, 1, 32), (32, 32, 3, 1, 16), (64, 64, 3, 1, 8), (144, 24, 1, 1, 56), (24, 144, 1, 1, 56)),
    *((240, 40, 1, 1, 28), (40, 240, 1, 1, 28), (480, 112, 1, 1, 14), (112, 672, 1, 1, 14)),
]
PAIRS = [(64, 56), (128, 28), (256, 14)]  # channels between, size
GROUPED = [(64, 64, 3, 1, 36), (128, 128, 3, 1, 18), (256, 256, 3, 1, 9)]  # of SpotTune, batch 64
WORTH = 1.03  # what copying weights in blocks must win
KINDS = ("convolutions", "pairs", "grouped")
BATCHES, KEEPS = (128, 32, 64, 8), (1.0, 0.5, 0.25)


def tiles_for(layer):
    c, k, kernel, _, _ = layer
    if k <= 64:
        found = TILES[min(size for size in (16, 32, 64) if size >= k)]
    else:
        found = TILES["short"] if kernel**2 * c <= 256 else TILES["long"]
    return [Tile(*tile) for tile in found]


def pair_tiles(middle):
    return [Tile(*tile) for tile in PAIR_TILES[middle]]


def grouped_tiles(channels):
    return [Tile(*tile) for tile in GROUPED_TILES if channels <= 4 * tile[1] <= 4 * channels]


class Tiles(Rates):
    """Measures tiles and writes rows."""

    def __init__(self, folder, dry):
        super().__init__(folder, dry)
        self.path, self.known = folder / "tiles.jsonl", set()
        self.workspace = Workspace(self.device)

    def conv(self, layer, batch):
        c, k, kernel, stride, size = layer
        out_size = (size - 1) // stride + 1
        x, out = self._images(batch, c, size), self._images(batch, k, out_size)
        weight, bias = self._images(k, c, kernel) / (c * kernel**2) ** 0.5, torch.randn(k, device=self.device)
        residual = self._images(batch, k, out_size) if adds(layer) else None
        geometry = {"stride": (stride, stride), "padding": (kernel // 2, kernel // 2)}
        for keep in KEEPS:
            kept, rows = self.rows(batch, keep)
            few, few_residual = (None if t is None else channels_last(t[kept]) for t in (x, residual))
            library = self._library(few, weight, bias, few_residual, geometry)
            name = {"layer": layer, "batch": batch, "keep": keep}
            self.write(**name, library_us=1e6 * self.seconds(library))
            run = partial(conv, x, weight, bias, out, residual=residual, activation="relu", workspace=self.workspace,
                          **geometry, **rows)  # fmt: skip
            self.race(name, run, tiles_for(layer), kept, library())

    def pair(self, pair, batch):
        middle, size = pair
        x, out, h = (self._images(batch, c, size) for c in (middle, 4 * middle, middle))
        residual = self._images(batch, 4 * middle, size)
        first, last = (self._images(k, middle, n) / (n * middle**0.5) for k, n in ((middle, 3), (4 * middle, 1)))
        biases = [torch.randn(k, device=self.device) for k in (middle, 4 * middle)]
        for keep in KEEPS:
            kept, rows = self.rows(batch, keep)
            conv(x, first, biases[0], h, padding=(1, 1), activation="relu", **rows)
            wanted = conv(h, last, biases[1], out, residual=residual, activation="relu", **rows)[kept]
            run = partial(conv_pair, x, first, biases[0], last, biases[1], out, padding=(1, 1), residual=residual,
                          activation="relu", **rows)  # fmt: skip
            self.race({"pair": pair, "batch": batch, "keep": keep}, run, pair_tiles(middle), kept, wanted)

    def grouped(self, layer, batch):
        c, k, kernel, stride, size = layer
        out_size = (size - 1) // stride + 1
        x = self._images(batch, c, size)
        out, residual = (self._images(batch, k, out_size) for _ in range(2))
        weights = [self._images(k, c, kernel) / (c * kernel**2) ** 0.5 for _ in range(2)]
        biases, half = torch.randn(2, k, device=self.device), batch // 2
        geometry = {"stride": (stride, stride), "padding": (kernel // 2, kernel // 2)}
        wanted = [self._library(x, *each, residual, geometry)() for each in zip(weights, biases, strict=True)]
        wanted = torch.cat((wanted[0][:half], wanted[1][half:]))
        name = {"grouped": layer, "batch": batch}
        library = self._library(x, weights[0], biases[0], residual, geometry)
        self.write(**name, library_us=1e6 * self.seconds(library))
        sizes = [size, size, out_size, out_size, 0, 0]
        groups, index, offset = (
            torch.tensor(numbers, dtype=torch.int32, device=self.device)
            for numbers in ([[*sizes, 0], [*sizes, 1]], list(range(batch)), [0, half, batch])
        )
        stacked = torch.stack([w.permute(0, 2, 3, 1) for w in weights]).permute(0, 1, 4, 2, 3)
        x, mine, residual = (t.permute(0, 2, 3, 1).reshape(-1, t.shape[1]) for t in (x, out, residual))

        def run(tile):
            more = {"residual": residual, "activation": "relu", "tile": tile, **geometry}
            grouped_conv(x, stacked, biases, mine, groups, index, offset, **more)
            return out

        self.race(name, run, grouped_tiles(k), slice(None), wanted)

    def rows(self, batch, keep):
        mask = torch.arange(batch, device=self.device) % 4 < 4 * keep
        index, offset = reference.plan(torch.stack([~mask, mask], 1), 2)
        return mask.nonzero().flatten(), {"index": index[1], "offset": offset[1, 1:]}

    def race(self, name, run, tiles, kept, wanted):
        for tile in tiles:
            row = {**name, "tile": list(vars(tile).values())[: 7 if tile.tma else 6]}
            try:
                error = float((run(tile=tile)[kept] - wanted).abs().max() / wanted.abs().max())
                row |= {"error": error}
                if not error < TOLERANCE:  # NaN is not
                    self.failed = True
                    raise ValueError("its output differs")
                row |= {"us": 1e6 * self.seconds(partial(run, tile=tile))}
            except Exception as problem:  # the others are worth having
                row |= {"failed": f"{type(problem).__name__}: {problem}"[:200]}
            self.write(**row)

    def write(self, **row):
        device = "cpu" if self.dry else torch.cuda.get_device_name()
        with self.path.open("a") as file:
            file.write(json.dumps({"device": device, **row}) + "\n")


def adds(layer):
    return layer[2] == 1 and layer[1] > layer[0]


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def compile_one(job):
    """Compile a kernel, into Triton's cache."""
    kind, layer, tile = job
    meta = torch.device("meta")

    def tensor(*shape):
        return torch.empty(shape, dtype=torch.float16, device=meta).to(memory_format=torch.channels_last)

    rows = {name: torch.empty(n, dtype=torch.int32, device=meta) for name, n in (("index", 4), ("offset", 3))}

    def launch():
        if kind == "pairs":
            m, size = layer
            out, bias = tensor(4, 4 * m, size, size), torch.empty(4 * m, device=meta)
            conv_pair(tensor(4, m, size, size), tensor(m, m, 3, 3), bias[:m], tensor(4 * m, m, 1, 1), bias, out,
                      padding=(1, 1), residual=out, activation="relu", tile=tile, **rows)  # fmt: skip
            return
        c, k, kernel, stride, size = layer
        out_size = (size - 1) // stride + 1
        out = tensor(4, k, out_size, out_size)
        if kind == "grouped":
            pixels = torch.empty(4 * size**2, c, dtype=torch.float16, device=meta)
            weight = tensor(2 * k, c, kernel, kernel).unflatten(0, (2, k))
            groups = torch.empty(2, 7, dtype=torch.int32, device=meta)
            more = {"residual": pixels, "activation": "relu", "tile": tile, "padding": (kernel // 2,) * 2, **rows}
            grouped_conv(pixels, weight, torch.empty(2, k, device=meta), pixels, groups, **more)
            return
        conv(tensor(4, c, size, size), tensor(k, c, kernel, kernel), torch.empty(k, device=meta), out,
             residual=out if adds(layer) else None, activation="relu", tile=tile, stride=(stride, stride),
             padding=(kernel // 2, kernel // 2), workspace=Workspace(meta), **rows)  # fmt: skip

    compile_launches(launch, 90)


def measure(folder, dry, seconds, kinds):
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    plan = {
        "convolutions": (LAYERS + MORE, tiles_for, BATCHES, Tiles.conv),
        "pairs": (PAIRS, lambda pair: pair_tiles(pair[0]), BATCHES, Tiles.pair),
        "grouped": (GROUPED, lambda layer: grouped_tiles(layer[1]), [64], Tiles.grouped),
    }
    if dry:
        plan["convolutions"] = ([(64, 256, 1, 1, 4), (32, 16, 3, 1, 4)], tiles_for, [4], Tiles.conv)
        plan["pairs"] = ([], None, [], Tiles.pair)
        plan["grouped"] = ([(16, 64, 3, 1, 4)], lambda layer: grouped_tiles(layer[1]), [4], Tiles.grouped)
    plan = {kind: plan[kind] for kind in kinds}
    if not dry:
        jobs = [
            (kind, layer, tile)
            for kind, (layers, choose, *_) in plan.items()
            for layer in layers
            for tile in choose(layer)
        ]
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, jobs))
        print(f"{len(jobs)} kernels compiled in {time.monotonic() - start:.0f} s", flush=True)
        torch.backends.cudnn.benchmark = True
    tiles = Tiles(folder, dry)
    with torch.inference_mode():
        for kind, (layers, _, batches, run) in reversed(plan.items()):  # the shortest first
            for batch in batches:
                for layer in layers:
                    run(tiles, layer, batch)
                print(f"{kind}, batch {batch}: {time.monotonic() - start:.0f} s", flush=True)
                if time.monotonic() - start > seconds:
                    break
    return int(tiles.failed)


def write_table(path, target):
    """kernels/measured_tiles.py from the rows of a file; ValueError if it has not all kinds of them."""
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if row["device"] != "cpu"]  # of --dry
    times = {}  # {what: {device, the one of the last rows last: {tile: {keep rate: microseconds}}}}
    for row in rows:
        if "us" in row:
            kind = next(kind for kind in ("layer", "pair", "grouped") if kind in row)
            of_devices = times.setdefault((kind, *row[kind], row["batch"]), {})
            of_tiles = of_devices[row["device"]] = of_devices.pop(row["device"], {})
            of_tiles.setdefault(tuple(row["tile"]), {})[row.get("keep")] = row["us"]
    table = {"layer": [], "pair": [], "grouped": []}
    for (kind, *sizes, batch), of_devices in times.items():
        needed = 1 if kind == "grouped" else len(KEEPS)
        tile = None
        for of_tiles in of_devices.values():
            sums = {
                each: sum(found.values()) * (WORTH if Tile(*each).tma else 1.0)
                for each, found in of_tiles.items()
                if len(found) == needed
            }
            tile = min(sums, key=sums.get, default=tile)
        if tile is None:
            continue
        if kind == "pair":
            table[kind].append((batch * sizes[1] ** 2, sizes[0], tile))
        else:
            c, k, kernel, stride, size = sizes
            if stride == 1:
                table[kind].append((kernel**2, batch * size**2, k, c, tile))
    if missing := [kind for kind in table if not table[kind]]:
        raise ValueError(f"{path}: no tile was measured on a GPU at all keep rates, of: {', '.join(missing)}")
    devices = ", ".join(sorted({row["device"] for row in rows}))
    lines = [
        '"""Tiles that were the fastest for some layers; written by bench/tiles.py, which measures them."""\n',
        f"# On {devices}; float16.",
        "# Taps, pixels of the output, its channels, those of the input, fields of the Tile.",
        "CONVOLUTIONS = [",
        *(f"    {row}," for row in sorted(table["layer"])),
        "]",
        "# Those of which all samples have work, each with its own weights, as above.",
        "GROUPED = [",
        *(f"    {row}," for row in sorted(table["grouped"])),
        "]",
        "# A 3x3 and a 1x1 convolution in one kernel: pixels, channels between them, fields of the Tile.",
        "PAIRS = [",
        *(f"    {row}," for row in sorted(table["pair"])),
        "]",
    ]
    with replacing(target) as file:
        file.write("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--write", type=Path, metavar="ROWS")
    args = parser.parse_args()
    if args.write is not None:
        try:
            return write_table(args.write, TABLE)
        except (OSError, ValueError) as error:
            sys.exit(f"nothing is written: {error}")
    if args.folder is None:
        parser.error("where shall the rows go?")
    return measure(args.folder, args.dry, args.seconds, args.kinds)


if __name__ == "__main__":
    sys.exit(main())
