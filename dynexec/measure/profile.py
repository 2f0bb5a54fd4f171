"""Where the time of a frozen network goes: per part, and how much is lost to which cause."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path

from dynexec.files import replacing
from dynexec.measure.ranges import Span
from dynexec.ops import counted

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
#: The same of a routed network.
ROUTED_LOSSES = ("policy", "fewer rows at once", "parts of unequal speed", "between parts", "not explained")


@dataclass(frozen=True)
class Part:
    """A part of a network: a block, a shortcut, a layer that all samples run, the policy, or planning.

    In a routed network: one of its parts, the policy, or what lies between them.

    Attributes
    ----------
    name : str
    kind : str
        As in :class:`Span`.
    column : int, optional
        Column of the decisions.
    samples : int
        How many samples run it; in a routed network, how many of its rows.
    total : int
        How many run it when everything is kept; if none do then, how many could.
    flops : int
        FLOPs for ``samples``. A multiply-add counts as two, a convolution as its direct algorithm.
    roofline : float
        Least seconds for ``samples`` at the machine's peak rates: the longer of its arithmetic and its memory traffic,
        with weights, input and output each moved once.
    measured : float
        Measured seconds.
    dense : float
        Measured seconds when everything is kept.
    """

    name: str
    kind: str
    column: int | None
    samples: int
    total: int
    flops: int
    roofline: float
    measured: float
    dense: float

    @property
    def theoretical(self):
        """The dense time multiplied by the fraction of samples that run it."""
        return self.dense * self.samples / max(self.total, 1)


@dataclass(frozen=True)
class Profile:
    """The result of a frozen network's ``profile``; ``print`` shows a table. Times are in seconds.

    Attributes
    ----------
    executor : str
        The executor that ran, "layers", or "routed".
    samples, num_blocks, threads, rounds : int
        In a routed network, ``num_blocks`` is the number of its parts.
    kept : float
        Share of the (sample, block) pairs that are kept; in a routed network, of the rows of its parts.
    peak, bandwidth : float
        FLOP per second and bytes per second of the machine, with all of these threads.
    flops, dense_flops : int
        For the batch: as needed (policy included), and with everything kept (without a policy).
    measured, dense : float
        Time of an ordinary call, and of one in which all samples keep all blocks.
    parts : tuple of Part
        In the order in which they run.
    losses : dict of str to float
        Seconds by cause, see :data:`LOSSES` and :data:`ROUTED_LOSSES`; their sum is ``measured - theoretical``.
    moved : int or None
        Bytes read and written by gathering and scattering rows. The engine moves none. None: not counted, because
        kernels for GPUs move them.
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
    moved: int | None
    spans: tuple[Span, ...]

    @property
    def theoretical(self):
        """The dense time multiplied by the ratio of needed to dense FLOPs."""
        return self.dense * self.flops / self.dense_flops

    def to_dict(self):
        """Return everything except the spans as numbers, strings, lists and dicts, ready for JSON."""
        found = asdict(self) | {"theoretical": self.theoretical}
        del found["spans"]
        return found

    def write_json(self, path):
        """Write :meth:`to_dict` to the file ``path``, atomically."""
        _write(path, self.to_dict())

    @classmethod
    def read_json(cls, path):
        """Read what :meth:`write_json` wrote to ``path``, without spans; a ValueError names file and invalid entry."""
        try:
            found = json.loads(Path(path).read_text())
        except (ValueError, RecursionError) as error:  # no text, or no JSON
            raise ValueError(f"{path} must be JSON, as dynexec profile writes it: {error}") from None
        entries = {key: kind for key, kind in cls.__annotations__.items() if key != "spans"} | {"theoretical": float}
        _check_entries(path, "", found, entries)
        for number, part in enumerate(found["parts"]):
            _check_entries(path, f"parts[{number}].", part, Part.__annotations__)
        for cause, seconds in found["losses"].items():
            _check(path, "a name in losses", cause, *_KINDS[str])
            _check(path, f"losses.{cause}", seconds, "a finite number", _is_finite)
        _check(path, "dense_flops", found["dense_flops"], "1 or more", bool)
        del found["theoretical"]
        return cls(**found | {"parts": tuple(Part(**part) for part in found["parts"]), "spans": ()})

    def chrome_trace(self, path):
        """Write one call to ``path`` as Chrome trace events, for chrome://tracing or Perfetto, atomically."""
        parts, time, count = {(part.name, part.kind): part for part in self.parts}, Counter(), Counter()
        for span in self.spans:
            time[span.name, span.kind] += span.end - span.begin
            count[span.name, span.kind] += 1
        events = []
        for span in self.spans:
            key = span.name, span.kind
            part, share = parts[key], (span.end - span.begin) / time[key] if time[key] else 1 / count[key]
            # Instructions and threads share the work of a part: each has what its time is of the part's.
            flops = round(share * part.flops)
            arguments = {"kind": span.kind, "kept": span.samples, "samples": part.total, "flops": flops}
            arguments |= {} if part.column is None else {"column": part.column}
            events.append({
                "name": title(span),
                "ph": "X", "pid": 0, "tid": span.thread, "ts": span.begin / 1e3, "dur": (span.end - span.begin) / 1e3,
                "args": arguments,
            })  # fmt: skip
        _write(path, {"traceEvents": events, "displayTimeUnit": "ns"})

    def table(self):
        """Return the headings and rows of the table of parts, as strings."""
        headings = ("", "column", "kept", "MFLOP", "roofline ms", "ms", "dense ms")
        rows = []
        for part in self.parts:
            rows.append((
                title(part),
                "" if part.column is None else str(part.column),
                f"{part.samples}/{part.total}",
                f"{part.flops / 1e6:.2f}",
                *(f"{1e3 * seconds:.3f}" for seconds in (part.roofline, part.measured, part.dense)),
            ))  # fmt: skip
        return headings, tuple(rows)

    def summary(self):
        """Summarise what was measured in two lines."""
        kept = f"{counted(self.num_blocks, 'block')}, {100 * self.kept:.0f} % kept"
        if self.executor == "routed":
            kept = f"{counted(self.num_blocks, 'part')}, {100 * self.kept:.0f} % of their rows run"
        return (
            f"{counted(self.samples, 'sample')}, {kept}: {self.executor}, {counted(self.threads, 'thread')}, "
            f"{self.peak / 1e9:.1f} GFLOP/s and {self.bandwidth / 1e9:.1f} GB/s at most",
            f"{self.flops / 1e6:.1f} of {self.dense_flops / 1e6:.1f} MFLOP, dense {1e3 * self.dense:.3f} ms",
        )

    def __str__(self):
        headings, rows = self.table()
        times = self.losses | {"measured": self.measured, "theoretical": self.theoretical}
        times["lost"] = self.measured - self.theoretical
        moved = {} if self.moved is None else dict.fromkeys(("row moves", "between parts"), f"{self.moved / 1e6:.2f}")
        return "\n".join([
            *self.summary(),
            "",
            *_align((headings, *rows)),
            "",
            *_align([
                ("", "ms", "MB moved"),
                *((f"  {name}" if name in self.losses else name, f"{1e3 * seconds:.3f}", moved.get(name, ""))
                  for name, seconds in times.items()),
            ]),
        ])  # fmt: skip


def _check_entries(path, place, found, expected):
    """Raise ValueError unless ``found`` is a dict of exactly these entries, each of its type."""
    where = place.rstrip(".") or "the file"
    _check(path, where, found, "an object", lambda value: isinstance(value, dict))
    if found.keys() != expected.keys():
        wrong = ", ".join(sorted(found.keys() ^ expected.keys()))
        raise ValueError(f"{path}: {where} must have the entries {', '.join(expected)}; missing or unknown: {wrong}")
    for key, kind in expected.items():
        _check(path, place + key, found[key], *_KINDS[kind])


def _check(path, name, value, text, fits):
    if not fits(value):
        raise ValueError(f"{path}: {name} must be {text}, got {value!r}")


def _is_finite(value):
    return type(value) in (int, float) and isfinite(value)


def _is_count(value):
    return type(value) is int and 0 <= value < 2**63


def _is_text(value):
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)  # surrogates


# Of an entry by its annotation: what a file may hold.
_KINDS = {
    str: ("text", _is_text),
    int: ("an int of 0 or more", _is_count),
    int | None: ("an int of 0 or more, or null", lambda value: value is None or _is_count(value)),
    float: ("a number of 0 or more", lambda value: _is_finite(value) and value >= 0),
    tuple[Part, ...]: ("a list", lambda value: isinstance(value, list)),
    dict[str, float]: ("an object that is not empty", lambda value: isinstance(value, dict) and len(value) > 0),
}


def title(part):
    """Return the display name of a :class:`Part` or a :class:`Span`."""
    return f"{part.name} {part.kind}" if part.kind in ("shortcut", "other") else part.name


def _align(rows):
    """Yield the lines of a table whose first column is text and whose other columns are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()


def _write(path, value):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        json.dump(value, file, allow_nan=False)
