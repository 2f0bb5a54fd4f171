"""SpotTune: structure, what each image runs, the policy, published checkpoints."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from toys import decision_patterns, finish

import dynexec
from dynexec import models
from dynexec.executors.proof import relative_error
from dynexec.measure import count_flops
from dynexec.policy import exponential_temperature

EXACT = 1e-5


def small(**options):
    """Five blocks in three segments."""
    net = models.spottune_resnet26(blocks=(2, 1, 2), widths=(6, 8, 12), stem_width=3, num_classes=5, **options)
    finish(net)
    for block in (block for segment in net.backbone.parallel_blocks for block in segment):
        finish(block, seed=1)
    return net


def masked_forward(net, images, weights, *, relu_behind_stem=False, swapped=False):
    """The published arithmetic: both sets of weights on all images, multiplied by the mask."""
    backbone = net.backbone
    x = backbone.bn1(backbone.conv1(images))
    x = F.relu(x) if relu_behind_stem else x
    column = 0
    for segment, parallel in zip(backbone.blocks, backbone.parallel_blocks):
        for number, pair in enumerate(zip(segment, parallel)):
            a = weights[:, column].reshape(-1, 1, 1, 1)
            a = 1 - a if swapped else a
            shortcut = x
            if number == 0:
                half = F.avg_pool2d(x, 2)
                missing = pair[0].conv1.out_channels - half.shape[1]
                shortcut = torch.cat((half, half.new_zeros(len(half), missing, *half.shape[2:])), 1)
            first, second = (F.relu(shortcut + b.bn2(b.conv2[1](F.relu(b.bn1(b.conv1(x)))))) for b in pair)
            x = first * (1 - a) + second * a
            column += 1
    x = F.relu(backbone.bn2[0](x))
    return backbone.linear(x.mean((2, 3)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("samples", [1, 5])
def test_output_is_that_of_the_masked_network(samples, layout):
    net = small()
    images = torch.randn(samples, 3, 24, 40).contiguous(memory_format=layout)
    frozen = dynexec.freeze(net, images)
    for _, decisions in decision_patterns(samples, 5):
        with torch.no_grad():
            expected = masked_forward(net, images, decisions.float())
            for mode in ("exact", "capacity"):
                assert relative_error(net(images, decisions, mode=mode), expected) <= EXACT
            assert relative_error(net(images, soft_decisions=decisions.float()), expected) <= EXACT
        assert relative_error(frozen(images, decisions), expected) <= EXACT
        assert torch.equal(frozen(images, decisions), frozen(images, decisions))


def test_traps():
    """A ReLU behind the stem, or True for the pre-trained weights, would be another network."""
    net = small()
    images, decisions = torch.randn(4, 3, 24, 24), torch.rand(4, 5) < 0.5
    with torch.no_grad():
        y = net(images, decisions)
        for trap in ({"relu_behind_stem": True}, {"swapped": True}):
            assert relative_error(masked_forward(net, images, decisions.float(), **trap), y) > 0.02


def test_soft_decisions_of_another_shape():
    with pytest.raises(ValueError, match=r"expected float \[N, 5\]"):
        small()(torch.randn(2, 3, 16, 16), soft_decisions=torch.rand(2, 3))


def test_soft_decisions_train_the_policy():
    """Gradients reach the policy through the weights, as through the published arithmetic."""
    net = small().train()
    twin = copy.deepcopy(net)
    images = torch.randn(4, 3, 16, 16)
    generator = torch.Generator().manual_seed(3)
    weights = net.policy.sample_soft(images, generator=generator)
    assert set(weights.detach().unique().tolist()) <= {0.0, 1.0} and weights.shape == (4, 5)
    net(images, soft_decisions=weights).square().sum().backward()
    again = twin.policy.sample_soft(images, generator=generator.manual_seed(3))
    masked_forward(twin, images, again).square().sum().backward()
    assert net.policy.network.linear.weight.grad.abs().sum() > 0
    for (name, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3, msg=name)
    with pytest.raises(ValueError, match="decisions must be None"):
        net(images, weights.bool(), soft_decisions=weights)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_what_of_the_pretrained_weights_is_frozen(batch_norm):
    net = small()
    frozen = {id(parameter) for parameter in net.freeze_pretrained(batch_norm)}
    for name, parameter in net.named_parameters():
        pretrained = name.startswith("backbone.blocks.")
        expected = pretrained and (".conv" in name or batch_norm)
        assert parameter.requires_grad != expected and (id(parameter) in frozen) == expected, name


def test_policy():
    net = small()
    images = torch.randn(6, 3, 16, 16)
    with torch.no_grad():
        logits, probabilities = net.policy.logits(images), net.policy(images)
        torch.testing.assert_close(probabilities, logits.softmax(-1)[..., 1])
        y, decisions = net(images, return_decisions=True)
        assert torch.equal(decisions, logits[..., 1] >= logits[..., 0])
        assert torch.equal(net(images, decisions), y)
        frozen = dynexec.freeze(net, images)
        z, chosen = frozen(images, return_decisions=True)
        sure = (probabilities - 0.5).abs() > 1e-3
        assert torch.equal(chosen[sure], decisions[sure])
        if sure.all():
            assert relative_error(z, y) <= EXACT
        drawn = [net.policy.sample(images, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].dtype == torch.bool and drawn[0].shape == (6, 5)
    assert exponential_temperature(7, decay=1) == 5


def test_samples_are_drawn_with_their_probabilities():
    net = small()
    images = torch.randn(1, 3, 16, 16).expand(4000, 3, 16, 16)
    with torch.no_grad():
        row = net.policy.logits(images[:1])
        net.policy.logits = lambda images: row.expand(len(images), -1, -1)
        drawn = net.policy.sample(images, generator=torch.Generator().manual_seed(0)).float().mean(0)
        torch.testing.assert_close(drawn, net.policy(images[:1])[0], rtol=0, atol=0.04)


@pytest.mark.parametrize("style", ["exact", "frozen"])
def test_a_sample_does_not_depend_on_its_batch(style):
    net = small()
    images, decisions = torch.randn(5, 3, 16, 24), torch.rand(5, 5) < 0.5
    run = net if style == "exact" else dynexec.freeze(net, images)
    with torch.no_grad():
        whole = run(images, decisions)
        for n in range(5):
            assert relative_error(run(images[n : n + 1], decisions[n : n + 1]), whole[n : n + 1]) <= EXACT


def test_copies():
    net = small()
    images, decisions = torch.randn(3, 3, 16, 16), torch.rand(3, 5) < 0.5
    with torch.no_grad():
        y = net(images, decisions)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(twin(images, decisions), y)
            twin.backbone.parallel_blocks[0][0].conv1.weight.zero_()  # the blocks use the very modules that are saved
            assert not torch.equal(twin(images, torch.ones(5).bool()), net(images, torch.ones(5).bool()))
        other = models.spottune_resnet26(blocks=(2, 1, 2), widths=(6, 8, 12), stem_width=3, num_classes=5).eval()
        other.load_state_dict(net.state_dict())
        assert torch.equal(other(images, decisions), y)


@pytest.mark.parametrize(
    "decisions, error, message",
    [
        (torch.ones(3, 4).bool(), ValueError, "decisions has 4 columns"),
        (torch.ones(2, 5).bool(), ValueError, "decisions has 2 rows"),
        (torch.ones(3, 5), TypeError, "decisions must be bool"),
        (torch.ones(3, 5).long(), TypeError, "use decisions.bool"),
    ],
)
def test_wrong_decisions(decisions, error, message):
    net = small()
    images = torch.randn(3, 3, 16, 16)
    with pytest.raises(error, match=message):
        net(images, decisions)
    with pytest.raises(error):
        dynexec.freeze(net, images)(images, decisions)


@pytest.mark.parametrize("shape", [(2, 3, 20, 16), (2, 3, 16, 9), (3, 16, 16), (2, 1, 16, 16), (2, 4, 16, 16)])
def test_images_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="images must be .* multiples of 8"):
        small()(torch.randn(shape))


@pytest.mark.parametrize("executor", ["resident", "fused", "compact", "masked", "grouped"])
def test_images_that_do_not_fit_a_frozen_network(executor):
    """Neither other channels nor a size at which a block's two branches differ give any logits."""
    frozen = dynexec.freeze(small(), torch.randn(2, 3, 16, 16), executor=executor)
    for shape in ((2, 4, 16, 16), (2, 1, 16, 16), (2, 2, 16, 16), (2, 3, 20, 16), (2, 3, 17, 33)):
        with pytest.raises((ValueError, RuntimeError)):
            frozen(torch.randn(shape), torch.rand(shape[0], 5) < 0.5)


@pytest.mark.parametrize("images", [torch.ones(1, 3, 16, 16).byte(), [1, 2], None])
def test_what_is_no_image(images):
    with pytest.raises(TypeError, match="images must be a floating-point tensor"):
        small()(images)


def test_sizes_that_do_not_match():
    with pytest.raises(ValueError, match=r"blocks and widths need one entry per segment, got \(1, 2\) and \(8,\)"):
        models.spottune_resnet26(blocks=(1, 2), widths=(8,))


def test_policy_must_fit():
    with pytest.raises(ValueError, match="policy gives 6 logits, but backbone has 2 blocks"):
        models.SpotTune(
            models.spottune.SpotTuneResNet((1, 1), (4, 8), 5),
            models.spottune.SpotTunePolicy(models.spottune.SpotTuneResNet((1, 1), (4, 8), 6, choices=False)),
        )


def test_flops():
    """Whatever is decided, an image runs one path (2.16 GFLOPs at 72 pixels) and the policy (0.439)."""
    with torch.device("meta"):
        net = models.create_model("spottune_resnet26")
        flops = count_flops(net, torch.empty(1, 3, 72, 72))
    assert (round(flops.dense / 1e9, 2), round(flops.policy / 1e9, 3)) == (2.16, 0.439)
    assert flops.block == (0,) * 12
    both = 2 * flops.dense - 2 * (72 * 72 * 32 * 27 + 256 * 10)  # stem and classifier run once
    assert round(both / 1e9, 2) == 4.31
    assert flops.of(torch.rand(2, 12) < 0.5).tolist() == [flops.dense + flops.policy] * 2
