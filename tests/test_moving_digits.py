"""The recipes on moving digits: clips are what they are said to be, and each script runs, small, from end to end."""

import importlib
import json
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from example_scripts import EXAMPLES, needs_examples
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("sklearn")

pytestmark = needs_examples


@pytest.fixture
def load(monkeypatch):
    """Imports an example by name; it does not stay imported."""
    monkeypatch.syspath_prepend(EXAMPLES)
    for name in [name for name in sys.modules if name.startswith("moving_digits")]:
        monkeypatch.delitem(sys.modules, name)
    yield importlib.import_module
    for name in [name for name in sys.modules if name.startswith("moving_digits")]:
        del sys.modules[name]


@pytest.fixture
def md(load):
    return load("moving_digits")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# The clips


def test_no_image_is_in_training_and_test(md):
    (train, labels), (test, test_labels) = md.load_digits(0)
    assert train.shape == (1437, 1, 8, 8) and test.shape == (360, 1, 8, 8)
    assert labels.shape == (1437,) and test_labels.shape == (360,)
    everything = torch.cat([train, test])
    assert len(everything.flatten(1).unique(dim=0)) == 1797 == len(everything)
    assert everything.min() == pytest.approx(0, abs=1e-6) and train.max() == 1
    assert not torch.equal(md.load_digits(1)[1][0], test)


def test_digits_are_drawn_where_and_as_large_as_told(md):
    digit = F.pad(torch.rand(1, 1, 6, 6), (1, 1, 1, 1))
    middle = md.draw_digits(digit, torch.zeros(1, 2), torch.tensor([16.0]), 16)
    torch.testing.assert_close(middle, F.interpolate(digit, (16, 16), mode="bilinear")[:, 0])
    small = md.draw_digits(digit, torch.zeros(1, 2), torch.tensor([8.0]), 20)
    torch.testing.assert_close(small[:, 6:14, 6:14], digit[0])
    moved = md.draw_digits(digit, torch.tensor([[3.0, -2.0]]), torch.tensor([8.0]), 20)
    torch.testing.assert_close(moved, small.roll((-2, 3), (1, 2)), atol=1e-5, rtol=0)


def test_digits_move_straight_ahead_and_stay_in_the_picture(md):
    room = torch.tensor([0.0, 2.0, 50.0]).repeat(40)
    places = md.move(len(room), 6, room, 3.0, seeded())
    assert places.shape == (120, 6, 2) and (places.abs() <= room[:, None, None]).all()
    steps = places[2::3].diff(dim=1)
    assert steps.abs().max() <= 3 + 1e-4 and steps.abs().max() > 2.5
    free = (places[2::3].abs() < 50).all(1)
    assert free.any() and (steps.diff(dim=1).abs().amax(1)[free] < 1e-4).all()


@pytest.mark.parametrize("make", ["resolution_clips", "modality_clips"])
def test_clips_repeat_with_their_generator(md, make):
    digits = [part[:20] for part in md.load_digits(0)[1]]
    first, again, other = (getattr(md, make)(*digits, seeded(seed)) for seed in (3, 3, 4))
    tensors = [list(c.inputs.values()) if isinstance(c.inputs, dict) else [c.inputs] for c in (first, again, other)]
    assert all(torch.equal(*pair) for pair in zip(tensors[0], tensors[1]))
    assert not torch.equal(tensors[0][0], tensors[2][0]) and torch.equal(first.labels, digits[1])
    some = first[5:7]
    assert len(some) == 2 and torch.equal(some.told, first.told[5:7]) and torch.equal(some.labels, first.labels[5:7])


def test_frames_show_the_digit_in_one_short_run_and_otherwise_noise(md):
    clips = md.resolution_clips(*md.load_digits(0)[1], seeded())
    assert clips.inputs.shape == (360, 8, 3, 32, 32) and (clips.inputs == clips.inputs[:, :, :1]).all()
    runs = clips.told.int().diff(dim=1, prepend=torch.zeros(360, 1), append=torch.zeros(360, 1))
    assert ((runs == 1).sum(1) == 1).all()
    assert clips.told.sum(1).bincount(minlength=4)[1:].min() > 80 and clips.told.sum(1).max() == 3
    assert clips.told.any(0).all() and clips.kind.bincount().min() > 80
    empty = clips.inputs[~clips.told]
    assert empty.std() == pytest.approx(md.NOISE, rel=0.01) and empty.mean().abs() < 0.001


def test_frames_without_noise_hold_whole_digits_of_their_size(md, monkeypatch):
    monkeypatch.setattr(md, "NOISE", 0.0)
    images, labels = md.load_digits(0)[1]
    clips = md.resolution_clips(images, labels, seeded())
    assert (clips.inputs[~clips.told] == 0).all()
    clip = torch.arange(len(images))[:, None].expand(-1, 8)[clips.told]
    pixels = clips.inputs[clips.told][:, 0].sum((1, 2)) / images[clip].sum((1, 2, 3))  # per pixel of the image
    low, high = torch.tensor(md.DIGIT_SIZES)[clips.kind[clip]].unbind(1)
    heights = 8 * pixels.sqrt()
    assert (heights < high + 1).all() and (heights > low - 1).double().mean() > 0.95  # the rest has cut edges


def test_a_segment_is_told_by_picture_or_sound_or_neither(md, monkeypatch):
    monkeypatch.setattr(md, "NOISE", 0.0)
    images, labels = md.load_digits(0)[1]
    clips = md.modality_clips(images, labels, seeded())
    rgb, sound = clips.inputs["rgb"], clips.inputs["sound"]
    assert rgb.shape == (360, 5, 8, 3, 20, 20) and sound.shape == (360, 5, 1, 1, 24, 24)
    seen, heard = clips.told.unbind(2)
    assert not (seen & heard).any() and (seen | heard).any(1).all()
    assert seen.double().mean() == pytest.approx(0.27, abs=0.03) == heard.double().mean()
    assert 0.6 < seen.any(1).double().mean() < 0.9 and 0.6 < heard.any(1).double().mean() < 0.9
    assert (rgb[~seen] == 0).all() and (sound[~heard] == 0).all()
    height = 8 * (rgb[seen][:, :, 0].sum((2, 3)) / images[seen.nonzero()[:, 0]].sum((1, 2, 3))[:, None]).sqrt()
    assert (height > 10.5).all() and (height < 19).all() and (rgb == rgb[:, :, :, :1]).all()
    loudest = sound[heard][:, 0, 0].sum(2).argmax(1)
    assert torch.equal(loudest, 2 + 2 * labels[heard.nonzero()[:, 0]])


def test_segments_that_tell_nothing_are_stronger_noise(md):
    clips = md.modality_clips(*md.load_digits(0)[1], seeded())
    for column, x in enumerate(clips.inputs.values()):
        x = x[~clips.told[..., column]]
        assert x.std() == pytest.approx(3 * md.NOISE, rel=0.01) and x.mean().abs() < 0.01


def test_an_epoch_takes_each_digit_once(md):
    digits = torch.arange(70.0), torch.arange(70)
    batches = list(md.epoch_of(lambda images, labels, generator: (images, labels), digits, 70, seeded()))
    assert [len(labels) for _, labels in batches] == [32, 32, 6]
    assert torch.equal(torch.cat([labels for _, labels in batches]).sort().values, digits[1])
    assert all(torch.equal(images, labels.float()) for images, labels in batches)
    assert sum(len(labels) for _, labels in md.epoch_of(lambda *some: some[:2], digits, 40, seeded())) == 40


# What is said about them


def test_wrong_outputs_are_not_timed(md):
    right = torch.tensor([1.0, 2.0])
    calls = []

    def wrong():
        calls.append(1)
        return right * 1.001

    with pytest.raises(RuntimeError, match="off gives a wrong output, with an error of 1e-03: nothing is timed"):
        md.time_all({"right": (lambda: right, right), "off": (wrong, right)}, 0.0)
    assert len(calls) == 1
    found = md.time_all({"right": (lambda: right, right), "near": (lambda: right * (1 + 1e-6), right)}, 0.0)
    assert [row["name"] for row in found["rows"]] == ["right", "near"] and found["spread"] >= 0
    assert found["rows"][0]["error"] == 0 < found["rows"][1]["error"] < 1e-5 and found["rows"][1]["ms"] > 0


def test_tables_average_over_seeds(md):
    def result(seed, accuracy, ms):
        rows = [{"name": "policy", "accuracy": accuracy, "flops": 1e6 * seed, "kept": seed}]
        times = [{"name": "masked", "ms": 10.0, "error": 0.0}, {"name": "decided", "ms": ms, "error": 1e-6}]
        return {"seed": seed, "rows": rows, "inference": {"rows": times, "spread": 0.02}}

    results = [result(2, 0.9, 4.0), result(4, 0.8, 6.0)]
    results[0]["choices"], results[1]["choices"] = {"empty": {"kept": 0.1}}, {"empty": {"kept": 0.2}}
    assert md.choice_table(results, ["kept"]).splitlines()[1].split() == ["empty", "15.0"]
    row = md.quality_table(results, ["kept"]).splitlines()[1]
    assert row.split() == "policy 85.0 +- 5.0 3.00 3.00 90.0 80.0".split()
    head, _, row = md.time_table(results, "inference").splitlines()
    assert "noise 2 %" in head and row.split() == "decided 5.00 2.08 1e-06".split()


# The recipes

STAGES = {
    "arnet": dict(SHOWN=1, ALONE=1, TOGETHER=2, AFTERWARDS=1),
    "adamml": dict(SHOWN=1, ALONE=1, WARM_UP=1, IN_TURNS=1, AFTERWARDS=1),
}
CHOICES = {"arnet": 8, "adamml": 5}  # per clip
FIRST_ROWS = {
    "arnet": ["policy", "all frames at 32, before the policy", "all frames at 32, trained as long"],
    "adamml": ["policy", "all, networks before the policy", "all, networks trained as long"],
}


@pytest.mark.parametrize("system", ["arnet", "adamml"])
def test_the_recipe_runs_and_compares(load, monkeypatch, tmp_path, capsys, system):
    recipe, md = load(f"moving_digits_{system}"), load("moving_digits")
    for name, value in (STAGES[system] | dict(CLIPS_PER_EPOCH=32, TIMED=6, STEP=5, SECONDS=0.0, DRAWS=2)).items():
        monkeypatch.setattr(recipe, name, value)
    few = [part[:40] for part in md.load_digits(0)[1]]
    monkeypatch.setattr(md, "load_digits", lambda seed: (few, few))
    monkeypatch.setattr(sys, "argv", ["recipe", "--seeds", "5", "--output", str(tmp_path)])
    key = "at 32" if system == "arnet" else "rgb"
    md.main(recipe.__doc__, "nowhere", recipe.run_seed, [key])
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert result["seed"] == 5 and result["seconds"]["in all"] > 0
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows)[: len(FIRST_ROWS[system])] == FIRST_ROWS[system] and len(rows) == len(result["rows"])
    assert all(0 <= row["accuracy"] <= 1 for row in rows.values())
    assert rows["random, at the policy's rates"][key] == pytest.approx(rows["policy"][key])
    shares = [choice[key] for choice in result["choices"].values()]
    assert min(shares) * CHOICES[system] <= rows["policy"][key] <= max(shares) * CHOICES[system]
    assert rows["policy of another clip"]["flops"] < rows["policy"]["flops"]
    for what, count in (("inference", 6), ("training", 3)):
        assert len(result[what]["rows"]) == count and all(row["error"] <= 1e-4 for row in result[what]["rows"])
    printed = capsys.readouterr().out
    assert (tmp_path / "table.txt").read_text().strip() in printed and "seed 5: each " in printed


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module, before):
    return [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]


@pytest.mark.parametrize("system", ["arnet", "adamml"])
def test_the_last_stage_leaves_policy_and_statistics(load, monkeypatch, system):
    recipe, md = load(f"moving_digits_{system}"), load("moving_digits")
    monkeypatch.setattr(recipe, "AFTERWARDS", 1)
    net, digits = recipe.make_network(), md.load_digits(0)[1]
    make, train = {
        "arnet": (md.resolution_clips, "train_predictions"),
        "adamml": (md.modality_clips, "train_networks"),
    }[system]
    everything = snapshot(net)
    getattr(recipe, train)(net, partial(md.epoch_of, make, digits, 32, seeded()), md.Progress(0))
    names = changed(net, everything)
    assert names and not any(name.startswith("policy") or "running" in name for name in names)
    assert not any(parameter.requires_grad for parameter in net.policy.parameters())


def test_networks_and_policy_of_adamml_take_turns(load, monkeypatch):
    recipe, md = load("moving_digits_adamml"), load("moving_digits")
    monkeypatch.setattr(recipe, "WARM_UP", 0)
    monkeypatch.setattr(recipe, "IN_TURNS", 1)
    net, digits, states = recipe.make_network(), md.load_digits(0)[1], []

    def batches():
        states.append((snapshot(net.main_net), snapshot(net.policy)))
        return md.epoch_of(md.modality_clips, digits, 32, seeded())

    recipe.train_in_turns(net, batches, seeded(), md.Progress(0))
    (start, policy), (trained, same) = states
    assert any(not torch.equal(start[name], trained[name]) for name in start)
    assert all(torch.equal(policy[name], same[name]) for name in policy)
    assert not changed(net.main_net, trained) and changed(net.policy, policy)


def test_flops_of_the_small_adamml_policy_are_what_it_computes(load):
    recipe, md = load("moving_digits_adamml"), load("moving_digits")
    net = recipe.make_network().eval()
    clip = md.modality_clips(*(part[:1] for part in md.load_digits(0)[1]), seeded())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.policy(clip.inputs)
    flops = recipe.count_flops(net, clip.inputs)
    assert flops.policy == counter.get_total_flops()
    assert flops.dense == net.count_flops(clip.inputs).dense


def test_only_what_is_needed_costs_where_arnet_has_no_policy_to_run(load):
    recipe = load("moving_digits_arnet")
    net = recipe.make_network()
    flops = net.count_flops(torch.zeros(1, 8, 3, 32, 32))
    actions = torch.tensor([[0, 0, 4, 4, 2, 4, 4, 4], [5, 5, 3, 6, 6, 6, 6, 4]])
    expected = [2 * flops.backbone[0] + flops.backbone[2], 3 * flops.features + flops.lite]
    assert recipe.cost_without_policy(flops, actions).tolist() == expected
