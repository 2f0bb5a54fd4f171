"""The training loop, on problems small enough to know the answer, and the digits recipe around it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dynexec.models import blockdrop_resnet, digits, training
from dynexec.nn import DynamicNetwork, ResidualBlock, assign_columns


class Flip(ResidualBlock):
    """Block that adds ``-2 x``: a kept one turns the sign of what follows."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(-2.0))

    def residual_layers(self):
        return [lambda x: self.scale * x]

    def activation_layer(self):
        return None

    def forward_dense(self, x):
        return x + self.scale * x


class SignNetwork(nn.Module):
    """Predicts class 1 where the first feature, its sign turned by each kept block, is positive."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(Flip() for _ in range(blocks))
        assign_columns(self)

    def forward(self, x):
        x = x[:, :1]
        for block in self.blocks:
            x = block(x)
        return torch.cat([-x, x], 1)


@pytest.fixture
def problem():
    """Labels call for turning the sign where the second feature is positive: decisions must follow the image."""
    torch.manual_seed(0)
    images = torch.randn(256, 2)
    labels = ((images[:, 0] > 0) ^ (images[:, 1] > 0)).long()
    policy = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2), nn.Sigmoid())
    return DynamicNetwork(SignNetwork(2), policy), images, labels


def test_the_policy_learns_to_decide_by_the_image(problem):
    net, images, labels = problem
    before = {name: value.clone() for name, value in net.backbone.state_dict().items()}
    records = []
    history = training.train_policy(
        net, images, labels, epochs=40, batch_size=64, learning_rate=2e-2,
        generator=torch.Generator().manual_seed(0), on_epoch=records.append,
    )  # fmt: skip
    assert history == records and [record["epoch"] for record in history] == list(range(40))
    assert all(torch.equal(value, before[name]) for name, value in net.backbone.state_dict().items())
    result = training.evaluate(net, images, labels, batch_size=100)
    assert result.accuracy > 0.9
    turned = result.decisions.sum(1)
    assert (turned == (images[:, 1] > 0)).double().mean() > 0.9  # one block where needed, none elsewhere
    assert result.kept == pytest.approx(turned.double().mean().item())
    assert history[-1]["reward"] > history[0]["reward"]


@pytest.mark.parametrize("train", [training.train_policy, training.fine_tune])
def test_without_a_policy_there_is_nothing_to_train(problem, train):
    net, images, labels = problem
    with pytest.raises(ValueError, match="net must have a policy to train, got net.policy=None"):
        train(DynamicNetwork(net.backbone), images, labels, epochs=1)
    with pytest.raises(TypeError, match="net must be a DynamicNetwork, got SignNetwork"):
        train(net.backbone, images, labels, epochs=1)


@pytest.mark.parametrize("train", [training.train_dense, training.train_policy, training.fine_tune])
def test_arguments_of_trainers(problem, train):
    net, images, labels = problem
    with pytest.raises(TypeError, match="net must be a DynamicNetwork, got Linear"):
        train(torch.nn.Linear(1, 1), images, labels, epochs=1)
    for x, y in ((images[:0], labels[:0]), (images[:3], labels)):
        with pytest.raises(ValueError, match=f"equally many, at least one, got {len(x)} and {len(y)}"):
            train(net, x, y, epochs=1)
    for error, message, options in [
        (ValueError, "epochs must be at least 0, got -1", {"epochs": -1}),
        (TypeError, "epochs must be an int, got 1.5", {"epochs": 1.5}),
        (ValueError, "batch_size must be at least 1, got 0", {"epochs": 1, "batch_size": 0}),
        (TypeError, "batch_size must be an int, got 8.0", {"epochs": 1, "batch_size": 8.0}),
    ]:
        with pytest.raises(error, match=message):
            train(net, images, labels, **options)


def test_evaluation_counts_one_label_and_one_row_of_decisions_per_image(problem):
    net, images, labels = problem
    images, labels = images[:50], labels[:50]
    decisions = torch.ones(50, 2, dtype=torch.bool)
    for error, message, arguments in [
        (ValueError, r"labels must be integers \[N\], got torch.int64 of shape \(50, 1\)", (images, labels[:, None])),
        (ValueError, r"labels must be integers \[N\], got torch.float32", (images, labels.float())),
        (ValueError, r"labels must be integers \[N\], got torch.complex64", (images, labels.to(torch.complex64))),
        (ValueError, "equally many, at least one, got 50 and 1", (images, labels[:1])),
        (ValueError, "equally many, at least one, got 50 and 70", (images, torch.cat([labels, labels[:20]]))),
        (ValueError, "equally many, at least one, got 0 and 0", (images[:0], labels[:0])),
        (TypeError, "images and labels must be tensors, got Tensor and list", (images, labels.tolist())),
        (
            ValueError,
            "one row per image, 50, got \\(99, 2\\)",
            (images, labels, torch.cat([decisions, decisions[:49]])),
        ),
        (TypeError, "decisions must be a bool tensor .* got list", (images, labels, decisions.tolist())),
    ]:
        with pytest.raises(error, match=message):
            training.evaluate(net, *arguments, batch_size=25)
    for batch_size in (-1, 0):
        with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
            training.evaluate(net, images, labels, batch_size=batch_size)


def test_policy_training_leaves_the_backbone_s_batch_statistics_alone():
    net = blockdrop_resnet((1, 1), (4, 8), num_classes=3)
    before = {name: value.clone() for name, value in net.backbone.state_dict().items()}
    labels = torch.randint(0, 3, (8,))
    training.train_policy(net, torch.randn(8, 3, 8, 8), labels, epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in net.backbone.state_dict().items())
    training.fine_tune(net, torch.randn(8, 3, 8, 8), labels, epochs=1)
    assert net.backbone.bn1.num_batches_tracked == 2  # the thresholded and the drawn path


def test_the_curriculum_keeps_earlier_blocks_on(problem):
    net, images, labels = problem
    nn.init.constant_(net.policy[2].bias, -5.0)  # drops all it may
    net.policy[2].weight.data.zero_()
    history = training.train_policy(net, images, labels, epochs=1, learning_rate=0.0)
    assert history[0]["kept"] == 1.0


@pytest.mark.parametrize("train, loss", [("train_policy", "curriculum_loss"), ("fine_tune", "finetuning_loss")])
def test_the_advantage_is_over_the_thresholded_policy(problem, monkeypatch, train, loss):
    """Both rewards are 1 - (share of blocks kept)^2 where the prediction is right, and else the penalty."""
    net, images, labels = problem
    real, seen = getattr(training, loss), []

    def record(probabilities, drawn, advantage, *args, **options):
        seen.append((probabilities.detach(), drawn, advantage))
        return real(probabilities, drawn, advantage, *args, **options)

    def reward(decisions):
        kept = decisions.double().mean(1)
        right = net(images, decisions).argmax(1) == labels
        return torch.where(right, 1 - kept.square(), -3.0)

    monkeypatch.setattr(training, loss, record)
    monkeypatch.setattr(torch, "randperm", lambda n, generator=None: torch.arange(n))
    options = dict(epochs=1, penalty=-3.0, learning_rate=0.0, batch_size=len(images))
    getattr(training, train)(net, images, labels, **options)
    ((probabilities, drawn, advantage),) = seen
    greedy = probabilities >= 0.5
    if train == "train_policy":
        greedy[:, 0] = True  # the first epoch trains the last block
    assert (drawn != greedy).any()
    torch.testing.assert_close(advantage.double(), reward(drawn) - reward(greedy))


def test_fine_tuning_moves_policy_and_backbone(problem):
    net, images, labels = problem
    before = {name: value.clone() for name, value in net.named_parameters()}
    training.fine_tune(net, images, labels, epochs=1, generator=torch.Generator().manual_seed(0))
    assert all(not torch.equal(value, before[name]) for name, value in net.named_parameters())


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_dense_training_leaves_the_policy(problem, keep):
    net, images, labels = problem
    before = {name: value.clone() for name, value in net.policy.state_dict().items()}
    scale = net.backbone.blocks[0].scale.item()
    history = training.train_dense(net, images, labels, epochs=2, keep=keep, learning_rate=0.01)
    assert all(torch.equal(value, before[name]) for name, value in net.policy.state_dict().items())
    assert net.backbone.blocks[0].scale.item() != scale
    assert len(history) == 2 and 0 <= history[1]["accuracy"] <= 1


def test_training_repeats_with_its_generator(problem):
    net, images, labels = problem
    start = {name: value.clone() for name, value in net.state_dict().items()}
    results = []
    for _ in range(2):
        net.load_state_dict(start)
        options = dict(generator=torch.Generator().manual_seed(5), augment=lambda x, g: x + torch.rand(1, generator=g))
        results.append(training.train_policy(net, images, labels, epochs=2, **options))
    assert results[0] == results[1]


@pytest.mark.parametrize("training_mode", [True, False])
def test_evaluation_restores_modes_and_takes_decisions(problem, training_mode):
    net, images, labels = problem
    net.train(training_mode)
    result = training.evaluate(net, images, labels, torch.tensor([True, False]), batch_size=60)
    assert result.accuracy == pytest.approx(((images[:, 0] < 0).long() == labels).double().mean().item())
    assert result.decisions.shape == (256, 2) and result.kept == 1.0
    assert net.training == training_mode


def test_digits_split():
    pytest.importorskip("sklearn")
    data, again, other = digits.load_digits(0), digits.load_digits(0), digits.load_digits(1)
    assert [len(part[1]) for part in (data.train, data.validation, data.test)] == [1077, 360, 360]
    assert torch.equal(data.test[0], again.test[0]) and not torch.equal(data.test[0], other.test[0])
    assert data.train[0].mean().abs() < 1e-5 and data.train[0].std() == pytest.approx(1.0)
    everything = torch.cat([part[0] for part in (data.train, data.validation, data.test)])
    assert len(everything.flatten(1).unique(dim=0)) == len(everything)  # no image is in two parts


def test_shift_moves_by_at_most_a_pixel():
    empty = torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long)
    data = digits.Digits(empty, empty, empty, background=-1.0)
    images = torch.full((500, 1, 8, 8), -1.0)
    images[:, :, 3, 4] = 2.0
    shifted = data.shift(images, torch.Generator().manual_seed(0))
    assert shifted.shape == images.shape and (shifted == 2).sum() == 500
    places = {tuple(place) for place in (shifted[:, 0] == 2).nonzero()[:, 1:].tolist()}
    assert places == {(row, column) for row in (2, 3, 4) for column in (3, 4, 5)}
    assert digits.Digits(empty, empty, empty, 0.0).shift(images[:0], None).shape == (0, 1, 8, 8)


def test_the_recipe_runs_and_compares(monkeypatch):
    """A network of two blocks, one epoch each, so that every row is made; figures come from the example."""
    pytest.importorskip("sklearn")
    for name, value in dict(BLOCKS=(1, 1), WIDTHS=(4, 4), POLICY_WIDTHS=(2, 2), FINE_TUNING_EPOCHS=1).items():
        monkeypatch.setattr(digits, name, value)
    for name in ("train_dense", "train_policy", "fine_tune"):
        train = getattr(training, name)
        once = SimpleNamespace(train=train)
        monkeypatch.setattr(digits, name, lambda *args, once=once, **kw: once.train(*args, **{**kw, "epochs": 1}))
    whole, seen = digits.load_digits(0), []
    few = [(images[:100], labels[:100]) for images, labels in (whole.train, whole.validation, whole.test)]
    data = digits.Digits(*few, whole.background)
    trained = digits.train_digits(data, on_epoch=lambda stage, record: seen.append(stage))
    assert seen == ["network", "policy", "fine-tuning"] == list(trained.seconds)
    rows = {row["name"]: row for row in digits.compare_digits(trained, data, draws=2)}
    assert len(rows) == 8
    assert rows["all blocks on"]["kept"] == 2 and rows["all blocks on"]["saving"] == 0
    policy = rows["policy"]
    assert policy["accuracy"] == training.evaluate(trained.net, *data.test).accuracy
    assert rows["random, same number"]["kept"] == policy["kept"] == rows["policy of another image"]["kept"]
    assert policy["saving"] < rows["policy of another image"]["saving"]  # the policy is charged
    dense = trained.dense.backbone.state_dict()
    assert not torch.equal(trained.net.backbone.state_dict()["conv1.weight"], dense["conv1.weight"])
