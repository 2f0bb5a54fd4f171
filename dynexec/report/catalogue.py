"""The networks of :mod:`dynexec.models` as a table: parameters, FLOPs, form of the decisions."""

import torch

from dynexec.measure import count_flops
from dynexec.models import create_model, list_models

HEADINGS = ("name", "parameters", "input", "GFLOPs, everything", "policy", "decisions")
# Name, or how it begins -> arguments, shape of the input or shapes by modality, decisions.
_KINDS = {
    "adamml": (
        {"modalities": ("rgb", "sound")},
        {"rgb": (1, 10, 8, 3, 224, 224), "sound": (1, 10, 1, 1, 256, 256)},
        "bool `[N, S, M]`: segment, modality",
    ),
    "adashare": ({"num_classes": [40, 3, 1]}, (1, 3, 224, 224), "bool `[T, L]` or `[N, T, L]`: task, block"),
    "arnet": ({}, (1, 16, 3, 224, 224), "int64 `[N, T]`: backbones, lite, skips"),
    "blockdrop_resnet101": ({}, (1, 3, 224, 224), "bool `[N, L]` or `[L]`: block kept"),
    "blockdrop": ({}, (1, 3, 32, 32), "bool `[N, L]` or `[L]`: block kept"),
    "feature_sharing": ({"num_classes": [2] * 40}, (1, 3, 224, 224), "bool `[T]` or `[N, T]`: task wanted"),
    "spottune": ({}, (1, 3, 72, 72), "bool `[N, L]` or `[L]`: fine-tuned weights"),
}


def model_rows():
    """Return rows of texts under :data:`HEADINGS`, one per name; nothing is computed."""
    return [_row(name) for name in list_models()]


def _row(name):
    arguments, shape, decisions = next(kind for start, kind in _KINDS.items() if name.startswith(start))
    with torch.device("meta"):
        network = create_model(name, **arguments)
        shapes = shape if isinstance(shape, dict) else {"": shape}
        inputs = {key: torch.empty(size) for key, size in shapes.items()}
    flops = count_flops(network, inputs if isinstance(shape, dict) else inputs[""])
    parameters = sum(parameter.numel() for parameter in network.parameters())
    sizes = "; ".join(f"{key} `{list(size[1:])}`".strip() for key, size in shapes.items())
    policy = getattr(flops, "policy", 0)
    return (
        f"`{name}`",
        f"{parameters / 1e6:.3g} M",
        sizes,
        f"{flops.dense / 1e9:.4g}",
        f"{policy / 1e9:.3g}" if policy else "-",
        decisions,
    )
