"""AR-Net's losses."""

import math

import pytest
import torch
import torch.nn.functional as F

from dynexec.policy.efficiency import efficiency_loss, expected_cost, usage_imbalance

WEIGHTS = torch.tensor([[[1.0, 0, 0], [0, 1, 0]], [[1, 0, 0], [1, 0, 0]]])


def test_expected_cost_by_hand():
    assert expected_cost(WEIGHTS, [4.0, 2.0, 0.0]).item() == pytest.approx(4 * 0.75 + 2 * 0.25)
    assert expected_cost(WEIGHTS.double(), torch.tensor([4.0, 2.0, 0.0])).item() == pytest.approx(3.5)


def test_usage_imbalance_by_hand():
    expected = math.sqrt((3 / 4 - 1 / 3) ** 2 + (1 / 4 - 1 / 3) ** 2 + (1 / 3) ** 2)
    assert usage_imbalance(WEIGHTS).item() == pytest.approx(expected)
    assert usage_imbalance(torch.eye(3)[None]).item() == pytest.approx(0, abs=1e-6)
    assert usage_imbalance(2 * WEIGHTS).item() == pytest.approx(expected)  # shares: whatever the weights add up to


@pytest.mark.parametrize("settings", [{}, dict(accuracy=0.9, efficiency=0.1, balance=5.0)])
def test_loss_is_the_published_sum(settings):
    logits, labels = torch.randn(2, 4), torch.tensor([3, 0])
    weights = torch.rand(2, 5, 3)
    costs = [4.088, 0.485, 0.0]
    usage = weights.sum((0, 1)) / weights.sum()
    given = dict(accuracy=0.95, efficiency=0.05, balance=3.0) | settings
    imbalance = (usage - usage.mean()).square().sum().sqrt()
    cost = sum(weights[..., action].mean() * cost for action, cost in enumerate(costs))
    expected = given["accuracy"] * F.cross_entropy(logits, labels)
    expected = expected + given["efficiency"] * (cost + given["balance"] * imbalance)
    torch.testing.assert_close(efficiency_loss(logits, labels, weights, costs, **settings), expected)


def test_gradients_prefer_what_is_cheap_and_rare():
    weights = WEIGHTS.clone().requires_grad_()
    expected_cost(weights, [4.0, 2.0, 0.0]).backward()
    assert weights.grad[0, 0].tolist() == pytest.approx([1.0, 0.5, 0.0])
    weights.grad = None
    usage_imbalance(weights).backward()
    often, seldom, never = weights.grad[0, 0].tolist()
    assert often > seldom > never


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"weights must be a floating-point tensor \[N, T, choices\], got torch.int64"):
        usage_imbalance(WEIGHTS.long())
    with pytest.raises(TypeError, match="got list"):
        expected_cost([[1.0]], [1.0])
    for wrong in (WEIGHTS[0], WEIGHTS[:0]):
        with pytest.raises(ValueError, match="weights must be .*not empty, got shape"):
            usage_imbalance(wrong)
    with pytest.raises(ValueError, match=r"costs must be one per choice, \(3,\), got shape \(2,\)"):
        expected_cost(WEIGHTS, [1.0, 2.0])
