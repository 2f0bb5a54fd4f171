"""AR-Net: what is run for which decisions, that it is what the published masked network gives, and the policy."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from toys import finish

import dynexec
from dynexec.models.arnet import PUBLISHED, build_arnet
from dynexec.policy.efficiency import efficiency_loss

SIZES = (29, 21, 15, 11)  # odd, and no multiples of each other
FRAMES, CLASSES, ACTIONS = 7, 5, 7
LITE, SKIP1, SKIP2, SKIP4 = 3, 4, 5, 6
MODES = ["exact", "cheap"]


class Small(nn.Sequential):
    """Two convolutions and pooling."""

    def __init__(self, features):
        super().__init__(
            nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, features, 3, 1, 1, bias=False), nn.BatchNorm2d(features), nn.ReLU6(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.num_features = features


def small_net(mode="exact", *, num_frames=FRAMES, dtype=torch.float32):
    """Weights large enough for decisions and hidden states of all kinds."""
    net = build_arnet(
        [Small(8), Small(4), Small(6)], lite_backbone=Small(9), hidden=10, num_classes=CLASSES, num_frames=num_frames,
        resolutions=SIZES, policy_mode=mode,
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.LSTMCell)):
            for parameter in module.parameters():
                nn.init.normal_(parameter, 0.0, 0.6)
    nn.init.normal_(net.policy.linear.weight, 0.0, 6.0)
    return finish(net).to(dtype)


def clips(n, *, num_frames=FRAMES, layout=torch.contiguous_format):
    """Frames, which vary enough for the policy to change its mind."""
    frames = torch.randn(n, num_frames, 3, SIZES[0], SIZES[0]) + 2 * torch.randn(n, num_frames, 3, 1, 1)
    return frames.flatten(0, 1).contiguous(memory_format=layout).unflatten(0, (n, num_frames))


def nearest(image, size):
    """Pixel ``floor(i * old / new)``, in whole numbers."""
    index = torch.arange(size) * image.shape[-1] // size
    return image[..., index, :][..., index]


def watch_video(net, frames, decide, cheap):
    """One video, frame by frame: actions as decided by ``decide(t, log_probabilities)``, hidden states, predictions.

    Yields per frame: action (None where ignored), log-probabilities, hidden state, lite prediction.
    """
    policy, sizes = net.policy, net.resolutions
    h = c = frames.new_zeros(1, policy.rnn.hidden_size)
    left = 0
    for t, frame in enumerate(frames):
        running, action, scores, lite = left > 0, None, None, None
        if not (cheap and running):
            after, c = policy.rnn(policy.lite_backbone(nearest(frame[None], sizes[-1])), (h, c))
            scores, lite = policy.linear(after).log_softmax(1), policy.lite_fc(after)
            h = h if running else after
        if not running:
            action = decide(t, scores)
            left = policy.skips[action - SKIP1] if action >= SKIP1 else 1
        left -= 1
        yield action, scores, lite


def reference(net, frames, decisions, *, cheap=False):
    """The logits, video by video and frame by frame."""
    logits = []
    for video, row in zip(frames, decisions.tolist()):
        found = []
        for frame, (action, _, lite) in zip(video, watch_video(net, video, lambda t, _: row[t], cheap)):  # noqa: B023
            if action is not None and action < LITE:
                features = net.base_model_list[action](nearest(frame[None], net.resolutions[action]))
                found.append(net.new_fc_list[action](features))
            elif action == LITE:
                found.append(lite)
        logits.append(sum(found, torch.zeros(1, CLASSES, dtype=frames.dtype)) / max(len(found), 1))
    return torch.cat(logits)


def patterns(n, num_frames=FRAMES):
    """(name, decisions), from the simplest to the most awkward ones."""
    for action in range(ACTIONS):
        yield f"all {action}", torch.full((n, num_frames), action)
    yield "random", torch.randint(ACTIONS, (n, num_frames))
    yield "lite after skips", torch.tensor([SKIP2, 0, LITE, SKIP4, LITE, 1, LITE]).expand(n, -1)[:, :num_frames]
    yield "skip at the end", torch.tensor([LITE, 0, SKIP1, 1, LITE, 2, SKIP4]).expand(n, -1)[:, :num_frames]
    yield "skip in a skip", torch.tensor([SKIP4, SKIP4, SKIP4, SKIP2, LITE, SKIP2, 2]).expand(n, -1)[:, :num_frames]
    mixed = torch.randint(ACTIONS, (n, num_frames))
    mixed[0] = LITE
    mixed[-1] = SKIP4
    yield "lite beside skipped", mixed


def relative(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-9)).item()


def one_hot(decisions, dtype=torch.float32):
    return F.one_hot(decisions, ACTIONS).to(dtype)


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


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_the_frame_by_frame_network(mode):
    net, frames = small_net(mode, dtype=torch.float64), clips(3).double()
    decisions = torch.tensor(
        [[0, SKIP2, 1, LITE, SKIP4, LITE, LITE], [0, LITE, 0, SKIP4, 1, 1, 1], [SKIP4, 0, 0, 0, LITE, 1, LITE]]
    )
    target = torch.randn(3, CLASSES, dtype=torch.float64)
    names, parameters = zip(*net.named_parameters())
    found = [
        torch.autograd.grad((output * target).sum(), parameters, allow_unused=True)
        for output in (
            net(frames, decisions),
            net(frames, soft_decisions=one_hot(decisions, torch.float64)),
            reference(net, frames, decisions, cheap=mode == "cheap"),
        )
    ]
    for name, hard, soft, expected in zip(names, *found):
        if expected is None or "base_model_list.2" in name or "new_fc_list.2" in name:  # nothing ran it
            assert hard is None and (soft is None or not soft.any()), name
        else:
            torch.testing.assert_close(
                hard, expected, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )
            torch.testing.assert_close(
                soft, expected, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("mode", MODES)
def test_soft_decisions_weigh_all_predictions(mode):
    """With any weights, and gradients to them: the published formula, on predictions of every frame and part."""
    net, frames = small_net(mode, dtype=torch.float64), clips(2).double()
    weights = torch.rand(2, FRAMES, ACTIONS, dtype=torch.float64) * 0.4
    weights[0, 2, SKIP4] = weights[1, 0, SKIP2] = 0.7
    weights.requires_grad_()
    output, taken = net(frames, soft_decisions=weights, return_decisions=True)
    ruling = torch.tensor([[0, 1, 2, 2, 2, 2, 6], [0, 0, 2, 3, 4, 5, 6]])
    expected = []
    for video, row, rules in zip(frames, weights, ruling):
        actions = {t: SKIP1 for t in range(FRAMES)} | {2: SKIP4 if rules[3] == 2 else SKIP1}
        actions |= {0: SKIP2} if rules[1] == 0 else {}
        steps = watch_video(net, video, lambda t, _: actions[t], mode == "cheap")  # noqa: B023
        total, used, lite = 0, 0, None
        for frame, rule, (_, _, seen) in zip(video, rules, steps):
            lite = lite if seen is None else seen  # in cheap mode that of the frozen state
            predictions = [
                net.new_fc_list[k](net.base_model_list[k](nearest(frame[None], net.resolutions[k]))) for k in range(3)
            ]
            for action, prediction in enumerate([*predictions, lite]):
                total, used = total + row[rule, action] * prediction, used + row[rule, action]
        expected.append(total / used.clamp(min=1))
    expected = torch.cat(expected)
    torch.testing.assert_close(output, expected)
    assert torch.equal(taken, weights.gather(1, ruling[..., None].expand_as(weights)))
    gradients = [torch.autograd.grad(y.square().sum(), weights, retain_graph=True)[0] for y in (output, expected)]
    torch.testing.assert_close(*gradients)
    assert gradients[0][..., :SKIP1].all(-1).sum() == 2 * FRAMES - 4  # all but the ignored rows


def test_weights_of_less_than_one_frame_are_not_scaled_up():
    net, frames = small_net(), clips(2)
    weights = torch.full((2, FRAMES, ACTIONS), 0.03)  # 0.84 of a prediction
    output = net(frames, soft_decisions=weights)
    torch.testing.assert_close(net(frames, soft_decisions=weights / 3), output / 3)
    everything = net(frames, soft_decisions=torch.ones(2, FRAMES, ACTIONS) * (torch.arange(ACTIONS) < SKIP1))
    torch.testing.assert_close(output, 0.84 * everything)


@pytest.mark.parametrize("mode", MODES)
def test_training_through_drawn_weights(mode):
    net, frames = small_net(mode).train(), clips(3)
    net.dropout = net.policy.dropout = 0.5
    costs = net.count_flops(frames).costs
    for hard in (False, True):
        weights = net.policy.relax(frames, 5.0, hard=hard, generator=torch.Generator().manual_seed(0))
        logits = net(frames, soft_decisions=weights)
        efficiency_loss(logits, torch.tensor([0, 1, 2]), weights, costs).backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any() or hard and not name.startswith("policy."), name
        net.zero_grad()
    net(frames, torch.tensor([0, 0, LITE, SKIP4, 1, 1, 1]).expand(3, -1)).square().sum().backward()
    ran = {name.split(".")[1] for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert ran == {"0", "lite_backbone", "rnn", "lite_fc"}
    assert not torch.equal(net(frames), net(frames))  # dropout; the mode is back to evaluation below
    net.eval()
    assert torch.equal(net(frames), net(frames))


@pytest.mark.parametrize("mode", MODES)
def test_flops_are_those_that_run(mode):
    net, frames = small_net(mode), clips(5)
    flops = net.count_flops(frames)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _, decisions = net(frames, return_decisions=True)
    assert flops.of(decisions).dtype == torch.float64
    assert flops.of(decisions).sum().item() == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(frames, soft_decisions=torch.full((5, FRAMES, ACTIONS), 1 / ACTIONS))
    assert 5 * flops.dense == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.policy.relax(frames, 1.0) if mode == "exact" else None
    assert counter.get_total_flops() == (5 * flops.policy if mode == "exact" else 0)
    mean = flops.of(decisions).mean().item()
    assert flops.saving(decisions) == pytest.approx(1 - mean / flops.dense)
    assert dynexec.measure.count_flops(net, frames) == flops
    assert net.double().count_flops(frames) == flops


def test_flops_by_hand():
    exact, cheap = (small_net(mode).count_flops(clips(1)) for mode in MODES)
    decisions = torch.tensor([[0, SKIP4, 0, 0, 0, LITE, 1]])
    backbones, seen = exact.backbone[0] + exact.backbone[1], exact.features + exact.choice
    assert exact.of(decisions).tolist() == [backbones + exact.lite + 7 * seen]
    assert cheap.of(decisions).tolist() == [backbones + exact.lite + 4 * seen]
    assert exact.costs == pytest.approx((*(flops / 2e9 for flops in exact.backbone), 0, 0, 0, 0))
    *gmac, policy = exact.published_gmac
    published = gmac[0] + gmac[1] + 3 * policy + 4 * policy / 4
    assert exact.published(decisions) == pytest.approx(published / 7)
    with pytest.raises(ValueError, match=r"decisions must have shape \[N, 7\], got \(1, 6\)"):
        exact.of(decisions[:, 1:])


@pytest.mark.parametrize(
    ("name", "classes", "gmac", "published"),
    [
        ("arnet_resnet", 200, [4.088, 2.245, 0.485], [4.088, 2.245, 0.485]),
        ("arnet_efficientnet", 1000, [0.963, 0.301, 0.090], [1.800, 0.394, 0.098]),
    ],
)
def test_flops_of_the_published_networks(name, classes, gmac, published):
    net = build_arnet(**PUBLISHED[name], num_classes=classes)
    flops = net.count_flops(torch.empty(1, 16, 3, 224, 224, device="meta"))
    assert [round(backbone / 2e9, 3) for backbone in flops.backbone] == gmac
    lstm = 4 * 512 * (1280 + 512) / 1e9
    features = flops.features / 2e9 - lstm
    assert features == pytest.approx(0.050356992)
    assert flops.lite == 2 * 512 * classes and flops.choice == 2 * 512 * 7
    *backbones, policy = flops.published_gmac
    assert [round(backbone, 3) for backbone in backbones] == published
    assert policy == pytest.approx(features + classes * 1280e-9 + 2 * 1280**2 / 1e9)
    if name == "arnet_resnet":  # the published MobileNetV2 has a linear layer: 0.051
        assert round(features + classes * 1280e-9, 3) == 0.051
        assert round(16 * (sum(gmac) + 0.051), 1) == 109.9
        assert flops.dense / 2e9 == pytest.approx(109.9 + 16 * lstm, abs=0.05)
    decisions = torch.zeros(1, 16, dtype=torch.int64)
    assert flops.published(decisions) == pytest.approx(flops.published_gmac[0] + policy)


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
        (dict(resolutions=(224, 112)), r"one per backbone and the policy's, 4 positive sizes, got \(224, 112\)"),
        (dict(resolutions=(224, 168, 112, 0)), "4 positive sizes"),
        (dict(skips=(1, 0)), r"skips must be numbers of frames, at least 1, got \(1, 0\)"),
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
