"""``load``: freeze a saved network for this machine."""

from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from dynexec.deployment.example import Example
from dynexec.deployment.files import DTYPES, EXAMPLE, MANIFEST, WEIGHTS, Manifest, read_tensors
from dynexec.deployment.network import build
from dynexec.executors import freeze
from dynexec.executors.proof import tolerance


def load(folder, model=None, *, policy=None, device="cpu", **options):
    """Freeze for this machine what :func:`save` wrote, and compare the result with what was saved.

    Nothing in the folder is executed. Hashes show whether its files are intact, not who wrote them.

    Parameters
    ----------
    folder : path
    model : nn.Module, optional
        Built from the code of the saved model, with any weights (they are not used); converted or not. It is not
        changed. Required unless the network was one of :func:`dynexec.models.create_model`.
    policy : nn.Module, optional
        Built from the code of the ``policy`` passed to :func:`save`, with any weights.
    device : torch.device or str
    **options
        Arguments of :func:`dynexec.freeze` that override what was saved, and also ``cost_cache``, ``measure`` and
        ``keep_memory``.

    Returns
    -------
    What :func:`dynexec.freeze` returns.

    Raises
    ------
    TypeError
        If ``model`` or ``policy`` is not an nn.Module.
    ValueError
        If a file is missing, damaged or invalid, naming the file and the problem; if ``model`` does not match the saved
        weights, listing all differences; if it does not run on the example, on the CPU; or if torch cannot use
        ``device``.
    RuntimeError
        If the network cannot be frozen here, or its results are not those of the saved network.
    ImportError
        If the package safetensors is not installed.
    """
    for name, value in (("model", model), ("policy", policy)):
        if value is not None and not isinstance(value, nn.Module):
            raise TypeError(f"{name} must be an nn.Module or None, got {type(value).__name__}")
    if policy is not None and model is None:
        raise ValueError("policy must be None where no model is given")
    folder, device = Path(folder), torch.device(device)
    try:
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # of torch, built without it or finding none
        raise ValueError(f"device must be one that torch can use here, got {str(device)!r}: {error}") from error
    path = folder / MANIFEST
    manifest = Manifest.read(path)
    state = read_tensors(folder / WEIGHTS, manifest.files[WEIGHTS])
    try:
        example = Example.from_tensors(read_tensors(folder / EXAMPLE, manifest.files[EXAMPLE]))
    except KeyError as error:
        raise ValueError(f"{folder / EXAMPLE} is not an example that dynexec.save wrote: it has no {error}") from error
    net = build(manifest, path, state, model, policy)
    if (problem := example.misfit(net)) is not None:
        raise ValueError(f"{folder / EXAMPLE} is not of the network of {WEIGHTS}: {problem}")
    saved = manifest.options | {"dtype": DTYPES.get(manifest.options["dtype"])}
    inputs = example.tile(manifest.batch_size, device)
    try:
        frozen = freeze(net.to(device), inputs, **(saved | options))
    except RuntimeError as error:
        raise RuntimeError(f"{folder}: the network cannot be frozen here: {error}") from error
    dtypes = (frozen.dtype, next(net.parameters()).dtype)
    difference = example.difference(frozen, net, max(tolerance(dtype, device) for dtype in dtypes))
    if difference is not None:
        here = {name: version(name) for name in manifest.versions}
        raise RuntimeError(
            f"{folder}: the network is not what was saved: {difference}. Is model of the same code? It was saved by "
            f"{manifest.versions}, here are {here}"
        )
    return frozen
