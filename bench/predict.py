"""What the model of :mod:`dynexec.measure.roofline` expects of networks on an H100. Needs no GPU.

python bench/predict.py            # print the table
python bench/predict.py --write    # also into docs/gpu-notes.md
"""

import argparse
from functools import partial
from itertools import product
from pathlib import Path

import torch

from dynexec.executors.forecast import launches, program_seconds
from dynexec.executors.launches import LaunchPrograms
from dynexec.executors.partition import pack_stages
from dynexec.executors.segment import make_segments
from dynexec.measure.roofline import H100
from dynexec.report.nets import NETS, build, make_images
from dynexec.report.tables import write_generated

NOTES = Path(__file__).parents[1] / "docs" / "gpu-notes.md"
BATCHES = {"resnet101": (1, 32, 128, 256), "resnet110": (1, 32, 128, 1024)}
KEEPS = (0.25, 0.5, 0.75, 1.0)


def program(name, device="cpu"):
    """Number of blocks of a network, and the program that runs it on a GPU."""
    device = torch.device(device)
    model = build(NETS[name], statistics=device.type != "meta").to(device).half()  # there are no values there
    backbone = getattr(model, "backbone", model)
    network, stages = pack_stages(backbone, make_images(1, NETS[name].size).to(device).half(), None, 1)
    columns = sum(len(stage.blocks) for stage, _, _ in stages)
    _, (segment,) = make_segments(network, partial(LaunchPrograms, columns))
    (found,) = segment.programs.values()
    return columns, found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table into docs/gpu-notes.md")
    args = parser.parse_args()
    lines = [
        "| network | batch | dense cuDNN, ms | executor | " + " | ".join(f"keep {keep}" for keep in KEEPS) + " |\n"
    ]
    lines.append("|---|---:|---:|---|" + "---|" * len(KEEPS) + "\n")
    for name, batches in BATCHES.items():
        with torch.inference_mode():
            columns, found = program(name)
        for batch, executor in product(batches, ("fused", "resident", "conditional", "dense", "switched")):
            if program_seconds(H100, found, batch, [batch] * columns, torch.float16, executor) == 0:
                continue  # it refuses this network
            static = program_seconds(H100, found, batch, [], torch.float16, "static")
            cells = []
            for keep in KEEPS:
                generator = torch.Generator().manual_seed(0)
                kept = (torch.rand(batch, columns, generator=generator) < keep).sum(0).tolist()
                seconds = program_seconds(H100, found, batch, kept, torch.float16, executor)
                theoretical = _flops(found, batch, [batch] * columns) / _flops(found, batch, kept)
                cells.append(f"{1e3 * seconds:.2f} ms, {static / seconds:.2f}x, {static / seconds / theoretical:.2f}")
            lines.append(f"| {name} | {batch} | {1e3 * static:.2f} | {executor} | {' | '.join(cells)} |\n")
    print("".join(lines), end="")
    if args.write:
        write_generated(NOTES, "predictions", "".join(lines))


def _flops(found, batch, kept):
    layers = launches(found, batch, kept, torch.float16)
    return sum(2 * count * layer.pixels * layer.channels * layer.reduction for layer, count in layers)


if __name__ == "__main__":
    main()
