"""Read checkpoints that the authors of the systems published."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from dynexec.models.blockdrop import BlockDrop


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_official` did.

    Attributes
    ----------
    loaded, absent : tuple of str
        Parts of the network ("backbone", "policy") that were replaced, and that the checkpoint does not hold and
        that were therefore left as they were.
    dropped : tuple of str
        Names in the checkpoint that belong to no part and never did any work.
    info : dict
        What else the checkpoint says of itself, such as epoch, accuracy and reward.
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
    """Load a published checkpoint into a network, all of it or nothing.

    BlockDrop files are understood in every published layout: fine-tuned (``agent`` and ``resnet``), curriculum
    (``agent`` only: the backbone is left alone), oldest (``net`` for ``agent``), and base networks (``state_dict``,
    or the bare mapping that torchvision publishes, with ``layer1.0.downsample.0`` style names). ``module.`` prefixes
    are stripped, the unused ``features.fc`` of old policies is dropped, and ``num_batches_tracked``, which PyTorch
    0.3 did not have, may be missing.

    Parameters
    ----------
    net : BlockDrop
        Changed in place.
    source : path or mapping
        The file, or what ``torch.load`` gave for it.
    weights_only : bool
        True never executes code from the file. The authors' own ``.t7`` files come from PyTorch 0.3 under Python 2
        and may need False, which runs whatever the file's pickle says: only for files that you trust.

    Returns
    -------
    LoadReport

    Raises
    ------
    TypeError
        If ``net`` or ``source`` is of another kind.
    OSError
        If there is no such file, or it may not be read.
    ValueError
        If the file is none of torch's, is damaged, or cannot be read safely; its layout is unknown; or it does not fit
        the network: every missing, unexpected and misshapen parameter is listed, and the network is left untouched.
    """
    if not isinstance(net, BlockDrop):
        raise TypeError(f"net must be a dynexec.models.BlockDrop, got {type(net).__name__}")
    given = "source"
    if isinstance(source, Mapping):
        checkpoint = source
    elif isinstance(source, (str, os.PathLike)):
        given = f"source {str(source)!r}"
        checkpoint = _read(source, weights_only)
    else:
        raise TypeError(f"source must be a path or a mapping, got {type(source).__name__}")
    parts, info = _split(checkpoint, given)
    dropped, prepared, problems = [], {}, []
    for name, state in parts.items():
        if wrong := [key for key in state if not isinstance(key, str)]:
            raise ValueError(f"{given} must have names for the {name}, got the keys {_shorten(map(repr, wrong))}")
        state, unused = _rename(state, name)
        dropped += unused
        problems += _mismatches(name, getattr(net, name).state_dict(), state)
        prepared[name] = state
    if problems:
        problems = "\n".join(problems)
        raise ValueError(f"{given} does not fit this network, which is left as it was:\n{problems}")
    for name, state in prepared.items():
        getattr(net, name).load_state_dict(state, strict=False)  # checked above; may lack num_batches_tracked
    absent = tuple(name for name in ("backbone", "policy") if name not in prepared)
    return LoadReport(tuple(prepared), absent, tuple(dropped), info)


def _read(path, weights_only):
    try:
        encoding = {} if weights_only else {"encoding": "latin1"}  # Python 2 wrote its strings as bytes
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only, **encoding)
    except OSError:
        raise
    except Exception as error:  # what a damaged file raises depends on where the damage is
        reason = _reason(error)
        if weights_only and ("not an allowed global" in reason or isinstance(error, UnicodeDecodeError)):
            raise ValueError(
                f"source {str(path)!r} cannot be read without executing code from it, as files of PyTorch 0.3 often "
                f"cannot. If you trust it, call load_official(..., weights_only=False). torch.load said: {reason}"
            ) from error
        size = os.path.getsize(path)
        raise ValueError(
            f"source {str(path)!r} ({size} bytes) is not a checkpoint, or is damaged. torch.load said: {reason}"
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"source {str(path)!r} holds a {type(checkpoint).__name__}, expected a dict of parameters")
    return checkpoint


def _reason(error):
    """What is wrong, from an error of torch.load, whose text is mostly advice."""
    text = str(error).split("WeightsUnpickler error:")[-1]
    for advice in ("Check the documentation", "Please use", "In PyTorch 2.6"):
        text = text.split(advice)[0]
    return f"{type(error).__name__}: {' '.join(text.split())}".removesuffix(": ")


def _split(checkpoint, given):
    """The state of each part of the network, and everything else that the checkpoint says; ``given`` is for errors."""
    parts = {}
    if "state_dict" in checkpoint:
        parts["backbone"] = "state_dict"
    else:
        if "resnet" in checkpoint:
            parts["backbone"] = "resnet"
        if "agent" in checkpoint or "net" in checkpoint:
            parts["policy"] = "agent" if "agent" in checkpoint else "net"
    if not parts:
        if checkpoint and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
            return {"backbone": checkpoint}, {}
        raise ValueError(
            f"{given} has the entries {_shorten(map(repr, checkpoint))}: expected 'agent' and 'resnet' (fine-tuned), "
            "'agent' or 'net' (policy only), 'state_dict' (base network), or parameters by name"
        )
    for entry in parts.values():
        if not isinstance(checkpoint[entry], Mapping):
            raise ValueError(f"{given}[{entry!r}] must map names to tensors, got {type(checkpoint[entry]).__name__}")
    info = {key: value for key, value in checkpoint.items() if key not in parts.values()}
    return {part: checkpoint[entry] for part, entry in parts.items()}, info


def _rename(state, part):
    """The state under our names, and the names that are dropped."""
    renamed, dropped = {}, []
    for key, value in state.items():
        key = key.removeprefix("module.")
        if part == "policy" and key.startswith("features.fc"):
            dropped.append(key)
            continue
        if part == "backbone" and (match := re.match(r"layer(\d+)\.(?:0\.downsample|(\d+))\.(.*)", key)):
            segment, block, rest = int(match[1]) - 1, match[2], match[3]
            key = f"ds.{segment}.{rest}" if block is None else f"blocks.{segment}.{block}.{rest}"
        renamed[key] = value
    return renamed, dropped


def _mismatches(part, expected, state):
    """Sentences saying how ``state`` differs from the names and shapes in ``expected``."""
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    misshapen = []
    for key in expected.keys() & state.keys():
        if not isinstance(state[key], torch.Tensor):
            misshapen.append(f"{key} is a {type(state[key]).__name__}")
        elif state[key].shape != expected[key].shape:
            misshapen.append(f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}")
    groups = {"missing": missing, "unexpected": unexpected, "of another shape": sorted(misshapen)}
    return [f"  {part}, {what}: {_shorten(keys)}" for what, keys in groups.items() if keys]


def _shorten(items, limit=12):
    items = [str(item) for item in items]
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
