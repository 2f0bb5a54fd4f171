"""Models of torchvision, timm and efficientnet-lite, where those packages are installed."""

import copy
import pickle

import pytest
import torch
import toys
from torch import nn

import dynexec
from dynexec.nn.residual import apply_layers

MODELS = {
    "torchvision": {
        "resnet18": "iipipipi",
        "regnet_y_400mf": "ppiipiiiiipiiiii",
        "mobilenet_v2": "i" * 10,
        "efficientnet_b0": "i" * 9,
        "convnext_tiny": "i" * 18,
    },
    "timm": {
        "resnet26d": "pipipipi",
        "seresnet18": "iipipipi",
        "gcresnet50t": "piipiiipiiiiipii",
        "mobilenetv3_small_100": "i" * 6,
    },
    "efficientnet_lite_pytorch": {"efficientnet-lite0": "i" * 9},
}


def create(package, name):
    library = pytest.importorskip(package)
    torch.manual_seed(0)
    if package == "efficientnet_lite_pytorch":
        return toys.finish(library.EfficientNet.from_name(name))
    return toys.finish(library.models.get_model(name) if package == "torchvision" else library.create_model(name))


def naive_forward(model, twin, names, x, decisions):
    """The unconverted twin, sample by sample, its dropped blocks replaced by their shortcuts."""
    outputs = []
    for sample, keep in zip(x.split(1), decisions.tolist(), strict=True):
        handles = []
        for name in (name for name, kept in zip(names, keep, strict=True) if not kept):
            block, shortcut = twin.get_submodule(name), model.get_submodule(name).shortcut_layers()
            inputs = []
            handles += [
                block.register_forward_pre_hook(lambda m, args, inputs=inputs: inputs.append(args[0].clone())),
                block.register_forward_hook(lambda m, a, o, i=inputs, s=shortcut: apply_layers(s, i.pop())),
            ]
        outputs.append(twin(sample))
        for handle in handles:
            handle.remove()
    return torch.cat(outputs)


@pytest.mark.parametrize("package, name", [(package, name) for package, names in MODELS.items() for name in names])
def test_convert_decide_train_revert(package, name):
    model = create(package, name)
    twin = copy.deepcopy(model)
    x = torch.randn(3, 3, 64, 64)
    conversion = dynexec.convert(model)
    names, num_blocks = [row[1] for row in conversion.converted], conversion.num_blocks
    assert "".join(row[3][0] for row in conversion.converted) == MODELS[package][name]
    decisions = torch.rand(3, num_blocks) < 0.5
    with torch.no_grad():
        dense = twin(x)
        assert torch.equal(model(x), dense)
        expected = naive_forward(model, twin, names, x, decisions)
        for mode in ("exact", "capacity"):
            with dynexec.decide(decisions, mode=mode):
                torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
        with dynexec.decide(decisions):
            assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    model.train()
    with dynexec.decide(decisions):
        model(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    dynexec.revert(model)
    model.load_state_dict(twin.state_dict())
    assert type(model.get_submodule(names[0])) is type(twin.get_submodule(names[0]))
    with torch.no_grad():
        assert torch.equal(model.eval()(x), dense)


def test_quantized_models_have_nothing_to_convert():
    quantization = pytest.importorskip("torchvision.models.quantization")
    with pytest.raises(ValueError, match="no residual block"):
        dynexec.convert(quantization.resnet18(quantize=True))


def test_timm_checkpointing():
    model = create("timm", "resnet26d")
    num_blocks = dynexec.convert(model).num_blocks
    decisions = torch.rand(3, num_blocks) < 0.5
    x = torch.randn(3, 3, 64, 64)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        with dynexec.decide(decisions):
            model(x).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)
