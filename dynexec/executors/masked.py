"""Executor ``masked``: every block computes every sample, then dropped ones are put back. The reference."""

import torch

from dynexec.executors.block import run_all


def prepare(stage, route):
    """What ``run`` needs of the route: the route."""
    return route


def run(stage, x, route):
    """Run ``stage`` on ``x`` ``[N, ...]``, which may be overwritten."""
    for block in stage.blocks:
        s = x if block.shortcut is None else block.shortcut(x)
        if route.count(block.column) == len(x):
            x = run_all(block.body, x, s, stage.chunk)
        else:
            dense = s.clone()  # the body may overwrite its second input
            dense = run_all(block.body, dense if s is x else x, dense, stage.chunk)
            if block.other is not None:
                s = run_all(block.other, x, s, stage.chunk)
            x = torch.where(route.decisions[:, block.column].reshape(-1, *[1] * (s.dim() - 1)), dense, s)
    return x
