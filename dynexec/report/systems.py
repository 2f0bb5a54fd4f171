"""The bench of systems that choose among parts: AdaShare, AR-Net, AdaMML, at the decision rates that were published.

Their dense network is every part computed for every row, as published code does before it multiplies by a mask.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from dynexec.executors import freeze
from dynexec.executors.proof import TOLERANCE, relative_error
from dynexec.executors.routed import convert_inputs
from dynexec.measure.timing import compare
from dynexec.models import create_model, published_policy
from dynexec.models.arnet_policy import rule
from dynexec.nn.routed import RoutedNetwork
from dynexec.report.baselines import DenseCompiled, DenseEager, OnnxRuntime, OpenVino
from dynexec.report.experiment import PUBLISHED, allowed_error
from dynexec.report.nets import draw_batch_norm, make_images
from dynexec.report.rows import environment, now, speed_up

LIBRARIES = (DenseEager, DenseCompiled, OnnxRuntime, OpenVino)
#: Decisions that a timed call goes through.
DRAWS = 2


def _obey(policy, decisions):
    own = policy.decide

    def decide(inputs):
        own(inputs)
        return decisions

    return decide


@dataclass(frozen=True)
class System:
    """A routed network of the bench.

    Attributes
    ----------
    build : callable
        Gives the network, with fresh weights.
    inputs : callable
        ``inputs(batch)``.
    draw : callable
        ``draw(network, inputs, generator)``: :data:`DRAWS` decisions that together are at the published rates.
    weights : callable
        ``weights(decisions)``: the soft decisions that stand for them.
    size : int
        Height and width of its images.
    batches : tuple of int
        Batch sizes measured unless others are asked for.
    policy : bool
        Whether masked execution runs the policy beside everything else; of AR-Net it is one of the predictors.
    obey : callable
        ``obey(policy, decisions)`` gives a function in place of ``policy.decide`` that computes all that this does, and
        decides as it is told.
    """

    build: Callable[[], RoutedNetwork]
    inputs: Callable
    draw: Callable
    weights: Callable
    size: int
    batches: tuple[int, ...] = (1,)
    policy: bool = True
    obey: Callable = _obey

    def missing(self):
        """Why it cannot be built here, or None."""
        return None


def _adashare(name, policy, tasks):
    return System(
        lambda: create_model(name, num_classes=tasks),
        lambda batch: make_images(batch, 224),
        lambda network, inputs, generator: [published_policy(policy)] * DRAWS,
        lambda decisions: decisions.float(),
        224,
        policy=False,
    )


def _obey_on_frames(policy, decisions):
    """Of AR-Net, whose skips hold the state that lite predictions are made of."""
    skipped = rule(decisions, policy.spans)[1]

    def decide(frames):
        hidden = policy.hidden_states(frames, torch.ones_like(skipped), skipped)
        policy.linear(hidden.flatten(0, 1))
        return decisions, hidden

    return decide


# Of AR-Net's actions: about what gives the published cost per frame, below, by the authors' accounting.
_SHARES = torch.tensor([0.58, 0.10, 0.05, 0.05, 0.08, 0.07, 0.07])
#: GFLOPs per frame on ActivityNet (table 3 of the paper).
ARNET_COSTS = {"arnet_resnet": 2.09, "arnet_efficientnet": 0.96}


def draw_actions(network, inputs, generator, cost):
    """Of many random ones the :data:`DRAWS` decisions of AR-Net that come nearest to a cost per frame."""
    shape, flops = inputs.shape[:2], network.count_flops(inputs)
    pool = [torch.multinomial(_SHARES, shape.numel(), True, generator=generator).view(shape) for _ in range(200)]
    return sorted(pool, key=lambda decisions: abs(flops.published(decisions) - cost))[:DRAWS]


def _arnet(name, cost):
    return System(
        lambda: create_model(name),
        lambda batch: make_images(16 * batch, 224).unflatten(0, (batch, 16)),
        partial(draw_actions, cost=cost),
        lambda decisions: F.one_hot(decisions, len(_SHARES)).float(),
        224,
        policy=False,
        obey=_obey_on_frames,
    )


def draw_modalities(network, inputs, generator, names, shares):
    """Decisions of AdaMML that select each modality, named in order, in its share of all segments, at random ones."""
    samples, segments = inputs[names[0]].shape[:2]
    total = DRAWS * samples * segments
    columns = [torch.randperm(total, generator=generator) < round(share * total) for share in shares]
    return list(torch.stack(columns, -1).view(DRAWS, samples, segments, len(names)))


def _adamml(modalities, shares, **options):
    channels = {"rgb": 3, "rgbdiff": 15, "flow": 10}

    def inputs(batch):
        names = [*modalities, *(["rgbdiff"] if "flow" in modalities else [])]
        found = {}
        for number, name in enumerate(names):
            frames, depth, size = (1, 1, 256) if name == "sound" else (8, channels[name], 224)
            images = make_images(batch * 10 * frames, size, seed=number, channels=depth)
            found[name] = images.unflatten(0, (batch, 10, frames))
        return found

    return System(
        lambda: create_model("adamml", modalities=modalities, **options),
        inputs,
        partial(draw_modalities, names=modalities, shares=shares),
        lambda decisions: decisions.float(),
        224,
    )


#: Name to system. Rates: AdaShare's published policies; AdaMML's usage of RGB, flow and sound on Kinetics-Sounds.
SYSTEMS = {
    "adashare_cityscapes": _adashare("adashare_resnet34", "cityscapes_2_tasks_resnet34", [19, 1]),
    "adashare_nyu_v2": _adashare("adashare_resnet34", "nyu_v2_3_tasks_resnet34", [40, 3, 1]),
    **{name: _arnet(name, cost) for name, cost in ARNET_COSTS.items()},
    "adamml_rgb_flow_sound": _adamml(("rgb", "flow", "sound"), (0.5506, 0.2682, 0.9512)),
    "adamml_rgb_sound": _adamml(("rgb", "sound"), (0.5506, 0.9512)),
}


def build_system(system, *, seed=0):
    """Build a system of the bench in evaluation mode, the same every time; see :func:`dynexec.report.nets.build`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, inputs = system.build(), system.inputs(1)
        everything = _everything(system, network, inputs)

        def run():
            network(inputs, soft_decisions=everything)
            if system.policy:
                network.policy.decide(inputs)

        draw_batch_norm(network, run)
    return network.eval().requires_grad_(False)


def _everything(system, network, inputs):
    """Weights of soft decisions under which every part counts."""
    decisions = network.example_decisions(inputs)[0]
    return torch.full_like(system.weights(decisions), 0.5)


def run_system(network, system, batch, *, name, libraries=LIBRARIES, dtype=torch.float32, seconds=30.0, progress=None):
    """Compare dynexec with baselines at the published rates: equal outputs first, then times.

    Candidates: ``masked eager``, everything computed and weighted, with the policy; ``naive gather``, the routed
    network as it is, in eager mode; ``dynexec``, the same frozen; ``dense frozen`` and those of ``libraries``:
    everything, the parts by dynexec or by a library. Where the policy runs, its decisions are replaced by drawn ones.

    Runs on the device of ``network``, which is float32; the candidates compute in ``dtype``, and their outputs are
    compared with its own.

    Returns
    -------
    list with one dict
        A row as of :func:`dynexec.report.experiment.run_experiment`; ``kept`` is the mean of the decisions' weights.
    """
    progress = progress or (lambda share, text: None)
    device = next(network.parameters()).device
    inputs = system.inputs(batch)
    draws = [draw.to(device) for draw in system.draw(network, inputs, torch.Generator().manual_seed(0))]
    inputs = convert_inputs(inputs, device=device)
    libraries = [library for library in libraries if library.device in (None, device.type)]
    with torch.inference_mode():
        given = network if dtype == torch.float32 else deepcopy(network).to(dtype)
        candidates, unavailable = _prepare(given, system, convert_inputs(inputs, dtype), libraries, progress)
        progress(0.0, "comparing outputs")
        outputs = [_masked(network, system, inputs, False, draw) for draw in draws]
        everything = network(inputs, soft_decisions=torch.ones_like(system.weights(draws[0])))
        if relative_error(everything, outputs[0]) <= 3 * TOLERANCE[dtype]:
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
        key: {k: 1e3 * v / DRAWS for k, v in zip(("median", "p10", "p90", "cpu"), _numbers(timing))}
        for key, timing in comparison.timings.items()
        if key not in failed
    }
    kept = torch.stack([system.weights(draw).double().mean() for draw in draws]).mean().item()
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
        "seed": 0,
        "draws": DRAWS,
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
    return [row]


def _numbers(timing):
    return timing.median, timing.p10, timing.p90, timing.cpu_median


def _call_all(call, draws):
    for draw in draws:
        call(draw)


def _prepare(network, system, inputs, libraries, progress):
    """Candidates as functions of decisions, and why others cannot run here."""
    eager = deepcopy(network).to(memory_format=torch.channels_last)
    progress(0.0, "preparing dynexec")
    frozen = freeze(network, inputs)
    candidates = {
        "masked eager": partial(_masked, eager, system, inputs, system.policy),
        "naive gather": partial(_follow, eager, eager.policy, system, inputs),
        "dynexec": partial(_follow, frozen, frozen.network.policy, system, inputs),
        "dense frozen": partial(_masked, frozen, system, inputs, False),
    }
    unavailable = {}
    for number, library in enumerate(libraries):
        if (reason := library.missing()) is not None:
            unavailable[library.name] = reason
            continue
        progress(number / len(libraries), f"preparing {library.name}")
        try:
            copy = _with_parts_by(library, network)
            call = partial(_masked, copy, system, inputs, False)
            call(network.example_decisions(inputs)[0])
        except Exception as error:  # of somebody else's library, on a network it may not know
            unavailable[library.name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        candidates[library.name] = call
    return candidates, unavailable


def _masked(network, system, inputs, policy, decisions):
    """Everything, weighted; after the policy, if it is asked for."""
    if policy:
        network.policy.decide(inputs)
    return network(inputs, None, soft_decisions=system.weights(decisions))


def _follow(network, policy, system, inputs, decisions):
    """The network with its policy, which decides as it is told."""
    policy.decide = system.obey(policy, decisions)
    try:
        return network(inputs)
    finally:
        del policy.decide


class _Part(nn.Module):
    """A part as a library runs it, prepared for the shape that it is first called with."""

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
        if library is DenseCompiled:
            part = part.to(memory_format=torch.channels_last)
            part.compile(dynamic=False, fullgraph=True, options={"freezing": True})
        elif library is DenseEager:
            part = part.to(memory_format=torch.channels_last)
        elif not isinstance(part, nn.Linear):
            part = _Part(library, part)
        setattr(copy.get_submodule(parent), child, part)
    if library is DenseCompiled:
        torch.compiler.reset()  # the code of earlier networks counts against a limit
    return copy
