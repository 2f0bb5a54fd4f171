"""The files of a saved network: ``manifest.json``, and two files of tensors, whose hashes it holds."""

import json
import re
import reprlib
from dataclasses import asdict, dataclass
from hashlib import sha256

from dynexec.executors.backends import ENGINE_EXECUTORS, KERNEL_EXECUTORS
from dynexec.executors.proof import TOLERANCE
from dynexec.executors.stage import EXECUTORS as LAYER_EXECUTORS

MANIFEST, WEIGHTS, EXAMPLE = "manifest.json", "weights.safetensors", "example.safetensors"
_FORMAT = 1
#: The most samples that a network is frozen to be fast at.
LARGEST_BATCH = 2**16
_LARGEST_ARGUMENT = 2**20
_MOST_ARGUMENTS = 2**12
#: The dtypes that a network may be frozen in, by name.
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
#: Executors of any device, by which a network may be frozen.
EXECUTORS = tuple(dict.fromkeys((*LAYER_EXECUTORS, *ENGINE_EXECUTORS, *KERNEL_EXECUTORS)))


@dataclass(frozen=True)
class Manifest:
    """Description of a saved network, in plain values.

    Attributes
    ----------
    versions : dict
        Versions of ``dynexec`` and ``torch`` with which it was saved.
    files : dict
        SHA-256 of each file of tensors.
    network : dict or None
        ``name`` and ``arguments`` for :func:`dynexec.models.create_model`; None: the code is the user's.
    conversion : dict or None
        Arguments of :func:`dynexec.convert`; None: the model needs none, or was converted by the user's Adapter.
    num_blocks : int or None
        L, if decisions are bool ``[N, L]``.
    batch_size : int
        Batch size to be fast at; at most :data:`LARGEST_BATCH`.
    options : dict
        ``dtype``, ``executor``, ``winograd`` and ``batch_invariant`` for :func:`dynexec.freeze`.
    """

    versions: dict
    files: dict
    network: dict | None
    conversion: dict | None
    num_blocks: int | None
    batch_size: int
    options: dict

    def write(self, path):
        """Write the manifest as JSON, with its own hash."""
        entries = {"format": _FORMAT, **asdict(self)}
        path.write_text(json.dumps(entries | {"sha256": _digest(entries)}, indent=2) + "\n")

    @classmethod
    def read(cls, path):
        """Read and validate the manifest in a file; a ValueError names the file and the invalid entry."""
        data = read_bytes(path)
        try:
            entries = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged, or not a manifest: {error or type(error).__name__}") from None
        names = {"format", "sha256", *_EXPECTED}
        if not isinstance(entries, dict) or "format" not in entries:
            raise ValueError(f"{path} must hold an object with the entries {sorted(names)}")
        if type(entries["format"]) is not int or entries["format"] != _FORMAT:
            raise ValueError(
                f"{path} has format {reprlib.repr(entries['format'])}, and this version of dynexec reads {_FORMAT}: "
                "save the network again"
            )
        if entries.keys() != names:
            raise ValueError(f"{path} must have the entries {sorted(names)}, got {reprlib.repr(sorted(entries))}")
        if entries.pop("sha256") != _digest(entries):
            raise ValueError(f"{path} is damaged or was changed: its content does not match the sha256 that it holds")
        del entries["format"]
        for name, value in entries.items():
            expected, fits = _EXPECTED[name]
            if not fits(value):
                raise ValueError(f"{path}: {name} must be {expected}, got {reprlib.repr(value)}")
        return cls(**entries)


def read_tensors(path, digest):
    """Read the tensors in a file, by name; ValueError, naming the file, unless its SHA-256 is ``digest``."""
    safetensors, data = import_safetensors(), read_bytes(path)
    if (found := sha256(data).hexdigest()) != digest:
        raise ValueError(f"{path} is damaged or another's: its SHA-256 is {found}, and {MANIFEST} says {digest}")
    try:
        return safetensors.load(data)
    except Exception as error:  # of a library's parser, on what may be anything
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def read_bytes(path):
    """Read a file; ValueError, naming the file, if it cannot be read."""
    try:
        if path.exists() and not path.is_file():  # a pipe might never end
            raise ValueError(f"{path} is not a file: dynexec.save writes such files")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): dynexec.save writes such files") from error


def import_safetensors():
    """Import ``safetensors.torch``."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "dynexec.save and dynexec.load need the package safetensors: pip install 'dynexec[deploy]'"
        ) from error
    return safetensors.torch


def _digest(entries):
    return sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _is_count(value):
    return type(value) is int and value > 0


def _has(value, **kinds):
    """Whether ``value`` is a dict of exactly these entries, each of its kind."""
    return (
        isinstance(value, dict)
        and value.keys() == kinds.keys()
        and all(isinstance(value[name], kind) for name, kind in kinds.items())
    )


def are_plain(arguments):
    """Whether a manifest may hold these network arguments, which limits what a foreign manifest can build here."""
    values, rest = [], list(arguments.values())
    while rest:
        value = rest.pop()
        (rest.extend if isinstance(value, list) else values.append)(value)
    numbers = [abs(value) <= _LARGEST_ARGUMENT for value in values if isinstance(value, (int, float))]
    plain = all(value is None or isinstance(value, (int, float, str)) for value in values)
    return plain and all(numbers) and len(values) <= _MOST_ARGUMENTS


def _is_network(value):
    return _has(value, name=str, arguments=dict) and are_plain(value["arguments"])


def _is_conversion(value):
    kinds = {"match": list, "batch_norm": str, "fine_tune": str | None}
    return _has(value, **kinds) and value["match"] and all(isinstance(name, str) for name in value["match"])


def _are_options(value):
    kinds = {"dtype": str | None, "executor": str | None, "winograd": bool, "batch_invariant": bool}
    return _has(value, **kinds) and value["dtype"] in (None, *DTYPES) and value["executor"] in (None, *EXECUTORS)


def _are_files(value):
    kinds = {WEIGHTS: str, EXAMPLE: str}
    return _has(value, **kinds) and all(re.fullmatch("[0-9a-f]{64}", digest) for digest in value.values())


# What each entry must be, and whether a value is that.
_EXPECTED = {
    "versions": ("those of dynexec and torch", lambda value: _has(value, dynexec=str, torch=str)),
    "files": (f"the SHA-256 of {WEIGHTS} and of {EXAMPLE}, and of no other file", _are_files),
    "network": (
        f"null, or a name and arguments by name: texts, numbers up to {_LARGEST_ARGUMENT} and lists of them, "
        f"{_MOST_ARGUMENTS} at most",
        lambda value: value is None or _is_network(value),
    ),
    "conversion": (
        "null, or match (names of blocks), batch_norm and fine_tune",
        lambda value: value is None or _is_conversion(value),
    ),
    "num_blocks": ("null or a positive number", lambda value: value is None or _is_count(value)),
    "batch_size": (
        f"a positive number up to {LARGEST_BATCH}",
        lambda value: _is_count(value) and value <= LARGEST_BATCH,
    ),
    "options": (
        f"dtype (null or one of {list(DTYPES)}), executor (null or one of {list(EXECUTORS)}), winograd and "
        "batch_invariant",
        _are_options,
    ),
}
