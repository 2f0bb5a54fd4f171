"""BlockDrop networks: structure, what a dropped block computes, the policy."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from official_keys import official_shapes
from torch import nn
from toys import finish

import dynexec
from dynexec import models
from dynexec.models.blockdrop import Bottleneck, SegmentedResNet
from dynexec.nn import dynamic_blocks

KEEPS = [0.0, 0.4, 1.0]


def cifar_type():
    """Pooling shortcuts, and an identity in the first segment; 5 blocks, 16x16 images."""
    net = models.blockdrop_resnet((2, 1, 2), (4, 8, 16), policy_widths=(4, 4, 4), num_classes=5)
    return finish(net), (3, 16, 16)


def imagenet_type():
    """Bottlenecks, convolutional shortcuts in every segment; 5 blocks, images of an odd size."""
    net = models.blockdrop_resnet((2, 1, 2), (4, 8, 16), block=Bottleneck, large_images=True, num_classes=5)
    return finish(net), (3, 74, 58)


def masked_forward(backbone, images, decisions, *, relu_when_dropped=False):
    """The published arithmetic, written down block by block: compute everything, multiply by the mask."""
    pooled = isinstance(backbone.stem_pool, nn.MaxPool2d)
    x = F.relu(backbone.bn1(backbone.conv1(images)))
    x = F.max_pool2d(x, 3, 2, 1) if pooled else x
    column = 0
    for segment, shortcut in zip(backbone.blocks, backbone.ds):
        for number, block in enumerate(segment):
            residual = x if number else shortcut(x)
            h = x
            for i in range(1, 4 if hasattr(block, "conv3") else 3):
                h = F.relu(h) if i > 1 else h
                h = getattr(block, f"bn{i}")(getattr(block, f"conv{i}")(h))
            keep = decisions[:, column].to(x.dtype)[:, None, None, None]
            dropped = F.relu(residual) if relu_when_dropped else residual
            x = F.relu(residual + h) * keep + dropped * (1 - keep)
            column += 1
    return backbone.fc(x.mean((2, 3)))


NUM_BLOCKS = {
    "blockdrop_resnet101_imagenet": 33,
    "blockdrop_resnet110_cifar10": 54,
    "blockdrop_resnet110_cifar100": 54,
    "blockdrop_resnet32_cifar10": 15,
    "blockdrop_resnet32_cifar100": 15,
}


def test_list_models():
    assert [name for name in models.list_models() if name.startswith("blockdrop")] == list(NUM_BLOCKS)


@pytest.mark.parametrize("name", NUM_BLOCKS)
def test_parameters_are_those_of_the_published_checkpoints(name):
    with torch.device("meta"):
        net = models.create_model(name)
    assert net.num_blocks == NUM_BLOCKS[name]
    section = name.removeprefix("blockdrop_").replace("cifar100", "cifar10")
    for part in ("backbone", "policy"):
        expected = official_shapes(f"{section} {part}")
        if part == "backbone" and name.endswith("cifar100"):
            expected |= {"fc.weight": (100, 64), "fc.bias": (100,)}
        assert {key: tuple(value.shape) for key, value in getattr(net, part).state_dict().items()} == expected


def test_create_model_overrides_and_errors():
    net = models.create_model("blockdrop_resnet32_cifar10", num_classes=7, in_channels=1)
    assert net(torch.rand(2, 1, 32, 32)).shape == (2, 7)
    with pytest.raises(ValueError, match="name must be one of adamml.*got 'resnet'"):
        models.create_model("resnet")


@pytest.mark.parametrize("make", [cifar_type, imagenet_type])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", ["exact", "capacity"])
def test_output_is_that_of_the_masked_network(make, keep, layout, mode):
    net, shape = make()
    images = torch.randn(6, *shape).contiguous(memory_format=layout)
    decisions = torch.rand(6, 5) < keep
    with torch.no_grad():
        expected = masked_forward(net.backbone, images, decisions)
        actual = net(images, decisions, mode=mode)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_dropped_first_block_gets_no_relu():
    """On ImageNet-type networks only; on CIFAR-type ones the shortcut's input is never negative."""
    for make, differs in ((imagenet_type, True), (cifar_type, False)):
        net, shape = make()
        images, decisions = torch.randn(4, *shape), torch.zeros(4, 5, dtype=torch.bool)
        with torch.no_grad():
            clipped = masked_forward(net.backbone, images, decisions, relu_when_dropped=True)
            assert bool((net(images, decisions) - clipped).abs().max() > 1e-2) == differs


@pytest.mark.parametrize("make", [cifar_type, imagenet_type])
def test_all_blocks_on_is_the_plain_network(make):
    net, shape = make()
    images = torch.randn(3, *shape)
    assert torch.equal(net(images, torch.ones(5, dtype=torch.bool)), net.backbone(images))


@pytest.mark.parametrize("make", [cifar_type, imagenet_type])
@pytest.mark.parametrize("samples", [0, 1])
def test_small_batches(make, samples):
    net, shape = make()
    images, decisions = torch.randn(samples, *shape), torch.tensor([True, False, False, True, True])
    output = net(images, decisions)
    assert output.shape == (samples, 5)
    torch.testing.assert_close(output, masked_forward(net.backbone, images, decisions.expand(samples, 5)))
    torch.testing.assert_close(net(images, decisions.expand(samples, 5)), output)
    assert net(images).shape == (samples, 5)


def test_the_policy_decides_by_threshold():
    net, shape = cifar_type()
    images = torch.randn(9, *shape)
    probabilities = net.policy(images)
    assert probabilities.shape == (9, 5) and bool(((0 < probabilities) & (probabilities < 1)).all())
    with torch.no_grad():
        net.policy.logit.bias -= probabilities.logit().mean(0)  # decisions of both kinds in every column
    decisions = net.policy(images) >= 0.5
    assert 0 < decisions.sum() < decisions.numel()
    output, taken = net(images, return_decisions=True)
    assert torch.equal(taken, decisions)
    assert torch.equal(output, net(images, decisions))


def test_the_policy_may_drop_every_block():
    net, shape = cifar_type()
    nn.init.constant_(net.policy.logit.bias, -1e4)
    output, taken = net(torch.randn(2, *shape), return_decisions=True)
    assert not taken.any() and output.isfinite().all()


def test_a_policy_gone_nan_is_an_error():
    net, shape = cifar_type()
    nn.init.constant_(net.policy.logit.bias, float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        net(torch.randn(2, *shape))


def test_policy_samples_with_a_generator():
    net, shape = cifar_type()
    images = torch.randn(64, *shape)
    first, second = (net.policy.sample(images, generator=torch.Generator().manual_seed(s)) for s in (3, 3))
    assert first.dtype == torch.bool and first.shape == (64, 5) and torch.equal(first, second)
    nn.init.constant_(net.policy.logit.bias, 1e4)
    assert net.policy.sample(images).all()
    assert not net.policy.sample(images, exploration=0.0).any()


def test_policy_blocks_have_no_column_and_ignore_decide():
    net, shape = cifar_type()
    images = torch.randn(2, *shape)
    expected = net.policy(images)
    assert len(dynamic_blocks(net.backbone)) == 5
    assert all(block.placement is None for block in dynamic_blocks(net.policy))
    with dynexec.decide(torch.zeros(2, 5, dtype=torch.bool)):
        assert torch.equal(net.policy(images), expected)


def test_revert_leaves_a_network_that_was_never_converted():
    net, shape = cifar_type()
    images, decisions = torch.randn(3, *shape), torch.rand(3, 5) < 0.5
    expected = net(images, decisions)
    placements = [block.placement for block in dynamic_blocks(net)]
    assert dynexec.revert(net) == 0
    assert [block.placement for block in dynamic_blocks(net)] == placements
    assert torch.equal(net(images, decisions), expected)
    for model in (net, net.backbone):
        with pytest.raises(ValueError, match="already: its class gives its blocks their columns, so use it with"):
            dynexec.convert(model)


def test_imagenet_policy_sees_half_the_size():
    net, _ = imagenet_type()
    images = torch.randn(2, 3, 64, 64)
    features = net.policy.features(F.avg_pool2d(images, 2))
    torch.testing.assert_close(net.policy(images), torch.sigmoid(net.policy.logit(features)))


def test_training_takes_batch_statistics_over_all_samples():
    """As published: dropped samples count in the running statistics, and gradients are those of the masked network."""
    net, shape = cifar_type()
    net.train()
    reference = copy.deepcopy(net)
    images, decisions = torch.randn(6, *shape), torch.rand(6, 5) < 0.5
    net(images, decisions).square().sum().backward()
    masked_forward(reference.backbone, images, decisions).square().sum().backward()
    for (name, buffer), expected in zip(net.backbone.named_buffers(), reference.backbone.buffers()):
        torch.testing.assert_close(buffer, expected, msg=lambda text, name=name: f"{name}: {text}")
    for parameter, expected in zip(net.backbone.parameters(), reference.backbone.parameters()):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_has_its_own_shortcuts(clone):
    """Blocks refer to shortcuts that are registered elsewhere: a copy must refer to its own."""
    net, shape = imagenet_type()
    images, decisions = torch.randn(3, *shape), torch.rand(3, 5) < 0.5
    expected = net(images, decisions)
    twin = clone(net)
    torch.testing.assert_close(twin(images, decisions), expected)
    for parameter in twin.backbone.ds.parameters():
        nn.init.zeros_(parameter)
    torch.testing.assert_close(net(images, decisions), expected)
    assert not torch.allclose(twin(images, decisions), expected)
    assert net.double()(images.double(), decisions).dtype == torch.float64


def test_shortcuts():
    """CIFAR-type: nothing in the first segment, then pooling and zeros; ImageNet-type: 1x1 convolutions everywhere."""
    x = torch.randn(2, 4, 8, 6)
    first, second, _ = cifar_type()[0].backbone.ds
    assert len(first) == 0
    torch.testing.assert_close(second(x), torch.cat([F.avg_pool2d(x, 2), torch.zeros(2, 4, 4, 3)], 1))
    channels_last = x.contiguous(memory_format=torch.channels_last)
    assert second(channels_last).is_contiguous(memory_format=torch.channels_last)
    convolutions = [shortcut[0] for shortcut in imagenet_type()[0].backbone.ds]
    assert [(layer.kernel_size, layer.stride) for layer in convolutions] == [((1, 1), (s, s)) for s in (1, 2, 2)]


def test_wrong_sizes_are_errors():
    with pytest.raises(ValueError, match=r"one positive entry per segment, got \(2, 2\) and \(4,\)"):
        models.blockdrop_resnet((2, 2), (4,))
    backbone = SegmentedResNet(Bottleneck, (2,), (4,), num_classes=3)
    policy = models.create_model("blockdrop_resnet32_cifar10").policy
    with pytest.raises(ValueError, match="policy decides for 15 blocks, but backbone has 2"):
        models.BlockDrop(backbone, policy)


@pytest.mark.parametrize(
    ("large", "size", "fits"), [(False, 30, False), (False, 33, False), (False, 36, True), (True, 33, True)]
)
def test_sizes_of_images(large, size, fits):
    """Whatever the decisions: pooling rounds down, a convolution that strides rounds up."""
    net = models.blockdrop_resnet((1, 1, 1), (4, 6, 8), large_images=large).eval()
    images = torch.randn(2, 3, size, size)
    for decisions in (None, *(torch.full((3,), kept) for kept in (False, True))):
        if fits:
            assert net(images, decisions).shape == (2, 10)
        else:
            with pytest.raises(ValueError, match=r"H and W multiples of 4, as segments halve them, got \(2, 3"):
                net(images, decisions)


def test_a_wrapped_backbone():
    net = models.blockdrop_resnet((1, 1), (4, 6)).eval()
    images, decisions = torch.randn(2, 3, 8, 8), torch.ones(2, 2, dtype=torch.bool)
    expected = net(images, decisions)
    net.backbone = nn.DataParallel(net.backbone)
    assert torch.equal(net(images, decisions), expected)


def test_kinds_of_images():
    net = models.blockdrop_resnet((1,), (4,))
    with pytest.raises(TypeError, match=r"images must be a floating-point tensor \[N, 3, H, W\], got torch.uint8"):
        net(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images must be \[N, 3, H, W\], got \(2, 1, 8, 8\)"):
        net(torch.zeros(2, 1, 8, 8))
