"""A converted model is the model it was: values, hooks, copies, files; and revert gives it back."""

import copy
import io
import pickle

import odd_blocks
import pytest
import torch
import toys
from odd_blocks import shallow
from torch import nn
from torch.nn.utils import parametrize
from toys import run

import dynexec
from dynexec.nn import DynamicNetwork, assign_columns, dynamic_blocks

KEEP = torch.tensor([[True], [False], [True], [False]])


@pytest.mark.parametrize("style", toys.STYLES)
def test_outside_decide_nothing_changes(style):
    model = toys.STYLES[style]()
    original = copy.deepcopy(model)
    x = toys.images(3)
    expected = model(x)
    classes = [type(module) for module in model.modules()]
    dynexec.convert(model)
    assert torch.equal(model(x), expected)
    state, expected_state = model.state_dict(), original.state_dict()
    assert list(state) == list(expected_state)
    assert all(torch.equal(state[key], expected_state[key]) for key in state)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in original.named_modules()]
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), classes, strict=True))
    num_blocks = len(dynamic_blocks(model))
    run(model, x, torch.zeros(3, num_blocks, dtype=torch.bool))
    assert torch.equal(model(x), expected)
    assert dynexec.revert(model) == num_blocks
    assert [type(module) for module in model.modules()] == classes
    assert [sorted(vars(m)) for m in model.modules()] == [sorted(vars(m)) for m in original.modules()]
    assert torch.equal(model(x), expected)
    assert dynexec.revert(model) == 0
    assert dynexec.convert(model).num_blocks == num_blocks


def test_training_mode_and_attributes_are_left_alone():
    model = toys.torchvision_style()
    model.layers[0][0].train()
    model.layers[1][0].bn1.train()
    modes = [module.training for module in model.modules()]
    dynexec.convert(model)
    assert [module.training for module in model.modules()] == modes


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle protocol 2": lambda model: pickle.loads(pickle.dumps(model, protocol=2)),
    "torch.save": saved,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("style", toys.STYLES)
def test_copies_obey_decisions(style, way):
    model = toys.STYLES[style]()
    num_blocks = dynexec.convert(model).num_blocks
    x, decisions = toys.images(4), torch.rand(4, num_blocks) < 0.5
    expected = run(model, x, decisions)
    copied = COPIES[way](model)
    assert torch.equal(run(copied, x, decisions), expected)
    assert copied.layers[0][0].conv1 is not model.layers[0][0].conv1 if style != "mobilenet" else True
    assert dynexec.revert(copied) == num_blocks
    assert type(copied.layers[0][0]) is type(toys.STYLES[style]().layers[0][0])
    assert torch.equal(copied(x), model(x))
    assert torch.equal(run(model, x, decisions), expected)  # the copy's revert is the copy's alone


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", ["OwnState", "OwnReduce", "OwnDeepcopy", "OwnNew", "Slots", "PooledProjection"])
def test_blocks_that_copy_themselves(kind, way):
    kind = getattr(odd_blocks, kind)
    model = toys.finish(shallow(kind(4) if kind is odd_blocks.OwnNew else kind()))
    dynexec.convert(model)
    copied = COPIES[way](model)
    x, keep = torch.randn(4, 3, 5, 5), KEEP
    assert isinstance(copied[1], kind)
    assert torch.equal(run(copied, x, keep), run(model, x, keep))
    assert dynexec.revert(copied) == 1
    assert type(copied[1]) is kind
    assert torch.equal(copied(x), model(x))


def test_the_policy_of_a_network_is_not_converted():
    model, images = toys.torchvision_style(), toys.images(3)
    dynexec.convert(model)
    net = DynamicNetwork(model, nn.Sequential(toys.torchvision_style(), nn.Sigmoid())).eval()
    expected = net(images)
    assert dynexec.revert(net) == 5
    conversion = dynexec.convert(net)
    assert [row[1].split(".")[0] for row in conversion.converted] == ["backbone"] * 5
    assert torch.equal(net(images), expected)
    dynexec.revert(net)
    assert dynexec.convert(net.policy).num_blocks == 5
    dynexec.revert(net)
    dynexec.convert(model)
    shared = DynamicNetwork(model, model)
    dynexec.revert(shared)
    assert dynexec.convert(shared).num_blocks == 5  # blocks of the backbone too


def test_columns_assigned_anew_are_still_undone():
    model = toys.torchvision_style()
    dynexec.convert(model)
    assign_columns(model)
    assert dynexec.revert(model) == 5 and not dynamic_blocks(model)


def test_only_a_module_can_be_reverted():
    with pytest.raises(TypeError, match="model must be an nn.Module, got NoneType"):
        dynexec.revert(None)


def test_state_dict_moves_between_converted_and_not(tmp_path):
    model, other = toys.timm_style(), toys.finish(toys.timm_style(), seed=1)
    dynexec.convert(model)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    x = toys.images(2)
    assert torch.equal(other(x), model(x))
    model.load_state_dict(other.state_dict())


def test_hooks_on_blocks_and_inside_them():
    model = toys.timm_style()
    blocks = [block for stage in model.layers for block in stage]
    calls = []

    def record(name):
        return lambda module, *arguments: calls.append((name, arguments[-1]))

    before = blocks[1].register_forward_hook(record("block"))
    blocks[0].register_forward_hook(record("projection"))
    blocks[0].downsample.register_forward_hook(record("downsample"))
    blocks[0].act3.register_forward_hook(record("activation"))
    blocks[1].conv1.register_forward_hook(record("layer"))
    dynexec.convert(model)
    assert not calls  # reading the structure runs no hook
    blocks[1].register_forward_pre_hook(record("before"))
    blocks[1].register_full_backward_hook(record("backward"))
    blocks[1].conv1.register_full_backward_hook(record("layer backward"))
    decisions = torch.ones(4, 6, dtype=torch.bool)
    decisions[:2, :2] = False
    x = toys.images(4).requires_grad_()
    with dynexec.decide(decisions):
        model(x).sum().backward()
    names = [name for name, _ in calls]
    assert names == [
        "downsample",
        "activation",
        "projection",
        "before",
        "layer",
        "block",
        "layer backward",
        "backward",
    ]
    sizes = {name: (value[0] if isinstance(value, tuple) else value).shape[0] for name, value in calls}
    assert [sizes[name] for name in ("downsample", "activation", "layer", "layer backward")] == [4, 2, 2, 2]
    assert [sizes[name] for name in ("projection", "before", "block", "backward")] == [4, 4, 4, 4]
    before.remove()
    dynexec.revert(model)
    calls.clear()
    model(x)
    assert [name for name, _ in calls] == ["downsample", "activation", "projection", "before", "layer"]


def test_a_hook_may_replace_what_a_block_gives():
    model = toys.torchvision_style()
    dynexec.convert(model)
    x = toys.images(2)
    model.layers[1][2].register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    none = torch.zeros(2, 5, dtype=torch.bool)
    assert torch.equal(run(model, x, none), model.head.bias.expand(2, -1))


def test_parametrized_layers_and_blocks():
    model = toys.torchvision_style()
    parametrize.register_parametrization(model.layers[0][0].conv1, "weight", nn.Tanh())
    scale = nn.Sequential(odd_blocks.LayerScale()).eval()
    parametrize.register_parametrization(scale[0], "gamma", nn.Tanh())
    for net, x, num_blocks in ((model, toys.images(2), 5), (scale, torch.randn(2, 4, 5, 5), 1)):
        dense = net(x)
        kind = type(net.layers[0][0] if net is model else net[0])
        assert dynexec.convert(net).num_blocks == num_blocks
        assert torch.equal(run(net, x, torch.ones(2, num_blocks).bool()), dense)
        assert torch.equal(run(copy.deepcopy(net), x, torch.ones(2, num_blocks).bool()), dense)
        dynexec.revert(net)
        assert type(net.layers[0][0] if net is model else net[0]) is kind
    dynexec.convert(scale)
    parametrize.register_parametrization(scale[0].conv, "weight", nn.Tanh())
    dynexec.revert(scale)
    parametrize.remove_parametrizations(scale[0], "gamma")
    dynexec.convert(scale)
    parametrize.register_parametrization(scale[0], "gamma", nn.Tanh())
    with pytest.raises(ValueError, match="is a ParametrizedDynamicLayerScale since it was converted: undo that"):
        dynexec.revert(scale)
    parametrize.remove_parametrizations(scale[0], "gamma")
    assert dynexec.revert(scale) == 1


def test_meta_model_can_be_converted_and_filled_later():
    with torch.device("meta"):
        model = toys.torchvision_style()
    dynexec.convert(model)
    x = torch.empty(2, 3, 9, 9, device="meta")
    assert run(model, x, torch.empty(2, 5, dtype=torch.bool, device="meta")).shape == (2, 5)
    source = toys.torchvision_style()
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = toys.images(2)
    assert torch.equal(model.eval()(x), source(x))
