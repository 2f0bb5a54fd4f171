"""Executor ``masked``: every block computes every sample, then dropped ones are put back. The reference."""

import torch

from dynexec.executors.block import run_all
from dynexec.measure.ranges import part_range


def run(stage, x, route):
    """Run ``stage`` on ``x`` ``[N, ...]``, which may be overwritten."""
    for block in stage.blocks:
        s, count = block.run_shortcut(x), route.count(block.column)
        with part_range(block.name, "block", count, len(x)):
            if count == len(x):
                x = run_all(block.body, x, s, stage.chunk)
                continue
            dense = s.clone()  # the body may overwrite its second input
            dense = run_all(block.body, dense if s is x else x, dense, stage.chunk)
            if block.other is not None:
                s = run_all(block.other, x, s, stage.chunk)
            x = torch.where(route.decisions[:, block.column].reshape(-1, *[1] * (s.dim() - 1)), dense, s)
    return x
