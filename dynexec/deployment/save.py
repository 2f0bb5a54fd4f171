"""``save``: write a network to a folder."""

import errno
import os
import shutil
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

import torch

from dynexec.deployment.example import Example
from dynexec.deployment.files import (
    DTYPES,
    EXAMPLE,
    EXECUTORS,
    LARGEST_BATCH,
    MANIFEST,
    WEIGHTS,
    Manifest,
    import_safetensors,
)
from dynexec.deployment.network import describe, join
from dynexec.executors.freeze import check_arguments
from dynexec.executors.proof import TOLERANCE
from dynexec.executors.routed import tensors_of


def save(model, folder, example_input, *, policy=None, dtype=None, executor=None, winograd=True, batch_invariant=False):
    """Write a network to a folder from which :func:`load` freezes it, on this or another machine.

    A frozen network belongs to its processor, so the model that :func:`dynexec.freeze` makes it from is saved. The
    folder holds ``weights.safetensors``, ``example.safetensors`` (up to eight samples of the example input, with the
    network's outputs for them) and ``manifest.json``. It contains no code and no pickle.

    Writing is atomic: the folder is created next to its final place and then renamed. An existing folder is replaced if
    this function wrote it or if it is empty; any other is left alone.

    Parameters
    ----------
    model : nn.Module
        As in :func:`dynexec.freeze`; not changed. A network of :func:`dynexec.models.create_model` can be loaded
        without its code if its arguments are strings, numbers or lists of them.
    folder : path
        Its parent must exist.
    example_input : tensor ``[N, C, H, W]``, or the input of a RoutedNetwork
    policy, dtype, executor, winograd, batch_invariant
        As in :func:`dynexec.freeze`, to which they are passed when the network is loaded.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid.
    FileNotFoundError
        If the parent of ``folder`` does not exist.
    FileExistsError
        If ``folder`` exists and holds anything else.
    ImportError
        If the package safetensors is not installed.
    """
    check_arguments(model, example_input, dtype, policy, winograd=winograd, batch_invariant=batch_invariant)
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype must be None or one of {list(DTYPES)}, got {dtype}")
    if executor not in (None, *EXECUTORS):
        raise ValueError(f"executor must be None or one of {list(EXECUTORS)}, got {executor!r}")
    folder = Path(folder).resolve()
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"folder must be in a folder that exists, got {str(folder)!r}")
    if not any(_is_ours(folder) for _ in range(3)):  # of one that another process is just removing some are left
        raise _foreign(folder)
    net, safetensors = join(model, policy), import_safetensors()
    error = TOLERANCE.get(dtype or next(net.parameters()).dtype, 0.0)
    tensors = {WEIGHTS: net.state_dict(), EXAMPLE: Example.record(net, example_input, error).tensors()}
    tensors = {name: _plain(found) for name, found in tensors.items()}
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    options = {"dtype": name, "executor": executor, "winograd": winograd, "batch_invariant": batch_invariant}
    made = folder.with_name(f".{folder.name}.{uuid4().hex}")
    made.mkdir()
    try:
        files = {name: safetensors.save(found) for name, found in tensors.items()}
        for name, data in files.items():
            (made / name).write_bytes(data)
        Manifest(
            versions={name: version(name) for name in ("dynexec", "torch")},
            files={name: sha256(data).hexdigest() for name, data in files.items()},
            **describe(net),
            batch_size=min(len(tensors_of(example_input)[0]), LARGEST_BATCH),
            options=options,
        ).write(made / MANIFEST)
        _put_in_place(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _is_ours(folder):
    """Whether a folder may be replaced: it does not exist, is empty, or holds only what :func:`save` writes."""
    try:
        with os.scandir(folder) as entries:
            found = {entry.name: entry.is_file() for entry in entries}
    except FileNotFoundError:
        return True
    except NotADirectoryError:
        return False
    return found.keys() in (set(), {MANIFEST, WEIGHTS, EXAMPLE}) and all(found.values())


def _foreign(folder):
    return FileExistsError(f"folder {str(folder)!r} exists, and holds other things than save writes: give another one")


def _plain(tensors):
    """Return tensors by name as safetensors accepts them: on the CPU, contiguous, none sharing memory."""
    found, taken = {}, set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"model must have tensors only in its state_dict, but {name} is a {type(tensor).__name__}")
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in taken else tensor  # of tied ones each name has its own
        taken.add(place)
    return found


def _put_in_place(made, folder):
    """Flush the files of ``made`` to disk and rename it to ``folder``; an old ``folder`` is then removed."""
    for path in (*made.iterdir(), made):
        _sync(path)
    while True:
        old = _take_away(folder, made.with_name(f"{made.name}.old"))
        try:
            made.rename(folder)
        except BaseException as error:
            if not (isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST)):
                if old is not None:
                    old.rename(folder)
                raise
            # Another process has put its own in place since: that is the one to replace.
        else:
            _sync(folder.parent)
            return
        finally:
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)


def _take_away(folder, old):
    """Rename ``folder`` to ``old`` and return ``old``, or None if there is none; raise unless :func:`save` wrote it."""
    try:
        folder.rename(old)
    except FileNotFoundError:
        return None
    if not _is_ours(old):
        old.rename(folder)
        raise _foreign(folder)
    return old


def _sync(path):
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
