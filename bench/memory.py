"""Resident memory of a network while it runs: dense in eager PyTorch, and frozen.

    python bench/memory.py                # prints a table
    python bench/memory.py --write        # also into docs/performance.md

Each figure is the median of three processes: the largest resident set during ten calls, less what was resident before
the network was built. What freeze needs meanwhile (the original, and both ways to run while they are compared) is not
in it; it is given back before. Linux only.
"""

import argparse
import ctypes
import gc
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch

from dynexec import freeze
from dynexec.report.baselines import static_network
from dynexec.report.nets import NETS, build, make_images
from dynexec.report.tables import write_generated

DOCS = Path(__file__).parents[1] / "docs" / "performance.md"
CASES = (
    *(("resnet32", 1), ("resnet110", 1), ("resnet110", 64)),
    *(("resnet50", 1), ("resnet50", 8), ("resnet101", 8)),
    *(("efficientnet_lite0", 1), ("efficientnet_lite0", 16)),
)


def resident(field):
    """MB of a line of /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def trim():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measure(name, batch, kind):
    """MB above the bare process."""
    torch.set_num_threads(1)
    images = make_images(batch, NETS[name].size)
    small = build(NETS["resnet32"]).backbone
    freeze(small, make_images(1, 32))  # what Python and torch load with the first network
    del small
    trim()
    before = resident("VmRSS")
    network = build(NETS[name])
    network = getattr(network, "backbone", network)
    if kind == "eager":
        network = static_network(network).to(memory_format=torch.channels_last)
        x = images.contiguous(memory_format=torch.channels_last)
        call = lambda: network(x)  # noqa: E731
    else:
        network = freeze(network, images)
        decisions = torch.ones(network.num_blocks, dtype=torch.bool)
        call = lambda: network(images, decisions)  # noqa: E731
    trim()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    for _ in range(10):
        call()
    return resident("VmHWM") - before


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with torch.inference_mode():
            print(measure(args.one[0], int(args.one[1]), args.one[2]))
        return
    lines = ["| network | batch | dense eager, MB | frozen, MB |\n", "|---|---:|---:|---:|\n"]
    print("".join(lines), end="")
    for name, batch in CASES:
        if (reason := NETS[name].missing()) is not None:
            print(f"{name}: {reason}", file=sys.stderr)
            continue
        found = []
        for kind in ("eager", "frozen"):
            command = [sys.executable, __file__, "--one", name, str(batch), kind]
            runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(3)]
            found.append(median(map(float, runs)))
        lines.append(f"| {name} | {batch} | {' | '.join(f'{size:.1f}' for size in found)} |\n")
        print(lines[-1], end="", flush=True)
    if args.write:
        write_generated(DOCS, "memory", "".join(lines))


if __name__ == "__main__":
    main()
