"""Which blocks convert(stochastic_depth=True) takes apart, and what it says of others."""

import copy

import odd_blocks
import pytest
import torch
from drop_path_toys import ALMOST_1, DropPath, StochasticDepth, ViTBlock, assert_same, results, set_rates
from test_converted_models import COPIES
from torch import nn

import dynexec


class Odd(nn.Module):
    """A block whose forward is given as a function of the block, its input and its branch."""

    def __init__(self, forward, drop_path=None):
        super().__init__()
        self.how, self.drop_path = forward, drop_path or DropPath(0.5)
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        return self.how(self, x)


class Container(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(4, 4), DropPath(0.5))

    def forward(self, x):
        return x + self.branch(x)


def in_place(block, x):
    x += block.drop_path(block.layer(x))
    return x


def used_elsewhere(block, x):
    y = block.layer(x)
    return x + block.drop_path(y) + y


def dropped_used_twice(block, x):
    y = block.drop_path(block.layer(x))
    return x + y + y.mean()


def changed_behind_an_alias(block, x):
    y = block.layer(x)
    alias = y
    y *= 2
    return x + block.drop_path(alias)


def two_inputs(block, x):
    y = block.other(x)
    return x + y + block.drop_path(block.layer(x) * y)


def branching(block, x):
    return x + block.drop_path(block.layer(x)) if x.sum() > 0 else x


def sized_by_another(block, x):
    y = block.other(x)
    n, d = y.shape
    return block.drop_path(block.layer(x).reshape(n, d)) + y.view(n, d)


def storing(block, x):
    block.seen = block.layer(x)
    return x + block.drop_path(block.seen)


def counting(block, x):
    block.count += 1
    return x + block.drop_path(block.layer(x))


def making_a_tensor(block, x):
    return x + block.drop_path(block.layer(x + torch.rand(1)))


REASONS = [
    (Odd(lambda b, x: x + b.relu(b.drop_path(b.layer(x)))), "0.drop_path", "not added to a shortcut"),
    (Odd(lambda b, x: x - b.drop_path(b.layer(x))), "0.drop_path", "not added to a shortcut"),
    (Odd(in_place), "0.drop_path", "in place"),
    (Odd(used_elsewhere), "0.drop_path", "what it drops is used elsewhere"),
    (Odd(dropped_used_twice), "0.drop_path", "or is used elsewhere"),
    (Odd(changed_behind_an_alias), "0.drop_path", "what it drops is used elsewhere"),
    (Odd(lambda b, x: x.add_(b.drop_path(b.layer(x)))), "0.drop_path", "in place"),
    (Odd(lambda b, x: b.other(x).add_(b.drop_path(b.layer(x)))), "0.drop_path", "added to its shortcut in place"),
    (Odd(two_inputs), "0.drop_path", "starts from 2 values"),
    (Odd(sized_by_another), "0.drop_path", "needs the size of another value"),
    (Odd(lambda b, x: x + b.drop_path(b.layer(b.relu(x)))), "0.drop_path", "in place overwrites"),
    (Odd(lambda b, x: x + b.drop_path(b.layer(b.relu(x.view(x.shape))))), "0.drop_path", "in place overwrites"),
    (Odd(lambda b, x: x + b.layer(x)), "0.drop_path", "the forward of its block does not call it itself"),
    (Odd(branching), "0", "its forward cannot be traced"),
    (Odd(storing), "0", "its forward stores seen on the block"),
    (Odd(counting), "0", "its forward changes count"),
    (Odd(making_a_tensor), "0", "its forward makes a tensor"),
    (Odd(lambda b, x: x + b.drop_path(b.layer(x)), StochasticDepth(0.5, "batch")), "0.drop_path", "mode is 'batch'"),
    (Container(), "0.branch.1", "the forward of its block does not call it itself"),
]


@pytest.mark.parametrize("block, name, reason", REASONS)
def test_reasons(block, name, reason):
    model = nn.Sequential(block, ViTBlock(4, 0.5))
    conversion = dynexec.convert(model, stochastic_depth=True)
    assert [row[1] for row in conversion.converted] == ["1"] and type(model[0]) is type(block)
    assert model[0].state_dict().get("count", torch.zeros(1)) == 0
    assert [row[0] for row in conversion.skipped] == [name] and reason in conversion.skipped[0][2]
    assert f"  {name} (" in str(conversion)
    with pytest.raises(ValueError, match=rf"no stochastic depth to convert\n  {name} .*{reason}"):
        dynexec.convert(nn.Sequential(block), stochastic_depth=True)


def partly(block, x):
    x = block.relu(block.drop_path(block.layer(x))) + x
    return x + block.drop_path(block.other(x))


def twice_in_place(block, x):
    y = block.layer(x)
    y = block.drop_path(y)
    y += x
    return torch.relu_(y)


def in_place_on_the_way(block, x):
    y = block.layer(x)
    y *= 2
    y -= 1
    return x + block.drop_path(y)


def in_place_outside(block, x):
    y = block.other(x)
    alias = y
    y += 1
    return torch.relu(alias) + block.drop_path(block.layer(x))


def listed(block, x):
    for layer, drop_path in zip((block.layer, block.other), block.drop_path):
        x = x + drop_path(layer(x).reshape(x.shape[0], 2, 2).transpose(1, 2).flatten(1))
    return (x,)[0]


def by_windows(block, x):  # as Swin's
    def attend(y):
        n, _ = y.shape  # half of it unused
        return block.other(y.reshape(2 * n, 2).reshape(n, -1)).reshape(n, 4)

    n, d = x.shape
    x = x + block.drop_path(attend(block.layer(x).reshape(n, d)))
    return x.reshape(n, d // 2, 2).flatten(1)


@pytest.mark.parametrize(
    "forward, drop_path, calls",
    [
        (partly, None, 1),
        (twice_in_place, None, 1),
        (in_place_on_the_way, None, 1),
        (in_place_outside, None, 1),
        (by_windows, None, 1),
        (lambda b, x: x + b.drop_path(b.layer(x).view(x.size(0), -1).view(x.size()[0] * 1, 4)), None, 1),
        (listed, nn.ModuleList([DropPath(0.5), DropPath(0.25)]), 2),
        (lambda b, x: torch.add(b.drop_path(b.layer(x)), b.other(x)), None, 1),
        (lambda b, x: b.other(x) + b.drop_path(torch.addmm(b.layer.bias, x, b.layer.weight) * b.layer.bias), None, 1),
        (lambda b, x: (h := b.layer(x)) + b.drop_path(b.other(torch.tanh(h))), None, 1),
    ],
)
def test_odd_blocks(forward, drop_path, calls):
    block = Odd(forward, drop_path).double()
    block.how = forward
    twin, x = copy.deepcopy(block), torch.randn(6, 4).double()
    conversion = dynexec.convert(block, stochastic_depth=True)
    assert len(block._dynexec_branches.branches) == calls and len(conversion.skipped) == (forward is partly)
    for seed in range(3):
        assert_same(results(block, x, seed), results(twin, x, seed))
    set_rates(block, ALMOST_1)
    assert results(block, x, 0)[0].data_ptr() != x.data_ptr()


def test_the_forward_of_training_is_read_in_either_mode():
    block = Odd(lambda b, x: x + b.drop_path(b.layer(x)) if b.training else x - b.layer(x)).double()
    block.layer.eval()
    twin, x = copy.deepcopy(block), torch.randn(6, 4).double()
    for training in (False, True):
        block.training = training
        dynexec.convert(block, stochastic_depth=True)
        assert (block.training, block.layer.training, block.other.training) == (training, False, True)
        for mode in (False, True):
            block.training = twin.training = mode
            assert_same(results(block, x, 1), results(twin, x, 1))
        dynexec.revert(block)


class CopiesItself(ViTBlock):
    def __deepcopy__(self, memo):
        copied = CopiesItself(8, self.drop_path1.drop_prob)
        copied.load_state_dict(self.state_dict())
        return copied


def test_a_block_that_copies_itself_and_one_that_is_registered_twice():
    block = CopiesItself(8, 0.5)
    model = nn.Sequential(block, block)
    assert dynexec.convert(model, stochastic_depth=True).num_blocks == 1
    copied = copy.deepcopy(block)
    assert type(copied) is type(block) and vars(copied).keys() == vars(block).keys()
    x = torch.randn(4, 7, 8)
    assert_same(results(copied, x, 3), results(block, x, 3), 1e-6)
    assert dynexec.revert(nn.Sequential(model, copied)) == 2 and type(copied) is CopiesItself


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", ["OwnState", "OwnReduce", "OwnDeepcopy", "OwnNew", "Slots"])
def test_blocks_that_are_copied_in_their_own_way(kind, way):
    kind = getattr(odd_blocks, kind)
    model = odd_blocks.shallow(kind(4) if kind is odd_blocks.OwnNew else kind())
    dynexec.convert(model, stochastic_depth=True)
    copied, x = COPIES[way](model), torch.randn(6, 3, 5, 5)
    assert type(copied[1]) is type(model[1])
    assert_same(results(copied.train(), x, 1), results(model.train(), x, 1))
    calls = []
    copied[1].conv.register_forward_pre_hook(lambda *given: calls.append(given))
    set_rates(copied, ALMOST_1)
    assert torch.equal(copied(x), copied[0](x)) and not calls  # the copy is converted, too
    assert dynexec.revert(copied) == 1 and type(copied[1]) is kind
