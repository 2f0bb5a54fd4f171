"""Executor ``grouped``: samples whose decisions agree in the whole stage share one static sub-network."""

import torch

from dynexec import ops


def prepare(stage, route):
    """Samples by what they keep of this stage: ``{kept columns as bytes: [sample numbers]}``."""
    first, last = stage.blocks[0].column, stage.blocks[-1].column
    found = {}
    for sample, row in enumerate(route.decisions[:, first : last + 1].numpy()):
        found.setdefault(row.tobytes(), []).append(sample)
    return found


def run(stage, x, parts):
    """Run ``stage`` on ``x`` ``[N, ...]``, which is overwritten."""
    if len(parts) == 1:
        return _run_static(stage, x, next(iter(parts)))
    y = x
    if stage.blocks[0].shortcut is not None:
        y = x.new_empty((len(x), *stage.output_shape)).contiguous(memory_format=torch.channels_last)
    for kept, samples in parts.items():
        if y is x and not any(kept):
            continue
        index = torch.tensor(samples, dtype=torch.int32)
        ops.scatter_rows_(y, index, _run_static(stage, ops.gather_rows(x, index), kept))
    return y


def _run_static(stage, x, kept):
    for block, keep in zip(stage.blocks, kept, strict=True):
        s = x if block.shortcut is None else block.shortcut(x)
        x = block.run_slice(x, s, 0, len(x), stage.chunk) if keep else s
    return x


def seconds(stage, parts):
    """Predicted time of ``run``."""
    total = 0.0
    for kept, samples in parts.items():
        n = len(samples)
        for block, keep in zip(stage.blocks, kept, strict=True):
            total += block.cost.shortcut(n) + (block.cost.body(n) if keep else 0.0)
        if len(parts) > 1:
            total += stage.blocks[0].cost.move(n)
    return total
