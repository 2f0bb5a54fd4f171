"""Profiles: what they count, that what they measure adds up and changes nothing."""

import json
import os
import re
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import toys
from bench_toys import TINY
from engine_programs import Inverted, needs_engine

import dynexec
from dynexec import cli
from dynexec.executors import profile as profiling
from dynexec.executors.engine import engine_missing
from dynexec.executors.parts import columns
from dynexec.executors.profile import Run, find_losses, record
from dynexec.executors.program import ProgramBuilder
from dynexec.executors.weights import Weights
from dynexec.measure import count_flops, rates
from dynexec.measure.profile import LOSSES, Part, title
from dynexec.nn import DynamicNetwork
from dynexec.report import nets

LAYERS = ["compact", "masked", "grouped"]
ENGINE = [] if engine_missing() else ["resident", "fused"]
EXECUTORS = LAYERS + ENGINE


def make_case():
    """A converted model, images and decisions under which all keep the first block and nobody the second."""
    model, _, blocks = toys.converted()
    decisions = torch.rand(6, blocks) < 0.6
    decisions[:, 0], decisions[:, 1] = True, False
    return model, toys.images(6), decisions


@pytest.fixture
def case():
    return make_case()


def blocks_of(profile):
    return {part.column: part for part in profile.parts if part.kind == "block"}


# What is counted


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("style", toys.STYLES)
def test_flops_are_those_of_the_model(style, executor):
    model, _, blocks = toys.converted(style)
    frozen = dynexec.freeze(model, toys.images(5), executor=executor)
    for size in (13, 17):  # for the second one the engine needs another program
        x, decisions = toys.images(5, size), torch.rand(5, blocks) < 0.5
        expected, found = count_flops(model, x), frozen.profile(x, decisions, rounds=1)
        assert (found.flops, found.dense_flops) == (expected.of(decisions).sum(), 5 * expected.dense)
        counts = decisions.sum(0).tolist()
        assert [part.samples for part in blocks_of(found).values()] == counts
        assert [part.flops for part in blocks_of(found).values()] == [
            n * flops for n, flops in zip(counts, expected.block, strict=True)
        ]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_flops_of_two_sets_of_weights(executor):
    model = toys.STYLES["torchvision"]()
    blocks = dynexec.convert(model, fine_tune="nothing").num_blocks
    x, decisions = toys.images(5), torch.rand(5, blocks) < 0.5
    found, expected = dynexec.freeze(model, x, executor=executor).profile(x, decisions, rounds=1), count_flops(model, x)
    assert (found.flops, found.dense_flops) == (expected.of(decisions).sum(), 5 * expected.dense)
    others = [part.samples for part in found.parts if part.kind == "other"]
    assert others == (~decisions).sum(0).tolist()
    assert sum(found.losses.values()) == pytest.approx(found.measured - found.theoretical)


@pytest.mark.parametrize("bandwidth", [1e6, 1e15])
def test_roofline_is_the_longer_of_arithmetic_and_traffic(case, bandwidth, monkeypatch):
    model, x, decisions = case
    monkeypatch.setattr(profiling, "copy_rate", lambda device: bandwidth)
    found = dynexec.freeze(model, x).profile(x, decisions, rounds=1)
    weights, activations = 4 * 2 * (9 * 8 * 8 + 8), 4 * 2 * 8 * 13 * 13
    first, second = blocks_of(found)[0], blocks_of(found)[1]
    expected = (6 * activations + weights) / bandwidth if bandwidth == 1e6 else first.flops / found.peak
    assert first.roofline == pytest.approx(expected) and second.roofline == 0
    assert first.flops == 6 * 2 * 2 * 9 * 8 * 8 * 13 * 13


# What is measured


@pytest.mark.parametrize("executor", EXECUTORS)
def test_parts_add_up(case, executor):
    model, x, decisions = case
    frozen = dynexec.freeze(model, x, executor=executor)
    found = frozen.profile(x, decisions, rounds=2)
    assert tuple(found.losses) == LOSSES
    assert sum(found.losses.values()) == pytest.approx(found.measured - found.theoretical)
    kept = decisions.any(0).tolist()
    measured = [blocks_of(found)[column].measured > 0 for column in range(frozen.num_blocks)]
    assert measured == (kept if executor != "masked" else [True] * len(kept))
    assert all(part.dense > 0 for part in blocks_of(found).values())
    assert (found.samples, found.num_blocks, found.rounds) == (6, frozen.num_blocks, 2)
    assert found.kept == pytest.approx(decisions.double().mean().item())
    expected = frozen.predict_losses(decisions)
    assert {cause: found.losses[cause] for cause in ("row moves", "dropped rows computed")} == {
        cause: expected[cause] for cause in ("row moves", "dropped rows computed")
    }


@pytest.mark.parametrize("at_once", [None, 4])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_recording_changes_no_bit_and_fits_into_the_call(case, executor, at_once):
    model, x, decisions = case
    frozen = dynexec.freeze(model, x, executor=executor)
    frozen.samples_at_once = at_once
    expected, x = frozen(x, decisions), x.contiguous(memory_format=torch.channels_last)
    start = time.perf_counter()
    output, run = record(frozen, x, decisions, frozen.executor)
    wall = time.perf_counter() - start
    assert torch.equal(output, expected)
    assert 0 < run.total <= wall and run.idle >= 0 and run.launches >= 0
    times = [(span.begin, span.end) for span in run.spans]
    assert all(0 <= begin <= end for begin, end in times)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(times))  # one thread does one thing at a time
    assert times[-1][1] / 1e9 <= wall
    samples = Counter()
    for span in run.spans:
        samples[span.name, span.kind] += span.samples
    kept = {f"layers.{stage}.{number}" for stage, number in ((0, 0), (1, 0), (1, 1), (1, 2))}
    counts = dict(zip(columns(frozen), decisions.sum(0).tolist(), strict=True))
    steps = 2 if executor in ENGINE else 1  # instructions of a block
    assert all(samples[name, "block"] == steps * counts[name] for name in kept)


@needs_engine
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("style", toys.STYLES)
def test_every_sample_runs_every_instruction_that_it_keeps(style, together):
    model, _, blocks = toys.converted(style)
    x, decisions = toys.images(70), torch.rand(70, blocks) < 0.5
    (segment,) = dynexec.freeze(model, x[:2], executor="resident").segments
    (program,) = segment.programs.values()
    expected = program(x, decisions, 7, together)
    torch.set_num_threads(2)
    try:
        output, rows = program.profile(x, decisions, 7, together)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(output, expected)
    threads, instructions, samples, begin, end = rows.t()
    assert threads.unique().tolist() in ([0], [0, 1], [1]) and bool((begin <= end).all()) and int(begin.min()) >= 0
    found = torch.zeros(len(segment.operations), dtype=torch.int64).index_add(0, instructions, samples)
    wanted, steps = [], program.instructions
    for step in steps:
        wanted.append(0 if step.op == "gate" else 70)
    for number, step in enumerate(steps):
        if step.op == "gate":
            wanted[number + 1 : number + 1 + step.gated] = [int(decisions[:, step.column].sum())] * step.gated
        if step.bands:
            wanted[number + 1 : number + 1 + step.bands] = [0] * step.bands
    assert found.tolist() == [(len(threads.unique()) if together else 1) * count for count in wanted]


@needs_engine
def test_what_runs_on_bands_together_is_one_part():
    builder = ProgramBuilder(Weights(), 0, band_floats=1)
    builder.begin_unit()
    x = builder.load(8, 9, 9)
    y = Inverted(8, 24, 8, 3, 1, 1, True, True, False).emit(builder, x)
    for number, name in enumerate(("input", "expand", "depthwise", "project")):
        builder.label(number, name, "layer")
    builder.store(builder.add(y, activation="relu"))
    builder.label(4, "relu", "layer")
    builder.finish()
    together = ["expand .. project"] * 3
    assert [step.part[0] for step in builder.instructions] == ["input", *together, "relu", "relu"]


@pytest.mark.parametrize("executor", ENGINE)
def test_time_of_threads_is_shared(case, executor):
    model, x, decisions = case
    frozen = dynexec.freeze(model, x, executor=executor)
    torch.set_num_threads(2)
    try:
        _, run = record(frozen, x, decisions, frozen.executor)
    finally:
        torch.set_num_threads(1)
    engine = [span for span in run.spans if span.kind in ("block", "shortcut", "layer")]
    threads = len({span.thread for span in engine})
    assert threads == 2 or executor == "resident"  # where each takes the samples that are left
    busy = sum(span.end - span.begin for span in engine) / 1e9 / threads
    assert busy == pytest.approx(run.total - run.idle - run.launches - run.parts["planning", "planning"])
    window = (max(span.end for span in engine) - min(span.begin for span in engine)) / 1e9
    assert busy + run.idle == pytest.approx(window)


def test_losses_of_made_up_times():
    """Two blocks of equal FLOPs, of 8 samples 2 and 6 keep them: half of the dense FLOPs."""
    keys = ("planning", "planning"), ("stem", "layer"), ("a", "block"), ("b", "block")
    run = Run(dict(zip(keys, (0.3, 0.7, 2.5, 6.25), strict=True)), idle=0.2, launches=0.4)
    full = Run(dict(zip(keys, (0.1, 0.5, 8.0, 8.0), strict=True)), idle=0.1, launches=0.2)
    parts = [
        Part(name, kind, None, samples, 8, flops, 0.0, run.parts[name, kind], full.parts[name, kind])
        for (name, kind), samples, flops in zip(keys, (8, 8, 2, 6), (0, 0, 200, 600), strict=True)
    ]
    found = find_losses(parts, run, full, 10.6, 17.1, 1600)
    assert found == pytest.approx({
        "planning": 0.3 - 0.05, "policy": 0, "launches": 0.4 - 0.1, "row moves": 0, "dropped rows computed": 0,
        "under-filled hardware": (2.5 - 2) + (6.25 - 6) + 0.2 - 0.05,
        "dense remainder": 0.7 - 0.25,
        "not explained": (10.6 - 10.35) - 0.5 * (17.1 - 16.9),
    })  # fmt: skip
    assert sum(found.values()) == pytest.approx(10.6 - 17.1 / 2)


def test_policy_that_decides_is_a_part(case):
    model, x, _ = case
    blocks = len(dynexec.nn.residual.dynamic_blocks(model))
    net = DynamicNetwork(model, toys.Policy(blocks))
    frozen = dynexec.freeze(net, x)
    found, expected = frozen.profile(x, rounds=2), count_flops(net, x)
    _, decisions = frozen(x, return_decisions=True)
    assert [part.samples for part in blocks_of(found).values()] == decisions.sum(0).tolist()
    (policy,) = (part for part in found.parts if part.kind == "policy")
    assert policy.flops == 6 * expected.policy and policy.measured > 0 and policy.dense == 0
    assert found.flops == expected.of(decisions).sum()
    assert found.losses["policy"] == pytest.approx(policy.measured - found.dense * policy.flops / found.dense_flops)
    assert sum(found.losses.values()) == pytest.approx(found.measured - found.theoretical)
    assert not [part for part in frozen.profile(x, decisions, rounds=1).parts if part.kind == "policy"]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_rows_that_are_moved_are_counted(case, executor):
    """Each way of two rows that lie apart: read and written, out of the batch and back. Neighbours stay in place."""
    model, x, _ = case
    frozen, row = dynexec.freeze(model, x, executor=executor), 8 * 13 * 13 * 4
    for samples, expected in (([0, 2], 2 * 2 * 2 * row), ([1, 2], 0), ([], 0)):
        decisions = torch.zeros(6, frozen.num_blocks, dtype=torch.bool)
        decisions[samples, 0] = True
        found = frozen.profile(x, decisions, rounds=1)
        if executor == "grouped" and samples:
            expected = 2 * 2 * 2 * row  # copies neighbours, too
        assert found.moved == (expected if executor in ("compact", "grouped") else 0)
        (line,) = (line for line in str(found).splitlines() if line.strip().startswith("row moves"))
        assert line.split()[-1] == f"{found.moved / 1e6:.2f}"


def test_rates_of_slow_arithmetic_are_measured_once(monkeypatch):
    """A large product in float16 takes seconds on a CPU without instructions for it."""
    now, calls = iter(range(100)), []
    monkeypatch.setattr(rates.time, "perf_counter", lambda: next(now))
    assert rates._least_seconds(lambda: calls.append(1), torch.device("cpu")) == 1 and len(calls) == 1


def test_what_cannot_be_profiled_is_an_error(case):
    model, x, decisions = case
    frozen = dynexec.freeze(model, x)
    for rounds in (0, 1.5, None):
        with pytest.raises(ValueError, match=f"rounds must be an int of 1 or more, got {rounds}"):
            frozen.profile(x, decisions, rounds=rounds)
    with pytest.raises(ValueError, match="at least one image"):
        frozen.profile(x[:0], decisions[:0])
    with pytest.raises(ValueError, match="there is no policy"):
        frozen.profile(x)
    with pytest.raises(ValueError, match=r"decisions must be bool \[6, 5\]"):
        frozen.profile(x, decisions[:3])


# What is written


def test_json_holds_the_table(case, tmp_path):
    model, x, decisions = case
    found = dynexec.freeze(model, x).profile(x, decisions, rounds=1)
    found.write_json(tmp_path / "new" / "profile.json")
    read = json.loads((tmp_path / "new" / "profile.json").read_text())
    assert read == json.loads(json.dumps(found.to_dict())) and read["theoretical"] == found.theoretical
    assert [part["name"] for part in read["parts"]] == [part.name for part in found.parts]
    lines = str(found).splitlines()
    (line,) = (line for line in lines if line.startswith("layers.0.0"))
    part = blocks_of(found)[0]
    assert line.split()[1:4] == ["0", "6/6", f"{part.flops / 1e6:.2f}"]
    assert all(any(line.strip().startswith(cause) for line in lines) for cause in LOSSES)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_chrome_trace_is_one_call(case, executor, tmp_path):
    model, x, decisions = case
    found = dynexec.freeze(model, x, executor=executor).profile(x, decisions, rounds=1)
    path = tmp_path / "trace.json"
    path.write_text("old")
    found.chrome_trace(path)
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]
    events = json.loads(path.read_text())["traceEvents"]
    assert len(events) == len(found.spans) and all(event["ph"] == "X" and event["dur"] >= 0 for event in events)
    block = [event for event in events if event["name"] == "layers.1.1"]
    assert block and all(event["args"]["column"] == 3 and event["args"]["samples"] == 6 for event in block)
    times, rest = divmod(sum(event["args"]["kept"] for event in block), int(decisions[:, 3].sum()))
    assert rest == 0 and (times == 1 or (times > 1 and executor in ("resident", "fused")))  # once per instruction
    for part in found.parts:
        flops = [event["args"]["flops"] for event in events if event["name"] == title(part)]
        assert not flops or sum(flops) == pytest.approx(part.flops, abs=len(flops))
    assert ("layers.0.1" in {event["name"] for event in events}) == (executor == "masked")


def test_a_trace_that_cannot_be_written_leaves_the_old_one(case, tmp_path):
    model, x, decisions = case
    found = dynexec.freeze(model, x).profile(x, decisions, rounds=1)
    path = tmp_path / "trace.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON"):
        replace(found, spans=(found.spans[0]._replace(samples=float("nan")),)).chrome_trace(path)
    assert path.read_text() == "old"


def test_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(nets.NETS, "tiny", TINY)
    monkeypatch.setitem(nets.NETS, "absent", replace(TINY, needs=("no_such_package",)))
    trace, numbers = tmp_path / "trace.json", tmp_path / "numbers.json"
    options = ["--batch", "3", "--keep", "0.25", "--rounds", "1", "--chrome", str(trace), "--json", str(numbers)]
    assert cli.main(["profile", "tiny", *options]) == 0
    read = json.loads(numbers.read_text())
    assert (read["samples"], read["num_blocks"], read["rounds"]) == (3, 4, 1) and 0 <= read["kept"] <= 0.75
    assert json.loads(trace.read_text())["traceEvents"]
    assert "not explained" in capsys.readouterr().out
    assert cli.main(["profile", "absent"]) == 1 and "no_such_package" in capsys.readouterr().out
    assert cli.main(["profile", "tiny", "--rounds", "1", "--keep", "published"]) == 0
    with pytest.raises(SystemExit):
        cli.main(["profile", "no_such_net"])


@pytest.mark.parametrize("batch", [10**12, 10**17], ids=["memory", "size"])
def test_a_batch_that_does_not_fit_is_answered_in_one_line(batch, monkeypatch, capsys):
    monkeypatch.setitem(nets.NETS, "tiny", TINY)
    assert cli.main(["profile", "tiny", "--batch", str(batch)]) == 1
    assert re.fullmatch(r"dynexec profile: tiny: RuntimeError: .*\n", capsys.readouterr().err)


def test_one_file_for_both_outputs_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(nets.NETS, "tiny", TINY)
    monkeypatch.chdir(tmp_path)
    options = ["--rounds", "1", "--chrome", "p.json", "--json", str(tmp_path / "p.json")]
    assert cli.main(["profile", "tiny", *options]) == 2 and not os.path.exists("p.json")
    assert re.fullmatch(r"dynexec profile: --chrome and --json must be two files, .*\n", capsys.readouterr().err)
