"""How feature sharing's trees are grown: choosing filters, which tasks go together, and widening."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from test_feature_sharing import BRANCHED, SHARED, close, network, stage
from torch import nn
from toys import finish

from dynexec.models.feature_sharing import FeatureSharing
from dynexec.models.grow import (
    error_margins,
    find_groups,
    group_affinity,
    grow,
    separation_cost,
    split,
    task_affinity,
    widen,
)
from dynexec.models.sharing_tree import SharingTree
from dynexec.models.thin import select_filters, thin


def plain_pursuit(filters, count):
    """Simultaneous orthogonal matching pursuit as in its textbook: residuals by least squares."""
    atoms, chosen, residual = filters.T, [], filters.T
    for _ in range(count):
        rest = [k for k in range(len(filters)) if k not in chosen]
        chosen.append(max(rest, key=lambda k: ((residual.T @ atoms[:, k]).norm() / atoms[:, k].norm()).item()))
        basis = atoms[:, chosen]
        residual = atoms - basis @ torch.linalg.lstsq(basis, atoms, driver="gelsd").solution
    return chosen


def left_over(filters, chosen):
    basis = filters[list(chosen)].T
    return (filters.T - basis @ torch.linalg.lstsq(basis, filters.T, driver="gelsd").solution).norm().item()


def test_select_filters_is_matching_pursuit():
    for seed in range(20):
        filters = torch.randn(9, 14, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        chosen = select_filters(filters, 5)
        assert chosen.tolist() == plain_pursuit(filters, 5)
        assert torch.equal(select_filters(filters.view(9, 2, 7) * 1e-6, 5), chosen)


def test_select_filters_against_brute_force():
    """Greedy: hardly worse than the best of all subsets, and exact where some filters make all the others."""
    ratios = []
    for seed in range(30):
        filters = torch.randn(7, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for count in (1, 2, 3):
            best = min(left_over(filters, subset) for subset in itertools.combinations(range(7), count))
            ratios.append(left_over(filters, select_filters(filters, count).tolist()) / best)
    assert max(ratios) < 1.1 and sum(ratio < 1 + 1e-9 for ratio in ratios) > len(ratios) / 2
    assert all(ratio >= 1 - 1e-9 for ratio in ratios)
    basis = torch.randn(3, 12, dtype=torch.float64)
    filters = torch.cat([torch.rand(5, 3, dtype=torch.float64) @ basis, torch.zeros(1, 12)])
    chosen = select_filters(filters, 5).tolist()
    assert left_over(filters, chosen[:3]) < 1e-9 and len(set(chosen)) == 5  # filled up once nothing is left over
    with pytest.raises(ValueError, match="count must be from 1 to the 6 filters, got 7"):
        select_filters(filters, 7)


def sequential(classes=(2, 3), linear=False):
    """An unbranched network: the layer behind the convolutions reads several numbers of each channel."""
    torch.manual_seed(3)
    stages = [stage(3, 12, True), stage(12, 10, basis=6)]
    if linear:
        stages.append(nn.Sequential(nn.Flatten(), nn.Linear(10 * 16, 14), nn.ReLU()))
    heads = [nn.Sequential(nn.Flatten(), nn.Linear(14 if linear else 10 * 16, size)) for size in classes]
    return finish(FeatureSharing(stages, heads))


@pytest.mark.parametrize("linear", [False, True])
def test_thin_keeps_what_belongs_to_the_chosen_filters(linear):
    """Where the other filters compute zeros, the thin network is the wide one; elsewhere it has the chosen weights."""
    net = sequential(linear=linear)
    widths, layers = (5, 4, 6)[: 2 + linear], []
    for depth in range(2 + linear):
        (layer, norm) = net.columns(depth)[0][1 if depth == 2 else 0], None
        if depth < 2:
            layer, norm = [m for m in net.columns(depth)[0].modules() if isinstance(m, nn.Conv2d)][-1], "bn"
            norm = next(m for m in net.columns(depth)[0].modules() if isinstance(m, nn.BatchNorm2d))
        dead = torch.randperm(len(layer.weight))[widths[depth] :]
        layer.weight.data[dead] = 0.0
        if norm is not None:
            norm.bias.data[dead] = -9.0
            norm.running_mean.data[dead] = 0.0
        else:
            layer.bias.data[dead] = -9.0
        layers.append((layer, dead))
    small = thin(net, widths)
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert close(small(images), net(images))
    assert small.columns(1)[0][0].weight.shape == (6, 5, 3, 3) and small.columns(1)[0][1].weight.shape == (4, 6, 1, 1)
    assert small.count_flops(images).tree < net.count_flops(images).tree
    assert all(len(layer.weight) == len(dead) + width for (layer, dead), width in zip(layers, widths))
    same = thin(net, [12, 10, 14][: 2 + linear])
    assert all(map(torch.equal, same(images), net(images)))
    sum(y.sum() for y in small.train()(images)).backward()


def test_thin_chooses_by_the_weights_for_what_is_left():
    net = sequential()
    small = thin(net, (5, 4))
    first = select_filters(net.columns(0)[0][0].weight, 5)
    assert torch.equal(small.columns(0)[0][0].weight, net.columns(0)[0][0].weight[first])
    assert torch.equal(small.columns(0)[0][1].running_var, net.columns(0)[0][1].running_var[first])
    assert torch.equal(small.columns(1)[0][0].weight, net.columns(1)[0][0].weight[:, first])
    net = finish(FeatureSharing([stage(3, 9), stage(9, 9)], [nn.Linear(9, 2)]))
    first = select_filters(net.columns(0)[0][0].weight, 2)
    second = net.columns(1)[0][0].weight[:, first]
    assert torch.equal(thin(net, (2, 3)).columns(1)[0][0].weight, second[select_filters(second, 3)])


def test_thin_errors():
    net = sequential()
    for widths, text in [
        ((5,), "widths must be 2, one per layer, got 1"),
        ((5, 11), r"widths\[1\] must be from 1 to the 10 outputs that the layer has, got 11"),
        ((0, 5), r"widths\[0\] must be from 1 to the 12 outputs"),
    ]:
        with pytest.raises(ValueError, match=text):
            thin(net, widths)
    with pytest.raises(ValueError, match="network must have one column per layer, got the tree\nlayers 0-1"):
        thin(network()[0], (4, 4, 4, 4))
    grouped = FeatureSharing([nn.Conv2d(4, 4, 3, groups=2)], [nn.Linear(4, 2)])
    with pytest.raises(ValueError, match="convolutions without groups, got Conv2d"):
        thin(grouped, (2,))
    for layer in (nn.PReLU(6), nn.GroupNorm(3, 6), nn.InstanceNorm2d(6, affine=True)):
        stages = [nn.Sequential(nn.Conv2d(3, 6, 3), layer)]
        with pytest.raises(ValueError, match=f"convolutions, linear layers and BatchNorm, got {type(layer).__name__}"):
            thin(FeatureSharing(stages, [nn.Linear(6, 2)]), (2,))


def test_thin_leaves_what_has_one_number_for_all_channels():
    net = finish(FeatureSharing([nn.Sequential(nn.Conv2d(3, 6, 3), nn.PReLU())], [nn.Linear(6, 2)]))
    small = thin(net, (2,))
    assert small.columns(0)[0][0].out_channels == 2 and torch.equal(small.columns(0)[0][1].weight, torch.tensor([0.25]))


def test_thin_a_layer_of_one_number():
    stages = [nn.Conv2d(3, 6, 3), nn.Conv2d(6, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)]
    net = finish(FeatureSharing(stages, [nn.Linear(1, 2)]))
    assert [thin(net, (2, 1, 1)).columns(depth)[0].out_channels for depth in range(3)] == [2, 1, 1]
    with pytest.raises(ValueError, match=r"widths\[2\] must be from 1 to the 1 outputs"):
        thin(net, (2, 1, 2))


def test_thin_batch_norm_behind_flatten():
    """It has as many numbers of each channel as there are pixels."""
    stages = [nn.Conv2d(3, 6, 3, bias=False), nn.Sequential(nn.Flatten(), nn.BatchNorm1d(54), nn.Linear(54, 5))]
    net = finish(FeatureSharing(stages, [nn.Linear(5, 2)]))
    dead = torch.randperm(6)[4:]
    net.columns(0)[0].weight.data[dead] = 0.0
    norm = net.columns(1)[0][1]
    numbers = (dead[:, None] * 9 + torch.arange(9)).flatten()
    norm.running_mean[numbers] = norm.bias.data[numbers] = 0.0
    small, images = thin(net, (4, 5)), torch.randn(3, 3, 5, 5)
    with torch.no_grad():
        assert close(small(images), net(images))
    assert small.columns(1)[0][1].num_features == 36


def test_affinity():
    margins = torch.tensor([[0.9, 0.8, 0.1], [0.1, 0.2, 0.9], [0.2, 0.1, 0.8], [0.8, 0.1, 0.2]])
    # difficult:            yes  yes  no     no   no   yes     no   no   yes     yes  no  no
    expected = torch.tensor([[1.0, 0.75, 0.0], [0.75, 1.0, 0.25], [0.0, 0.25, 1.0]], dtype=torch.float64)
    assert torch.equal(task_affinity(margins), expected)
    equal = torch.full((3, 2), 0.5)  # at the mean is difficult, as in the authors' code
    assert torch.equal(
        task_affinity(torch.cat([equal, torch.tensor([[0.5, 0.6]])])), torch.tensor([[1.0, 0.25], [0.25, 1]]).double()
    )
    margins[3, 1] = torch.nan
    assert task_affinity(margins)[0, 1] == 1.0 and task_affinity(margins)[0, 2] == 0.0
    unknown = torch.full((2, 2), torch.nan)
    assert (task_affinity(unknown) == 0.5).all()
    with pytest.raises(ValueError, match=r"margins must be float \[N, T\], N at least 1, got torch.float32 \(3,\)"):
        task_affinity(torch.rand(3))


def test_error_margins():
    logits = [torch.randn(4, 2), torch.randn(4, 3)]
    targets = torch.tensor([[0, 2], [1, -1], [1, 0], [-1, 1]])
    margins = error_margins(logits, targets)
    torch.testing.assert_close(
        margins[2], torch.stack([1 - F.softmax(logits[0][2], 0)[1], 1 - F.softmax(logits[1][2], 0)[0]])
    )
    assert margins.isnan().tolist() == [[False, False], [False, True], [False, False], [True, False]]


def two_families(tasks=6, inside=0.9, between=0.3):
    """Even tasks go together, and odd ones."""
    parity = torch.arange(tasks) % 2
    affinity = torch.where(parity[:, None] == parity, inside, between).double()
    return affinity.fill_diagonal_(1.0)


def test_group_affinity_and_separation():
    affinity = torch.rand(5, 5, dtype=torch.float64)
    affinity = (affinity + affinity.T) / 2
    groups = [(0, 3), (1,), (2, 4)]
    actual = group_affinity(affinity, groups)
    for a, b in itertools.product(range(3), repeat=2):
        one = sum(min(affinity[i, j].item() for j in groups[b]) for i in groups[a]) / len(groups[a])
        other = sum(min(affinity[i, j].item() for j in groups[a]) for i in groups[b]) / len(groups[b])
        assert actual[a, b].item() == pytest.approx((one + other) / 2)
    cost = sum(1 - sum(min(affinity[i, j].item() for j in c) for i in c) / len(c) for c in groups) / 3
    assert separation_cost(affinity, groups) == pytest.approx(cost)


@pytest.mark.parametrize(
    "column_cost, alpha, groups", [(0.05, 1.0, 2), (1.0, 1.0, 1), (0.01, 100.0, 6), (0.7, 1.0, 1), (0.7, 2.0, 2)]
)
def test_find_groups_weighs_columns_against_separation(column_cost, alpha, groups):
    """1 group costs alpha * 0.7, 2 cost column_cost + alpha * 0.1, 6 cost 5 * column_cost."""
    pytest.importorskip("sklearn")
    tree, affinity = SharingTree.shared(3, 6), two_families()
    found = find_groups(tree, 2, affinity, column_cost=column_cost, alpha=alpha)
    expected = {1: [list(range(6))], 2: [[0, 2, 4], [1, 3, 5]], 6: [[task] for task in range(6)]}
    assert found == expected[groups]
    assert len(find_groups(tree, 2, affinity, column_cost=0.0, alpha=1.0, max_columns=2)) == 2
    again = find_groups(tree, 2, affinity, column_cost=column_cost, alpha=alpha)
    assert again == found


def test_find_groups_keeps_the_columns_above_together():
    pytest.importorskip("sklearn")
    tree = SharingTree([[[0, 1, 2, 3, 4, 5]], [[0, 1, 2, 3, 4, 5]], [[0, 2], [1, 3], [4], [5]]])
    assert find_groups(tree, 1, two_families(), column_cost=0.05) == [[0, 2, 4], [1, 3, 5]]
    across = SharingTree([[range(6)], [[0, 1], [2, 4], [3, 5]]])
    for column_cost in (0.0, 0.05):
        groups = find_groups(across, 0, two_families(), column_cost=column_cost)
        assert len(groups) > 1 and any({0, 1} <= set(group) for group in groups)
    with pytest.raises(ValueError, match="tree must have one column at layer 2, got 4"):
        find_groups(tree, 2, two_families(), column_cost=0.01)
    for affinity in (torch.rand(6, 5), torch.rand(6, 6), -two_families()):
        with pytest.raises(ValueError, match=r"affinity must be \[6, 6\], symmetric and not negative, got shape"):
            find_groups(tree, 1, affinity, column_cost=0.01)
    for options in (dict(column_cost=-1.0), dict(column_cost=1.0, repeats=0), dict(column_cost=1.0, max_columns=0)):
        with pytest.raises(ValueError, match="column_cost and alpha must not be negative, repeats and max_columns"):
            find_groups(tree, 1, two_families(), **options)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    tree = SharingTree.shared(1, 6)
    assert find_groups(tree, 0, two_families(), column_cost=0.01, max_columns=1) == [[0, 1, 2, 3, 4, 5]]
    with pytest.raises(ImportError, match="grouping tasks needs scikit-learn: pip install scikit-learn"):
        find_groups(tree, 0, two_families(), column_cost=0.01)


def test_widening_leaves_the_function_as_it_was():
    net, *_ = network(SHARED)
    images, wanted = torch.randn(5, 3, 16, 16), torch.rand(5, 4) < 0.5
    wide = widen(widen(net, 3, [[2], [1, 3], [0]]), 2, [[1, 3], [0, 2]])
    assert wide.tree == SharingTree(BRANCHED)
    with torch.no_grad():
        assert close(wide(images), net(images), 1e-6) and close(wide(images, wanted), net(images, wanted), 1e-6)
    a, b = wide.columns(2)
    assert a is not b and torch.equal(a[0].weight, b[0].weight)
    for parameter in a.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():  # its tasks alone have changed, and the old network has not
        old, new = net(images), wide(images)
    assert [torch.allclose(*pair) for pair in zip(old, new)] == [True, False, True, False]
    with pytest.raises(ValueError, match=r"layers\[1\] must not join tasks that layers\[0\] has parted|layers\[2\]"):
        widen(net, 1, [[0], [1, 2, 3]])
    with pytest.raises(ValueError, match="groups must not join the tasks of different columns"):
        widen(wide, 3, [[1, 3], [0, 2]])
    with pytest.raises(ValueError, match="depth must be from 0 to 3, got 4"):
        widen(net, 4, [[0], [1, 2, 3]])


def test_widening_keeps_differing_columns():
    net, *_ = network()
    wide = widen(net, 3, [[2], [1], [3], [0]])
    images = torch.randn(3, 3, 16, 16)
    assert close([y.detach() for y in wide(images)], [y.detach() for y in net(images)], 1e-6)


def test_grow():
    pytest.importorskip("sklearn")
    net = finish(
        FeatureSharing(
            [stage(3, 4), stage(4, 4), stage(4, 4), stage(4, 4)],
            [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)) for _ in range(6)],
        )
    )
    seen = []

    def affinity_of(network):
        seen.append(network.tree)
        return two_families()

    splits = []
    costs = (0.9, 0.9, 0.05, 0.05)
    grown = grow(net, affinity_of, costs, alpha=1.0, max_columns=(2, 2, 4, 6), on_split=lambda *a: splits.append(a))
    families = ((0, 2, 4), (1, 3, 5))
    assert grown.tree.layers == (((0, 1, 2, 3, 4, 5),), ((0, 1, 2, 3, 4, 5),), families, families)
    assert [depth for depth, _ in splits] == [3, 2] and splits[-1][1] is grown
    assert [len(tree.layers[3]) for tree in seen] == [1, 2, 2] and net.tree == SharingTree.shared(4, 6)
    images = torch.randn(2, 3, 9, 4)
    with torch.no_grad():
        assert close(grown(images), net(images))
    assert split(net, 3, two_families(), column_cost=9.0) is net
    with pytest.raises(ValueError, match="column_costs must be 4, one per layer, got 1"):
        grow(net, affinity_of, (1.0,))
    with pytest.raises(ValueError, match="max_columns must be 4, one per layer, got 1"):
        grow(net, affinity_of, costs, max_columns=(1,))
