"""FLOPs: equal to the published figures, and split rightly into what can be saved."""

import threading

import pytest
import torch
import toys
from torch import nn

import dynexec
from dynexec import measure, models
from dynexec.nn import DynamicNetwork


def published(name):
    size = 224 if name.endswith("imagenet") else 32
    with torch.device("meta"):
        return measure.count_flops(models.create_model(name), torch.empty(1, 3, size, size))


@pytest.fixture(scope="module")
def flops():
    names = ("blockdrop_resnet32_cifar10", "blockdrop_resnet110_cifar10", "blockdrop_resnet101_imagenet")
    return {name.split("_")[1]: published(name) for name in names}


@pytest.mark.parametrize(
    ("name", "dense", "policy"),
    [("resnet32", 1.377e8, 2.448e7), ("resnet110", 5.058e8, 2.448e7), ("resnet101", 1.560e10, 4.719e8)],
)
def test_totals_equal_the_published_ones_to_four_digits(flops, name, dense, policy):
    assert float(f"{flops[name].dense:.3e}") == dense
    assert float(f"{flops[name].policy:.3e}") == policy


def test_parts_of_resnet101(flops):
    cost = flops["resnet101"]
    assert float(f"{cost.fixed:.2e}") == 9.59e8  # all blocks dropped: stem, four shortcuts, classifier
    strided = [3, 7, 30]
    assert round(cost.block[0] / 1e6) == 360
    assert {round(cost.block[i] / 1e6) for i in strided} == {539}
    assert {round(block / 1e6) for i, block in enumerate(cost.block) if i and i not in strided} == {437}


@pytest.mark.parametrize(
    ("name", "kept", "mean_flops", "saving"),
    [("resnet110", 16.933, 1.81e8, 0.642), ("resnet101", 24.770, 1.25e10, 0.199)],
)
def test_savings_at_the_published_keep_rates(flops, name, kept, mean_flops, saving):
    """The published mean cost gives the published saving, and lies between the cheapest and dearest so many blocks."""
    cost = flops[name]
    assert round(1 - mean_flops / cost.dense, 3) == saving
    ordered = torch.tensor(sorted(cost.block), dtype=torch.float64)
    count = int(kept)
    low, high = (
        cost.fixed + cost.policy + b[:count].sum() + (kept - count) * b[count] for b in (ordered, ordered.flip(0))
    )
    assert low * 0.995 < mean_flops < high * 1.005


def test_costs_of_decisions():
    cost = measure.Flops(fixed=10, block=(1, 2, 4), policy=100)
    decisions = torch.tensor([[False, False, False], [True, False, True], [True, True, True]])
    assert cost.of(decisions).tolist() == [110, 115, 117]
    assert cost.of(decisions[1]).item() == 115
    assert cost.of(decisions[:0]).shape == (0,)
    assert cost.dense == 17
    assert cost.saving(decisions) == pytest.approx(1 - 114 / 17)
    with pytest.raises(ValueError, match=r"bool \[N, 3\], got shape \(2, 2\)"):
        cost.of(torch.ones(2, 2, dtype=torch.bool))


def by_hand(outputs, inputs, kernel, side):
    return 2 * outputs * inputs * kernel**2 * side**2


def test_a_small_network_by_hand():
    net = models.blockdrop_resnet((1, 2), (4, 8), policy_widths=(2, 2), in_channels=1, num_classes=3)
    cost = measure.count_flops(net, torch.empty(5, 1, 8, 8))
    strided = by_hand(8, 4, 3, 4) + by_hand(8, 8, 3, 4)
    assert cost.block == (2 * by_hand(4, 4, 3, 8), strided, 2 * by_hand(8, 8, 3, 4))
    assert cost.fixed == by_hand(4, 1, 3, 8) + 2 * 8 * 3
    features = by_hand(2, 1, 3, 8) + 2 * by_hand(2, 2, 3, 8) + 2 * by_hand(2, 2, 3, 4)
    assert cost.policy == features + 2 * 2 * 3  # the unused value head is not run


def test_a_converted_network_and_a_plain_one():
    model = toys.torchvision_style()
    example = torch.empty(2, 3, 16, 16)
    plain = measure.count_flops(model, example)
    assert plain.block == () and plain.policy == 0
    conversion = dynexec.convert(model)
    cost = measure.count_flops(model, example)
    assert len(cost.block) == conversion.num_blocks
    assert cost.dense == plain.dense
    assert cost.fixed == by_hand(8, 3, 3, 16) + by_hand(16, 8, 1, 8) + 2 * 16 * 5  # stem, one shortcut, head
    assert measure.count_flops(DynamicNetwork(model), example) == cost


def test_counting_leaves_the_model_as_it_was():
    net = models.blockdrop_resnet((1, 1), (4, 8), num_classes=3).train()
    net.backbone.bn1.eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    measure.count_flops(net, torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last))
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_a_policy_that_is_a_converted_network():
    class Policy(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x).sigmoid()

    backbone, net = toys.torchvision_style(), toys.torchvision_style()
    dynexec.convert(backbone)
    network, x = DynamicNetwork(backbone, Policy(net)), toys.images(2)
    before = measure.count_flops(network, x)
    dynexec.convert(net)
    assert measure.count_flops(network, x) == before and before.policy == before.dense
    assert models.delete_blocks(network, [0]).tolist() == [False, True, True, True, True]


def test_counting_while_another_thread_runs_the_model():
    model = toys.torchvision_style()
    num_blocks = dynexec.convert(model).num_blocks
    x, decisions = toys.images(2), torch.ones(2, num_blocks, dtype=torch.bool)
    expected, stop, failed = measure.count_flops(model, x), threading.Event(), []

    def serve():
        while not stop.is_set():
            try:
                with torch.no_grad(), dynexec.decide(decisions):
                    model(x)
            except Exception as error:
                failed.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        found = [measure.count_flops(model, x) for _ in range(20)]
    finally:
        stop.set()
        thread.join()
    assert not failed and found == [expected] * 20


def test_what_cannot_be_counted_is_an_error():
    net = nn.Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match=r"at least one image, got shape \(0, 3, 8, 8\)"):
        measure.count_flops(net, torch.empty(0, 3, 8, 8))
    with pytest.raises(TypeError, match="example_input must be a tensor, got tuple"):
        measure.count_flops(net, (3, 8, 8))


def test_names_that_other_models_use_mean_nothing():
    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Conv2d(3, 4, 1, bias=False)
            self.head = nn.Conv2d(4, 2, 1, bias=False)
            self.head.placement = "last"

        def forward(self, x):
            return self.head(self.backbone(x))

    flops = measure.count_flops(Segmenter(), torch.zeros(2, 3, 5, 5))
    assert flops.fixed == flops.dense == 2 * 25 * (3 * 4 + 4 * 2) and flops.block == ()


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = toys.BasicBlock(4, 6, 2)

    def forward(self, x):
        return self.block(x=x)


@pytest.mark.parametrize("fine_tune", [None, "nothing"])
def test_a_block_that_gets_its_input_by_name(fine_tune):
    model, x = ByName(), torch.randn(2, 4, 6, 6)
    dynexec.convert(model, fine_tune=fine_tune)
    cost = measure.count_flops(model, x)
    assert cost == measure.count_flops(nn.Sequential(model.block), x) and len(cost.block) == 1


class Calm(toys.BasicBlock):
    """Looks at values."""

    def forward(self, x):
        return super().forward(x) if x.abs().mean() > 0 else x


def test_a_network_that_looks_at_values_is_named():
    model = nn.Sequential(Calm(4, 4))
    with pytest.raises(
        ValueError, match="FLOPs of this Sequential cannot be counted: what it computes depends on values"
    ):
        measure.count_flops(model, torch.randn(2, 4, 5, 5))
