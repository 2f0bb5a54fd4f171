"""AdaShare networks: what tasks compute that share blocks, and what that costs."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from toys import finish

import dynexec
from dynexec.executors.proof import relative_error
from dynexec.measure import count_flops
from dynexec.models.adashare import adashare_resnet
from dynexec.models.adashare_policy import published_policy

CLASSES = (5, 3, 1)


def make(depth=18, blocks=(2, 2, 1, 2), widths=(4, 8, 8, 16), classes=CLASSES, **options):
    """A small network with 7 blocks; with basic blocks the first segment's shortcut is the identity."""
    options = {"head_width": 6, "policy_widths": (4, 4, 6, 8)} | options
    return finish(adashare_resnet(depth, blocks=blocks, widths=widths, num_classes=classes, **options))


def batch_norm(x, norm):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)


def residual_branch(block, x, stride, dilation):
    if hasattr(block, "conv3"):
        x = F.relu(batch_norm(F.conv2d(x, block.conv1.weight, stride=stride), block.bn1))
        x = F.relu(batch_norm(F.conv2d(x, block.conv2.weight, padding=dilation, dilation=dilation), block.bn2))
        return batch_norm(F.conv2d(x, block.conv3.weight), block.bn3)
    x = F.conv2d(x, block.conv1.weight, stride=stride, padding=dilation, dilation=dilation)
    x = F.conv2d(F.relu(batch_norm(x, block.bn1)), block.conv2.weight, padding=dilation, dilation=dilation)
    return batch_norm(x, block.bn2)


def masked(net, images, execute):
    """The published arithmetic, written down: per task a pass with everything, mixed by ``execute``, ``[N, T, L]``."""
    maps = []
    for task, head in enumerate(net.heads):
        stem = net.backbone.stem
        x = F.relu(batch_norm(F.conv2d(images, stem.conv1.weight, stride=2, padding=3), stem.bn1))
        x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
        column = 0
        for blocks, ds, stride, dilation in zip(net.backbone.blocks, net.backbone.ds, (1, 2, 1, 1), (1, 1, 2, 4)):
            for number, block in enumerate(blocks):
                s, step = x, 1
                if number == 0:
                    s = x if ds is None else batch_norm(F.conv2d(x, ds[0].weight, stride=stride), ds[1])
                    step = stride
                y = F.relu(s + residual_branch(block, x, step, dilation))
                p = execute[:, task, column].to(x)[:, None, None, None]
                x = y * p + s * (1 - p)
                column += 1
        total = 0
        for branch, rate in zip(head.branches, (6, 12, 18, 24)):
            y = F.relu(F.conv2d(x, branch.conv1.weight, branch.conv1.bias, padding=rate, dilation=rate))
            y = F.relu(F.conv2d(y, branch.conv2.weight, branch.conv2.bias))
            total = total + F.conv2d(y, branch.conv3.weight, branch.conv3.bias)
        maps.append(total)
    return maps


def decision_cases(samples, tasks=3, blocks=7):
    """(name, decisions) of every kind, for all images and per image."""
    all_on = torch.ones(tasks, blocks, dtype=torch.bool)
    one_skips = all_on.clone()
    one_skips[1, 2] = False  # the first block of a segment, so that rows of both kinds need its shortcut
    yield "all", all_on
    yield "none", ~all_on
    yield "one task skips a first block", one_skips
    yield "apart from the start", torch.arange(tasks)[:, None].expand(tasks, blocks) % 2 == 0
    yield "one block each", torch.eye(blocks, dtype=torch.bool)[:tasks]
    yield "random", torch.rand(tasks, blocks) < 0.6
    yield "per image, random", torch.rand(samples, tasks, blocks) < 0.6
    yield "per image, mostly on", torch.rand(samples, tasks, blocks) < 0.9
    yield "per image, one alone", ~torch.eye(samples * tasks * blocks, dtype=torch.bool)[-1].view(samples, tasks, -1)


def close(actual, expected, most=1e-5):
    actual, expected = ([y.detach() for y in ys] for ys in (actual, expected))
    assert relative_error(actual, expected) <= most


@pytest.mark.parametrize("depth", [18, 101])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(45, 62), (32, 33), (8, 1)])
@torch.no_grad()
def test_shared_execution_is_masked_execution(depth, layout, size):
    net = make(depth)
    for samples in (1, 3):
        images = torch.randn(samples, 3, *size).contiguous(memory_format=layout)
        for name, decisions in decision_cases(samples):
            expected = masked(net, images, decisions.expand(samples, 3, 7))
            assert [y.shape[:2] for y in expected] == [(samples, classes) for classes in CLASSES]
            for maps in (net(images, decisions), net(images, soft_decisions=decisions.float())):
                assert relative_error(maps, expected) <= 1e-5, name
            assert all(torch.equal(*pair) for pair in zip(net(images, decisions), net(images, decisions))), name


@pytest.mark.parametrize("depth", [18, 101])
@torch.no_grad()
def test_frozen(depth):
    net = make(depth)
    images = torch.randn(3, 3, 45, 62).contiguous(memory_format=torch.channels_last)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    frozen = dynexec.freeze(net, images)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert len(frozen.explain().splitlines()) == len(net.part_names())
    for inputs in (images, torch.randn(2, 3, 33, 40), torch.randn(1, 3, 45, 62)):
        for _, decisions in decision_cases(len(inputs)):
            expected = masked(net, inputs, decisions.expand(len(inputs), 3, 7))
            close(frozen(inputs, decisions), expected)
            close(frozen(inputs, None, soft_decisions=decisions.float()), expected)
    maps, used = frozen(images, return_decisions=True)
    assert used.all() and all(torch.equal(*pair) for pair in zip(maps, frozen(images, used)))


def test_every_part_runs_under_some_example_decisions_and_none_without_rows():
    net = make()
    calls = {}
    for name in net.part_names():

        def hook(part, arguments, name=name):
            (x,) = arguments
            assert len(x) > 0
            calls.setdefault(name, []).append(len(x))

        net.get_submodule(name).register_forward_pre_hook(hook)
    images = torch.randn(2, 3, 20, 20)
    for decisions in net.example_decisions(images):
        net(images, decisions)
    assert calls.keys() == set(net.part_names())
    owned = {id(p) for name in net.part_names() for p in net.get_submodule(name).parameters()}
    assert owned == {id(p) for name, p in net.named_parameters() if not name.startswith("policy.")}
    calls.clear()
    net(images, torch.tensor([[True] * 7, [True] * 7, [True, True, False, True, True, True, True]]))
    blocks = [calls[f"backbone.blocks.{s}.{b}"] for s, count in enumerate((2, 2, 1, 2)) for b in range(count)]
    assert blocks == [[2], [2], [2], [4], [4], [4], [4]]  # one call each, shared as long as all agree
    assert calls["backbone.ds.1"] == [2] and calls["backbone.ds.2"] == [4] and calls["backbone.stem"] == [2]
    assert [calls[f"heads.{task}"] for task in range(3)] == [[2], [2], [2]]


@pytest.mark.usefixtures("algorithms")
@pytest.mark.parametrize("depth", [18, 101])
@pytest.mark.parametrize("per_image", [False, True])
def test_gradients_are_those_of_the_masked_network(depth, per_image):
    net = make(depth).double().requires_grad_(True)
    images = torch.randn(2, 3, 21, 26, dtype=torch.float64, requires_grad=True)
    decisions = torch.rand(2, 3, 7) < 0.6 if per_image else torch.rand(3, 7) < 0.6
    decisions[..., 3] = False  # gradients of zeros, too
    parameters = [*net.backbone.parameters(), *net.heads.parameters()]
    soft = decisions.double()
    results = []
    for maps in (
        net(images, decisions),
        net(images, soft_decisions=soft),
        masked(net, images, decisions.expand(2, 3, 7)),
    ):
        loss = sum(y.square().sum() for y in maps)
        results.append(torch.autograd.grad(loss, (images, *parameters), allow_unused=True))
    for hard, mixed, expected in zip(*results, strict=True):
        expected = torch.zeros_like(mixed) if expected is None else expected
        close([hard], [expected], 1e-9)
        close([mixed], [expected], 1e-9)


@pytest.mark.parametrize("per_image", [False, True])
def test_soft_decisions_mix_and_pass_gradients(per_image):
    net = make()
    images = torch.randn(2, 3, 30, 31)
    weights = torch.rand(2, 3, 7) if per_image else torch.rand(3, 7)
    weights.requires_grad_()
    maps, used = net(images, soft_decisions=weights, return_decisions=True)
    expected = masked(net, images, weights.expand(2, 3, 7))
    close(maps, expected)
    assert used is weights
    gradients = [torch.autograd.grad(sum(y.sum() for y in ys), weights)[0] for ys in (maps, expected)]
    assert (gradients[0] != 0).all()
    close(gradients[:1], gradients[1:])


def test_training_of_soft_decisions_takes_each_tasks_own_batch_statistics():
    net = make().train()
    images, weights = torch.randn(4, 3, 20, 20), torch.rand(3, 7)
    twin = copy.deepcopy(net)
    net(images, soft_decisions=weights)
    with torch.no_grad():
        for task in range(3):
            twin.backbone.run_soft(images, weights[task])
    assert net.backbone.stem.bn1.num_batches_tracked == 3
    assert all(torch.equal(*pair) for pair in zip(net.backbone.buffers(), twin.backbone.buffers()))


def test_training_of_hard_decisions_reaches_what_ran():
    net = make().train()
    decisions = torch.ones(3, 7, dtype=torch.bool)
    decisions[:, 3] = False
    sum(y.square().sum() for y in net(torch.randn(4, 3, 20, 20), decisions)).backward()
    skipped = list(net.backbone.blocks[1][1].parameters())
    assert skipped and not any(p.grad.any() for p in skipped)  # zeros, as in the masked network
    assert all(p.grad is not None for p in net.backbone.blocks[3][1].parameters())


def test_the_task_policy_decides():
    net = make()
    images = torch.randn(2, 3, 20, 20)
    maps, used = net(images, return_decisions=True)
    assert used.dtype == torch.bool and used.shape == (3, 7) and used.all()  # logits start equal
    with torch.no_grad():
        net.policy.task2_logits.copy_(torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 4))
    maps, used = net(images, return_decisions=True)
    assert used[1].tolist() == [True] * 3 + [False] * 4  # column 0 executes
    close(maps, masked(net, images, used.expand(2, 3, 7)))
    assert all(torch.equal(*pair) for pair in zip(maps, net(images)))


def test_the_instance_policy_decides_per_image():
    net = make(instance_policy=True)
    images = torch.randn(4, 3, 33, 40)
    maps, used = net(images, return_decisions=True)
    assert used.shape == (4, 3, 7) and 0 < used.sum() < used.numel()
    assert torch.equal(used, net.policy(images)[..., 0] >= net.policy(images)[..., 1])
    close(maps, masked(net, images, used))
    frozen = dynexec.freeze(net, images)
    close(frozen(images, used), maps)
    assert frozen(images)[0].shape == maps[0].shape
    assert all(torch.equal(*pair) for pair in zip(maps, net(images)))


@torch.no_grad()
def test_an_images_maps_do_not_depend_on_its_batch_mates():
    net = make()
    images, decisions = torch.randn(5, 3, 37, 30), torch.rand(5, 3, 7) < 0.6
    maps = net(images, decisions)
    for n in range(5):
        close(net(images[n : n + 1], decisions[n : n + 1]), [y[n : n + 1] for y in maps])
        close(net(images[n : n + 1], decisions[n]), [y[n : n + 1] for y in maps])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), None])
@torch.no_grad()
def test_copies(clone):
    net = make(101, instance_policy=True)
    if clone is None:
        twin = make(101, instance_policy=True).train()
        twin.load_state_dict(net.state_dict())
        twin.eval()
    else:
        twin = clone(net)
    images = torch.randn(2, 3, 21, 20)
    assert all(torch.equal(*pair) for pair in zip(net(images), twin(images)))
    twin.backbone.ds[1][0].weight.zero_()
    assert not torch.equal(net(images)[0], twin(images)[0])


@torch.no_grad()
def test_heads_sum_four_dilated_branches():
    """On maps that are larger than the widest dilation, or it would see nothing but zeros."""
    head = make(widths=(4, 4, 4, 8)).heads[0]
    x = torch.randn(2, 8, 31, 53)
    total = 0
    for branch, rate in zip(head.branches, (6, 12, 18, 24), strict=True):
        y = F.relu(F.conv2d(x, branch.conv1.weight, branch.conv1.bias, padding=rate, dilation=rate))
        y = F.relu(F.conv2d(y, branch.conv2.weight, branch.conv2.bias))
        total = total + F.conv2d(y, branch.conv3.weight, branch.conv3.bias)
    close([head(x)], [total])
    assert not torch.equal(head.train()(x), head(x))  # dropout


def test_structure():
    basic, bottleneck = make(18).backbone, make(101).backbone
    assert [ds is None for ds in basic.ds] == [True, False, False, False]  # dilated segments have one even at one size
    assert [ds is None for ds in bottleneck.ds] == [False] * 4
    assert not any(p.requires_grad for segment in bottleneck.blocks for p in segment[0].bn3.parameters())
    assert all(p.requires_grad for p in basic.parameters())
    for size in ((1, 1), (2, 3), (64, 65), (224, 97)):
        shapes, sizes = basic.input_shapes(*size), []
        with torch.no_grad():
            x = basic.stem(torch.randn(1, 3, *size))
            for block, ds in basic.chain():
                sizes.append(tuple(x.shape[1:]))
                x = block(x) if ds is None else block(x) + ds(x)
        assert shapes == [*sizes, tuple(x.shape[1:])]
    images = torch.randn(2, 3, 20, 20)
    close(
        [basic(images)], basic.run_shared(images, dynexec.nn.tasks.SharingPlan.from_decisions(torch.ones(1, 7) > 0, 2))
    )


@pytest.mark.parametrize(
    ("name", "classes", "all_blocks", "apart", "shared", "heads"),
    [
        ("cityscapes_2_tasks_resnet34", (19, 1), 37.06, 33.35, 32.75, 38.87),
        ("nyu_v2_3_tasks_resnet34", (40, 3, 1), 55.59, 50.13, 47.33, 58.35),
        ("taskonomy_5_tasks_resnet34", (17, 3, 1, 1, 1), 92.64, 87.75, 81.06, 97.08),
        ("nyu_v2_2_tasks_resnet18", (40, 3), 19.71, 18.48, 18.12, 38.95),
    ],
)
def test_published_flops(name, classes, all_blocks, apart, shared, heads):
    """In units of 1e9 multiply-adds, at 224 pixels; the first two columns are the published ones."""
    with torch.device("meta"):
        net = adashare_resnet(int(name[-2:]), num_classes=classes)
        flops = count_flops(net, torch.empty(3, 3, 224, 224))
    decisions = published_policy(name)
    giga = 2e9
    assert round(len(classes) * flops.one_pass / giga, 2) == all_blocks
    assert round(flops.backbone(decisions, shared=False).item() / giga, 2) == apart
    assert round(flops.backbone(decisions).item() / giga, 2) == shared
    assert round(sum(flops.head) / giga, 2) == heads
    if name.endswith("34"):
        assert round(flops.one_pass / giga, 2) == 18.53 and round(flops.head[-1] / giga, 1) == 19.4
    assert flops.dense == len(classes) * flops.one_pass + sum(flops.head) and flops.policy == 0
    assert flops.of(decisions) == flops.backbone(decisions) + sum(flops.head)
    assert flops.saving(decisions) == pytest.approx(1 - (shared + heads) / (all_blocks + heads), abs=1e-3)
    everything = torch.ones_like(decisions)
    assert flops.backbone(everything, shared=False) == len(classes) * flops.one_pass
    assert flops.backbone(everything) == flops.one_pass  # hard sharing


def test_flops_are_those_of_what_runs():
    from torch.utils.flop_counter import FlopCounterMode

    net = make(101, instance_policy=True)
    images = torch.randn(3, 3, 45, 62)
    flops = net.count_flops(images)
    for _, decisions in decision_cases(3):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(images, decisions)
        own = flops.of(decisions)
        assert own.dtype == torch.float64 and own.shape == decisions.shape[:-2]
        assert counter.get_total_flops() == (own - flops.policy).expand(3).sum()
        needed = counter.get_total_flops() / 3 + flops.policy
        assert flops.saving(decisions) == pytest.approx(1 - needed / flops.dense)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(images, soft_decisions=torch.rand(3, 7))
    assert counter.get_total_flops() == 3 * flops.dense
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.policy(images)
    assert counter.get_total_flops() == 3 * flops.policy > 0
    with pytest.raises(ValueError, match=r"decisions must be bool \[3, 7\] or \[N, 3, 7\], got \(7, 3\)"):
        flops.of(torch.ones(7, 3, dtype=torch.bool))


BAD_INPUTS = [
    ([1.0], TypeError, r"images must be a floating-point tensor \[N, 3, H, W\], got list"),
    (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "got torch.uint8"),
    (torch.zeros(3, 8, 8), ValueError, r"with N at least 1, got \(3, 8, 8\)"),
    (torch.zeros(1, 4, 8, 8), ValueError, r"got \(1, 4, 8, 8\)"),
    (torch.zeros(0, 3, 8, 8), ValueError, r"got \(0, 3, 8, 8\)"),
]


@pytest.mark.parametrize(("images", "error", "message"), BAD_INPUTS)
def test_bad_images(images, error, message):
    net = make()
    for call in (net, net.check_inputs, net.count_flops):
        with pytest.raises(error, match=message):
            call(images)


def test_bad_decisions():
    net, images = make(), torch.randn(2, 3, 16, 16)
    on = torch.ones(3, 7, dtype=torch.bool)
    for decisions, error, message in (
        (on.float(), TypeError, "decisions must be a bool tensor .*, got torch.float32"),
        ("all", TypeError, "got str"),
        (on[:2], ValueError, r"decisions must have shape \(3, 7\) or \(2, 3, 7\): .*; got \(2, 7\)"),
        (on.t(), ValueError, r"got \(7, 3\)"),
        (on.expand(3, 3, 7), ValueError, r"got \(3, 3, 7\)"),
        (on[0], ValueError, r"got \(7,\)"),
    ):
        with pytest.raises(error, match=message):
            net(images, decisions)
    for weights, error, message in (
        (on, TypeError, "soft_decisions must be a floating-point tensor .*, got torch.bool"),
        (1.0, TypeError, "got float"),
        (on[:2].float(), ValueError, r"soft_decisions must have shape \(3, 7\) or \(2, 3, 7\): .*; got \(2, 7\)"),
    ):
        with pytest.raises(error, match=message):
            net(images, soft_decisions=weights)
    with pytest.raises(ValueError, match="decisions and soft_decisions must not be given both"):
        net(images, on, soft_decisions=on.float())


def test_bad_sizes():
    for options, message in (
        ({"depth": 50}, r"depth must be one of \(18, 34, 101\), got 50"),
        ({"classes": ()}, r"num_classes must be a sequence of positive ints, one per task, got \(\)"),
        ({"classes": 3}, "got 3"),
        ({"blocks": (1, 1), "widths": (4,)}, r"one positive entry for each .*, got \(1, 1\) and \(4,\)"),
        ({"blocks": (1,) * 5, "widths": (4,) * 5}, "one to 4 segments"),
        ({"blocks": (1, 0), "widths": (4, 4)}, r"got \(1, 0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
    net = make()
    with pytest.raises(ValueError, match="policy decides for 3 tasks and 7 blocks, but there are 2 heads and 7 blocks"):
        type(net)(net.backbone, list(net.heads)[:2], net.policy)
