"""Ranges of torch's profiler: blocks by name, with how many samples keep them."""

import pytest
import torch
import toys
from test_profile import LAYERS, make_case
from torch.profiler import ProfilerActivity

import dynexec
from dynexec.measure.ranges import part_range
from dynexec.models import create_model
from dynexec.route import Route


@pytest.fixture
def case():
    return make_case()


def names_in(call):
    """Names of the ranges that torch's profiler sees."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return {event.key for event in profiler.key_averages()}


def labels(decisions):
    names = ("layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1", "layers.1.2")
    counts = decisions.sum(0).tolist()
    return {f"{name} kept {count}/6" for name, count in zip(names, counts, strict=True)}


def test_eager_blocks_are_ranges(case, monkeypatch):
    model, x, decisions = case
    made = []
    plan = Route.from_decisions
    monkeypatch.setattr(Route, "from_decisions", lambda *args, **options: made.append(1) or plan(*args, **options))
    assert labels(decisions) <= names_in(lambda: toys.run(model, x, decisions))
    assert len(made) == 1  # nobody else asks for counts
    assert not [name for name in names_in(lambda: toys.run(model, x, decisions, "capacity")) if " kept " in name]
    assert len(made) == 1
    shared = {f"layers.0.0 kept {6 * int(keep)}/6" for keep in decisions[0, :1]}
    assert shared <= names_in(lambda: toys.run(model, x, decisions[0]))


def test_networks_of_the_literature_name_their_blocks():
    net = create_model("blockdrop_resnet32_cifar10").eval()
    decisions = torch.zeros(2, 15, dtype=torch.bool)
    decisions[0, 14] = True
    assert {"blocks.0.0 kept 0/2", "blocks.2.4 kept 1/2"} <= names_in(lambda: net(torch.rand(2, 3, 32, 32), decisions))


@pytest.mark.parametrize("executor", LAYERS)
def test_frozen_blocks_are_ranges(case, executor):
    model, x, decisions = case
    if executor == "grouped":
        decisions[:] = decisions[0].clone()  # its ranges count one group of samples
    frozen = dynexec.freeze(model, x, executor=executor)
    names = names_in(lambda: frozen(x, decisions))
    ran = {label for label in labels(decisions) if executor == "masked" or " kept 0/" not in label}
    assert ran <= names and "layers.1.0 shortcut" in names
    assert {name for name in names if " kept " in name} == ran


def test_without_a_profiler_nothing_is_recorded(case, monkeypatch):
    model, x, decisions = case
    frozen = dynexec.freeze(model, x, executor="compact")
    monkeypatch.setattr(torch.profiler, "record_function", None)  # whoever calls it fails
    toys.run(model, x, decisions)
    frozen(x, decisions)
    assert part_range("a", "block", 1, 2) is part_range("b", "shortcut", 2, 2)
    with pytest.raises(TypeError, match="not callable"):
        names_in(lambda: frozen(x, decisions))
