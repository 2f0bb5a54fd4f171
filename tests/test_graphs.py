"""CUDA graphs of frozen networks; only a GPU can run them."""

import threading

import pytest
import torch
import toys
from torch import nn

import dynexec
from dynexec.executors.conditional import conditional_missing
from dynexec.nn.context import decide

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


EXECUTORS = ["fused"] + ["conditional", "bucketed"] * (conditional_missing() is None)


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
    assert len(frozen.graphs.graphs) == 1


def test_executors_have_graphs_of_their_own():
    model = toys.timm_style().cuda().half()
    num_blocks = dynexec.convert(model).num_blocks
    x = torch.randn(6, 3, 13, 13, device="cuda", dtype=torch.float16)
    frozen = dynexec.freeze(model, x)
    assert "no CUDA graph" not in frozen.explain()
    refused = [line.split()[0] for line in frozen.explain().splitlines() if " refused: " in line]
    assert set(refused) <= {"resident"} | {"conditional", "bucketed"} - set(EXECUTORS)
    if frozen.graphs is not None:
        assert {variant for variant, *_ in frozen.graphs.graphs} == {frozen.executor}
        for name in (*EXECUTORS, "dense", "fused"):
            frozen.use(name)
            decisions = torch.rand(len(x), num_blocks, device="cuda") < 0.5
            close(frozen(x, decisions), expected(model, x, decisions))
        assert {variant for variant, *_ in frozen.graphs.graphs} == {*EXECUTORS, "dense"}


def test_what_cannot_be_captured_runs_without_a_graph():
    model, num_blocks, x, frozen = freeze()
    compute = frozen.graphs.function

    def waits(x, decisions):
        decisions.any().item()
        return compute(x, decisions)

    frozen.graphs.function = waits
    for n in (5, 5, 6):
        decisions = torch.rand(n, num_blocks, device="cuda") < 0.5
        close(frozen(x[:n], decisions), expected(model, x[:n], decisions))
    assert [shape[0] for _, shape, _ in frozen.graphs.failed] == [5]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    close(frozen(x[:4], decisions[:4]), expected(model, x[:4], decisions[:4]))


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
