"""Blocks with two sets of weights: built, converted, trained, frozen, on the CPU's engine and the GPU's kernels."""

import copy
import pickle
import sys

import pytest
import torch
import toys
from kernel_cases import DEVICE
from torch import nn

import dynexec
from dynexec import models
from dynexec.executors import backends
from dynexec.executors.choose import StageCosts
from dynexec.executors.costs import BlockCost
from dynexec.executors.emit import emit_nodes
from dynexec.executors.launches import LaunchPrograms
from dynexec.executors.proof import relative_error
from dynexec.nn import ExpertBlock, decide, dynamic_blocks
from dynexec.nn.residual import place as nn_place
from dynexec.nn.rows import join_rows, part_rows, split_rows
from dynexec.nn.swap import FROZEN

STYLES = list(toys.STYLES)
MODES = ["exact", "capacity"]


def fine_tuned(style, **options):
    """A converted model whose two sets of weights differ, and its static networks: all decisions False, all True."""
    model = toys.STYLES[style]()
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    conversion = dynexec.convert(model, fine_tune="convolutions", **options)
    for block in dynamic_blocks(model):
        for parameter in block.fine_tuned.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        toys.finish(block.fine_tuned, seed=1)
    names = [name for _, name, _, _ in conversion.converted]
    for name in names:
        second.get_submodule(name).load_state_dict(model.get_submodule(name).fine_tuned.state_dict())
    return model, first, second, names


def sample_by_sample(first, second, names, x, decisions):
    """What decisions choose, one sample and block at a time: a network put together for each sample."""
    outputs = []
    for sample, row in zip(x.split(1), decisions.tolist(), strict=True):
        network = copy.deepcopy(first)
        for name, chosen in zip(names, row, strict=True):
            if chosen:
                network.get_submodule(name).load_state_dict(second.get_submodule(name).state_dict())
        outputs.append(network(sample))
    return torch.cat(outputs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("style", STYLES)
def test_each_sample_runs_its_weights(style, mode):
    model, first, second, names = fine_tuned(style)
    x = toys.images(5)
    for _, decisions in toys.decision_patterns(5, len(names)):
        with torch.no_grad():
            expected = sample_by_sample(first, second, names, x, decisions)
        assert relative_error(toys.run(model, x, decisions, mode), expected) <= 1e-5
    with torch.no_grad():
        assert torch.equal(model(x), first(x))  # outside decide: the block itself
        assert torch.equal(toys.run(model, x, torch.zeros(len(names)).bool()), first(x))
        assert relative_error(toys.run(model, x, torch.ones(len(names)).bool()), second(x)) <= 1e-6


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("samples", [0, 1, 4])
def test_batches_and_layouts(samples, layout):
    model, first, second, names = fine_tuned("torchvision")
    x, decisions = toys.images(samples, layout=layout), torch.rand(samples, len(names)) < 0.5
    y = toys.run(model, x, decisions)
    with torch.no_grad():
        expected = sample_by_sample(first, second, names, x, decisions) if samples else first(x)
    assert y.shape == expected.shape and relative_error(y, expected) <= 1e-5


def test_nothing_is_computed_twice():
    """Each block's two modules see together exactly the samples of the batch, and one sees none where none chose it."""
    model, _, _, names = fine_tuned("torchvision")
    seen = []
    for name in names:
        block = model.get_submodule(name)
        block.conv1.register_forward_hook(lambda m, i, o, name=name: seen.append((name, 0, len(o))))
        block.fine_tuned.conv1.register_forward_hook(lambda m, i, o, name=name: seen.append((name, 1, len(o))))
    decisions = torch.rand(6, len(names)) < 0.5
    decisions[:, 0], decisions[:, 1] = True, False
    toys.run(model, toys.images(6), decisions)
    counts = [(name, c, int((column == c).sum())) for name, column in zip(names, decisions.t()) for c in (False, True)]
    assert sorted(seen) == sorted((name, int(c), count) for name, c, count in counts if count)


def masked(model, first, x, weights):
    """The published arithmetic on a twin of ``model``: both sets of weights on all samples, then the mask."""
    h, column = model.stem(x), 0
    for block in (block for stage in model.layers for block in stage):
        keep = weights[:, column].reshape(-1, 1, 1, 1)
        h = block.forward_dense(h) * (1 - keep) + block.fine_tuned(h) * keep
        column += 1
    return model.head(h.mean((2, 3)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_gradients_are_those_of_the_masked_network(keep, training):
    """With batch statistics, too: as published they are over all samples, for both sets of weights."""
    model, first, _, names = fine_tuned("torchvision")
    model.requires_grad_(True)
    model.train(training)
    twin = copy.deepcopy(model)
    x, decisions = toys.images(6).requires_grad_(), torch.rand(6, len(names)) < keep
    other = x.detach().clone().requires_grad_()
    with decide(decisions):
        y = model(x)
    expected = masked(twin, first, other, decisions.float())
    assert relative_error(y, expected) <= 1e-5
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    expected.backward(cotangent)
    assert relative_error(x.grad, other.grad) <= 1e-4
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert a.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=name)
    if training:
        for a, b in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_soft_decisions_mix_and_pass_gradients():
    model, first, _, names = fine_tuned("timm")
    x, weights = toys.images(3), torch.rand(3, len(names), requires_grad=True)
    with decide(weights, mode="soft"):
        y = model(x)
    other = weights.detach().clone().requires_grad_()
    expected = masked(model, first, x, other)
    assert relative_error(y, expected) <= 1e-5
    y.sum().backward()
    expected.sum().backward()
    assert relative_error(weights.grad, other.grad) <= 1e-4 and bool(weights.grad.abs().min() > 0)


def test_statistics_of_the_samples_that_run():
    """``batch_norm="kept"``: each set of weights normalises its own samples."""
    model, _, _, names = fine_tuned("torchvision", batch_norm="kept")
    model.train()
    x, decisions = toys.images(6), torch.arange(6)[:, None].expand(6, len(names)) < 3
    with decide(decisions):
        y = model(x)
    alone = []
    for rows, chosen in ((slice(3), True), (slice(3, 6), False)):
        network = copy.deepcopy(model)
        network.stem.eval()
        with decide(torch.full((len(names),), chosen)):
            alone.append(network(x[rows]))
    model.stem.eval()
    with decide(decisions):
        y = model(x)
    assert relative_error(y, torch.cat(alone)) <= 1e-5
    with decide(decisions, mode="capacity"), pytest.raises(RuntimeError, match="use exact mode"):
        model(x)


@pytest.mark.parametrize("frozen", FROZEN)
def test_what_is_frozen(frozen):
    model = toys.STYLES["torchvision"]().train()
    report = dynexec.convert(model, fine_tune=frozen)
    assert f"two sets of weights; frozen of the first: {frozen}" in str(report)
    for block in dynamic_blocks(model):
        assert all(p.requires_grad for p in block.fine_tuned.parameters()) and block.fine_tuned.bn1.training
        assert block.conv1.weight.requires_grad == (frozen == "nothing")
        assert block.bn1.weight.requires_grad == (frozen != "all")
        assert block.bn1.training == (frozen != "all")
    assert model.stem[0].weight.requires_grad and model.head.weight.requires_grad
    model.eval()
    model.train()
    assert all(block.bn1.training == (frozen != "all") for block in dynamic_blocks(model))


def test_one_training_step_moves_the_second_set_only():
    model = toys.STYLES["torchvision"]().eval()
    dynexec.convert(model, fine_tune="all")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with decide(torch.rand(4, 5) < 0.5):
        model(toys.images(4)).square().sum().backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all("fine_tuned" in name or name.startswith(("stem", "head")) for name in moved)


def test_revert_copy_and_pickle():
    model, first, _, names = fine_tuned("torchvision")
    x, decisions = toys.images(3), torch.rand(3, len(names)) < 0.5
    y = toys.run(model, x, decisions)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(toys.run(twin, x, decisions), y)
        assert all(isinstance(block, ExpertBlock) and block.fine_tuned is not None for block in dynamic_blocks(twin))
    other = toys.STYLES["torchvision"]()
    dynexec.convert(other, fine_tune="nothing")
    other.load_state_dict(model.state_dict())
    assert torch.equal(toys.run(other, x, decisions), y)
    assert dynexec.revert(model) == len(names)
    assert model.state_dict().keys() == first.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(model(x), first(x))


def own_blocks():
    """Blocks of our own, whose shortcuts are registered beside them; not placed."""
    net = models.blockdrop_resnet((1, 2), (4, 8), block=models.blockdrop.Bottleneck, large_images=True, num_classes=5)
    backbone = toys.finish(net.backbone)
    for block in dynamic_blocks(backbone):
        block.placement = None
    return backbone


def test_blocks_of_our_own_get_a_second_set_of_weights():
    """Their shortcuts are copied with them, can be trained and saved, and are frozen with the first set."""
    first = own_blocks()
    model, second = copy.deepcopy(first), copy.deepcopy(first)
    columns = dynexec.convert(model, fine_tune="convolutions").num_blocks
    assert not any(shortcut[0].weight.requires_grad for shortcut in model.ds)
    placed = [block for block in dynamic_blocks(model) if block.placement]
    for block, twin in zip(placed, dynamic_blocks(second), strict=True):
        for parameter, other in zip(block.fine_tuned.parameters(), twin.parameters(), strict=False):
            parameter.data += 0.1 * torch.randn_like(parameter)
            other.data = parameter.data.clone()
        for shortcut, other in zip(block.fine_tuned.shortcut_layers(), twin.shortcut_layers(), strict=True):
            toys.finish(shortcut, seed=3)
            other.load_state_dict(shortcut.state_dict())
    assert any(name.endswith("fine_tuned.shortcut.0.weight") for name in model.state_dict())
    x, decisions = torch.randn(3, 3, 33, 40), torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 0]]).bool()

    def static(row):
        h = first.stem_pool(torch.relu(first.bn1(first.conv1(x[row : row + 1]))))
        pairs = zip(*(dynamic_blocks(network) for network in (first, second)), strict=True)
        for (a, b), chosen in zip(pairs, decisions[row].tolist(), strict=True):
            h = (b if chosen else a)(h)
        return first.fc(h.mean((2, 3)))

    with torch.no_grad():
        expected = torch.cat([static(row) for row in range(3)])
    assert columns == 3 and relative_error(toys.run(model, x, decisions), expected) <= 1e-5
    assert relative_error(dynexec.freeze(model, x)(x, decisions), expected) <= 2e-5
    with pytest.raises(ValueError, match="cannot be held in evaluation mode"):
        dynexec.convert(own_blocks(), fine_tune="all")


def test_modes_that_the_user_set_stay():
    """BatchNorm in evaluation mode while the model trains, as in most fine-tuning."""
    model = toys.STYLES["torchvision"]().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    dynexec.convert(model, fine_tune="convolutions")
    assert not any(module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d))


class Named(nn.Module):
    """Its input has a name, it keeps something of its own as ``_shortcut``, and maybe what we need a name for."""

    def __init__(self, taken=None):
        super().__init__()
        self.block = toys.BasicBlock(4, 4)
        self.block._shortcut = None
        if taken:
            setattr(self.block, taken, nn.Identity())

    def forward(self, x):
        return self.block(x=x)


def test_inputs_by_name_and_attributes_of_the_same_name():
    model = toys.finish(Named())
    twin = copy.deepcopy(model)
    dynexec.convert(model, fine_tune="nothing")
    x = torch.randn(3, 4, 5, 5)
    with torch.no_grad():
        assert torch.equal(model(x), twin(x))
        assert relative_error(toys.run(model, x, torch.tensor([[True], [False], [True]])), twin(x)) <= 1e-6
    for taken in ("expert", "fine_tuned"):
        with pytest.raises(ValueError, match=f"attribute '{taken}', a name that dynexec needs"):
            dynexec.convert(Named(taken), match=toys.BasicBlock, fine_tune="nothing")


def test_an_empty_batch_gives_zero_gradients():
    model, _, _, names = fine_tuned("torchvision")
    model.requires_grad_(True)
    with decide(torch.ones(0, len(names)).bool()):
        model(toys.images(0)).sum().backward()
    for block in dynamic_blocks(model):
        assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


def test_statistics_of_too_few_samples():
    model, _, _, names = fine_tuned("torchvision", batch_norm="kept")
    model.train()
    with decide(torch.eye(3, len(names)).bool()), pytest.raises(ValueError, match="1 samples for the two sets of weig"):
        model(torch.randn(3, 3, 2, 2))


@pytest.mark.parametrize("executor", ["grouped", "compact", "masked", "fused", "resident"])
def test_stages_of_both_kinds_of_blocks(executor):
    """A sample that keeps nothing still runs the first set of a block that has two."""
    model = toys.STYLES["torchvision"]()
    middle = model.layers[0][1]
    dynexec.convert(middle, fine_tune="nothing")
    toys.finish(middle.fine_tuned, seed=4)
    middle.placement = None
    dynexec.convert(model, match=lambda name, module: type(module) is toys.BasicBlock and "fine_tuned" not in name)
    blocks = [block for stage in model.layers for block in stage]
    nn_place({str(number): block for number, block in enumerate(blocks)})
    x = toys.images(5)
    decisions = torch.tensor([[0] * 5, [1, 0, 1, 0, 1], [1] * 5, [0] * 5, [0, 1, 0, 1, 0]]).bool()
    expected = toys.run(model, x, decisions, "capacity")
    assert relative_error(dynexec.freeze(model, x, executor=executor)(x, decisions), expected) <= 2e-5


def test_errors():
    with pytest.raises(ValueError, match="fine_tune must be None or one of .*, got 'everything'"):
        dynexec.convert(toys.STYLES["timm"](), fine_tune="everything")
    model, _, _, names = fine_tuned("torchvision")
    with decide(torch.ones(2, len(names)).bool()), pytest.raises(TypeError, match="takes one tensor"):
        dynamic_blocks(model)[0](torch.rand(2, 8, 5, 5), torch.rand(2))
    for weights, error in ((torch.ones(2, 5).bool(), TypeError), (torch.rand(2, 5, 1), ValueError), ([1.0], TypeError)):
        with pytest.raises(error, match="decisions must"):
            decide(weights, mode="soft")


@pytest.mark.parametrize("executor", ["resident", "fused", "compact", "masked", "grouped", None])
@pytest.mark.parametrize("style", STYLES)
def test_frozen(style, executor):
    model, first, second, names = fine_tuned(style)
    frozen = dynexec.freeze(model, toys.images(4), executor=executor)
    for samples, size in ((5, 13), (1, 13), (0, 13), (3, 17)):
        x = toys.images(samples, size)
        for _, decisions in (
            toys.decision_patterns(samples, len(names)) if samples else [("", torch.ones(0, len(names)).bool())]
        ):
            with torch.no_grad():
                expected = sample_by_sample(first, second, names, x, decisions) if samples else first(x)
            assert relative_error(frozen(x, decisions), expected) <= 2e-5


def test_a_frozen_block_runs_nothing_twice():
    """Two gates in a row, of which each lets through what the other does not."""
    model, _, _, names = fine_tuned("torchvision")
    frozen = dynexec.freeze(model, toys.images(4), executor="fused")
    (segment,) = frozen.segments
    assert segment.operations.count("gate") == 2 * len(names)
    program = LaunchPrograms(len(names))
    builder = program.builder()
    builder.begin_unit()
    values = {segment.source: builder.load(3, 13, 13)}
    assert emit_nodes(builder, segment.nodes, segment.modules, values)
    gates = [(step.column, step.choice) for step in builder.instructions if step.op == "gate"]
    assert gates == [(column, choice) for column in range(len(names)) for choice in (0, 1)]


def test_costs_of_both_sets_of_weights():
    """``compact`` pays for the samples that keep the block and for the others, ``grouped`` for every part."""
    curve = {1: 1.0, 8: 8.0}
    stage = StageCosts([BlockCost(4, curve, {1: 0.1, 8: 0.8}, {1: 0.0}, {1: 0.0}, both=True)])
    parts = {b"\x01": [0, 1, 2], b"\x00": [3, 4, 5, 6, 7]}
    seconds = stage.predict([3], parts, 8)
    assert seconds["compact"] == pytest.approx(8.0 + 0.8)
    assert seconds["masked"] == pytest.approx(16.0)
    assert seconds["grouped"] == pytest.approx(8.0 + 0.8)
    for executor, cause in (("compact", "row moves"), ("masked", "dropped rows computed")):
        assert stage.losses(executor, [3], parts, 8)[cause] > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("executor", ["fused", "dense", "switched"])
def test_on_the_kernels(monkeypatch, executor):
    """Twin gates run as one launch per convolution, in every other executor one gate after the other."""
    module = sys.modules["dynexec.executors.freeze"]
    monkeypatch.setattr(module, "choose_backend", lambda device, _, invariant: backends.kernels(device, invariant))
    net = models.spottune_resnet26(blocks=(2, 1), widths=(8, 12), stem_width=6, num_classes=5)
    net = toys.finish(net).to(DEVICE)
    x = torch.randn(4, 3, 8, 12, device=DEVICE)
    frozen = dynexec.freeze(net, x, executor=executor)
    (program,) = frozen.segments[0].programs.values()
    assert len(program.twins) == 3
    for decisions in (torch.rand(4, 3) < 0.5, torch.zeros(4, 3).bool(), torch.ones(4, 3).bool()):
        decisions = decisions.to(DEVICE)
        with torch.no_grad():
            expected = net(x, soft_decisions=decisions.float())
        assert relative_error(frozen(x, decisions), expected) <= (2e-5 if DEVICE.type == "cpu" else 1e-2)
    decisions = torch.tensor([[True, False, True]] * 3 + [[True, False, False]], device=DEVICE)
    found = {(part.name, part.kind): part for part in frozen.profile(x, decisions, rounds=1).parts}
    for name, kept in zip(("blocks.0.0", "blocks.0.1", "blocks.1.0"), (4, 0, 3), strict=True):
        block, other = found[name, "block"], found[name, "other"]
        assert (block.samples, other.samples) == (kept, 4 - kept)
        if executor != "dense":  # one launch for both
            assert block.measured == pytest.approx((block.measured + other.measured) * kept / 4, abs=2e-9)
        assert (block.measured > 0) == (kept > 0) or executor == "dense"


class Uneven(nn.Module):
    """Its two sets of weights are not alike, so that they cannot share a launch."""

    def __init__(self):
        super().__init__()
        self.block = toys.BasicBlock(4, 4)

    def forward(self, x):
        return self.block(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:invalid value:RuntimeWarning")
def test_unlike_weights_on_the_kernels(monkeypatch):
    module = sys.modules["dynexec.executors.freeze"]
    monkeypatch.setattr(module, "choose_backend", lambda device, _, invariant: backends.kernels(device, invariant))
    model = toys.finish(Uneven())
    dynexec.convert(model, fine_tune="nothing")
    model.block.fine_tuned = toys.finish(toys.Bottleneck(4, 4), seed=2)
    model = model.to(DEVICE)
    x, decisions = torch.randn(3, 4, 7, 5, device=DEVICE), torch.tensor([[True], [False], [True]], device=DEVICE)
    frozen = dynexec.freeze(model, x, executor="fused")
    (program,) = frozen.segments[0].programs.values()
    assert not program.twins
    expected = toys.run(model, x, decisions)
    assert relative_error(frozen(x, decisions), expected) <= (2e-5 if DEVICE.type == "cpu" else 1e-2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_taking_a_batch_apart_and_joining_it(layout):
    indices = [torch.tensor([4, 0]), torch.tensor([1, 2, 3], dtype=torch.int32)]
    x = torch.randn(5, 3, 2, 2, dtype=torch.float64).to(memory_format=layout).requires_grad_()

    def cubes(x):
        first, second = part_rows(x, indices)
        return join_rows([first**3, second * 2], indices)

    expected = torch.where(torch.tensor([1, 0, 0, 0, 1]).bool().reshape(5, 1, 1, 1), x**3, x * 2)
    assert torch.equal(cubes(x), expected) and cubes(x).stride() == x.stride()
    assert torch.autograd.gradcheck(cubes, (x,), check_forward_ad=True)
    assert torch.autograd.gradcheck(lambda x: part_rows(x, indices)[1] * 2, (x,))  # of the others nothing comes
    assert torch.autograd.gradgradcheck(cubes, (x,))
    for part in (part_rows, lambda x, indices: split_rows(x, indices[0])):
        assert torch.autograd.gradcheck(lambda x, part=part: part(x, indices)[0] ** 2, (x,))  # and with no gradient
    with pytest.raises(ValueError, match=r"rows must have shape \(3, 3, 2, 2\)"):
        join_rows([x[:2], x[:2]], indices)
    with pytest.raises(ValueError, match=r"rows must have shape \(2, 3, 2, 2\)"):
        join_rows([x[:1], x[:3]], indices)
