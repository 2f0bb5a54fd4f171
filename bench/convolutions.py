"""Convolutions by the engine, by oneDNN and by ONNX Runtime: GFLOP/s, and per cent of what the core can do at most.

    python bench/convolutions.py                # prints a table
    python bench/convolutions.py --write        # also into docs/performance.md

Each shape is a chain of convolutions with ReLU whose output has its input's shape, repeated, so that reordering the
first input and the last output to blocks of channels hardly counts. The input is channels_last for the engine and
oneDNN, and contiguous for ONNX Runtime, which takes nothing else. FLOPs are those of the direct algorithm for all, so
Winograd's can be above the peak. Outputs are compared before anything is timed. One thread.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import nn

from dynexec.executors.block import pack_module
from dynexec.executors.engine import instruction_set, peak_rate
from dynexec.executors.program import Programs
from dynexec.executors.proof import TOLERANCE, relative_error
from dynexec.executors.segment import make_segments
from dynexec.measure.environment import processor_name
from dynexec.measure.timing import compare
from dynexec.report.baselines import OnnxRuntime
from dynexec.report.tables import write_generated

DOCS = Path(__file__).parents[1] / "docs" / "performance.md"
# (network, height and width, channels along the chain, kernel, depthwise)
SHAPES = (
    ("ResNet-110", 32, (16, 16), 3, False),
    ("ResNet-110", 16, (32, 32), 3, False),
    ("ResNet-110", 8, (64, 64), 3, False),
    ("ResNet-50", 56, (64, 64), 3, False),
    ("ResNet-50", 28, (128, 128), 3, False),
    ("ResNet-50", 14, (256, 256), 3, False),
    ("ResNet-50", 7, (512, 512), 3, False),
    ("ResNet-50", 56, (256, 64, 256), 1, False),
    ("ResNet-50", 28, (512, 128, 512), 1, False),
    ("ResNet-50", 14, (1024, 256, 1024), 1, False),
    ("ResNet-50", 7, (2048, 512, 2048), 1, False),
    ("Lite0", 56, (24, 144, 24), 1, False),
    ("Lite0", 28, (40, 240, 40), 1, False),
    ("Lite0", 14, (112, 672, 112), 1, False),
    ("Lite0", 7, (192, 1152, 192), 1, False),
    ("Lite0", 56, (144, 144), 3, True),
    ("Lite0", 28, (240, 240), 5, True),
    ("Lite0", 14, (672, 672), 5, True),
)
_REPEATS = 12


class Chain(nn.Module):
    def __init__(self, channels, kernel, depthwise):
        super().__init__()
        layers = []
        for inputs, outputs in list(zip(channels, channels[1:], strict=False)) * _REPEATS:
            layers.append(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=inputs if depthwise else 1))
            nn.init.kaiming_normal_(layers[-1].weight)
            layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


def measure(size, channels, kernel, depthwise, seconds):
    """GFLOP/s by candidate."""
    torch.manual_seed(0)
    model = Chain(channels, kernel, depthwise).eval().requires_grad_(False)
    x = torch.randn(1, channels[0], size, size).contiguous(memory_format=torch.channels_last)
    packed = pack_module(model, x)
    calls = {"oneDNN": lambda: packed(x)}
    for name, winograd in (("direct", False), ("Winograd", True)):
        module, segments = make_segments(packed.__self__, partial(Programs, 0, winograd))
        instructions = [step for segment in segments for step in segment.operations]
        if winograd == ("winograd" in instructions):
            calls[name] = lambda module=module: module.forward(x)
    if OnnxRuntime.missing() is None:
        session, contiguous = OnnxRuntime(model, x.contiguous(), threads=1), x.contiguous()
        calls["ONNX Runtime"] = lambda: session(contiguous, None)
    expected = model(x)
    for name, call in calls.items():
        if not relative_error(call(), expected) <= TOLERANCE[torch.float32]:
            raise SystemExit(f"{name}: the output is wrong")
    flops = sum(2 * conv.weight.numel() * size * size for conv in model.layers if isinstance(conv, nn.Conv2d))
    timings = compare(calls, seconds=seconds).timings
    return {name: flops / timing.median / 1e9 for name, timing in timings.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="timing per shape (%(default)s)")
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    peak = peak_rate() / 1e9
    names = ("direct", "Winograd", "oneDNN", "ONNX Runtime")
    lines = [
        f"{processor_name()}, {instruction_set()}, 1 thread, batch 1; the core's peak: {peak:.1f} GFLOP/s\n\n",
        f"| layers of | pixels | channels | kernel | {' | '.join(names)} |\n",
        f"|---|---:|---|---|{'---:|' * len(names)}\n",
    ]
    print("".join(lines), end="")
    for network, size, channels, kernel, depthwise in SHAPES:
        rates = measure(size, channels, kernel, depthwise, args.seconds)
        cells = [f"{rates[name]:.1f} ({100 * rates[name] / peak:.0f} %)" if name in rates else "-" for name in names]
        kind = f"{kernel}x{kernel}{' depthwise' if depthwise else ''}"
        chain = " -> ".join(map(str, channels))
        lines.append(f"| {network} | {size}x{size} | {chain} | {kind} | {' | '.join(cells)} |\n")
        print(lines[-1], end="", flush=True)
    if args.write:
        write_generated(DOCS, "convolutions", "".join(lines))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
