"""AdaMML's policy, the loss that trains it, and the checkpoints that the authors published."""

import copy

import pytest
import torch
import torch.nn.functional as F
from adamml_cases import (
    CASES,
    error,
    inputs_for,
    make,
    network_shapes,
    official_shapes,
    official_state,
    policy_logits,
)
from official_keys import holds, prefixed, snapshot, without_counters
from torch import nn

from dynexec.models import load_official
from dynexec.models.adamml import AdaMML
from dynexec.policy.gumbel import gumbel_softmax
from dynexec.policy.modalities import modality_cost, modality_loss


@pytest.fixture(scope="module")
def net():
    return make()


@pytest.mark.parametrize("case", CASES)
def test_logits(case):
    net = make(case)
    inputs = inputs_for(net, samples=2)
    with torch.no_grad():
        logits = net.policy(inputs)
        assert logits.shape == (2, 3, len(net.modalities), 2)
        assert error(logits, policy_logits(net.policy, inputs)) < 1e-5
        first = {name: value[:1, :1] for name, value in inputs.items()}
        assert error(net.policy(first), logits[:1, :1]) < 1e-5


def test_gradients_go_through_the_logits_of_earlier_segments(net):
    net = copy.deepcopy(net).double()  # rounding may take a ReLU to its other side
    inputs = {name: value.double() for name, value in inputs_for(net, 2).items()}
    weights = torch.randn(2, 2, 2)
    parameters = [net.policy.lstm.weight_ih, net.policy.fcs[1].weight, net.policy.joint_net.nets[0].conv[0].weight]
    grads = [
        torch.autograd.grad((logits(inputs)[:, -1] * weights).sum(), parameters)
        for logits in (net.policy, lambda inputs: policy_logits(net.policy, inputs))
    ]
    for actual, expected in zip(*grads):
        assert error(actual, expected) < 1e-8


def set_logits(policy, values):
    """Make every segment's logits of every modality these two."""
    for fc in policy.fcs:
        nn.init.zeros_(fc.weight)
        fc.bias.data = torch.tensor(values)


def test_a_modality_runs_where_the_second_logit_is_the_larger():
    net = make("sound alone")
    inputs = inputs_for(net, samples=2, segments=2)
    for values, runs in (([0.0, 1.0], True), ([1.0, 0.0], False), ([0.5, 0.5], False)):
        set_logits(net.policy, values)
        assert bool((net.policy.decide(inputs) == runs).all())
        assert net(inputs).any() == runs
    set_logits(net.policy, [0.0, float("nan")])
    with pytest.raises(ValueError, match="logits .* hold NaN"):
        net(inputs)


def test_sampling():
    net = make("sound alone")
    inputs = inputs_for(net, samples=40, segments=5, size=(9, 7))
    set_logits(net.policy, [0.0, 1.0])
    first, second = (net.policy.sample(inputs, generator=torch.Generator().manual_seed(s)) for s in (3, 3))
    assert first.dtype == torch.bool and first.shape == (40, 5, 1) and torch.equal(first, second)
    assert first.float().mean().item() == pytest.approx(torch.tensor(1.0).sigmoid().item(), abs=0.1)
    assert not torch.equal(net.policy.sample(inputs), first)
    assert torch.equal(net.policy(inputs)[..., 1], torch.ones(40, 5, 1))  # whatever was drawn


def test_the_policy_says_what_it_needs(net):
    inputs = inputs_for(net)
    more = inputs | {"flow": None}
    assert torch.equal(net.policy(more), net.policy(inputs))
    with pytest.raises(ValueError, match="inputs must hold rgb, sound; got rgb: no sound"):
        net.policy({"rgb": inputs["rgb"]})
    with pytest.raises(ValueError, match=r"inputs\['sound'\] must have shape"):
        net.policy(inputs | {"sound": inputs["sound"][0]})


def published_cost(selection, costs, logits, labels, penalty):
    """Video by video."""
    total = 0.0
    for chosen, scores, label in zip(selection, logits, labels):
        right = float(scores.argmax() == label)
        for cost, usage in zip(costs, chosen.mean(0)):
            total = total + cost * right * usage**2
        total = total + (1 - right) * penalty
    return total / len(selection)


def test_loss():
    logits, labels = torch.randn(8, 3, requires_grad=True), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    labels[:3] = logits[:3].argmax(1)
    policy = torch.randn(8, 5, 2, 2, requires_grad=True)
    weights = gumbel_softmax(policy, 5.0, hard=True)[..., 1]
    cross_entropy = F.cross_entropy(logits, labels)
    assert torch.equal(modality_loss(logits, labels), cross_entropy)
    costs = [1.0, 0.05]
    expected = published_cost(weights, costs, logits, labels, 10.0)
    correct = logits.argmax(1) == labels
    assert 0 < correct.sum() < 8
    torch.testing.assert_close(modality_cost(weights, correct, costs), expected)
    loss = modality_loss(logits, labels, weights, costs)
    torch.testing.assert_close(loss, cross_entropy + expected)
    (actual,) = torch.autograd.grad(loss, policy, retain_graph=True)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, policy)[0])
    other = modality_loss(logits, labels, weights, torch.tensor(costs), penalty=2.0)
    torch.testing.assert_close(other, loss - 8.0 * (~correct).float().mean())


def test_loss_errors():
    weights, correct = torch.rand(4, 3, 2), torch.ones(4, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"decisions must be a float tensor \[N, S, M\].*got torch.bool \(4, 3, 2\)"):
        modality_cost(weights > 0.5, correct, [1.0, 1.0])
    with pytest.raises(TypeError, match="got list"):
        modality_cost([1.0], correct, [1.0, 1.0])
    with pytest.raises(TypeError, match=r"got torch.float32 \(4, 3\)"):
        modality_cost(weights[..., 0], correct, [1.0, 1.0])
    with pytest.raises(TypeError, match=r"correct must be a bool tensor \[4\], got list"):
        modality_cost(weights, [True] * 4, (1.0, 0.05))
    with pytest.raises(ValueError, match=r"correct must be bool \[4\].*got torch.float32 \(4,\)"):
        modality_cost(weights, correct.float(), [1.0, 1.0])
    with pytest.raises(ValueError, match="costs must be 2 numbers, one per modality, got 3"):
        modality_cost(weights, correct, [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="given together.*got only decisions"):
        modality_loss(torch.rand(4, 3), torch.zeros(4, dtype=torch.long), weights)


def test_a_training_step_of_the_policy():
    """The published alternation: the policy's parameters get gradients through hard weights; the rest is frozen."""
    net = make("rgb and sound", num_frames=1).train()
    net.main_net.requires_grad_(False)
    inputs = inputs_for(net, samples=2, segments=2)
    weights = gumbel_softmax(net.policy(inputs), 5.0, hard=True)[..., 1]
    logits = net(inputs, soft_decisions=weights)
    modality_loss(logits, logits.detach().argmax(1), weights, [1.0, 0.05]).backward()
    for name, value in net.policy.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all(), name
    assert net.policy.joint_net.nets[0].features[0][0].weight.grad.any()


def own_names(state):
    """Official names to ours."""
    return {name.replace("policy_net.", "policy."): value for name, value in state.items()}


def same(net, before):
    return all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


ENTRIES = {"epoch": 20, "arch": "adamml", "best_top1": 88.2, "temperature": 2.4, "stage": "finetune", "optimizer": {}}


@pytest.fixture(scope="module")
def large():
    return AdaMML().eval()


@pytest.fixture(scope="module")
def three():
    return AdaMML(("rgb", "sound", "flow")).eval()


@pytest.fixture
def state():
    return official_state(official_shapes(("rgb", "sound")))


@pytest.mark.parametrize("change", [lambda state: state, prefixed, without_counters])
def test_trained_network(large, state, change):
    report = load_official(large, {"state_dict": change(state)} | ENTRIES)
    assert (report.loaded, report.absent, report.dropped) == (("policy", "main networks"), (), ())
    assert report.info == ENTRIES
    assert holds(large, own_names(without_counters(state)))
    assert load_official(large, change(state)).info == {}


def test_from_a_file(large, state, tmp_path):
    torch.save({"state_dict": prefixed(state), "epoch": 20}, tmp_path / "model_best.pth.tar")
    assert load_official(large, tmp_path / "model_best.pth.tar").info == {"epoch": 20}
    assert holds(large, own_names(state))


@pytest.mark.parametrize(
    ("prefix", "part", "absent"), [("policy", "policy", "main networks"), ("main", "main networks", "policy")]
)
def test_one_half(large, state, prefix, part, absent):
    before = snapshot(large)
    half = {name: value for name, value in state.items() if name.startswith(prefix)}
    report = load_official(large, {"state_dict": half})
    assert (report.loaded, report.absent) == ((part,), (absent,))
    assert holds(large, own_names(half))
    own = large.state_dict()
    assert all(torch.equal(own[name], value) for name, value in before.items() if not name.startswith(prefix))


@pytest.mark.parametrize(
    ("section", "channels", "name", "column"),
    [("residual network", 3, "rgb", 0), ("sound network", 1, "sound", 1), ("residual network", 10, "flow", 2)],
)
def test_network_of_one_modality(three, section, channels, name, column):
    net = three
    before = snapshot(net)
    state = official_state(network_shapes(section, channels))
    report = load_official(net, {"state_dict": prefixed(state), "epoch": 60})
    others = tuple(other for other in net.modalities if other != name)
    assert (report.loaded, report.absent, report.info) == ((name,), ("policy", *others), {"epoch": 60})
    own = net.state_dict()
    changed = {f"main_net.nets.{column}.{key}" for key in state}
    assert all(torch.equal(own[f"main_net.nets.{column}.{key}"], value) for key, value in state.items())
    assert all(torch.equal(own[key], value) for key, value in before.items() if key not in changed)


def test_a_policy_whose_networks_stand_in_another_order():
    """Of a run that named rgb, flow, sound and rgbdiff: its policy looks at rgb, sound, rgbdiff."""
    source = make("three", num_frames=1)  # rgb, sound, flow
    net = AdaMML(("rgb", "flow", "sound"), 5, num_frames=1, depth=18, policy_size=33).eval()
    state = {
        name.replace("policy.", "policy_net."): value
        for name, value in source.state_dict().items()
        if name.startswith("policy.")
    }
    load_official(net, {"state_dict": prefixed(state)})
    inputs = inputs_for(source)
    assert error(net.policy(inputs), source.policy(inputs)) < 1e-5


def test_misfits_are_listed_together_and_nothing_is_loaded(large, state):
    before = snapshot(large)
    del state["policy_net.lstm.bias_hh"]
    state["policy_net.fcs.2.bias"] = torch.rand(2)
    state["policy_net.joint_net.nets.1.features.0.0.weight"] = torch.rand(32, 15, 3, 3)
    state["main_net.lf_weights"] = torch.rand(2)
    state["main_net.nets.0.fc.bias"] = [0.0]
    with pytest.raises(ValueError) as raised:
        load_official(large, {"state_dict": prefixed(state)})
    assert str(raised.value).splitlines() == [
        "source does not fit this network, which is left as it was:",
        "  policy, missing: lstm.bias_hh",
        "  policy, unexpected: fcs.2.bias",
        "  policy, of another shape: joint_net.nets.1.features.0.0.weight (32, 15, 3, 3) instead of (32, 1, 3, 3)",
        "  main networks, of another shape: lf_weights (2,) instead of (1,), nets.0.fc.bias is a list",
    ]
    assert same(large, before)


@pytest.mark.parametrize(
    "name", ["policy_net.joint_net.joint.0.weight", "policy_net.joint_net.nets.0.features.0.0.weight"]
)
@pytest.mark.parametrize("value", [None, [1.0], torch.rand(()), torch.rand(2, 3)])
def test_a_damaged_policy_is_listed(large, state, name, value):
    before = snapshot(large)
    state[name] = value
    if value is None:
        del state[name]
    with pytest.raises(ValueError, match=f"policy, .*: {name.removeprefix('policy_net.')}"):
        load_official(large, {"state_dict": state})
    assert same(large, before)


def test_modalities_that_are_not_the_networks(large):
    before = snapshot(large)
    with pytest.raises(ValueError, match="policy, unexpected: joint_net.nets.2.features.0.0.weight"):
        load_official(large, official_state(official_shapes(("rgb", "sound", "flow"))))
    flow = official_state(network_shapes("residual network", 10))
    with pytest.raises(ValueError, match="whose conv1.weight takes 10 channels, as none of this .* does: rgb, sound"):
        load_official(large, {"state_dict": flow})
    rgb = official_state(network_shapes("residual network", 3)) | {"fc.weight": torch.rand(1000, 2048)}
    with pytest.raises(ValueError, match=r"rgb, of another shape: fc.weight \(1000, 2048\) instead of \(31, 2048\)"):
        load_official(large, {"state_dict": rgb})
    assert same(large, before)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "source has the entries : expected 'state_dict'"),
        ({"weights": 1, "epoch": 2}, "source has the entries 'weights', 'epoch': expected 'state_dict'"),
        ({"state_dict": [1]}, r"source\['state_dict'\] must map names to tensors, got list"),
        ({"state_dict": {1: torch.rand(1)}}, "source must have names for the network, got the keys 1"),
        ({"state_dict": {"fc.weight": torch.rand(1)}}, "has the parameters fc.weight: expected policy_net"),
        ({"state_dict": {"conv1.weight": 1}}, "has the parameters conv1.weight: expected policy_net"),
        ({"state_dict": {"main_net.fc": torch.rand(1), "epoch": 1}}, "(?s)missing: .*neither, unexpected: epoch"),
    ],
)
def test_unknown_layouts(large, source, message):
    before = snapshot(large)
    with pytest.raises(ValueError, match=message):
        load_official(large, source)
    assert same(large, before)
