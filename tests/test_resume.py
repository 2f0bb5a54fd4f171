"""An interrupted training goes on bit for bit, and the arguments of policies are checked."""

import errno
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from dynexec import policy
from dynexec.models import blockdrop_resnet, training
from dynexec.models.training import fine_tune, train_dense, train_policy

TRAINERS = {"train_dense": dict(keep=0.5), "train_policy": dict(blocks_per_epoch=0.5), "fine_tune": {}}


class Interrupted(Exception):
    pass


def make(seed=0):
    """A network with dropout, which draws from PyTorch's own generator, and images; the network depends on the seed."""
    torch.manual_seed(seed)
    net = blockdrop_resnet((1, 1, 1), (4, 4, 8), in_channels=1, num_classes=3)
    net.backbone.fc = nn.Sequential(nn.Dropout(0.2), net.backbone.fc)
    net.policy.logit = nn.Sequential(nn.Dropout(0.2), net.policy.logit)
    data = torch.Generator().manual_seed(7)
    return net, torch.randn(20, 1, 8, 8, generator=data), torch.randint(0, 3, (20,), generator=data)


def train(name, net, images, labels, seed=3, own=True, **options):
    """Four epochs of three batches."""
    torch.manual_seed(seed)
    options = {**TRAINERS[name], **options}
    if own:
        options["generator"] = torch.Generator().manual_seed(seed)
    return getattr(training, name)(net, images, labels, epochs=4, batch_size=8, **options)


def stop_at(call):
    """An augmentation that is interrupted at a call of it."""
    calls = iter(range(call))

    def augment(images, generator):
        if next(calls, None) is None:
            raise Interrupted
        return images

    return augment


def assert_equal(actual, expected):
    for name, value in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], value), name


@pytest.mark.parametrize("own", [True, False], ids=["own generator", "PyTorch's"])
@pytest.mark.parametrize("name", TRAINERS)
def test_goes_on_bit_for_bit(name, own, tmp_path):
    expected, images, labels = make()
    history = train(name, expected, images, labels, own=own)
    afterwards = torch.rand(3)
    for calls in (1, 5, 9):  # in the first epoch, in the middle of the second, at the start of the last
        path = tmp_path / f"{calls}.pt"
        with pytest.raises(Interrupted):
            train(name, make()[0], images, labels, own=own, augment=stop_at(calls), checkpoint=path)
        other = make(seed=9)[0]  # what it starts from is in the file
        seen = []
        resumed = train(
            name, other, images, labels, own=own, seed=5, augment=stop_at(12), checkpoint=path, on_epoch=seen.append
        )
        assert resumed == history and seen == history[calls // 3 :]
        assert torch.equal(torch.rand(3), afterwards)
        assert_equal(other, expected)
        assert os.listdir(tmp_path) == [path.name]
        path.unlink()


def test_a_finished_training_is_not_repeated_but_leads_on(tmp_path):
    """The second run finds the first stage finished, and the next ones come to the same end."""
    nets = []
    for _ in range(2):
        net, images, labels = make(seed=len(nets))
        generator = torch.Generator().manual_seed(len(nets))
        options = dict(epochs=2, batch_size=8, generator=generator)
        torch.manual_seed(len(nets))
        train_dense(net, images, labels, checkpoint=tmp_path / "dense.pt", **options)
        train_policy(net, images, labels, **options)
        fine_tune(net, images, labels, **options)
        nets.append(net)
    assert_equal(*nets)


_KILLED = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[2])
import test_resume
net, images, labels = test_resume.make()
save, written = torch.save, []
def killed(state, file):
    written.append(state)
    if len(written) == 4:  # the first epoch is 1
        file.write(b"half a file")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, file)
torch.save = killed
torch.set_num_threads(1)
test_resume.train("train_policy", net, images, labels, checkpoint=sys.argv[1])
"""


def test_killed_in_the_middle_of_writing(tmp_path):
    path = tmp_path / "policy.pt"
    tests = os.path.dirname(__file__)
    result = subprocess.run([sys.executable, "-c", _KILLED, path, tests], capture_output=True, text=True, timeout=60)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert (tmp_path / "policy.pt.part").read_bytes() == b"half a file"
    expected, images, labels = make()
    history = train("train_policy", expected, images, labels)
    net, epochs = make(seed=2)[0], []
    assert train("train_policy", net, images, labels, checkpoint=path, on_epoch=epochs.append) == history
    assert len(epochs) == 2 and os.listdir(tmp_path) == ["policy.pt"]
    assert_equal(net, expected)


def test_a_file_is_replaced_not_written_over(tmp_path):
    path, first = tmp_path / "policy.pt", tmp_path / "first"
    content = []

    def keep(record):
        if record["epoch"] == 0:
            os.link(path, first)  # a second name of the file as it is now
            content.append(path.read_bytes())

    train("train_policy", *make(), checkpoint=path, on_epoch=keep)
    assert first.read_bytes() == content[0] != path.read_bytes()


def test_a_link_to_a_file_on_another_file_system(tmp_path, monkeypatch):
    expected, images, labels = make()
    history = train("train_policy", expected, images, labels)
    (tmp_path / "there").mkdir()
    path, target = tmp_path / "policy.pt", tmp_path / "there" / "policy.pt"
    with pytest.raises(Interrupted):
        train("train_policy", *make(), augment=stop_at(5), checkpoint=target)
    path.symlink_to(target)
    replace = os.replace

    def within_a_folder(source, destination):
        if os.path.dirname(source) != os.path.dirname(destination):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", within_a_folder)
    net = make(seed=9)[0]
    assert train("train_policy", net, images, labels, checkpoint=path) == history
    assert_equal(net, expected)
    assert path.is_symlink() and os.listdir(target.parent) == ["policy.pt"]
    assert sorted(os.listdir(tmp_path)) == ["policy.pt", "there"]


def refused(path, match, net=None, name="train_policy", **options):
    """The training names the file and what is wrong, and leaves file and network alone."""
    content = path.read_bytes()
    made, images, labels = make()
    net = made if net is None else net
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=match) as error:
        train(name, net, images, labels, checkpoint=path, **options)
    assert str(path) in str(error.value) and "left as it is" in str(error.value)
    assert path.read_bytes() == content and os.listdir(path.parent) == [path.name]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_damaged_and_foreign_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "files" / "policy.pt"
    path.parent.mkdir()
    net, images, labels = make()
    train("train_policy", net, images, labels, checkpoint=path)
    whole = path.read_bytes()
    for content in (b"", b"not a checkpoint", whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(content)
        refused(path, "is damaged, or not a file of this training")
    weight = net.backbone.conv1.weight.detach().numpy().tobytes()
    path.write_bytes(whole.replace(weight, weight[:9] + bytes([weight[9] ^ 1]) + weight[10:]))  # one bit
    refused(path, "is damaged: the checksum")
    torch.save(Hostile(), path)
    refused(path, "is damaged, or not a file of this training")
    assert not (tmp_path / "executed").exists()
    for content in (net.state_dict(), [1, 2], {"format": "dynexec.models.training 0"}):
        torch.save(content, path)
        refused(path, "no file of dynexec.models.training, or of another version")
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        train("train_policy", net, images, labels, checkpoint=path)
    with pytest.raises(FileNotFoundError, match="nowhere"):  # before the first epoch, not after it
        train("train_policy", net, images, labels, checkpoint=tmp_path / "nowhere" / "x.pt", augment=stop_at(0))


def test_values_of_the_optimizer_have_a_place_for_each_element(tmp_path):
    """Written to in place, an expanded one would fail in the middle of a step."""
    path = tmp_path / "policy.pt"
    net, images, labels = make()
    train("train_policy", net, images, labels, checkpoint=path)
    saved = torch.load(path, weights_only=True)
    for entry in saved["optimizer"]["state"].values():
        for name, value in entry.items():
            if value.dim() > 1:
                whole, entry[name] = value, value[:1].expand_as(value)
                torch.save(saved, path)
                refused(path, "no file of dynexec.models.training, or of another version")
                entry[name] = whole
    other = make()[0].to(memory_format=torch.channels_last)
    train("train_policy", other, images, labels, checkpoint=tmp_path / "other.pt")
    train("train_policy", other, images, labels, checkpoint=tmp_path / "other.pt")


def test_files_of_another_training(tmp_path):
    path = tmp_path / "policy.pt"
    net, images, labels = make()
    train("train_policy", net, images, labels, checkpoint=path)
    refused(path, "another training: .*stage 'train_policy' there and 'fine_tune' here", name="fine_tune")
    refused(path, r"another training: penalty -1.0 there and -2.0 here", penalty=-2.0)
    refused(path, "was written with generator=, unlike this training", own=False)
    other = blockdrop_resnet((1, 1, 2), (4, 4, 8), in_channels=1, num_classes=3)
    refused(path, r"(?s)another network:.*missing: .*backbone.blocks.2.1.conv1.weight", net=other)
    with pytest.raises(ValueError, match="images 20 there and 19 here"):
        train("train_policy", net, images[:19], labels[:19], checkpoint=path)


def test_settings_may_be_numpy_s(tmp_path):
    rate, penalty = np.float64(1e-3), np.float32(-1.5)
    nets = [make()[0] for _ in range(2)]
    _, images, labels = make()
    options = dict(learning_rate=rate, penalty=penalty, checkpoint=tmp_path / "policy.pt")
    histories = [train("train_policy", net, images, labels, **options) for net in nets]
    assert histories[0] == histories[1]
    assert_equal(*nets)


SETTINGS = [
    ("train_dense", "keep", 1.5, ValueError, "keep must be between 0 and 1, got 1.5"),
    ("train_dense", "keep", "half", TypeError, "keep must be a number, got 'half'"),
    ("train_policy", "blocks_per_epoch", math.inf, ValueError, "blocks_per_epoch must be finite"),
    ("train_policy", "entropy", None, TypeError, "entropy must be a number, got None"),
    ("train_policy", "exploration", 1.2, ValueError, "exploration must be between 0 and 1, got 1.2"),
    ("fine_tune", "penalty", 5.0, ValueError, "must be at most 0, got 5.0"),
    ("fine_tune", "learning_rate", -1.0, ValueError, "learning rate: -1.0"),
]


@pytest.mark.parametrize("name, setting, value, error, message", SETTINGS)
def test_bad_settings_write_no_file(name, setting, value, error, message, tmp_path):
    net, images, labels = make()
    with pytest.raises(error, match=message):
        train(name, net, images, labels, checkpoint=tmp_path / "file.pt", **{setting: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.uint16])
def test_labels_of_any_integers(name, dtype):
    nets = [make()[0] for _ in range(2)]
    _, images, labels = make()
    histories = [train(name, net, images, given) for net, given in zip(nets, (labels, labels.to(dtype)))]
    assert histories[0] == histories[1]
    assert_equal(*nets)
    accuracies = [training.evaluate(nets[0], images, given).accuracy for given in (labels, labels.to(dtype))]
    assert accuracies[0] == accuracies[1]


BAD = [(math.nan, "hold NaN"), (-0.25, "hold -0.25"), (1.5, "hold 1.5"), (math.inf, "hold inf")]


@pytest.mark.parametrize("value, what", BAD)
def test_probabilities_must_be_between_0_and_1(value, what):
    bad = torch.tensor([[0.1, 0.2], [0.3, value]], requires_grad=True)
    kept, advantage = torch.ones(2, 2, dtype=torch.bool), torch.ones(2)
    for use in (
        lambda: policy.threshold(bad),
        lambda: policy.explore(bad, 0.8),
        lambda: policy.sample(bad),
        lambda: policy.sample(bad, exploration=0.5),
        lambda: policy.log_probability(bad, kept),
        lambda: policy.entropy_term(bad),
        lambda: policy.reinforce_loss(bad, kept, advantage),
        lambda: policy.curriculum_loss(bad, kept, advantage),
        lambda: policy.finetuning_loss(bad, kept, advantage, torch.zeros(2, 3), torch.zeros(2).long()),
    ):
        with pytest.raises(ValueError, match=rf"probabilities \(2, 2\) {what}: expected numbers between 0 and 1"):
            use()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_probabilities_of_exactly_0_and_1_are_fine(dtype):
    ends = torch.tensor([[0.0, 1.0]], dtype=dtype)
    assert policy.sample(ends).tolist() == policy.threshold(ends).tolist() == [[False, True]]
    assert policy.explore(ends, 0.75).tolist() == [[0.25, 0.75]]
    assert policy.sample(ends[:0]).shape == (0, 2)


def test_decisions_that_require_grad():
    soft = torch.full((2, 3), 0.5, requires_grad=True)
    for use in (
        lambda: policy.log_probability(soft.detach(), soft),
        lambda: policy.force_untrained(soft, policy.curriculum_mask(3, 0)),
    ):
        with pytest.raises(ValueError, match="decisions must be bool .*, got torch.float32 .*which require grad"):
            use()


def test_curriculum_arguments():
    kept, trained = torch.ones(2, 3, dtype=torch.bool), policy.curriculum_mask(3, 0)
    for arguments in ((3, math.nan), (3, -1)):
        with pytest.raises(ValueError, match="epoch and blocks_per_epoch must be finite and at least 0"):
            policy.curriculum_mask(*arguments)
    for rate in (math.nan, math.inf, -0.5):
        with pytest.raises(ValueError, match="epoch and blocks_per_epoch must be finite and at least 0"):
            policy.curriculum_mask(3, 2, blocks_per_epoch=rate)
    with pytest.raises(ValueError, match="num_blocks must be at least 1, got 0"):
        policy.curriculum_mask(0, 1)
    with pytest.raises(ValueError, match=r"decisions must be bool \(N, 3\), got torch.bool \(2, 2\)"):
        policy.force_untrained(kept[:, :2], trained)
    with pytest.raises(ValueError, match=r"trained must be bool \[L\], got shape \(1, 3\)"):
        policy.force_untrained(kept, trained[None])
    for wrong in (trained.float(), [False, True, True]):
        with pytest.raises(TypeError, match=r"trained must be a bool tensor \[L\], got"):
            policy.force_untrained(kept, wrong)


def test_keep_rates():
    decisions = torch.tensor([[True, False, True], [True, False, False]])
    rates = policy.keep_rates(decisions)
    assert rates == {
        "keep_rate": 0.5,
        "keep_rate/block_0": 1.0,
        "keep_rate/block_1": 0.0,
        "keep_rate/block_2": 0.5,
    }
    assert policy.keep_rates(decisions[1])["keep_rate"] == pytest.approx(1 / 3)
    with pytest.raises(TypeError, match="decisions must be a bool tensor .*, got torch.float32"):
        policy.keep_rates(decisions.float())
    for empty in (decisions[:0], decisions[:, :0], decisions[None]):
        with pytest.raises(ValueError, match="decisions must be"):
            policy.keep_rates(empty)
