"""What the ops compute, on every shape, layout and dtype, and what they refuse."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import CASES, FLOATS, INDEX, MODES, TWO, R, X, check_merge, expected_scatter, make, numbers

from dynexec import dispatch, ops, reference


@pytest.mark.parametrize("row,layout", CASES, ids=str)
@pytest.mark.parametrize("which", INDEX)
def test_gather_is_indexing_in_the_layout_of_x(which, row, layout):
    x = make(9, row, layout=layout)
    for dtype in (torch.int32, torch.int64):
        index = numbers(which, 9, dtype)
        y = ops.gather_rows(x, index)
        assert torch.equal(y, x[index.long()])
        assert y.stride()[1:] == x.stride()[1:]
        out = make(len(index), row, layout=layout).fill_(torch.nan)
        assert ops.gather_rows(x, index, out=out) is out
        assert torch.equal(out, y)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int8, torch.bool, torch.complex64])
def test_gather_every_dtype_with_duplicates(dtype):
    x = make(7, (3, 5), dtype)
    index = torch.tensor([6, 0, 0, 3, 4, 5, 6])
    assert torch.equal(ops.gather_rows(x, index), x[index])


def test_gather_rows_with_gaps_inside_and_shared_rows():
    x = torch.randn(6, 4, 10)[:, :, ::2]
    index = torch.tensor([4, 1], dtype=torch.int32)
    assert torch.equal(ops.gather_rows(x, index), x[index])
    assert ops.gather_rows(x, index).is_contiguous()
    out = torch.empty(4, 2, 5).transpose(0, 1)
    assert torch.equal(ops.gather_rows(x, index, out=out), x[index])
    shared = torch.randn(1, 4).expand(6, 4)
    assert torch.equal(ops.gather_rows(shared, index), shared[index])


@pytest.mark.parametrize("samples,rows", [(0, 0), (1, 0), (1, 1), (3, 300)])
def test_gather_sizes(samples, rows):
    x = torch.randn(samples, 3)
    index = torch.randint(max(samples, 1), (rows,))
    assert torch.equal(ops.gather_rows(x, index), x[index])


@pytest.mark.parametrize("row,layout", CASES, ids=str)
@pytest.mark.parametrize("which", INDEX)
def test_scatter(which, row, layout):
    for add, relu in MODES:
        destination = make(9, row, layout=layout)
        index = numbers(which, 9)
        rows = make(len(index), row, layout=layout)
        expected = expected_scatter(destination, index, rows, add, relu)
        y = ops.scatter_rows(destination, index, rows, add=add, relu=relu)
        assert torch.equal(y, expected)
        assert y.stride()[1:] == destination.stride()[1:]
        assert ops.scatter_rows_(destination, index.long(), rows, add=add, relu=relu) is destination
        assert torch.equal(destination, expected)


@pytest.mark.parametrize("row,layout", CASES, ids=str)
@pytest.mark.parametrize("which", INDEX)
def test_merge(which, row, layout):
    for add, relu in MODES:
        rest, index = make(9, row, layout=layout), numbers(which, 9)
        for rows in (make(len(index), row, layout=layout), make(len(index), row)):
            check_merge(dispatch.merge_rows, dispatch.gather_passed, rest, index, rows, add, relu)
            check_merge(dispatch.merge_rows, dispatch.gather_passed, rest, index.long(), rows, add, relu)


@pytest.mark.parametrize("add,relu", MODES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_merge_of_special_numbers_in_every_dtype(dtype, add, relu):
    """Zeros of either sign, infinities, NaN; rows long enough for vectors and shared by threads."""
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1.0, -1.0])
    rest, rows = (special[torch.randint(7, (n, 3, 17011))].to(dtype) for n in (5, 3))
    check_merge(dispatch.merge_rows, dispatch.gather_passed, rest, torch.tensor([4, 0, 3]), rows, add, relu)


def test_merge_of_rows_with_gaps_inside_and_shared_rows():
    index, rows = torch.tensor([4, 1]), torch.randn(2, 4, 5)
    wide = torch.randn(6, 4, 10)[:, :, ::2]
    shared = torch.randn(1, 4, 5).expand(6, 4, 5)
    swapped = torch.randn(4, 6, 5).transpose(0, 1)
    for add, relu in MODES:
        for rest in (wide, shared, swapped):
            output, passed = dispatch.merge_rows(rest, index, rows, add, relu)
            expected = expected_scatter(rest, index, rows, add, relu)
            assert torch.equal(output, expected)
            if relu:
                assert torch.equal(passed, expected[index].bool())
                gathered = dispatch.gather_passed(rest, index, passed)
                assert torch.equal(gathered, rest[index].masked_fill(~passed, 0))


def test_row_numbers_of_the_ops_of_training_are_checked():
    for wrong in ([0, 6], [-1, 2]):
        with pytest.raises(IndexError, match=r"index must be in 0\.\.5, got (6|-1)"):
            dispatch.merge_rows(X, torch.tensor(wrong), R, True, True)
        with pytest.raises(IndexError, match=r"index must be in 0\.\.5, got (6|-1)"):
            dispatch.gather_passed(X, torch.tensor(wrong), R.bool())


def test_scatter_rows_without_elements_in_any_layout():
    """They are contiguous without being gap-free: a copy that is contiguous is no other tensor."""
    destination = torch.empty(3, 4, 0, 2).permute(2, 0, 1, 3)[:, :, :, :0].permute(1, 0, 2, 3)
    rows = destination[:1].clone()
    assert ops.scatter_rows_(destination, torch.tensor([2]), rows).shape == destination.shape


@pytest.mark.parametrize("add,relu", MODES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_scatter_rounds_as_torch_does(dtype, add, relu):
    destination, rows = torch.randn(33, 41, dtype=dtype), torch.randn(17, 41, dtype=dtype)
    index = torch.randperm(33)[:17]
    expected = expected_scatter(destination, index, rows, add, relu)
    assert torch.equal(ops.scatter_rows(destination, index, rows, add=add, relu=relu), expected)


def test_scatter_converts_rows_of_another_layout():
    destination = make(6, (8, 5, 7), layout="channels_last")
    rows = make(2, (8, 5, 7))
    index = torch.tensor([5, 2])
    expected = expected_scatter(destination, index, rows, True, True)
    assert torch.equal(ops.scatter_rows(destination, index, rows, add=True, relu=True), expected)


def test_scatter_into_rows_with_gaps_inside():
    destination = torch.randn(6, 4, 10)
    before = destination.clone()
    view, rows, index = destination[:, :, ::2], torch.randn(2, 4, 5), torch.tensor([4, 1])
    expected = expected_scatter(view, index, rows, True, True)
    ops.scatter_rows_(view, index, rows, add=True, relu=True)
    assert torch.equal(view, expected)
    assert torch.equal(destination[:, :, 1::2], before[:, :, 1::2])


def test_nan_passes_relu_and_stays_in_its_row():
    destination = torch.full((5, 3), torch.nan)
    index = torch.tensor([1, 3])
    ops.scatter_rows_(destination, index, torch.tensor([[1.0, -1.0, torch.nan]] * 2), relu=True)
    assert torch.equal(destination[index].nan_to_num(7), torch.tensor([[1.0, 0.0, 7.0]] * 2))
    assert destination[[0, 2, 4]].isnan().all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_large_rows(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(5, 64, 64, 17)
        index = torch.tensor([0, 1, 2, 4])
        rows = torch.full((4, 64, 64, 17), torch.nan)
        assert torch.equal(ops.gather_rows(x, index, out=rows), x[index])
        expected = expected_scatter(x, index, rows, True, True)
        assert torch.equal(ops.scatter_rows(x, index, rows, add=True, relu=True), expected)
        decisions = torch.randint(3, (5000, 40))
        assert all(map(torch.equal, ops.plan(decisions, 3), reference.plan(decisions, 3)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("wrong", [-1, 6, 2**31 - 1])
def test_row_number_out_of_range_writes_nothing(wrong):
    x = torch.randn(6, 3)
    index = torch.tensor([0, wrong])
    with pytest.raises(IndexError, match=rf"index must be in 0\.\.5, got {wrong}"):
        ops.gather_rows(x, index)
    before = x.clone()
    with pytest.raises(IndexError, match=rf"index must be in 0\.\.5, got {wrong}"):
        ops.scatter_rows_(x, index, torch.zeros(2, 3))
    assert torch.equal(x, before)
    out = torch.ones(2, 3)
    with pytest.raises(IndexError):
        ops.gather_rows(x, index, out=out)
    assert torch.equal(out, torch.ones(2, 3))


WRONG = [
    (lambda: ops.gather_rows([1.0], TWO), TypeError, "x and index must be tensors, got list and Tensor"),
    (lambda: ops.scatter_rows(X, [0, 2], R), TypeError, "destination and index must be tensors, got Tensor and list"),
    (lambda: ops.scatter_rows(X, TWO, 0.0), TypeError, "rows must be a tensor, got float"),
    (lambda: ops.gather_rows(torch.tensor(1.0), TWO), ValueError, "x must have rows"),
    (lambda: ops.gather_rows(X, TWO.float()), TypeError, "index must be int32 or int64, got torch.float32"),
    (lambda: ops.gather_rows(X, torch.ones(6, dtype=torch.bool)), TypeError, "index must be int32 or int64"),
    (lambda: ops.gather_rows(X, TWO[None]), ValueError, r"index must have shape \[M\], got \(1, 2\)"),
    (lambda: ops.gather_rows(X, TWO.to("meta")), ValueError, "index must be on the device of x, cpu, got meta"),
    (lambda: ops.gather_rows(X, TWO, out=R[:1]), ValueError, r"out must have shape \(2, 3\)"),
    (lambda: ops.gather_rows(X, TWO, out=R.double()), TypeError, "out must have the dtype of x"),
    (lambda: ops.scatter_rows(X, TWO, R[:, :2]), ValueError, r"rows must have shape \(2, 3\).*got \(2, 2\)"),
    (lambda: ops.scatter_rows(X, TWO, R[:1]), ValueError, r"rows must have shape \(2, 3\).*got \(1, 3\)"),
    (lambda: ops.scatter_rows(X, TWO, R.half()), TypeError, "rows must have the dtype of destination"),
    (lambda: ops.scatter_rows(X, TWO, R.to("meta")), ValueError, "rows must be on the device of destination"),
    (lambda: ops.scatter_rows(X.int(), TWO, R.int(), relu=True), TypeError, "destination must be floating point"),
    (lambda: ops.plan([[1]], 2), TypeError, "decisions must be a bool or integer tensor.*got list"),
    (lambda: ops.plan(X, 2), TypeError, r"decisions must be a bool or integer tensor \[N, L\], got torch.float32"),
    (lambda: ops.plan(TWO, 2), ValueError, r"decisions must have shape \[N, L\], got \(2,\)"),
    (lambda: ops.plan(X.int(), 2.0), TypeError, "choices must be an int, got 2.0"),
    (lambda: ops.plan(X.int(), True), TypeError, "choices must be an int, got True"),
    (lambda: ops.plan(X.int(), 0), ValueError, "choices must be at least 1"),
    (lambda: ops.plan(X.bool(), 1), ValueError, "at least 2 for bool decisions, got 1"),
]


@pytest.mark.parametrize("call,error,message", WRONG, ids=[message for _, _, message in WRONG])
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(dispatch.native_missing is not None, reason="plain torch has its own messages")
def test_memory_shared_within_one_call():
    x = torch.zeros(6, 3)
    with pytest.raises(ValueError, match="rows must not share memory with destination"):
        ops.scatter_rows_(x, TWO, x[1:3])
    with pytest.raises(ValueError, match="out must not share memory with x"):
        ops.gather_rows(x, TWO, out=x[1:3])


@pytest.mark.parametrize(
    "overlapping, strides",
    [
        (lambda n: torch.zeros(1, 3).expand(n, 3), r"\(0, 1\)"),
        (lambda n: torch.zeros(n, 1).expand(n, 3), r"\(1, 0\)"),
        (lambda n: torch.zeros(20).as_strided((n, 3), (2, 1)), r"\(2, 1\)"),
        (lambda n: torch.zeros(20).as_strided((n, 3), (3, 2)), r"\(3, 2\)"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_memory_shared_within_what_is_written(overlapping, strides):
    destination, out = overlapping(6), overlapping(2)
    with pytest.raises(ValueError, match=rf"destination must not .*overlap.*shape \(6, 3\) with strides {strides}"):
        ops.scatter_rows_(destination, TWO, R + 1)
    with pytest.raises(ValueError, match=rf"out must not .*overlap.*shape \(2, 3\) with strides {strides}"):
        ops.gather_rows(X + 1, TWO, out=out)
    assert not destination.any() and not out.any()
    # A copy shares nothing; a single row may have any stride.
    if "0" in strides:
        assert torch.equal(ops.scatter_rows(destination, TWO, R + 1).sum(1), torch.tensor([3.0, 0, 3, 0, 0, 0]))
    assert ops.scatter_rows_(torch.zeros(1, 3).expand(1, 3), TWO[:1], R[:1] + 1).all()


def naive_plan(decisions, choices):
    index, offset = [], []
    for column in zip(*decisions, strict=True):
        groups = [[n for n, choice in enumerate(column) if choice == c] for c in range(choices)]
        index.append([n for group in groups for n in group])
        offset.append([0, *(sum(map(len, groups[: c + 1])) for c in range(choices))])
    return index, offset


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_plan_equals_a_plain_loop(data):
    samples, blocks, choices = (data.draw(st.integers(1, high)) for high in (20, 6, 5))
    rows = st.lists(st.integers(0, choices - 1), min_size=blocks, max_size=blocks)
    decisions = data.draw(st.lists(rows, min_size=samples, max_size=samples))
    dtype = data.draw(st.sampled_from([torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]))
    for plan in (ops.plan, reference.plan):
        index, offset = plan(torch.tensor(decisions, dtype=dtype), choices)
        assert (index.tolist(), offset.tolist()) == naive_plan(decisions, choices)
        assert index.dtype == offset.dtype == torch.int32


@pytest.mark.parametrize("samples,blocks", [(0, 3), (3, 0), (0, 0), (1, 54), (100, 1000), (1_000_000, 3)])
def test_plan_sizes(samples, blocks):
    decisions = torch.rand(samples, blocks) < 0.5
    index, offset = ops.plan(decisions, 2)
    expected_index, expected_offset = reference.plan(decisions, 2)
    assert index.shape == (blocks, samples)
    assert torch.equal(index, expected_index)
    assert torch.equal(offset, expected_offset)


def test_plan_reads_any_strides_and_full_groups():
    decisions = torch.randint(3, (7, 5))
    for view in (decisions.t(), decisions[::2, 1::2], decisions[:1].expand(6, 5), torch.zeros(4, 3, dtype=torch.int64)):
        assert all(map(torch.equal, ops.plan(view, 3), reference.plan(view.contiguous(), 3)))


@pytest.mark.parametrize("dtype,value", [(torch.uint8, 255), (torch.uint8, 44), (torch.int8, 127), (torch.int16, 300)])
@pytest.mark.parametrize("choices", [301, 65836])
def test_plan_with_more_choices_than_the_dtype_holds(dtype, value, choices):
    """301 - 256 is 45, 65836 - 65536 is 300: a border that wraps around would count these values twice, or nowhere."""
    decisions = torch.tensor([[value], [0], [value]], dtype=dtype)
    for plan in (ops.plan, reference.plan):
        index, offset = plan(decisions, choices)
        assert index.tolist() == [[1, 0, 2]]
        assert offset.tolist() == [[0] + [1] * value + [3] * (choices - value)]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
def test_plan_finds_negative_values_whatever_the_dtype(dtype):
    with pytest.raises(ValueError, match=r"decisions must be in 0\.\.299, got -1 at \[1, 0\]"):
        ops.plan(torch.tensor([[0], [-1]], dtype=dtype), 300)


@pytest.mark.parametrize("wrong", [3, -1])
def test_plan_names_the_value_out_of_range(wrong):
    decisions = torch.zeros(6, 4, dtype=torch.int32)
    decisions[5, 0] = decisions[2, 3] = wrong
    with pytest.raises(ValueError, match=rf"decisions must be in 0\.\.2, got {wrong} at \[2, 3\]"):
        ops.plan(decisions, 3)


@pytest.mark.parametrize(
    "outer", [lambda f: f, lambda f: lambda d: torch.func.jacrev(f)(d.float())], ids=["", "jacrev"]
)
def test_plan_is_for_one_batch(outer):
    def plan(decisions):
        return ops.plan(decisions > 0, 2)[0].float()

    with pytest.raises(ValueError, match="decisions must be those of one batch, got several under torch.vmap"):
        torch.vmap(outer(plan))(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match="decisions must be those of one batch, got several under torch.vmap"):
        outer(torch.vmap(plan))(torch.ones(2, 3, 4))


@pytest.mark.skipif(dispatch.native_missing is not None, reason="this is the portable run")
def test_portable_implementation():
    """These tests, and those of Route, once more without the native part."""
    here = os.path.dirname(__file__)
    tests = [f"{here}/{name}.py" for name in ("test_ops", "test_ops_torch", "test_route")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(command, env=os.environ | {"DYNEXEC_NATIVE": "0"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
