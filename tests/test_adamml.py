"""AdaMML: what runs, what it computes, what it costs; eager and frozen."""

import copy
import pickle
from functools import partial

import pytest
import torch
from adamml_cases import (
    CASES,
    draw,
    error,
    inputs_for,
    make,
    masked_forward,
    official_shapes,
    policy_logits,
    pooled,
)
from torch.utils.flop_counter import FlopCounterMode

import dynexec
from dynexec import dispatch
from dynexec.models.adamml import AdaMML
from dynexec.models.adamml_policy import pool_frames

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def net():
    return make()


@pytest.fixture(scope="module")
def frozen(net):
    return dynexec.freeze(net, inputs_for(net))


@pytest.mark.parametrize("modalities", [("rgb", "sound"), ("rgb", "flow"), ("rgb", "sound", "flow")])
def test_parameters_are_those_of_the_published_checkpoints(modalities):
    with torch.device("meta"):
        net = AdaMML(modalities)
    expected = {name.replace("policy_net.", "policy."): shape for name, shape in official_shapes(modalities).items()}
    assert {name: tuple(value.shape) for name, value in net.state_dict().items()} == expected


@pytest.mark.parametrize("case", CASES)
def test_output_is_that_of_the_masked_network(case):
    net = make(case)
    inputs = inputs_for(net, samples=2)
    with torch.no_grad():
        for keep in (0.4, 1.0):
            decisions = draw(net, inputs, keep)
            decisions[0, 0, 0] = True
            expected = masked_forward(net, inputs, decisions)
            assert error(net(inputs, decisions), expected) < TOLERANCE
            assert error(net(inputs, soft_decisions=decisions.float()), expected) < TOLERANCE
        weights = torch.rand(decisions.shape)
        assert error(net(inputs, soft_decisions=weights), masked_forward(net, inputs, weights)) < TOLERANCE


@pytest.mark.parametrize("case", ["three", "flow looks at flow", "one frame"])
def test_frozen(case):
    """With other inputs, batch sizes and numbers of segments than it was frozen with; the policy too."""
    net = make(case)
    frozen = dynexec.freeze(net, inputs_for(net, samples=2, segments=2))
    with torch.no_grad():
        for samples, segments in ((1, 1), (2, 3)):
            inputs = inputs_for(net, samples, segments)
            decisions = draw(net, inputs)
            decisions[0, 0, 0] = True
            expected = masked_forward(net, inputs, decisions)
            assert error(frozen(inputs, decisions), expected) < TOLERANCE
            assert error(frozen(inputs, None, soft_decisions=decisions.float()), expected) < TOLERANCE
            assert error(frozen.network.policy(inputs), policy_logits(net.policy, inputs)) < TOLERANCE
            assert not frozen(inputs, torch.zeros_like(decisions)).any()
    assert len(frozen.explain().splitlines()) == 2 * len(net.modalities)


@pytest.mark.skipif(dispatch.native_missing is not None, reason="the engine is native")
def test_the_engine_runs_all_but_the_pooling(net):
    """Four frames are pooled twice, the two that the policy looks at once."""
    frozen = dynexec.freeze(net, inputs_for(net), executor="fused")
    segments = [line.split(": ")[1].split()[0] for line in frozen.explain().splitlines()]
    assert segments == ["3", "1", "2", "1"]


@pytest.mark.parametrize("size", [(33, 33), (41, 35)])
@pytest.mark.parametrize("last", [True, False])
def test_memory_layouts(net, frozen, size, last):
    """Frames that are channels_last, and such as the policy need not resize, of which it takes every second one."""
    inputs = inputs_for(net, size=size)
    if last:
        inputs = {name: value.movedim(3, 5).contiguous().movedim(5, 3) for name, value in inputs.items()}
    decisions = draw(net, inputs)
    with torch.no_grad():
        expected, logits = masked_forward(net, inputs, decisions), policy_logits(net.policy, inputs)
        for module, policy in ((net, net.policy), (frozen, frozen.network.policy)):
            assert error(module(inputs, decisions), expected) < TOLERANCE
            assert error(policy(inputs), logits) < TOLERANCE


def calls_of(net, run):
    """Name of a part -> the tensors that it was called with."""
    calls = {}
    hooks = [
        net.get_submodule(name).register_forward_pre_hook(
            lambda part, arguments, name=name: calls.setdefault(name, []).append(arguments[0])
        )
        for name in net.part_names()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return calls


def test_only_what_is_selected_runs_in_one_batch_per_modality(net):
    inputs = inputs_for(net)
    decisions = torch.zeros(3, 3, 2, dtype=torch.bool)
    decisions[0, 2, 0] = decisions[2, 1, 0] = True
    calls = calls_of(net, lambda: net(inputs, decisions))
    assert list(calls) == ["main_net.nets.0"]
    (clips,) = calls["main_net.nets.0"]
    assert torch.equal(clips, torch.stack([inputs["rgb"][0, 2], inputs["rgb"][2, 1]]))
    calls = calls_of(net, lambda: net(inputs))
    assert [len(calls[name]) for name in net.part_names()] == [1, 1, 1, 1]
    assert [len(calls[name][0]) for name in net.part_names()[2:]] == [9, 9]


def test_nothing_selected_gives_zeros_and_runs_nothing(net, frozen):
    inputs = inputs_for(net)
    decisions = torch.zeros(3, 3, 2, dtype=torch.bool)
    assert calls_of(net, lambda: net(inputs, decisions)) == {}
    for module in (net, frozen):
        output = module(inputs, decisions)
        assert output.shape == (3, 5) and not output.any()
    decisions[1, 0, 1] = True
    output = net(inputs, decisions)
    assert output[1].any() and not output[[0, 2]].any()


def test_mistakes_would_show(net):
    """Dividing by the segments that are used, fusion weights in another order, columns in another order."""
    inputs = inputs_for(net)
    decisions = draw(net, inputs, 0.4)
    decisions[0, 0, 0], decisions[0, 1:] = True, False
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.main_net.lf_weights.copy_(1 - net.main_net.lf_weights)
        output = net(inputs, decisions)
        used = masked_forward(net, inputs, decisions, divide=lambda mask: int(mask.any(1).sum().clamp(min=1)))
        for wrong in (used, masked_forward(twin, inputs, decisions), masked_forward(net, inputs, decisions.flip(2))):
            assert error(output, wrong) > 0.05


@pytest.mark.usefixtures("algorithms")
def test_a_sample_does_not_depend_on_others_and_replays_are_identical(net, frozen):
    inputs = inputs_for(net, samples=4)
    decisions = draw(net, inputs)
    for module in (net, frozen):
        with torch.no_grad():
            output = module(inputs, decisions)
            assert torch.equal(module(inputs, decisions), output)
            alone = {name: value[2:3] for name, value in inputs.items()}
            assert error(module(alone, decisions[2:3]), output[2:3]) < TOLERANCE
            others = {name: torch.cat([value[2:3], torch.rand_like(value)]) for name, value in inputs.items()}
            kept = torch.cat([decisions[2:3], ~decisions])
            assert error(module(others, kept)[:1], output[2:3]) < TOLERANCE


def test_the_policy_decides(net, frozen):
    inputs = inputs_for(net, samples=5)
    output, decisions = net(inputs, return_decisions=True)
    logits = policy_logits(net.policy, inputs)
    assert torch.equal(decisions, logits[..., 1] > logits[..., 0])
    assert 0 < decisions.sum() < decisions.numel()
    assert torch.equal(output, net(inputs, decisions)) and torch.equal(output, net(inputs))
    fast, taken = frozen(inputs, return_decisions=True)
    assert error(fast, net(inputs, taken)) < TOLERANCE
    weights = torch.rand(5, 3, 2)
    assert net(inputs, soft_decisions=weights, return_decisions=True)[1] is weights


@pytest.mark.parametrize("train", [False, True])
def test_gradients_of_what_runs(train):
    """Those of the masked network; in training mode BatchNorm sees the selected rows, so all are selected there."""
    net = make("three", dropout=0.0).double().train(train)  # rounding may take a ReLU to its other side
    inputs = {name: value.double() for name, value in inputs_for(net, samples=2, segments=2).items()}
    inputs["rgb"].requires_grad_()
    decisions = draw(net, inputs) if not train else torch.ones(2, 2, 3, dtype=torch.bool)
    decisions[..., 2] = train
    twin = copy.deepcopy(net)
    weights = torch.randn(2, 5, dtype=torch.float64)
    (net(inputs, decisions) * weights).sum().backward()
    grad, inputs["rgb"].grad = inputs["rgb"].grad, None
    if train:
        (twin(inputs, soft_decisions=decisions.double()) * weights).sum().backward()
    else:
        (masked_forward(twin, inputs, decisions) * weights).sum().backward()
    assert error(grad, inputs["rgb"].grad) < 1e-8
    for (name, value), expected in zip(net.main_net.named_parameters(), twin.main_net.parameters()):
        if name.startswith("nets.2.") and not train:
            assert not value.grad.any() and not expected.grad.any()
        else:
            assert (value.grad - expected.grad).abs().max() <= 1e-8 * expected.grad.abs().max() + 1e-12, name
    assert all(value.grad is None for value in net.policy.parameters())


def test_gradients_reach_soft_decisions(net):
    inputs = inputs_for(net)
    weights = torch.rand(3, 3, 2, requires_grad=True)
    (actual,) = torch.autograd.grad(net(inputs, soft_decisions=weights).square().sum(), weights)
    (expected,) = torch.autograd.grad(masked_forward(net, inputs, weights).square().sum(), weights)
    assert error(actual, expected) < 1e-4


def test_dropout_before_the_classifiers_in_training_only():
    net = make("one frame")  # one of each kind
    inputs = inputs_for(net)
    for name, part in zip(net.modalities, net.main_net.nets):
        (dropout,) = (layer for layer in part.modules() if isinstance(layer, torch.nn.Dropout))
        assert dropout.p == 0.5
        clips = inputs[name].flatten(0, 1)
        assert torch.equal(part(clips), part(clips))
        dropout.train()
        assert not torch.equal(part(clips), part(clips))


def test_autocast_and_double(net):
    inputs = inputs_for(net)
    decisions = draw(net, inputs)
    with torch.no_grad():
        expected = net(inputs, decisions)
        with torch.autocast("cpu", torch.bfloat16):
            assert error(net(inputs, decisions).float(), expected) < 0.1
            assert error(net(inputs, soft_decisions=decisions.bfloat16()).float(), expected) < 0.1
            assert net(inputs).isfinite().all()
        double = copy.deepcopy(net).double()
        inputs = {name: value.double() for name, value in inputs.items()}
        assert double(inputs, decisions).dtype == torch.float64
        assert error(double(inputs, decisions), expected.double()) < TOLERANCE


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies(net, clone):
    inputs = inputs_for(net)
    decisions = draw(net, inputs)
    twin, fresh = clone(net), make(policy_size=33).eval()
    fresh.load_state_dict(net.state_dict())
    expected = net(inputs, decisions)
    assert torch.equal(twin(inputs, decisions), expected) and torch.equal(fresh(inputs, decisions), expected)
    with torch.no_grad():
        twin.main_net.lf_weights.zero_()
    assert not torch.equal(twin(inputs, decisions), expected) and torch.equal(net(inputs, decisions), expected)


@pytest.mark.parametrize("frames", [2, 4, 8])
@pytest.mark.parametrize("clips", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_stays_inside_a_clip(frames, clips, layout):
    x = torch.randn(clips * frames, 4, 5, 3).contiguous(memory_format=layout).requires_grad_()
    actual, expected = pool_frames(x, frames), torch.cat([pooled(clip) for clip in x.split(frames)])
    assert torch.equal(actual, expected)
    assert actual.is_contiguous(memory_format=layout) or layout == torch.contiguous_format
    weights = torch.randn(expected.shape)
    (grad,) = torch.autograd.grad((actual * weights).sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad((expected * weights).sum(), x)[0])


def published(net):
    """Clips of the published sizes, shapes only."""
    sizes = {
        "rgb": (8, 3, 224, 224),
        "flow": (8, 10, 224, 224),
        "rgbdiff": (8, 15, 224, 224),
        "sound": (1, 1, 256, 256),
    }
    names = {*net.modalities, *net.policy.modalities}
    return {name: torch.empty(1, 10, *sizes[name], device="meta") for name in names}


def test_flops_are_the_published_ones():
    """But for the policy's look at rgbdiff, published for frames of 224 pixels: it resizes them to 160."""
    with torch.device("meta"):
        net, large = AdaMML(("rgb", "sound", "flow")), AdaMML(("flow",), depth=18, policy_size=224)
    flops, (large,) = net.count_flops(published(net)), large.count_flops(published(large)).glance
    assert [round(value / 2e9, 3) for value in flops.main] == [14.136, 0.382, 16.339]
    assert [value // 2 for value in flops.glance] == [375446400, 381739008, 463920000]
    assert large // 2 == 909283200
    assert flops.dense == 10 * sum(flops.main)
    lstm = 10 * 4 * 256 * (2048 + 256)  # multiply-adds
    for usage, total, corrected in (
        ((0.5506, 0.9512, 0.2682), 141.97, 137.52),
        ((0.5613, 0.9749, 0.2031), 132.94, 128.49),
    ):
        main = 10 * sum(share * value for share, value in zip(usage, flops.main))
        for rgbdiff, figure in ((large, total), (flops.glance[2], corrected)):
            policy = 10 * (sum(flops.glance[:2]) + rgbdiff)
            assert round(((main + policy) / 2 + lstm) / 1e9, 2) == figure


@pytest.mark.parametrize("case", ["rgb and sound", "one frame"])
def test_flops_are_those_of_what_runs(case):
    net = make(case)
    inputs = inputs_for(net, samples=2, segments=2)
    flops = net.count_flops(inputs)

    def count(run):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    assert count(partial(net.policy, inputs)) == 2 * flops.policy
    for keep in (0.0, 0.5, 1.0):
        decisions = draw(net, inputs, keep)
        needed = flops.of(decisions)
        assert needed.dtype == torch.float64 and needed.shape == (2,)
        assert count(partial(net, inputs, decisions)) == needed.sum() - 2 * flops.policy
        assert torch.equal(flops.of(decisions[1]), needed[1])
        assert flops.saving(decisions) == pytest.approx(1 - needed.mean().item() / flops.dense)
    assert flops.of(torch.ones_like(decisions))[0] == flops.dense + flops.policy
    with pytest.raises(ValueError, match=r"decisions must be bool \[N, 2, \d\], got shape \(2, 1,"):
        flops.of(decisions[:, :1])


def test_flops_of_a_double_network():
    net = make("sound alone")
    inputs = inputs_for(net)
    double = copy.deepcopy(net).double()
    assert double.count_flops({name: value.double() for name, value in inputs.items()}) == net.count_flops(inputs)


def changed(name, change):
    """A change of the clips of one modality."""
    return lambda inputs: inputs | {name: change(inputs[name])}


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda inputs: inputs["rgb"], TypeError, "inputs must be a dict of a tensor per modality, got Tensor"),
        (lambda inputs: {"rgb": inputs["rgb"]}, ValueError, "inputs must hold rgb, sound; got rgb: no sound"),
        (lambda inputs: inputs | {"flow": inputs["rgb"]}, ValueError, "this network does not take 'flow'"),
        (changed("rgb", lambda x: x[0]), ValueError, r"inputs\['rgb'\] must have shape \[N, S, 4, 3, H, W\]"),
        (changed("rgb", lambda x: x[:, :, :2]), ValueError, r"got \(3, 3, 2, 3, 41, 35\)"),
        (changed("rgb", lambda x: x[:, :, :, :2]), ValueError, r"got \(3, 3, 4, 2, 41, 35\)"),
        (changed("sound", lambda x: x[:, :, 0]), ValueError, r"inputs\['sound'\] must have shape \[N, S, 1, 1, H, W\]"),
        (lambda inputs: {name: x[:0] for name, x in inputs.items()}, ValueError, "at least one sample and segment"),
        (lambda inputs: {name: x[:, :0] for name, x in inputs.items()}, ValueError, "at least one sample and segment"),
        (changed("sound", lambda x: x[:2]), ValueError, r"got \(3, 3\) in 'rgb' and \(2, 3\) in 'sound'"),
        (changed("sound", lambda x: x[:, :1]), ValueError, r"got \(3, 3\) in 'rgb' and \(3, 1\) in 'sound'"),
        (
            changed("rgb", lambda x: x.double()),
            TypeError,
            r"inputs\['rgb'\] must be torch.float32, as the parameters are, got torch.float64",
        ),
        (changed("rgb", lambda x: x.tolist()), TypeError, "must be a torch.float32 tensor, got list"),
    ],
)
def test_inputs_that_do_not_fit(net, change, kind, message):
    inputs = change(inputs_for(net))
    for use in (net, net.check_inputs, net.count_flops, lambda inputs: dynexec.freeze(net, inputs)):
        with pytest.raises(kind, match=message):
            use(inputs)


ANY = torch.ones(3, 3, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (dict(decisions=ANY.float()), TypeError, r"decisions must be a bool tensor \[3, 3, 2\], got torch.float32"),
        (dict(decisions=[[True]]), TypeError, "got list"),
        (dict(decisions=ANY[:1]), ValueError, r"\[3, 3, 2\] \(samples, segments, rgb, sound\).*got \[1, 3, 2\]"),
        (dict(decisions=ANY[:, :2]), ValueError, r"got \[3, 2, 2\]"),
        (dict(decisions=ANY[..., :1]), ValueError, r"got \[3, 3, 1\]"),
        (dict(decisions=ANY[0]), ValueError, r"got \[3, 2\]"),
        (dict(decisions=ANY.to("meta")), ValueError, "on cpu like the inputs, got .* on meta"),
        (dict(soft_decisions=ANY), TypeError, r"soft_decisions must be a floating-point tensor .*, got torch.bool"),
        (dict(soft_decisions=ANY.float()[:, :1]), ValueError, r"soft_decisions must have shape \[3, 3, 2\]"),
        (dict(decisions=ANY, soft_decisions=ANY.float()), ValueError, "both given"),
    ],
)
def test_decisions_that_do_not_fit(net, arguments, kind, message):
    inputs = inputs_for(net)
    with pytest.raises(kind, match=message):
        net(inputs, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(modalities=()), "modalities must be different ones of rgb, flow, rgbdiff, sound, got"),
        (dict(modalities=("rgb", "rgb")), "modalities must be different"),
        (dict(modalities=("rgb", "audio")), r"got \('rgb', 'audio'\)"),
        (dict(modalities=("flow", "rgbdiff")), "both flow and rgbdiff"),
        (dict(num_frames=6), r"num_frames must be one of \(1, 2, 4, 8\).*got 6"),
        (dict(depth=20), "depth must be one of"),
        (dict(flow_policy="rgb"), "flow_policy must be 'rgbdiff' or 'flow', got 'rgb'"),
    ],
)
def test_networks_that_cannot_be(arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        AdaMML(**arguments)


@pytest.mark.parametrize("selected", [[], [0], [1], [0, 1]])
def test_modalities_that_nobody_looks_at_get_gradients_of_zeros(selected):
    """As in the masked network; otherwise a step in which nothing is looked at would fail."""
    net = make()
    inputs = inputs_for(net)
    decisions = torch.zeros(3, 3, 2, dtype=torch.bool)
    decisions[1, :, selected] = True
    parameters = list(net.main_net.parameters())
    expected = torch.autograd.grad(net(inputs, soft_decisions=decisions.float()).square().sum(), parameters)
    actual = torch.autograd.grad(net(inputs, decisions).square().sum(), parameters)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
