"""Executor ``compact``: per block, gather the samples that run a body, compute only them, scatter them in place."""

from dynexec.executors.block import run_all, run_rows


def prepare(stage, route):
    """What ``run`` needs of the route: the route."""
    return route


def run(stage, x, route):
    """Run ``stage`` on ``x`` ``[N, ...]``, which is overwritten."""
    for block in stage.blocks:
        s = x if block.shortcut is None else block.shortcut(x)
        for choice, body in block.bodies():
            count = route.count(block.column, choice)
            if count == len(x):
                run_all(body, x, s, stage.chunk)
            elif count:
                run_rows(body, x, s, route.group(block.column, choice), stage.chunk)
        x = s
    return x
