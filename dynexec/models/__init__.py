"""The dynamic networks of the literature, ready made."""

from functools import partial

from dynexec.models import blockdrop
from dynexec.models.blockdrop import BlockDrop, blockdrop_resnet
from dynexec.models.lesion import LesionStudy, delete_blocks, lesion_study, plot_lesion
from dynexec.models.official import LoadReport, load_official
from dynexec.models.spottune import SpotTune, spottune_resnet26

__all__ = [
    "BlockDrop",
    "LesionStudy",
    "LoadReport",
    "SpotTune",
    "blockdrop_resnet",
    "create_model",
    "delete_blocks",
    "lesion_study",
    "list_models",
    "load_official",
    "plot_lesion",
    "spottune_resnet26",
]

_MODELS = {name: partial(blockdrop_resnet, **arguments) for name, arguments in blockdrop.PUBLISHED.items()}
_MODELS |= {"spottune_resnet26": spottune_resnet26}


def list_models():
    """Names that :func:`create_model` knows, sorted."""
    return sorted(_MODELS)


def create_model(name, **arguments):
    """Build a network by name, with fresh weights.

    Parameters
    ----------
    name : str
        One of :func:`list_models`.
    **arguments
        Passed to the network's constructor; they override what the name stands for.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    if name not in _MODELS:
        raise ValueError(f"name must be one of {', '.join(list_models())}; got {name!r}")
    return _MODELS[name](**arguments)
