"""Pictures of the decisions over a clip: an action per frame, or the modalities per segment."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from dynexec.report.clips import SOUND_RATE, SOUND_SECONDS

#: Said on pictures of networks nobody trained.
UNTRAINED = "Untrained weights: the choices show how they are executed, and nothing about accuracy."

_COLOURS = matplotlib.color_sequences["tab10"]
_SKIPPED, _UNUSED = "0.85", "0.93"
_ROW = 1.2  # height of thumbnails and titles, in widths of a thumbnail
_NARROWEST = 8.0  # inches that the titles take
_ENVELOPE = 1200  # points that the sound wave is drawn with


def plot_actions(pictures, seconds, actions, names, sizes, path, *, title):
    """Plot frames of a clip, and below each a bar for its action, as high as the image that was looked at.

    Parameters
    ----------
    pictures : uint8 array ``[N, T, H, W, 3]``
        RGB; each window gets a line of its own.
    seconds : float array ``[N, T]``
    actions : int array ``[N, T]``
        As they took effect.
    names : sequence of str
        Per action.
    sizes : sequence of int
        Height of the image that an action looks at; 0 if it looks at none.
    path : path-like
    title : str

    Returns
    -------
    path
    """
    windows, frames = actions.shape
    unit = max(0.86, _NARROWEST / frames)
    figure, panels = _stack(frames, unit, [_ROW * unit, 1.5] * windows, 0.75)
    for window, (thumbnails, bars) in enumerate(zip(panels[::2], panels[1::2], strict=True)):
        _show_row(thumbnails, pictures[window], [f"{time:.2f} s" for time in seconds[window]])
        for frame, action in enumerate(actions[window]):
            size = sizes[action]
            bars.bar(frame, size or max(sizes) / 12, 0.9, color=_COLOURS[action] if size else _SKIPPED)
            bars.text(
                frame, (size or max(sizes) / 12) + max(sizes) / 40, size or names[action], ha="center", fontsize=8
            )
        bars.set(xlim=(-0.5, frames - 0.5), ylim=(0, max(sizes) * 1.15), xticks=[], ylabel="pixels")
        bars.set_yticks(sorted({0, *sizes}))
        bars.spines[["top", "right"]].set_visible(False)
    counts = np.bincount(actions.flatten(), minlength=len(names))
    skipped = sum(int(count) for count, size in zip(counts, sizes) if not size)
    entries = [
        Patch(color=_COLOURS[number], label=f"{name}: {counts[number]}")
        for number, (name, size) in enumerate(zip(names, sizes))
        if size
    ]
    entries.append(Patch(color=_SKIPPED, label=f"skipped: {skipped}"))
    return _finish(figure, entries, f"frames, of {actions.size}", title, path)


def plot_modalities(segments, decisions, modalities, path, *, title):
    """Plot segments of a clip, the modalities that each was looked at in, and the sound.

    Parameters
    ----------
    segments : dynexec.report.clips.Segments
    decisions : bool array ``[S, M]``
    modalities : sequence of str
    path : path-like
    title : str

    Returns
    -------
    path
    """
    count = len(decisions)
    unit = max(1.25, _NARROWEST / count)
    heights = [_ROW * unit, 0.42 * len(modalities), *([1.7] if segments.sound else [])]
    figure, panels = _stack(count, unit, heights, 1.15 if segments.sound else 0.75)
    middles = segments.frames[:, segments.frames.shape[1] // 2]
    spans = [f"{number}: {times[0]:.1f}-{times[-1]:.1f} s" for number, times in enumerate(segments.seconds, 1)]
    _show_row(panels[0], middles, spans)
    for row in range(len(modalities)):
        for column, used in enumerate(decisions[:, row]):
            box = Rectangle((column - 0.45, row - 0.4), 0.9, 0.8, color=_COLOURS[row] if used else _UNUSED)
            panels[1].add_patch(box)
            text = "used" if used else "left out"
            panels[1].text(column, row, text, ha="center", va="center", fontsize=8, color="white" if used else "0.4")
    panels[1].set(xlim=(-0.5, count - 0.5), ylim=(len(modalities) - 0.5, -0.5), xticks=[])
    panels[1].set_yticks(range(len(modalities)), modalities)
    panels[1].tick_params(length=0)
    panels[1].spines[:].set_visible(False)
    if segments.sound:
        row = list(modalities).index("sound")
        _draw_sound(panels[2], segments, decisions[:, row], _COLOURS[row])
    entries = [
        Patch(color=_COLOURS[row], label=f"{name}: {int(decisions[:, row].sum())}")
        for row, name in enumerate(modalities)
    ]
    return _finish(figure, entries, f"used in segments, of {count}", title, path)


def _stack(columns, unit, heights, bottom):
    """Return a figure and its rows of axes, ``columns * unit`` inches wide and of these heights in inches."""
    left, right, top, gap = 0.8, 0.15, 0.65, 0.12
    size = left + columns * unit + right, top + sum(heights) + gap * (len(heights) - 1) + bottom
    figure, panels, y = Figure(figsize=size), [], size[1] - top
    for height in heights:
        y -= height
        panels.append(figure.add_axes((left / size[0], y / size[1], columns * unit / size[0], height / size[1])))
        y -= gap
    return figure, panels


def _show_row(axes, pictures, titles):
    """Show thumbnails side by side, with a title each."""
    for column, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        axes.imshow(picture, extent=(column - 0.45, column + 0.45, -0.45, 0.45), aspect="auto")
        axes.text(column, 0.48, title, ha="center", va="bottom", fontsize=8)
    axes.set(xlim=(-0.5, len(pictures) - 0.5), ylim=(-0.5, _ROW - 0.5), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _draw_sound(axes, segments, used, colour):
    """Draw the wave over time and, below it in lines that do not overlap, what each segment's spectrogram covers."""
    sound, half = segments.sound, SOUND_SECONDS / 2
    step = max(1, len(sound.samples) // _ENVELOPE)
    wave = sound.samples[: len(sound.samples) // step * step].reshape(-1, step)
    loudest = float(np.abs(wave).max()) or 1.0
    times = sound.start + np.arange(len(wave)) * step / SOUND_RATE
    axes.fill_between(times, wave.min(1) / loudest, wave.max(1) / loudest, color="0.35", linewidth=0)
    last = sound.start + len(sound.samples) / SOUND_RATE
    ends = []  # of the lines so far
    for number, center in enumerate(segments.centers):
        center = min(max(center, sound.start + half), last - half)  # as sound_windows moves it
        line = next((line for line, end in enumerate(ends) if center - half >= end), len(ends))
        ends[line : line + 1] = [center + half + 0.01]
        span, y = [center - half, center + half], -1.3 - 0.4 * line
        axes.plot(span, [y, y], color=colour if used[number] else "0.75", linewidth=7, solid_capstyle="butt")
        axes.text(center, y, number + 1, ha="center", va="center", fontsize=7)
    axes.set(xlim=(0, max(segments.clip_seconds, last)), ylim=(-1.3 - 0.4 * len(ends), 1.05), yticks=[])
    axes.set_xlabel("seconds of the clip; bars: what the segments' spectrograms cover")
    axes.set_ylabel("sound")
    axes.spines[["top", "right", "left"]].set_visible(False)


def _finish(figure, entries, unit, title, path):
    height = figure.get_figheight()
    figure.suptitle(f"{title}\n{UNTRAINED}", fontsize=11, y=1 - 0.1 / height)
    figure.legend(handles=entries, title=unit, loc="lower center", ncols=len(entries), fontsize=9)
    figure.savefig(path, dpi=110)
    return path
