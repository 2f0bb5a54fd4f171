"""The results of the demo as a table and as a picture."""

import matplotlib
from matplotlib.figure import Figure
from rich.table import Table

from dynexec.report.console import print_wide
from dynexec.report.plots import draw_ideal
from dynexec.report.tables import factor, largest_error, rounded

#: Heading -> text of the cell for a result (see :class:`dynexec.report.demo_parts.Result`).
COLUMNS = {
    "network, input": lambda result: result.what,
    "batch": lambda result: str(result.row["batch"]),
    "result": lambda result: result.quality or "random weights",
    "blocks kept": lambda result: f"{result.row['kept'] * result.num_blocks:.1f} of {result.num_blocks}",
    "dense": lambda result: _per_second(result.row, "dense eager"),
    "masked": lambda result: _per_second(result.row, "masked eager"),
    "dynexec, all blocks": lambda result: _per_second(result.row, "dense frozen"),
    "dynexec": lambda result: _per_second(result.row, "dynexec"),
    "theoretical": lambda result: factor(result.row["theoretical"]),
    "over all blocks": lambda result: factor(result.row["realised_against"].get("dense frozen")),
    "over dense": lambda result: factor(result.row["realised_against"].get("dense eager")),
    "over masked": lambda result: factor(result.row["realised_against"].get("masked eager")),
    "max error": lambda result: largest_error(result.row),
}
NOTE = (
    "dense, masked, dynexec: images per second, medians of one interleaved run, after their outputs were compared. "
    "dense: the static network in eager PyTorch. masked: all blocks computed and multiplied by the decisions, as "
    "published code does. dynexec, all blocks: the frozen network with nothing dropped. theoretical: FLOPs of the "
    "dense network / FLOPs needed, policy network included. over ...: realised speed-up, time of that / time of "
    "dynexec with its policy network. torch.compile, ONNX Runtime and OpenVINO are compared by dynexec bench, not here."
)
_WIDE = 190  # columns of text that the whole table needs
_AGAINST = {
    "dense frozen": ("over dynexec with all blocks on", "full"),
    "dense eager": ("over dense eager PyTorch", "none"),
}


def cells(result):
    """Return the texts of a result under :data:`COLUMNS`."""
    return tuple(text(result) for text in COLUMNS.values())


def print_table(console, results):
    """Print the results as one table; a line with a wrong output is red."""
    table = Table(*COLUMNS, caption=NOTE, caption_justify="left")
    for result in results:
        table.add_row(*cells(result), style="bold red" if result.row["failed"] else None)
    print_wide(console, table, _WIDE)


def plot_results(results, path):
    """Plot realised over theoretical speed-up of every result, with the ideal diagonal, as a PNG; return ``path``."""
    figure = Figure(figsize=(7, 6.4), layout="constrained")
    axes = figure.add_subplot()
    speed_ups = []
    for number, result in enumerate(results):
        colour = matplotlib.color_sequences["tab10"][number % 10]
        against = result.row["realised_against"]
        style = {"linestyle": "none", "marker": "o", "markersize": 8, "color": colour}
        for name, (_, fill) in _AGAINST.items():
            if name in against:
                axes.plot(result.row["theoretical"], against[name], fillstyle=fill, **style)
                speed_ups += [result.row["theoretical"], against[name]]
        axes.plot([], [], label=f"{result.what} (batch {result.row['batch']})", **style)
    for text, fill in _AGAINST.values():
        axes.plot([], [], "o", color="0.4", fillstyle=fill, label=f"realised {text}")
    draw_ideal(axes, speed_ups)
    axes.set_xlabel("theoretical speed-up: dense FLOPs / needed FLOPs, policy network included")
    axes.set_ylabel("realised speed-up")
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)
    return path


def _per_second(row, candidate):
    times = row["milliseconds"].get(candidate)
    return rounded(None if times is None else 1e3 * row["batch"] / times["median"], 4)
