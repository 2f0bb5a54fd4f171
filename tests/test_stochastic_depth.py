"""convert(stochastic_depth=True): existing models give what they gave, from the kept samples alone."""

import copy
import pickle
import re
from pathlib import Path

import drop_path_toys as toys
import pytest
import torch
from drop_path_toys import ALMOST_1, DropPath, ResNetBlock, StochasticDepth, ViTBlock, assert_same, results, set_rates
from torch import fx, nn
from torch.utils.checkpoint import checkpoint_sequential

import dynexec


def converted(name, **options):
    """(converted model, unconverted twin, conversion); BatchNorm in evaluation mode."""
    model = toys.frozen(toys.network(name))
    twin = copy.deepcopy(model)
    return model, twin, dynexec.convert(model, stochastic_depth=True, **options)


def rows_seen(layer):
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize("name", toys.NETWORKS)
def test_equals_the_model_with_the_same_seed(name):
    model, twin, _ = converted(name)
    for n in (0, 1, 2, 5):
        for layout in (torch.contiguous_format, torch.channels_last)[: 1 if name == "vit" else 2]:
            x = toys.batch(name, n).contiguous(memory_format=layout)
            for seed in range(3):
                assert_same(results(model, x, seed), results(twin, x, seed))
    for rate in (0.0, 1e-12, ALMOST_1, 1.0):
        set_rates(model, rate), set_rates(twin, rate)
        assert_same(results(model, x, 0), results(twin, x, 0))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", [name for name in toys.NETWORKS if name != "vit"])
def test_outputs_are_laid_out_as_the_blocks(name, layout):
    # ConvNeXt's branch ends in channels_last, whatever it gets, and what follows is faster in it.
    model, twin, _ = converted(name)
    x = torch.randn(6, 12 if name == "resnet" else 8, 5, 3).double().contiguous(memory_format=layout)
    for rate in (1e-12, 0.3, 0.5):
        set_rates(model, rate), set_rates(twin, rate)
        actual, expected = results(model[-1], x, 0)[0], results(twin[-1], x, 0)[0]
        assert actual.stride() == expected.stride() and not torch.equal(actual, x)


def test_a_shortcut_stays_as_wide_as_it_is_when_its_layout_changes():
    model, outputs, x = toys.network("convnext").float(), [], torch.randn(6, 8, 5, 3)
    model[-1].gamma = None  # which would widen the branch before the addition
    twin = copy.deepcopy(model)
    dynexec.convert(model, stochastic_depth=True)
    for block in (model[-1], twin[-1]):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(block(x))
    assert [int((row != x).any()) for row, x in zip(outputs[0], x)].count(1) in range(1, 6)
    assert outputs[0].dtype == outputs[1].dtype == torch.float32
    torch.testing.assert_close(*outputs, rtol=0.005, atol=0.005)


LAYERS = {
    "vit": ("norm1", "mlp"),
    "convnext": ("conv_dw", "mlp"),
    "resnet": ("conv1", "bn2"),
    "torchvision": ("block",),
}


@pytest.mark.parametrize("name", toys.NETWORKS)
def test_branches_run_on_kept_samples_only(name):
    model, twin, _ = converted(name)
    seen = [rows_seen(getattr(model[-1], layer)) for layer in LAYERS[name]]
    x = toys.batch(name, 6)
    for seed in range(3):
        kept = []
        hooks = [
            module.register_forward_hook(lambda m, args, y: kept.append(int(y.flatten(1).any(1).sum())))  # noqa: B023
            for module in twin[-1].modules()
            if isinstance(module, (DropPath, StochasticDepth))
        ]
        results(twin, x, seed), results(model, x, seed)
        assert [sum(rows) for rows in seen] == (kept if name == "vit" else kept * len(seen))
        for rows in seen:
            rows.clear()
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", toys.NETWORKS)
def test_what_stays_the_same(name):
    model, twin, conversion = converted(name)
    kind, keys = type(twin[-1]), list(twin.state_dict())
    assert isinstance(model[-1], kind) and list(model.state_dict()) == keys
    x = toys.batch(name, 4)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied[-1]) is type(model[-1]) and list(copied.state_dict()) == keys
        assert_same(results(copied, x, 7), results(twin, x, 7))
        seen = rows_seen(getattr(copied[-1], LAYERS[name][0]))
        set_rates(copied, ALMOST_1)
        copied(x)
        assert not seen  # it is still converted
        assert torch.equal(copied.eval()(x), twin.eval()(x))
        assert dynexec.revert(copied) == conversion.num_blocks and type(copied[-1]) is kind
        twin.train()
        toys.frozen(twin)
    assert dynexec.revert(model) == conversion.num_blocks
    assert [vars(block).keys() for block in model] == [vars(block).keys() for block in twin]
    assert_same(results(model, x, 7), results(twin, x, 7))


@pytest.mark.parametrize("name", toys.NETWORKS)
def test_no_gradient_is_lost(name):
    model, _, _ = converted(name)
    set_rates(model, ALMOST_1)
    model(toys.batch(name, 3)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_report():
    model, _, conversion = converted("resnet")
    assert conversion.converted == ((0, "2", "ResNetBlock", ("drop_path",)), (1, "3", "ResNetBlock", ("drop_path",)))
    assert conversion.skipped == () and type(model[1]) is ResNetBlock  # rate 0: it holds no DropPath
    assert str(converted("vit")[2]).splitlines() == [
        "2 blocks converted: they train on the samples that stochastic depth keeps",
        "  2 (ViTBlock): drop_path1, drop_path2",
        "  3 (ViTBlock): drop_path1, drop_path2",
    ]


def test_batch_norm_over_all_samples_is_drop_path():
    model, twin, _ = converted("resnet")
    model.train(), twin.train()
    x = toys.batch("resnet", 5)
    for seed in range(3):
        assert_same(results(model, x, seed), results(twin, x, seed))
        assert_same(model.buffers(), twin.buffers())


def test_batch_norm_over_kept_samples():
    model, twin, _ = converted("resnet", batch_norm="kept")
    block, reference = model[3].train(), twin[3].train()
    x = torch.rand(6, 12, 4, 3).double()
    torch.manual_seed(2)
    keep = torch.empty(6).bernoulli_(0.4).bool().nonzero()[:, 0]
    assert 0 < len(keep) < 6

    def by_hand(x):
        rows = reference.act1(reference.bn1(reference.conv1(x[keep])))
        return torch.relu(x.index_add(0, keep, reference.bn2(reference.conv2(rows)) / 0.4))

    assert_same(results(block, x, 2), results(reference, x, 2, by_hand))
    assert_same(block.buffers(), reference.buffers())


def test_settings_of_the_modules_are_read_when_they_run():
    model, twin, _ = converted("vit")
    x = toys.batch("vit", 5)
    for change in (
        lambda m: setattr(m[2].drop_path1, "scale_by_keep", False),
        lambda m: m[3].drop_path2.eval(),
        lambda m: setattr(m[3], "drop_path1", nn.Identity()),
        lambda m: setattr(m[2], "mlp", nn.Linear(8, 8).double().requires_grad_(False)),
    ):
        torch.manual_seed(0), change(model), torch.manual_seed(0), change(twin)
        for seed in range(3):
            assert_same(results(model, x, seed), results(twin, x, seed))


def test_other_arguments_run_the_block_as_it_was():
    block = ViTBlock(rate=0.5).train()
    twin, mask = copy.deepcopy(block), torch.zeros(7, 7).tril()
    dynexec.convert(block, stochastic_depth=True)
    x, seen = torch.randn(6, 7, 8), rows_seen(block.norm1)
    assert_same(results(block, x, 1, lambda x: block(x, mask)), results(twin, x, 1, lambda x: twin(x, mask)))
    assert_same(results(block, x, 1, lambda x: block(x, attn_mask=mask)), results(twin, x, 1, lambda x: twin(x, mask)))
    assert_same(results(block, x, 1, lambda x: block(x=x)), results(twin, x, 1))
    assert seen == [6, 6, 6]
    for call in (block, lambda x: block(x, None), lambda x: block(x, attn_mask=None)):
        assert_same(results(block, x, 1, call), results(twin, x, 1), 1e-5)
    assert max(seen[3:]) < 6


class Leaves(fx.Tracer):
    def is_leaf_module(self, module, name):
        return True


def test_match_and_arguments():
    convert = dynexec.convert
    model = toys.network("vit")
    assert [row[1] for row in convert(model, ["2", DropPath], stochastic_depth=True).converted] == ["2"]
    for stochastic_depth in (True, False):
        with pytest.raises(ValueError, match="by subsets already: call dynexec.revert"):
            convert(model, stochastic_depth=stochastic_depth)
    dynexec.revert(model)
    assert convert(model, ViTBlock, stochastic_depth=True).num_blocks == 2
    dynexec.revert(model)
    with pytest.raises(ValueError, match="no stochastic depth that fits match='9' to convert"):
        convert(model, "9", stochastic_depth=True)
    with pytest.raises(TypeError, match="stochastic_depth must be True or False, got 0.1"):
        convert(model, stochastic_depth=0.1)
    with pytest.raises(ValueError, match="fine_tune must be None with stochastic_depth=True"):
        convert(model, stochastic_depth=True, fine_tune="all")
    with pytest.raises(ValueError, match='batch_norm must be "all" or "kept" with .* got "frozen"'):
        convert(model, stochastic_depth=True, batch_norm="frozen")
    with pytest.raises(ValueError, match="match must not hold an Adapter"):
        convert(model, dynexec.Adapter(ViTBlock), stochastic_depth=True)
    with pytest.raises(ValueError, match="no stochastic depth to convert"):
        convert(nn.Sequential(ViTBlock(8, 0.0)), stochastic_depth=True)
    resnet = toys.network("resnet")
    convert(resnet)
    with pytest.raises(ValueError, match="obeys decisions already"):
        convert(resnet, stochastic_depth=True)
    with pytest.raises(ValueError, match="a traced or scripted graph has no blocks"):
        convert(fx.GraphModule(model[2], Leaves().trace(model[2], {"attn_mask": None})), stochastic_depth=True)
    patched = ViTBlock(8, 0.5)
    patched.forward = patched.forward
    with pytest.raises(ValueError, match="the model itself .*: its forward is replaced on the object"):
        convert(patched, stochastic_depth=True)
    convert(model, stochastic_depth=True)
    model[2].__class__ = ViTBlock
    model[3].__class__ = type("Other", (type(model[3]),), {})
    with pytest.raises(ValueError, match="a block is a Other since it was converted"):
        dynexec.revert(model)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_activation_checkpointing(name, reentrant):
    model, twin, _ = converted(name)
    x = toys.batch(name, 5)
    for seed in range(3):
        actual = results(model, x, seed, lambda x: checkpoint_sequential(model, 2, x, use_reentrant=reentrant))
        assert_same(actual, results(twin, x, seed))


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_compiled_models_run_as_they_did(name):
    torch._dynamo.reset()
    model, twin, _ = converted(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    reference = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = toys.batch(name, 5)
    assert_same(results(model, x, 4, compiled), results(twin, x, 4, reference))
    assert_same(results(model, x, 4), results(twin, x, 4))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "resnet26d", "efficientnet_b0"])
def test_models_of_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    size = {"img_size": 64} if name.startswith("vit") else {}
    model = toys.frozen(timm.create_model(name, drop_path_rate=0.5, **size).double().train())
    twin = copy.deepcopy(model)
    conversion = dynexec.convert(model, stochastic_depth=True)
    assert conversion.num_blocks and not conversion.skipped
    x = torch.randn(4, 3, 64, 64).double()
    for seed in range(2):
        assert_same(results(model, x, seed), results(twin, x, seed), 1e-7)
    assert torch.equal(model.eval()(x), twin.eval()(x))


def test_code_blocks_of_the_page():
    text = (Path(__file__).parents[1] / "docs" / "stochastic_depth.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(block, names)
