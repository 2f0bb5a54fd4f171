"""The Triton kernels against the reference of their ops, in the interpreter where there is no GPU."""

import itertools
from dataclasses import replace

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, KEEPS, Rows, check, images
from rows import CASES, MODES, check_merge, expected_scatter, make, numbers

from dynexec import dispatch, reference
from dynexec.kernels import conv as conv_module
from dynexec.kernels import grouped as grouped_module
from dynexec.kernels.bottleneck import conv_pair
from dynexec.kernels.configs import Tile
from dynexec.kernels.conv import Workspace, conv, describe_weights
from dynexec.kernels.depthwise import depthwise
from dynexec.kernels.grouped import grouped_conv
from dynexec.kernels.plan import find_body, plan
from dynexec.kernels.pointwise import combine, pool
from dynexec.kernels.rows import move_rows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:invalid value:RuntimeWarning")
# The interpreter is slow.
KEEPS_AND_DTYPES = [(keep, DTYPES[0]) for keep in (None, *KEEPS)] + [("some", dtype) for dtype in DTYPES[1:]]
ACTIVATIONS = list(reference.ACTIVATIONS)
TILE = Tile(32, 16, 16, 4, 2, 16)
# channels in and out, kernel, stride, padding, dilation, height, width
GEOMETRIES = [
    (16, 32, (3, 3), (1, 1), (1, 1), (1, 1), 6, 7),
    (32, 48, (1, 1), (1, 1), (0, 0), (1, 1), 5, 5),
    (16, 16, (1, 1), (2, 2), (0, 0), (1, 1), 7, 6),
    (3, 20, (5, 5), (2, 2), (2, 2), (1, 1), 9, 8),
    (24, 40, (3, 3), (2, 1), (1, 0), (1, 1), 6, 5),
    (8, 16, (3, 3), (1, 1), (2, 2), (2, 2), 7, 7),
    (40, 1, (1, 3), (1, 2), (1, 2), (1, 1), 1, 1),
    (70, 130, (1, 1), (1, 1), (0, 0), (1, 1), 3, 3),
]


def size(geometry):
    _, _, kernel, stride, padding, dilation, h, w = geometry
    return [
        (s + 2 * p - d * (k - 1) - 1) // step + 1
        for s, k, step, p, d in zip((h, w), kernel, stride, padding, dilation, strict=True)
    ]


def convolution(geometry, dtype, n=4, groups=1):
    """x, weight, bias, keyword arguments of the geometry, shape of the output."""
    c, k, kernel, stride, padding, dilation, h, w = geometry
    x = images(n, c, h, w, dtype=dtype)
    weight = images(k, c // groups, *kernel, dtype=dtype) / (c // groups * kernel[0] * kernel[1]) ** 0.5
    bias = torch.randn(k, device=DEVICE)
    return x, weight, bias, {"stride": stride, "padding": padding, "dilation": dilation}, (n, k, *size(geometry))


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (37, 54), (0, 4), (4, 0), (1100, 2)])
@pytest.mark.parametrize("choices", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_plan(shape, choices, dtype):
    if dtype == torch.bool:
        choices = 2
    decisions = torch.randint(0, choices, shape).to(DEVICE, dtype)
    for given in (decisions, decisions.t().contiguous().t()):
        for actual, expected in zip(plan(given, choices), reference.plan(decisions, choices), strict=True):
            assert actual.dtype == torch.int32
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("blocks", [1, 54, 300])
@pytest.mark.parametrize("kept, body", [(1.0, 0), (0.9, 1), (0.2, 2), (0.0, 2)])
def test_which_body_a_switch_runs(blocks, kept, body):
    pairs = 20 * blocks
    decisions = (torch.randperm(pairs) < kept * pairs).reshape(20, blocks).to(DEVICE)
    _, offset = reference.plan(decisions, 2)
    dropped = int((~decisions).sum())
    assert find_body(offset, pairs // 2).tolist() == [0, body]
    assert find_body(offset, dropped).tolist() == [0, min(body, 1)]
    assert find_body(offset, max(dropped - 1, 0)).tolist() == [0, 2 * (dropped > 0)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int64, torch.uint8])
@pytest.mark.parametrize("numbers", [[], [3], [4, 0, 2], range(5)])
@pytest.mark.parametrize("row", [1, 7, 4100])
def test_rows(dtype, numbers, row):
    floating = dtype.is_floating_point
    whole = torch.randint(-9, 9, (5, row)).to(DEVICE, dtype)
    index = torch.tensor(list(numbers), dtype=torch.int32, device=DEVICE)
    part = torch.empty(len(index), row, dtype=dtype, device=DEVICE)
    move_rows(whole, part, index.long(), scatter=False)
    assert torch.equal(part, whole[index])
    for add, relu in itertools.product((False, floating), (False, floating)):
        destination, rows = whole.clone(), torch.randint(-9, 9, (len(index), row)).to(DEVICE, dtype)
        expected = reference.scatter_rows(destination, index, rows, add=add, relu=relu)
        move_rows(destination, rows, index, scatter=True, add=add, relu=relu)
        assert torch.equal(destination, expected)


@pytest.fixture
def shared_sums(monkeypatch):
    """Short sums are shared by several programs as well, as if there were more multiprocessors than tiles."""
    monkeypatch.setattr(conv_module, "TERMS", 16)
    monkeypatch.setattr(conv_module, "multiprocessors", lambda device: 64)


@pytest.mark.parametrize("keep, dtype", KEEPS_AND_DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_conv(geometry, dtype, keep, shared_sums):
    x, weight, bias, geometry, shape = convolution(geometry, dtype)
    rows = Rows(keep, len(x))
    expected = reference.conv_rows_(
        torch.zeros(shape, dtype=torch.float64, device=DEVICE),
        x.double(), weight.double(), bias.double(), rows.numbers, activation="relu", **geometry,
    )  # fmt: skip
    for workspace in (None, Workspace(DEVICE)):
        out = images(*shape, dtype=dtype)
        before = out.clone()
        more = {"workspace": workspace, "tile": TILE, "activation": "relu", **geometry, **rows.arguments}
        conv(rows.poison(x), weight, bias, out, **more)
        check(out, before, rows, expected)
        if workspace is not None:
            assert not workspace.arrived.any()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="needs to know how many multiprocessors there are")
@pytest.mark.parametrize("samples", [8, 7, 5])  # two tiles, none and two are left for the last round
def test_only_sums_of_the_last_round_are_shared(samples, shared_sums, monkeypatch):
    """Of four programs: the other tiles have the bits that they have without sharing, and need no workspace."""
    monkeypatch.setattr(conv_module, "multiprocessors", lambda device: 4)
    workspace, used = Workspace(DEVICE), 4 * TILE.bm * TILE.bn
    workspace.partial, workspace.arrived = torch.full((2 * used,), torch.nan), torch.zeros(8, dtype=torch.int32)
    x, weight, bias, geometry, shape = convolution(GEOMETRIES[0], torch.float32, n=8)
    tile = replace(TILE, programs=1)
    numbers = {"index": torch.arange(8, dtype=torch.int32), "offset": torch.tensor([0, samples], dtype=torch.int32)}
    alone, shared = (
        conv(x, weight, bias, images(*shape, dtype=x.dtype), workspace=workspace, tile=tile, **geometry, **numbers)[
            :samples
        ]
        for workspace in (None, workspace)
    )
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-5)
    k, height, width = shape[1:]
    tiles = -(-samples * height * width // TILE.bm) * (k // TILE.bn)
    alone, shared = (y.permute(0, 2, 3, 1).reshape(-1, k) for y in (alone, shared))
    for first in range(0, len(alone), TILE.bm):
        for column in range(0, k, TILE.bn):
            number = first // TILE.bm * (k // TILE.bn) + column // TILE.bn
            cells = slice(first, first + TILE.bm), slice(column, column + TILE.bn)
            assert torch.equal(alone[cells], shared[cells]) == (number < tiles // 4 * 4)
    assert not workspace.arrived.any() and workspace.partial[used:].isnan().all()
    assert workspace.partial[:used].isnan().all() == (tiles % 4 == 0)


@pytest.mark.parametrize("keep, dtype", KEEPS_AND_DTYPES[1:])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_conv_adds_in_place(dtype, keep, activation, shared_sums):
    x, weight, bias, geometry, shape = convolution(GEOMETRIES[0], dtype, n=5)
    rows, out = Rows(keep, len(x)), images(*shape, dtype=dtype)
    before = out.clone()
    expected = reference.conv_rows_(
        out.double(), x.double(), weight.double(), bias.double(), rows.numbers,
        residual=out.double(), activation=activation, **geometry,
    )  # fmt: skip
    more = {"workspace": Workspace(DEVICE), **geometry, **rows.arguments}
    conv(x, weight, bias, out, residual=out, activation=activation, **more)
    check(out, before, rows, expected)


needs_hopper = pytest.mark.skipif(
    DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (9, 0), reason="needs Hopper"
)


@needs_hopper
@pytest.mark.parametrize("keep", [None, "none", "some"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_conv_with_weights_copied_in_blocks(geometry, keep, shared_sums, monkeypatch):
    """The same bits as with weights that every thread copies; which is what other numbers of channels get."""
    x, weight, bias, geometry, shape = convolution(geometry, torch.float16)
    rows, outs, descriptors = Rows(keep, len(x)), [], []

    def take_down(*given):
        descriptors.append(describe_weights(*given))
        return descriptors[-1]

    monkeypatch.setattr(conv_module, "describe_weights", take_down)
    for tile in (TILE, replace(TILE, tma=True)):
        out = torch.zeros(shape, device=DEVICE, dtype=x.dtype).to(memory_format=torch.channels_last)
        outs.append(conv(x, weight, bias, out, tile=tile, workspace=Workspace(DEVICE), **geometry, **rows.arguments))
    assert torch.equal(*outs)
    whole = all(channels % 16 == 0 for channels in weight.shape[:2])
    assert [descriptor is not None for descriptor in descriptors] == [False, whole]


def test_weights_that_lie_askew_are_not_copied_in_blocks():
    memory = images(33, 16, 1, 1, dtype=torch.float16).flatten()
    weight = memory[1 : 1 + 32 * 16].view(32, 16, 1, 1)
    assert describe_weights(weight, replace(TILE, tma=True)) is None


def test_conv_of_no_samples():
    x, weight, bias, geometry, shape = convolution(GEOMETRIES[0], torch.float16, n=0)
    out = images(*shape, dtype=torch.float16)
    assert conv(x, weight, bias, out, **geometry) is out


def test_conv_gives_a_sample_the_same_bits_in_any_batch():
    x, weight, bias, geometry, shape = convolution(GEOMETRIES[0], torch.float16, n=5)
    whole = conv(x, weight, bias, images(*shape, dtype=x.dtype), tile=TILE, **geometry)
    rows = Rows("some", 5)
    part = conv(x, weight, bias, images(*shape, dtype=x.dtype), tile=TILE, **geometry, **rows.arguments)
    assert torch.equal(part[rows.numbers], whole[rows.numbers])


def test_conv_behind_zeros_on_two_sides_reads_no_further_than_the_image():
    memory = images(5, 16, 6, 6, dtype=torch.float32)
    x, weight, bias = memory[:4], images(16, 16, 1, 1, dtype=torch.float32), torch.randn(16, device=DEVICE)
    memory[4] = torch.nan
    padded = torch.nn.functional.pad(x, (0, 1, 0, 1))
    expected = torch.nn.functional.conv2d(padded.double(), weight.double(), bias.double())
    out = conv(x, weight, bias, images(4, 16, 7, 7, dtype=x.dtype), tile=TILE, precision="ieee")
    check(out, out, Rows(None, 4), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_conv_passes_on_what_is_not_finite(value):
    x, weight, bias, geometry, shape = convolution(GEOMETRIES[0], torch.float32)
    x[2, 1, 3, 3] = value
    rows = Rows("all", len(x))
    zeros = torch.zeros(shape, device=DEVICE)
    wide = (t.double() for t in (zeros, x, weight, bias))
    expected = reference.conv_rows_(*wide, rows.numbers, activation="relu", **geometry).float()
    more = {"tile": TILE, "activation": "relu", "precision": "ieee", **geometry}
    out = conv(x, weight, bias, images(*shape, dtype=x.dtype), **more)
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep, dtype", KEEPS_AND_DTYPES)
@pytest.mark.parametrize("middle, k, stride", [(16, 64, (1, 1)), (20, 70, (2, 2))])
def test_conv_pair(keep, dtype, middle, k, stride):
    geometry = (24, middle, (3, 3), stride, (1, 1), (1, 1), 6, 5)
    x, weight, bias, keywords, shape = convolution(geometry, dtype)
    last_weight, last_bias = images(k, middle, 1, 1, dtype=dtype) / middle**0.5, torch.randn(k, device=DEVICE)
    rows, out = Rows(keep, len(x)), images(shape[0], k, *shape[2:], dtype=dtype)
    before = out.clone()
    between = reference.conv_rows_(
        torch.zeros(shape, dtype=torch.float64, device=DEVICE),
        x.double(), weight.double(), bias.double(), rows.numbers, activation="relu", **keywords,
    )  # fmt: skip
    expected = reference.conv_rows_(
        out.double(), between.to(dtype).double(), last_weight.double(), last_bias.double(), rows.numbers,
        residual=out.double(), activation="relu",
    )  # fmt: skip
    more = {"tile": TILE, **keywords, **rows.arguments}
    conv_pair(rows.poison(x), weight, bias, last_weight, last_bias, out, residual=out, activation="relu", **more)
    check(out, before, rows, expected)


@pytest.mark.parametrize("keep, dtype", KEEPS_AND_DTYPES)
@pytest.mark.parametrize("c, kernel, stride, dilation", [(16, 3, 1, 1), (70, 5, 2, 1), (8, 3, 1, 2)])
def test_depthwise(keep, dtype, c, kernel, stride, dilation):
    geometry = (c, c, (kernel,) * 2, (stride,) * 2, (kernel // 2 * dilation,) * 2, (dilation,) * 2, 7, 6)
    x, weight, bias, keywords, shape = convolution(geometry, dtype, groups=c)
    rows, out = Rows(keep, len(x)), images(*shape, dtype=dtype)
    before = out.clone()
    expected = reference.conv_rows_(
        out.double(), x.double(), weight.double(), bias.double(), rows.numbers,
        activation="silu", groups=c, **keywords,
    )  # fmt: skip
    weight = weight.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    depthwise(rows.poison(x), weight, bias, out, activation="silu", **keywords, **rows.arguments)
    check(out, before, rows, expected)


@pytest.mark.parametrize("keep, dtype", KEEPS_AND_DTYPES)
@pytest.mark.parametrize("operation", ["add", "multiply", None])
@pytest.mark.parametrize("more_channels", [0, 9])
def test_combine(keep, dtype, operation, more_channels):
    x, rows = images(4, 70, 3, 5, dtype=dtype), Rows(keep, 4)
    other = images(4, 70, *((1, 1) if operation == "multiply" else (3, 5)), dtype=dtype)
    out = images(4, 70 + more_channels, 3, 5, dtype=dtype)
    before = out.clone()
    given = {operation: other} if operation else {}
    wide = {name: value.double() for name, value in given.items()}
    expected = reference.combine_rows_(out.double(), x.double(), rows.numbers, activation="relu6", **wide)
    combine(rows.poison(x), out, activation="relu6", **given, **rows.arguments)
    check(out, before, rows, expected)


@pytest.mark.parametrize("keep, dtype", KEEPS_AND_DTYPES)
@pytest.mark.parametrize(
    "kind, kernel, stride, padding, divisor, size",
    [
        ("max", (3, 3), (2, 2), (1, 1), 0, (4, 3)),
        ("max", (2, 2), (2, 2), (0, 0), 0, (4, 3)),  # the last one stands over the edge
        ("max", (7, 6), (7, 6), (0, 0), 0, (1, 1)),
        ("sum", (7, 6), (7, 6), (0, 0), 0, (1, 1)),
        ("sum", (7, 6), (7, 6), (0, 0), 10, (1, 1)),
        ("sum", (3, 3), (1, 2), (1, 1), 0, (7, 3)),
        ("sum", (3, 3), (2, 2), (1, 1), 9, (4, 3)),
    ],
)
def test_pool(keep, dtype, kind, kernel, stride, padding, divisor, size):
    x, rows, out = images(5, 70, 7, 6, dtype=dtype), Rows(keep, 5), images(5, 70, *size, dtype=dtype)
    before = out.clone()
    more = {"stride": stride, "padding": padding, "divisor": divisor}
    expected = reference.pool_rows_(out.double(), x.double(), rows.numbers, kind, kernel, **more)
    pool(rows.poison(x), out, kind, kernel, **more, **rows.arguments)
    check(out, before, rows, expected)


@pytest.mark.parametrize("counts", [(2, 1, 1, 0), (0, 0, 0, 0), (4, 0, 0, 0), (0, 0, 0, 4), (0, 2, 0, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2])
def test_grouped_conv(counts, dtype, stride):
    """Two image sizes times two weight sets."""
    c, k, n = 24, 20, 4
    sizes, sets = [(8, 8), (8, 8), (5, 3), (5, 3)], [0, 1, 0, 1]
    weight = torch.stack([images(k, c, 3, 3, dtype=dtype) / (9 * c) ** 0.5 for _ in range(2)])
    bias = torch.randn(2, k, device=DEVICE)
    samples = torch.randperm(n)[: sum(counts)]
    offset = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    inputs, before = [], []
    for h, w in dict.fromkeys(sizes):
        inputs.append(images(n, c, h, w, dtype=dtype))
        before.append(images(n, k, (h - 1) // stride + 1, (w - 1) // stride + 1, dtype=dtype))
    flat, out = (torch.cat([t.permute(0, 2, 3, 1).flatten(0, 2) for t in parts]) for parts in (inputs, before))
    groups, expected, kept = [], [t.double() for t in before], [[], []]
    for number, (size, chosen) in enumerate(zip(sizes, samples.split(list(counts)), strict=True)):
        where = number // 2
        firsts = [sum(t.shape[0] * t.shape[2] * t.shape[3] for t in parts[:where]) for parts in (inputs, before)]
        groups.append([*size, *before[where].shape[2:], *firsts, sets[number]])
        reference.conv_rows_(
            expected[where], inputs[where].double(), weight[sets[number]].double(), bias[sets[number]].double(),
            chosen.to(DEVICE), residual=before[where].double(), stride=stride, padding=1,
        )  # fmt: skip
        kept[where] += chosen.tolist()
    groups = torch.tensor(groups, dtype=torch.int32, device=DEVICE)
    grouped_conv(
        flat, weight, bias, out, groups, samples.int().to(DEVICE), offset.to(DEVICE),
        stride=(stride, stride), padding=(1, 1), residual=out, tile=TILE,
    )  # fmt: skip
    for where, part in enumerate(out.split([t[:, 0].numel() for t in before])):
        rows = Rows("none", n)
        rows.numbers = torch.tensor(kept[where], dtype=torch.int64, device=DEVICE)
        rows.dropped = torch.tensor([i for i in range(n) if i not in kept[where]], dtype=torch.int64, device=DEVICE)
        actual = part.view(n, *before[where].shape[2:], k).permute(0, 3, 1, 2)
        check(actual, before[where], rows, expected[where])


@needs_hopper
@pytest.mark.parametrize("counts", [(3, 2), (0, 5), (5, 0), (1, 0)])
@pytest.mark.parametrize("channels, blocks", [((32, 48), True), ((24, 32), False), ((32, 40), False)])
def test_grouped_conv_with_weights_copied_in_blocks(counts, channels, blocks, monkeypatch):
    """As for one convolution; blocks of the second weight set begin where the first ends."""
    (c, k), n, descriptors = channels, 5, []
    flat = images(n, c, 7, 6, dtype=torch.float16).permute(0, 2, 3, 1).flatten(0, 2)
    weight = torch.stack([images(k, c, 3, 3, dtype=torch.float16) / (9 * c) ** 0.5 for _ in range(2)])
    bias, samples = torch.randn(2, k, device=DEVICE), torch.randperm(n)[: sum(counts)].int().to(DEVICE)
    offset = torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32, device=DEVICE)
    groups = torch.tensor([[7, 6, 7, 6, 0, 0, 0], [7, 6, 7, 6, 0, 0, 1]], dtype=torch.int32, device=DEVICE)

    def take_down(*given):
        descriptors.append(describe_weights(*given))
        return descriptors[-1]

    monkeypatch.setattr(grouped_module, "describe_weights", take_down)
    outs = [torch.full((len(flat), k), 3.0, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    for tile, out in zip((TILE, replace(TILE, tma=True)), outs):
        grouped_conv(flat, weight, bias, out, groups, samples, offset, padding=(1, 1), residual=out, tile=tile)
    assert torch.equal(*outs)
    assert int((outs[0] != 3.0).any(1).sum()) == 42 * sum(counts)
    assert any(descriptor is not None for descriptor in descriptors) == blocks


@pytest.mark.parametrize("row,layout", CASES, ids=str)
@pytest.mark.parametrize("which", ["none", "reversed"])
def test_ops_of_a_gpu(row, layout, which):
    """What the dispatcher calls on a GPU gives what the portable implementation gives, in the same layout."""
    whole, index = make(9, row, layout=layout).to(DEVICE), numbers(which, 9).to(DEVICE)
    gathered = dispatch._triton_gather_rows(whole, index)
    assert torch.equal(gathered, whole[index])
    assert gathered.stride()[1:] == reference.gather_rows(whole, index).stride()[1:]
    rows = make(len(index), row, layout=layout).to(DEVICE)
    for add, relu in MODES:
        destination = whole.clone()
        dispatch._triton_scatter_rows_(destination, index, rows, add, relu)
        assert torch.equal(destination, expected_scatter(whole, index, rows, add, relu))
        check_merge(dispatch._triton_merge_rows, dispatch._triton_gather_passed, whole, index, rows, add, relu)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_merge_of_special_numbers_on_a_gpu(dtype):
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1.0, -1.0])
    rest, rows = (special[torch.randint(7, (n, 2100))].to(DEVICE, dtype) for n in (5, 3))
    index = torch.tensor([4, 0, 3], device=DEVICE)
    check_merge(dispatch._triton_merge_rows, dispatch._triton_gather_passed, rest, index, rows, True, True)


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_ops_of_a_gpu_on_other_dtypes(dtype):
    whole, index = torch.randint(0, 2, (6, 3, 4)).to(DEVICE, dtype), torch.tensor([5, 0], device=DEVICE)
    assert torch.equal(dispatch._triton_gather_rows(whole, index), whole[index])
    rows = (~whole[:2].bool()).to(dtype)
    expected = expected_scatter(whole, index, rows, False, False)
    dispatch._triton_scatter_rows_(whole, index, rows, False, False)
    assert torch.equal(whole, expected)
