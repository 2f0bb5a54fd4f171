"""Reads the checkpoints published by the authors of the systems."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from dynexec.models.checkpoints import mismatches, read_file


@dataclass(frozen=True)
class LoadReport:
    """The result of :func:`load_official`.

    Attributes
    ----------
    loaded, absent : tuple of str
        Parts of the network ("backbone", "policy") that were replaced, and those that the checkpoint does not contain
        and that were left as they were.
    dropped : tuple of str
        Names in the checkpoint that are not used.
    info : dict
        Other entries of the checkpoint, such as epoch, accuracy and reward.
    """

    loaded: tuple[str, ...]
    absent: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    info: dict = field(default_factory=dict)

    def __str__(self):
        text = f"loaded {' and '.join(self.loaded)}"
        if self.absent:
            text += f"; the checkpoint has no {' and no '.join(self.absent)}, left as before"
        return text


def load_official(net, source, *, weights_only=True):
    """Load a published checkpoint into a network, completely or not at all.

    See ``read_official`` of each system's class for the supported layouts. ``module.`` prefixes are stripped, and
    ``num_batches_tracked``, which PyTorch 0.3 did not have, may be missing.

    Parameters
    ----------
    net : BlockDrop, SpotTune, AdaShare, ARNet or AdaMML
        Changed in place.
    source : path or mapping
        The file, or the result of ``torch.load`` for it.
    weights_only : bool
        True never executes code from the file; of SpotTune's pickled modules only the tensors are read. BlockDrop's
        ``.t7`` files come from PyTorch 0.3 under Python 2 and may need False, which runs whatever the file's pickle
        says: use it only for files that you trust.

    Returns
    -------
    LoadReport

    Raises
    ------
    TypeError
        If ``net`` or ``source`` has the wrong type.
    OSError
        If the file does not exist or cannot be read.
    ValueError
        If the file is not one of torch's, is damaged, or cannot be read safely; if its layout is unknown; or if it does
        not match the network: every missing, unexpected and misshapen parameter is listed, and the network is left
        unchanged.
    """
    if not hasattr(net, "read_official"):
        raise TypeError(
            "net must be one of the networks of dynexec.models whose authors published checkpoints for PyTorch, got "
            f"{type(net).__name__}"
        )
    given = "source"
    if isinstance(source, Mapping):
        checkpoint = source
    elif isinstance(source, (str, os.PathLike)):
        given = f"source {str(source)!r}"
        checkpoint = read_file(source, weights_only, inert=getattr(net, "saved_as_modules", False))
    else:
        raise TypeError(f"source must be a path or a mapping, got {type(source).__name__}")
    found = net.read_official(checkpoint, given)
    problems = []
    for name, (module, state) in found.parts.items():
        problems += mismatches(name, module.state_dict(), state)
        problems += _unwritable(name, module)
    if problems:
        problems = "\n".join(problems)
        raise ValueError(f"{given} does not fit this network, which is left as it was:\n{problems}")
    for module, state in found.parts.values():
        module.load_state_dict(state, strict=False)  # checked above; may lack num_batches_tracked
    return LoadReport(tuple(found.parts), found.absent, tuple(found.dropped), found.info)


def _unwritable(name, module):
    """Return messages on parameters and buffers that cannot be written, which would end a load half-way."""
    groups = {}
    for key, value in module.state_dict().items():
        if hasattr(value, "device_mesh"):  # a DTensor
            groups.setdefault("sharded: load before that", []).append(key)
        elif value.is_meta:
            groups.setdefault("on the meta device: call to_empty first", []).append(key)
        elif value.is_inference():
            groups.setdefault("made in inference mode, which nothing can be written to", []).append(key)
        elif any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape)):
            groups.setdefault("expanded, so that several values are in one place", []).append(key)
    return [f"  {name}, {what}: {', '.join(keys)}" for what, keys in groups.items()]
