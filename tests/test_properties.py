"""Laws that hold for whatever shapes, layouts, decisions and networks: hypothesis looks for those where they do not."""

import copy

import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dynexec
from dynexec import Route, ops
from dynexec.executors.proof import relative_error

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "gaps between rows": lambda x: torch.stack((x, x), 1)[:, 0],
    "gaps inside": lambda x: torch.stack((x, x), -1)[..., 0],
    "rows last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}
seeds = st.integers(0, 2**31 - 1)


@st.composite
def batches(draw):
    """A batch ``[N, C, H, W]`` of some layout, and row numbers without duplicates."""
    shape = [draw(st.integers(0, high)) for high in (6, 3, 3, 3)]
    generator = torch.Generator().manual_seed(draw(seeds))
    x = torch.randn(shape, generator=generator).to(draw(st.sampled_from(DTYPES)))
    x = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](x)
    index = torch.randperm(shape[0], generator=generator)[: draw(st.integers(0, shape[0]))]
    return x, index.to(draw(st.sampled_from([torch.int32, torch.int64])))


@settings(max_examples=100, deadline=None)
@given(batches())
def test_scattering_what_was_gathered_changes_nothing(batch):
    x, index = batch
    assert torch.equal(ops.scatter_rows(x, index, ops.gather_rows(x, index)), x)


@settings(max_examples=100, deadline=None)
@given(batches(), seeds)
def test_gathering_twice_is_gathering_what_both_name(batch, seed):
    x, index = batch
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(ops.gather_rows(ops.gather_rows(x, index), order), ops.gather_rows(x, index[order]))


@settings(max_examples=150, deadline=None)
@given(batches(), st.booleans(), st.booleans(), st.sampled_from(sorted(LAYOUTS)), st.booleans())
def test_scatter_is_what_plain_torch_does(batch, add, relu, layout, in_place):
    x, index = batch
    rows = LAYOUTS[layout](torch.randn(len(index), *x.shape[1:]).to(x.dtype))
    expected = x.clone()
    new = rows + expected[index] if add else rows
    expected[index] = torch.relu(new) if relu else new
    scatter = ops.scatter_rows_ if in_place else ops.scatter_rows
    assert torch.equal(scatter(x, index, rows, add=add, relu=relu), expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(0, 6), seeds)
def test_one_row_number_for_many_rows(n, count, seed):
    """An index that is expanded, so that its elements share memory."""
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    index = torch.tensor([seed % n]).expand(count)
    assert torch.equal(ops.gather_rows(x, index), x[index])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 12), st.integers(0, 5), st.floats(0, 1), st.sampled_from(["rows", "columns", "steps"]), seeds)
def test_a_route_gives_the_decisions_back(n, blocks, keep, strides, seed):
    decisions = torch.rand(n, blocks, generator=torch.Generator().manual_seed(seed)) < keep
    given = {
        "rows": lambda: decisions,
        "columns": lambda: decisions.t().contiguous().t(),
        "steps": lambda: torch.stack((decisions, ~decisions), -1)[..., 0],
    }[strides]()
    route, back = Route.from_decisions(given), torch.zeros(n, blocks, dtype=torch.bool)
    for block in range(blocks):
        back[route.group(block).long(), block] = True
        assert sorted(route.group(block, 0).tolist() + route.group(block, 1).tolist()) == list(range(n))
    assert torch.equal(back, decisions)


class Block(nn.Module):
    """A residual block as hypothesis wants it."""

    def __init__(self, inputs, outputs, stride, kernel, activation, last):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            activation(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=last is None),
            nn.BatchNorm2d(outputs) if last else nn.Identity(),
        )
        self.project = None
        if stride > 1 or inputs != outputs:
            self.project = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.last = last() if last else nn.Identity()

    def forward(self, x):
        return self.last(self.body(x) + (x if self.project is None else self.project(x)))


@st.composite
def networks(draw):
    """A small network of residual blocks, with random statistics of BatchNorm."""
    width = draw(st.integers(1, 9))
    layers, activations = [nn.Conv2d(3, width, 3, padding=1)], [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish]
    for _ in range(draw(st.integers(1, 3))):
        outputs, stride = draw(st.sampled_from([width, width, draw(st.integers(1, 9))])), draw(st.integers(1, 2))
        kernel, activation = draw(st.sampled_from([1, 3, 5])), draw(st.sampled_from(activations))
        layers.append(Block(width, outputs, stride, kernel, activation, draw(st.sampled_from([None, nn.ReLU]))))
        width = outputs
    return toys.finish(nn.Sequential(*layers), draw(st.integers(0, 1000)))


@settings(max_examples=15, deadline=None)
@given(
    networks(), st.tuples(st.integers(1, 11), st.integers(1, 11)), st.sampled_from([None, "masked", "compact"]), seeds
)
def test_a_network_frozen_and_masked_give_the_same(model, size, executor, seed):
    generator = torch.Generator().manual_seed(seed)
    unchanged = copy.deepcopy(model)
    num_blocks = dynexec.convert(model).num_blocks
    frozen = dynexec.freeze(model, torch.randn(2, 3, *size, generator=generator), executor=executor)
    for n in (0, 1, 5):
        x = torch.randn(n, 3, *size, generator=generator)
        decisions = torch.rand(n, num_blocks, generator=generator) < 0.5
        expected = toys.run(model, x, decisions, mode="capacity")
        assert relative_error(frozen(x, decisions), expected) < 1e-5
        assert relative_error(toys.run(model, x, decisions), expected) < 1e-5
    dynexec.revert(model)
    with torch.no_grad():
        assert torch.equal(model(x), unchanged(x))
