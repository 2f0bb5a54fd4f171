"""Where the time of a frozen network went: per part, and what is lost by cause."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from dynexec.files import replacing
from dynexec.measure.ranges import Span

#: What time is lost to, in the order of :attr:`Profile.losses`.
LOSSES = (
    "planning",
    "policy",
    "launches",
    "row moves",
    "dropped rows computed",
    "under-filled hardware",
    "dense remainder",
    "not explained",
)


@dataclass(frozen=True)
class Part:
    """A part of a network: a block, a shortcut, a layer that all samples run, the policy, or planning.

    Attributes
    ----------
    name : str
    kind : str
        As of a :class:`Span`.
    column : int, optional
        Of the decisions.
    samples : int
        How many run it.
    flops : int
        For these. A multiply-add counts as two, a convolution as its direct algorithm.
    roofline : float
        Seconds for these if the machine did its best: of its arithmetic and its memory traffic, weights, input and
        output each moved once, the longer one.
    measured : float
        Seconds.
    dense : float
        Seconds where all samples keep all blocks.
    """

    name: str
    kind: str
    column: int | None
    samples: int
    flops: int
    roofline: float
    measured: float
    dense: float


@dataclass(frozen=True)
class Profile:
    """What :meth:`FrozenNetwork.profile` gives; ``print`` shows a table. Times are in seconds.

    Attributes
    ----------
    executor : str
        Which one ran, or "layers".
    samples, num_blocks, threads, rounds : int
    kept : float
        Share of the (sample, block) pairs that are kept.
    peak, bandwidth : float
        The machine's FLOP and bytes per second, with all of these threads.
    flops, dense_flops : int
        Of the batch, as needed (the policy included) and with everything kept (without one).
    measured, dense : float
        Of an ordinary call, and of one in which all samples keep all blocks.
    parts : tuple of Part
        In the order in which they run.
    losses : dict of str to float
        Seconds by cause, see :data:`LOSSES`; their sum is ``measured - theoretical``.
    spans : tuple of Span
        One call, for :meth:`chrome_trace`.
    """

    executor: str
    samples: int
    num_blocks: int
    threads: int
    rounds: int
    kept: float
    peak: float
    bandwidth: float
    flops: int
    dense_flops: int
    measured: float
    dense: float
    parts: tuple[Part, ...]
    losses: dict[str, float]
    spans: tuple[Span, ...]

    @property
    def theoretical(self):
        """The dense time times FLOPs needed over dense FLOPs."""
        return self.dense * self.flops / self.dense_flops

    def to_dict(self):
        """Everything but the spans as numbers, texts, lists and dicts, ready for JSON."""
        found = asdict(self) | {"theoretical": self.theoretical}
        del found["spans"]
        return found

    def write_json(self, path):
        """Write :meth:`to_dict` to the file ``path``, whole or not at all."""
        _write(path, self.to_dict())

    def chrome_trace(self, path):
        """Write one call to ``path`` as Chrome trace events, for chrome://tracing or Perfetto: whole or not at all."""
        each = {}  # FLOPs of a sample
        for part in self.parts:
            each[part.name, part.kind] = part.flops // max(part.samples, 1), part.column
        events = []
        for span in self.spans:
            flops, column = each[span.name, span.kind]
            arguments = {"kind": span.kind, "kept": span.samples, "samples": self.samples}
            arguments |= {"flops": flops * span.samples} | ({} if column is None else {"column": column})
            events.append({
                "name": _title(span),
                "ph": "X", "pid": 0, "tid": span.thread, "ts": span.begin / 1e3, "dur": (span.end - span.begin) / 1e3,
                "args": arguments,
            })  # fmt: skip
        _write(path, {"traceEvents": events, "displayTimeUnit": "ns"})

    def __str__(self):
        rows = [("", "column", "kept", "MFLOP", "roofline ms", "ms", "dense ms")]
        for part in self.parts:
            rows.append((
                _title(part),
                "" if part.column is None else str(part.column),
                f"{part.samples}/{self.samples}",
                f"{part.flops / 1e6:.2f}",
                *(f"{1e3 * seconds:.3f}" for seconds in (part.roofline, part.measured, part.dense)),
            ))  # fmt: skip
        times = ("measured", self.measured), ("theoretical", self.theoretical)
        total = ("lost", self.measured - self.theoretical)
        return "\n".join([
            f"{self.samples} samples, {self.num_blocks} blocks, {100 * self.kept:.0f} % kept: {self.executor}, "
            f"{self.threads} threads, {self.peak / 1e9:.1f} GFLOP/s and {self.bandwidth / 1e9:.1f} GB/s at most",
            f"{self.flops / 1e6:.1f} of {self.dense_flops / 1e6:.1f} MFLOP, dense {1e3 * self.dense:.3f} ms",
            "",
            *_align(rows),
            "",
            *_align([("", "ms"), *((f"  {cause}", f"{1e3 * seconds:.3f}") for cause, seconds in self.losses.items()),
                     *((name, f"{1e3 * seconds:.3f}") for name, seconds in (*times, total))]),
        ])  # fmt: skip


def _title(part):
    return f"{part.name} {part.kind}" if part.kind in ("shortcut", "other") else part.name


def _align(rows):
    """Lines of a table whose first column is text and the others are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()


def _write(path, value):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        json.dump(value, file, allow_nan=False)
