"""AR-Net: what is run for which decisions, that it is what the published masked network gives, and the policy."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from arnet_cases import (
    ACTIONS,
    CLASSES,
    FRAMES,
    LITE,
    MODES,
    SKIP1,
    SKIP2,
    SKIP4,
    Small,
    clips,
    nearest,
    one_hot,
    patterns,
    reference,
    relative,
    small_net,
    watch_video,
)
from torch import nn
from toys import finish

import dynexec
from dynexec.models.arnet import PUBLISHED, build_arnet


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("n", [1, 4])
def test_output_is_that_of_the_frame_by_frame_network(mode, layout, n):
    net, frames = small_net(mode), clips(n, layout=layout)
    with torch.no_grad():
        for name, decisions in patterns(n):
            expected = reference(net, frames, decisions, cheap=mode == "cheap")
            assert relative(net(frames, decisions), expected) < 1e-5, name
            assert relative(net(frames, soft_decisions=one_hot(decisions)), expected) < 1e-5, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_frozen_output_is_that_of_the_frame_by_frame_network(mode, layout):
    net = small_net(mode)
    fast = dynexec.freeze(net, clips(2))
    assert all(f"{name}: " in fast.explain() for name in net.part_names())
    with torch.no_grad():
        for n in (1, 5):
            frames = clips(n, layout=layout)
            for name, decisions in patterns(n):
                expected = reference(net, frames, decisions, cheap=mode == "cheap")
                assert relative(fast(frames, decisions), expected) < 1e-5, name
                assert relative(fast(frames, None, soft_decisions=one_hot(decisions)), expected) < 1e-5, name
            output, taken = fast(frames, return_decisions=True)
            assert relative(output, reference(net, frames, taken, cheap=mode == "cheap")) < 1e-5


def test_the_modes_differ_after_skips_only():
    exact, frames = small_net(), clips(3)
    cheap = small_net("cheap")
    cheap.load_state_dict(exact.state_dict())
    skipping = torch.tensor([0, SKIP4, 0, 0, 0, LITE, LITE]).expand(3, -1)
    at_once = torch.tensor([0, LITE, SKIP1, LITE, 0, SKIP1, LITE]).expand(3, -1)
    assert relative(cheap(frames, skipping), exact(frames, skipping)) > 1e-3
    assert relative(cheap(frames, at_once), exact(frames, at_once)) < 1e-5


def test_nearest_pixels_of_published_sizes():
    image = torch.arange(224.0 * 224).view(1, 1, 224, 224)
    for size in (168, 112, 84):
        assert torch.equal(F.interpolate(image, size=(size, size), mode="nearest"), nearest(image, size))


def test_ignored_decisions_are_without_effect_and_replays_are_identical():
    net, frames = small_net(), clips(2)
    decisions = torch.tensor([[0, SKIP4, 0, 1, 2, LITE, 1], [SKIP2, LITE, SKIP4, SKIP2, SKIP2, SKIP2, LITE]])
    output, taken = net(frames, decisions, return_decisions=True)
    effective = [[0, SKIP4, SKIP4, SKIP4, SKIP4, LITE, 1], [SKIP2, SKIP2, SKIP4, SKIP4, SKIP4, SKIP4, LITE]]
    assert taken.tolist() == effective
    for replayed in (decisions, taken):
        assert torch.equal(net(frames, replayed), output)
    assert relative(net(frames, soft_decisions=one_hot(taken)), output) < 1e-5


def test_nothing_chosen_is_zero():
    net = small_net()
    fast = dynexec.freeze(net, clips(2))
    for network in (net, fast):
        output, taken = network(clips(3), torch.full((3, FRAMES), SKIP4), return_decisions=True)
        assert output.shape == (3, CLASSES) and not output.any() and bool((taken == SKIP4).all())


def count_rows(net):
    """Rows that each part got, filled in as the network runs; a part that ran twice is an error."""
    rows = {}

    def record(name):
        def hook(module, arguments):
            assert name not in rows, name
            rows[name] = len(arguments[0])

        return hook

    for name in net.part_names():
        net.get_submodule(name).register_forward_pre_hook(record(name))
    return rows


@pytest.mark.parametrize(("mode", "policy_rows"), [("exact", 4 + 0 + 7), ("cheap", 3 + 0 + 4)])
def test_parts_run_once_on_the_rows_that_need_them(mode, policy_rows):
    net, frames = small_net(mode), clips(3)
    rows = count_rows(net)
    decisions = torch.tensor(
        [
            [0, SKIP2, 0, LITE, 1, 1, SKIP1],
            [0, 1, 2, SKIP4, LITE, LITE, LITE],  # lite never takes effect
            [SKIP4, 0, 0, 0, LITE, 2, LITE],
        ]
    )
    net(frames, decisions)
    expected = {"base_model_list.0": 2, "base_model_list.1": 3, "base_model_list.2": 2}
    expected |= {name.replace("base_model", "new_fc"): count for name, count in expected.items()}
    assert rows == expected | {"policy.lite_backbone": policy_rows, "policy.lite_fc": 3}


@pytest.mark.parametrize("mode", MODES)
def test_without_lite_frames_the_policy_does_not_run(mode):
    net, frames = small_net(mode), clips(2)
    rows = count_rows(net)
    net(frames, torch.tensor([[0, 0, SKIP4, LITE, LITE, LITE, 0], [0] * FRAMES]))
    assert rows == {"base_model_list.0": 3 + FRAMES, "new_fc_list.0": 3 + FRAMES}


@pytest.mark.parametrize("mode", MODES)
def test_the_policy_decides_frame_by_frame(mode):
    net, frames = small_net(mode), clips(40)
    with torch.no_grad():
        for _ in range(5):  # every action is the likeliest one somewhere
            net.policy.linear.bias -= net.policy(frames).mean((0, 1))
        output, taken = net(frames, return_decisions=True)
        log_probabilities = net.policy(frames)
        kinds = set()
        for video, row, scores in zip(frames, taken.tolist(), log_probabilities):
            steps = watch_video(net, video, lambda t, scores: int(scores.argmax()), mode == "cheap")
            for t, (action, expected, _) in enumerate(steps):
                kinds.add(action)
                assert row[t] == (row[t - 1] if action is None else action)
                if action is not None:
                    torch.testing.assert_close(scores[t], expected[0].clamp(min=-18.420681), rtol=1e-3, atol=1e-3)
        assert kinds == {None, *range(ACTIONS)}  # else this test proves little
        assert relative(output, net(frames, taken)) < 1e-5
        assert torch.equal(net(frames, return_decisions=True)[1], taken)
        assert torch.equal(net.policy.decide(frames)[0], taken)


@pytest.mark.parametrize("mode", MODES)
def test_a_video_does_not_depend_on_its_batch(mode):
    net, frames = small_net(mode), clips(6)
    decisions = torch.randint(ACTIONS, (6, FRAMES))
    decisions[2] = torch.tensor([SKIP2, LITE, LITE, SKIP4, 0, 1, 2])
    with torch.no_grad():
        together, (free, taken) = net(frames, decisions), net(frames, return_decisions=True)
        for n in range(6):
            alone = frames[n : n + 1]
            assert relative(net(alone, decisions[n : n + 1]), together[n]) < 1e-5
            assert relative(net(alone), free[n]) < 1e-5
            assert torch.equal(net(alone, return_decisions=True)[1][0], taken[n])


@pytest.mark.parametrize("mode", MODES)
def test_sampling_with_a_generator(mode):
    net, frames = small_net(mode), clips(8)
    first, second, third = (net.policy.sample(frames, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert first.dtype == torch.int64 and first.shape == (8, FRAMES)
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert torch.equal(net(frames, first, return_decisions=True)[1], first)  # as they take effect
    weights = [net.policy.relax(frames, 0.7, generator=torch.Generator().manual_seed(s)) for s in (3, 3)]
    assert torch.equal(*weights)
    chosen = weights[0].argmax(-1)
    torch.testing.assert_close(weights[0], one_hot(chosen))
    assert torch.equal(net(frames, chosen, return_decisions=True)[1], chosen)


def test_samples_follow_the_probabilities():
    net = small_net(num_frames=1)
    net.policy.linear.weight.data.mul_(0.05)
    frames = clips(1, num_frames=1).expand(4000, -1, -1, -1, -1)
    drawn = net.policy.sample(frames, generator=torch.Generator().manual_seed(0))
    expected = net.policy(frames[:1])[0, 0].exp().tolist()
    assert torch.bincount(drawn.flatten(), minlength=ACTIONS).div(4000).tolist() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), "state"])
@pytest.mark.parametrize("mode", MODES)
def test_a_copy_does_the_same(clone, mode):
    net, frames, decisions = small_net(mode), clips(2), torch.randint(ACTIONS, (2, FRAMES))
    twin = clone(net) if callable(clone) else small_net(mode)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(frames, decisions), net(frames, decisions))
    assert torch.equal(twin(frames), net(frames))


def test_a_policy_gone_nan_is_an_error():
    net = small_net()
    nn.init.constant_(net.policy.linear.bias, float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        net(clips(2))
    assert net(clips(2), torch.full((2, FRAMES), LITE)).isfinite().all()


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        (None, TypeError, r"frames must be a floating-point tensor \[N, 7, 3, 29, 29\], got NoneType"),
        (torch.zeros(1, 7, 3, 29, 29, dtype=torch.uint8), TypeError, "got torch.uint8"),
        (torch.zeros(0, 7, 3, 29, 29), ValueError, r"have shape \[N, 7, 3, 29, 29\], none of it 0, got \(0, 7, 3, 29"),
        (torch.zeros(1, 6, 3, 29, 29), ValueError, r"got \(1, 6, 3, 29, 29\)"),
        (torch.zeros(1, 7, 3, 29, 28), ValueError, r"got \(1, 7, 3, 29, 28\)"),
        (torch.zeros(7, 3, 29, 29), ValueError, r"got \(7, 3, 29, 29\)"),
    ],
)
def test_wrong_frames(frames, error, message):
    net = small_net()
    for use in (net, net.check_inputs, net.count_flops):
        with pytest.raises(error, match=message):
            use(frames)


def test_the_policy_wants_frames_as_well():
    net = small_net()
    for use in (net.policy, net.policy.decide, net.policy.sample):
        with pytest.raises(
            TypeError, match=r"frames must be a floating-point tensor \[N, T, 3, H, W\], got torch.uint8"
        ):
            use(torch.zeros(1, 7, 3, 29, 29, dtype=torch.uint8))
        for wrong in (torch.zeros(7, 3, 29, 29), torch.zeros(0, 7, 3, 29, 29), torch.zeros(1, 7, 4, 29, 29)):
            with pytest.raises(ValueError, match=r"frames must have shape \[N, T, 3, H, W\], none of it 0, got"):
                use(wrong)


@pytest.mark.parametrize(
    ("decisions", "error", "message"),
    [
        (torch.zeros(2, FRAMES), TypeError, r"decisions must be an int64 tensor \[2, 7\], got torch.float32"),
        ([[0] * FRAMES] * 2, TypeError, "got list"),
        (torch.zeros(2, FRAMES - 1, dtype=torch.int64), ValueError, r"must have shape \[2, 7\], got \(2, 6\)"),
        (torch.zeros(FRAMES, dtype=torch.int64), ValueError, r"must have shape \[2, 7\], got \(7,\)"),
        (torch.full((2, FRAMES), ACTIONS), ValueError, "decisions must be from 0 to 6, got 7"),
        (torch.full((2, FRAMES), -1), ValueError, "decisions must be from 0 to 6, got -1"),
    ],
)
def test_wrong_decisions(decisions, error, message):
    with pytest.raises(error, match=message):
        small_net()(clips(2), decisions)


def test_wrong_soft_decisions():
    net, frames, weights = small_net(), clips(2), torch.ones(2, FRAMES, ACTIONS)
    with pytest.raises(TypeError, match=r"soft_decisions must be a floating-point tensor \(2, 7, 7\), got torch.int64"):
        net(frames, soft_decisions=weights.long())
    with pytest.raises(ValueError, match=r"soft_decisions must have shape \(2, 7, 7\), got \(2, 7, 4\)"):
        net(frames, soft_decisions=weights[..., :4])
    with pytest.raises(ValueError, match="decisions and soft_decisions were both given"):
        net(frames, torch.zeros(2, FRAMES, dtype=torch.int64), soft_decisions=weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(resolutions=(224, 112)), r"one per backbone and the policy's, 4 sizes, got \(224, 112\)"),
        (dict(policy_mode="fast"), "policy_mode must be 'exact' or 'cheap', got 'fast'"),
        (dict(backbones=(50, 35, 18)), "depth must be one of"),
        (dict(backbones=("b9", "b1", "b0")), "variant must be one of b0, b1, b2, b3, got 'b9'"),
    ],
)
def test_wrong_constructions(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_arnet(**arguments, lite_backbone=Small(4))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_networks_run_and_freeze(name):
    net = finish(build_arnet(**PUBLISHED[name], num_frames=4, resolutions=(65, 49, 33, 32), num_classes=CLASSES))
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.05)
        elif isinstance(module, nn.Conv2d):  # as large as it takes for the images to matter at the end
            nn.init.kaiming_normal_(module.weight)
    frames = torch.randn(2, 4, 3, 65, 65)
    fast = dynexec.freeze(net, frames)
    decisions = torch.tensor([[0, 1, 2, LITE], [SKIP2, 0, LITE, 2]])
    with torch.no_grad():
        expected = reference(net, frames, decisions)
        assert relative(reference(net, frames + 0.1, decisions), expected) > 1e-3
        assert relative(net(frames, decisions), expected) < 1e-5
        assert relative(fast(frames, decisions), expected) < 1e-5
        assert net(frames).shape == (2, CLASSES)


def test_no_skips_and_one_frame():
    net = build_arnet([Small(4)], lite_backbone=Small(5), skips=(), num_frames=1, resolutions=(15, 11), num_classes=3)
    frames = torch.randn(2, 1, 3, 15, 15)
    fast = dynexec.freeze(net.eval(), frames)
    output, taken = net(frames, return_decisions=True)
    assert net.policy(frames).shape == (2, 1, 2) and bool((taken < 2).all())
    assert relative(fast(frames, taken), output) < 1e-5


@pytest.mark.parametrize("actions", [[SKIP4], [0], [LITE], [1, LITE], [0, 1, 2, LITE, SKIP1]])
def test_backbones_that_nobody_chooses_get_gradients_of_zeros(actions):
    """As in the masked network; otherwise a step in which all is skipped would fail."""
    net = small_net()
    frames = clips(2)
    decisions = torch.tensor(actions).repeat(2, FRAMES)[:, :FRAMES]
    parameters = [parameter for name, parameter in net.named_parameters() if "policy.linear" not in name]
    weights = one_hot(net(frames, decisions, return_decisions=True)[1])
    expected = torch.autograd.grad(net(frames, soft_decisions=weights).square().sum(), parameters)
    actual = torch.autograd.grad(net(frames, decisions).square().sum(), parameters)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
