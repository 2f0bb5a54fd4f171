"""Executor ``compact``: per block, gather the samples that run a body, compute only them, and scatter them in place."""

from dynexec.executors.block import run_all, run_rows
from dynexec.measure.ranges import part_range


def run(stage, x, route):
    """Run ``stage`` on ``x`` ``[N, ...]``, which is overwritten."""
    for block in stage.blocks:
        s = block.run_shortcut(x)
        for choice, body in block.bodies():
            count = route.count(block.column, choice)
            if count == 0:
                continue
            with part_range(block.name, "block" if choice else "other", count, len(x)):
                if count == len(x):
                    run_all(body, x, s, stage.chunk)
                else:
                    run_rows(body, x, s, route.group(block.column, choice), stage.chunk)
        x = s
    return x
