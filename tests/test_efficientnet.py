"""EfficientNets: the published arithmetic, padding made for the nominal size, and that they can be frozen."""

import pytest
import torch
import torch.nn.functional as F
from official_keys import expand
from torch import nn
from toys import finish

from dynexec.models.efficientnet import EfficientNet, MBConv, same_padding

#: Zeros before and after, of the stem and the four blocks that stride.
PADDING = {
    ("b0", "layer"): [(0, 1), (0, 1), (1, 2), (0, 1), (1, 2)],
    ("b1", "layer"): [(0, 1), (0, 1), (1, 2), (0, 1), (2, 2)],
    ("b2", "layer"): [(0, 1), (0, 1), (2, 2), (1, 1), (2, 2)],
    ("b3", "layer"): [(0, 1), (0, 1), (2, 2), (0, 1), (2, 2)],
    ("b0", "image"): [(0, 1), (0, 1), (1, 2), (0, 1), (1, 2)],
    ("b1", "image"): [(0, 1), (0, 1), (1, 2), (0, 1), (1, 2)],
    ("b3", "image"): [(0, 1), (0, 1), (1, 2), (0, 1), (1, 2)],
}


def reference(state, images, padding):
    """The network from its parameters, layer by layer."""

    def conv(x, name, stride=1, pad=(0, 0)):
        weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
        groups = x.shape[1] if weight.shape[1] == 1 else 1
        return F.conv2d(F.pad(x, pad * 2), weight, bias, stride, groups=groups)

    def norm(x, name):
        mean, variance, weight, bias = (
            state[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-3).sqrt() * weight + bias

    def swish(x):
        return x * torch.sigmoid(x)

    padding = iter(padding)
    x = swish(norm(conv(images, "_conv_stem", 2, next(padding)), "_bn0"))
    number, stage = 0, {}
    while f"_blocks.{number}._bn1.weight" in state:
        block = f"_blocks.{number}"
        y = x
        if f"{block}._expand_conv.weight" in state:
            y = swish(norm(conv(x, f"{block}._expand_conv"), f"{block}._bn0"))
        kernel = state[f"{block}._depthwise_conv.weight"].shape[-1]
        channels = state[f"{block}._project_conv.weight"].shape[0]
        first = channels not in stage
        strides = first and len(stage) in (1, 2, 3, 5)
        stage[channels] = True
        pad = next(padding) if strides else (kernel // 2, kernel // 2)
        y = swish(norm(conv(y, f"{block}._depthwise_conv", 2 if strides else 1, pad), f"{block}._bn1"))
        squeezed = swish(conv(y.mean((2, 3), keepdim=True), f"{block}._se_reduce"))
        y = y * torch.sigmoid(conv(squeezed, f"{block}._se_expand"))
        y = norm(conv(y, f"{block}._project_conv"), f"{block}._bn2")
        x = y if first else x + y
        number += 1
    return swish(norm(conv(x, "_conv_head"), "_bn1")).mean((2, 3))


def build(variant, padding_by="layer"):
    net = finish(EfficientNet(variant, padding_by=padding_by))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):  # as large as it takes for the images to matter at the end
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias)
    return net


def relative(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("variant", "padding_by"), PADDING)
def test_output_is_that_of_the_layers(variant, padding_by):
    net = build(variant, padding_by)
    state, padding = net.state_dict(), PADDING[variant, padding_by]
    with torch.no_grad():
        for size in (33, 48):
            images = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
            assert relative(net(images), reference(state, images, padding)) < 1e-5
        shifted = [(before, after) if before == after else (after, before) for before, after in padding]
        assert relative(net(images), reference(state, images, shifted)) > 1e-3  # else padding would not be tested


def test_the_two_ways_to_pad_differ_where_documented():
    images = torch.randn(2, 3, 64, 64)
    for variant, differs in (("b0", False), ("b1", True), ("b3", True)):
        by_layer, by_image = build(variant), EfficientNet(variant, padding_by="image").eval()
        by_image.load_state_dict(by_layer.state_dict())
        with torch.no_grad():
            assert (relative(by_image(images), by_layer(images)) > 1e-4) == differs


@pytest.mark.parametrize("size", [1, 2, 7, 15, 64, 75])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_same_padding(size, kernel, stride):
    before, after = same_padding(size, kernel, stride)
    assert (size + before + after - kernel) // stride + 1 == -(-size // stride)
    assert 0 <= after - before <= 1


def test_names_are_those_of_the_package():
    names = set()
    statistics = "{weight,bias,running_mean,running_var,num_batches_tracked}"
    for pattern in (
        "{_conv_stem,_conv_head}.weight",
        f"{{_bn0,_bn1}}.{statistics}",
        f"_blocks.{{0..15}}.{{_bn1,_bn2}}.{statistics}",
        f"_blocks.{{1..15}}._bn0.{statistics}",
        "_blocks.{1..15}._expand_conv.weight",
        "_blocks.{0..15}.{_depthwise_conv,_project_conv}.weight",
        "_blocks.{0..15}.{_se_reduce,_se_expand}.{weight,bias}",
    ):
        names |= set(expand(pattern))
    with torch.device("meta"):
        assert set(EfficientNet("b0").state_dict()) == names
        sizes = {variant: EfficientNet(variant) for variant in ("b0", "b1", "b2", "b3")}
    assert [net.num_features for net in sizes.values()] == [1280, 1280, 1408, 1536]
    assert [len(net._blocks) for net in sizes.values()] == [16, 23, 23, 26]


def test_stochastic_depth_in_training_only():
    block = finish(MBConv(8, 8, 3, 1, 6, 32, drop=0.5))
    x = torch.randn(64, 8, 9, 9)
    with torch.no_grad():
        residual = block(x) - x
        for module in block.modules():
            module.training = not isinstance(module, nn.BatchNorm2d)
        lost = (block(x) == x).flatten(1).all(1)
        assert 16 < lost.sum() < 48
        kept = block(x) - x
        kept = kept[(kept != 0).flatten(1).any(1)]
        assert len(kept) and all(any(torch.allclose(row, 2 * other, atol=1e-4) for other in residual) for row in kept)
    rates = [block.drop for block in EfficientNet("b0")._blocks]
    assert rates == pytest.approx([0.2 * number / 16 for number in range(16)])


def test_gradients_reach_all_parameters():
    net = build("b0").train()
    net(torch.randn(4, 3, 33, 33)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_other_channels_and_errors():
    assert EfficientNet("b0", in_channels=1).eval()(torch.randn(1, 1, 32, 32)).shape == (1, 1280)
    with pytest.raises(ValueError, match="variant must be one of b0, b1, b2, b3, got 'b4'"):
        EfficientNet("b4")
    with pytest.raises(ValueError, match="padding_by must be 'layer' or 'image', got 'size'"):
        EfficientNet("b0", padding_by="size")
