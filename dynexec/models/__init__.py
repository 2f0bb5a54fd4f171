"""Ready-made dynamic networks from the literature."""

from functools import partial

from dynexec.models import arnet, blockdrop
from dynexec.models.adamml import AdaMML
from dynexec.models.adashare import DEPTHS as ADASHARE_DEPTHS
from dynexec.models.adashare import AdaShare, adashare_resnet
from dynexec.models.adashare_policy import published_policy, read_policy
from dynexec.models.arnet import ARNet, build_arnet
from dynexec.models.blockdrop import BlockDrop, blockdrop_resnet
from dynexec.models.feature_sharing import FeatureSharing
from dynexec.models.lesion import LesionStudy, delete_blocks, lesion_study, plot_lesion
from dynexec.models.official import LoadReport, load_official
from dynexec.models.sharing_tree import SharingTree
from dynexec.models.spottune import SpotTune, spottune_resnet26
from dynexec.models.vgg import feature_sharing_vgg16

__all__ = [
    "ARNet",
    "AdaMML",
    "AdaShare",
    "BlockDrop",
    "FeatureSharing",
    "LesionStudy",
    "LoadReport",
    "SharingTree",
    "SpotTune",
    "adashare_resnet",
    "blockdrop_resnet",
    "build_arnet",
    "create_model",
    "delete_blocks",
    "feature_sharing_vgg16",
    "lesion_study",
    "list_models",
    "load_official",
    "plot_lesion",
    "published_policy",
    "read_policy",
    "spottune_resnet26",
]

_MODELS = {name: partial(blockdrop_resnet, **arguments) for name, arguments in blockdrop.PUBLISHED.items()}
_MODELS |= {"spottune_resnet26": spottune_resnet26, "feature_sharing_vgg16": feature_sharing_vgg16, "adamml": AdaMML}
_MODELS |= {f"adashare_resnet{depth}": partial(adashare_resnet, depth) for depth in ADASHARE_DEPTHS}
_MODELS |= {name: partial(build_arnet, **arguments) for name, arguments in arnet.PUBLISHED.items()}


def list_models():
    """Return the names that :func:`create_model` knows, sorted."""
    return sorted(_MODELS)


def create_model(name, **arguments):
    """Build a network by name, with fresh weights.

    Parameters
    ----------
    name : str
        One of :func:`list_models`.
    **arguments
        Passed to the network's constructor; they override what the name implies.

    Returns
    -------
    nn.Module
        Untrained, in training mode.

    Raises
    ------
    ValueError
        If the name is unknown.

    Notes
    -----
    Name and arguments are stored on the network as ``created_by``, for :func:`dynexec.save`.
    """
    if name not in _MODELS:
        raise ValueError(f"name must be one of {', '.join(list_models())}; got {name!r}")
    net = _MODELS[name](**arguments)
    net.created_by = name, arguments
    return net
