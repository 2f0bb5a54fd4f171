"""Profiles of networks of parts: what they count, that losses add up, and that nothing stays behind."""

import json
import time
from itertools import pairwise

import pytest
import test_systems
import torch
import toys
from test_routed import choice, part

import dynexec
from dynexec.executors.profile import Run
from dynexec.executors.routed_profile import BETWEEN, find_losses, own_times, record
from dynexec.measure.profile import ROUTED_LOSSES, Part
from dynexec.measure.ranges import Span

SYSTEMS = test_systems.SMALL | {"feature sharing": test_systems._feature_sharing}


@pytest.fixture(scope="module", params=SYSTEMS)
def case(request):
    """Network, its frozen self, and inputs of two samples."""
    system = SYSTEMS[request.param]()
    torch.manual_seed(0)
    network, inputs = system.build().eval(), system.inputs(2)
    return network, dynexec.freeze(network, inputs), inputs


def test_flops_are_those_of_the_network(case):
    network, frozen, inputs = case
    found, expected = frozen.profile(inputs, rounds=1), network.count_flops(inputs)
    with torch.no_grad():
        needed = expected.of(network(inputs, return_decisions=True)[1])
    assert found.flops == (needed.sum() if needed.dim() else 2 * needed)
    joined = 1e-4 if hasattr(network, "trunks") else 0.0  # heads of several tasks run together for each of them
    assert found.dense_flops == pytest.approx(2 * expected.dense, rel=joined, abs=0)


def test_losses_add_up(case):
    network, frozen, inputs = case
    for decisions in (None, network.example_decisions(inputs)[-1]):
        found = frozen.profile(inputs, decisions, rounds=2)
        assert tuple(found.losses) == ROUTED_LOSSES
        assert sum(found.losses.values()) == pytest.approx(found.measured - found.theoretical)
        assert (found.executor, found.samples, found.rounds) == ("routed", 2, 2) and 0 < found.kept <= 1
        names = [part.name for part in found.parts]
        assert names[-1] == "between parts" and len(set(names)) == len(names)
        assert ("policy" in names) == (decisions is None and hasattr(network, "policy"))
        assert all(part.dense > 0 for part in found.parts if part.kind in ("part", "between"))
        assert all((part.measured > 0) == (part.samples > 0) for part in found.parts)
        assert all(part.dense == 0 and part.measured > 0 for part in found.parts if part.kind == "policy")
        assert json.dumps(found.to_dict(), allow_nan=False)


def test_rows_are_those_that_ran(case):
    network, frozen, inputs = case
    decisions, ran = network.example_decisions(inputs)[-1], {}
    hooks = [
        network.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: ran.update({name: ran.get(name, 0) + len(given[0])})
        )
        for name in network.part_names()
    ]
    with torch.no_grad():
        network(inputs, decisions)
    for hook in hooks:
        hook.remove()
    parts = {part.name: part.samples for part in frozen.profile(inputs, decisions, rounds=1).parts}
    del parts["between parts"]
    assert {name: rows for name, rows in parts.items() if rows} == ran


def test_recording_fits_into_the_call_and_leaves_nothing_behind(case):
    network, frozen, inputs = case
    start = time.perf_counter()
    with torch.no_grad():
        run = record(frozen.network, lambda: frozen.network(inputs), 2, torch.device("cpu"))
    wall = time.perf_counter() - start
    assert 0 < run.total <= wall
    assert all(before.end == after.begin for before, after in pairwise(run.spans))  # every moment is of one of them
    assert "decide" not in vars(getattr(network, "policy", network))
    parts = [frozen.network.get_submodule(name) for name in network.part_names()]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in parts)
    assert "decide" not in vars(getattr(frozen.network, "policy", network))


def test_a_policy_that_is_told_what_to_decide_stays_told():
    system = SYSTEMS["arnet"]()
    network, inputs = system.build().eval(), system.inputs(1)
    frozen, decisions = dynexec.freeze(network, inputs), network.example_decisions(inputs)[-1]
    told = system.obey(frozen.network.policy, decisions)
    frozen.network.policy.decide = told
    found = frozen.profile(inputs, rounds=1)
    assert frozen.network.policy.decide is told
    assert found.flops == network.count_flops(inputs).of(decisions).sum()
    with pytest.raises(ValueError, match="must have shape"):
        frozen.profile(inputs, decisions[:, :1], rounds=1)
    assert frozen.network.policy.decide is told


def test_chrome_trace_has_all_of_the_call(case, tmp_path):
    _, frozen, inputs = case
    found = frozen.profile(inputs, rounds=1)
    found.chrome_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["name"] for event in events} == {part.name for part in found.parts if part.measured > 0}
    assert {event["args"]["kind"] for event in events} == {part.kind for part in found.parts if part.measured > 0}


class Joins(torch.nn.Sequential):
    """A part that moves rows inside, which is no business of the network's."""

    def forward(self, x):
        return super().forward(torch.cat([x, x])[: len(x)])


@pytest.mark.parametrize("first", [None, Joins(part(8))])
def test_rows_that_are_moved_are_counted(first):
    """Of 3x13x13 numbers in, and of 5 out: each read once and written once."""
    network, x = choice(first=first), toys.images(4)
    frozen = dynexec.freeze(network, x)
    found = frozen.profile(x, torch.tensor([0, 1, 1, 0]), rounds=1)
    assert found.moved == 2 * 4 * 4 * (3 * 13 * 13 + 5)
    assert [(part.name, part.samples, part.total) for part in found.parts] == [
        ("nets.0", 2, 4), ("nets.1", 2, 4), ("between parts", 4, 4),
    ]  # fmt: skip
    assert found.parts[-1].roofline == pytest.approx(found.moved / found.bandwidth)
    (line,) = (line for line in str(found).splitlines() if line.startswith("  between parts"))
    assert line.split()[-1] == "0.02" and "2 parts, 50 % of their rows run" in str(found)


def test_what_cannot_be_profiled_is_an_error():
    frozen = dynexec.freeze(choice(), toys.images(2))
    with pytest.raises(ValueError, match="rounds must be an int of 1 or more, got 0"):
        frozen.profile(toys.images(2), torch.zeros(2).long(), rounds=0)
    with pytest.raises(TypeError, match="inputs must be of floating-point tensors"):
        frozen.profile(toys.images(2).byte(), torch.zeros(2).long())
    with pytest.raises(ValueError, match="at least one sample to profile, got a batch of 0"):
        frozen.profile(toys.images(2)[:0], torch.zeros(0).long())


def test_own_times():
    call, policy = Span(0, "call", "between", 2, 0, 100), Span(0, "policy", "policy", 2, 0, 60)
    first, second = Span(0, "a", "part", 2, 20, 40), Span(0, "b", "part", 2, 60, 90)
    found = [(span.name, span.begin, span.end) for span in own_times([first, policy, second, call])]
    assert found == [
        ("policy", 0, 20), ("a", 20, 40), ("policy", 40, 60), ("b", 60, 90), ("call", 90, 100),
    ]  # fmt: skip


def test_losses_of_made_up_times():
    """Two parts of equal FLOPs; half of the rows of the slower one run: a quarter is needed."""
    times = {("slow", "part"): (4.0, 6.0), ("fast", "part"): (0.0, 2.0), BETWEEN: (0.5, 1.0)}
    run, full = (Run({key: pair[number] for key, pair in times.items()}) for number in (0, 1))
    run.parts["policy", "policy"] = 0.75
    slow = Part("slow", "part", None, 2, 4, 200, 0.0, 4.0, 6.0)
    fast = Part("fast", "part", None, 0, 4, 0, 0.0, 0.0, 2.0)
    policy = Part("policy", "policy", None, 4, 4, 40, 0.0, 0.75, 0.0)
    between = Part(*BETWEEN, None, 4, 4, 0, 0.0, 0.5, 1.0)
    found = find_losses([policy, slow, fast, between], run, full, 5.5, 9.6, 800)
    assert found == pytest.approx({
        "policy": 0.75 - 9.6 * 40 / 800,
        "fewer rows at once": 4.0 - 3.0,
        "parts of unequal speed": (3.0 - 1.5) + (0.0 - 0.5),
        "between parts": 0.5 - 0.25,
        "not explained": (5.5 - 5.25) - (9.6 - 9.0) / 4,
    })  # fmt: skip
    assert sum(found.values()) == pytest.approx(5.5 - 9.6 * 240 / 800)
