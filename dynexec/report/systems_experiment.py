"""One row of the bench of a system: candidates, equal outputs first, then times."""

from copy import deepcopy
from functools import partial

import torch
from torch import nn

from dynexec.executors import freeze
from dynexec.executors.proof import TOLERANCE, relative_error
from dynexec.executors.routed import convert_inputs
from dynexec.measure.timing import compare
from dynexec.report.baselines import DenseCompiled, DenseEager, OnnxRuntime, OpenVino
from dynexec.report.experiment import PUBLISHED, allowed_error, describe_error
from dynexec.report.libraries import export_module, open_in_onnx_runtime, open_in_openvino
from dynexec.report.rows import environment, find_losses, make_row

LIBRARIES = (DenseEager, DenseCompiled, OnnxRuntime, OpenVino)


def run_system(network, system, batch, *, name, libraries=LIBRARIES, dtype=torch.float32, seconds=30.0, progress=None):
    """Compare dynexec with baselines at the published rates: equal outputs first, then times.

    Candidates: ``masked eager``: everything computed and weighted, with the policy. ``naive gather``: the unchanged
    routed network in eager mode. ``dynexec``: the same, frozen. ``dense frozen`` and those of ``libraries``:
    everything, by dynexec or by a library. ``..., fixed policy``: if the policy is the same for all inputs, a library
    with a static network for it. Where a policy network runs, its decisions are replaced by drawn ones.

    Runs on the device of ``network``, which is float32; the candidates compute in ``dtype``, and their outputs are
    compared with its own.

    Returns
    -------
    list with one dict
        A row as returned by :func:`dynexec.report.experiment.run_experiment`.
    """
    progress = progress or (lambda share, text: None)
    device = next(network.parameters()).device
    inputs = system.inputs(batch)
    draws = [draw.to(device) for draw in system.draw(network, inputs, torch.Generator().manual_seed(0))]
    inputs = convert_inputs(inputs, device=device)
    libraries = [library for library in libraries if library.device in (None, device.type)]
    with torch.inference_mode():
        given = network if dtype == torch.float32 else deepcopy(network).to(dtype)
        narrow = convert_inputs(inputs, dtype)
        candidates, unavailable = _prepare(given, system, narrow, draws, libraries, progress)
        progress(0.0, "comparing outputs")
        errors = _errors(network, system, inputs, draws, candidates, dtype)
        comparison = compare(
            {key: partial(_call_all, call, draws) for key, call in candidates.items()},
            baseline="dense eager" if "dense eager" in candidates else None,
            device=device,
            seconds=seconds,
            progress=lambda share, key: progress(share, f"timing {key}"),
        )
    known = environment(device, dtype) | {"net": name, "batch": batch, "unavailable": unavailable}
    known |= _columns(network, system, inputs, draws)
    dense = [library.name for library in libraries]
    row = make_row(known, comparison, comparison.timings, errors, allowed_error(errors, dtype), dense)
    frozen, *told = candidates["dynexec"].args
    row["losses"] = find_losses(row, partial(_profile_losses, frozen, told), draws)
    return [row]


def _errors(network, system, inputs, draws, candidates, dtype):
    """Candidate -> largest difference from the output of ``network`` over all draws."""
    outputs = [_masked(network, system, inputs, False, draw) for draw in draws]
    other = system.other(network, inputs).to(draws[0].device)
    if relative_error(_masked(network, system, inputs, False, other), outputs[0]) <= 3 * TOLERANCE[dtype]:
        raise ValueError("the decisions must change the network's output, or equal outputs would prove nothing")
    return {
        key: max(relative_error(call(draw), output) for draw, output in zip(draws, outputs, strict=True))
        for key, call in candidates.items()
    }


def _columns(network, system, inputs, draws):
    """The columns of a row that follow from the system and its decisions."""
    flops = network.count_flops(inputs)
    kept = sum(system.kept(network, draw) for draw in draws) / len(draws)
    return {
        "image_size": system.size,
        "keep": kept,
        "kept": kept,
        "decisions": PUBLISHED,
        "draws": len(draws),
        "flops_dense": flops.dense,
        "flops_needed": torch.stack([flops.of(draw.cpu()).double().mean() for draw in draws]).mean().item(),
    }


def _profile_losses(frozen, told, draw):
    """Seconds that ``frozen`` loses to each cause that its profile knows."""
    profile = follow(partial(frozen.profile, rounds=2), *told, draw)
    return {cause: seconds for cause, seconds in profile.losses.items() if cause != "not explained"}


def _call_all(call, draws):
    for draw in draws:
        call(draw)


def _prepare(network, system, inputs, draws, libraries, progress):
    """Return candidates as functions of decisions, and why others cannot run here."""
    eager = deepcopy(network).to(memory_format=torch.channels_last)
    progress(0.0, "preparing dynexec")
    frozen = freeze(network, inputs)
    candidates = {
        "masked eager": partial(_masked, eager, system, inputs, system.policy),
        "naive gather": partial(follow, eager, getattr(eager, "policy", None), system, inputs),
        "dynexec": partial(follow, frozen, getattr(frozen.network, "policy", None), system, inputs),
        "dense frozen": partial(_masked, frozen, system, inputs, False),
    }
    unavailable = {}
    for number, library in enumerate(libraries):
        if (reason := library.missing()) is not None:
            unavailable[library.name] = reason
            continue
        progress(number / len(libraries), f"preparing {library.name}")
        try:
            found = _by_library(library, network, system, inputs, draws)
            for call in found.values():
                call(draws[0])
        except Exception as error:  # of somebody else's library, on a network it may not know
            unavailable[library.name] = describe_error(error)
            continue
        candidates |= found
    return candidates, unavailable


def _by_library(library, network, system, inputs, draws):
    """Return a network by a library as functions of decisions: everything, and its one policy, if it has one."""
    if library is DenseCompiled:
        torch.compiler.reset()  # the code of earlier networks counts against a limit
    if system.whole is None:
        return {library.name: partial(_masked, _with_parts_by(library, network), system, inputs, False)}
    weights = system.weights(draws[0])
    dense = _open(library, system.whole(network).eval(), inputs, weights)
    fixed = _open(library, system.whole(network, draws[0]).eval(), inputs)
    return {
        library.name: lambda decisions: dense(inputs, system.weights(decisions)),
        f"{library.name}, fixed policy": lambda decisions: fixed(inputs),
    }


def _open(library, module, *inputs):
    """Return a module as the library runs it: a function of tensors."""
    if library in (OnnxRuntime, OpenVino):
        content = export_module(module, *inputs)
        return (open_in_onnx_runtime if library is OnnxRuntime else open_in_openvino)(content, torch.get_num_threads())
    module = module.to(memory_format=torch.channels_last)
    if library is DenseCompiled:
        module.compile(dynamic=False, fullgraph=True, options={"freezing": True})
    return module


def _masked(network, system, inputs, policy, decisions):
    """Compute everything, weighted; after the policy, if asked for."""
    if policy:
        network.policy.decide(inputs)
    return system.run_masked(network, inputs, decisions)


def follow(network, policy, system, inputs, decisions):
    """Call ``network(inputs)`` with its policy made to return ``decisions``.

    Without a policy, call ``network(inputs, decisions)``.
    """
    if policy is None:
        return network(inputs, decisions)
    policy.decide = system.obey(policy, decisions)
    try:
        return network(inputs)
    finally:
        del policy.decide


class _Part(nn.Module):
    """A part as a library runs it, prepared for the shape of its first call."""

    def __init__(self, library, part):
        super().__init__()
        self.library, self.part, self.ready = library, part, None

    def forward(self, x):
        if self.ready is None:
            self.ready = self.library(self.part, x, threads=torch.get_num_threads())
        return self.ready(x, None)


def _with_parts_by(library, network):
    copy = deepcopy(network)
    for name in copy.part_names():
        parent, _, child = name.rpartition(".")
        part = copy.get_submodule(name)
        if isinstance(part, nn.Linear):
            continue  # torch compiles none of its own layers alone, and a session for it would cost more than it does
        if library is DenseCompiled:
            part = part.to(memory_format=torch.channels_last)
            part.compile(dynamic=False, fullgraph=True, options={"freezing": True})
        elif library is DenseEager:
            part = part.to(memory_format=torch.channels_last)
        else:
            part = _Part(library, part)
        setattr(copy.get_submodule(parent), child, part)
    return copy
