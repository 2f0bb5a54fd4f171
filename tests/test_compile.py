"""Converted models under torch.compile, torch.export and torch.jit.trace: fixed shapes, whichever mode was asked."""

import copy

import pytest
import torch
import toys
from torch import nn
from torch._dynamo.testing import CompileCounter
from toys import Policy, converted, decision_patterns, run

import dynexec
from dynexec.nn import DynamicNetwork


def small():
    """(converted model of a projection and an identity block, unconverted twin, L = 2)"""
    model = toys.finish(toys.Network(4, [[toys.BasicBlock(4, 8, 2), toys.InvertedResidual(8, 8)]], 8))
    twin = copy.deepcopy(model)
    return model, twin, dynexec.convert(model).num_blocks


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make, mode", [(small, "exact"), (small, "capacity"), (lambda: converted("timm"), "capacity")])
def test_compiled_model_inside_decide(make, mode):
    model, twin, num_blocks = make()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = toys.images(3)
    for _, decisions in decision_patterns(3, num_blocks):
        with torch.no_grad(), dynexec.decide(decisions, mode=mode):
            close(compiled(x), toys.naive_forward(twin, x, decisions))
    assert counter.frame_count == 1  # new decisions are new values, not a new program
    with torch.no_grad():
        close(compiled(x), twin(x))


@pytest.mark.parametrize("mode", ["capacity", "exact"])
def test_decide_inside_a_compiled_function(mode):
    model, twin, num_blocks = small()
    counter = CompileCounter()
    net = DynamicNetwork(model, Policy(num_blocks)).eval()
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    x = toys.images(3)
    with torch.no_grad():
        for _, decisions in decision_patterns(3, num_blocks):
            close(compiled(x, decisions, mode=mode), toys.naive_forward(twin, x, decisions))
        assert counter.frame_count == 1
        decided = net.policy(x) >= 0.5
        output, used = compiled(x, return_decisions=True, mode=mode)
    close(output, toys.naive_forward(twin, x, decided))
    assert torch.equal(used, decided)


def test_inductor():
    block = toys.finish(toys.InvertedResidual(4, 4))
    dynexec.convert(block)
    compiled = torch.compile(DynamicNetwork(block), fullgraph=True)
    x = torch.randn(3, 4, 5, 5)
    for keep in ([[False], [True], [True]], [[True], [False], [False]]):
        with torch.no_grad():
            close(compiled(x, torch.tensor(keep), mode="capacity"), run(block, x, torch.tensor(keep)))


def test_gradients_of_a_compiled_model():
    model, _, num_blocks = small()
    other = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, decisions = toys.images(4), torch.rand(4, num_blocks) < 0.5
    decisions[:, 1] = False
    for net in (compiled, other):
        with dynexec.decide(decisions, mode="capacity" if net is compiled else "exact"):
            net(x).square().sum().backward()
    for actual, expected in zip(model.parameters(), other.parameters(), strict=True):
        close(actual.grad, expected.grad)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(strict):
    model, twin, num_blocks = small()
    net = DynamicNetwork(model).eval()
    batch = torch.export.Dim("batch")
    shapes = {"images": {0: batch}, "decisions": {0: batch}, "mode": None}
    arguments = (toys.images(4), torch.rand(4, num_blocks) < 0.5)
    program = torch.export.export(net, arguments, {"mode": "capacity"}, dynamic_shapes=shapes, strict=strict)
    exported = program.module()
    for n in (4, 2, 7):
        x, decisions = toys.images(n), torch.rand(n, num_blocks) < 0.5
        with torch.no_grad():
            close(exported(x, decisions, mode="capacity"), toys.naive_forward(twin, x, decisions))


class WithDecisions(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, decisions):
        with dynexec.decide(decisions):
            return self.model(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_follows_other_decisions_than_it_saw():
    model, twin, num_blocks = small()
    x = toys.images(3)
    traced = torch.jit.trace(WithDecisions(model), (x, torch.zeros(3, num_blocks, dtype=torch.bool)), check_trace=False)
    for _, decisions in decision_patterns(3, num_blocks):
        with torch.no_grad():
            close(traced(x, decisions), toys.naive_forward(twin, x, decisions))


def test_kept_statistics_need_eager_exact_mode():
    model, _, num_blocks = small()
    dynexec.revert(model)
    dynexec.convert(model, batch_norm="kept")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x, decisions = toys.images(3), torch.rand(3, num_blocks) < 0.5
    with dynexec.decide(decisions):
        close(compiled(x), run(model, x, decisions))
    model.train()
    with pytest.raises(RuntimeError, match='batch_norm="kept" takes batch statistics over kept samples'):
        run(model, x, decisions, "capacity")
    with pytest.raises(RuntimeError, match='batch_norm="kept" takes batch statistics'), dynexec.decide(decisions):
        compiled(x)


def test_a_model_that_is_compiled_already():
    model, twin, num_blocks = small()
    dynexec.revert(model)
    compiled = torch.compile(model, backend="eager")
    x, decisions = toys.images(3), torch.rand(3, num_blocks) < 0.5
    with torch.no_grad():
        compiled(x)
        assert dynexec.convert(compiled).num_blocks == num_blocks
        with dynexec.decide(decisions):
            close(compiled(x), toys.naive_forward(twin, x, decisions))
        dynexec.revert(model)
        close(compiled(x), twin(x))
