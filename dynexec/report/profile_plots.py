"""Plots of a profile: the time of each part, and how much was lost to which cause."""

from math import ceil

from matplotlib import color_sequences
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dynexec.measure.profile import title

_AT_MOST = 32  # parts of one picture: on a phone they are still legible
_TEN = color_sequences["tab10"]
# What a part is drawn as, in the order of the legend.
_COLOURS = {
    "stem": _TEN[4],
    "blocks": _TEN[0],
    "shortcuts": _TEN[9],
    "layers between blocks": _TEN[8],
    "head": _TEN[6],
    "parts": _TEN[0],
    "policy": _TEN[1],
    "planning": _TEN[7],
    "between parts": _TEN[7],
}
_BY_KIND = {
    "block": "blocks",
    "other": "blocks",
    "shortcut": "shortcuts",
    "part": "parts",
    "policy": "policy",
    "planning": "planning",
    "between": "between parts",
}


def plot_parts(profile, stem):
    """Plot a bar of measured time per part, with marks for roofline and theoretical time.

    Parameters
    ----------
    profile : Profile
    stem : path
        Common beginning of the pictures' paths.

    Returns
    -------
    list of str
        PNG files of at most 32 parts each, all to the same scale.
    """
    count = ceil(len(profile.parts) / _AT_MOST)
    numbers = range(len(profile.parts))
    return [
        _plot_some(profile, numbers[len(numbers) * n // count : len(numbers) * (n + 1) // count], f"{stem}_{n}.png")
        for n in range(count)
    ]


def _plot_some(profile, numbers, path):
    groups = group_parts(profile.parts)
    figure = Figure(figsize=(4.8, 1.1 + 0.2 * len(numbers)), layout="constrained")
    axes = figure.subplots()
    for y, number in enumerate(numbers):
        part = profile.parts[number]
        axes.barh(y, 1e3 * part.measured, 0.75, color=_COLOURS[groups[number]])
        if part.theoretical > 0:
            axes.plot([1e3 * part.theoretical] * 2, [y - 0.45, y + 0.45], color="black", linewidth=1.6)
        if part.roofline > 0:
            axes.plot(1e3 * part.roofline, y, "D", color="black", markerfacecolor="white", markersize=3.5)
    most = max(max(part.measured, part.theoretical, part.roofline) for part in profile.parts)
    axes.set(xlim=(0, 1e3 * most * 1.05 or 1), ylim=(len(numbers) - 0.4, -0.6))
    axes.set_yticks(range(len(numbers)), [_label(profile.parts[number]) for number in numbers], fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("ms", fontsize=9)
    drawn = {groups[number] for number in numbers}
    handles = [Patch(color=colour, label=group) for group, colour in _COLOURS.items() if group in drawn]
    handles.append(Line2D([], [], color="black", linewidth=1.6, label="theoretical"))
    handles.append(
        Line2D(
            [], [], color="black", marker="D", markerfacecolor="white", markersize=3.5, linewidth=0, label="roofline"
        )
    )
    figure.legend(handles=handles, fontsize=8, ncols=3, loc="outside upper center", frameon=False)
    figure.savefig(path, dpi=130)
    return path


def plot_losses(profile, path):
    """Plot a bar per cause of the milliseconds that a :class:`Profile` lost to it, as a PNG; return ``path``."""
    names, seconds = zip(*profile.losses.items(), strict=True)
    milliseconds = [1e3 * value for value in seconds]
    figure = Figure(figsize=(4.8, 0.7 + 0.28 * len(names)), layout="constrained")
    axes = figure.subplots()
    colours = [_TEN[3] if value > 0 else _TEN[2] for value in milliseconds]
    bars = axes.barh(range(len(names)), milliseconds, 0.7, color=colours)
    axes.bar_label(bars, [f"{value:.3f}" for value in milliseconds], fontsize=8, padding=3)
    axes.axvline(0, color="0.4", linewidth=1)
    axes.margins(x=0.3)  # for the numbers beside the bars
    axes.invert_yaxis()
    axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names], fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("ms lost", fontsize=9)
    figure.savefig(path, dpi=130)
    return path


def group_parts(parts):
    """Return what each part is drawn as, a list of keys of the legend: layers before the first block are the stem."""
    blocks = [number for number, part in enumerate(parts) if part.kind in ("block", "other", "shortcut")]
    first, last = (blocks[0], blocks[-1]) if blocks else (len(parts), len(parts))
    around = [
        "stem" if number < first else "head" if number > last else "layers between blocks"
        for number in range(len(parts))
    ]
    return [_BY_KIND.get(part.kind, group) for part, group in zip(parts, around, strict=True)]


def _label(part):
    name = title(part)
    name = name if len(name) <= 28 else f"{name[:13]} .. {name[-11:]}"
    return name.replace("$", r"\$")  # else matplotlib reads formulas
