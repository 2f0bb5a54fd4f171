"""The CPU engine against float64 PyTorch: geometries, values that are no numbers, batches, threads, broken programs."""

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from engine_programs import close, needs_engine, packed, program, run
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from dynexec.executors.engine import Program
from dynexec.executors.packing import ACTIVATIONS

BANDS = Path(__file__).with_name("test_engine_bands.py")
pytestmark = needs_engine


def _scale(sums):
    """The largest, but at least 1, the size of what is added: a few sums may happen to cancel."""
    return max(1.0, float(sums.abs().max())) if sums.numel() else 1.0


def smooth(activation, x):
    return ACTIVATIONS[activation][0](x)


@settings(max_examples=300, deadline=None)
@given(
    channels=st.integers(1, 130),
    outputs=st.integers(1, 130),
    height=st.integers(1, 12),
    width=st.integers(1, 70),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    samples=st.integers(0, 5),
    activation=st.sampled_from(list(ACTIVATIONS)),
    residual=st.booleans(),
    depthwise=st.booleans(),
    group=st.integers(0, 5),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_convolutions(
    channels, outputs, height, width, kernel, stride, dilation, padding, samples, activation, residual, depthwise,
    group, channels_last, seed,
):  # fmt: skip
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation)]
    if height + 2 * padding[0] < reach[0] or width + 2 * padding[1] < reach[1]:
        return
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    groups = channels if depthwise else 1
    outputs = channels if depthwise else outputs
    weight = draw(outputs, channels // groups, *kernel) / (channels // groups * kernel[0] * kernel[1]) ** 0.5
    bias, x = draw(outputs), draw(samples, channels, height, width)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    conv = packed(weight, bias, stride, padding, dilation, groups, activation)
    other = packed(draw(outputs, channels, 1, 1), draw(outputs))
    expected = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding, dilation, groups)
    size = tuple(expected.shape[2:])
    residual = residual and size == (height, width) and not (depthwise and channels > 1)
    if residual:
        expected = expected + F.conv2d(x.double(), other.weight.double(), other.bias.double())
    scale, expected = _scale(expected), smooth(activation, expected)

    def emit(builder, value):
        if not residual:
            return builder.conv(conv, value)
        stream = builder.conv(other, value)
        return builder.conv(conv, value, stream, out=stream if seed % 2 else None)

    close(run(program(emit, (channels, height, width)), x, group=group), expected, scale=scale)


@settings(max_examples=100, deadline=None)
@given(
    channels=st.integers(16, 160),
    outputs=st.integers(1, 70),
    size=st.tuples(st.integers(1, 21), st.integers(1, 21)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    samples=st.integers(0, 5),
    activation=st.sampled_from(list(ACTIVATIONS)),
    seed=st.integers(0, 2**31),
)
def test_winograd(channels, outputs, size, padding, samples, activation, seed):
    assume(min(size[0] + 2 * padding[0], size[1] + 2 * padding[1]) >= 5)  # where it takes fewer products
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    bias, x = torch.randn(outputs, generator=generator), torch.randn(samples, channels, *size, generator=generator)
    first = packed(weight, bias, padding=padding, activation=activation)
    second = packed(weight.flip(2).transpose(2, 3), bias, padding=padding)

    def emit(builder, value):
        stream = builder.conv(second, value)
        return builder.conv(first, value, stream, out=stream if seed % 2 else None)

    made = program(emit, (channels, *size))
    assert made.code.tolist() != program(emit, (channels, *size), winograd=False).code.tolist()
    convolve = lambda conv: F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=padding)  # noqa: E731
    expected = convolve(first) + convolve(second)
    close(run(made, x), smooth(activation, expected), 2e-5, _scale(expected))


@settings(max_examples=100, deadline=None)
@given(
    channels=st.integers(120, 140),
    outputs=st.integers(1, 40),
    size=st.tuples(st.integers(1, 15), st.integers(1, 15)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    dilation=st.tuples(st.integers(2, 20), st.integers(2, 20)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    more=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    samples=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_dilated_convolutions_most_of_whose_taps_are_padding(
    channels, outputs, size, kernel, dilation, stride, more, samples, seed
):
    """Parts of their sums are left out, for some pixels all but one."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    padding = [(k - 1) * d // 2 + m for k, d, m in zip(kernel, dilation, more)]
    assume(all(s + 2 * p > (k - 1) * d for s, p, k, d in zip(size, padding, kernel, dilation)))
    weight, bias = draw(outputs, channels, *kernel) / (channels * kernel[0] * kernel[1]) ** 0.5, draw(outputs)
    conv, x = packed(weight, bias, stride, padding, dilation, activation="relu"), draw(samples, channels, *size)
    again = packed(draw(outputs, channels, *kernel) / 30, bias, stride, padding, dilation)

    def emit(builder, value):
        first = builder.conv(again, value)
        return builder.conv(conv, value, first, out=first if seed % 2 else None)

    expected = sum(
        F.conv2d(x.double(), c.weight.double(), c.bias.double(), stride, padding, dilation) for c in (again, conv)
    )
    close(run(program(emit, (channels, *size)), x), F.relu(expected), 2e-5, _scale(expected))


@pytest.mark.parametrize(
    ("size", "chosen"), [((1, 1), False), ((2, 2), False), ((1, 9), False), ((3, 3), True), ((5, 3), True)]
)
def test_winograd_is_for_images_that_fill_its_tiles(size, chosen):
    conv = packed(torch.randn(16, 16, 3, 3), torch.randn(16), padding=1)
    codes = [program(lambda b, v: b.conv(conv, v), (16, *size), winograd=w).code.tolist() for w in (False, True)]
    assert (codes[0] != codes[1]) == chosen


def test_denormals_are_no_zeros():
    """Nothing that the engine or its threads set up flushes them."""
    conv = packed(torch.randn(20, 20, 1, 1), torch.zeros(20))
    depthwise = packed(torch.randn(20, 1, 3, 3), torch.zeros(20), padding=1, groups=20)
    x = 1e-40 * torch.randn(3, 20, 5, 5)
    y = F.conv2d(x.double(), conv.weight.double())
    z = F.conv2d(x.double(), depthwise.weight.double(), padding=1, groups=20)
    for emit, expected in ((lambda b, v: b.conv(conv, v), y), (lambda b, v: b.conv(depthwise, v), z)):
        for together in (False, True):
            output = run(program(emit, x.shape[1:]), x, together=together)
            assert (output.double() - expected).abs().max() < 1e-3 * expected.abs().max() < 1e-41


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["max", "sum"]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    ceil=st.booleans(),
    channels=st.integers(1, 20),
)
def test_pooling(kind, size, kernel, stride, padding, ceil, channels):
    if 2 * padding > kernel or min(size) + 2 * padding < kernel:
        return
    x = torch.randn(2, channels, *size)
    pool = F.max_pool2d if kind == "max" else F.avg_pool2d
    options = {} if kind == "max" else {"count_include_pad": False}
    expected = pool(x.double(), kernel, stride, padding, ceil_mode=ceil, **options)
    geometry = (kernel, kernel), (stride, stride), (padding, padding)
    close(run(program(lambda b, v: b.pool(v, kind, *geometry, ceil=ceil), x.shape[1:]), x), expected)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "sigmoid"])
def test_activations_at_their_ends(activation):
    special = [0.0, -0.0, 1e-42, -1e-42, 88.0, -88.0, 104.0, -104.0, 3e38, -3e38, float("inf"), float("-inf")]
    x = torch.cat([torch.tensor([*special, float("nan")]), torch.linspace(-20, 20, 4083)]).reshape(1, 1, 64, 64)
    output = run(program(lambda b, v: b.add(v, activation=activation), (1, 64, 64)), x)
    expected = torch.sigmoid(x.double()) if activation == "sigmoid" else smooth(activation, x.double())
    assert torch.equal(output.isnan(), expected.float().isnan())
    good = ~output.isnan()
    assert torch.allclose(output[good], expected[good].float(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3, 4, 6, 8, 16])
def test_the_input_is_read_and_overwritten_by_every_instruction(channels):
    """Its pixels follow each other without gaps only where convolutions alone read them."""
    conv = packed(torch.randn(channels, channels, 3, 3), torch.randn(channels), padding=1)
    depthwise = packed(torch.randn(channels, 1, 3, 3), torch.randn(channels), padding=1, groups=channels)
    x = torch.randn(2, channels, 5, 7)
    y = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    z = F.conv2d(x.double(), depthwise.weight.double(), depthwise.bias.double(), padding=1, groups=channels)
    uses = {
        "sum": (lambda b, v: b.conv(conv, v, v), y + x),
        "in place": (lambda b, v: b.conv(conv, b.conv(conv, v), v, out=v), F.conv2d(
            y, conv.weight.double(), conv.bias.double(), padding=1) + x),
        "overwritten": (lambda b, v: b.add(b.conv(conv, v), v, out=v), y + x),
        "product": (lambda b, v: b.multiply(b.conv(conv, v), b.pool(v, "max", (5, 7), (5, 7))),
                    y * x.amax((2, 3), keepdim=True)),
    }  # fmt: skip
    if channels > 1:
        uses["depthwise"] = lambda b, v: b.add(b.conv(depthwise, v), b.conv(conv, v)), z + y
    for emit, expected in uses.values():
        close(run(program(emit, x.shape[1:]), x), expected)


def block_program(channels, size, columns=3, winograd=True):
    """Stem, three gated blocks, global pooling; and the weights."""
    draw = lambda out, inputs, k: packed(  # noqa: E731
        torch.randn(out, inputs, k, k) * (1.5 / (inputs * k * k)) ** 0.5, torch.randn(out) * 0.1, padding=k // 2,
        activation="relu",
    )  # fmt: skip
    stem, *convs = draw(channels, 3, 3), *(draw(channels, channels, 3) for _ in range(2 * columns))

    def emit(builder, x):
        x = builder.conv(stem, x)
        for column in range(columns):
            builder.begin_unit()
            gate = builder.gate(column)
            builder.conv(convs[2 * column + 1], builder.conv(convs[2 * column], x), x, out=x)
            builder.end_gate(gate)
        builder.begin_unit()
        return x

    def expected(x, decisions):
        stem_out = F.relu(F.conv2d(x, stem.weight.double(), stem.bias.double(), padding=1))
        for column in range(columns):
            first, second = convs[2 * column : 2 * column + 2]
            y = F.relu(F.conv2d(stem_out, first.weight.double(), first.bias.double(), padding=1))
            y = F.relu(F.conv2d(y, second.weight.double(), second.bias.double(), padding=1) + stem_out)
            stem_out = torch.where(decisions[:, column].reshape(-1, 1, 1, 1), y, stem_out)
        return stem_out

    return program(emit, (3, *size), columns, winograd), expected


@pytest.mark.parametrize(("channels", "size"), [(16, (9, 11)), (40, (7, 7)), (5, (16, 3))])
@pytest.mark.parametrize("samples", [1, 2, 7, 33])
def test_gates(channels, size, samples):
    made, expected = block_program(channels, size)
    x = torch.randn(samples, 3, *size)
    for keep in (0.0, 0.3, 0.7, 1.0):
        decisions = torch.rand(samples, 3) < keep
        close(made(x, decisions), expected(x.double(), decisions))


@pytest.mark.parametrize("winograd", [False, True])
def test_same_sample_same_bits(winograd):
    made, _ = block_program(24, (9, 8), winograd=winograd)
    x, decisions = torch.randn(20, 3, 9, 8), torch.rand(20, 3) < 0.6
    whole = made(x, decisions)
    order = torch.randperm(20)
    assert torch.equal(made(x[order], decisions[order]), whole[order])
    for part in (slice(0, 1), slice(3, 5), slice(7, 20)):
        assert torch.equal(made(x[part], decisions[part]), whole[part])
    for group in (1, 2, 5, 20, 64):
        for together in (False, True):
            assert torch.equal(made(x, decisions, group, together), whole)
    threads = torch.get_num_threads()
    try:
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            for n in (1, 2, 20):
                for together in (False, True):
                    assert torch.equal(made(x[:n], decisions[:n], 0, together), whole[:n])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("winograd", [False, True])
def test_dropped_samples_keep_their_bits_and_others_never_see_them(winograd):
    made, _ = block_program(16, (6, 6), winograd=winograd)
    x = torch.randn(6, 3, 6, 6)
    none = torch.zeros(6, 3, dtype=torch.bool)
    stream = made(x, none)
    decisions = none.clone()
    decisions[::2] = True
    assert torch.equal(made(x, decisions)[1::2], stream[1::2])
    poisoned = x.clone()
    poisoned[1], poisoned[3] = float("nan"), float("inf")
    output = made(poisoned, decisions)
    assert torch.equal(output[[0, 2, 4, 5]], made(x, decisions)[[0, 2, 4, 5]])
    assert not output[1].isfinite().any() and not output[3].isfinite().all()
    decisions[:] = True
    assert made(poisoned, decisions)[1].isnan().all()  # NaN passes convolutions and ReLU


def test_several_python_threads_share_a_program():
    made, _ = block_program(16, (12, 12))
    x, decisions = torch.randn(40, 3, 12, 12), torch.rand(40, 3) < 0.5
    whole = made(x, decisions)
    with ThreadPoolExecutor(4) as pool:
        parts = [slice(i, i + 1 + i % 3) for i in range(37)] * 3
        results = list(pool.map(lambda part: made(x[part], decisions[part]), parts))
    assert all(torch.equal(result, whole[part]) for result, part in zip(results, parts, strict=True))


def test_programs_are_given_up_whatever_torch_is_doing():
    x = torch.randn(1, 3, 6, 6)
    made, _ = block_program(16, (6, 6))
    handle = made.handle
    with FakeTensorMode():
        del made
        gc.collect()
    with pytest.raises(ValueError, match="there is no program"):
        torch.ops.dynexec.run_program(x, torch.ones(1, 3, dtype=torch.bool), handle, 0, False)


def test_bad_inputs_are_named():
    made, _ = block_program(16, (6, 6))
    x, decisions = torch.randn(2, 3, 6, 6), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"x must be float32 \[N, 3, 6, 6\]"):
        made(x.double(), decisions)
    with pytest.raises(ValueError, match=r"x must be float32 \[N, 3, 6, 6\]"):
        made(x[:, :, 1:], decisions)
    with pytest.raises(ValueError, match=r"decisions must be bool \[2, 3\]"):
        made(x, decisions[:1])
    with pytest.raises(ValueError, match="there is no program"):
        torch.ops.dynexec.run_program(x, decisions, 10**9, 0, False)


def test_broken_programs_are_refused_or_run():
    """Whatever the integers, the engine stays within its memory: it refuses them, or runs what they happen to say."""
    made, _ = block_program(16, (6, 6))
    weights = torch.randn(made.num_weights)
    x, decisions = torch.randn(2, 3, 6, 6), torch.ones(2, 3, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(2000):
        code = made.code.clone()
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            place = int(torch.randint(len(code), (), generator=generator))
            code[place] = int(torch.randint(-2, 40, (), generator=generator))
        try:
            broken = Program(code, weights)
            broken(x, decisions)
        except ValueError:
            refused += 1
    assert refused > 1000
    conv = packed(torch.randn(16, 16, 1, 1), torch.randn(16))
    with pytest.raises(ValueError, match="loads or stores twice"):
        program(lambda b, v: (b.store(v), b.conv(conv, v))[1], (16, 6, 6))
    for end in range(0, len(made.code), 7):
        with pytest.raises(ValueError):
            Program(made.code[:end].clone(), weights)


@pytest.mark.parametrize("kernels", ["0", "1"])
def test_every_instruction_set_that_runs_here(kernels):
    """The same tests with narrower vectors, in a process of their own: the choice is made once."""
    names = "bands or in_place or input or gates or activations or convolutions or winograd or pooling"
    command = [sys.executable, "-m", "pytest", "-q", __file__, str(BANDS), "-k", names, "-p", "no:cacheprovider"]
    result = subprocess.run(command, env={**os.environ, "DYNEXEC_KERNELS": kernels}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
