"""Measures where the time of a :class:`FrozenRouted` goes."""

from collections import defaultdict
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import torch
from torch.utils.flop_counter import FlopCounterMode

from dynexec.executors.parts import POLICY, count_part
from dynexec.executors.profile import Run, peak_flops, take_turns
from dynexec.measure.moves import MoveCounter
from dynexec.measure.profile import ROUTED_LOSSES, Part, Profile
from dynexec.measure.ranges import Recorder, Span
from dynexec.measure.rates import copy_rate

BETWEEN = "between parts", "between"


def profile_routed(network, inputs, decisions, samples, rounds, device, dtype):
    """Profile ``network``, which has frozen parts, on ``samples`` inputs; see :meth:`FrozenRouted.profile`."""
    calls = [lambda: network(inputs, decisions), lambda: network.run_dense(inputs)]
    counts = [Count(network, call) for call in calls]
    cases = [(call, lambda call=call: record(network, call, samples, device)) for call in calls]
    (measured, run), (dense, dense_run) = take_turns(cases, rounds, device)
    peak, bandwidth = peak_flops(device, dtype), copy_rate(device)
    works = {}
    for name in network.part_names():
        row = counts[0].rows.get(name, counts[1].rows.get(name))
        if row is not None:
            works[name] = count_part(network.get_submodule(name).function, row)
    parts = []
    for key in _keys(network, run, dense_run):
        name, kind = key
        times = run.parts.get(key, 0.0), dense_run.parts.get(key, 0.0)
        if name in works:
            work, ran, total = works[name], _rows(run, key), _rows(dense_run, key)
            flops, traffic = ran * work.flops, ran * work.traffic + work.weights if ran else 0
            kind = "part" if key in dense_run.parts else "policy"  # which looks at the inputs by parts, too
        else:
            ran = total = samples
            flops, traffic = counts[0].flops[key], counts[0].moved if key == BETWEEN else 0
        roofline = max(flops / peak, traffic / bandwidth)
        parts.append(Part(name, kind, None, ran, total or ran, flops, roofline, *times))
    dense_flops = sum(_rows(dense_run, (name, "part")) * work.flops for name, work in works.items())
    dense_flops += counts[1].flops[BETWEEN]
    kinds = {part.name: part.kind for part in parts}
    chosen = [part for part in parts if part.kind == "part"]
    return Profile(
        executor="routed",
        samples=samples,
        num_blocks=len(works),
        threads=torch.get_num_threads(),
        rounds=rounds,
        kept=sum(part.samples for part in chosen) / sum(part.total for part in chosen),
        peak=peak,
        bandwidth=bandwidth,
        flops=sum(part.flops for part in parts),
        dense_flops=dense_flops,
        measured=measured,
        dense=dense,
        parts=tuple(parts),
        losses=find_losses(parts, run, dense_run, measured, dense, dense_flops),
        moved=counts[0].moved,
        spans=tuple(span._replace(kind=kinds[span.name]) for span in run.spans),
    )


def record(network, call, samples, device):
    """Return the :class:`Run` of ``call()``, which runs ``network``."""
    begun = []
    with Recorder(device) as recorder:

        def leave(key, x):
            recorder.add(Span(0, *key, samples if key == POLICY else len(x), begun.pop(), recorder.mark()))

        with watching(network, lambda key, x: begun.append(recorder.mark()), leave), recorder.span(*BETWEEN, samples):
            call()
    run = Run(spans=tuple(own_times(recorder.spans())))
    for span in run.spans:
        run.parts[span.name, span.kind] += (span.end - span.begin) / 1e9
    return run


def own_times(spans):
    """Reduce nested spans to the times that each has for itself, in order of time."""
    for begin, end in pairwise(sorted({time for span in spans for time in (span.begin, span.end)})):
        around = [span for span in spans if span.begin <= begin and end <= span.end]
        yield max(around, key=lambda span: (span.begin, -span.end))._replace(begin=begin, end=end)


@contextmanager
def watching(network, enter, leave):
    """Call ``enter(key, x)`` and ``leave(key, x)`` around what runs a part on ``x``, and around ``policy.decide``."""
    policy = getattr(network, "policy", None)
    with ExitStack() as stack:
        for name in network.part_names():
            part, key = network.get_submodule(name), (name, "part")
            stack.enter_context(part.register_forward_pre_hook(lambda _, given, key=key: enter(key, *given)))
            stack.enter_context(part.register_forward_hook(lambda _, given, y, key=key: leave(key, *given)))
        if policy is not None:
            before, decide = vars(policy).get("decide"), policy.decide

            def watched(inputs):
                enter(POLICY, inputs)
                found = decide(inputs)
                leave(POLICY, inputs)
                return found

            policy.decide = watched
            stack.callback(setattr, policy, "decide", before) if before else stack.callback(delattr, policy, "decide")
        yield


class Count:
    """Counts what one call needs.

    Attributes
    ----------
    flops : dict
        FLOPs of the policy and between the parts, by key; a multiply-add counts as two.
    moved : int
        Bytes moved outside of the parts.
    rows : dict
        The first row that each part runs on, by name.
    """

    def __init__(self, network, call):
        self.flops, self.rows = defaultdict(int), {}
        inside, last = [BETWEEN], 0
        with FlopCounterMode(display=False) as flops, MoveCounter() as moves:

            def change():
                nonlocal last
                self.flops[inside[-1]] += flops.get_total_flops() - last
                last = flops.get_total_flops()

            def enter(key, x):
                change()
                inside.append(key)
                moves.paused = key != POLICY
                if key != POLICY:
                    self.rows.setdefault(key[0], x[:1])

            def leave(key, x):
                change()
                inside.pop()
                moves.paused = False

            with watching(network, enter, leave):
                call()
            change()
        self.moved = moves.bytes


def find_losses(parts, run, dense_run, measured, dense, dense_flops):
    """Compute the seconds lost, by cause.

    With s the share of the dense FLOPs that is needed, each time loses its excess over s times that of the dense run;
    for a part, this excess is split at the time that its rows take in the dense run.
    """
    losses = dict.fromkeys(ROUTED_LOSSES, 0.0)
    share = sum(part.flops for part in parts if part.kind != "policy") / dense_flops
    for part in parts:
        if part.kind == "policy":
            losses["policy"] += part.measured - dense * part.flops / dense_flops
        elif part.kind == "between":
            losses["between parts"] += part.measured - share * part.dense
        else:
            losses["fewer rows at once"] += part.measured - part.theoretical
            losses["parts of unequal speed"] += part.theoretical - share * part.dense
    losses["not explained"] = measured - run.total - share * (dense - dense_run.total)
    return losses


def _keys(network, run, dense_run):
    """Return the keys of what ran, in the order of the network's parts."""
    found = [POLICY, *((name, "part") for name in network.part_names()), BETWEEN]
    return [key for key in found if key in run.parts or key in dense_run.parts]


def _rows(run, key):
    return sum(span.samples for span in run.spans if (span.name, span.kind) == key)
