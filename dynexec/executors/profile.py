"""Measures where the time of a :class:`FrozenNetwork` goes."""

import gc
import time
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import fx

from dynexec.executors.costs import time_call
from dynexec.executors.emit import layer_name
from dynexec.executors.engine import Program, engine_missing, peak_rate
from dynexec.executors.parts import POLICY, Work, columns, find_parts
from dynexec.executors.segment import Segment
from dynexec.executors.stage import Stage
from dynexec.measure.moves import MoveCounter
from dynexec.measure.profile import LOSSES, Part, Profile
from dynexec.measure.ranges import Recorder, Span
from dynexec.measure.rates import copy_rate, matrix_rate

PLANNING = "planning", "planning"
# So long a GPU waits before a call that is taken down, in its cycles: while it does, the host queues the launches, and
# what the GPU's clock tells is not how long the host took. The host may take this many seconds.
_SLEEP_PER_SECOND, _LONGEST_SLEEP = 2e9, 0.5


@dataclass
class Run:
    """One recorded call: seconds by part (name, kind), of idle threads, and of calling the engine."""

    parts: dict = field(default_factory=lambda: defaultdict(float))
    idle: float = 0.0
    launches: float = 0.0
    spans: tuple = ()

    @property
    def total(self):
        """Seconds of everything that is accounted for."""
        return sum(self.parts.values()) + self.idle + self.launches


def profile(frozen, x, decisions, rounds):
    """Profile a frozen network, see :meth:`FrozenNetwork.profile`; arguments as for :meth:`FrozenNetwork.call`."""
    everything = torch.ones(len(x), frozen.num_blocks, dtype=torch.bool, device=x.device)
    decided = frozen.decide(x) if decisions is None else decisions
    cases = []
    for given, known in ((decisions, decided), (everything, everything)):
        what = frozen, x, given, frozen.executor_for(known)
        cases.append((partial(frozen.call, x, given), lambda what=what: record(*what)[1]))
    (measured, run), (dense, dense_run) = take_turns(cases, rounds, x.device)
    decisions, works = decided, find_parts(frozen, x)
    if POLICY not in run.parts:
        works.pop(POLICY, None)
    rates = peak_flops(x.device, x.dtype), copy_rate(x.device)
    parts = _make_parts(frozen, works, decisions, run, dense_run, rates)
    dense_flops = len(x) * sum(work.flops for (_, kind), work in works.items() if kind not in ("policy", "other"))
    losses = find_losses(parts, run, dense_run, measured, dense, dense_flops)
    moved = frozen.predict_losses(decisions)
    for cause in ("row moves", "dropped rows computed"):
        losses[cause] = moved[cause]
        losses["under-filled hardware"] -= moved[cause]
    samples = {(part.name, part.kind): part.samples for part in parts}
    spans = [
        span if span.samples is not None else span._replace(samples=samples[span.name, span.kind]) for span in run.spans
    ]
    return Profile(
        executor=frozen.executor or "layers",
        samples=len(x),
        num_blocks=frozen.num_blocks,
        threads=torch.get_num_threads(),
        rounds=rounds,
        kept=decisions.double().mean().item(),
        peak=rates[0],
        bandwidth=rates[1],
        flops=sum(part.flops for part in parts),
        dense_flops=dense_flops,
        measured=measured,
        dense=dense,
        parts=parts,
        losses={cause: losses[cause] for cause in LOSSES},
        moved=_count_moved(frozen, x, decisions),
        spans=tuple(spans),
    )


def record(frozen, x, decisions, executor):
    """Return the output of one call with this executor, and the :class:`Run` of its times."""
    run, outputs, engine_spans = Run(), [], []
    with torch.no_grad(), frozen.using(executor), Recorder(x.device) as recorder:
        if decisions is None:
            with recorder.span(*POLICY, len(x)):
                decisions = frozen.decide(x)
        for images, decided in zip(*frozen.split(x, decisions), strict=True):
            with recorder.span(*PLANNING, len(images)):
                plan = frozen.plan(decided)
            network = _Recorded(frozen.network.__self__, recorder, run, engine_spans, len(images))
            outputs.append(network.run(images, plan))
    spans = _split_by_weights(recorder.spans(), frozen, decisions)
    for span in spans:
        run.parts[span.name, span.kind] += (span.end - span.begin) / 1e9
    run.spans = tuple(sorted((*spans, *engine_spans), key=lambda span: (span.thread, span.begin)))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)), run


def _split_by_weights(spans, frozen, decisions):
    """Split spans of launches for both sets of weights into one of each, in proportion to the samples."""
    found, column_of = [], columns(frozen)
    counts = decisions.sum(0).tolist() if any(span.kind == "both" for span in spans) else None
    for span in spans:
        if span.kind != "both":
            found.append(span)
            continue
        share = counts[column_of[span.name]] / len(decisions)
        between = span.begin + round(share * (span.end - span.begin))
        found += [span._replace(kind="block", end=between), span._replace(kind="other", begin=between)]
    return found


class _Recorded(fx.Interpreter):
    """Runs a frozen graph node by node, and records the time of each."""

    def __init__(self, module, recorder, run, spans, samples):
        super().__init__(module)
        self.recorder, self.found, self.spans, self.samples = recorder, run, spans, samples

    def run_node(self, node):
        if isinstance(node.target, Stage) or not node.op.startswith("call"):
            return super().run_node(node)  # a stage's blocks say themselves what they do
        if isinstance(node.target, Segment):
            x, plan = self.fetch_args_kwargs_from_env(node)[0]
            program = node.target.find_program(x)
            if isinstance(program, Program):
                return self._run_engine(node.target, program, x, plan)
            if node.target.executor != "resident":
                return super().run_node(node)  # its launches do
        with self.recorder.span(layer_name(node), "layer", self.samples):
            return super().run_node(node)

    def _run_engine(self, segment, program, x, plan):
        start = self.recorder.mark()
        y, rows = program.profile(x, plan, **segment.options)
        seconds = (self.recorder.mark() - start) / 1e9
        rows, start = rows.tolist(), self.recorder.since(start)
        threads = len({thread for thread, *_ in rows})
        for thread, number, samples, begin, end in rows:
            part = program.instructions[number].part
            self.found.parts[part] += (end - begin) / 1e9 / threads
            self.spans.append(Span(thread, *part, samples, start + begin, start + end))
        busy = sum(end - begin for *_, begin, end in rows) / 1e9 / threads
        window = (max(row[4] for row in rows) - min(row[3] for row in rows)) / 1e9
        self.found.idle += window - busy
        self.found.launches += seconds - window
        return y.flatten(1) if segment.flat else y


def _make_parts(frozen, works, decisions, run, dense_run, rates):
    """Return the parts of a profile: planning, and those that have :class:`Work`, in their order."""
    total, column_of, counts = len(decisions), columns(frozen), decisions.sum(0).tolist()
    parts = []
    for key in dict.fromkeys((PLANNING, *works, *run.parts)):
        name, kind = key
        work, samples, column = works.get(key, Work()), total, None
        if kind in ("block", "other"):
            column = column_of[name]
            samples = counts[column] if kind == "block" else total - counts[column]
        arithmetic, traffic = samples * work.flops / rates[0], (samples * work.traffic + work.weights) / rates[1]
        roofline = max(arithmetic, traffic) if samples else 0.0
        times = run.parts.get(key, 0.0), dense_run.parts.get(key, 0.0)
        parts.append(Part(name, kind, column, samples, total, samples * work.flops, roofline, *times))
    return tuple(parts)


def find_losses(parts, run, dense_run, measured, dense, dense_flops):
    """Compute the seconds lost, by cause; moving rows and computing dropped ones are among what blocks lose.

    With s the share of the dense FLOPs that is needed, each time loses its excess over s times that of the dense run;
    for a block, this excess is split at the time that its samples take in the dense run.
    """
    losses = dict.fromkeys(LOSSES, 0.0)
    share = sum(part.flops for part in parts if part.kind != "policy") / dense_flops
    full = {part.name: part for part in parts if part.kind == "block"}
    for part in parts:
        if part.kind == "planning":
            losses["planning"] += part.measured - share * part.dense
        elif part.kind == "policy":
            losses["policy"] += part.measured - dense * part.flops / dense_flops
        elif part.kind in ("block", "other"):
            ideal = full[part.name].dense * part.samples / part.total
            losses["under-filled hardware"] += part.measured - ideal
            losses["dense remainder"] += ideal - share * part.dense
        else:
            losses["dense remainder"] += part.measured - share * part.dense
    losses["launches"] = run.launches - share * dense_run.launches
    losses["under-filled hardware"] += run.idle - share * dense_run.idle
    losses["not explained"] = measured - run.total - share * (dense - dense_run.total)
    return losses


def _count_moved(frozen, x, decisions):
    if frozen.segments and x.device.type == "cuda":
        return None
    with MoveCounter() as counter:
        for part in zip(*frozen.split(x, decisions), strict=True):
            frozen.run(*part)
    return counter.bytes


def check_rounds(rounds):
    """Raise ValueError unless ``rounds`` is an int of 1 or more."""
    if not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds must be an int of 1 or more, got {rounds!r}")


def take_turns(cases, rounds, device):
    """Return the least seconds and least :class:`Run` of each case: (function that calls, one that records a call)."""
    found, ahead = [([], []) for _ in cases], [0.0] * len(cases)
    on_gpu = device.type == "cuda"
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(-2 if on_gpu else -1, rounds):  # first a warm-up, and what tells how long the host takes
            for number, ((call, take_down), (walls, runs)) in enumerate(zip(cases, found, strict=True)):
                with torch.no_grad():
                    wall = time_call(call, device)
                if on_gpu:
                    torch.cuda._sleep(round(ahead[number] * _SLEEP_PER_SECOND))
                start = time.perf_counter()
                run = take_down()
                if turn >= 0:
                    walls.append(wall)
                    runs.append(run)
                elif turn == -1:
                    ahead[number] = min(time.perf_counter() - start, _LONGEST_SLEEP)
    finally:
        if collecting:
            gc.enable()
    return [(min(walls), _least(runs)) for walls, runs in found]


def _least(runs):
    """Return the least of each time: noise only ever adds."""
    parts = {part: min(run.parts[part] for run in runs) for part in runs[0].parts}
    return Run(parts, min(run.idle for run in runs), min(run.launches for run in runs), runs[-1].spans)


def peak_flops(device, dtype):
    """Return the FLOP per second of all threads: the engine's peak, or else that of a large matrix product."""
    if device.type == "cpu" and dtype == torch.float32 and engine_missing() is None:
        return torch.get_num_threads() * _engine_rate()
    return matrix_rate(device, dtype)


@cache
def _engine_rate():
    return peak_rate()
