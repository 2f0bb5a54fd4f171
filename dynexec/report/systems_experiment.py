"""One row of the bench of a system: candidates, equal outputs first, then times."""

import math
from copy import deepcopy
from functools import partial

import torch
from torch import nn

from dynexec.executors import freeze
from dynexec.executors.proof import TOLERANCE, relative_error
from dynexec.executors.routed import convert_inputs
from dynexec.measure.profile import ROUTED_LOSSES
from dynexec.measure.timing import compare
from dynexec.report.baselines import DenseCompiled, DenseEager, OnnxRuntime, OpenVino
from dynexec.report.experiment import PUBLISHED, allowed_error
from dynexec.report.libraries import export_module, open_in_onnx_runtime, open_in_openvino
from dynexec.report.rows import environment, now, speed_up

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
        outputs = [_masked(network, system, inputs, False, draw) for draw in draws]
        other = system.other(network, inputs).to(device)
        if relative_error(_masked(network, system, inputs, False, other), outputs[0]) <= 3 * TOLERANCE[dtype]:
            raise ValueError("the decisions must change the network's output, or equal outputs would prove nothing")
        errors = {
            key: max(relative_error(call(draw), output) for draw, output in zip(draws, outputs, strict=True))
            for key, call in candidates.items()
        }
        comparison = compare(
            {key: partial(_call_all, call, draws) for key, call in candidates.items()},
            baseline="dense eager" if "dense eager" in candidates else None,
            device=device,
            seconds=seconds,
            progress=lambda share, key: progress(share, f"timing {key}"),
        )
    flops = network.count_flops(inputs)
    needed = torch.stack([flops.of(draw.cpu()).double().mean() for draw in draws]).mean().item()
    most = allowed_error(errors, dtype)
    failed = [key for key, error in errors.items() if not error <= most]
    times = {
        key: {k: 1e3 * v / len(draws) for k, v in zip(("median", "p10", "p90", "cpu"), _numbers(timing))}
        for key, timing in comparison.timings.items()
        if key not in failed
    }
    kept = sum(system.kept(network, draw) for draw in draws) / len(draws)
    row = {
        "time": now(),
        **environment(device, dtype),
        "net": name,
        "image_size": system.size,
        "batch": batch,
        "unavailable": unavailable,
        "keep": kept,
        "kept": kept,
        "decisions": PUBLISHED,
        "draws": len(draws),
        "rounds": comparison.rounds,
        "flops_dense": flops.dense,
        "flops_needed": needed,
        "milliseconds": times,
        "planning_share": None,
        "spread": comparison.spread,
        "max_error": {key: error if math.isfinite(error) else None for key, error in errors.items()},
        "tolerance": most,
        "failed": failed,
        **speed_up(times, flops.dense, needed, [library.name for library in libraries]),
        "losses": {},
    }
    if not {"dynexec", "dense frozen"} & set(failed):
        frozen, *told = candidates["dynexec"].args
        profiles = [follow(partial(frozen.profile, rounds=2), *told, draw) for draw in draws]
        row["losses"] = _losses(row, profiles)
    return [row]


def _losses(row, profiles):
    """Return the milliseconds per forward that dynexec takes above its own dense time for the same FLOPs, by cause.

    The total is measured. The causes are those of the profiles, one for each draw; the rest is what remains.
    """
    times = row["milliseconds"]
    total = times["dynexec"]["median"] - times["dense frozen"]["median"] * row["flops_needed"] / row["flops_dense"]
    causes = {
        cause: 1e3 * sum(profile.losses[cause] for profile in profiles) / len(profiles)
        for cause in ROUTED_LOSSES
        if cause != "not explained"
    }
    return {"total": total, **causes, "rest": total - sum(causes.values())}


def _numbers(timing):
    return timing.median, timing.p10, timing.p90, timing.cpu_median


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
            unavailable[library.name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
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
