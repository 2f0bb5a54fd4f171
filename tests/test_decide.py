"""decide: each sample gets exactly the blocks that were decided for it, whatever surrounds the call."""

import copy
import threading
from contextlib import nullcontext

import odd_blocks
import pytest
import torch
import toys
from torch import nn
from torch.utils.checkpoint import checkpoint

import dynexec
from dynexec.nn import DynamicNetwork, active_route

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}


def converted(style="torchvision", dtype=torch.float32):
    """(converted model, unconverted twin, L)"""
    model = toys.STYLES[style]().to(dtype)
    twin = copy.deepcopy(model)
    return model, twin, dynexec.convert(model).num_blocks


def run(model, x, decisions, mode="exact"):
    with torch.no_grad(), dynexec.decide(decisions, mode=mode):
        return model(x)


def patterns(n, num_blocks):
    one = torch.zeros(n, num_blocks, dtype=torch.bool)
    one[n // 2] = True
    yield "none", torch.zeros(n, num_blocks, dtype=torch.bool)
    yield "all", torch.ones(n, num_blocks, dtype=torch.bool)
    yield "one sample", one
    yield "all but one", ~one
    yield "one block", torch.eye(num_blocks, dtype=torch.bool)[:1].repeat(n, 1)
    for keep in (0.25, 0.5, 0.9):
        yield f"keep {keep}", torch.rand(n, num_blocks) < keep


def assert_close(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["exact", "capacity"])
@pytest.mark.parametrize("style", toys.STYLES)
def test_equals_the_naive_loop_over_samples(style, mode):
    model, twin, num_blocks = converted(style)
    for n in (1, 2, 5):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = toys.images(n, layout=layout)
            for name, decisions in patterns(n, num_blocks):
                untouched = x.clone()
                with torch.no_grad():
                    expected = toys.naive_forward(twin, x, decisions)
                assert_close(run(model, x, decisions, mode), expected)
                assert torch.equal(x, untouched), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["exact", "capacity"])
def test_dtypes(dtype, mode):
    for style in toys.STYLES:
        model, twin, num_blocks = converted(style, dtype)
        x, decisions = toys.images(4).to(dtype), torch.rand(4, num_blocks) < 0.5
        with torch.no_grad():
            assert_close(run(model, x, decisions, mode), toys.naive_forward(twin, x, decisions))


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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", ["exact", "capacity"])
def test_memory_layout_is_kept(mode, layout):
    model, _, num_blocks = converted("timm")
    model = model.to(memory_format=layout)
    layouts = []
    for stage in model.layers:
        for block in stage:
            block.register_forward_hook(
                lambda module, args, output: layouts.append(output.is_contiguous(memory_format=layout))
            )
    x = toys.images(4, layout=layout)
    for _, decisions in patterns(4, num_blocks):
        run(model, x, decisions, mode)
    assert len(layouts) == 8 * num_blocks and all(layouts)


def spoil(module, args, output):
    output[1] = torch.nan


def test_nan_in_a_dropped_branch_is_not_seen():
    block = odd_blocks.EmptyShortcut().eval()
    dynexec.convert(block)
    x, keep = torch.randn(3, 4, 5, 5), torch.tensor([[True], [False], [True]])
    expected = run(block, x, keep)
    block.conv.register_forward_hook(spoil)
    assert torch.equal(run(block, x, keep, "capacity"), expected)


@pytest.mark.parametrize("mode", ["exact", "capacity"])
def test_nan_stays_in_its_sample(mode):
    model, twin, num_blocks = converted()
    x, decisions = toys.images(4), torch.ones(4, num_blocks, dtype=torch.bool)
    decisions[1] = False
    expected = toys.naive_forward(twin, x, decisions).detach()
    x[1] = torch.nan
    actual = run(model, x, decisions, mode)
    kept = [0, 2, 3]
    assert_close(actual[kept], expected[kept])
    assert actual[1].isnan().all()


@pytest.mark.parametrize("style", toys.STYLES)
def test_a_block_never_gives_its_input_back(style):
    model, _, num_blocks = converted(style)
    shared = []
    for stage in model.layers:
        for block in stage:
            block.register_forward_hook(
                lambda module, args, output: shared.append(output.data_ptr() == args[0].data_ptr())
            )
    for _, decisions in patterns(3, num_blocks):
        run(model, toys.images(3), decisions)
    assert shared and not any(shared)


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
    with pytest.raises(ValueError, match=r"mode must be one of \('exact', 'capacity'\), got 'fast'"):
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


def test_other_arguments_reach_the_block():
    block = odd_blocks.OptionalArguments().eval()
    twin = copy.deepcopy(block)
    dynexec.convert(block)
    x, shift = torch.randn(4, 4, 5, 5), torch.randn(4)
    keep = torch.tensor([[True], [False], [True], [False]])
    for mode in ("exact", "capacity"):
        with dynexec.decide(keep, mode=mode):
            plain, scaled = (torch.where(keep[:, :, None, None], twin(x, scale=scale), x) for scale in (None, 3.0))
            assert_close(block(features=x), plain)
            assert_close(block(x, scale=3.0), scaled)
            assert_close(block(x, 3.0), scaled)
            assert_close(block(scale=3.0, features=x), scaled)
            with pytest.raises(TypeError, match="takes one tensor, .* of column 0 got Tensor, float, Tensor"):
                block(x, 3.0, shift=shift)
    assert torch.equal(block(features=x, shift=shift), twin(x, shift=shift))


def test_other_arguments_of_a_block_with_a_projection():
    block = odd_blocks.OptionalScaleProjection().eval()
    twin = copy.deepcopy(block)
    dynexec.convert(block)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x, 2.0), twin(x, 2.0))
    with dynexec.decide(torch.ones(1).bool()), pytest.raises(TypeError, match="of column 0 got Tensor, float"):
        block(x, scale=2.0)


@pytest.mark.parametrize("mode", ["exact", "capacity"])
def test_an_adapter_that_overlooks_a_change_of_shape(mode):
    model = nn.Sequential(toys.InvertedResidual(4, 4, 2)).eval()
    dynexec.convert(model, dynexec.Adapter(toys.InvertedResidual))
    with pytest.raises(ValueError, match=r"shape|\(2, 4, 3, 3\) and its shortcut \(2, 4, 5, 5\)"):
        run(model, torch.randn(2, 4, 5, 5), torch.tensor([[True], [False]]), mode)


@pytest.mark.parametrize("style", toys.STYLES)
def test_autocast_and_inference_mode(style):
    model, twin, num_blocks = converted(style)
    x = toys.images(4)
    for _, decisions in patterns(4, num_blocks):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            expected = toys.naive_forward(twin, x, decisions)
            for mode in ("exact", "capacity"):
                torch.testing.assert_close(run(model, x, decisions, mode), expected, rtol=0.05, atol=0.05)
        with torch.inference_mode():
            assert_close(run(model, x, decisions), toys.naive_forward(twin, x, decisions))


def test_autocast_into_a_wider_shortcut():
    for kind in (toys.BasicBlock, toys.InvertedResidual):
        block = toys.finish(kind(8, 8))
        dynexec.convert(block)
        x, keep = torch.randn(4, 8, 5, 5), torch.tensor([[True], [False], [True], [False]])
        with torch.autocast("cpu", torch.bfloat16):
            exact, capacity = run(block, x, keep), run(block, x, keep, "capacity")
        assert exact.dtype == capacity.dtype == torch.float32
        assert torch.equal(exact[1], x[1])
        torch.testing.assert_close(exact, capacity, rtol=0.05, atol=0.05)


class Widens(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = odd_blocks.conv()

    def forward(self, x):
        return x + self.conv(x).float()


@pytest.mark.parametrize("mode", ["exact", "capacity"])
def test_a_branch_wider_than_its_shortcut(mode):
    block = Widens().bfloat16()
    x, keep = torch.randn(2, 4, 5, 5).bfloat16(), torch.tensor([[True], [False]])
    expected = torch.where(keep[:, :, None, None], block(x), x)
    dynexec.convert(block)
    torch.testing.assert_close(run(block, x, keep, mode), expected)


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


class Policy(nn.Module):
    def __init__(self, num_blocks):
        super().__init__()
        self.logit = nn.Linear(3, num_blocks)

    def forward(self, images):
        return torch.sigmoid(self.logit(images.mean((2, 3))))


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
