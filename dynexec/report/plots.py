"""Plots: theoretical against realised speed-up, and what a policy keeps over the frames of a clip."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

_MARKERS = "osD^vP*X"
_COLOURS = matplotlib.color_sequences["tab10"]


def plot_speed_up(rows, path, *, title=""):
    """Plot realised over theoretical speed-up with the ideal diagonal: a line per network and batch size.

    Parameters
    ----------
    rows : list of dict
        Result rows; those without a realised speed-up are left out. Drawn hollow: decisions like published ones.
    path : path-like
        A PNG (or any format that matplotlib knows by its suffix).
    title : str

    Returns
    -------
    path
    """
    drawn = [row for row in rows if row["realised"] is not None]
    if not drawn:
        raise ValueError("rows hold no realised speed-up")
    figure = Figure(figsize=(4.8, 5.0), layout="constrained")
    axes = figure.subplots()
    draw_ideal(axes, [row[name] for row in drawn for name in ("theoretical", "realised")])
    series = sorted({(row["net"], row["batch"]) for row in drawn})
    names = {net for net, _ in series}
    for number, (net, batch) in enumerate(series):
        label = f"batch {batch}" if len(names) == 1 else f"{net}, batch {batch}"
        _plot_series(axes, [row for row in drawn if (row["net"], row["batch"]) == (net, batch)], number, label)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, loc="upper left")
    axes.set_xlabel("theoretical speed-up: dense FLOPs / needed FLOPs", fontsize=10)
    axes.set_ylabel("realised speed-up over the strongest dense baseline", fontsize=10)
    figure.savefig(path, dpi=130)
    return path


def plot_clip(kept, frames, path, *, title="", num_blocks=None, seconds=None):
    """Plot the blocks kept over the frames of a clip, with example frames above where they were taken.

    Parameters
    ----------
    kept : sequence of int ``[T]``
        Blocks kept per frame.
    frames : dict of int to uint8 array ``[H, W, 3]``
        Example frames by frame number, RGB; a handful.
    path : path-like, or binary file
    title : str
    num_blocks : int, optional
        L, drawn as the upper line.
    seconds : sequence of float ``[T]``, optional
        Time of each frame in the clip; default: frame numbers.

    Returns
    -------
    path
    """
    kept = np.asarray(kept)
    where = np.arange(len(kept)) if seconds is None else np.asarray(seconds)
    unknown = [number for number in frames if not 0 <= number < len(kept)]
    if len(kept) == 0 or len(where) != len(kept) or unknown:
        raise ValueError(f"kept, seconds and frames must agree, got {len(kept)}, {len(where)} and frames {unknown}")
    numbers = sorted(frames)
    figure = Figure(figsize=(9, 5), layout="constrained")
    grid = figure.add_gridspec(2, max(len(numbers), 1), height_ratios=[1, 1.6])
    axes = figure.add_subplot(grid[1, :])
    axes.step(where, kept, where="mid", color=_COLOURS[0], linewidth=1.5)
    axes.axhline(kept.mean(), color=_COLOURS[1], linestyle="--", linewidth=1, label=f"mean {kept.mean():.2f}")
    if num_blocks is not None:
        axes.axhline(num_blocks, color="0.4", linewidth=1, label=f"all {num_blocks} blocks")
        axes.set_ylim(min(0, kept.min()), num_blocks * 1.08)
    axes.set_xlabel("frame" if seconds is None else "seconds")
    axes.set_ylabel("blocks kept")
    axes.yaxis.get_major_locator().set_params(integer=True)
    for column, number in enumerate(numbers):
        picture = figure.add_subplot(grid[0, column])
        picture.imshow(frames[number])
        picture.set_title(f"{_position(where[number], seconds)}: {kept[number]} kept", fontsize=8)
        picture.axis("off")
        axes.plot(where[number], kept[number], "o", color=_COLOURS[3], markersize=6)
    axes.legend(fontsize=8, loc="lower right")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    return path


def _plot_series(axes, rows, number, label):
    """Plot one line of bernoulli rows by theoretical speed-up, and hollow markers for the published ones."""
    style = {"marker": _MARKERS[number % len(_MARKERS)], "color": _COLOURS[number % len(_COLOURS)], "markersize": 6}
    for kind, more in (("bernoulli", {"linewidth": 1}), ("published", {"linestyle": "none", "fillstyle": "none"})):
        points = sorted((row["theoretical"], row["realised"]) for row in rows if row["decisions"] == kind)
        if points:
            axes.plot(*zip(*points, strict=True), **style, **more, label=label)
            label = None


def draw_ideal(axes, speed_ups):
    """Draw the diagonal on which time follows FLOPs, and make both axes logarithmic over what holds the speed-ups."""
    low, high = min([0.9, *speed_ups]) / 1.08, max([1.2, *speed_ups]) * 1.08
    axes.plot([low, high], [low, high], color="0.4", linewidth=1, label="ideal: time follows FLOPs")
    axes.axhline(1.0, color="0.4", linewidth=1, linestyle=":", label="no faster than dense")
    ticks = [tick for tick in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48) if low <= tick <= high]
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{tick:g}x" for tick in ticks])
        axis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def _position(value, seconds):
    return f"frame {value}" if seconds is None else f"{value:.1f} s"
