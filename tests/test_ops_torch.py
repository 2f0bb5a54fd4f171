"""The ops inside PyTorch: gradients, fakes, compilation, FLOP counts, and what they never do."""

import pytest
import torch
from rows import FLOATS, LAYOUTS, MODES, TWO, R, X, expected_scatter, make, numbers
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from dynexec import dispatch, ops, reference


def gradcheck(function, inputs):
    """Both modes of differentiation and second derivatives, against finite differences."""
    first = torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    return first and torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.usefixtures("algorithms")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gather_gradient(layout):
    x = torch.randn(5, 2, 3, 2, dtype=torch.float64)
    x = (x.to(memory_format=torch.channels_last) if layout == "channels_last" else x).requires_grad_()
    for index in ([], [3], [0, 1, 2, 3, 4], [1, 4, 1, 1]):
        index = torch.tensor(index, dtype=torch.int32)
        assert gradcheck(lambda x, index=index: ops.gather_rows(x, index), (x,))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("add,relu", MODES)
@pytest.mark.parametrize("which", ["none", "one", "all", "every other"])
def test_scatter_gradients(which, add, relu, in_place):
    destination = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    index = numbers(which, 5)
    rows = torch.randn(len(index), 3, 2, dtype=torch.float64, requires_grad=True)

    def scatter(destination, rows):
        if in_place:
            return ops.scatter_rows_(destination.clone(), index, rows, add=add, relu=relu)
        return ops.scatter_rows(destination, index, rows, add=add, relu=relu)

    assert gradcheck(scatter, (destination, rows))
    assert gradcheck(lambda destination: scatter(destination, rows.detach()), (destination,))
    assert gradcheck(lambda rows: scatter(destination.detach(), rows), (rows,))


@pytest.mark.usefixtures("algorithms")
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_equal_those_of_torch(dtype):
    destination = torch.randn(7, 4, 3, dtype=dtype, requires_grad=True)
    rows = torch.randn(3, 4, 3, dtype=dtype, requires_grad=True)
    index, weight = torch.tensor([6, 0, 3]), torch.randn(7, 4, 3, dtype=dtype)

    def gradients(gather, scatter):
        y = scatter(destination, index, rows * 2 - gather(destination, index), True, True)
        return torch.autograd.grad((y * weight).sum(), (destination, rows))

    ours = gradients(ops.gather_rows, lambda d, i, r, add, relu: ops.scatter_rows(d, i, r, add=add, relu=relu))
    assert all(map(torch.equal, ours, gradients(lambda x, i: x[i], expected_scatter)))


def test_no_kept_sample_gives_zero_gradients():
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    none = torch.tensor([], dtype=torch.int32)
    ops.scatter_rows(x, none, ops.gather_rows(x, none) * w, add=True, relu=True).sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 3))
    assert torch.equal(w.grad, torch.zeros(3))


def test_nan_in_dropped_rows_reaches_no_gradient():
    x = torch.full((4, 3), torch.nan)
    x[1] = 1
    x.requires_grad_()
    y = ops.gather_rows(x, torch.tensor([1]))
    (y * y).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[0.0] * 3, [2.0] * 3, [0.0] * 3, [0.0] * 3]))


def scatter_cubes(gather, scatter):
    """A function of one tensor that uses both ops, and whose derivative of a derivative is not zero."""
    return lambda x: scatter(x, TWO, gather(x, TWO) ** 3, True, True).pow(2).sum()


OURS = scatter_cubes(ops.gather_rows, lambda d, i, r, add, relu: ops.scatter_rows(d, i, r, add=add, relu=relu))
IN_PLACE = scatter_cubes(
    ops.gather_rows, lambda d, i, r, add, relu: ops.scatter_rows_(d.clone(), i, r, add=add, relu=relu)
)
THEIRS = scatter_cubes(lambda x, i: x[i], expected_scatter)


@pytest.mark.parametrize("ours", [OURS, IN_PLACE], ids=["copy", "in place"])
def test_transforms_of_torch_func(ours):
    x, v = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(torch.func.grad(ours)(x), torch.func.grad(THEIRS)(x))

    def tangents(function, x):
        return torch.func.jvp(function, (x,), (v,))

    def nested(function):
        return tangents(lambda x: tangents(function, x)[1], x)

    for actual, expected in ((ours, THEIRS), (torch.func.grad(ours), torch.func.grad(THEIRS))):  # forward over reverse
        torch.testing.assert_close(tangents(actual, x), tangents(expected, x))
        torch.testing.assert_close(nested(actual), nested(expected))

    def reverse_over_reverse(function):
        return torch.func.grad(lambda x: (torch.func.grad(function)(x) * v).sum())(x)

    torch.testing.assert_close(reverse_over_reverse(ours), reverse_over_reverse(THEIRS))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", [torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))])
def test_hessians(transform):
    """Of the op that copies: nothing that writes in place can be batched."""
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(transform(OURS)(x), transform(THEIRS)(x))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_inside_of_a_derivative():
    """Which hides that a gradient is asked for."""
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    ours, theirs = (lambda x, one=one: torch.vmap(one)(x) for one in (OURS, THEIRS))
    torch.testing.assert_close(torch.func.jacrev(ours)(x), torch.func.jacrev(theirs)(x))
    torch.testing.assert_close(*(torch.autograd.grad(function(x).sum(), x) for function in (ours, theirs)))


@pytest.mark.parametrize("ours", [OURS, IN_PLACE], ids=["copy", "in place"])
def test_gradients_of_gradients_in_batches(ours):
    """These hide that a gradient is asked for, too."""
    x, found = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), []
    for function in (ours, THEIRS):
        y = function(x) * torch.arange(1.0, 3.0, dtype=x.dtype)
        (rows,) = torch.autograd.grad(y, x, torch.eye(2, dtype=x.dtype), is_grads_batched=True, create_graph=True)
        found.append([rows, *torch.autograd.grad(rows.square().sum(), x)])
    torch.testing.assert_close(*found)


def test_tangents_of_dual_tensors():
    x, v = torch.randn(5, 3), torch.randn(5, 3)
    with forward_ad.dual_level():
        dual, plain = forward_ad.make_dual(x, v), torch.randn(2, 3)
        tangents = [
            forward_ad.unpack_dual(y).tangent
            for y in (
                ops.gather_rows(dual, TWO),
                ops.scatter_rows(dual, TWO, plain),
                ops.scatter_rows(x, TWO, dual[:2]),
                ops.scatter_rows_(x.clone(), TWO, dual[:2]),
                ops.scatter_rows_(torch.zeros_like(dual).copy_(dual), TWO, plain, add=True),
            )
        ]
        rest = v.index_fill(0, TWO, 0.0)
        placed = torch.zeros(5, 3).index_copy(0, TWO, v[:2])
        for tangent, expected in zip(tangents, (v[TWO], rest, placed, placed, v), strict=True):
            assert torch.equal(tangent, expected)
        with pytest.raises(ValueError, match="out must be None where a derivative may be needed: .*forward mode"):
            ops.gather_rows(dual, TWO, out=torch.zeros(2, 3))
        numbers = ops.scatter_rows_(torch.zeros(5, 3, dtype=torch.int64), TWO, torch.ones(2, 3, dtype=torch.int64))
        assert numbers.sum() == 6  # no tangent at all


def test_a_write_is_seen_by_autograd():
    w, saved = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3)
    for write in (lambda: ops.scatter_rows_(saved, TWO, R), lambda: ops.gather_rows(X, torch.arange(6), out=saved)):
        loss = (w * saved).sum()
        write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    loss = (w * saved).sum()
    with forward_ad.dual_level():
        ops.scatter_rows_(saved, TWO, R)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    leaf = torch.zeros(6, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        ops.scatter_rows_(leaf, TWO, R)
    with pytest.raises(ValueError, match="out must be None where a derivative may be needed"):
        ops.gather_rows(leaf, TWO, out=torch.zeros(2, 3))
    with torch.inference_mode():
        ops.scatter_rows_(torch.zeros(6, 3), TWO, torch.ones(2, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    x = make(6, (4, 3) if layout == "transposed rows" else (4, 3, 2), layout=layout)
    index = torch.tensor([5, 0, 3], dtype=torch.int32)
    rows = ops.gather_rows(x, index)
    torch.library.opcheck(torch.ops.dynexec.gather_rows, (x, index))
    torch.library.opcheck(torch.ops.dynexec.gather_rows_out, (x, index, rows))
    torch.library.opcheck(torch.ops.dynexec.scatter_rows_, (x.clone(), index, rows, True, True))
    torch.library.opcheck(torch.ops.dynexec.merge_rows, (x, index, rows, True, True))
    torch.library.opcheck(torch.ops.dynexec.merge_rows, (x, index, rows, True, False))
    torch.library.opcheck(torch.ops.dynexec.gather_passed, (x, index, rows.bool()))
    torch.library.opcheck(torch.ops.dynexec.plan, (torch.randint(3, (6, 4)), 3))


def test_ops_compile_without_a_break():
    def step(x, index):
        rows = ops.gather_rows(x, index)
        y = ops.scatter_rows(x, index, rows * 2, add=True, relu=True)
        y = ops.scatter_rows_(y, index, rows)
        return y, ops.plan(y > 0, 2)

    x, index = torch.randn(6, 4, requires_grad=True), torch.tensor([4, 1])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (y, planned), (expected, expected_plan) = compiled(x, index), step(x, index)
    assert torch.equal(y, expected)
    assert all(map(torch.equal, planned, expected_plan))
    gradients = [torch.autograd.grad(result.pow(2).sum(), x)[0] for result in (y, expected)]
    assert torch.equal(*gradients)


def test_moving_rows_and_planning_count_as_no_flops():
    x = torch.randn(6, 4)
    with FlopCounterMode(display=False) as counter:
        ops.scatter_rows_(x, TWO, ops.gather_rows(x, TWO), add=True, relu=True)
        ops.gather_rows(x, TWO, out=torch.empty(2, 4))
        _, passed = dispatch.merge_rows(x, TWO, x[:2], True, True)
        dispatch.gather_passed(x, TWO, passed)
        ops.plan(x > 0, 2)
    assert counter.get_total_flops() == 0
    # Registered as zero, rather than unknown to the counter.
    counted = counter.get_flop_counts()["Global"]
    names = {"gather_rows", "gather_rows_out", "scatter_rows_", "merge_rows", "gather_passed", "plan"}
    assert {getattr(torch.ops.dynexec, name) for name in names} <= counted.keys()


def test_no_op_reads_the_device():
    # A tensor on "meta" has no values: reading one raises.
    x = torch.randn(6, 4, 3, 2, device="meta", requires_grad=True)
    index = torch.zeros(3, dtype=torch.int32, device="meta")
    rows = ops.gather_rows(x, index)
    ops.scatter_rows(x, index, rows, add=True, relu=True).sum().backward()
    for function in (reference.gather_rows, lambda x, index: reference.scatter_rows(x, index, x[:3], add=True)):
        function(x.detach(), index)
    reference.plan(torch.zeros(6, 4, dtype=torch.bool, device="meta"), 2)


def rows(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


INDEX = torch.tensor([0, 2])
WRONG = {
    "no choices": ("plan", torch.zeros(3, 2, dtype=torch.bool), -1),
    "choices beyond int32": ("plan", torch.zeros(3, 2, dtype=torch.bool), 2**40),
    "decisions of three dimensions": ("plan", torch.zeros(3, 2, 2, dtype=torch.bool), 2),
    "a float index": ("gather_rows", rows(3, 4), torch.tensor([0.0])),
    "a narrow index": ("gather_rows", rows(3, 4), torch.zeros(2, dtype=torch.int16)),
    "an index of two dimensions": ("gather_rows", rows(3, 4), INDEX[None]),
    "no rows": ("gather_rows", rows(), INDEX),
    "a short out": ("gather_rows_out", rows(3, 4), INDEX, rows(1, 4)),
    "a narrow out": ("gather_rows_out", rows(3, 4), INDEX, rows(2, 3)),
    "an out of another dtype": ("gather_rows_out", rows(3, 4), INDEX, rows(2, 4, dtype=torch.float16)),
    "too few rows": ("scatter_rows_", rows(3, 4), INDEX, rows(1, 4), True, False),
    "wide rows": ("scatter_rows_", rows(3, 4), INDEX, rows(2, 5), False, False),
    "flat rows": ("scatter_rows_", rows(3, 4), INDEX, rows(8), False, False),
    "rows of another dtype": ("scatter_rows_", rows(3, 4), INDEX, rows(2, 4, dtype=torch.float64), True, True),
    "too few rows to merge": ("merge_rows", rows(3, 4), INDEX, rows(1, 4), True, True),
    "rows to merge of another dtype": ("merge_rows", rows(3, 4), INDEX, rows(2, 4, dtype=torch.float64), False, False),
    "too few that passed": ("gather_passed", rows(3, 4), INDEX, rows(1, 4, dtype=torch.bool)),
    "what passed as numbers": ("gather_passed", rows(3, 4), INDEX, rows(2, 4)),
}


@pytest.mark.skipif(dispatch.native_missing is not None, reason=f"no native ops: {dispatch.native_missing}")
@pytest.mark.parametrize("what", WRONG)
def test_called_past_their_checks(what):
    """The native code itself refuses what would be read or written out of bounds."""
    name, *arguments = WRONG[what]
    before = [value.clone() for value in arguments if isinstance(value, torch.Tensor)]
    with pytest.raises(ValueError, match="must"):
        getattr(torch.ops.dynexec, name)(*arguments)
    for value, expected in zip((value for value in arguments if isinstance(value, torch.Tensor)), before, strict=True):
        assert torch.equal(value, expected)
