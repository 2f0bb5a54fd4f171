"""Result rows: their contents, the arithmetic from times to efficiency, and reading and writing them.

A row is a dict, one JSON line: one network, batch size and keep rate, with the times of every candidate from one
interleaved run.
"""

import json
import math
import os
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from dynexec.files import replacing
from dynexec.measure.environment import package_version, processor_name

#: Keys of every row, with the types of their values.
SCHEMA = {
    "time": str,  # when, UTC
    "device": str,  # "cpu", or the name of a GPU
    "cpu": str,
    "cores": int,
    "threads": int,
    "versions": dict,  # of torch, onnxruntime, openvino; None where not installed
    "commit": (str, type(None)),
    "dtype": str,
    "net": str,
    "image_size": int,
    "batch": int,
    "keep": float,  # asked for
    "kept": float,  # share of (sample, block) pairs really kept, or of (row, part) pairs computed
    "decisions": str,  # "bernoulli" or "published": at the rates of a trained policy, whose network then runs too
    "draws": int,  # different decisions cycled through in every timed call
    "rounds": int,
    "flops_dense": int,  # per image
    "flops_needed": float,  # per image, on average
    "milliseconds": dict,  # candidate -> {"median", "p10", "p90", "cpu"}, per forward of the batch
    "planning_share": (float, type(None)),  # decisions -> Route for all blocks, as a share of dynexec's time
    "spread": float,  # how far two timings of the same baseline were apart: differences within it are noise
    "unavailable": dict,  # candidate -> why it was not run
    "max_error": dict,  # candidate -> largest difference from the reference / its largest value; None: not finite
    "tolerance": float,
    "failed": list,  # candidates whose output was not equal: they have no times
    "strongest_dense": (str, type(None)),
    "theoretical": float,  # dense FLOPs / needed FLOPs
    "realised": (float, type(None)),  # time of the strongest dense / time of dynexec
    "realised_against": dict,  # candidate -> its time / time of dynexec
    "efficiency": (float, type(None)),  # realised / theoretical
    "efficiency_own": (float, type(None)),  # the same against dynexec at keep 1
    "saved_share": (float, type(None)),  # of the FLOPs removed, how much of the time left
    "own_dense": (float, type(None)),  # time of the strongest dense / time of dynexec at keep 1
    "losses": dict,  # milliseconds of dynexec above its own dense time x FLOPs needed / dense: "total", and by cause
}
_FORMER_KEYS = {"seed"}  # of rows that earlier versions wrote


def strongest_dense(milliseconds, dense):
    """Return the fastest of the candidates named in ``dense`` that have a time, or None.

    Parameters
    ----------
    milliseconds : dict of str to dict
        As in a row.
    dense : iterable of str
        The static networks that are not dynexec's own.
    """
    timed = [name for name in dense if name in milliseconds]
    return min(timed, key=lambda name: milliseconds[name]["median"], default=None)


def speed_up(milliseconds, flops_dense, flops_needed, dense):
    """Compute the columns of a row that follow from times and FLOPs.

    Parameters
    ----------
    milliseconds : dict of str to dict
        Times of the candidates whose outputs were equal, by name; dynexec's own are "dynexec" and "dense frozen".
    flops_dense, flops_needed : number
        Per image.
    dense : iterable of str
        See :func:`strongest_dense`.

    Returns
    -------
    dict
        Keys from ``strongest_dense`` to ``own_dense`` of :data:`SCHEMA`; None if a time is missing.
    """
    median = {name: times["median"] for name, times in milliseconds.items()}
    strongest = strongest_dense(milliseconds, dense)
    own, own_dense = median.get("dynexec"), median.get("dense frozen")
    theoretical = flops_dense / flops_needed
    row = {
        "strongest_dense": strongest,
        "theoretical": theoretical,
        "realised": None,
        "realised_against": {},
        "efficiency": None,
        "efficiency_own": None,
        "saved_share": None,
        "own_dense": median[strongest] / own_dense if strongest and own_dense else None,
    }
    if own is None:
        return row
    row["realised_against"] = {name: time / own for name, time in median.items() if name != "dynexec"}
    if own_dense is not None:
        row["efficiency_own"] = own_dense / own / theoretical
    if strongest is not None:
        row["realised"] = median[strongest] / own
        row["efficiency"] = row["realised"] / theoretical
        if flops_needed != flops_dense:
            row["saved_share"] = (1 - own / median[strongest]) / (1 - flops_needed / flops_dense)
    return row


def make_row(known, comparison, timings, errors, tolerance, dense, *, planning=None):
    """Make a row, without its losses.

    Parameters
    ----------
    known : dict
        The columns that the other arguments do not determine.
    comparison : Comparison
    timings : dict of str to Timing
        Of the candidates, by name; each timed call goes through all draws.
    errors : dict of str to float
        Largest difference of each candidate from the reference.
    tolerance : float
        The largest error that counts as equal.
    dense : iterable of str
        See :func:`strongest_dense`.
    planning : Timing, optional
    """
    failed = [name for name, error in errors.items() if not error <= tolerance]
    times = {name: _milliseconds(timing, known["draws"]) for name, timing in timings.items() if name not in failed}
    share = planning.median / timings["dynexec"].median if planning and "dynexec" in times else None
    return {
        "time": now(),
        **known,
        "rounds": comparison.rounds,
        "milliseconds": times,
        "planning_share": share,
        "spread": comparison.spread,
        "max_error": {name: error if math.isfinite(error) else None for name, error in errors.items()},
        "tolerance": tolerance,
        "failed": failed,
        **speed_up(times, known["flops_dense"], known["flops_needed"], dense),
        "losses": {},
    }


def _milliseconds(timing, draws):
    values = {"median": timing.median, "p10": timing.p10, "p90": timing.p90, "cpu": timing.cpu_median}
    return {name: 1e3 * seconds / draws for name, seconds in values.items()}


def find_losses(row, explain, draws):
    """Milliseconds per forward that dynexec takes above its own dense time for the same FLOPs: measured, and by cause.

    Parameters
    ----------
    row : dict
    explain : callable
        Gives the seconds by cause, planning left out, for each of ``draws``.
    draws : sequence of tensor

    Returns
    -------
    dict of str to float
        The "total", which is measured; causes; and the "rest". Empty where a time of dynexec is missing.
    """
    times = row["milliseconds"]
    if not {"dynexec", "dense frozen"} <= times.keys():
        return {}
    own, dense = times["dynexec"]["median"], times["dense frozen"]["median"]
    total = own - dense * row["flops_needed"] / row["flops_dense"]
    found = [explain(draw) for draw in draws]
    causes = {cause: 1e3 * sum(seconds[cause] for seconds in found) / len(found) for cause in found[0]}
    if row["planning_share"] is not None:
        causes["planning"] = row["planning_share"] * own
    return {"total": total, **causes, "rest": total - sum(causes.values())}


def check_row(row):
    """Return ``row`` if it has the keys and types of :data:`SCHEMA`; raise ValueError or TypeError."""
    if not isinstance(row, dict):
        raise TypeError(f"row must be a dict, got {type(row).__name__}")
    missing, unknown = SCHEMA.keys() - row.keys(), row.keys() - SCHEMA.keys() - _FORMER_KEYS
    if missing or unknown:
        raise ValueError(f"row must have the keys of SCHEMA; missing: {sorted(missing)}, unknown: {sorted(unknown)}")
    for key, kind in SCHEMA.items():
        if not isinstance(row[key], kind):
            raise TypeError(f"row[{key!r}] must be {kind}, got {type(row[key]).__name__}: {row[key]!r}")
    for candidate, times in row["milliseconds"].items():
        if not isinstance(times, dict) or not times.keys() >= {"median", "p10", "p90"}:
            raise TypeError(f"row['milliseconds'][{candidate!r}] must have median, p10 and p90, got {times!r}")
    return row


def append_row(path, row, *, anew=False):
    """Append one row to a JSON-lines file, atomically: whenever this is interrupted, the file has only whole rows.

    ``anew``: replace the rows in the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text() if path.is_file() and not anew else ""  # a pipe or a device holds none
    if before and not before.endswith("\n"):
        before += "\n"
    with replacing(path) as file:
        file.write(before + json.dumps(check_row(row), allow_nan=False) + "\n")


def read_rows(*paths):
    """Read rows of JSON-lines files, keeping the latest of those for the same machine and setting.

    Parameters
    ----------
    *paths : path-like
        Files, or folders of ``*.jsonl``.
    """
    files = [file for path in map(Path, paths) for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    latest = {}
    for file in files:
        try:
            lines = file.read_text().splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no text: {error}") from error
        for number, line in enumerate(lines, 1):
            try:
                row = check_row(json.loads(line))
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(f"{file}, line {number}: {error}") from error
            key = tuple(
                row[name] for name in ("device", "cpu", "threads", "dtype", "net", "batch", "keep", "decisions")
            )
            if key not in latest or latest[key]["time"] <= row["time"]:
                latest[key] = row
    return list(latest.values())


def environment(device=None, dtype=torch.float32):
    """Return the columns of a row that say where and in which dtype it was measured, except ``time``."""
    packages, gpu = ("torch", "onnxruntime", "openvino"), device is not None and device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {name: package_version(name) for name in (("torch", "triton") if gpu else packages)},
        "commit": _commit(),
        "dtype": str(dtype).removeprefix("torch."),
    }


def now():
    """Return the current time for a row: UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _commit():
    """Return the commit of this file's source tree, with "+" appended if changed since; None outside one."""
    folder = Path(__file__).parent

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if git("ls-files", "--error-unmatch", __file__) == "":
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/dynexec", ":/kernels", ":/csrc")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
