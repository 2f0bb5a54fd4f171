"""Defines when outputs count as equal."""

import copy
import math

import torch

from dynexec.nn.context import decide

PROOF_SAMPLES = 3
_LARGEST_ROUNDING = 0.1  # of the original's own: with more, it is not the same from call to call
_ROUNDING_RATIO = 10  # of Winograd's rounding errors to those of direct sums

#: Largest difference allowed, relative to the largest value of the original's output, by what is computed in. Folding
#: BatchNorm rounds the weights once more, and sums are made in another order.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


# TF32 keeps ten bits of what is multiplied, and folding BatchNorm rounds other numbers.
_TF32_TOLERANCE = 5e-3


def allows_tf32():
    """Whether cuDNN may multiply float32 as TF32."""
    cudnn = torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # torch 2.9 and later; the older setting may not be read where this one was made
        return cudnn.conv.fp32_precision == "tf32"
    return cudnn.allow_tf32


def matrix_precision(dtype):
    """Return how kernels multiply: float32 as cuDNN does."""
    return "tf32" if dtype == torch.float32 and allows_tf32() else "ieee"


def tolerance(dtype, device):
    """Return the largest difference allowed on a device, see :data:`TOLERANCE`."""
    if device.type == "cuda" and dtype == torch.float32 and allows_tf32():
        return _TF32_TOLERANCE
    return TOLERANCE[dtype]


def relative_error(actual, expected):
    """Return the largest difference of two outputs (tensors, or structures) relative to the largest of ``expected``.

    Infinite if structure or shapes differ, or if one is NaN or infinite and the other is not.
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


class Proof:
    """The original's outputs for some samples and for a single one, with half of the blocks and with all of them.

    A single sample takes other paths through the engine than a batch: all threads share its layers, as for any batch
    with fewer samples than threads. Therefore there are as many samples as threads, if there are enough images.
    """

    def __init__(self, backbone, images, num_blocks):
        generator = torch.Generator().manual_seed(0)
        samples = max(PROOF_SAMPLES, min(len(images), torch.get_num_threads()))
        x = images.repeat(-(-samples // len(images)), 1, 1, 1)[:samples]
        x = x.contiguous(memory_format=torch.channels_last)
        self.backbone, self.cases = backbone, []
        parts = [(x, 0.5), (x, 1.0), (x[:1], 0.5), (x[:1], 1.0)]
        if images.device.type == "cuda":  # other kernels run the whole batch
            parts += [(images, keep) for keep in (0.5, 1.0, 0.0)]
        for part, keep in parts:
            decisions = (torch.rand(len(part), num_blocks, generator=generator) < keep).to(x.device)
            with decide(decisions):
                self.cases.append((part, decisions, backbone(part.clone())))

    def difference(self, frozen, run=None):
        """Return how the frozen network's output differs from the original's, or None if it does not.

        ``run(frozen, x, decisions)`` defaults to its ``run``.
        """
        for x, decisions, expected in self.cases:
            actual = frozen.run(x, decisions) if run is None else run(frozen, x, decisions)
            error = relative_error(actual, expected)
            if not error <= tolerance(frozen.dtype, x.device) and not self._is_rounding(actual, expected, x, decisions):
                return f"its output differs by {error:.1e} of the largest value"
        return None

    def _is_rounding(self, actual, expected, x, decisions):
        def run_exactly():
            with decide(decisions):
                return copy.deepcopy(self.backbone).double()(x.double())

        return is_rounding(actual, expected, run_exactly)


def is_rounding(actual, expected, run_exactly):
    """Whether outputs differ because the network amplifies rounding: the original's own errors are as large.

    ``run_exactly()`` returns its output in double precision.
    """
    try:
        exact = run_exactly()
    except RuntimeError:  # it insists on its dtype
        return False
    own = relative_error(expected, exact)
    return own <= _LARGEST_ROUNDING and relative_error(actual, exact) <= _ROUNDING_RATIO * own
