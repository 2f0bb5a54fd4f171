"""BatchNorm of blocks that train: over all samples, over the kept ones, or frozen; running statistics computed anew."""

import copy
import pickle

import pytest
import torch
import toys
from test_training import Shared, assert_same, gradients, inside
from torch import distributed, nn
from torch.optim.swa_utils import update_bn
from toys import decision_patterns

import dynexec
from dynexec.nn import DynamicNetwork, ResidualBlock, assign_columns, dynamic_blocks, recompute_batch_norm
from dynexec.nn.batch_norm import uses_batch_statistics

MODES = ("all", "kept", "frozen")


class PreActivation(nn.Module):
    """As in He et al., ECCV 2016: a convolution follows the last BatchNorm. Converted, it is split by its trace."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.project = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x):
        residual = self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))
        return residual + (x if self.project is None else self.project(x))


class Own(ResidualBlock):
    """One of our own, post-activation, with a shortcut that somebody else registers."""

    def __init__(self, channels=4, shortcut=None):
        super().__init__(shortcut)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def residual_layers(self):
        return [self.conv1, self.bn1, torch.relu, self.conv2]


def pre_activation():
    return toys.finish(nn.Sequential(PreActivation(4, 6, 2), PreActivation(6, 6), PreActivation(6, 6)))


def own():
    shortcut = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    return toys.finish(nn.Sequential(Own(), Own(shortcut=shortcut), Own(), shortcut))


def masked(model, x, decisions):
    """Every block on all samples, multiplied by the mask; shortcuts run once."""
    for block, keep in zip((block for block in model if not isinstance(block, nn.Sequential)), decisions.t()):
        keep = keep.to(x.dtype).reshape(-1, 1, 1, 1)
        if isinstance(block, Own):
            layers = block.shortcut_layers()
            shortcut = layers[0](x) if layers else x
            full = torch.relu(block.conv2(torch.relu(block.bn1(block.conv1(x)))) + shortcut)
        else:
            project = block.project
            shortcut = x if project is None else project(x)
            block.project = None if project is None else Shared(shortcut)
            full = block(x)
            block.project = project
        x = keep * full + (1 - keep) * shortcut
    return x


class Blocks(nn.Sequential):
    """Applies the blocks only: a shortcut behind them is there to be registered."""

    def forward(self, x):
        for block in self[:3]:
            x = block(x)
        return x


def prepared(make, batch_norm, dtype=torch.float64):
    """(model with columns, twin without, both in training mode)"""
    model = Blocks(*make()).to(dtype)
    twin = copy.deepcopy(model)
    if make is own:
        assign_columns(model, batch_norm=batch_norm)
    else:
        dynexec.convert(model, batch_norm=batch_norm)
    return model.train(), twin.train()


def assert_same_buffers(model, twin):
    expected = dict(twin.named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, expected[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", [pre_activation, own])
def test_all_samples_give_the_statistics_and_kept_ones_the_rest(make, layout):
    model, twin = prepared(make, "all")
    x = torch.randn(5, 4, 7, 9).double().contiguous(memory_format=layout)
    seen = []
    for block in model[:3]:
        block.conv1.register_forward_hook(lambda *args: seen.append(len(args[-1])))
        block.conv2.register_forward_hook(lambda *args: seen.append(-len(args[-1])))
    for name, decisions in decision_patterns(5, 3):
        actual = gradients(model, x, inside(model, decisions))
        assert_same(actual, gradients(twin, x, lambda x: masked(twin, x, decisions)))  # noqa: B023
        assert_same_buffers(model, twin)
        counts = decisions.sum(0).tolist()
        assert seen == [n for count in counts for n in ((5, -count) if count else (5,))], name
        seen.clear()


def test_a_batch_norm_that_nobody_sees_makes_the_block_dense():
    class Hides(Own):
        def residual_layers(self):
            return [lambda x: torch.relu(self.bn1(self.conv1(x))), self.conv2]

    model = nn.Sequential(toys.finish(Hides())).double()
    twin = copy.deepcopy(model).train()
    assign_columns(model.train())
    x, keep = torch.randn(4, 4, 5, 5).double(), torch.tensor([[True], [False], [True], [False]])
    assert_same(gradients(model, x, inside(model, keep)), gradients(twin, x, lambda x: masked(twin, x, keep)))
    assert_same_buffers(model, twin)


def test_an_adapter_need_not_say_what_follows_an_identity():
    class Sequence(dynexec.Adapter):
        def residual_layers(self, block):
            return [block.conv1, block.bn1, torch.relu, block.conv2]

    block = toys.BasicBlock(4, 4)
    block.bn2 = nn.Identity()  # the last BatchNorm has layers behind it
    twin = copy.deepcopy(block).train()
    dynexec.convert(block.train(), Sequence(toys.BasicBlock))
    x, keep = torch.randn(4, 4, 5, 5), torch.tensor([[True], [False], [True], [False]])
    torch.testing.assert_close(inside(block, keep)(x), torch.where(keep[:, :, None, None], twin(x), x))


@pytest.mark.parametrize("mode", ["exact", "capacity"])
@pytest.mark.parametrize("make", [pre_activation, own])
def test_frozen_is_the_masked_network_in_evaluation_mode(make, mode):
    model, twin = prepared(make, "frozen")
    twin.eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(5, 4, 7, 9).double()
    for _, decisions in decision_patterns(5, 3):
        actual = gradients(model, x, inside(model, decisions, mode))
        assert_same(actual, gradients(twin, x, lambda x: masked(twin, x, decisions)))  # noqa: B023
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert any(name.endswith("bn1.weight") and gradient.any() for name, gradient in actual.items())


def test_training_mode_does_not_wake_frozen_batch_norm():
    for style in toys.STYLES:
        model = toys.STYLES[style]().train()
        dynexec.convert(model, batch_norm="frozen")
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for net in (model, *copies, model.train(), model.eval().train(), copies[0].train()):
            assert net.training and net.stem[1].training
            assert all(block.training and not uses_batch_statistics(block) for block in dynamic_blocks(net))
    dynexec.revert(model)
    assert uses_batch_statistics(model.train().layers[0][0])


def test_frozen_blocks_compute_kept_samples_only():
    model, _ = prepared(own, "frozen")
    seen = []
    for block in model[:3]:
        block.conv1.register_forward_hook(lambda *args: seen.append(len(args[-1])))
    inside(model, torch.tensor([[True, False, True], [True, False, False]]))(torch.randn(2, 4, 5, 5).double())
    assert seen == [2, 1]


def test_frozen_experts():
    model = toys.STYLES["torchvision"]().train()
    dynexec.convert(model, fine_tune="nothing", batch_norm="frozen")
    blocks = dynamic_blocks(model.train())
    assert not any(uses_batch_statistics(block) for block in blocks)
    net = dynexec.models.create_model("spottune_resnet26", num_classes=3)
    assign_columns(net.backbone, batch_norm="frozen")
    net.train()(torch.randn(2, 3, 32, 32), torch.arange(24).reshape(2, 12) % 3 == 0)
    assert not any(uses_batch_statistics(block, block.expert()) for block in dynamic_blocks(net.backbone))


@pytest.mark.parametrize("batch_norm", MODES)
def test_few_values_per_channel(batch_norm):
    block = toys.finish(toys.BasicBlock(4, 4)).double().train()
    twin = copy.deepcopy(block)
    dynexec.convert(block, batch_norm=batch_norm)
    x = torch.randn(3, 4, 1, 1).double()
    for kept in ([], [1], [0, 2], [0, 1, 2]):
        keep = torch.zeros(3, 1, dtype=torch.bool)
        keep[kept] = True
        if batch_norm == "kept" and len(kept) == 1:
            with pytest.raises(ValueError, match='batch_norm="kept": 1 of 3 samples'):
                inside(block, keep)(x)
            with pytest.raises(ValueError, match="more than 1 value"):
                twin(x[kept])  # it has counted the batch, too
            continue
        twin.train(batch_norm != "frozen")
        expected = x.clone()
        if batch_norm != "kept":
            expected = torch.where(keep[:, :, None, None], twin(x), x)
        elif kept:
            expected[kept] = twin(x[kept])
        torch.testing.assert_close(inside(block, keep)(x), expected)
        assert_same_buffers(block, twin)
    for mode in MODES:
        block.placement = dynexec.nn.Placement(0, 1, mode)
        assert inside(block, torch.zeros(0, 1).bool())(x[:0]).shape == (0, 4, 1, 1)


class Meets(nn.SyncBatchNorm):
    """Writes down its batches instead of waiting for other processes, which it does on GPUs only."""

    def forward(self, x):
        self.seen = [*getattr(self, "seen", []), len(x)]
        return x * self.weight[:, None, None] + self.bias[:, None, None]


@pytest.mark.parametrize("batch_norm", MODES)
def test_sync_batch_norm(batch_norm, monkeypatch):
    model, twin = prepared(pre_activation, batch_norm)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert uses_batch_statistics(model[0]) == (batch_norm != "frozen")
    x, decisions = torch.randn(4, 4, 7, 5).double(), torch.rand(4, 3) < 0.6
    if batch_norm != "kept":
        twin.train(batch_norm == "all")
        assert_same(
            gradients(model, x, inside(model, decisions)), gradients(twin, x, lambda x: masked(twin, x, decisions))
        )
        assert_same_buffers(model, twin)
    for block in model[:3]:
        for norm in (block.bn1, block.bn2):
            norm.__class__ = Meets
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    actual = gradients(model, x, inside(model, torch.zeros(3).bool()))
    # A process that keeps nothing meets the others in forward, and in backward, as its layers are in the graph.
    samples = {"all": [4], "kept": [0], "frozen": []}[batch_norm]
    assert all(getattr(norm, "seen", []) == samples for block in model[:3] for norm in (block.bn1, block.bn2))
    assert all(gradient is not None for gradient in actual.values())
    assert not any(actual[name].any() for name in actual if "conv" in name or "bn" in name)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_sync_batch_norm_of_two_sets_of_weights(layout, monkeypatch):
    model = pre_activation().double().train()
    dynexec.convert(model, fine_tune="nothing", batch_norm="kept")
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    norms = {name: norm for name, norm in model.named_modules() if isinstance(norm, nn.SyncBatchNorm)}
    for norm in norms.values():
        norm.__class__ = Meets
    some, none = torch.tensor([[True], [False], [True], [True]]).expand(-1, 3), torch.zeros(4, 3).bool()
    for decisions in (some, none, ~none, none[:0]):
        x = torch.randn(len(decisions), 4, 7, 5).double().contiguous(memory_format=layout)
        forward = inside(model, decisions)
        alone, strides = gradients(model, x, forward), forward(x).stride()
        for norm in norms.values():
            norm.seen = []
        with monkeypatch.context() as patched:
            patched.setattr(distributed, "is_initialized", lambda: True)
            assert_same(gradients(model, x, forward), alone)
            second = int(decisions[:, 0].sum())
            counts = {name: second if "fine_tuned" in name else len(x) - second for name in norms}
            assert {name: norm.seen for name, norm in norms.items()} == {name: [n] for name, n in counts.items()}
            assert forward(x).stride() == strides


def test_a_shortcut_elsewhere_belongs_to_the_first_set_of_weights():
    model = Blocks(*own()).double().train()
    dynexec.convert(model, fine_tune="nothing")
    x, keep = torch.randn(4, 4, 5, 5).double(), torch.tensor([True, False, True, False])[:, None].expand(-1, 3)
    for block in model[:3]:
        block.eval()  # only the BatchNorm of the shortcut trains: over all samples, as batch_norm="all" says
    counts = []
    model[3].register_forward_pre_hook(lambda shortcut, arguments: counts.append(len(*arguments)))
    inside(model, keep)(x)
    assert counts == [4]
    found = gradients(model.eval(), x, inside(model, torch.ones(3).bool()))
    assert all(gradient is not None for gradient in found.values())  # as DistributedDataParallel needs


def randomised(model):
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def test_recompute_is_update_bn_where_nothing_is_dropped():
    model = randomised(toys.torchvision_style()).double().train()
    twin = copy.deepcopy(model)
    dynexec.convert(model)
    batches = [(toys.images(3, size=9).double(), 0) for _ in range(4)]
    model.layers[0].eval()
    model.stem[1].momentum, model.layers[0][0].bn1.momentum = None, 0.3
    flags = [module.training for module in model.modules()]
    recompute_batch_norm(model, iter(batches))
    update_bn(batches, twin)
    assert_same_buffers(model, twin)
    assert flags == [module.training for module in model.modules()]
    momenta = [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert momenta[:2] == [None, 0.3] and set(momenta[2:]) == {0.1}
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("batch_norm", MODES)
def test_recompute_under_decisions_weighs_with_what_is_kept(batch_norm):
    block = randomised(toys.finish(toys.BasicBlock(4, 4))).double().train()
    conv = copy.deepcopy(block.conv1)
    dynexec.convert(block, batch_norm=batch_norm)
    block.bn1.running_mean.fill_(torch.nan)  # what was there has no part in it
    block.bn1.num_batches_tracked.fill_(7)
    batches = [torch.randn(n, 4, 5, 5).double() for n in (2, 5, 3)]
    keeps = [torch.tensor([[True], [False]]), torch.rand(5, 1) < 2, torch.zeros(3, 1).bool()]
    keeps[1][0] = False
    pairs = list(zip(batches, keeps))
    recompute_batch_norm(block, pairs, forward=lambda pair: inside(block, pair[1])(pair[0]))
    used = [conv(x if batch_norm == "all" else x[keep[:, 0]]).transpose(0, 1).flatten(1) for x, keep in pairs]
    sizes = torch.tensor([y.shape[1] for y in used]).double()
    used, sizes = [y for y in used if y.shape[1]], sizes[sizes > 0]
    for name, buffer in (("mean", block.bn1.running_mean), ("var", block.bn1.running_var)):
        expected = torch.stack([getattr(y, name)(1) for y in used], 1) @ sizes / sizes.sum()
        torch.testing.assert_close(buffer, expected)
    assert block.bn1.num_batches_tracked == len(used)
    assert block.bn1.training == (batch_norm != "frozen")


def test_recompute_where_batch_norm_gets_its_input_by_name():
    class ByName(nn.BatchNorm2d):
        def __call__(self, x):
            return super().__call__(input=x)

    batches = [torch.randn(3, 4, 5, 5), torch.randn(2, 4, 5, 5)]
    model, twin = nn.Sequential(ByName(4)), nn.Sequential(nn.BatchNorm2d(4))
    for net in (model, twin):
        recompute_batch_norm(net, batches)
    assert_same_buffers(model, twin)


def test_recompute_by_the_policy_of_a_network():
    model = toys.torchvision_style()
    num_blocks = dynexec.convert(model).num_blocks
    net = DynamicNetwork(model, toys.Policy(num_blocks)).train()
    other, x = copy.deepcopy(net), toys.images(4)
    recompute_batch_norm(net, [x])
    recompute_batch_norm(other, [x], lambda x: other(x, other.policy(x) >= 0.5))
    assert_same_buffers(net, other)


def test_recompute_restores_what_it_could_not_compute():
    model = toys.torchvision_style().train()
    dynexec.convert(model, batch_norm="kept")
    before = copy.deepcopy(model.state_dict())

    def fails(batch):
        model(batch)
        raise KeyboardInterrupt

    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        recompute_batch_norm(model, [])
    with pytest.raises(KeyboardInterrupt):
        recompute_batch_norm(model, [toys.images(2)], fails)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.layers[0][0].bn1.training and not model.stem[1]._forward_pre_hooks
    recompute_batch_norm(model, [toys.images(2)], inside(model, torch.zeros(5).bool()))
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all("stem" in name or "downsample" in name for name in changed) and "stem.1.running_mean" in changed
    before = copy.deepcopy(model.state_dict())
    recompute_batch_norm(model.eval(), [toys.images(0)])  # batches, but no sample
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "running" in name)
    with pytest.raises(ValueError, match="must have a BatchNorm with running statistics, got a Conv2d with none"):
        recompute_batch_norm(nn.Conv2d(1, 1, 1), [torch.zeros(1, 1, 1, 1)])


def test_names():
    with pytest.raises(ValueError, match="""batch_norm must be "all" or "kept" .samples., or "frozen", got 'none'"""):
        assign_columns(toys.torchvision_style(), batch_norm="none")
