"""Training steps as people write them, through routed blocks: AMP, accumulation, checkpointing, compilation, memory."""

import copy
from contextlib import nullcontext

import pytest
import torch
import toys
from test_training import Own, assert_same, gradients, inside, published_forward
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import converted, decision_patterns

import dynexec
from dynexec.models.blockdrop import BasicBlock, SegmentedResNet
from dynexec.nn import ResidualBlock, assign_columns

SGD = torch.optim.SGD


def images(n, layout=torch.contiguous_format):
    """Of a size that the pooled shortcut halves."""
    return torch.randn(n, 3, 6, 10).contiguous(memory_format=layout)


def network():
    """(network of own blocks, L): identities, and a shortcut by pooling."""
    net = toys.finish(SegmentedResNet(BasicBlock, (3, 3), (4, 8), num_classes=5)).double()
    return net, assign_columns(net)


def own_masked(net, x, weights):
    """Every own block on all samples, multiplied by its mask."""
    x, columns = torch.relu(net.bn1(net.conv1(x))), iter(weights.t())
    for segment in net.blocks:
        for block in segment:
            keep = next(columns).to(x.dtype).reshape(-1, 1, 1, 1)
            shortcut = block.shortcut_layers()[0](x) if block.shortcut_layers() else x
            residual = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
            x = keep * torch.relu(residual + shortcut) + (1 - keep) * shortcut
    return net.fc(x.mean((2, 3)))


@pytest.mark.usefixtures("algorithms")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_own_blocks_equal_the_masked_network(layout, training):
    net, num_blocks = network()
    twin = copy.deepcopy(net.train(training))
    for n in (1, 4):
        x = images(n, layout).double()
        for _, decisions in decision_patterns(n, num_blocks):
            actual = gradients(net, x, inside(net, decisions))
            assert_same(actual, gradients(twin, x, lambda x: own_masked(twin, x, decisions)))  # noqa: B023
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(inside(net, decisions)(x), own_masked(twin.eval(), x, decisions))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_norm", ["all", "frozen"])
@pytest.mark.parametrize("style", toys.STYLES)
def test_autocast(style, batch_norm, dtype):
    """As close to the gradients of full precision as those of the masked network under autocast."""
    model = toys.STYLES[style]()
    twin = copy.deepcopy(model)
    num_blocks = dynexec.convert(model, batch_norm=batch_norm).num_blocks
    model.train()
    for module, other in zip(model.modules(), twin.modules(), strict=True):
        other.training = module.training
    x = toys.images(6, size=9)

    def amp(forward):
        def run(x):
            with torch.autocast("cpu", dtype):
                return forward(x).float()

        return run

    for keep in (0.0, 0.5):
        decisions = torch.rand(6, num_blocks) < keep
        exact = gradients(twin, x, lambda x: published_forward(twin, x, decisions))  # noqa: B023
        expected = gradients(twin, x, amp(lambda x: published_forward(twin, x, decisions)))  # noqa: B023
        actual = gradients(model, x, amp(inside(model, decisions)))
        for name, value in exact.items():
            assert actual[name].dtype == torch.float32
            error, masked_error = ((found[name] - value).norm() for found in (actual, expected))
            assert error <= 1.5 * masked_error + 0.02 * value.norm() + 1e-6, name


def test_grad_scaler():
    net, num_blocks = network()
    net.float().train()
    optimizer, scaler = SGD(net.parameters(), 0.05), torch.amp.GradScaler("cpu", init_scale=2.0**24)
    x, labels, skipped, losses = images(8), torch.arange(8) % 5, 0, []
    decisions = torch.rand(8, num_blocks) < 0.6
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16), dynexec.decide(decisions):
            loss = nn.functional.cross_entropy(net(x), labels)
        before, scale = net.fc.weight.clone(), scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        overflowed = scaler.get_scale() < scale
        skipped += overflowed
        assert overflowed == torch.equal(net.fc.weight, before)
        losses.append(loss.item())
    assert 0 < skipped < 20 and losses[-1] < 0.7 * losses[0]


def test_accumulation_over_several_decides():
    model, twin, num_blocks = converted(dtype=torch.float64)
    parts = [(toys.images(n, size=9).double(), torch.rand(n, num_blocks) < 0.5) for n in (3, 1, 2)]
    for x, decisions in parts:
        inside(model, decisions)(x).square().sum().backward()
    expected = sum(toys.naive_forward(twin, x, decisions).square().sum() for x, decisions in parts)
    expected.backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same(named, {name: parameter.grad for name, parameter in twin.named_parameters()})
    # Backward passes after all forward passes, outside of decide.
    model.zero_grad()
    for loss in [inside(model, decisions)(x).square().sum() for x, decisions in parts]:
        loss.backward()
    assert_same({name: parameter.grad for name, parameter in model.named_parameters()}, named)


@pytest.mark.parametrize("make", [lambda: converted(dtype=torch.float64)[::2], network])
def test_activation_checkpointing(make):
    model, num_blocks = make()
    x, decisions = images(4).double(), torch.rand(4, num_blocks) < 0.5
    decisions[0], decisions[1] = True, False

    def again():
        return nullcontext(), dynexec.decide(decisions)

    def checkpointed(x):
        with dynexec.decide(decisions):
            return checkpoint(model, x, use_reentrant=False, context_fn=again)

    expected = gradients(model, x, inside(model, decisions))
    assert_same(gradients(model, x, checkpointed), expected)

    def inside_of_it(x):
        with dynexec.decide(decisions):
            return model(x)

    for reentrant in (False, True):
        within = gradients(model, x, lambda x: checkpoint(inside_of_it, x, use_reentrant=reentrant))  # noqa: B023
        assert_same(within, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fine_tune", [None, "convolutions"])
def test_checkpointing_that_forgets_the_decisions(fine_tune, reentrant):
    """Everything kept, or one block dropped by all: all shapes are what they were, and PyTorch notices nothing."""
    model = toys.finish(toys.Network(4, [[toys.BasicBlock(4, 4) for _ in range(3)]], 4)).double()
    dynexec.convert(model, fine_tune=fine_tune)
    x = images(2).double().requires_grad_()
    for decisions in (torch.tensor([True, False, True]), torch.ones(3, dtype=torch.bool)):
        with dynexec.decide(decisions):
            output = checkpoint(model, x, use_reentrant=reentrant)
        if not reentrant:  # whatever runs in between
            model(x), copy.deepcopy(model)(x)
        with pytest.raises(RuntimeError, match="without the decisions" if reentrant else "different (number|metadata)"):
            output.sum().backward()
        # Of a dense forward nothing is missing, whatever came before.
        expected = torch.autograd.grad(model(x).sum(), x)[0]
        x.grad = None
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
        torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("fine_tune", [None, "convolutions"])
def test_dense_checkpoints_beside_routed_ones(fine_tune):
    """A dense teacher and a routed student of one network, an evaluation between, and a block without a column."""
    model = toys.finish(toys.Network(4, [[toys.BasicBlock(4, 4) for _ in range(3)]], 4)).double()
    dynexec.convert(model, fine_tune=fine_tune)
    x, decisions = images(2).double().requires_grad_(), torch.tensor([True, False, True])
    other = toys.finish(nn.Sequential(nn.Conv2d(3, 4, 1), Own())).double()

    def both(run):
        teacher = run(model, nullcontext)
        with dynexec.decide(decisions):
            student = run(model, lambda: dynexec.decide(decisions))
            alone = run(other, nullcontext)
        with torch.no_grad(), dynexec.decide(decisions):
            model(x)
        return torch.autograd.grad((teacher * student).sum() + alone.sum(), x, retain_graph=True)[0]

    def checkpointed(module, again):
        return checkpoint(module, x, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))

    torch.testing.assert_close(both(checkpointed), both(lambda module, _: module(x)))


def test_compiled_step():
    net, num_blocks = network()
    net.train()
    other = copy.deepcopy(net)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    pairs = [(compiled, SGD(net.parameters(), 0.05, 0.9)), (other, SGD(other.parameters(), 0.05, 0.9))]
    for _ in range(3):
        x, decisions = images(4).double(), torch.rand(4, num_blocks) < 0.5
        for model, optimizer in pairs:
            optimizer.zero_grad()
            with dynexec.decide(decisions, mode="capacity" if model is compiled else "exact"):
                loss = model(x).square().sum()
            loss.backward()
            optimizer.step()
    for (name, actual), expected in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8, msg=name)
    torch._dynamo.reset()


def test_one_block_in_two_places():
    block = toys.finish(Own()).double()
    model = nn.Sequential(block, nn.ReLU(), block)
    assert assign_columns(model) == 1
    x = torch.randn(4, 4, 5, 5).double()
    for kept in ([], [1, 3], [0, 1, 2, 3]):
        keep = torch.zeros(4, 1, dtype=torch.bool)
        keep[kept] = True

        def masked(x):
            for _ in range(2):
                x = torch.relu(torch.where(keep[:, :, None, None], torch.relu(block.conv(x) + x), x))  # noqa: B023
            return x

        run = inside(model, keep)
        assert_same(gradients(model, x, lambda x: torch.relu(run(x))), gradients(model, x, masked))  # noqa: B023


def test_layers_shared_between_blocks():
    model = toys.finish(nn.Sequential(toys.BasicBlock(4, 4), toys.BasicBlock(4, 4))).double()
    model[1].conv2, model[1].bn1 = model[0].conv2, model[0].bn1
    twin = copy.deepcopy(model)
    assert dynexec.convert(model).num_blocks == 2
    x = torch.randn(4, 4, 5, 5).double()
    for _, decisions in decision_patterns(4, 2):

        def naive(x):
            for block, keep in zip(twin, decisions.t()):  # noqa: B023
                x = torch.where(keep.reshape(-1, 1, 1, 1), block(x), x)
            return x

        assert_same(gradients(model, x, inside(model, decisions)), gradients(twin, x, naive))


def test_decisions_that_require_grad():
    model, _, num_blocks = converted()
    weights = torch.rand(2, num_blocks, requires_grad=True)
    for mode in ("exact", "capacity"):
        with pytest.raises(TypeError, match='must be bool .*bool decisions pass no gradient on.*mode="soft"'):
            dynexec.decide(weights, mode=mode)
    with dynexec.decide(weights, mode="soft"):
        model(toys.images(2, size=9)).sum().backward()
    assert weights.grad.all()


@pytest.mark.parametrize("batch_norm", ["all", "kept", "frozen"])
def test_a_policy_that_keeps_nothing(batch_norm):
    model = toys.timm_style()
    num_blocks = dynexec.convert(model, batch_norm=batch_norm).num_blocks
    model.train()
    optimizer = SGD(model.parameters(), 0.1, 0.9, weight_decay=0.1)
    inside(model, torch.zeros(3, num_blocks).bool())(toys.images(3, size=9)).sum().backward()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert all(parameter.grad is not None for parameter in model.parameters())
    for block in (block for stage in model.layers for block in stage):
        assert not block.conv1.weight.grad.any() and not block.bn3.weight.grad.any()
    optimizer.step()  # weight decay goes on, as in the masked network
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.usefixtures("algorithms")
@pytest.mark.parametrize("make", [lambda: converted("timm")[::2], network])
def test_backward_gives_the_same_bits_twice(make):
    model, num_blocks = make()
    x, decisions = images(5).to(next(model.parameters()).dtype), torch.rand(5, num_blocks) < 0.5
    first = gradients(model.train(), x, inside(model, decisions))
    first = {name: gradient.clone() for name, gradient in first.items()}
    for name, gradient in gradients(model, x, inside(model, decisions)).items():
        assert torch.equal(gradient, first[name]), name


def saved_bytes(model, x):
    """Bytes that autograd keeps for the backward pass of ``model(x)``: each storage once, parameters not."""
    storages, own = {}, {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that its address is not given away again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


def many_blocks():
    return SegmentedResNet(BasicBlock, (16,), (4,), num_classes=5)


def many_converted():
    return toys.Network(4, [[toys.BasicBlock(4, 4) for _ in range(16)]], 4)


@pytest.mark.parametrize("batch_norm", ["kept", "frozen"])
@pytest.mark.parametrize("make, most", [(many_blocks, 0.30), (many_converted, 0.345)])
def test_saved_activations_shrink(make, most, batch_norm):
    model = make()
    if make is many_blocks:
        assign_columns(model, batch_norm=batch_norm)
    else:
        dynexec.convert(model, batch_norm=batch_norm)
    model.train()
    x = toys.images(16, size=16)
    dense = saved_bytes(model, x)
    decisions = torch.stack([torch.randperm(16) < 4 for _ in range(16)], 1)
    with dynexec.decide(decisions):
        assert saved_bytes(model, x) <= most * dense
    with dynexec.decide(decisions.float(), mode="soft"):
        if batch_norm == "frozen":
            assert saved_bytes(model, x) >= dense  # what masking costs


@pytest.mark.parametrize("make", [many_blocks, many_converted])
def test_statistics_of_all_samples_cost_no_memory(make):
    """Beyond a byte per element of the kept rows; what masking keeps is a whole activation more."""
    model = make()
    if make is many_blocks:
        assign_columns(model)
    else:
        dynexec.convert(model)
    model.train()
    x = toys.images(16, size=16)
    dense = saved_bytes(model, x)
    decisions = torch.stack([torch.randperm(16) < 4 for _ in range(16)], 1)
    with dynexec.decide(decisions):
        assert saved_bytes(model, x) <= 1.03 * dense
    with dynexec.decide(decisions, mode="capacity"):
        assert saved_bytes(model, x) >= 1.15 * dense


def test_what_follows_a_block_may_overwrite_its_output():
    """And a gradient may come as an expanded tensor; both for a kept, a dropped and a projected block."""
    net, num_blocks = network()
    blocks = [net.blocks[0][0], net.blocks[1][0]]
    x = torch.randn(4, 4, 6, 6).double()
    for block in blocks:
        for kept in ([], [0, 2]):
            decisions = torch.zeros(4, num_blocks, dtype=torch.bool)
            decisions[kept] = True
            expected = gradients(block, x, lambda x: inside(block, decisions)(x).clone().mul(0.5).tanh())  # noqa: B023
            assert_same(gradients(block, x, lambda x: inside(block, decisions)(x).mul_(0.5).tanh_()), expected)  # noqa: B023
            ones = x.clone().requires_grad_()
            inside(block, decisions)(ones).sum().backward()
            other = x.clone().requires_grad_()
            y = inside(block, decisions)(other)
            y.backward(torch.ones_like(y))
            assert torch.equal(ones.grad, other.grad)


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(x.detach()) + x.detach()


def test_a_branch_that_stops_the_gradient_and_an_input_that_is_overwritten():
    block = Detached()
    dynexec.convert(block, dynexec.Adapter(Detached))
    keep = torch.tensor([[True], [False], [True]])
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    h = x * 1
    y = inside(block, keep)(h)
    h.mul_(2)  # after the block has read it
    y.sum().backward()
    assert torch.equal(x.grad, (~keep).float()[:, :, None, None].expand_as(x)) and block.conv.weight.grad.any()


class Plain(ResidualBlock):
    def __init__(self, activation=torch.relu):
        super().__init__()
        self.conv, self.activation = nn.Conv2d(3, 3, 3, padding=1), activation

    def residual_layers(self):
        return [self.conv, torch.tanh]

    def activation_layer(self):
        return self.activation


@pytest.mark.usefixtures("algorithms")
@pytest.mark.parametrize("activation", [None, torch.relu, torch.tanh])
def test_gradcheck_of_an_identity_block(activation):
    block = Plain(activation).double()
    assign_columns(block)
    x = torch.randn(3, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = block.conv.weight.detach().clone().requires_grad_()
    for keep in ([0, 0, 0], [1, 0, 1], [1, 1, 1]):

        def run(x, weight):
            with dynexec.decide(torch.tensor(keep)[:, None].bool()):  # noqa: B023
                return torch.func.functional_call(block, {"conv.weight": weight}, (x,))

        assert torch.autograd.gradcheck(run, (x, weight))
        assert torch.autograd.gradcheck(run, (x, weight), check_forward_ad=True, check_backward_ad=False)
        y, pull = torch.func.vjp(run, x.detach(), weight.detach())
        for actual, expected in zip(pull(y), torch.autograd.grad(run(x, weight), (x, weight), y), strict=True):
            torch.testing.assert_close(actual, expected)
        assert torch.autograd.gradgradcheck(run, (x, weight))
