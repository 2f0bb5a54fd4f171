"""Fully-adaptive feature sharing: what a tree of trunks computes for wanted tasks."""

import copy
import pickle

import pytest
import torch
from torch import nn
from toys import finish

import dynexec
from dynexec.executors.proof import relative_error
from dynexec.models import vgg
from dynexec.models.feature_sharing import FeatureSharing
from dynexec.models.sharing_tree import SharingTree

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


@pytest.mark.usefixtures("algorithms")
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
    assert flops.saving(wanted) == pytest.approx(1 - sum(expected) / 3 / flops.dense)
    assert flops.saving(wanted[0]) == pytest.approx(1 - expected[0] / flops.dense)
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
        (images.int(), TypeError, "inputs must be a floating-point tensor .*, got torch.int32"),
        (images.double(), TypeError, "got torch.float64"),
        (None, TypeError, "inputs must be a floating-point tensor .*, got NoneType"),
    ]:
        with pytest.raises(error, match=text):
            net(inputs)
        with pytest.raises(error, match=text):
            net.count_flops(inputs)


class Times(nn.Module):
    """As a user writes one: its repr does not show what it does."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def test_which_heads_are_joined():
    """Those alike that learn nothing, and draw nothing, before their last layer."""
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    pool = nn.MaxPool2d(2)
    twice = nn.Sequential(pool, nn.ReLU(), pool)
    noted = nn.Tanh()
    noted.note = torch.ones(2)
    for first, second, joined in [
        (nn.Sequential(*pooled, nn.Linear(4, 2)), nn.Sequential(*pooled, nn.Linear(4, 3)), True),
        (nn.Sequential(*pooled, noted, nn.Linear(4, 2)), nn.Sequential(*pooled, noted, nn.Linear(4, 3)), True),
        (nn.Sequential(*pooled, nn.Linear(4, 2, False)), nn.Sequential(*pooled, nn.Linear(4, 3, False)), True),
        (nn.Sequential(*pooled, nn.Linear(4, 2)), nn.Sequential(*pooled, nn.Linear(4, 3, False)), False),
        (nn.Sequential(*pooled, nn.Linear(4, 2)), nn.Sequential(*pooled, nn.ReLU(), nn.Linear(4, 3)), False),
        *(
            (nn.Sequential(*pooled, layer, nn.Linear(4, 2)),) * 2 + (False,)
            for layer in (nn.Dropout(0.5), nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
        ),
        *(
            (nn.Sequential(layer, *pooled, nn.Linear(4, 2)), nn.Sequential(other, *pooled, nn.Linear(4, 2)), False)
            for layer, other in [
                (nn.AvgPool2d(2), nn.AvgPool2d(2, ceil_mode=True)),
                (nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
                (Times(1.0), Times(3.0)),
                (twice, nn.Sequential(twice[0], nn.ReLU())),
            ]
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


def test_hooks_of_joined_heads_run():
    heads = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)) for _ in range(2)]
    net = finish(FeatureSharing([stage(3, 4)], heads))
    assert list(net.heads) == ["0"]
    images = torch.randn(2, 3, 5, 5)
    before = net(images)
    hook = heads[1].register_forward_hook(lambda head, inputs, output: 2 * output)
    assert close(net(images), [before[0], 2 * before[1]])
    hook.remove()
    assert close(net(images), before)


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
        (dict(width=(8,) * 14), "width must hold 15 numbers and basis at most 15, got 14 and 0"),
        (dict(width=(8.0,) * 15), "width must be at least 1, and whole, got 8.0"),
        (dict(basis=(4,) * 16), "width must hold 15 numbers and basis at most 15, got 15 and 16"),
        (dict(num_classes=()), "num_classes must hold one number per task, got none"),
        (dict(image_size=31), "image_size must be at least 32, and whole, got 31"),
        (dict(tree=[[[0, 1]]]), "tree must have 15 layers, got 1"),
        (dict(tree=[[[0, 1, 2]]] * 15), "tree has 15 layers and 3 tasks, but there are 15 stages and 2 heads"),
    ],
)
def test_vgg16_errors(arguments, text):
    with pytest.raises(ValueError, match=text):
        vgg.feature_sharing_vgg16(**{"num_classes": (2, 2), "width": 8, **arguments})
