"""Which ways to run frozen networks and functions on the kernels are tried, compared and chosen, and by which times."""

import re
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import toys
from kernel_cases import DEVICE
from test_launches import EXECUTORS, expected, frozen_pair, needs_nodes, no_tf32, on_kernels, pytestmark, two  # noqa: F401
from torch import nn

import dynexec
from dynexec.executors import backends, candidate, function
from dynexec.executors.costs import CostCache


@needs_nodes
def test_a_kernel_that_fails_is_not_used(monkeypatch):
    from dynexec.kernels import conv

    def fail(*args, **kwargs):
        raise RuntimeError("out of shared memory")

    def fail_inside_of_blocks(*args, run=conv.conv, **kwargs):
        return fail() if kwargs.get("index") is not None and kwargs["residual"] is None else run(*args, **kwargs)

    monkeypatch.setattr(conv, "conv", fail_inside_of_blocks)
    model = two().to(DEVICE)
    num_blocks = dynexec.convert(model).num_blocks
    x = torch.randn(4, 3, 13, 13, device=DEVICE)
    frozen = dynexec.freeze(model, x)
    assert "fused refused: RuntimeError: out of shared memory" in frozen.explain()
    assert "dense refused" not in frozen.explain() and "dense not tried" not in frozen.explain()
    decisions = torch.rand(len(x), num_blocks, device=DEVICE) < 0.5
    torch.testing.assert_close(frozen(x, decisions), expected(model, x, decisions), rtol=1e-3, atol=1e-4)
    with pytest.raises(RuntimeError, match="executor 'fused' cannot run this network: RuntimeError: out of"):
        dynexec.freeze(model, x, executor="fused")
    monkeypatch.setattr(conv, "conv", fail)
    text = dynexec.freeze(model, x).explain()
    assert "Triton kernels not used: " in text
    assert all(f"{name}: RuntimeError: out of shared memory" in text for name in EXECUTORS if name != "switched")


@needs_nodes
def test_what_is_expected_to_be_slow_is_not_tried(monkeypatch):
    from dynexec.kernels import conv

    # Seconds for both of the race's decisions together.
    expected = {"resident": 0.0, "fused": 1.0, "conditional": 9.0, "dense": 2.2, "switched": 1.0}

    def like(device, *_):
        return replace(backends.kernels(device, False), expected=lambda *what: expected[what[-1]] / 2)

    module = sys.modules["dynexec.executors.freeze"]
    monkeypatch.setattr(module, "choose_backend", like)
    model = toys.finish(nn.Sequential(toys.BasicBlock(4, 4))).to(DEVICE)
    dynexec.convert(model)
    x = torch.randn(2, 4, 5, 5, device=DEVICE)
    assert "conditional" not in dynexec.freeze(model, x.repeat(3, 1, 1, 1)).explain()  # more than four samples
    text = dynexec.freeze(model, x).explain()
    assert "conditional not tried" in text if DEVICE.type == "cuda" else "conditional" not in text
    assert "dense not tried: 2200.00 ms expected, fused 1000.00 ms" in text and "switched" not in text
    expected["dense"] = 1.9
    text = dynexec.freeze(model, x).explain()
    assert re.search(r"fused [\d.]+ ms \(1000.00 expected\), dense [\d.]+ ms \(1900.00 expected\)", text)
    assert "-> dense" in dynexec.freeze(model, x, executor="dense").explain()

    def fail(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr(conv, "conv", fail)
    assert all(f"{name}: RuntimeError: no" in dynexec.freeze(model, x).explain() for name in ("fused", "dense"))


@pytest.mark.parametrize(
    "dense, fused, share",
    [([3] * 8, range(1, 9), 0.4375), ([9] * 8, range(1, 9), 1.0), ([0] * 8, range(1, 9), 0.0),
     ([5, 5, 5, 0, 5, 5, 5, 5], range(1, 9), 0.6875)],
)  # fmt: skip
def test_where_dense_becomes_the_faster_one(dense, fused, share, monkeypatch, tmp_path):
    """Measured at eighths; from the share on it must be faster at all."""
    model, num_blocks, x, frozen = frozen_pair("two", executor="switched")
    frozen.graphs = type("Graphs", (), {"lock": threading.RLock()})()
    times = iter([*dense, *fused])
    monkeypatch.setattr(candidate, "conditional_missing", lambda: None)
    monkeypatch.setattr(candidate, "seconds", lambda call, device: float(next(times)))
    cache = CostCache(tmp_path / "costs.json")
    assert candidate._measure_switch(frozen, x, cache) == share
    assert candidate._measure_switch(frozen, x, cache) == share and next(times, None) is None
    frozen.graphs = None
    assert candidate._measure_switch(frozen, x, cache) == 1.0


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a stand-in for graphs")
@pytest.mark.parametrize("executor", ["switched", None])
def test_a_share_that_is_not_in_the_file_is_an_error(executor, monkeypatch, tmp_path):
    """What goes wrong while it is measured, also by a ValueError, is a reason not to switch."""

    class WithGraphs(candidate.FrozenNetwork):
        def __init__(self, *given):
            super().__init__(*given)
            self.graphs = SimpleNamespace(lock=nullcontext(), keep_only=lambda variant: None, failed={}, replaced={})

        def call(self, x, decisions):
            return self.run(x, decisions), decisions

    def fail(call, device):
        raise ValueError("no kernel")

    model = toys.finish(nn.Sequential(toys.BasicBlock(4, 4)))
    dynexec.convert(model)
    x, path = torch.randn(2, 4, 5, 5), tmp_path / "costs.json"
    dynexec.freeze(model, x, cost_cache=path)  # without graphs, and so without a switch
    monkeypatch.setattr(candidate, "FrozenNetwork", WithGraphs)
    monkeypatch.setattr(candidate, "conditional_missing", lambda: None)
    with pytest.raises(ValueError, match="holds no times for .*switch.*measure=True first"):
        dynexec.freeze(model, x, executor=executor, cost_cache=path, measure=False)
    monkeypatch.setattr(candidate, "seconds", fail)
    if executor is None:
        monkeypatch.setattr(sys.modules["dynexec.executors.freeze"], "race", lambda *_: {"fused": 1.0, "layers": 2.0})
        assert "switched refused: ValueError: no kernel" in dynexec.freeze(model, x, cost_cache=path).explain()
    else:
        with pytest.raises(RuntimeError, match="'switched' cannot run this network: ValueError: no kernel"):
            dynexec.freeze(model, x, executor=executor, cost_cache=path)


def test_times_of_a_function_hold_for_one_dtype_and_version(monkeypatch, tmp_path):
    monkeypatch.setattr(function, "seconds", lambda run, device: 1.0)
    cache, backend = CostCache(tmp_path / "costs.json"), backends.kernels(DEVICE, False)
    for dtype, version in ((torch.float32, "old"), (torch.float16, "old"), (torch.float32, "new")):
        net = toys.finish(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())).to(DEVICE, dtype).requires_grad_(False)
        of_version = replace(backend, version=(version,))
        x = torch.randn(2, 3, 5, 5).to(DEVICE, dtype)
        _, note = function.freeze_function(net, x, None, of_version, cache, in_graph=False)
        assert note is None
    assert len(cache.entries) == 3
    assert all(entry.keys() == {"Triton kernels", "layers"} for entry in cache.entries.values())


def test_a_switch_needs_graphs_and_bodies_that_run(monkeypatch):
    """That ``dense`` is not worth trying is no reason against it: where nothing is dropped the static network runs."""
    fast = SimpleNamespace(graphs=object())
    monkeypatch.setattr(candidate, "conditional_missing", lambda: None)
    assert candidate._can_switch(fast, ["fused", "dense"], {})
    assert candidate._can_switch(fast, ["fused"], {})
    assert not candidate._can_switch(fast, ["fused"], {"dense": "it differs"})
    assert not candidate._can_switch(fast, ["dense"], {})
    assert not candidate._can_switch(SimpleNamespace(graphs=None), ["fused", "dense"], {})
    monkeypatch.setattr(candidate, "conditional_missing", lambda: "built without CUDA")
    assert not candidate._can_switch(fast, ["fused", "dense"], {})
