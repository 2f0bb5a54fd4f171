"""Policies of AdaShare: logits and draws, policy files, losses that train them."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hostile import Effect

from dynexec.models.adashare_policy import (
    PUBLISHED_POLICIES,
    InstancePolicy,
    TaskPolicy,
    published_policy,
    read_policy,
)
from dynexec.policy import curriculum_mask
from dynexec.policy.sharing import open_untrained, sharing_loss, sparsity_loss


def test_published_policies():
    assert {name: tuple(published_policy(name).shape) for name in PUBLISHED_POLICIES} == {
        "cityscapes_2_tasks_resnet34": (2, 16),
        "nyu_v2_2_tasks_resnet18": (2, 8),
        "nyu_v2_3_tasks_resnet34": (3, 16),
        "taskonomy_5_tasks_resnet34": (5, 16),
    }
    skipped = {name: (~published_policy(name)).nonzero().tolist() for name in PUBLISHED_POLICIES}
    assert skipped["nyu_v2_2_tasks_resnet18"] == [[0, 1], [1, 5]]
    assert skipped["nyu_v2_3_tasks_resnet34"] == [[0, 6], [1, 9], [1, 10], [1, 11], [2, 5], [2, 10], [2, 11]]
    with pytest.raises(ValueError, match="name must be one of cityscapes_2_tasks_resnet34, .*; got 'nyu'"):
        published_policy("nyu")


def test_task_policy():
    policy = TaskPolicy(2, 5)
    assert list(policy.state_dict()) == ["task1_logits", "task2_logits"]
    assert policy().shape == policy(torch.rand(3, 3, 8, 8)).shape == (2, 5, 2)
    with torch.no_grad():
        policy.task1_logits.copy_(torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0], [-3.0, -2.0], [0.1, 0.0]]))
    assert policy.decide()[0].tolist() == [True, False, True, False, True]
    torch.testing.assert_close(policy.probabilities()[0], torch.sigmoid(torch.tensor([2.0, -2.0, 0.0, -1.0, 0.1])))
    policy.probabilities()[0, 1].backward()
    assert (policy.task1_logits.grad[1] != 0).all() and policy.task2_logits.grad.abs().sum() == 0
    with torch.no_grad():
        policy.task2_logits[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        policy.decide()


def test_samples_have_the_policys_probabilities():
    policy = TaskPolicy(2, 4)
    with torch.no_grad():
        policy.task1_logits.copy_(torch.tensor([[9.0, -9.0], [-9.0, 9.0], [1.0, 0.0], [0.0, 0.0]]))
    generator = torch.Generator().manual_seed(3)
    drawn = torch.stack([policy.sample(generator=generator) for _ in range(2000)])
    assert drawn.dtype == torch.bool and drawn.shape == (2000, 2, 4)
    assert drawn[:, 0, 0].all() and not drawn[:, 0, 1].any()
    assert (drawn.float().mean(0) - policy.probabilities()).abs().max() < 0.05
    first, second = (policy.sample(generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)


def test_instance_policy():
    policy = InstancePolicy(2, 5, (4, 4, 6, 8)).eval()
    images = torch.randn(3, 3, 21, 30)
    logits = policy(images)
    assert logits.shape == (3, 2, 5, 2)
    torch.testing.assert_close(policy(images[1:2]), logits[1:2])
    assert torch.equal(policy.decide(images), logits.argmax(-1) == 0)
    first, second = (policy.sample(images, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert first.shape == (3, 2, 5) and torch.equal(first, second)


def test_the_instance_policys_arithmetic():
    """No ReLU after the stem; one block with its shortcut per halving; BatchNorm, ReLU and mean in the end."""
    policy = InstancePolicy(2, 5, (4, 4, 6, 8)).eval()
    norm = lambda x, bn: F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)  # noqa: E731
    for module in policy.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.uniform_(0.2, 1.5)
    x = images = torch.randn(3, 3, 21, 30)
    x = norm(F.conv2d(x, policy.conv1.weight, padding=1), policy.bn1)
    for (block,), ds in zip(policy.blocks, policy.ds):
        y = F.relu(norm(F.conv2d(x, block.conv1.weight, stride=2, padding=1), block.bn1))
        y = norm(F.conv2d(y, block.conv2.weight, padding=1), block.bn2)
        x = F.relu(y + norm(F.conv2d(x, ds[0].weight, stride=2), ds[1]))
    expected = policy.linear(F.relu(norm(x, policy.bn2[0])).mean((2, 3))).reshape(3, 2, 5, 2)
    torch.testing.assert_close(policy(images), expected)


def as_file(decisions):
    return {f"task{t + 1}_policy": torch.stack([row, ~row], 1).long() for t, row in enumerate(decisions)}


@pytest.mark.parametrize("protocol", [4, pickle.HIGHEST_PROTOCOL])
def test_read_policy(tmp_path, protocol):
    decisions = torch.rand(11, 6) < 0.5
    content = as_file(decisions)
    path = tmp_path / "policyIterbest_rs0050.pickle"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    for source in (path, str(path), content, {name: value.float() for name, value in content.items()}):
        result = read_policy(source)
        assert result.dtype == torch.bool and torch.equal(result, decisions)
    with pytest.raises(FileNotFoundError):
        read_policy(tmp_path / "absent.pickle")
    with pytest.raises(TypeError, match="source must be a path or a mapping, got list"):
        read_policy([content])


def test_reading_a_policy_runs_no_code(tmp_path):
    path = tmp_path / "acts.pickle"
    path.write_bytes(pickle.dumps({"task1_policy": Effect(torch.tensor([[1, 0]]))}))
    with pytest.raises(ValueError, match=r"acts.pickle' is not a policy file.*hostile.act is not allowed"):
        read_policy(path)
    storage = tmp_path / "nested.pickle"  # a storage is a file of torch.save inside
    inner = tmp_path / "inner.pt"
    torch.save(Effect(torch.tensor([[1, 0]])), inner)

    class Nested:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (inner.read_bytes(),)

    storage.write_bytes(pickle.dumps({"task1_policy": Nested()}))
    with pytest.raises(ValueError, match="nested.pickle' is not a policy file"):
        read_policy(storage)
    assert not Effect.happened


@pytest.mark.parametrize("content", [b"", b"hello\n", pickle.dumps({"task1_policy": torch.ones(2, 2)})[:-9]])
def test_damaged_policy_files(tmp_path, content):
    path = tmp_path / "damaged.pickle"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged.pickle' is not a policy file, or is damaged"):
        read_policy(path)


ONE = torch.tensor([[1, 0], [0, 1]])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "source must map 'task1_policy', 'task2_policy', ... to tensors, got $"),
        ({"task2_policy": ONE}, "got 'task2_policy'"),
        ({"task1_policy": ONE, 3: ONE}, "got 'task1_policy', 3"),
        ({"task1_policy": [[1, 0]]}, r"task1_policy must be a tensor \[blocks, 2\], got list"),
        ({"task1_policy": torch.ones(3)}, r"task1_policy must be a tensor \[blocks, 2\], got \(3,\)"),
        ({"task1_policy": torch.ones(0, 2)}, r"got \(0, 2\)"),
        ({"task1_policy": torch.ones(3, 2)}, "task1_policy must say 1 0 .run. or 0 1 .skip. for each block"),
        ({"task1_policy": torch.tensor([[0.3, 0.7]])}, "task1_policy must say 1 0"),
        ({"task1_policy": torch.tensor([[2, -1]])}, "task1_policy must say 1 0"),
        ({"task1_policy": ONE, "task2_policy": ONE[:1]}, "task2_policy must say .*, as many as task1_policy"),
    ],
)
def test_bad_policies(source, message):
    with pytest.raises(ValueError, match=message):
        read_policy(source)


def test_a_policy_file_that_holds_no_mapping(tmp_path):
    path = tmp_path / "list.pickle"
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match=r"list.pickle' must map 'task1_policy', .* to tensors, got list"):
        read_policy(path)


def test_sparsity_loss():
    logits = torch.randn(3, 5, 2, requires_grad=True)
    skip = torch.ones(5, dtype=torch.int64)
    expected = sum(F.cross_entropy(task, skip) for task in logits)
    torch.testing.assert_close(sparsity_loss(logits), expected)
    trained = curriculum_mask(5, 1)
    expected = sum(F.cross_entropy(task[-2:], skip[-2:]) for task in logits)
    torch.testing.assert_close(sparsity_loss(logits, trained=trained), expected)
    weights = torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0])
    each = torch.stack([F.cross_entropy(task, skip, reduction="none") for task in logits])
    expected = sum(2 * (weights[-2:] * task[-2:]).mean() for task in each)
    torch.testing.assert_close(sparsity_loss(logits, trained=trained, weighted=True), expected)
    sparsity_loss(logits).backward()
    assert (logits.grad[..., 0] > 0).all() and (logits.grad[..., 1] < 0).all()  # descent skips
    batch = torch.randn(4, 3, 5, 2)
    torch.testing.assert_close(sparsity_loss(batch), torch.stack([sparsity_loss(one) for one in batch]).mean())


def test_sharing_loss():
    logits = torch.tensor([[[1.0, 9.0], [2.0, 0.0]], [[0.0, 0.0], [5.0, 0.0]], [[-1.0, 0.0], [5.0, 0.0]]])
    # |1 - 0| + |1 + 1| + |0 + 1| = 4 in the first layer, 3 + 3 + 0 = 6 in the second
    assert sharing_loss(logits, weighted=False).item() == 10
    assert sharing_loss(logits).item() == 4 * 0.5 + 6
    assert sharing_loss(logits[:1]).item() == 0
    assert sharing_loss(torch.stack([logits, logits[[0, 0, 0]]])).item() == 4
    logits.requires_grad_()
    sharing_loss(logits).backward()
    assert (logits.grad[..., 1] == 0).all() and logits.grad[0, 0, 0] == 1


def test_untrained_layers_run_and_get_no_gradient():
    weights = torch.rand(2, 3, 5, requires_grad=True)
    opened = open_untrained(weights, curriculum_mask(5, 4 // 3))
    assert (opened[..., :3] == 1).all() and torch.equal(opened[..., 3:], weights[..., 3:])
    opened.sum().backward()
    assert weights.grad[0, 0].tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("loss", [sparsity_loss, sharing_loss])
@pytest.mark.parametrize("shape", [(3, 2), (3, 4, 1), (3, 0, 2), (1, 1, 1, 4, 2)])
def test_bad_logits(loss, shape):
    with pytest.raises(ValueError, match=r"logits must have shape \[T, L, 2\] or \[N, T, L, 2\]"):
        loss(torch.zeros(shape))
    with pytest.raises(TypeError, match="logits must be a floating-point tensor"):
        loss(np.zeros(shape))


def test_a_curriculum_of_no_layer():
    with pytest.raises(ValueError, match="trained must hold at least one layer"):
        sparsity_loss(torch.zeros(2, 4, 2), trained=torch.zeros(4, dtype=torch.bool))
