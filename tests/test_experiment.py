"""The arithmetic of the bench is right, and its decisions and networks are the same every time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bench_toys import TINY

import dynexec
from dynexec.measure import timing
from dynexec.report import baselines, experiment, nets, rows


@pytest.fixture(scope="module")
def model():
    return nets.build(TINY)


@pytest.fixture(scope="module")
def images():
    return nets.make_images(4, 16)


def times(**medians):
    return {name.replace("_", " "): {"median": value} for name, value in medians.items()}


def test_strongest_dense_is_the_fastest_that_is_not_ours():
    dense = ("dense eager", "dense compiled", "OpenVINO")
    measured = times(dense_eager=9.0, dense_compiled=5.0, dense_frozen=1.0, masked_eager=0.5)
    assert rows.strongest_dense(measured, dense) == "dense compiled"
    assert rows.strongest_dense(measured | times(OpenVINO=4.0), dense) == "OpenVINO"
    assert rows.strongest_dense(times(dense_frozen=1.0), dense) is None


def test_speed_up_arithmetic():
    measured = times(dense_eager=12.0, dense_compiled=10.0, masked_eager=15.0, dense_frozen=8.0, dynexec=5.0)
    row = rows.speed_up(measured, 400, 160, ("dense eager", "dense compiled"))
    assert row["strongest_dense"] == "dense compiled"
    assert row["theoretical"] == pytest.approx(2.5)
    assert row["realised"] == pytest.approx(2.0)
    assert row["efficiency"] == pytest.approx(0.8)
    assert row["efficiency_own"] == pytest.approx(8.0 / 5.0 / 2.5)
    assert row["saved_share"] == pytest.approx(0.5 / 0.6)
    assert row["own_dense"] == pytest.approx(1.25)
    expected = {"dense eager": 2.4, "dense compiled": 2.0, "masked eager": 3.0, "dense frozen": 1.6}
    assert row["realised_against"] == pytest.approx(expected)


def test_speed_up_without_dense_or_saving():
    row = rows.speed_up(times(dynexec=5.0, masked_eager=10.0), 400, 400, ())
    assert row["realised_against"] == {"masked eager": 2.0}
    absent = ("strongest_dense", "realised", "efficiency", "efficiency_own", "saved_share", "own_dense")
    assert all(row[key] is None for key in absent)
    assert rows.speed_up(times(dense_eager=5.0, dynexec=5.0), 4, 4, ("dense eager",))["saved_share"] is None


def test_losses_are_means_over_the_draws():
    row = {"flops_needed": 1.0, "flops_dense": 2.0, "planning_share": None}
    row["milliseconds"] = times(dynexec=60.0, dense_frozen=80.0)
    seconds = [{"policy": 0.002, "launches": 0.001}, {"policy": 0.006, "launches": 0.001}]
    expected = {"total": 20.0, "policy": 4.0, "launches": 1.0, "rest": 15.0}
    assert rows.find_losses(row, lambda draw: seconds[draw], [0, 1]) == pytest.approx(expected)
    expected |= {"planning": 3.0, "rest": 12.0}
    assert rows.find_losses(row | {"planning_share": 0.05}, lambda draw: seconds[draw], [0, 1]) == pytest.approx(
        expected
    )
    row["milliseconds"] = times(dynexec=60.0)
    assert rows.find_losses(row, None, [0, 1]) == {}


def test_policy_is_charged_where_it_runs(model, images):
    flops = experiment.count_flops(model, images)
    bernoulli = experiment.draw_decisions(0.5, 4, 4)
    published = experiment.draw_decisions(0.75, 4, 4, policies=2)
    found = experiment.run_experiment(
        model, images, [bernoulli, published], name="tiny", baselines=(baselines.MaskedEager,), seconds=0
    )
    for row, setting, policy in zip(found, (bernoulli, published), (0, flops.policy), strict=True):
        block = torch.tensor(flops.block)
        needed = [flops.fixed + policy + float((draw * block).sum(1).double().mean()) for draw in setting.draws]
        assert row["flops_needed"] == pytest.approx(np.mean(needed))
        assert row["flops_dense"] == flops.dense
        assert row["kept"] == pytest.approx(torch.stack(setting.draws).float().mean().item())


def test_times_are_per_forward_and_policies_run_where_charged(model, images, monkeypatch):
    ran, frozen = [], []

    class Counted(baselines.Dynexec):
        def prepare(self, model, images, threads):
            super().prepare(model, images, threads)
            frozen.append(self.model)
            self.policy = lambda images: ran.append(len(images))

    def fake_compare(calls, **options):
        for key, call in calls.items():
            ran.clear()
            call()
            draws = 8 if key[1] and key[1].kind == "published" else 0
            assert len(ran) == (draws if key[0] == "dynexec" else 0), key
        seconds = {"masked eager": 2.0, "dense eager": 1.0, "dense frozen": 0.2, "dynexec": 0.4, "planning": 0.004}
        timings = {key: timing.Timing((seconds[key[0]],) * 3, (0.8,) * 3) for key in calls}
        return timing.Comparison(timings, 0.01, 3)

    def freeze_one(model, images):
        assert not frozen, "frozen twice"
        return dynexec.freeze(model, images)

    monkeypatch.setattr(baselines, "freeze", freeze_one)
    monkeypatch.setattr(experiment, "compare", fake_compare)
    chosen = [experiment.draw_decisions(0.5, 4, 1), experiment.draw_decisions(0.5, 4, 1, policies=2)]
    chosen_baselines = (baselines.MaskedEager, baselines.DenseEager, baselines.DenseFrozen)
    found = experiment.run_experiment(
        model, images[:1], chosen, name="tiny", baselines=chosen_baselines, executor=Counted, seconds=0
    )
    for row in found:  # the policy runs in the second: once per draw
        assert row["milliseconds"]["dense eager"]["median"] == pytest.approx(1000.0 / 8)
        assert row["milliseconds"]["masked eager"]["median"] == pytest.approx(2000.0 / 8)
        assert row["milliseconds"]["dynexec"]["median"] == pytest.approx(400.0 / 8)
        assert row["milliseconds"]["dynexec"]["cpu"] == pytest.approx(100.0)
        assert row["planning_share"] == pytest.approx(0.01)
        assert row["strongest_dense"] == "dense eager" and row["own_dense"] == pytest.approx(5.0)
        assert row["realised"] == pytest.approx(2.5) and row["draws"] == 8 and row["rounds"] == 3
        total, *causes = row["losses"].values()
        assert total == pytest.approx(50 - 25 * row["flops_needed"] / row["flops_dense"]) == pytest.approx(sum(causes))
        assert row["losses"]["planning"] == pytest.approx(0.5)


def test_planning_in_a_graph_is_not_timed():
    """Alone it would take the host's time to launch it."""
    setting = experiment.draw_decisions(0.5, 4, 1)
    candidate = SimpleNamespace(name="dense eager", policy=None, dense=True, follows_decisions=False)
    for graphs, names in ((None, {"dense eager", "planning"}), (object(), {"dense eager"})):
        calls = experiment._calls([candidate], None, [setting], SimpleNamespace(graphs=graphs))
        assert {name for name, _ in calls} == names


def test_keep_rates_that_are_nearly_the_same_are_timed_apart(model, images, monkeypatch):
    timed = []

    def fake_compare(calls, **options):
        timed.extend(key for key in calls if key[0] == "dynexec")
        timings = {key: timing.Timing((float(number),) * 3, (1.0,) * 3) for number, key in enumerate(calls, 1)}
        return timing.Comparison(timings, 0.01, 3)

    monkeypatch.setattr(experiment, "compare", fake_compare)
    chosen = [experiment.draw_decisions(keep, 4, 4) for keep in (0.5, 0.500001)]
    found = experiment.run_experiment(model, images, chosen, name="tiny", baselines=(), seconds=0)
    assert len(timed) == 2
    assert found[0]["milliseconds"]["dynexec"] != found[1]["milliseconds"]["dynexec"]


@pytest.mark.parametrize(("batch", "draws"), [(1, 8), (3, 3), (8, 1), (64, 1)])
def test_decisions_are_the_same_every_time(batch, draws):
    first, second = (experiment.draw_decisions(0.3, 20, batch) for _ in range(2))
    assert len(first.draws) == draws
    assert all(draw.shape == (batch, 20) and draw.dtype == torch.bool for draw in first.draws)
    assert all(torch.equal(a, b) for a, b in zip(first.draws, second.draws, strict=True))


def test_decisions_follow_the_keep_rate():
    assert abs(torch.stack(experiment.draw_decisions(0.3, 50, 400).draws).float().mean() - 0.3) < 0.02
    assert torch.stack(experiment.draw_decisions(1.0, 50, 4).draws).all()
    assert not torch.stack(experiment.draw_decisions(0.0, 50, 4).draws).any()
    published = experiment.draw_decisions(0.3, 50, 400, policies=10)
    assert published.kind == "published" and len(torch.unique(published.draws[0], dim=0)) == 10
    with pytest.raises(ValueError, match="between 0 and 1"):
        experiment.draw_decisions(1.5, 50, 4)


def test_networks_are_the_same_every_time_and_lively():
    first, second = nets.build(TINY), nets.build(TINY)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    logits = first.backbone(nets.make_images(8, 16))
    assert logits.isfinite().all() and logits.std(0).mean() > 0.05 * logits.abs().max()
    assert first.backbone.bn1.running_mean.abs().max() > 0 and first.backbone.bn1.momentum == 0.1
