"""SubsetDropPath: the outputs and gradients of DropPath under the same draws, from the kept samples alone."""

import copy
import pickle
from functools import partial

import pytest
import torch
from drop_path_toys import ALMOST_0, ALMOST_1, DropPath, assert_same
from torch import nn
from torch.utils.checkpoint import checkpoint

from dynexec.nn import SubsetDropPath
from dynexec.nn.drop_path import draw_samples


def tokens_branch():
    return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)).double()


def maps_branch():
    return nn.Sequential(
        nn.Conv2d(6, 9, 3, padding=1), nn.GroupNorm(3, 9), nn.ReLU(inplace=True), nn.Conv2d(9, 6, 1)
    ).double()


def tokens(n):
    return torch.randn(n, 7, 6).double()


def maps(n, layout=torch.contiguous_format):
    return torch.randn(n, 6, 5, 3).double().contiguous(memory_format=layout)


KINDS = {
    "tokens": (tokens_branch, tokens),
    "maps": (maps_branch, maps),
    "channels_last": (maps_branch, partial(maps, layout=torch.channels_last)),
}


def results(function, x, branch):
    """The output, and the gradients of input and parameters."""
    branch.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in branch.parameters())]


def masked(x, branch, keep, scale):
    """What stochastic depth is, all samples computed."""
    return x + branch(x) * (keep.to(x.dtype) * scale).reshape(-1, *[1] * (x.dim() - 1))


@pytest.mark.parametrize("call", ["module", "function"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_drop_path_with_the_same_seed(kind, call):
    make, batch = KINDS[kind]
    branch, seen = make(), []
    branch[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    given = branch if call == "module" else lambda rows: branch(rows)
    for n in (0, 1, 2, 5):
        for rate in (0.0, 0.3, 0.5, ALMOST_0, ALMOST_1):
            subset, dense, x = SubsetDropPath(rate), DropPath(rate), batch(n)
            for seed in range(4):
                torch.manual_seed(seed)
                expected = results(lambda x: x + dense(branch(x)), x, branch)  # noqa: B023
                torch.manual_seed(seed)
                kept = int(draw_samples(n, rate)[0].sum()) if rate else n
                torch.manual_seed(seed)
                seen.clear()
                actual = results(lambda x: subset(x, given), x, branch)  # noqa: B023
                assert_same(actual, expected)
                assert seen == ([] if kept == 0 and call == "module" and rate else [kept])
                assert n < 2 or actual[0].stride() == x.stride()


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_draw(kind):
    make, batch = KINDS[kind]
    branch, seen = make(), []
    branch[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    for n, rate, count in ((1, 0.9, 1), (2, 0.1, 2), (4, 0.5, 2), (7, 0.4, 4), (7, ALMOST_1, 1), (5, ALMOST_0, 5)):
        x, generator = batch(n), torch.Generator().manual_seed(n)
        subset = SubsetDropPath(rate, draw="fixed", generator=copy.deepcopy(generator))
        for _ in range(3):
            actual = results(lambda x: subset(x, branch), x, branch)  # noqa: B023
            assert seen == [count]
            keep = torch.randperm(n, generator=generator) < count
            assert_same(actual, results(lambda x: masked(x, branch, keep, n / count), x, branch))  # noqa: B023
            seen.clear()
    assert SubsetDropPath(0.5, draw="fixed")(batch(0), branch).shape == batch(0).shape


@pytest.mark.parametrize("draw", ["bernoulli", "fixed"])
def test_expectation_and_frequency(draw):
    x, n, draws = torch.ones(5, 2), 5, 4000
    subset = SubsetDropPath(0.4, draw=draw, generator=torch.Generator().manual_seed(1))
    outputs = torch.stack([subset(x, lambda rows: 3 * rows) for _ in range(draws)])[..., 0]
    keep = 3 / 5  # as it happens for both draws
    assert {round(value, 4) for value in outputs.unique().tolist()} == {1.0, 6.0}
    deviation = 5 * (keep * (1 - keep) / draws) ** 0.5
    assert ((outputs > 1).double().mean(0) - keep).abs().max() < deviation
    assert (outputs.mean(0) - (x[:, 0] + 3)).abs().max() < deviation * 5
    together = ((outputs[:, 0] > 1) & (outputs[:, 1] > 1)).double().mean()
    expected = keep**2 if draw == "bernoulli" else 3 / n * 2 / (n - 1)
    assert abs(together - expected) < deviation


def test_evaluation_and_rate_0_are_the_plain_sum():
    branch, x = tokens_branch(), tokens(3)
    expected = x + branch(x)
    state = torch.get_rng_state()
    for subset in (SubsetDropPath(0.5).eval(), SubsetDropPath(), SubsetDropPath(0.0, draw="fixed")):
        assert torch.equal(subset(x, branch), expected)
        assert subset(x) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_rate_set_by_a_schedule():
    branch, x, subset = tokens_branch(), tokens(4), SubsetDropPath(0.0)
    subset.drop_prob = ALMOST_1
    assert torch.equal(subset(x, branch), x)
    subset.drop_prob = 1.0
    with pytest.raises(ValueError, match="drop_prob must be 0 <= drop_prob < 1, got 1.0"):
        subset(x, branch)


def test_a_branch_that_ran_already_makes_it_drop_path():
    y = maps(5)
    for rate in (0.0, 0.5, ALMOST_1):
        torch.manual_seed(2)
        expected = DropPath(rate)(y)
        torch.manual_seed(2)
        assert torch.equal(SubsetDropPath(rate)(y), expected)
    keep = SubsetDropPath(0.5, draw="fixed")(torch.ones(6, 2))
    assert sorted(keep[:, 0].tolist()) == [0, 0, 0, 2, 2, 2] and torch.equal(keep[:, 0], keep[:, 1])


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"drop_prob": 1}, "drop_prob must be 0 <= drop_prob < 1, got 1"),
        ({"drop_prob": -0.1}, "got -0.1"),
        ({"drop_prob": float("nan")}, "got nan"),
        ({"drop_prob": "0.1"}, "drop_prob must be a number, got str"),
        ({"drop_prob": None}, "drop_prob must be a number, got NoneType"),
        ({"draw": "gumbel"}, "draw must be one of .*'bernoulli', 'fixed'.*, got 'gumbel'"),
        ({"generator": 3}, "generator must be a torch.Generator or None, got int"),
    ],
)
def test_argument_errors(arguments, error):
    with pytest.raises((TypeError, ValueError), match=error):
        SubsetDropPath(**arguments)


def test_what_a_branch_must_give():
    x = tokens(4)
    for rate in (0.0, 0.5, ALMOST_0):
        with pytest.raises(ValueError, match=r"branch must give \(\d, 7, 6\), .* got \(\d, 2, 6\)"):
            SubsetDropPath(rate, draw="fixed")(x, lambda rows: rows[:, :2])
        torch.manual_seed(0)
        actual = SubsetDropPath(rate, draw="fixed")(x, lambda rows: rows[:, :1])  # which the addition broadcasts
        torch.manual_seed(0)
        expected = SubsetDropPath(rate, draw="fixed")(x, lambda rows: rows[:, :1].repeat(1, 7, 1))
        assert torch.equal(actual, expected)
        with pytest.raises(TypeError, match="branch must give a tensor, got tuple"):
            SubsetDropPath(rate, draw="fixed")(x, lambda rows: (rows,))


def test_no_gradient_is_lost_and_the_input_is_untouched():
    for rate in (ALMOST_1, 0.5, ALMOST_0):
        branch, x = maps_branch(), maps(4)
        untouched, subset = x.clone(), SubsetDropPath(rate)
        y = subset(x, branch)
        torch.relu_(y.square()).sum().backward()
        assert all(parameter.grad is not None for parameter in branch.parameters())
        with torch.no_grad():
            torch.relu_(subset(x, branch))
        assert torch.equal(x, untouched)


@pytest.mark.parametrize("draw", ["bernoulli", "fixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, draw):
    make, batch = KINDS[kind]
    branch = make()

    def function(x, *parameters):
        subset = SubsetDropPath(0.5, draw=draw, generator=torch.Generator().manual_seed(3))
        return subset(x, branch)

    x = batch(3)[..., :2, :].contiguous() if kind == "tokens" else batch(3)[..., :2]
    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *branch.parameters()), fast_mode=True)


def test_seeds():
    branch, x = tokens_branch(), tokens(16)
    for draw in ("bernoulli", "fixed"):
        first, second, other = (
            SubsetDropPath(0.5, draw=draw, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
        )
        state = torch.get_rng_state()
        outputs = [first(x, branch), first(x, branch)]
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(second(x, branch), outputs[0]) and not torch.equal(outputs[0], outputs[1])
        assert not torch.equal(other(x, branch), outputs[0])
        for copied in (copy.deepcopy(second), pickle.loads(pickle.dumps(second))):
            assert torch.equal(copied(x, branch), outputs[1])
            assert (copied.drop_prob, copied.draw) == (0.5, draw)
    assert not SubsetDropPath(0.5).state_dict()
    assert repr(SubsetDropPath(0.25)) == "SubsetDropPath(drop_prob=0.25, draw='bernoulli')"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("draw", ["bernoulli", "fixed"])
def test_activation_checkpointing_draws_the_same_again(draw, reentrant):
    branch, subset = tokens_branch(), SubsetDropPath(0.5, draw=draw)
    noisy = nn.Sequential(nn.Dropout(0.5), branch)
    x = tokens(6)

    def twice(x):
        return subset(subset(x, noisy), noisy)

    torch.manual_seed(3)
    expected = results(twice, x, branch)
    torch.manual_seed(3)
    assert_same(results(lambda x: checkpoint(twice, x, use_reentrant=reentrant), x, branch), expected)
    subset.generator = torch.Generator().manual_seed(0)
    with pytest.raises(RuntimeError, match="generator must be None under activation checkpointing"):
        results(lambda x: checkpoint(twice, x, use_reentrant=reentrant), x, branch)


@pytest.mark.parametrize("rate", [0.5, ALMOST_0, ALMOST_1])
def test_autocast(rate):
    branch, x = tokens_branch().float(), tokens(6).float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        expected = results(lambda x: x + DropPath(rate)(branch(x)), x, branch)
        torch.manual_seed(1)
        actual = results(lambda x: SubsetDropPath(rate)(x, branch), x, branch)
    assert actual[0].dtype == expected[0].dtype == torch.float32
    assert_same(actual, expected, 0.05)


def test_batch_norm_sees_kept_samples_only():
    branch, x = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)).double(), maps(5)
    twin, subset = copy.deepcopy(branch), SubsetDropPath(0.4, draw="fixed")
    torch.manual_seed(0)
    keep, scale = draw_samples(5, 0.4, "fixed")
    torch.manual_seed(0)
    actual = results(lambda x: subset(x, branch), x, branch)
    assert_same(actual, results(lambda x: x.index_add(0, keep.nonzero()[:, 0], twin(x[keep]) * scale), x, twin))
    assert_same(branch.buffers(), twin.buffers())
    running = copy.deepcopy(branch[1]).state_dict()
    assert torch.equal(SubsetDropPath(ALMOST_1)(x, branch), x)  # no statistics of no samples
    assert_same(branch[1].state_dict().values(), running.values())
    message = "the branch got 1 of 2 samples, which give its BatchNorm one value per channel"
    with pytest.raises(ValueError, match=message):
        SubsetDropPath(0.5, draw="fixed")(x[:2, :, :1, :1], branch)


@pytest.mark.parametrize("draw", ["bernoulli", "fixed"])
def test_compiled_it_computes_all_and_masks(draw):
    torch._dynamo.reset()
    branch, subset, seen = tokens_branch(), SubsetDropPath(0.25, draw=draw), []

    def spy(graph, inputs):
        seen.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: subset(x, branch), fullgraph=True, backend=spy, dynamic=True)
    for n in (8, 12):
        x, scale = tokens(n).requires_grad_(), 4 / 3
        y, full = compiled(x), x + branch(x) * scale
        kept = (y - x).flatten(1).abs().sum(1) > 1e-12
        assert_same([y], [torch.where(kept[:, None, None], full, x)])
        assert 0 < kept.sum() <= n if draw == "bernoulli" else kept.sum() == n * 3 // 4
        y.sum().backward()
    assert len(seen) <= 2 and all(parameter.grad is not None for parameter in branch.parameters())
    subset.generator = torch.Generator()
    with pytest.raises(Exception, match="generator must be None where the forward is traced"):
        compiled(x)
    torch._dynamo.reset()


def test_meta_tensors_have_shapes():
    branch, x = tokens_branch().to("meta"), tokens(4).to("meta")
    for draw in ("bernoulli", "fixed"):
        assert SubsetDropPath(0.5, draw=draw)(x, branch).shape == x.shape


@pytest.mark.parametrize("rate", [0.0, ALMOST_0, 0.5])
def test_a_branch_that_overwrites_its_input_is_refused(rate):
    branch = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6)).double()
    drop_path = SubsetDropPath(rate, draw="fixed")
    x = tokens(4)
    with pytest.raises(ValueError, match="branch must not write to its input"):
        drop_path(x, branch)
