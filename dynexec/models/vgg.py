"""VGG-16 as stages (Simonyan and Zisserman, ICLR 2015), thin and low-rank, for fully-adaptive feature sharing."""

from torch import nn

from dynexec.models.arguments import check_counts
from dynexec.models.feature_sharing import FeatureSharing
from dynexec.models.sharing_tree import SharingTree

#: Outputs of the 13 convolutions and the two fully connected layers.
VGG16_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512, 4096, 4096)
#: Basis filters per layer of the low-rank network that the authors' code builds.
VGG16_BASIS = (8, 8, 16, 16, 32, 32, 32, 64, 64, 64, 64, 64, 64, 64, 64)
#: What a further column of each layer costs when the authors' code weighs splits.
VGG16_COLUMN_COSTS = tuple(2.0**-power for power in (1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6))
_CONVOLUTIONS = 13
_POOLED = (1, 3, 6, 9, 12)


def thin_widths(width):
    """Return the outputs per layer of the thin VGG-16: at most ``width``, but ``2 * width`` in the last two layers."""
    check_counts(width=width)
    return tuple(min(width, full) for full in VGG16_WIDTHS[:_CONVOLUTIONS]) + (2 * width, 2 * width)


def max_columns(widths):
    """Return the most columns per layer for which the tree is no wider than VGG-16: the authors' bound on growing."""
    return tuple(max(1, full // width) for full, width in zip(VGG16_WIDTHS, widths, strict=True))


def vgg16_stage(depth, in_channels, width, *, basis=None, kernel=3):
    """Build one layer of VGG-16: convolution, BatchNorm, ReLU and, if it has one, the max pooling after it.

    Parameters
    ----------
    depth : int
        From 0 to 14; 13 and 14 are the fully connected layers, as convolutions without padding.
    in_channels, width : int
    basis : int, optional
        Factorise the convolution: this many filters of full size, then a 1x1 convolution that combines them.
    kernel : int
        Size of the filters.
    """
    padding = kernel // 2 if depth < _CONVOLUTIONS else 0
    if basis is None:
        layers = [nn.Conv2d(in_channels, width, kernel, padding=padding, bias=False)]
    else:
        layers = [
            nn.Conv2d(in_channels, basis, kernel, padding=padding, bias=False),
            nn.Conv2d(basis, width, 1, bias=False),
        ]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu" if layer is layers[-1] else "linear")
    layers += [nn.BatchNorm2d(width), nn.ReLU()]
    if depth in _POOLED:
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)


def feature_sharing_vgg16(num_classes=(2,) * 40, *, tree=None, width=32, basis=None, in_channels=3, image_size=224):
    """Build a VGG-16 with BatchNorm and without dropout, whose 15 layers are shared by groups of tasks.

    Parameters
    ----------
    num_classes : sequence of int
        One per task; default the 40 binary attributes of CelebA.
    tree : SharingTree or its layers, optional
        Default: all tasks share all layers, from which growing starts.
    width : int, sequence of 15 int or None
        Outputs per column: an int as in :func:`thin_widths`, or one number per layer; None: as in VGG-16.
    basis : sequence of int, optional
        Factorise the first layers, see :func:`vgg16_stage`; :data:`VGG16_BASIS` factorises all.
    in_channels : int
    image_size : int
        At least 32. The filters of the first fully connected layer are as large as its input, ``image_size // 32``
        pixels; for larger images the heads average over all positions.

    Returns
    -------
    FeatureSharing
        Untrained.

    Raises
    ------
    ValueError
        If a number is below 1, or there is not one number per layer.
    """
    layers = len(VGG16_WIDTHS)
    widths = VGG16_WIDTHS if width is None else thin_widths(width) if isinstance(width, int) else tuple(width)
    basis = tuple(basis or ())
    if len(widths) != layers or len(basis) > layers:
        raise ValueError(
            f"width must hold {layers} numbers and basis at most {layers}, got {len(widths)} and {len(basis)}"
        )
    num_classes = tuple(num_classes)
    check_counts(width=widths, basis=basis, num_classes=num_classes, in_channels=in_channels)
    check_counts(image_size=image_size, least=32)
    if not num_classes:
        raise ValueError("num_classes must hold one number per task, got none")
    tree = SharingTree.shared(layers, len(num_classes)) if tree is None else tree
    tree = tree if isinstance(tree, SharingTree) else SharingTree(tree)
    if tree.num_layers != layers:
        raise ValueError(f"tree must have {layers} layers, got {tree.num_layers}")
    kernels = (3,) * _CONVOLUTIONS + (image_size // 32, 1)
    basis += (None,) * (layers - len(basis))
    channels = (in_channels, *widths)
    stages = [
        [
            vgg16_stage(depth, channels[depth], widths[depth], basis=basis[depth], kernel=kernels[depth])
            for _ in tree.layers[depth]
        ]
        for depth in range(layers)
    ]
    heads = [
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)) for classes in num_classes
    ]
    return FeatureSharing(stages, heads, tree)
