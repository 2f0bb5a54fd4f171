"""Expansion, depthwise convolution and projection on bands of rows: the same bits as one after the other."""

import pytest
import torch
import torch.nn.functional as F
from engine_programs import Inverted, close, needs_engine, packed, program, run
from hypothesis import given, settings
from hypothesis import strategies as st

from dynexec.executors.engine import Program

pytestmark = needs_engine

ALWAYS, NEVER = 1, 1 << 40  # floats between the instructions from which they run on bands


def made_of(program):
    """How many instructions run on bands with each one."""
    fields, instructions = 17, int(program.code[6])
    return program.code[-fields * instructions :].reshape(instructions, fields)[:, -1].tolist()


@settings(max_examples=150, deadline=None)
@given(
    inputs=st.integers(2, 40),
    channels=st.integers(2, 130),
    outputs=st.integers(1, 40),
    size=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    geometry=st.tuples(st.sampled_from([1, 3, 5]), st.integers(1, 3), st.integers(1, 2)),
    layers=st.sampled_from([(True, True), (True, False), (False, True)]),
    residual=st.booleans(),
    samples=st.integers(0, 4),
    schedule=st.tuples(st.integers(1, 5), st.integers(0, 3), st.booleans()),
    seed=st.integers(0, 10**6),
)
def test_bands(inputs, channels, outputs, size, geometry, layers, residual, samples, schedule, seed):
    torch.manual_seed(seed)
    kernel, stride, dilation = geometry
    residual = residual and stride == 1 and layers[1]
    block = Inverted(inputs, channels, outputs, kernel, stride, dilation, *layers, residual)
    x = torch.randn(samples, inputs, *size)
    threads, group, together = schedule
    on_bands = program(block.emit, x.shape[1:], band_floats=ALWAYS)
    assert sum(made_of(on_bands)) == sum(layers)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y = run(on_bands, x, group=group, together=together)
    finally:
        torch.set_num_threads(before)
    close(y, block.expected(x.double()))
    assert torch.equal(y, run(program(block.emit, x.shape[1:], band_floats=NEVER), x))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize(("rows", "channels"), [(1, 40), (4, 40), (9, 40), (30, 40), (14, 700)])
@pytest.mark.parametrize("kernel", [3, 5])
def test_a_gated_block_in_place(threads, rows, channels, kernel):
    """Its output overwrites its input, row by row. Of 700 channels bands are one or two rows."""
    columns, samples = 3, 6
    blocks = [Inverted(12, channels, 12, kernel, 1, 1, True, True, True) for _ in range(columns)]
    stem = packed(torch.randn(12, 12, 3, 3) / 10, torch.randn(12), padding=1)

    def emit(builder, x):
        x = builder.conv(stem, x)
        for column, block in enumerate(blocks):
            builder.begin_unit()
            gate = builder.gate(column)
            block.emit(builder, x, in_place=True)
            builder.end_gate(gate)
        builder.begin_unit()
        return x

    made = program(emit, (12, rows, 11), columns, band_floats=ALWAYS)
    assert sum(made_of(made)) == 2 * columns
    x, decisions = torch.randn(samples, 12, rows, 11), torch.rand(samples, columns) < 0.6
    decisions[0], decisions[1] = True, False
    expected = F.conv2d(x.double(), stem.weight.double(), stem.bias.double(), padding=1)
    for column, block in enumerate(blocks):
        expected = torch.where(decisions[:, column].reshape(-1, 1, 1, 1), block.expected(expected), expected)
    whole = made(x, decisions)
    close(whole, expected)
    poisoned = x.clone()
    poisoned[2] = float("nan")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for group in (1, 4, 6):
            for together in (False, True):
                assert torch.equal(made(x, decisions, group, together), whole)
        output = made(poisoned, decisions, 0, True)
    finally:
        torch.set_num_threads(before)
    others = [0, 1, 3, 4, 5]
    assert output[2].isnan().all() and torch.equal(output[others], whole[others])


def test_what_something_else_reads_is_not_kept_to_bands():
    block = Inverted(8, 24, 8, 3, 1, 1, True, True, False)

    def emit(builder, x):
        expanded = builder.conv(block.layers[0][0], x)
        filtered = builder.conv(block.layers[1][0], expanded)
        return builder.add(builder.conv(block.layers[2][0], filtered), builder.conv(block.layers[2][0], expanded))

    made = program(emit, (8, 9, 9), band_floats=ALWAYS)
    assert made_of(made).count(1) == 1 and 2 not in made_of(made)  # depthwise and projection, without the expansion
    x = torch.randn(2, 8, 9, 9)
    apart = program(emit, (8, 9, 9), band_floats=NEVER)
    assert torch.equal(run(made, x), run(apart, x))


def test_a_projection_is_in_one_group_only():
    first, second = (Inverted(8, 8, 8, 3, 1, 1, False, True, False) for _ in range(2))

    def emit(builder, x):
        return second.emit(builder, first.emit(builder, x))

    made = program(emit, (8, 9, 9), band_floats=ALWAYS)
    assert made_of(made) == [0, 1, 0, 1, 0, 0]
    x = torch.randn(2, 8, 9, 9)
    close(run(made, x), second.expected(first.expected(x.double())))


def test_an_expansion_with_zeros_around_it_is_none():
    block = Inverted(8, 24, 8, 3, 1, 1, True, True, False)
    made = program(
        lambda b, x: b.conv(block.layers[1][0], b.conv(block.layers[0][0], x, zeros=(0, 0, 1, 1))),
        (8, 9, 9),
        band_floats=ALWAYS,
    )
    x = torch.randn(2, 8, 9, 9)
    padded = F.pad(x.double(), (0, 1, 0, 1))
    block.layers.pop()
    close(run(made, x), block.expected(padded))


def test_in_place_needs_what_was_read_to_be_behind():
    made = program(
        lambda b, x: Inverted(8, 24, 8, 3, 1, 1, True, True, True).emit(b, b.add(x), in_place=True),
        (8, 9, 9),
        band_floats=ALWAYS,
    )
    code = made.code.clone()
    fields, instructions = 17, int(code[6])
    depthwise = len(code) - fields * (instructions - 3)
    buffer = 7 + 3 * int(code[4]) + 10 * int(code[depthwise + 1])
    code[buffer + 6] = 9  # a border at the top that holds the padding
    assert code[depthwise] == 4 and code[depthwise + 13] == 1
    Program(code, torch.randn(made.num_weights))
    code[depthwise + 13] = 5
    with pytest.raises(ValueError, match="memory is shared"):
        Program(code, torch.randn(made.num_weights))


def test_small_values_between_do_not_need_bands():
    block = Inverted(8, 24, 8, 3, 1, 1, True, True, True)
    assert not any(made_of(program(block.emit, (8, 9, 9))))


def test_broken_programs_are_refused_or_run():
    made = program(Inverted(8, 24, 8, 3, 1, 1, True, True, True).emit, (8, 9, 9), band_floats=ALWAYS)
    weights = torch.randn(made.num_weights)
    x = torch.randn(2, 8, 9, 9)
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(2000):
        code = made.code.clone()
        for _ in range(int(torch.randint(1, 3, (), generator=generator))):
            code[int(torch.randint(len(code), (), generator=generator))] = int(
                torch.randint(-2, 12, (), generator=generator)
            )
        try:
            run(Program(code, weights), x)
        except ValueError:
            refused += 1
    assert 800 < refused < 2000
