"""Published checkpoints: names and shapes from tests/data/*_keys.txt, states under these names, what became of them."""

import re
from pathlib import Path

import torch

DATA = Path(__file__).parent / "data"


def official_shapes(section, system="blockdrop", channels=None):
    """Name to shape, for a section such as ``"resnet32_cifar10 policy"``; ``channels`` is what C stands for."""
    text = (DATA / f"{system}_keys.txt").read_text().split(f"[{section}]\n")[1].split("\n\n")[0]
    shapes = {}
    for line in text.splitlines():
        pattern, *sizes = line.split()
        shape = () if sizes == ["-"] else tuple(channels if size == "C" else int(size) for size in sizes)
        for name in expand(pattern):
            assert name not in shapes, name
            shapes[name] = shape
    return shapes


def official_state(section, system="blockdrop"):
    """Random values under the official names; positive, so that they serve as variances too."""
    return {
        name: torch.tensor(7) if name.endswith("num_batches_tracked") else torch.rand(shape) * 0.1 + 0.01
        for name, shape in official_shapes(section, system).items()
    }


def expand(pattern):
    match = re.search(r"\{([^}]*)\}", pattern)
    if match is None:
        return [pattern]
    low, dots, high = match[1].partition("..")
    choices = range(int(low), int(high) + 1) if dots else match[1].split(",")
    return [
        name for choice in choices for name in expand(f"{pattern[: match.start()]}{choice}{pattern[match.end() :]}")
    ]


def prefixed(state, prefix="module."):
    """As a wrapped network saves it."""
    return {f"{prefix}{name}": value for name, value in state.items()}


def without_counters(state):
    """As PyTorch 0.3 saved it."""
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def holds(module, state):
    """Whether ``module`` has these values under these names."""
    own = module.state_dict()
    return all(torch.equal(own[name], value) for name, value in state.items())


def snapshot(net):
    """The values of ``net``, copied."""
    return {name: value.clone() for name, value in net.state_dict().items()}
