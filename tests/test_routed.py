"""Networks of parts: each part runs on its rows, frozen parts are compared, and nothing is frozen that would differ."""

import pickle
import re

import pytest
import torch
import toys
from torch import nn

import dynexec
from dynexec.executors import routed
from dynexec.executors.engine import engine_missing
from dynexec.executors.proof import relative_error
from dynexec.measure import count_call
from dynexec.nn import RoutedNetwork


def part(width, classes=5):
    layers = [nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(1), nn.Linear(width, classes))


class Choice(RoutedNetwork):
    """One of two parts per sample; ``reached`` are the decisions that freezing tries."""

    def __init__(self, first=None, reached=(0, 1)):
        super().__init__()
        self.nets, self.reached = nn.ModuleList([first or part(8), part(20)]), reached

    def part_names(self):
        return ["nets.0", "nets.1"]

    def example_decisions(self, inputs):
        return [torch.full((len(inputs),), choice) for choice in self.reached]

    def run_dense(self, inputs):
        return [net(inputs) for net in self.nets]

    def check_inputs(self, inputs):
        if not isinstance(inputs, torch.Tensor) or inputs.dim() != 4:
            raise ValueError("inputs must be images")

    def forward(self, inputs, decisions=None):
        self.check_inputs(inputs)
        output = inputs.new_zeros(len(inputs), 5)
        for number, net in enumerate(self.nets):
            rows = (decisions == number).nonzero().flatten()
            if len(rows):
                output[rows] = net(inputs[rows])
        return output


def choice(**options):
    return toys.finish(Choice(**options))


@pytest.mark.parametrize("executor", [None, "compact", *(() if engine_missing() else ("fused",))])
@pytest.mark.parametrize("samples", [1, 5])
def test_frozen_parts_give_the_same(samples, executor):
    net = choice()
    frozen = dynexec.freeze(net, toys.images(4), executor=executor)
    for size in (13, 21):
        x = toys.images(samples, size)
        for decisions in (torch.zeros(samples).long(), torch.ones(samples).long(), torch.arange(samples) % 2):
            with torch.no_grad():
                assert relative_error(frozen(x, decisions), net(x, decisions)) <= 1e-5
    runs = {"fused": "1 segment of .*", "compact": "by layer .executor is 'compact'."}
    runs[None] = rf"{runs['fused']}|by layer .*(measured\)|no native code.*)"  # whichever is faster here
    lines = [line.partition(": ") for line in frozen.explain().splitlines()]
    assert [name for name, _, _ in lines] == net.part_names()
    assert all(re.fullmatch(runs[executor], how) for _, _, how in lines), lines


def test_parts_are_called_with_one_tensor():
    class ByName(Choice):
        def forward(self, inputs, decisions=None):
            return self.nets[1](input=self.nets[0](inputs))

    with pytest.raises(ValueError, match="must call its part 'nets.1' with one tensor, by position"):
        dynexec.freeze(ByName(), toys.images(2))


def test_autocast_changes_nothing():
    net, x, decisions = choice(), toys.images(4), torch.arange(4) % 2
    expected = dynexec.freeze(net, x, executor="compact")(x, decisions)
    with torch.autocast("cpu", torch.bfloat16):
        frozen = dynexec.freeze(net, x, executor="compact")
        assert frozen(x, decisions).dtype == torch.float32
        assert relative_error(frozen(x, decisions), expected) <= 1e-6


def test_the_original_stays_as_it_was():
    net = choice().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    dynexec.freeze(net, toys.images(3))
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-6), (torch.bfloat16, 6e-2)])
def test_other_dtypes(dtype, most):
    net, x, decisions = choice(), toys.images(4), torch.tensor([0, 1, 1, 0])
    y = dynexec.freeze(net, x, dtype=dtype)(x, decisions)
    assert y.dtype == dtype and relative_error(y.float(), net(x, decisions).detach()) <= most


class Forgetful(nn.Module):
    """Gives something else in every call, as nothing that is frozen may."""

    num_calls = 0

    def __init__(self):
        super().__init__()
        self.body = part(4)

    def forward(self, x):
        Forgetful.num_calls += 1
        return self.body(x) + 0.3 * Forgetful.num_calls


def test_what_cannot_be_frozen():
    with pytest.raises(RuntimeError, match="no example decisions reach its part nets.1"):
        dynexec.freeze(choice(reached=(0,)), toys.images(2))
    with pytest.raises(RuntimeError, match="its output differs by"):
        dynexec.freeze(choice(first=Forgetful()), toys.images(2))
    with pytest.raises(ValueError, match="policy must be None"):
        dynexec.freeze(choice(), toys.images(2), policy=nn.Linear(1, 1))
    with pytest.raises(ValueError, match="inputs must be images"):
        dynexec.freeze(choice(), torch.rand(3))


def test_wrong_inputs_and_copies():
    frozen = dynexec.freeze(choice(), toys.images(2))
    for wrong, kind in ((toys.images(2).byte(), "uint8"), ([1.0], "list"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"inputs must be of floating-point tensors, got .*{kind}"):
            frozen(wrong, torch.zeros(2).long())
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        pickle.dumps(frozen)
    with pytest.raises(TypeError, match="model must be the original one, got a FrozenRouted"):
        dynexec.freeze(frozen, toys.images(2))


class Moody(Choice):
    """Does something else in training, outside of its parts."""

    def forward(self, inputs, decisions=None):
        return super().forward(inputs, decisions) * (2 if self.training else 1)


def test_frozen_networks_stay_in_evaluation_mode():
    """Also as a part of a module that is trained."""
    x = toys.images(2)
    around = nn.Sequential(dynexec.freeze(toys.finish(Moody()).eval(), x))
    decisions = torch.tensor([0, 1])
    expected = around[0](x, decisions)
    assert torch.equal(around.train()[0](x, decisions), expected) and not around[0].training


def test_flops_of_a_call():
    assert count_call(part(8), 2, 3, 16, 16) == 2 * 2 * (8 * 8 * 8 * 27 + 8 * 5)


def test_rows_are_filled_up_to_a_few_numbers_of_them(monkeypatch):
    """A graph has one shape: eight of them serve every number of rows up to the example's, and what is more."""
    shapes = []

    class AsItIs:  # no graph, which only a GPU has
        def __init__(self, function):
            self.function, self.failed = function, {}

        def __call__(self, x, decisions, variant):
            shapes.append(tuple(x.shape))
            return self.function(x, decisions)

    monkeypatch.setattr(routed, "Graphs", AsItIs)
    net = toys.finish(part(8))
    run = routed.InGraphs(net, 20)
    x = toys.images(50).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for rows in range(51):
            torch.testing.assert_close(run(x[:rows]), net(x[:rows]), rtol=1e-5, atol=1e-5)
    assert {shape[0] for shape in shapes if shape[0] <= 24} == {3, 6, 9, 12, 15, 18, 21, 24} and len(shapes) == 50
    assert routed.FrozenPart(net, "it is odd", run).explain() == "as it is, in CUDA graphs (it is odd)"
    run.graphs.failed["rows"] = "it waits"
    assert routed.FrozenPart(net, None, run).explain() == "as it is, without CUDA graphs: it waits"
