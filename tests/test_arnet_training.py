"""AR-Net: gradients, soft and drawn weights, and FLOPs."""

import pytest
import torch
from arnet_cases import (
    ACTIONS,
    CLASSES,
    FRAMES,
    LITE,
    MODES,
    SKIP1,
    SKIP2,
    SKIP4,
    clips,
    nearest,
    one_hot,
    reference,
    small_net,
    watch_video,
)
from torch.utils.flop_counter import FlopCounterMode

import dynexec
from dynexec.models.arnet import PUBLISHED, build_arnet
from dynexec.policy.efficiency import efficiency_loss


@pytest.mark.usefixtures("algorithms")
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
            assert (hard is None) == name.startswith("policy.linear"), name  # which only decides
            assert not any(gradient.any() for gradient in (hard, soft) if gradient is not None), name
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
