"""What the model of :mod:`dynexec.measure.roofline` expects of networks on an H100. Needs no GPU.

python bench/predict.py            # print the table
python bench/predict.py --write    # also into docs/gpu-notes.md
"""

import argparse
from functools import partial
from pathlib import Path

import torch

from dynexec.executors import forecast
from dynexec.executors.launches import LaunchPrograms
from dynexec.executors.partition import pack_stages
from dynexec.executors.segment import make_segments
from dynexec.measure.roofline import H100, forward_seconds
from dynexec.report.nets import NETS, build, make_images
from dynexec.report.tables import replace_generated

NOTES = Path(__file__).parents[1] / "docs" / "gpu-notes.md"
BATCHES = {"resnet101": (1, 32, 128, 256), "resnet110": (1, 32, 128, 1024)}
KEEPS = (0.25, 0.5, 0.75, 1.0)


def layers(name):
    """``layers(batch)`` of a network: with blocks on the kernels, and dense on the library's convolutions."""
    model = build(NETS[name])
    backbone = getattr(model, "backbone", model)
    network, stages = pack_stages(backbone, make_images(1, NETS[name].size), None, 1)
    columns = sum(len(stage.blocks) for stage, _, _ in stages)
    _, (segment,) = make_segments(network, partial(LaunchPrograms, columns))
    (program,) = segment.programs.values()
    alone = type(program)(program.instructions, program.programs)
    alone.pairs = set()

    def dense(batch):
        return [
            type(layer)(layer.pixels, layer.channels, layer.reduction, layer.traffic, layer.weights)
            for layer in forecast.layers(alone, batch, torch.float16)
        ]

    return columns, lambda batch: forecast.layers(program, batch, torch.float16), dense


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table into docs/gpu-notes.md")
    args = parser.parse_args()
    lines = ["| network | batch | dense cuDNN, ms | " + " | ".join(f"keep {keep}" for keep in KEEPS) + " |\n"]
    lines.append("|---|---:|---:|" + "---|" * len(KEEPS) + "\n")
    for name, batches in BATCHES.items():
        with torch.inference_mode():
            columns, ours, dense = layers(name)
        for batch in batches:
            whole = forward_seconds(H100, dense(batch), batch, [])
            cells = []
            for keep in KEEPS:
                generator = torch.Generator().manual_seed(0)
                kept = (torch.rand(batch, columns, generator=generator) < keep).sum(0).tolist()
                seconds = forward_seconds(H100, ours(batch), batch, kept)
                needed = sum(_flops(layer, batch, kept) for layer in ours(batch))
                theoretical = sum(_flops(layer, batch, [batch] * columns) for layer in ours(batch)) / needed
                cells.append(f"{1e3 * seconds:.2f} ms, {whole / seconds:.2f}x, {whole / seconds / theoretical:.2f}")
            lines.append(f"| {name} | {batch} | {1e3 * whole:.2f} | {' | '.join(cells)} |\n")
    print("".join(lines), end="")
    if args.write:
        NOTES.write_text(replace_generated(NOTES.read_text(), "predictions", "".join(lines)))


def _flops(layer, samples, kept):
    count = samples if layer.column is None else kept[layer.column]
    return 2 * count * layer.pixels * layer.channels * layer.reduction


if __name__ == "__main__":
    main()
