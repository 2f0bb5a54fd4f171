"""CUDA graphs of frozen networks, and their profiles on a GPU; only one can run them."""

import math
import subprocess
import sys
import threading

import pytest
import torch
import toys
from test_routed import choice
from torch import nn

import dynexec
from dynexec.executors.conditional import conditional_missing
from dynexec.executors.launch_program import LaunchProgram
from dynexec.nn.context import decide

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


EXECUTORS = ["fused"] + ["conditional", "switched"] * (conditional_missing() is None)


def freeze(policy=False, dtype=torch.float16, batch=6, executor="fused"):
    model = toys.timm_style().cuda().to(dtype)
    num_blocks = dynexec.convert(model).num_blocks
    x = torch.randn(batch, 3, 13, 13, device="cuda", dtype=dtype)
    if policy:
        pooled = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_blocks))
        policy = toys.finish(nn.Sequential(pooled, nn.Sigmoid())).cuda().to(dtype)
    frozen = dynexec.freeze(model, x, executor=executor, policy=policy or None)
    assert "in CUDA graphs" in frozen.explain()
    return model, num_blocks, x, frozen


def expected(model, x, decisions):
    with torch.no_grad(), decide(decisions):
        return model(x.clone())


def close(actual, wanted):
    torch.testing.assert_close(actual, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_replays_take_new_inputs_and_decisions(executor):
    model, num_blocks, x, frozen = freeze(batch=19, executor=executor)
    assert "no CUDA graph" not in frozen.explain()
    for keep in (0.5, 0.0, 1.0, 0.3, 0.5):
        x = torch.randn_like(x)
        decisions = torch.rand(len(x), num_blocks, device="cuda") < keep
        close(frozen(x, decisions), expected(model, x, decisions))
    assert [shape for _, shape, _ in frozen.graphs.graphs].count(x.shape) == 1


def test_executors_have_graphs_of_their_own():
    model = toys.timm_style().cuda().half()
    num_blocks = dynexec.convert(model).num_blocks
    x = torch.randn(6, 3, 13, 13, device="cuda", dtype=torch.float16)
    frozen = dynexec.freeze(model, x)
    assert "no CUDA graph" not in frozen.explain()
    refused = [line.split()[0] for line in frozen.explain().splitlines() if " refused: " in line]
    assert set(refused) <= {"resident"} | {"conditional", "switched"} - set(EXECUTORS)
    if frozen.graphs is not None:
        assert {variant for variant, *_ in frozen.graphs.graphs} == {frozen.executor}
        for name in (*EXECUTORS, "dense", "fused"):
            frozen.use(name)
            decisions = torch.rand(len(x), num_blocks, device="cuda") < 0.5
            close(frozen(x, decisions), expected(model, x, decisions))
        assert {variant for variant, *_ in frozen.graphs.graphs} == {*EXECUTORS, "dense"}


@pytest.mark.skipif("switched" not in EXECUTORS, reason=str(conditional_missing()))
def test_the_device_switches(monkeypatch):
    """Each way to run is made to give what the others do not."""
    _, num_blocks, x, frozen = freeze(batch=8, executor="switched")
    launch = LaunchProgram._launch

    def shifted(program, x, route, name, *rest):
        return launch(program, x, route, name, *rest) + {"static": 200.0, "dense": 100.0, "fused": 0.0}[name]

    monkeypatch.setattr(LaunchProgram, "_launch", shifted)
    frozen.switch_at = 0.5
    frozen.use("switched")
    frozen.graphs.graphs.clear()
    pairs = len(x) * num_blocks
    for kept, shift in ((pairs, 200), (0, 0), (pairs // 2 - 1, 0), (pairs // 2, 100), (pairs - 1, 100)):
        decisions = (torch.randperm(pairs, device="cuda") < kept).reshape(len(x), num_blocks)
        assert abs(float(frozen(x, decisions).mean()) - shift) < 50
    assert not frozen.graphs.failed


def test_what_cannot_be_captured_runs_without_a_graph():
    model, num_blocks, x, frozen = freeze()
    compute = frozen.graphs.function

    def waits(x, decisions):
        decisions.any().item()
        return compute(x, decisions)

    frozen.graphs.function, frozen.graphs.instead = waits, (waits,)
    for n in (5, 5, 6):
        decisions = torch.rand(n, num_blocks, device="cuda") < 0.5
        close(frozen(x[:n], decisions), expected(model, x[:n], decisions))
    assert [shape[0] for _, shape, _ in frozen.graphs.failed] == [5]
    assert "\nno CUDA graph for fused, (5, 3, 13, 13), decisions given: " in frozen.explain()
    assert torch.randn(8, device="cuda").std() > 0
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    close(frozen(x[:4], decisions[:4]), expected(model, x[:4], decisions[:4]))


def test_another_function_is_captured_where_the_first_cannot_be():
    model, num_blocks, x, frozen = freeze(executor=EXECUTORS[-1])
    compute = frozen.graphs.function

    def waits(x, decisions):
        decisions.any().item()
        return compute(x, decisions)

    frozen.graphs.function = waits
    for n in (5, 4, 5):  # of 1, 3 and 6 there is a graph since freeze
        decisions = torch.rand(n, num_blocks, device="cuda") < 0.5
        close(frozen(x[:n], decisions), expected(model, x[:n], decisions))
    assert not frozen.graphs.failed
    assert [shape[0] for _, shape, _ in frozen.graphs.replaced] == [5, 4]
    assert "another CUDA graph for" in frozen.explain()


def test_a_process_ends_well_after_many_graphs():
    """More than torch has streams, most of them freed before it ends."""
    code = """
import gc, torch
from dynexec.executors.graphs import Graphs
double = Graphs(lambda x, decisions: (2 * x,))
for samples in range(1, 100):
    assert double(torch.ones(samples, device="cuda"), None, "way")[0].sum() == 2 * samples
    if samples % 9 == 0:
        gc.collect()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_bodies_of_a_switch_take_dependent_launches():
    """Else the graph with plain launches runs, which is slower."""
    if "switched" not in EXECUTORS:
        pytest.skip(str(conditional_missing()))
    _, _, _, frozen = freeze(executor="switched")
    assert not frozen.graphs.replaced


@pytest.mark.parametrize("executor", EXECUTORS)
def test_nothing_waits_for_the_device(executor):
    model, num_blocks, x, frozen = freeze(policy=True, executor=executor)
    frozen(x)
    decisions = torch.rand(len(x), num_blocks, device="cuda") < 0.5
    frozen(x, decisions)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [frozen(x), frozen(x, decisions), frozen.compute(x, None)[0], frozen.compute(x, decisions)[0]]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    close(results[0], results[2])
    close(results[1], results[3])
    close(results[1], expected(model, x, decisions))


def test_a_policy_is_in_the_graph():
    model, _, x, frozen = freeze(policy=True)
    for _ in range(3):
        x = torch.randn_like(x)
        y, decisions = frozen(x, return_decisions=True)
        close(y, expected(model, x, decisions))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_several_streams_and_threads(executor):
    model, num_blocks, x, frozen = freeze(executor=executor)
    inputs = [(torch.randn_like(x), torch.rand(len(x), num_blocks, device="cuda") < 0.5) for _ in range(8)]
    wanted = [expected(model, *given) for given in inputs]
    torch.cuda.synchronize()
    results = [None] * len(inputs)

    def call(number):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                results[number] = frozen(*inputs[number])
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, want in zip(results, wanted, strict=True):
        close(result, want)


def test_more_shapes_than_graphs_are_kept():
    model, num_blocks, x, frozen = freeze(batch=12)
    for n in [*range(1, 12), 3, 1]:
        decisions = torch.rand(n, num_blocks, device="cuda") < 0.5
        close(frozen(x[:n], decisions), expected(model, x[:n], decisions))
    assert len(frozen.graphs.graphs) <= 8


@pytest.mark.parametrize("executor", EXECUTORS)
def test_inside_of_somebody_elses_graph(executor):
    model, num_blocks, x, frozen = freeze(executor=executor)
    decisions = torch.rand(len(x), num_blocks, device="cuda") < 0.5
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for other in {executor, "dense", "fused"}:
            frozen.use(other)
            frozen.compute(x, decisions)
    frozen.use(executor)
    torch.cuda.current_stream().wait_stream(stream)
    graphs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
    results = []
    for graph in graphs:
        with torch.cuda.graph(graph, stream=stream):
            results.append(frozen(x, decisions))
    assert frozen.executor == executor
    for graph, result in zip(reversed(graphs), reversed(results), strict=True):
        x.normal_()
        decisions.copy_(torch.rand(len(x), num_blocks, device="cuda") < 0.5)
        graph.replay()
        close(result, expected(model, x, decisions))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_parts_of_routed_networks_run_in_graphs(dtype):
    net = choice().cuda().to(dtype)
    frozen = dynexec.freeze(net, torch.randn(12, 3, 13, 13, device="cuda", dtype=dtype))
    assert all("in CUDA graphs" in line for line in frozen.explain().splitlines())
    for samples in (12, 1, 7, 30):
        for _ in range(2):
            x = torch.randn(samples, 3, 13, 13, device="cuda", dtype=dtype)
            decisions = torch.randint(2, (samples,), device="cuda")
            with torch.no_grad():
                close(frozen(x, decisions), net(x, decisions))
    graphs = [part.run.graphs for part in frozen.network.nets]
    assert all(not found.failed and 1 <= len(found.graphs) <= 8 for found in graphs)


def test_decisions_come_back_as_they_were_given():
    _, num_blocks, x, frozen = freeze()
    decisions = torch.rand(len(x), num_blocks, device="cuda") < 0.5
    assert torch.equal(frozen(x, decisions, return_decisions=True)[1], decisions)


@pytest.mark.parametrize("executor", ["fused", "dense", EXECUTORS[-1]])
def test_profile_on_a_gpu(executor):
    model, num_blocks, x, frozen = freeze(executor=executor)
    decisions = torch.rand(len(x), num_blocks, device="cuda") < 0.5
    before = frozen(x, decisions)
    found = frozen.profile(x, decisions, rounds=3)
    assert found.executor == executor and found.moved is None
    names = [part.column for part in found.parts if part.kind == "block"]
    assert names == list(range(num_blocks))
    assert all(math.isfinite(part.measured) and part.measured >= 0 for part in found.parts)
    assert sum(part.measured for part in found.parts) > 0
    assert math.isclose(sum(found.losses.values()), found.measured - found.theoretical, rel_tol=1e-6, abs_tol=1e-9)
    assert torch.equal(frozen(x, decisions), before)


def test_profile_of_parts_on_a_gpu():
    net = choice().cuda().half()
    x = torch.randn(12, 3, 13, 13, device="cuda", dtype=torch.float16)
    decisions = torch.arange(12, device="cuda") % 2
    found = dynexec.freeze(net, x).profile(x, decisions, rounds=2)
    assert [(part.name, part.samples) for part in found.parts[:2]] == [("nets.0", 6), ("nets.1", 6)]
    assert all(math.isfinite(part.measured) for part in found.parts)


def test_ranges_are_shown_to_the_profilers_of_a_gpu():
    _, num_blocks, x, frozen = freeze()
    decisions = torch.ones(len(x), num_blocks, dtype=torch.bool, device="cuda")
    before = frozen(x, decisions)
    with torch.profiler.profile() as profiler:
        frozen.compute(x, decisions)
    names = {event.name for event in profiler.events()}
    assert {stage.name for segment in frozen.segments for found in segment.stages for stage in found.blocks} <= names
    with torch.autograd.profiler.emit_nvtx():
        assert torch.equal(frozen.compute(x, decisions)[0], before)
