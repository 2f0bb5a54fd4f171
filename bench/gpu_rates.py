"""Rates of a GPU: what it does at most, what launches cost, and the kernels against the library's convolutions.

    python bench/gpu_rates.py FOLDER [--dry]

Rows go to FOLDER/rates.jsonl at once. Times are medians of replays of a CUDA graph with 20 launches that need each
other; every kernel's output is compared with the library's before it is timed. ``--dry`` runs on a CPU.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from predict import program

from dynexec import reference
from dynexec.executors.forecast import program_seconds
from dynexec.kernels.bottleneck import conv_pair
from dynexec.kernels.conv import Workspace, conv
from dynexec.kernels.pointwise import combine
from dynexec.measure.roofline import H100, Layer, layer_seconds
from dynexec.report.experiment import draw_decisions

CHAIN = 20
# Channels in and out, kernel, stride, size of the input, batch.
LAYERS = [
    *((c, k, kernel, 1, size) for size, m in ((14, 256), (28, 128), (56, 64), (7, 512))
      for c, k, kernel in ((m, m, 3), (4 * m, m, 1), (m, 4 * m, 1))),
    (256, 256, 3, 2, 28),
]  # fmt: skip
BATCHES = (32, 128)
KEEPS = (1.0, 0.5)
TOLERANCE = 1e-2  # of the largest value, in float16


def describe(c, k, kernel, stride, size, batch, keep):
    return f"{kernel}x{kernel}/{stride}, {c} to {k} channels, {size}x{size}, batch {batch}, keep {keep}"


class Rates:
    """Measures calls and writes rows."""

    def __init__(self, folder, dry):
        self.path, self.dry, self.failed = folder / "rates.jsonl", dry, 0
        rows = map(json.loads, self.path.read_text().splitlines()) if self.path.exists() else ()
        self.known = {row["name"] for row in rows if "failed" not in row}
        self.device = torch.device("cpu" if dry else "cuda")

    def seconds(self, call):
        """Of one of the calls of a chain."""
        if self.dry:
            call()
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(CHAIN):
                call()
        times = []
        for _ in range(10):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / CHAIN)
        return median(times)

    def row(self, name, **values):
        if not values.get("error", 0.0) < TOLERANCE:  # NaN is not
            values["failed"] = "its output differs"
        self.failed |= "failed" in values
        row = {"device": "cpu" if self.dry else torch.cuda.get_device_name(), "name": name, **values}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))

    def ceilings(self):
        size = 64 if self.dry else 8192
        a, b = (torch.randn(size, size, device=self.device).half() for _ in range(2))
        out = torch.empty_like(a)
        if "flops" not in self.known:
            self.row("flops", value=2 * size**3 / self.seconds(lambda: torch.matmul(a, b, out=out)))
        for name, count in (("bandwidth", 2**28), ("cache_bandwidth", 2**22)):
            x = torch.randn(2**10 if self.dry else count, device=self.device)
            y = torch.empty_like(x)
            if name in self.known:
                continue
            self.row(name, value=2 * 4 * x.numel() / self.seconds(lambda x=x, y=y: y.copy_(x)))

    def launches(self):
        """What an additional launch costs: with programmatic dependent launch, and a plain one of PyTorch's."""
        if "launch" in self.known:
            return
        x = torch.zeros(1, 16, 1, 1, device=self.device).to(memory_format=torch.channels_last)
        for name, run in (
            ("dependent_launch", lambda: combine(x, x, activation="relu")),
            ("launch", lambda: x.add_(1)),
        ):
            period = self.seconds(run)
            self.row(name, value=max(period - H100.fill, 0.0), period=period)  # the model adds filling to it

    def layers(self):
        """Convolutions of all and of half of the samples, by cuDNN on a batch of just these and by the kernels."""
        workspace = Workspace(self.device)
        layers, batches = ([(16, 16, 3, 1, 4)], [2]) if self.dry else (LAYERS, BATCHES)
        for batch in batches:
            for layer in layers:
                for keep in KEEPS:
                    name = describe(*layer, batch, keep)
                    if name in self.known:
                        continue
                    try:
                        self._layer(name, workspace, batch, keep, *layer)
                    except Exception as error:  # the others are worth having
                        self.row(name, failed=f"{type(error).__name__}: {error}")

    def _layer(self, name, workspace, batch, keep, c, k, kernel, stride, size):
        out_size, padding = (size - 1) // stride + 1, kernel // 2
        x, out = self._images(batch, c, size), self._images(batch, k, out_size)
        weight, bias = self._images(k, c, kernel) / (c * kernel**2) ** 0.5, torch.randn(k, device=self.device)
        adds = kernel == 1 and k > c
        mask = torch.arange(batch, device=self.device) % 4 < 4 * keep
        index, offset = reference.plan(torch.stack([~mask, mask], 1), 2)
        kept = mask.nonzero().flatten()
        few, few_out = (t[kept].contiguous(memory_format=torch.channels_last) for t in (x, out))
        geometry = {"stride": (stride, stride), "padding": (padding, padding)}
        rows = {"index": index[1], "offset": offset[1, 1:], "workspace": workspace, "activation": "relu"}
        mine = torch.zeros_like(out)
        conv(x, weight, bias, mine, residual=out if adds else None, **geometry, **rows)
        library = self._library(few, weight, bias, few_out if adds else None, geometry)
        error = float((mine[kept] - library()).abs().max() / library().abs().max())
        times = {"cudnn": self.seconds(library)}
        if error < TOLERANCE:
            times["dynexec"] = self.seconds(
                lambda geometry=geometry, rows=rows, mine=mine: conv(
                    x, weight, bias, mine, residual=mine if adds else None, **geometry, **rows
                )
            )
        flops = 2 * len(kept) * out_size**2 * k * c * kernel**2
        layer = Layer(
            out_size**2, k, c * kernel**2, 2 * (c * size**2 + k * out_size**2 * (1 + adds)), 2 * weight.numel()
        )
        self.row(
            name,
            error=error, expected_us=1e6 * layer_seconds(H100, layer, len(kept)),
            **{f"{name}_us": 1e6 * seconds for name, seconds in times.items()},
            **{f"{name}_tflops": flops / seconds / 1e12 for name, seconds in times.items()},
        )  # fmt: skip

    def pairs(self):
        """The 3x3 and the 1x1 convolution of a bottleneck: as one kernel, and as two."""
        workspace = Workspace(self.device)
        for middle, size in [(16, 4)] if self.dry else [(64, 56), (128, 28), (256, 14)]:
            batch = 2 if self.dry else 64
            name = f"3x3 and 1x1, {middle} channels, {size}x{size}, batch {batch}"
            if name in self.known:
                continue
            x, out, h = (self._images(batch, c, size) for c in (middle, 4 * middle, middle))
            first, last = self._images(middle, middle, 3) / 24, self._images(4 * middle, middle, 1) / 8
            biases = [torch.randn(k, device=self.device) for k in (middle, 4 * middle)]
            more = {"residual": out, "activation": "relu"}

            def two(x=x, out=out, h=h, first=first, last=last, biases=biases, more=more):
                conv(x, first, biases[0], h, padding=(1, 1), activation="relu", workspace=workspace)
                conv(h, last, biases[1], out, workspace=workspace, **more)

            def one(x=x, out=out, first=first, last=last, biases=biases, more=more):
                conv_pair(x, first, biases[0], last, biases[1], out, padding=(1, 1), **more)

            before = out.clone()
            two()
            wanted = out.clone()
            out.copy_(before)
            one()
            error = float((out - wanted).abs().max() / wanted.abs().max())
            times = {"two_us": 1e6 * self.seconds(two), "one_us": 1e6 * self.seconds(one)} if error < TOLERANCE else {}
            self.row(name, error=error, **times)

    def resident(self):
        """ResNet-110 in the kernel that runs it whole: a sample in one block of threads, and in clusters of them."""
        columns, found = program("resnet110", self.device)
        for batch in () if self.dry else (1, 8, 32, 64, 128, 1024):  # the kernel has no interpreter
            x = self._images(batch, 3, 32)
            for keep in KEEPS:
                decisions = draw_decisions(keep, columns, batch).draws[0].to(self.device)
                alone = found.resident().launch(x, decisions, blocks=1)
                for blocks in (1, 2, 4):
                    name = f"resident, ResNet-110, batch {batch}, keep {keep}, {blocks} blocks a sample"
                    if name in self.known or batch * blocks > 2048:
                        continue
                    run = partial(found.resident().launch, x, decisions, blocks=blocks)
                    error = float((run() - alone).abs().max() / alone.abs().max())
                    kept = decisions.sum(0).tolist()
                    expected = program_seconds(H100, found, batch, kept, torch.float16, "resident")
                    times = {"us": 1e6 * self.seconds(run)} if error < TOLERANCE else {}
                    self.row(name, error=error, **times, expected_us=1e6 * expected)

    def _images(self, *shape):
        n, c, size = shape
        return torch.randn(n, c, size, size, device=self.device).half().to(memory_format=torch.channels_last)

    def _library(self, x, weight, bias, other, geometry):
        bias, geometry = bias.half(), (*geometry.values(), (1, 1), 1)
        if self.dry:
            return lambda: F.relu(F.conv2d(x, weight, bias, *geometry) + (0 if other is None else other))
        if other is None:
            return lambda: torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        return lambda: torch.cudnn_convolution_add_relu(x, weight, other, 1.0, bias, *geometry)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    rates = Rates(args.folder, args.dry)
    for section in (rates.ceilings, rates.launches, rates.layers, rates.pairs, rates.resident):
        try:
            with torch.inference_mode():
                section()
        except Exception as error:  # the other sections are worth having
            rates.row(section.__name__, failed=f"{type(error).__name__}: {error}")
    return int(rates.failed)


if __name__ == "__main__":
    sys.exit(main())
