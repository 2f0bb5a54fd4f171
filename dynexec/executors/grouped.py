"""Executor ``grouped``: samples whose decisions agree in the whole stage share one static sub-network."""

import torch

from dynexec import ops
from dynexec.executors.block import run_all
from dynexec.measure.ranges import part_range
from dynexec.reference import empty_rows


def prepare(stage, route):
    """Group samples by what they keep of this stage: ``{kept columns as bytes: [sample numbers]}``."""
    first, last = stage.blocks[0].column, stage.blocks[-1].column
    found = {}
    for sample, row in enumerate(route.decisions[:, first : last + 1].cpu().numpy()):
        found.setdefault(row.tobytes(), []).append(sample)
    return found


def run(stage, x, parts):
    """Run ``stage`` on ``x`` ``[N, ...]``, which is overwritten."""
    if len(parts) <= 1:
        return _run_static(stage, x, next(iter(parts), bytes(len(stage.blocks))), len(x))
    reshapes = stage.blocks[0].shortcut is not None
    y = None if reshapes else x
    for kept, samples in parts.items():
        if not reshapes and not any(kept) and all(block.other is None for block in stage.blocks):
            continue
        index = torch.tensor(samples, dtype=torch.int32, device=x.device)
        rows = _run_static(stage, ops.gather_rows(x, index), kept, len(x))
        if y is None:
            y = empty_rows(rows, len(x))
        ops.scatter_rows_(y, index, rows)
    return y


def _run_static(stage, x, kept, total):
    for block, keep in zip(stage.blocks, kept, strict=True):
        s = block.run_shortcut(x)
        body = block.body if keep else block.other
        if body is not None:
            with part_range(block.name, "block" if keep else "other", len(x), total):
                s = run_all(body, x, s, stage.chunk)
        x = s
    return x
