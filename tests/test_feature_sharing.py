"""Fully-adaptive feature sharing: what a tree of trunks computes for wanted tasks, and how it is grown."""

import copy
import itertools
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import finish

import dynexec
from dynexec.executors.proof import relative_error
from dynexec.models import vgg
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

SHARED = [[[0, 1, 2, 3]]] * 4
BRANCHED = [[[0, 1, 2, 3]], [[0, 1, 2, 3]], [[1, 3], [0, 2]], [[2], [1, 3], [0]]]
FROM_THE_START = [[[3], [0, 1, 2]], [[0, 1, 2], [3]], [[2], [3], [0, 1]], [[0], [1], [2], [3]]]
TREES = {"shared": SHARED, "branched": BRANCHED, "from the start": FROM_THE_START}
CLASSES = (2, 3, 2, 5)


def stage(inputs, outputs, pool=False, basis=None):
    first = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
    if basis:
        first = [nn.Conv2d(inputs, basis, 3, padding=1, bias=False), nn.Conv2d(basis, outputs, 1, bias=False)]
    return nn.Sequential(*first, nn.BatchNorm2d(outputs), nn.ReLU(), *([nn.MaxPool2d(2)] if pool else []))


def network(layers=BRANCHED, joint=True, seed=0):
    """(network, its columns, its heads): of the same modules, so that the reference needs nothing of the network's."""
    torch.manual_seed(seed)
    sizes = [(3, 8, True), (8, 8, False, 4), (8, 12, True), (12, 8, False)]
    columns = [[stage(*size) for _ in layer] for size, layer in zip(sizes, layers, strict=True)]
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    heads = [nn.Sequential(*last, *([] if joint else [nn.Dropout(0.0)]), nn.Linear(8, size)) for size in CLASSES]
    return finish(FeatureSharing(columns, heads, layers)), columns, heads


def reference(layers, columns, heads, images, decisions):
    """Every task on its own through the columns that hold it, all computed, then multiplied by what is wanted."""
    decisions = decisions.expand(len(images), len(heads))
    outputs = []
    for task, head in enumerate(heads):
        x = images
        for groups, modules in zip(layers, columns):
            (number,) = [number for number, group in enumerate(groups) if task in group]
            x = modules[number](x)
        outputs.append(head(x) * decisions[:, task, None].to(x.dtype))
    return outputs


def wanted_patterns(n, tasks=4):
    """(name, decisions) from nothing to all, for all images and per image."""
    everything = torch.ones(tasks, dtype=torch.bool)
    one_image = torch.zeros(n, tasks, dtype=torch.bool)
    one_image[-1] = True
    yield "all", everything
    yield "none", ~everything
    yield "one task", torch.arange(tasks) == 2
    yield "all but one", torch.arange(tasks) != 1
    yield "all, per image", everything.repeat(n, 1)
    yield "none, per image", one_image & False
    yield "one image", one_image
    yield "one task each", torch.eye(tasks, dtype=torch.bool)[torch.arange(n) % tasks]
    for keep in (0.2, 0.5, 0.9):
        yield f"keep {keep}", torch.rand(n, tasks) < keep


def close(actual, expected, tolerance=1e-5):
    """Error relative to the largest value of all tasks."""
    assert [tuple(y.shape) for y in actual] == [tuple(y.shape) for y in expected]
    return relative_error(torch.cat(list(actual), 1), torch.cat(list(expected), 1)) <= tolerance


@pytest.mark.parametrize("layers", TREES.values(), ids=TREES)
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("samples", [1, 6])
def test_output_is_that_of_separate_networks(layers, joint, layout, samples):
    net, columns, heads = network(layers, joint)
    images = torch.randn(samples, 3, 21, 17).contiguous(memory_format=layout)
    with torch.no_grad():
        for name, decisions in wanted_patterns(samples):
            actual = net(images, decisions)
            assert close(actual, reference(layers, columns, heads, images, decisions)), name
            assert all(torch.equal(*pair) for pair in zip(actual, net(images, decisions))), name
            for task, output in enumerate(actual):
                assert not output[~decisions.expand(samples, 4)[:, task]].any(), name
        assert close(net(images), reference(layers, columns, heads, images, torch.ones(4, dtype=torch.bool)))


@pytest.mark.parametrize("layers", TREES.values(), ids=TREES)
@pytest.mark.parametrize("joint", [True, False])
def test_frozen(layers, joint):
    net, columns, heads = network(layers, joint)
    images = torch.randn(7, 3, 21, 17)
    frozen = dynexec.freeze(net, images)
    images = torch.randn(7, 3, 21, 17)
    with torch.no_grad():
        for name, decisions in wanted_patterns(7):
            assert close(frozen(images, decisions), reference(layers, columns, heads, images, decisions)), name
        assert close(frozen(images[:1]), net(images[:1]))
        _, taken = frozen(images, return_decisions=True)
    assert taken.tolist() == [True] * 4


def test_only_what_is_wanted_runs():
    net, *_ = network()
    calls = {}
    for name in net.part_names():
        hook = lambda module, arguments, name=name: calls.setdefault(name, []).append(len(arguments[0]))  # noqa: E731
        net.get_submodule(name).register_forward_pre_hook(hook)
    assert net.part_names() == [
        *("trunks.0_0", "trunks.2_0", "trunks.2_1", "trunks.3_0", "trunks.3_2"),
        *("heads.1", "heads.2", "heads.0"),
    ]
    images = torch.randn(4, 3, 16, 16)
    net(images, torch.tensor([False, False, True, False]))
    assert calls == {"trunks.0_0": [4], "trunks.2_1": [4], "trunks.3_0": [4], "heads.2": [4]}
    calls.clear()
    wanted = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0]]).bool()
    net(images, wanted)
    assert calls == {
        **{"trunks.0_0": [3], "trunks.2_0": [1], "heads.1": [1]},
        **{"trunks.2_1": [2], "trunks.3_0": [1], "heads.2": [1], "trunks.3_2": [2], "heads.0": [2]},
    }
    calls.clear()
    net(images)
    assert all(rows == [4] for rows in calls.values()) and list(calls) and len(calls) == 8


def test_a_sample_does_not_depend_on_its_batch_mates():
    net, *_ = network()
    images, wanted = torch.randn(5, 3, 19, 19), torch.rand(5, 4) < 0.6
    with torch.no_grad():
        together = net(images, wanted)
        alone = [net(images[n : n + 1], wanted[n]) for n in range(5)]
    assert close(together, [torch.cat(rows) for rows in zip(*alone)])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("joint", [True, False])
def test_gradients(training, joint):
    """In training with all tasks: BatchNorm sees the same images as in separate networks that share columns."""
    net, columns, heads = network(joint=joint)
    twin = copy.deepcopy((net, columns, heads))
    net.train(training), twin[0].train(training)
    images = torch.randn(6, 3, 16, 16)
    decisions = torch.ones(4, dtype=torch.bool) if training else torch.rand(6, 4) < 0.5
    sum(y.square().sum() for y in net(images, decisions)).backward()
    outputs = reference(BRANCHED, *twin[1:], images, decisions)
    sum(y.square().sum() for y in outputs).backward()
    for (name, parameter), expected in zip(net.named_parameters(), twin[0].parameters(), strict=True):
        assert relative_error(parameter.grad, expected.grad) < 1e-4, name


def test_parameters_of_what_does_not_run_get_no_gradient():
    net, *_ = network()
    net.train()
    outputs = net(torch.randn(4, 3, 16, 16), torch.tensor([False, False, True, False]))
    outputs[2].sum().backward()
    reached = {name.rsplit(".", 3)[0].split(".")[1] for name, p in net.named_parameters() if p.grad is not None}
    assert reached == {"0_0", "2_1", "3_0", "2"}
    assert not outputs[0].requires_grad


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies(clone):
    net, *_ = network()
    images, wanted = torch.randn(3, 3, 16, 16), torch.rand(3, 4) < 0.5
    twin = clone(net)
    assert all(map(torch.equal, twin(images, wanted), net(images, wanted)))
    fresh = network(seed=1)[0]
    assert not torch.equal(fresh(images)[0], net(images)[0])
    fresh.load_state_dict(net.state_dict())
    assert all(map(torch.equal, fresh(images), net(images)))
    assert "_needs" not in net.state_dict()
    assert net.double()(images.double(), wanted)[0].dtype == torch.float64


def test_one_prototype_per_layer_makes_all_columns():
    prototypes = [stage(3, 8), stage(8, 8), stage(8, 8), stage(8, 8)]
    net = finish(
        FeatureSharing(prototypes, [nn.Sequential(nn.Flatten(), nn.Linear(200, 2)) for _ in range(4)], BRANCHED)
    )
    for depth, layer in enumerate(BRANCHED):
        columns = net.columns(depth)
        assert len(columns) == len({id(column) for column in columns}) == len(layer)
    with pytest.raises(ValueError, match="depth must be from 0 to 3, got 4"):
        net.columns(4)


def test_flops():
    net, columns, heads = network()
    images = torch.randn(5, 3, 16, 16)
    flops = dynexec.measure.count_flops(net, images)
    stages = [2 * 256 * 27 * 8, 2 * 64 * (9 * 8 * 4 + 4 * 8), 2 * 64 * 9 * 8 * 12, 2 * 16 * 9 * 12 * 8]
    head = [2 * 8 * classes for classes in CLASSES]
    assert flops.stages == tuple(stages) and flops.policy == 0
    assert flops.dense == 4 * sum(stages) + sum(head)
    everything = sum(count * cost for count, cost in zip((1, 1, 2, 3), stages)) + sum(head)
    assert flops.tree == everything == flops.of(torch.ones(4, dtype=torch.bool))
    assert flops.of(torch.zeros(4, dtype=torch.bool)) == 0
    wanted = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1]]).bool()
    expected = [sum(stages) + head[2], sum(stages) + head[1] + head[3], everything]  # heads 1 and 3 are one product
    assert flops.of(wanted).tolist() == expected and flops.of(wanted).dtype == torch.float64
    assert flops.of(wanted[0]) == expected[0]
    separate = FeatureSharing(
        [[copy.deepcopy(c[0]) for _ in CLASSES] for c in columns], heads, [[[0], [1], [2], [3]]] * 4
    )
    assert separate.count_flops(images).tree == flops.dense
    with pytest.raises(ValueError, match=r"decisions must be bool \[4\] or \[N, 4\], got shape \(3,\)"):
        flops.of(wanted[0, :3])


def test_bad_calls():
    net, *_ = network()
    images = torch.randn(2, 3, 16, 16)
    for decisions, error, text in [
        (torch.ones(3, dtype=torch.bool), ValueError, r"\[4\] or \[2, 4\], got shape \(3,\)"),
        (torch.ones(3, 4, dtype=torch.bool), ValueError, r"got shape \(3, 4\)"),
        (torch.ones(1, 2, 4, dtype=torch.bool), ValueError, r"got shape \(1, 2, 4\)"),
        (torch.ones(4), TypeError, "decisions must be a bool tensor .* got torch.float32"),
        ([True] * 4, TypeError, "decisions must be a bool tensor .* got list"),
        (torch.ones(4, dtype=torch.bool, device="meta"), ValueError, "decisions must be on cpu"),
    ]:
        with pytest.raises(error, match=text):
            net(images, decisions)
    with pytest.raises(ValueError, match="soft_decisions must be None"):
        net(images, soft_decisions=torch.ones(4))
    for inputs, error, text in [
        (images[:0], ValueError, r"inputs must be \[N, 3, H, W\] with at least one sample, got shape \(0, 3, 16, 16\)"),
        (images[:, :1], ValueError, r"got shape \(2, 1, 16, 16\)"),
        (images[0], ValueError, r"got shape \(3, 16, 16\)"),
        (images.int(), TypeError, "inputs must be torch.float32, as the parameters are, got torch.int32"),
        (images.double(), TypeError, "got torch.float64"),
        (None, TypeError, "inputs must be a tensor, got NoneType"),
    ]:
        with pytest.raises(error, match=text):
            net(inputs)
        with pytest.raises(error, match=text):
            net.count_flops(inputs)


def test_which_heads_are_joined():
    """Those alike that learn nothing, and draw nothing, before their last layer."""
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for first, second, joined in [
        (nn.Sequential(*pooled, nn.Linear(4, 2)), nn.Sequential(*pooled, nn.Linear(4, 3)), True),
        (nn.Sequential(*pooled, nn.Linear(4, 2, False)), nn.Sequential(*pooled, nn.Linear(4, 3, False)), True),
        (nn.Sequential(*pooled, nn.Linear(4, 2)), nn.Sequential(*pooled, nn.Linear(4, 3, False)), False),
        (nn.Sequential(*pooled, nn.Linear(4, 2)), nn.Sequential(*pooled, nn.ReLU(), nn.Linear(4, 3)), False),
        *(
            (nn.Sequential(*pooled, layer, nn.Linear(4, 2)),) * 2 + (False,)
            for layer in (nn.Dropout(0.5), nn.Linear(4, 4))
        ),
        (nn.Sequential(*pooled, nn.Linear(4, 2), nn.ReLU()), nn.Sequential(*pooled, nn.Linear(4, 3)), False),
    ]:
        heads = [copy.deepcopy(first), copy.deepcopy(second)]
        net = finish(FeatureSharing([stage(3, 4)], heads))
        assert list(net.heads) == (["0"] if joined else ["0", "1"])
        images = torch.randn(2, 3, 5, 5)
        with torch.no_grad():
            features = net.columns(0)[0](images)
            assert close(net(images), [head(features) for head in heads])


def test_heads_that_give_something_else():
    net = FeatureSharing([stage(3, 4)], [nn.Linear(4, 2)])
    with pytest.raises(ValueError, match=r"heads must give \[N, C_t\], got shape \(2, 4, 4, 2\) for 2 classes"):
        net(torch.randn(2, 3, 4, 4))


def test_bad_construction():
    head = nn.Linear(8, 2)
    for arguments, error, text in [
        (([], [head]), ValueError, "must not be empty, got 0 and 1"),
        (
            ([nn.ReLU()], [head], SHARED),
            ValueError,
            "tree has 4 layers and 4 tasks, but there are 1 stages and 1 heads",
        ),
        (([[]], [head]), TypeError, r"stages\[0\] must be a module or a sequence of modules, got list"),
        (([[nn.ReLU(), nn.ReLU()]], [head]), ValueError, r"stages\[0\] has 2 modules, but tree has 1 columns there"),
        (([nn.ReLU()], [nn.ReLU()]), TypeError, r"heads\[0\] must be a module with a Linear layer, got ReLU"),
    ]:
        with pytest.raises(error, match=text):
            FeatureSharing(*arguments)


def test_trees():
    tree = SharingTree(BRANCHED)
    assert (tree.num_layers, tree.num_tasks) == (4, 4)
    chains = [(t.start, t.stop, t.column, t.tasks, t.parent) for t in tree.trunks()]
    assert chains == [
        *[(0, 2, 0, (0, 1, 2, 3), None), (2, 4, 0, (1, 3), 0), (2, 3, 1, (0, 2), 0)],
        *[(3, 4, 0, (2,), 2), (3, 4, 2, (0,), 2)],
    ]
    assert str(tree).splitlines() == [
        "layers 0-1: 0, 1, 2, 3",
        "|-- layers 2-3: 1, 3",
        "`-- layer 2: 0, 2",
        "    |-- layer 3: 2",
        "    `-- layer 3: 0",
    ]
    assert "layer 3: hat" in tree.format(["smile", "glasses", "hat", "beard"])
    assert str(SharingTree(FROM_THE_START)).count("\nlayer") == 1  # two roots
    assert SharingTree.shared(4, 4) == SharingTree(SHARED) and hash(tree) == hash(SharingTree(BRANCHED))
    with pytest.raises(ValueError, match="names must be 4, one per task, got 1"):
        tree.format(["smile"])
    for layers, text in [
        ([], "at least one layer"),
        ([[]], r"layers\[0\] must hold each of the tasks"),
        ([[[0, 1]], [[0], []]], r"layers\[1\] must hold each of the tasks 0 to T - 1 once.*got \[\[0\], \[\]\]"),
        ([[[0, 2]]], r"layers\[0\] must hold each of the tasks"),
        ([[[0, 0]]], r"layers\[0\] must hold each of the tasks"),
        ([[[0], [1]], [[0, 1]]], r"layers\[1\] must not join tasks that layers\[0\] has parted"),
    ]:
        with pytest.raises(ValueError, match=text):
            SharingTree(layers)


def test_draw(tmp_path):
    pytest.importorskip("matplotlib")
    figure = SharingTree(BRANCHED).draw(tmp_path / "tree.png", names="abcd")
    assert (tmp_path / "tree.png").stat().st_size > 1000
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["b", "d", "c", "a"]  # in the order of the columns, so that no lines cross
    assert len(axes.collections) == sum(len(layer) for layer in BRANCHED)


def test_vgg16_is_the_published_network():
    with torch.device("meta"):
        wide, narrow = (vgg.feature_sharing_vgg16(width=width) for width in (None, 32))
        low = vgg.feature_sharing_vgg16(width=None, basis=vgg.VGG16_BASIS)
        branched = vgg.feature_sharing_vgg16((2, 2), tree=[[[0, 1]]] * 13 + [[[0], [1]]] * 2)

    def outputs(net):
        return [
            [m.out_channels for m in net.columns(depth)[0].modules() if isinstance(m, nn.Conv2d)] for depth in range(15)
        ]

    assert outputs(wide) == [[w] for w in (64, 64, 128, 128, 256, 256, 256, *[512] * 6, 4096, 4096)]
    assert outputs(narrow) == [[32]] * 13 + [[64]] * 2
    assert outputs(low) == [list(pair) for pair in zip(vgg.VGG16_BASIS, vgg.VGG16_WIDTHS)]
    assert wide.columns(13)[0][0].weight.shape == (4096, 512, 7, 7)
    assert [layer.weight.shape[2:] for layer in low.columns(5)[0][:2]] == [(3, 3), (1, 1)]
    assert len(branched.columns(12)) == 1 and len(branched.columns(13)) == 2
    flops = wide.count_flops(torch.empty(1, 3, 224, 224))
    assert sum(flops.stages) == 2 * (15_470_264_320 - 4096 * 1000)  # the 15.5 GMAC of VGG-16 without its classifier
    assert vgg.max_columns(vgg.thin_widths(32)) == (2, 2, 4, 4, 8, 8, 8, *[16] * 6, 64, 64)
    assert (
        vgg.VGG16_COLUMN_COSTS[0] == 0.5
        and vgg.VGG16_COLUMN_COSTS[7] == 1 / 16
        and vgg.VGG16_COLUMN_COSTS[-1] == 1 / 64
    )


def test_vgg16_runs_and_freezes():
    tree = [[[0, 1, 2]]] * 12 + [[[0, 2], [1]]] * 2 + [[[0], [2], [1]]]
    net = finish(vgg.feature_sharing_vgg16((2, 3, 1), tree=tree, width=8, basis=(4,) * 3, in_channels=1, image_size=32))
    images = torch.randn(3, 1, 45, 33)
    assert [tuple(y.shape) for y in net(images)] == [(3, 2), (3, 3), (3, 1)]
    assert net.columns(0)[0](images).shape[-2:] == (45, 33) and net.columns(1)[0](torch.rand(1, 8, 9, 9)).shape[-1] == 4
    frozen = dynexec.freeze(net, images)
    wanted = torch.rand(3, 3) < 0.5
    assert close(frozen(images, wanted), [y.detach() for y in net(images, wanted)])
    net.train()
    sum(y.sum() for y in net(torch.randn(2, 1, 32, 32))).backward()


@pytest.mark.parametrize(
    "arguments, text",
    [
        (dict(width=0), "width must be at least 1, and whole, got 0"),
        (dict(width=(8,) * 14), "width must hold 15 numbers and basis at most 15, got 14 and 0"),
        (dict(width=(8.0,) * 15), "width must be at least 1, and whole, got 8.0"),
        (dict(basis=(4,) * 16), "width must hold 15 numbers and basis at most 15, got 15 and 16"),
        (dict(basis=(0,)), "basis must be at least 1, and whole, got 0"),
        (dict(num_classes=(2, 0)), "num_classes must be at least 1, and whole, got 0"),
        (dict(num_classes=()), "num_classes must hold one number per task, got none"),
        (dict(image_size=31), "image_size must be at least 32, and whole, got 31"),
        (dict(tree=[[[0, 1]]]), "tree must have 15 layers, got 1"),
        (dict(tree=[[[0, 1, 2]]] * 15), "tree has 15 layers and 3 tasks, but there are 15 stages and 2 heads"),
    ],
)
def test_vgg16_errors(arguments, text):
    with pytest.raises(ValueError, match=text):
        vgg.feature_sharing_vgg16(**{"num_classes": (2, 2), "width": 8, **arguments})


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
