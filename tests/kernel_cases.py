"""Inputs for the Triton kernels, in the interpreter where there is no GPU, and comparisons in float64."""

import pytest
import torch

from dynexec import reference

pytest.importorskip("triton", reason="needs Triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# bfloat16 in the interpreter is wrong without an error.
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * (DEVICE.type == "cuda")
# Largest error, in units of the largest value. float32 may be multiplied as TF32 on a GPU.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5 if DEVICE.type == "cpu" else 2e-3}
KEEPS = {
    "none": lambda n: torch.zeros(n, dtype=torch.bool),
    "one": lambda n: torch.arange(n) == n - 1,
    "some": lambda n: torch.arange(n) % 3 != 1,
    "all": lambda n: torch.ones(n, dtype=torch.bool),
}


def images(*shape, dtype):
    return torch.randn(shape).to(DEVICE, dtype).to(memory_format=torch.channels_last)


class Rows:
    """Which of N rows a kernel is to work on, as its arguments and as row numbers."""

    def __init__(self, keep, n):
        mask = KEEPS[keep](n) if keep is not None else torch.ones(n, dtype=torch.bool)
        self.numbers, self.dropped = mask.nonzero().flatten().to(DEVICE), (~mask).nonzero().flatten().to(DEVICE)
        self.arguments = {}
        if keep is not None:
            index, offset = reference.plan(torch.stack([~mask, mask], dim=1), 2)
            self.arguments = {"index": index[1].to(DEVICE), "offset": offset[1, 1:].to(DEVICE)}

    def poison(self, x):
        """NaN in the rows that nobody may read."""
        x[self.dropped] = torch.nan
        return x


def check(actual, before, rows, expected):
    """Kept rows are ``expected`` (float64, all rows), dropped ones bit for bit what was there before."""
    error = (actual[rows.numbers].double() - expected[rows.numbers]).abs()
    scale = expected[rows.numbers].abs().amax() if expected[rows.numbers].numel() else 1.0
    assert error.numel() == 0 or error.max() <= TOLERANCE[actual.dtype] * scale, (error.max(), scale)
    integers = {2: torch.int16, 4: torch.int32}[actual.element_size()]
    assert torch.equal(actual[rows.dropped].view(integers), before[rows.dropped].view(integers))
