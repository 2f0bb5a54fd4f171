"""Numbers below 1 are refused where a network is built, by the name of the argument."""

from functools import partial

import pytest
import torch
from arnet_cases import Small

from dynexec.models import AdaMML, adashare_resnet, blockdrop_resnet, feature_sharing_vgg16, spottune_resnet26
from dynexec.models.adashare_policy import InstancePolicy, TaskPolicy
from dynexec.models.arnet import ARNet, ARNetPolicy, build_arnet
from dynexec.models.resnet import ResNet

SMALL = dict(blocks=(1, 1), widths=(4, 8))
BUILDERS = {
    "blockdrop_resnet": (blockdrop_resnet, SMALL | dict(policy_widths=(4,), in_channels=3, num_classes=2)),
    "spottune_resnet26": (spottune_resnet26, SMALL | dict(stem_width=4, in_channels=3, num_classes=2)),
    "adashare_resnet": (
        partial(adashare_resnet, 18, **SMALL),
        dict(num_classes=(2, 3), head_width=4, in_channels=3, policy_widths=(4, 4)),
    ),
    "TaskPolicy": (TaskPolicy, dict(num_tasks=2, num_blocks=3)),
    "InstancePolicy": (partial(InstancePolicy, widths=(4,)), dict(num_tasks=2, num_blocks=3)),
    "build_arnet": (
        partial(build_arnet, [Small(4)], lite_backbone=Small(4)),
        dict(num_classes=2, num_frames=3, resolutions=(16, 16), skips=(1, 2), hidden=4),
    ),
    "ARNet": (
        lambda **sizes: ARNet(
            [Small(4)],
            ARNetPolicy(
                Small(4), 4, num_backbones=1, num_classes=2, resolution=8, skips=(), hidden=4, dropout=0.0, cheap=False
            ),
            dropout=0.0,
            **sizes,
        ),
        dict(num_classes=2, num_frames=3, resolutions=(16, 8)),
    ),
    "AdaMML": (partial(AdaMML, depth=18), dict(num_classes=2, num_segments=3, policy_size=32)),
    "feature_sharing_vgg16": (feature_sharing_vgg16, dict(num_classes=(2,), width=8, basis=(4,), in_channels=3)),
    "ResNet": (partial(ResNet, 18), dict(num_classes=2, in_channels=3)),
}


@pytest.mark.parametrize("builder", BUILDERS)
def test_numbers_below_one(builder):
    build, sizes = BUILDERS[builder]
    with torch.device("meta"):
        build(**sizes)
        for name, size in sizes.items():
            for wrong in (0, -1, True):
                wrong = (*size[:-1], wrong) if isinstance(size, tuple) else wrong
                with pytest.raises(ValueError, match=f"{name} must be at least 1, and whole, got"):
                    build(**sizes | {name: wrong})
