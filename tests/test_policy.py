"""Decisions, rewards, losses and the curriculum of the Bernoulli policy."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynexec import policy


def all_decisions(blocks):
    """Every one of the 2**blocks decision rows."""
    return torch.tensor(list(itertools.product([False, True], repeat=blocks)))


def test_threshold_keeps_from_one_half():
    probabilities = torch.tensor([[0.0, 0.49999, 0.5, 1.0]])
    assert policy.threshold(probabilities).tolist() == [[False, False, True, True]]
    assert policy.threshold(torch.zeros(2, 3)).sum() == 0  # no rule keeps at least one block
    assert policy.threshold(torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("decide", [policy.threshold, policy.sample])
def test_probabilities_are_checked(decide):
    with pytest.raises(ValueError, match=r"probabilities \(2, 2\) hold NaN"):
        decide(torch.tensor([[0.1, 0.2], [0.3, math.nan]]))
    with pytest.raises(TypeError, match="floating-point tensor.*torch.bool"):
        decide(torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="list"):
        decide([[0.5]])


def test_sample_follows_probabilities_and_generator():
    probabilities = torch.tensor([0.0, 0.3, 1.0]).expand(20_000, 3)
    drawn = policy.sample(probabilities, generator=torch.Generator().manual_seed(0))
    again = policy.sample(probabilities, generator=torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.bool
    assert torch.equal(drawn, again)
    assert drawn.double().mean(0).tolist() == pytest.approx([0.0, 0.3, 1.0], abs=0.02)
    bounded = policy.sample(probabilities, generator=torch.Generator().manual_seed(1), exploration=0.8)
    assert bounded.double().mean(0).tolist() == pytest.approx([0.2, 0.38, 0.8], abs=0.02)


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1))
def test_exploration_bounds_probabilities(probability, exploration):
    bounded = policy.explore(torch.tensor(probability, dtype=torch.float64), exploration).item()
    low, high = sorted([exploration, 1 - exploration])
    assert low - 1e-12 <= bounded <= high + 1e-12


def test_exploration_must_be_a_share():
    with pytest.raises(ValueError, match="exploration must be between 0 and 1, got 1.5"):
        policy.explore(torch.tensor([0.5]), 1.5)


@pytest.mark.parametrize("exploration", [1.0, 0.8])
def test_log_probability_is_that_of_a_bernoulli(exploration):
    probabilities = torch.rand(5, 7, dtype=torch.float64) * 0.98 + 0.01
    decisions = torch.rand(5, 7) < 0.5
    expected = torch.distributions.Bernoulli(policy.explore(probabilities, exploration)).log_prob(decisions.double())
    torch.testing.assert_close(policy.log_probability(probabilities, decisions, exploration=exploration), expected)


def test_log_probability_is_finite_at_the_ends():
    probabilities = torch.tensor([[0.0, 1.0, 0.0, 1.0]], requires_grad=True)
    decisions = torch.tensor([[True, False, False, True]])
    result = policy.log_probability(probabilities, decisions)
    result.sum().backward()
    assert result.isfinite().all() and probabilities.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"decisions must be bool \(1, 4\).*torch.float32 \(1, 4\)"):
        policy.log_probability(probabilities, decisions.float())


@pytest.mark.parametrize("penalty", [-1.0, -5.0, -10.0])
def test_reward_table(penalty):
    decisions = torch.tensor([[False] * 4, [True] + [False] * 3, [True, False, True, False], [True] * 4])
    right = policy.usage_reward(decisions, torch.ones(4, dtype=torch.bool), penalty=penalty)
    assert right.tolist() == pytest.approx([1.0, 1 - 1 / 16, 1 - 1 / 4, 0.0])
    wrong = policy.usage_reward(decisions, torch.zeros(4, dtype=torch.bool), penalty=penalty)
    assert wrong.tolist() == [penalty] * 4


def test_reward_errors_name_what_is_wrong():
    decisions = torch.ones(3, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="penalty is the reward of a wrong prediction"):
        policy.usage_reward(decisions, torch.ones(3, dtype=torch.bool), penalty=5.0)
    with pytest.raises(ValueError, match=r"correct must be bool \[N\].*torch.float32 \(3,\)"):
        policy.usage_reward(decisions, torch.ones(3))
    with pytest.raises(ValueError, match="correct must be"):
        policy.usage_reward(decisions, torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"correct must be a bool tensor \[N\], got list"):
        policy.usage_reward(decisions, [True] * 3)
    with pytest.raises(ValueError, match="decisions must be bool .*torch.float32"):
        policy.usage_reward(decisions.float(), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be at most 0, got nan"):
        policy.usage_reward(decisions, torch.ones(3, dtype=torch.bool), penalty=math.nan)


@pytest.mark.parametrize("exploration", [1.0, 0.8])
@pytest.mark.parametrize("with_baseline", [False, True])
def test_expected_reinforce_gradient_is_that_of_the_expected_reward(exploration, with_baseline):
    """Enumerate every decision: the estimator must be unbiased, with and without the self-critical baseline."""
    blocks = 4
    logits = torch.randn(1, blocks, dtype=torch.float64, requires_grad=True)
    decisions = all_decisions(blocks)
    correct = torch.rand(len(decisions)) < 0.6
    reward = policy.usage_reward(decisions, correct, penalty=-2.0).double()

    probabilities = logits.sigmoid().expand(len(decisions), blocks)
    probability = policy.log_probability(probabilities, decisions, exploration=exploration).sum(1).exp()
    assert probability.sum().item() == pytest.approx(1.0)
    (expected,) = torch.autograd.grad(-(probability * reward).sum(), logits)

    baseline = 0.0
    if with_baseline:
        greedy = policy.threshold(logits.detach().sigmoid())
        baseline = reward[(decisions == greedy).all(1)]
    probabilities = logits.sigmoid().expand(len(decisions), blocks)
    losses = policy.reinforce_loss(probabilities, decisions, reward - baseline, exploration=exploration)
    (estimated,) = torch.autograd.grad((probability.detach() * losses).sum(), logits)
    torch.testing.assert_close(estimated, expected)


def test_reinforce_loss_by_hand():
    probabilities = torch.tensor([[0.25, 0.5], [0.9, 0.9]])
    decisions = torch.tensor([[True, False], [False, True]])
    loss = policy.reinforce_loss(probabilities, decisions, torch.tensor([2.0, -1.0]))
    assert loss.tolist() == pytest.approx([-2 * (math.log(0.25) + math.log(0.5)), math.log(0.1) + math.log(0.9)])
    advantage, given = torch.ones(2, requires_grad=True), probabilities.clone().requires_grad_()
    policy.reinforce_loss(given, decisions, advantage).sum().backward()
    assert advantage.grad is None and given.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"advantage must have shape \(2,\), got \(2, 1\)"):
        policy.reinforce_loss(probabilities, decisions, torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"advantage \(2,\) hold NaN"):
        policy.reinforce_loss(probabilities, decisions, torch.tensor([1.0, math.nan]))
    with pytest.raises(TypeError, match=r"advantage must be a floating-point tensor \[N\], got torch.int64"):
        policy.reinforce_loss(probabilities, decisions, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"probabilities must be \[N, L\], got shape \(2,\)"):
        policy.reinforce_loss(probabilities[0], decisions[0], torch.zeros(2))
    with pytest.raises(ValueError, match=r"probabilities must be \[N, L\], got shape \(\)"):
        policy.entropy_term(torch.tensor(0.5))
    with pytest.raises(TypeError, match="probabilities must be a floating-point tensor .* got list"):
        policy.reinforce_loss([[0.5]], decisions, torch.zeros(2))


@pytest.mark.parametrize(
    "use",
    [
        lambda trained: policy.reinforce_loss(
            torch.rand(2, 3), torch.ones(2, 3).bool(), torch.zeros(2), trained=trained
        ),
        lambda trained: policy.entropy_term(torch.rand(2, 3), trained=trained),
        lambda trained: policy.sparsity_loss(torch.zeros(2, 3, 2), trained=trained),
        lambda trained: policy.open_untrained(torch.zeros(2, 3), trained),
    ],
)
def test_trained_must_be_one_bool_per_block(use):
    trained = policy.curriculum_mask(3, 1)
    use(trained)
    for wrong, kind in ((trained.float(), "torch.float32"), ([False, True, True], "list")):
        with pytest.raises(TypeError, match=rf"trained must be a bool tensor \[3\], got {kind}"):
            use(wrong)
    for wrong in (trained[None], trained[:1], torch.tensor(True)):
        with pytest.raises(ValueError, match=r"trained must have shape \(3,\), got"):
            use(wrong)


def test_untrained_blocks_get_no_gradient():
    probabilities = torch.full((3, 4), 0.6, requires_grad=True)
    trained = policy.curriculum_mask(4, 1)
    decisions = policy.force_untrained(torch.zeros(3, 4, dtype=torch.bool), trained)
    assert decisions.tolist() == [[True, True, False, False]] * 3
    policy.curriculum_loss(probabilities, decisions, torch.ones(3), trained=trained).backward()
    assert probabilities.grad[:, :2].abs().sum() == 0
    assert (probabilities.grad[:, 2:] != 0).all()


def test_curriculum_loss_is_reinforce_minus_entropy():
    probabilities = torch.tensor([[0.25, 0.5]])
    decisions = torch.tensor([[True, False]])
    entropy = -(0.25 * math.log(0.25) + 0.5 * math.log(0.5))
    assert policy.entropy_term(probabilities).tolist() == pytest.approx([entropy])
    loss = policy.curriculum_loss(probabilities, decisions, torch.tensor([2.0]), exploration=1.0, entropy=0.1)
    assert loss.item() == pytest.approx(-2 * (math.log(0.25) + math.log(0.5)) - 0.1 * entropy)


def test_finetuning_loss_reaches_policy_and_backbone_apart():
    probabilities = torch.tensor([[0.25, 0.5], [0.7, 0.6]], requires_grad=True)
    logits = torch.zeros(2, 3, requires_grad=True)
    decisions = torch.tensor([[True, False], [True, True]])
    loss = policy.finetuning_loss(
        probabilities, decisions, torch.tensor([1.0, 0.0]), logits, torch.tensor([0, 2]), exploration=1.0
    )
    assert loss.item() == pytest.approx(-math.log(0.25) - math.log(0.5) + math.log(3))
    loss.backward()
    assert (probabilities.grad[0] != 0).all() and (probabilities.grad[1] == 0).all()
    assert logits.grad.abs().sum() > 0


def test_curriculum_opens_the_last_blocks_first():
    assert policy.curriculum_mask(5, 0).tolist() == [False] * 4 + [True]
    assert policy.curriculum_mask(5, 2).tolist() == [False] * 2 + [True] * 3
    assert policy.curriculum_mask(5, 99).tolist() == [True] * 5
    assert [policy.curriculum_mask(5, epoch, blocks_per_epoch=0.5).sum().item() for epoch in range(5)] == [
        1,
        1,
        2,
        2,
        3,
    ]
    with pytest.raises(ValueError, match="at least 0"):
        policy.curriculum_mask(5, -1)


def test_self_critical_reinforce_finds_the_rewarded_decisions():
    """Blocks 0 and 2 are needed, the others only cost: a few hundred steps must say so."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(1, 4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.05)

    def reward(decisions):
        return policy.usage_reward(decisions, decisions[:, 0] & decisions[:, 2], penalty=-1.0)

    for _ in range(200):
        probabilities = logits.sigmoid().expand(32, 4)
        drawn = policy.sample(probabilities, generator=generator, exploration=0.8)
        advantage = reward(drawn) - reward(policy.threshold(probabilities.detach()))
        loss = policy.curriculum_loss(probabilities, drawn, advantage)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert policy.threshold(logits.detach().sigmoid()).tolist() == [[True, False, True, False]]


def test_logits_must_be_a_tensor():
    for function in (policy.draw, lambda logits: policy.gumbel_softmax(logits, 1.0)):
        with pytest.raises(TypeError, match="logits must be a floating-point tensor .* got list"):
            function([0.0, 1.0])
    assert not policy.draw(torch.zeros(3, 2, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([[0.0, math.inf]], r"logits \(1, 2\) hold inf, or -inf for all choices"),
        ([[0.0, 1.0], [-math.inf, -math.inf]], r"logits \(2, 2\) hold inf, or -inf for all choices"),
        ([[0.0, math.nan]], "hold NaN"),
        ([[], []], r"logits must have choices, \[..., choices\], got shape \(2, 0\)"),
        (1.0, "logits must have choices"),
    ],
)
def test_logits_without_a_softmax(logits, message):
    for function in (policy.draw, lambda logits: policy.gumbel_softmax(logits, 1.0)):
        with pytest.raises(ValueError, match=message):
            function(torch.tensor(logits))


def test_a_choice_of_no_probability_is_never_drawn():
    logits = torch.tensor([0.0, -math.inf, 1.0]).expand(1000, 3)
    assert policy.draw(logits).unique().tolist() == [0, 2]
    assert policy.gumbel_softmax(logits, 1.0).isfinite().all()


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
def test_gumbel_softmax_stays_finite_at_extreme_temperatures(temperature):
    logits = torch.tensor([[30.0, -30.0, 0.0]]).expand(100, 3)
    weights = policy.gumbel_softmax(logits, temperature, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([1.0, 0.0, 0.0]) if temperature < 1 else torch.full((3,), 1 / 3)
    torch.testing.assert_close(weights, expected.expand(100, 3))
    for wrong in (0.0, -1.0, 1e-50, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be above 0 and finite in torch.float32"):
            policy.gumbel_softmax(logits, wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gumbel_softmax_draws_in_float32(dtype):
    """In 16 bits noise may be infinite, and ties favour the first choice."""
    logits = torch.randn(1000, 3).to(dtype)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    actual = policy.gumbel_softmax(logits, 0.5, generator=generators[0])
    expected = policy.gumbel_softmax(logits.float(), 0.5, generator=generators[1])
    assert actual.dtype == dtype and torch.equal(actual, expected.to(dtype))


def test_no_temperature_at_no_step():
    with pytest.raises(ValueError, match="step must be at least 0"):
        policy.exponential_temperature(math.nan)
