"""What counts as equal output."""

import math

import torch

#: Largest difference allowed, relative to the largest value of the original's output, by what is computed in. Folding
#: BatchNorm rounds the weights once more, and sums are made in another order.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def relative_error(actual, expected):
    """Largest difference of two outputs, tensors or structures of them, relative to the largest value of ``expected``.

    Infinite where structure or shapes differ, or where one is NaN or infinite and the other is not.
    """
    if isinstance(expected, torch.Tensor):
        if not isinstance(actual, torch.Tensor) or actual.shape != expected.shape:
            return math.inf
        if expected.numel() == 0:
            return 0.0
        actual, expected = actual.double(), expected.double()
        finite = expected.isfinite()
        same = (actual == expected) | (actual.isnan() & expected.isnan())
        if not same[~finite].all():
            return math.inf
        actual, expected = actual[finite], expected[finite]
        if expected.numel() == 0:
            return 0.0
        error = float((actual - expected).abs().max()) / (float(expected.abs().max()) or 1.0)
        return math.inf if math.isnan(error) else error
    if isinstance(expected, dict):
        if not isinstance(actual, dict) or actual.keys() != expected.keys():
            return math.inf
        return max((relative_error(actual[key], value) for key, value in expected.items()), default=0.0)
    if isinstance(expected, (list, tuple)):
        if not isinstance(actual, (list, tuple)) or len(actual) != len(expected):
            return math.inf
        return max((relative_error(*pair) for pair in zip(actual, expected, strict=True)), default=0.0)
    return 0.0 if actual == expected else math.inf
