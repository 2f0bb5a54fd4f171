"""Frozen networks as launches of the Triton kernels: on a GPU, or in the interpreter."""

import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
import toys
from kernel_cases import DEVICE
from torch import nn

import dynexec
from dynexec.executors import backends, launch_program, launches
from dynexec.executors.conditional import conditional_missing
from dynexec.executors.instructions import Value
from dynexec.executors.launch_program import LaunchProgram, _find_pairs
from dynexec.executors.launches import LaunchBuilder
from dynexec.executors.packing import PackedConv
from dynexec.executors.profile import record
from dynexec.executors.proof import relative_error
from dynexec.measure import count_flops
from dynexec.nn.context import decide
from dynexec.route import Route

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:invalid value:RuntimeWarning")


@pytest.fixture(autouse=True)
def no_tf32():
    """It would take tolerances that find nothing."""
    if DEVICE.type == "cpu":
        yield
        return
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch):
    module = sys.modules["dynexec.executors.freeze"]  # the package has the function by that name
    monkeypatch.setattr(module, "choose_backend", lambda device, _, invariant: backends.kernels(device, invariant))


# Conditional nodes need the native part on a GPU; in the interpreter the host chooses, and `conditional` is `fused`.
EXECUTORS = ["fused", "dense"] + ["switched"] * (DEVICE.type == "cpu")
if conditional_missing() is None:
    EXECUTORS += ["conditional", "switched"]
needs_nodes = pytest.mark.skipif("switched" not in EXECUTORS, reason=f"no conditional nodes: {conditional_missing()}")


class Odd(nn.Module):
    """Zeros on two sides only, further channels, ceiling mode, dilation, an activation on its own, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 12, 3, 2), nn.SiLU())
        self.pool = nn.MaxPool2d(3, 2, padding=1, ceil_mode=True)
        self.blocks = nn.Sequential(
            toys.BasicBlock(12, 12), toys.InvertedResidual(12, 12), toys.Bottleneck(12, 20, 2, True)
        )
        self.last = nn.Conv2d(20, 18, 3, padding=2, dilation=2)
        self.head = nn.Linear(18, 7)

    def forward(self, x):
        x = torch.sigmoid(self.last(self.blocks(self.pool(self.stem(x)))))
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


def odd():
    return toys.finish(Odd())


def two():
    """Few launches, for what does not depend on their kinds: the interpreter is slow."""
    stages = [[toys.Bottleneck(8, 16), toys.Bottleneck(16, 16)]]
    return toys.finish(toys.Network(8, stages, 16))


MODELS = {"odd": odd, "timm": toys.timm_style, "two": two}


def frozen_pair(name, dtype=torch.float32, size=9, executor="fused", fine_tune=None, **options):
    model = MODELS[name]().to(DEVICE, dtype)
    num_blocks = dynexec.convert(model, fine_tune=fine_tune).num_blocks
    x = torch.randn(4, 3, size, size).to(DEVICE, dtype)
    return model, num_blocks, x, dynexec.freeze(model, x, executor=executor, **options)


def expected(model, x, decisions):
    with torch.no_grad(), decide(decisions):
        return model(x.clone())


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["odd", "timm"])
def test_output_is_the_models(name, dtype, executor):
    model, num_blocks, x, frozen = frozen_pair(name, dtype, executor=executor)
    assert "Triton kernels" in frozen.explain() and f"-> {executor}" in frozen.explain()
    before = x.clone()
    for keep in (0.0, 0.5, 1.0):
        decisions = torch.rand(len(x), num_blocks, device=DEVICE) < keep
        error = relative_error(frozen(x, decisions), expected(model, x, decisions))
        assert error <= (2e-5 if dtype == torch.float32 and DEVICE.type == "cpu" else 1e-2)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name, fine_tune", [("odd", None), ("timm", None), ("two", None), ("timm", "nothing")])
def test_dense_copies_back_what_the_library_should_have_left(name, fine_tune, dtype, monkeypatch):
    """Behind a gate for samples that drop the block too: with two sets of weights there is one of each."""
    from dynexec.kernels import pointwise

    monkeypatch.setattr(launch_program, "_DEEP", 1)
    monkeypatch.setattr(launch_program, "_LONG", 1)
    copied, combine = [], pointwise.combine

    def take_down(x, out, **more):
        if "index" in more and "add" not in more and "multiply" not in more:
            copied.append(int(more["offset"][1] - more["offset"][0]))
        return combine(x, out, **more)

    monkeypatch.setattr(pointwise, "combine", take_down)
    model, num_blocks, x, frozen = frozen_pair(name, dtype, executor="dense", fine_tune=fine_tune)
    for keep in (0.0, 0.5, 1.0):
        decisions = torch.rand(len(x), num_blocks, device=DEVICE) < keep
        copied.clear()
        error = relative_error(frozen.run(x, decisions), expected(model, x, decisions))
        assert error <= (2e-5 if dtype == torch.float32 and DEVICE.type == "cpu" else 1e-2)
        kept = decisions.sum(0).tolist()
        assert copied and set(copied) <= {len(x) - count for count in kept} | ({*kept} if fine_tune else set())


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a node chooses, and nobody sees which")
def test_switched_is_dense_where_enough_is_kept(monkeypatch):
    model, num_blocks, x, frozen = frozen_pair("two", executor="switched")
    launch, ran = LaunchProgram._launch, []

    def take_down(program, x, route, name):
        ran.append(name)
        return launch(program, x, route, name)

    monkeypatch.setattr(LaunchProgram, "_launch", take_down)
    pairs = len(x) * num_blocks
    for share in (1.0, 0.6875, 0.1):
        frozen.switch_at = share
        frozen.use("switched")
        for kept in (0, 1, pairs // 2, round(0.6875 * pairs), round(0.6875 * pairs) - 1, pairs - 1, pairs):
            decisions = (torch.randperm(pairs, device=DEVICE) < kept).reshape(len(x), num_blocks)
            y = frozen.run(x, decisions)
            executor = "dense" if kept >= share * pairs else "fused"
            assert frozen.executor_for(decisions) == executor
            assert ran.pop() == ("static" if kept == pairs else executor) and not ran
            torch.testing.assert_close(y, expected(model, x, decisions), rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a stand-in for nodes")
@pytest.mark.parametrize("executor, plain", [("switched", False), ("conditional", True), ("fused", False)])
def test_launches_depend_on_each_other_but_beside_nodes(executor, plain, monkeypatch):
    """A body of a switch is a chain of kernels; a block behind a node begins with a kernel and ends with one."""
    from dynexec.kernels import device

    nodes = SimpleNamespace(
        switch=lambda offset, size, functions: [function() for function in functions],
        if_any=lambda offset: nullcontext(),
    )
    with_nodes = launches._WITH_NODES
    monkeypatch.setattr(
        launches.LaunchPrograms, "take_conditional", lambda self, x, executor: nodes if executor in with_nodes else None
    )
    launch, seen = LaunchProgram._launch, []

    def take_down(*arguments):
        seen.append(device._plain.get())
        return launch(*arguments)

    monkeypatch.setattr(LaunchProgram, "_launch", take_down)
    _, num_blocks, x, frozen = frozen_pair("two", executor="fused")
    seen.clear()
    route = Route.from_decisions(torch.rand(len(x), num_blocks) < 0.5, exact=False)
    for segment in frozen.segments:
        for program in segment.programs.values():
            program(x, route, executor=executor)
    assert seen == [plain] * (3 if executor == "switched" else 1)
    seen.clear()
    with device.plain_launches():
        program(x, route, executor=executor)
    assert set(seen) == {True}


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a node chooses, and nobody sees which")
def test_where_nothing_is_dropped_the_library_runs_the_blocks(monkeypatch):
    from dynexec.kernels import conv as module

    _, num_blocks, x, frozen = frozen_pair("two", executor="switched")
    ours, conv = [], module.conv
    monkeypatch.setattr(module, "conv", lambda *given, **more: ours.append(more) or conv(*given, **more))
    decisions = torch.ones(len(x), num_blocks, dtype=torch.bool, device=DEVICE)
    frozen.run(x, decisions)
    assert all(more["residual"] is None and "index" not in more for more in ours)
    decisions[0, 0] = False
    frozen.run(x, decisions)
    assert any(more["residual"] is not None and "index" in more for more in ours)


def test_threads_that_use_another_executor_wait_for_each_other():
    _, _, _, frozen = frozen_pair("two", executor="switched")
    inside, seen = threading.Barrier(2), []

    def use(name):
        inside.wait()
        for _ in range(20):
            with frozen.using(name):
                seen.append((frozen.executor, frozen.segments[0].executor) == (name, name))
                time.sleep(1e-4)

    threads = [threading.Thread(target=use, args=(name,)) for name in ("fused", "dense")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(seen) and len(seen) == 40
    assert frozen.executor == "switched" and frozen.segments[0].options["switch_at"] == frozen.switch_at


@pytest.mark.parametrize("executor", [name for name in EXECUTORS if name in ("fused", "switched")])
def test_other_sizes_batches_and_layouts(executor):
    model, num_blocks, _, frozen = frozen_pair("odd", size=13, executor=executor)
    for n, size in ((1, 13), (3, 17), (0, 13)):
        x = torch.randn(n, 3, size, size, device=DEVICE)
        decisions = torch.rand(n, num_blocks, device=DEVICE) < 0.5
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            torch.testing.assert_close(frozen(given, decisions), expected(model, x, decisions), rtol=1e-3, atol=1e-4)


def test_a_sample_alone_gives_the_same_bits(monkeypatch):
    """With batch_invariant, whether others keep the blocks too or not; without, rounding depends on it."""
    from dynexec.kernels import conv

    monkeypatch.setattr(conv, "TERMS", 16)  # these sums are short
    monkeypatch.setattr(conv, "multiprocessors", lambda device: 16)
    for invariant in (True, False) if DEVICE.type == "cpu" else (True,):  # there tiles share no sum of so few terms
        _, num_blocks, x, frozen = frozen_pair("odd", size=25, batch_invariant=invariant)
        everything = torch.ones(len(x), num_blocks, dtype=torch.bool, device=DEVICE)
        alone = everything.clone()
        alone[[0, 2, 3]] = False
        same = torch.equal(frozen(x, everything)[1], frozen(x, alone)[1])
        assert same == invariant


def test_policy_and_race():
    model, num_blocks, x, _ = frozen_pair("odd")
    pooled = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_blocks))
    policy = toys.finish(nn.Sequential(pooled, nn.Sigmoid())).to(DEVICE)
    frozen = dynexec.freeze(model, x, policy=policy)
    assert "(measured)" in frozen.explain()
    y, decisions = frozen(x, return_decisions=True)
    assert torch.equal(decisions, policy(x) >= 0.5)
    torch.testing.assert_close(y, expected(model, x, decisions), rtol=1e-3, atol=1e-4)


def test_a_shortage_of_memory_is_not_what_the_library_lacks(monkeypatch):
    """cuDNN's fused convolutions are given up for good only where there are none."""
    _, num_blocks, x, frozen = frozen_pair("two", executor="dense")
    (program,) = frozen.segments[0].programs.values()
    step = next(step for step in program.instructions if step.op == "conv" and step.activation == "relu")
    for error, given_up in ((torch.OutOfMemoryError("none left"), False), (RuntimeError("not supported"), True)):

        def fail(step, x, other, weights, fused, error=error):
            if fused:
                raise error
            return "plain"

        monkeypatch.setattr(launch_program, "_run_by_library", fail)
        image = type("Image", (), {"device": torch.device("cuda"), "__len__": lambda self: 1})()
        if given_up:
            assert program._run_by_library(step, image, None) == "plain"
        else:
            with pytest.raises(torch.OutOfMemoryError):
                program._run_by_library(step, image, None)
        assert (step in program._unfused) == given_up


def test_a_graph_is_of_the_executor_that_it_runs(monkeypatch):
    """Another thread may use another executor until the lock is free; an empty batch takes it, too."""
    _, num_blocks, x, frozen = frozen_pair("two", executor="fused")
    seen = []

    class Stub:
        @property
        @contextmanager
        def lock(self):
            frozen.use("dense")  # by who had it before
            seen.append("locked")
            yield

        def __call__(self, x, decisions, variant):
            seen.append(variant)
            return x, decisions

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    frozen.graphs = Stub()
    decisions = torch.ones(len(x), num_blocks, dtype=torch.bool, device=x.device)
    frozen(x, decisions)
    assert seen == ["locked", "dense"]
    assert frozen(x[:0], decisions[:0]).shape[0] == 0 and seen == ["locked", "dense", "locked"]


def test_what_has_no_graph_or_another_one_is_told():
    """Also of images that come after freezing."""
    _, _, x, frozen = frozen_pair("two", executor="fused")
    frozen.graphs = SimpleNamespace(failed={}, replaced={})
    assert "CUDA graph for" not in frozen.explain()
    frozen.graphs.failed["switched", (4, 3, 9, 9), False] = "it waits"
    frozen.graphs.replaced["fused", (5, 3, 9, 9), True] = "no such edge"
    for _ in range(2):
        lines = frozen.explain().splitlines()
        assert lines.count("no CUDA graph for switched, (4, 3, 9, 9), decisions given: it waits") == 1
        assert lines.count("another CUDA graph for fused, (5, 3, 9, 9), decisions by the policy: no such edge") == 1


def test_without_triton_layers_run(monkeypatch):
    monkeypatch.setattr(backends.dispatch, "triton_missing", lambda: "triton is not installed")
    model = toys.timm_style().to(DEVICE)
    dynexec.convert(model)
    x = torch.randn(4, 3, 13, 13, device=DEVICE)
    assert "Triton kernels not used: triton is not installed" in dynexec.freeze(model, x).explain()


def conv(c, k, kernel, **options):
    padding = (kernel // 2,) * 2
    weight = torch.randn(k, c // options.get("groups", 1), kernel, kernel)
    return PackedConv(
        "conv", weight, torch.randn(k), (1, 1), padding, (1, 1), options.get("groups", 1), "relu", False, (1, c, 8, 8)
    )


def test_pairs():
    """A 3x3 and the 1x1 behind it become one kernel, inside of a gate and where nobody else reads what is between."""

    def pairs(gated=True, read_again=False, middle=16, kernel=3, last=1):
        builder = LaunchBuilder(1)
        x = builder.add(builder.load(16, 8, 8))
        gate = builder.gate(0)
        before = builder.conv(conv(16, 16, 1), x)
        between = builder.conv(conv(16, middle, kernel), before)
        if not gated:
            builder.end_gate(gate)
        y = builder.conv(conv(middle, 16, last), between, x, out=x)
        if read_again:
            builder.add(between)
        if gated:
            builder.end_gate(gate)
        assert isinstance(y, Value)
        builder.store(x)
        return _find_pairs(builder.instructions)

    assert pairs() == {4}
    assert not pairs(gated=False)
    assert not pairs(read_again=True)
    assert not pairs(middle=256)
    assert not pairs(kernel=1)
    assert not pairs(last=3)


def test_profile_times_the_launches_of_every_block():
    model, _, blocks = toys.converted()
    model, x = model.to(DEVICE), toys.images(2, 5).to(DEVICE)
    decisions = torch.tensor([[True] * blocks, [False] * blocks]).to(DEVICE)
    frozen = dynexec.freeze(model, x, executor="fused")
    found = frozen.profile(x, decisions, rounds=1)
    assert found.flops == count_flops(model, x).of(decisions.cpu()).sum()
    assert sum(found.losses.values()) == pytest.approx(found.measured - found.theoretical)
    kept = [(part.samples, part.measured > 0) for part in found.parts if part.kind == "block"]
    assert kept == [(1, True)] * blocks
    assert {span.samples for span in found.spans if span.kind == "block"} == {1}
    most = 0 if DEVICE.type == "cpu" else 1e-3  # the library may choose other algorithms in a graph
    torch.testing.assert_close(
        record(frozen, x, decisions, frozen.executor)[0], frozen(x, decisions), rtol=most, atol=most
    )
