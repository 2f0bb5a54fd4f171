"""One experiment of the bench: a network and a batch at several keep rates, all candidates in one interleaved run."""

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import torch

from dynexec.executors.proof import TOLERANCE, relative_error
from dynexec.measure.flops import count_flops
from dynexec.measure.timing import compare
from dynexec.nn.residual import count_blocks
from dynexec.report.baselines import BASELINES, REFERENCE, DenseFrozen, Dynexec
from dynexec.report.rows import environment, find_losses, make_row

BERNOULLI, PUBLISHED = "bernoulli", "published"
# At least this many samples are decided for: at small batches a timed call goes through several draws.
_MIN_DECIDED_SAMPLES = 8
_LARGEST_TOLERANCE = 0.1


@dataclass(frozen=True, eq=False)  # equal to itself alone: what is found of one is kept under it
class Setting:
    """The decisions of one row: ``draws`` of bool ``[N, L]``, made with ``keep`` in the way that ``kind`` names."""

    keep: float
    kind: str
    draws: tuple[torch.Tensor, ...]


def draw_decisions(keep, num_blocks, batch, *, policies=None):
    """Draw the decisions of one row, the same every time.

    Parameters
    ----------
    keep : float
        Probability that a (sample, block) pair is kept, independently of the others.
    num_blocks, batch : int
    policies : int, optional
        Draw this many different policies, and for every sample one of them: trained policies repeat themselves.

    Returns
    -------
    Setting
        Of kind "published" if ``policies`` is given, else "bernoulli".
    """
    if not 0.0 <= keep <= 1.0:
        raise ValueError(f"keep must be between 0 and 1, got {keep}")
    generator = torch.Generator().manual_seed(0)
    draws = []
    pool = None if policies is None else torch.rand(policies, num_blocks, generator=generator) < keep
    for _ in range(-(-_MIN_DECIDED_SAMPLES // batch)):
        if pool is None:
            draws.append(torch.rand(batch, num_blocks, generator=generator) < keep)
        else:
            draws.append(pool[torch.randint(len(pool), (batch,), generator=generator)])
    return Setting(float(keep), BERNOULLI if pool is None else PUBLISHED, tuple(draws))


def run_experiment(
    model,
    images,
    settings,
    *,
    name,
    baselines=BASELINES,
    executor=Dynexec,
    dtype=torch.float32,
    seconds=30.0,
    progress=None,
):
    """Compare dynexec with baselines: equal outputs first, then times.

    Parameters
    ----------
    model : nn.Module
        With dynamic blocks, in evaluation mode, float32. Its own policy network, if any, runs only in settings of the
        kind "published".
    images : float32 tensor ``[N, C, H, W]``
        On the device of the model.
    settings : sequence of Setting
    name : str
        Name of the network in rows.
    baselines : sequence of Baseline classes
    executor : subclass of Dynexec
        What stands for dynexec.
    dtype : torch.dtype
        Dtype in which all candidates compute. Their outputs are compared with the reference's in float32.
    seconds : float
        Time for the timed rounds; at least five are made.
    progress : callable, optional
        Called with the share done (0 to 1) and the current step.

    Returns
    -------
    list of dict
        One row per setting, see :data:`dynexec.report.rows.SCHEMA`. A candidate whose output is not the reference's is
        named in ``failed`` and has no time.

    Raises
    ------
    ValueError
        If the decisions do not change the network's output, so that equal outputs would prove nothing.
    """
    if len({len(setting.draws) for setting in settings}) > 1:
        raise ValueError("settings must have equally many draws: a dense network is timed once for all")
    progress = progress or (lambda share, text: None)
    images = images.contiguous()
    settings = [replace(setting, draws=tuple(draw.to(images.device) for draw in setting.draws)) for setting in settings]
    narrow = images.to(dtype)
    with torch.inference_mode():
        given = model if dtype == torch.float32 else deepcopy(model).to(dtype)
        candidates, unavailable = _prepare(given, narrow, (executor, *baselines), progress)
        progress(0.0, "comparing outputs")
        errors = _errors(model, images, narrow, settings, candidates)
        frozen = next(candidate.model for candidate in candidates if isinstance(candidate, executor))
        exact, images = images, narrow
        calls = _calls(candidates, images, settings, frozen)
        comparison = compare(
            calls,
            baseline=next((key for key in calls if key[0] == "dense eager"), None),
            device=images.device,
            seconds=seconds,
            progress=lambda share, key: progress(share, f"timing {key[0]}"),
        )
    flops = count_flops(model, exact)
    common = environment(images.device, dtype) | {
        "net": name,
        "image_size": images.shape[-1],
        "batch": len(images),
        "unavailable": unavailable,
    }
    dense = [candidate.name for candidate in candidates if candidate.dense and not candidate.own]
    rows = [
        _row(common, setting, errors[setting], allowed_error(errors[setting], dtype), comparison, flops, dense)
        for setting in settings
    ]
    for row, setting in zip(rows, settings, strict=True):
        # Causes are what the cost model of its executor predicts.
        row["losses"] = find_losses(row, frozen.predict_losses, setting.draws)
    return rows


def _prepare(model, images, classes, progress):
    """Return the candidates that can run here, and why others cannot."""
    candidates, unavailable = [], {}
    classes = [candidate for candidate in classes if candidate.device in (None, images.device.type)]
    for number, candidate in enumerate(classes):
        if (reason := candidate.missing()) is not None:
            unavailable[candidate.name] = reason
            continue
        progress(number / len(classes), f"preparing {candidate.name}")
        try:
            if issubclass(candidate, DenseFrozen):
                candidates.append(candidate.like(candidates[0]))  # the first one is dynexec's
                continue
            candidates.append(candidate(model, images, threads=torch.get_num_threads()))
        except Exception as error:  # of somebody else's library, on a network it may not know
            if candidate.own:
                raise
            unavailable[candidate.name] = describe_error(error)
    return candidates, unavailable


def _errors(model, images, narrow, settings, candidates):
    """Map setting to candidate to largest difference from the reference over all draws; candidates get ``narrow``."""
    reference = REFERENCE(model, images, threads=torch.get_num_threads())
    full = torch.ones_like(settings[0].draws[0])
    dense_output = reference(images, full)
    if not dense_output.isfinite().all():
        raise ValueError("the model's output must be finite, or equal outputs would prove nothing")
    dense_errors = {c.name: relative_error(c(narrow, full), dense_output) for c in candidates if c.dense}
    errors = {}
    for setting in settings:
        outputs = [reference(images, draw) for draw in setting.draws]
        dropping = [output for output, draw in zip(outputs, setting.draws, strict=True) if not draw.all()]
        tolerance = TOLERANCE[narrow.dtype]
        if dropping and all(relative_error(output, dense_output) <= 3 * tolerance for output in dropping):
            raise ValueError("the decisions must change the model's output, or equal outputs would prove nothing")
        errors[setting] = dict(dense_errors)
        for candidate in candidates:
            if not candidate.dense:
                errors[setting][candidate.name] = max(
                    relative_error(candidate(narrow, draw), output)
                    for draw, output in zip(setting.draws, outputs, strict=True)
                )
    return errors


def allowed_error(errors, dtype):
    """Return the largest error that counts as equal.

    In 16 bits deep networks amplify rounding: twice the difference of masked eager itself from float32 is allowed.
    """
    own = errors.get(REFERENCE.name, 0.0) if dtype != torch.float32 else 0.0
    return max(TOLERANCE[dtype], min(2 * own, _LARGEST_TOLERANCE))


def _calls(candidates, images, settings, frozen):
    """Return what to time, by (candidate, setting or None if the time holds for all)."""
    calls = {}
    for candidate in candidates:
        for setting in settings:
            policy = candidate.policy if setting.kind == PUBLISHED and not candidate.dense else None
            per_setting = candidate.follows_decisions or policy is not None
            key = candidate.name, setting if per_setting else None
            calls.setdefault(key, partial(_forward, candidate, policy, images, setting.draws))
    if frozen.graphs is None:  # in a graph nothing shows what planning alone takes
        for setting in settings:
            calls[("planning", setting)] = partial(_plan, frozen, setting.draws)
    return calls


def _forward(candidate, policy, images, draws):
    for draw in draws:
        if policy is not None:
            policy(images)
        candidate(images, draw)


def _plan(frozen, draws):
    for draw in draws:
        frozen.plan(draw)


def _row(common, setting, errors, tolerance, comparison, flops, dense):
    timings = {}
    for (name, timed), timing in comparison.timings.items():
        # The time of this very setting goes before one that holds for all.
        if timed is setting or (timed is None and (name, setting) not in comparison.timings):
            timings[name] = timing
    planning = timings.pop("planning", None)
    idle = 0 if setting.kind == PUBLISHED else flops.policy
    known = common | {
        "keep": setting.keep,
        "kept": torch.stack(setting.draws).double().mean().item(),
        "decisions": setting.kind,
        "draws": len(setting.draws),
        "flops_dense": flops.dense,
        "flops_needed": torch.cat([flops.of(draw.cpu()) for draw in setting.draws]).double().mean().item() - idle,
    }
    return make_row(known, comparison, timings, errors, tolerance, dense, planning=planning)


def describe_error(error):
    """The kind of an exception and the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def num_blocks(model):
    """Return L of a model, with or without a policy."""
    return count_blocks(getattr(model, "backbone", model))
