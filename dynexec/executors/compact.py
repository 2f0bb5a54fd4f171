"""Executor ``compact``: per block, gather the kept samples, compute only them, scatter them back in place."""


def prepare(stage, route):
    """What ``run`` needs of the route: the route."""
    return route


def run(stage, x, route):
    """Run ``stage`` on ``x`` ``[N, ...]``, which is overwritten."""
    for block in stage.blocks:
        s = x if block.shortcut is None else block.shortcut(x)
        kept = route.count(block.column)
        if kept == len(x):
            block.run_all(x, s, stage.chunk)
        elif kept:
            block.run_rows(x, s, route.group(block.column), stage.chunk)
        x = s
    return x
