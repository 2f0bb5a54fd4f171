"""Row tensors in every layout, and what a scatter should give."""

import torch

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ROWS = [(), (1,), (5,), (0,), (4, 0, 2), (3, 4), (8, 5, 7), (16, 1, 1), (1, 3, 3)]
INDEX = {
    "none": lambda n: [],
    "one": lambda n: [n - 1],
    "all": lambda n: range(n),
    "reversed": lambda n: range(n - 1, -1, -1),
    "runs": lambda n: [i for i in range(n) if i % 5 < 3],
    "every other": lambda n: range(0, n, 2),
}
MODES = [(False, False), (True, False), (False, True), (True, True)]


def make(samples, row, dtype=torch.float32, layout="contiguous"):
    x = torch.randint(-8, 8, (2 * samples, *row)).to(dtype) / 4
    if layout == "channels_last" and len(row) == 3:
        x = x.to(memory_format=torch.channels_last)
    if layout == "transposed rows" and len(row) == 2:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    # Every other row: gap-free rows, gaps between them.
    return x[::2] if layout == "gaps" else x[:samples]


LAYOUTS = ["contiguous", "channels_last", "transposed rows", "gaps"]
CASES = [(row, layout) for row in ROWS for layout in ("contiguous", "gaps")]
CASES += [(row, "channels_last") for row in ROWS if len(row) == 3] + [((3, 4), "transposed rows")]


def numbers(which, samples, dtype=torch.int32):
    return torch.tensor(list(INDEX[which](samples)), dtype=dtype)


def expected_scatter(destination, index, rows, add, relu):
    destination = destination.clone()
    rows = rows + destination[index] if add else rows
    destination[index] = rows.relu() if relu else rows
    return destination


def strides(x):
    """Those that say where an element is."""
    return [stride if size > 1 and x.numel() else None for stride, size in zip(x.stride(), x.shape)]


def check_merge(merge_rows, gather_passed, rest, index, rows, add, relu):
    """That the two ops of training give what torch does, laid out as ``rest``, which stays as it is."""
    before, grad = rest.clone(), torch.randn(rest.shape).to(rest).as_strided(rest.shape, rest.clone().stride())
    output, passed = merge_rows(rest, index, rows, add, relu)
    expected = expected_scatter(rest, index, rows, add, relu)
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(rest, before, rtol=0, atol=0, equal_nan=True)
    assert strides(output) == strides(rest.clone())
    if not relu:
        assert passed.numel() == 0
        return
    where = index.long()
    assert torch.equal(passed, expected[where].bool())  # true for NaN
    gathered = gather_passed(grad, index, passed)
    assert torch.equal(gathered, grad[where].masked_fill(~passed, 0))
    assert strides(gathered)[1:] == strides(passed)[1:] == strides(output[: len(index)])[1:]
    assert torch.equal(gather_passed(grad, index, passed.contiguous()), gathered)  # of whatever layout


# Six rows of three, and two of them.
X, TWO, R = torch.zeros(6, 3), torch.tensor([0, 2]), torch.zeros(2, 3)
