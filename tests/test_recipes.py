"""The recipes on digits run, on less of everything, and their tables say what was measured."""

import json
from dataclasses import replace
from statistics import mean

import pytest
import torch
from example_scripts import load_example, needs_examples

pytest.importorskip("sklearn")

pytestmark = needs_examples


def load_recipe(name, **settings):
    module = load_example(name)
    vars(module).update(TIMING_SECONDS=0.0, **settings)
    return module


def run(module, folder):
    """The results file and the table of a run with one seed; the caller's thread count comes back."""
    threads = torch.get_num_threads()
    try:
        module.main(["--seeds", "0", "--output", str(folder)])
    finally:
        torch.set_num_threads(threads)
    return json.loads((folder / "results.json").read_text()), (folder / "table.txt").read_text()


@pytest.mark.parametrize("name", ["digits_blockdrop", "digits_adashare", "digits_spottune", "moving_digits"])
def test_an_output_that_is_no_folder_is_noticed_before_the_work(name, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["", "--output", str(tmp_path / "file")])
    module, threads = load_recipe(name, run_seed=None), torch.get_num_threads()
    arguments = ("doc", "output", None, {}) if name == "moving_digits" else ()
    try:
        with pytest.raises(FileExistsError, match="file"):
            module.main(*arguments)
    finally:
        torch.set_num_threads(threads)


# SpotTune


@pytest.fixture(scope="module")
def spottune():
    return load_recipe("digits_spottune", PRETRAINING_STEPS=40, STEPS=30, SETTLING_STEPS=10, BLOCKS=(1, 1, 1))


@pytest.fixture(scope="module")
def spottune_results(spottune, tmp_path_factory):
    whole = spottune.load_problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spottune, "load_problem", lambda *args: with_few_tests(whole(*args)))
        return run(spottune, tmp_path_factory.mktemp("spottune"))


def with_few_tests(problem):
    return replace(problem, test=tuple(part[:128] for part in problem.test))


def test_spottune_compares_what_is_adapted(spottune_results):
    results, table = spottune_results
    (outcome,) = results["runs"]
    rows = {row["name"]: row for row in outcome["rows"]}
    assert list(rows) == [
        *("from scratch", "feature extraction", "full fine-tuning"),
        *("SpotTune", "... decisions of another image", "random decisions"),
    ]
    assert all(name in table for name in rows)
    assert all(0 <= row["accuracy"] <= 1 for row in rows.values())
    # Three classes of three images each are soon known by heart.
    assert all(row["losses"][1] < row["losses"][0] for row in rows.values())
    assert rows["from scratch"]["fine_tuned"] is None
    assert rows["feature extraction"]["fine_tuned"] == 0 and rows["full fine-tuning"]["fine_tuned"] == 1
    assert 0 <= rows["SpotTune"]["fine_tuned"] <= 1
    assert rows["feature extraction"]["trained"] == 32 * 3 + 3
    full, control, spot = (rows[name] for name in ("full fine-tuning", "random decisions", "SpotTune"))
    assert full["trained"] == full["parameters"] < control["parameters"] < spot["parameters"]
    assert control["trained"] == full["trained"]  # the second set in place of the first
    policy = spot["parameters"] - control["parameters"]
    assert spot["trained"] == control["trained"] + policy


def test_spottune_runs_one_set_of_weights_per_image(spottune, spottune_results):
    (outcome,) = spottune_results[0]["runs"]
    rows = {row["name"]: row for row in outcome["rows"]}
    flops = outcome["inference"]["flops"]
    one, policy = rows["full fine-tuning"]["flops"], rows["SpotTune"]["flops"] - rows["full fine-tuning"]["flops"]
    stem_and_head = 2 * (16 * 9 * 64 + 32 * 3)
    assert flops["one network"] == one == rows["random decisions"]["flops"] and policy > 0
    assert flops["routed"] == one + policy
    assert flops["both sets, weighted"] == pytest.approx(2 * one - stem_and_head + policy)
    check_times(outcome, ("routed", "frozen", "one network, frozen"))


def check_times(outcome, frozen):
    """Positive, and the outputs behind them were compared."""
    for part, unit, compared in (("inference", "microseconds", frozen), ("training", "milliseconds", ("routed",))):
        assert all(time > 0 for time in outcome[part][unit].values())
        assert sorted(outcome[part]["errors"]) == sorted(compared)
        assert all(0 <= error <= 1e-4 for error in outcome[part]["errors"].values())


def test_the_first_set_of_weights_is_not_trained(spottune):
    torch.manual_seed(0)
    net = spottune.make_network(3, spottune.BLOCKS, spottune.WIDTHS)
    before = [value.clone() for value in net.blocks.state_dict().values()]
    spot = spottune.add_choices(net)
    images, labels = torch.randn(9, 1, 8, 8), torch.arange(9) % 3
    generator = torch.Generator().manual_seed(0)

    def fit(forward, parameters, steps=5, learning_rate=0.1, policy=None):
        data = images, labels
        return spottune.train(forward, parameters, data, steps, learning_rate, generator, lambda x, g: x, policy)

    start = {name: value.clone() for name, value in spot.named_parameters()}
    spottune.train_spottune(spot, fit, generator)
    first = [value for name, value in net.blocks.state_dict().items() if "fine_tuned" not in name]
    assert all(map(torch.equal, first, before))
    moved = {name for name, value in spot.named_parameters() if not torch.equal(value, start[name])}
    assert any("fine_tuned" in name for name in moved) and any(name.startswith("policy") for name in moved)


def test_few_images_are_labelled(spottune):
    problem = spottune.load_problem("digits", 0)
    assert problem.num_classes == 3 and problem.source[1].unique().tolist() == list(range(7))
    assert problem.train[1].bincount().tolist() == [spottune.LABELLED["digits"]] * 3
    images = torch.cat([problem.source[0], problem.train[0], problem.test[0]])
    assert len(images) == 1797 == len(images.flatten(1).unique(dim=0))  # no image is in two parts


def test_faces_are_as_large_as_digits(spottune):
    skimage_data = pytest.importorskip("skimage.data")
    problem = spottune.load_problem("faces", 0)
    assert problem.train[0].shape == (20, 1, 8, 8) and problem.test[0].shape == (180, 1, 8, 8)
    assert problem.train[1].bincount().tolist() == [10, 10] and problem.test[1].bincount().tolist() == [90, 90]
    assert not torch.equal(problem.train[0], spottune.load_problem("faces", 1).train[0])
    patches = torch.tensor(skimage_data.lfw_subset(), dtype=torch.float32)[:, None, :24, :24]
    known = torch.nn.functional.avg_pool2d(patches, 3).flatten(1)
    known = (known - known.mean()) / known.std()
    for images, labels in (problem.train, problem.test):  # the first hundred patches are the faces
        assert torch.equal(torch.cdist(images.flatten(1), known).argmin(1) >= 100, labels == 1)


def test_what_differs_is_not_timed():
    check = load_example("recipe").check_equal
    assert check("same", torch.ones(2), torch.ones(2)) == 0
    for wrong in (torch.tensor([1.0, 1.01]), torch.tensor([1.0, float("nan")])):
        with pytest.raises(RuntimeError, match="routed differs from its reference"):
            check("routed", wrong, torch.ones(2))


# AdaShare


@pytest.fixture(scope="module")
def adashare():
    epochs = {"WARM_UP_EPOCHS": 1, "POLICY_EPOCHS": 2, "EPOCHS": 2}
    return load_recipe("digits_adashare", **epochs, BLOCKS=(1, 2), WIDTHS=(4, 8), SPARSITY=0.5, POLICY_RATE=0.2)


@pytest.fixture(scope="module")
def adashare_results(adashare, tmp_path_factory):
    whole = adashare.load_parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adashare, "load_parts", lambda seed: [(part[0][:256], part[1][:256]) for part in whole(seed)])
        return run(adashare, tmp_path_factory.mktemp("adashare"))


def test_adashare_compares_ways_to_share(adashare, adashare_results):
    results, table = adashare_results
    (outcome,) = results["runs"]
    rows = {row["name"]: row for row in outcome["rows"]}
    assert list(rows) == [
        *("a network per task", "hard sharing", "AdaShare"),
        *("AdaShare, re-trained as published", "... statistics of the test images", "as many blocks by chance"),
    ]
    assert all(name in table for name in rows)
    base = rows["a network per task"]["accuracy"]
    for row in rows.values():
        assert list(row["accuracy"]) == ["digit", "loop", "ink"]
        assert all(0 <= accuracy <= 1 for accuracy in row["accuracy"].values())
        assert row["gain"] == pytest.approx(mean(row["accuracy"][task] / base[task] for task in base) - 1)
        assert row["losses"][1] < row["losses"][0] and row["seconds"] > 0
    learned, chance = rows["AdaShare"]["decisions"], rows["as many blocks by chance"]["decisions"]
    assert rows["AdaShare, re-trained as published"]["decisions"] == learned
    assert list(map(sum, learned)) == list(map(sum, chance))
    assert sum(map(sum, learned)) < 9  # some block is skipped, or the routed times below would show nothing
    check_times(outcome, ("routed", "frozen", "hard sharing, frozen"))


def test_adashare_counts_what_is_shared_once(adashare, adashare_results):
    rows = {row["name"]: row for row in adashare_results[0]["runs"][0]["rows"]}
    net = adashare.make_network(adashare.TASKS.values())
    flops = adashare.count_flops(net, torch.zeros(1, 1, 16, 16))
    heads = sum(flops.head)
    assert rows["a network per task"]["flops"] == 3 * flops.one_pass + heads
    assert rows["hard sharing"]["flops"] == flops.one_pass + heads
    assert rows["hard sharing"]["flops_unshared"] == 3 * flops.one_pass + heads
    assert rows["AdaShare, re-trained as published"]["flops"] == flops.dense
    learned = torch.tensor(rows["AdaShare"]["decisions"], dtype=torch.bool)
    assert rows["AdaShare"]["flops"] == flops.of(learned).item() < rows["AdaShare"]["flops_unshared"]
    assert rows["AdaShare"]["flops_unshared"] == (flops.backbone(learned, shared=False) + heads).item()


def test_tasks_are_about_the_image(adashare):
    (images, labels), validation, test = adashare.load_parts(0)
    assert images.shape == (1077, 1, 16, 16) and len(validation[0]) == len(test[0]) == 360
    digit, loop, ink = labels.T
    assert digit[loop == 1].unique().tolist() == [0, 6, 8, 9] and len(digit[loop == 0].unique()) == 6
    assert (ink.bincount() - 1077 / 4).abs().max() < 10
    amount = images.mean((1, 2, 3))
    assert amount[ink == 0].mean() < amount[ink == 1].mean() < amount[ink == 2].mean() < amount[ink == 3].mean()
