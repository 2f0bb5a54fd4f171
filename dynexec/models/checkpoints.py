"""What readers of published checkpoints share: files, names, and how a state differs from the expected one."""

import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from dynexec.models.inert import load_inert


@dataclass
class Checkpoint:
    """A published checkpoint, taken apart by the model that it is for.

    Attributes
    ----------
    parts : dict
        Name of a part of the network -> (the module, its state under the module's names).
    absent : tuple of str
        Parts that the checkpoint does not contain.
    dropped : list of str
        Names in the checkpoint that are not used.
    info : dict
        Its other entries.
    """

    parts: dict[str, tuple[nn.Module, Mapping]]
    absent: tuple[str, ...] = ()
    dropped: list[str] = field(default_factory=list)
    info: dict = field(default_factory=dict)


def read_file(path, weights_only, *, inert=False):
    """Read the mapping in a file.

    ``weights_only`` is as in ``torch.load``; with ``inert``, pickled modules are read nonetheless, see :mod:`inert`.
    """
    with open(path, "rb"):
        pass  # where that is not possible it says why
    if (damage := _zip_damage(path)) is not None:
        raise ValueError(f"source {str(path)!r} ({os.path.getsize(path)} bytes) is damaged: {damage}")
    try:
        encoding = {} if weights_only else {"encoding": "latin1"}  # Python 2 wrote its strings as bytes
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only, **encoding)
    except Exception as error:  # what a damaged file raises depends on where the damage is
        reason = _reason(error)
        if weights_only and inert and isinstance(error, (pickle.UnpicklingError, UnicodeDecodeError)):
            return _check_file(_read_inert(path), path)
        if weights_only and ("not an allowed global" in reason or isinstance(error, UnicodeDecodeError)):
            raise ValueError(
                f"source {str(path)!r} cannot be read without executing code from it, as files of PyTorch 0.3 often "
                f"cannot. If you trust it, call load_official(..., weights_only=False). torch.load said: {reason}"
            ) from error
        size = os.path.getsize(path)
        raise ValueError(
            f"source {str(path)!r} ({size} bytes) is not a checkpoint, or is damaged. torch.load said: {reason}"
        ) from error
    return _check_file(checkpoint, path)


def _zip_damage(path):
    """Return what is wrong with a zip file, whose checksums torch.load does not check; None for other files."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.testzip()
    except Exception as error:  # depends on where the damage is
        return f"{type(error).__name__}: {error}"
    return None if entry is None else f"the checksum of its entry {entry!r} is wrong"


def _read_inert(path):
    try:
        return load_inert(path)
    except Exception as error:
        raise ValueError(f"source {str(path)!r} is damaged: {type(error).__name__}: {error}") from error


def _check_file(checkpoint, path):
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"source {str(path)!r} holds a {type(checkpoint).__name__}, expected a dict of parameters")
    return checkpoint


def _reason(error):
    """Extract what is wrong from an error of torch.load, whose text is mostly advice."""
    text = str(error).split("WeightsUnpickler error:")[-1]
    for advice in ("Check the documentation", "Please use", "In PyTorch 2.6"):
        text = text.split(advice)[0]
    return f"{type(error).__name__}: {' '.join(text.split())}".removesuffix(": ")


def mismatches(part, expected, state):
    """Return messages on how ``state`` differs from the names, shapes and kinds of the tensors in ``expected``."""
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    misshapen, mistyped = [], []
    for key in expected.keys() & state.keys():
        if not isinstance(state[key], torch.Tensor):
            misshapen.append(f"{key} is a {type(state[key]).__name__}")
        elif is_lazy(state[key]):
            misshapen.append(f"{key} is not initialized")
        elif state[key].is_nested or state[key].shape != expected[key].shape:
            shape = "nested" if state[key].is_nested else tuple(state[key].shape)
            misshapen.append(f"{key} {shape} instead of {tuple(expected[key].shape)}")
        elif not _can_be_copied(state[key], expected[key]):
            given = state[key]
            mistyped.append(f"{key} {given.dtype}, {given.layout}, {given.device} instead of {expected[key].dtype}")
    groups = {"missing": missing, "unexpected": unexpected, "of another shape": sorted(misshapen)}
    groups["of another kind"] = sorted(mistyped)
    return [f"  {part}, {what}: {', '.join(keys)}" for what, keys in groups.items() if keys]


def _can_be_copied(given, expected):
    """Whether values can be copied from one tensor to the other with no loss but rounding."""
    dense = given.layout == torch.strided and given.device.type != "meta" and not given.is_quantized
    same = given.is_floating_point() == expected.is_floating_point() and given.is_complex() == expected.is_complex()
    return dense and same


def check_mapping(state, part, entry, given):
    """Raise ValueError unless ``state``, the ``entry`` of a checkpoint for ``part``, is a mapping from names."""
    if not isinstance(state, Mapping):
        raise ValueError(f"{entry} must map names to tensors, got {type(state).__name__}")
    if wrong := [key for key in state if not isinstance(key, str)]:
        raise ValueError(f"{given} must have names for the {part}, got the keys {shorten(map(repr, wrong))}")


def without_prefix(state):
    """Return ``state`` without the prefix ``module.`` that ``DataParallel`` adds to names."""
    return rename(state, lambda key: key.removeprefix("module."))


def rename(state, name_of):
    """Return ``state`` under the names ``name_of(name)``; ValueError if two names become the same."""
    found = {}
    for key in state:
        found.setdefault(name_of(key), []).append(key)
    if twice := [" and ".join(map(repr, keys)) for keys in found.values() if len(keys) > 1]:
        raise ValueError(f"the checkpoint has two values for one parameter: {shorten(twice)}")
    return {key: state[keys[0]] for key, keys in found.items()}


def shorten(items):
    """Join the first dozen of ``items`` into one text that also says how many more there are."""
    items = [str(item) for item in items]
    more = f" and {len(items) - 12} more" if len(items) > 12 else ""
    return ", ".join(items[:12]) + more
