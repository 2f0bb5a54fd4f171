"""decide: whose decisions hold where, and what is said about wrong ones."""

import threading
from contextlib import nullcontext

import pytest
import torch
import toys
from torch.utils.checkpoint import checkpoint
from toys import Policy, converted, run

import dynexec
from dynexec import ops
from dynexec.nn import DynamicNetwork, active_route


def assert_close(actual, expected):
    tolerance = 1e-12 if expected.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["exact", "capacity"])
def test_shared_decisions_routes_and_empty_batches(mode):
    model, twin, num_blocks = converted()
    x = toys.images(3)
    row = torch.rand(num_blocks) < 0.5
    decisions = row.expand(3, -1)
    expected = toys.naive_forward(twin, x, decisions).detach()
    assert_close(run(model, x, row, mode), expected)
    for route in (
        dynexec.Route.from_decisions(decisions),
        dynexec.Route.from_decisions(decisions, exact=False),
        dynexec.Route.from_decisions(decisions.int()),
    ):
        assert_close(run(model, x, route, mode), expected)
    shared = dynexec.decide(row, mode=mode)
    for n in (2, 5, 0, 1):  # one object, batches of any size
        with torch.no_grad(), shared:
            assert model(toys.images(n)).shape == (n, 5)
    for empty in (torch.zeros(0, num_blocks).bool(), row):
        assert run(model, toys.images(0), empty, mode).shape == (0, 5)


@pytest.mark.parametrize(
    "decisions, error, message",
    [
        (torch.rand(4, 5), TypeError, r"bool \[N, L\] or \[L\], got torch.float32 \(4, 5\); threshold"),
        (torch.full((4, 5), torch.nan), TypeError, "these hold NaN"),
        (torch.ones(4, 5, dtype=torch.int64), TypeError, r"got torch.int64 \(4, 5\); use decisions.bool\(\)"),
        (torch.ones(4, 5, dtype=torch.complex64), TypeError, "got torch.complex64"),
        ([[True] * 5] * 4, TypeError, "must be a bool tensor .*, got list"),
        (None, TypeError, "got NoneType"),
        (torch.ones(4, 5, 1).bool(), ValueError, r"shape \[N, L\] or \[L\], got \(4, 5, 1\)"),
        (torch.tensor(True), ValueError, r"shape \[N, L\] or \[L\], got \(\)"),
        (torch.ones(4, 6).bool(), ValueError, r"6 columns \(shape \(4, 6\)\), but this model has 5 dynamic blocks"),
        (torch.ones(6).bool(), ValueError, r"6 columns \(shape \(6,\)\), but this model has 5"),
        (torch.ones(4, 0).bool(), ValueError, "0 columns"),
        (torch.ones(3, 5).bool(), ValueError, r"3 rows \(shape \(3, 5\)\), but a block got a batch of 4 samples"),
        (torch.ones(1, 5).bool(), ValueError, "1 rows"),
        (torch.ones(4, 5, device="meta").bool(), ValueError, "decisions is on meta, but a block got its input on cpu"),
        (dynexec.Route.from_decisions(torch.zeros(4, 5).int(), choices=3), ValueError, "a Route of 2 choices.*got 3"),
    ],
)
@pytest.mark.parametrize("mode", ["exact", "capacity"])
def test_wrong_decisions(decisions, error, message, mode):
    model, twin, _ = converted()
    x = toys.images(4)
    with pytest.raises(error, match=message):
        run(model, x, decisions, mode)
    assert active_route() is None
    assert torch.equal(model(x), twin(x))


def test_wrong_mode():
    with pytest.raises(ValueError, match=r"mode must be one of .*'exact', 'capacity', 'soft'.*, got 'fast'"):
        dynexec.decide(torch.ones(4, 5).bool(), mode="fast")


def test_nesting_and_exceptions():
    model, twin, num_blocks = converted()
    x = toys.images(2)
    outer, inner = (torch.rand(2, num_blocks) < 0.5 for _ in range(2))
    expected_outer, expected_inner = (toys.naive_forward(twin, x, d).detach() for d in (outer, inner))
    with torch.no_grad(), dynexec.decide(outer) as entered:
        with dynexec.decide(inner):
            assert_close(model(x), expected_inner)
            with entered:  # the same object again
                assert_close(model(x), expected_outer)
            assert_close(model(x), expected_inner)
        assert_close(model(x), expected_outer)
        with pytest.raises(ZeroDivisionError), dynexec.decide(inner, mode="capacity"):
            raise ZeroDivisionError
        assert_close(model(x), expected_outer)
        with pytest.raises(ValueError, match="columns"), dynexec.decide(inner[:, 1:]):
            model(x)
        assert_close(model(x), expected_outer)
        assert torch.equal(active_route().decisions, outer)
    assert active_route() is None
    assert torch.equal(model(x), twin(x))


def test_a_generator_may_leave_in_another_order():
    outer, inner = (torch.rand(2, 5) < 0.5 for _ in range(2))

    def enters():
        with dynexec.decide(outer):
            yield

    generator = enters()
    next(generator)
    with dynexec.decide(inner):
        generator.close()
        assert torch.equal(active_route().decisions, inner)
    assert active_route() is None


def test_threads_see_their_own_decisions():
    model, twin, num_blocks = converted()
    x = toys.images(4)
    decisions = [torch.rand(4, num_blocks) < 0.5 for _ in range(6)]
    expected = [toys.naive_forward(twin, x, d).detach() for d in decisions]
    shared = dynexec.decide(decisions[0])
    barrier = threading.Barrier(len(decisions) + 1)
    failures = []

    def work(number):
        try:
            barrier.wait(60)
            for _ in range(5):
                assert_close(run(model, x, decisions[number]), expected[number])
                with torch.no_grad(), shared:
                    assert_close(model(x), expected[0])
        except BaseException as error:
            failures.append(error)

    def outside():
        try:
            barrier.wait(60)
            assert active_route() is None
            assert torch.equal(model(x), twin(x))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(decisions))]
    threads.append(threading.Thread(target=outside))
    with dynexec.decide(decisions[1]):  # a started thread sees none of it
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert not failures


def test_all_blocks_follow_one_plan(monkeypatch):
    model, _, num_blocks = converted()
    planned = []
    plan = ops.plan
    monkeypatch.setattr(
        ops, "plan", lambda decisions, choices: planned.append(len(decisions)) or plan(decisions, choices)
    )
    with torch.no_grad():
        for decisions, batches, expected in (
            (torch.rand(4, num_blocks) < 0.5, [4], [4]),
            (torch.rand(4, num_blocks) < 0.5, [4, 4], [4]),  # the decisions are the same in the second forward
            (torch.rand(num_blocks) < 0.5, [4, 4, 2, 2], [4, 2]),
            (dynexec.Route.from_decisions(torch.rand(4, num_blocks) < 0.5), [4, 4], []),
        ):
            planned.clear()
            with dynexec.decide(decisions):
                for batch in batches:
                    model(toys.images(batch))
            assert planned == expected


def test_decisions_changed_afterwards():
    model, twin, num_blocks = converted()
    x, decisions = toys.images(2), torch.zeros(2, num_blocks, dtype=torch.bool)
    none, everything = (toys.naive_forward(twin, x, torch.full_like(decisions, keep)).detach() for keep in (0, 1))
    exact, capacity = dynexec.decide(decisions), dynexec.decide(decisions, mode="capacity")
    decisions.fill_(True)
    with torch.no_grad():
        with exact:
            assert_close(model(x), none)
        with capacity:
            assert_close(model(x), everything)


def test_decisions_that_were_evaluated_in_inference_mode_first():
    model, _, num_blocks = converted()
    x, execution = toys.images(4), dynexec.decide(torch.rand(4, num_blocks) < 0.5)
    with torch.inference_mode(), execution:
        expected = model(x)
    with execution:
        output = model(x)
    output.sum().backward()
    assert_close(output.detach(), expected)


@pytest.mark.parametrize("backward_inside", [True, False])
def test_activation_checkpointing(backward_inside):
    model, twin, num_blocks = converted(dtype=torch.float64)
    x, decisions = toys.images(4).double().requires_grad_(), torch.rand(4, num_blocks) < 0.5
    toys.naive_forward(twin, x, decisions).square().sum().backward()
    expected, x.grad = x.grad, None

    def contexts():
        return nullcontext(), dynexec.decide(decisions)

    with dynexec.decide(decisions):
        h = model.stem(x)
        for stage in model.layers:
            options = {} if backward_inside else {"context_fn": contexts}
            h = checkpoint(stage, h, use_reentrant=False, **options)
        loss = model.head(h.mean((2, 3))).square().sum()
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    assert_close(x.grad, expected)


def test_dynamic_network():
    model, twin, num_blocks = converted()
    x = toys.images(4)
    without = DynamicNetwork(model)
    with pytest.raises(ValueError, match="decisions is None, but this network has no policy"):
        without(x)
    given = torch.rand(4, num_blocks) < 0.5
    expected = toys.naive_forward(twin, x, given).detach()
    net = DynamicNetwork(model, Policy(num_blocks)).eval()
    decided = net.policy(x) >= 0.5
    with torch.no_grad():
        for mode in ("exact", "capacity"):
            assert_close(without(x, given, mode=mode), expected)
            assert_close(net(x, given, mode=mode), expected)
            assert_close(net(x, mode=mode), toys.naive_forward(twin, x, decided))
            output, used = net(x, return_decisions=True, mode=mode)
            assert_close(output, net(x))
            assert torch.equal(used, decided)
        output, used = net(x, given[0], return_decisions=True)
        assert torch.equal(used, given[0])
        with dynexec.decide(~given):  # a network brings its own
            assert_close(net(x, given), expected)
    with pytest.raises(ValueError, match="mode must be one of"):
        net(x, mode="fast")
    with pytest.raises(ValueError, match="6 columns"):
        DynamicNetwork(model, Policy(num_blocks + 1))(x)
    with pytest.raises(ValueError, match="NaN"):
        net(x * torch.nan)
    with pytest.raises(ValueError, match="call dynexec.convert"):
        DynamicNetwork(toys.torchvision_style())
    assert {name.split(".")[0] for name in net.state_dict()} == {"backbone", "policy"}
