"""Result rows as tables: in the terminal, in the docs (Markdown) and in the HTML page."""

from itertools import groupby
from pathlib import Path

from dynexec.files import replacing
from dynexec.report.nets import NETS
from dynexec.report.systems import SYSTEMS

#: Heading -> text of the cell for a row. The order is the order of the columns.
COLUMNS = {
    "batch": lambda row: str(row["batch"]),
    "keep": lambda row: f"{row['keep']:.3g}" + ("*" if row["decisions"] == "published" else ""),
    "ms": lambda row: rounded(_median(row, "dynexec"), 4),
    "theoretical": lambda row: factor(row["theoretical"]),
    "realised": lambda row: factor(row["realised"]),
    "strongest dense": lambda row: row["strongest_dense"] or "-",
    "efficiency": lambda row: rounded(row["efficiency"]),
    "own efficiency": lambda row: rounded(row["efficiency_own"]),
    "saved share": lambda row: rounded(row["saved_share"]),
    "vs dense eager": lambda row: factor(row["realised_against"].get("dense eager")),
    "vs masked eager": lambda row: factor(row["realised_against"].get("masked eager")),
    "own dense": lambda row: factor(row["own_dense"]),
    "planning": lambda row: "-" if row["planning_share"] is None else f"{100 * row['planning_share']:.2f} %",
    "noise": lambda row: f"{100 * row['spread']:.1f} %",
    "max error": lambda row: largest_error(row),
}

#: Of a candidate that ``--baselines`` leaves out.
LEFT_OUT = "not asked for"
# Losses that are measured; the others are predicted by the cost model of layers, not of the engine or the kernels.
_WHATEVER_RUNS = ("total", "planning", "rest")
#: What the columns mean, for readers of a table.
LEGEND = (
    "keep: share of blocks kept, or of all rows and parts that are computed (* like the decisions of the trained "
    "policy: drawn at its rates, or AdaShare's own; its network is charged). ms: "
    "dynexec, per batch. theoretical: FLOPs of the dense network / FLOPs needed. realised: time of the strongest "
    "dense baseline / time of dynexec. efficiency: realised / theoretical; own efficiency: the same against dynexec "
    "at keep 1. saved share: of the FLOPs removed, how much of the time left. own dense: time of the strongest "
    "dense baseline / time of dynexec at keep 1. planning: decisions to Route, as a share of the forward, outside of "
    "CUDA graphs. noise: how far two timings of the same were apart, of a baseline, or of dynexec with everything "
    "kept. max error: against masked eager, relative to its largest output."
)


def cells(row):
    """Return the texts of a row under :data:`COLUMNS`."""
    return [text(row) for text in COLUMNS.values()]


def sort_rows(rows):
    """Sort rows by machine, network, batch and keep rate."""
    order = {name: number for number, name in enumerate((*NETS, *SYSTEMS))}

    def key(row):
        net = order.get(row["net"], len(order)), row["net"]
        return *machine(row), net, row["batch"], row["decisions"], row["keep"]

    return sorted(rows, key=key)


def group_rows(rows):
    """Return sorted rows as a list of (title, rows): one group per machine, thread count and network."""
    keyed = groupby(sort_rows(with_noise(rows)), key=lambda row: (row["net"], *machine(row)))
    groups = []
    for (net, *where), members in keyed:
        members = list(members)
        size = members[0]["image_size"]
        groups.append((f"{net}, {size}x{size}, {', '.join(where)}", members))
    return groups


def with_noise(rows):
    """Raise the ``spread`` of rows to the difference between dynexec and itself, if that is larger.

    With everything kept it is timed as "dynexec" and as "dense frozen", both with all decisions True.
    """

    def run(row):
        return row["net"], *machine(row), row["batch"], row["commit"]

    apart = {run(row): abs(row["efficiency_own"] - 1) for row in rows if row["keep"] == 1 and row["efficiency_own"]}
    return [row | {"spread": max(row["spread"], apart.get(run(row), 0.0))} for row in rows]


def machine(row):
    """Return what a row was measured on, as texts: a processor and number of threads, or a GPU and the dtype."""
    if row["device"] != "cpu":
        return row["device"], row["dtype"]
    threads = row["threads"]
    return row["cpu"], f"{threads} thread{'s' * (threads != 1)}"


def versions(rows):
    """Return the versions that the rows were measured with, as one line."""
    found = {
        f"{name} {version or 'not installed'}" for row in rows for name, version in sorted(row["versions"].items())
    }
    commits = {row["commit"] or "unknown" for row in rows}
    dtypes = {row["dtype"] for row in rows}
    return f"{', '.join(sorted(found))}; {', '.join(sorted(dtypes))}; commit {', '.join(sorted(commits))}"


def markdown(rows):
    """Return rows as Markdown: per network the main table, then the milliseconds of every candidate."""
    parts = []
    for title, members in group_rows(rows):
        parts.append(f"### {title}\n\n{versions(members)}\n")
        parts.append(markdown_table(list(COLUMNS), [cells(row) for row in members]))
        headings, table = candidate_table(members)
        parts.append("Milliseconds per batch, median (90th percentile):\n")
        parts.append(markdown_table(headings, table))
        if any(loss for row in members for cause, loss in row["losses"].items() if cause not in _WHATEVER_RUNS):
            parts.append("What dynexec loses against its own dense time for the same FLOPs, milliseconds per batch:\n")
            parts.append(markdown_table(*loss_table(members)))
    return "\n".join(parts)


def break_even_table(rows):
    """Return headings and texts: per network and machine, where dynexec gains least on the strongest dense baseline.

    The break-even is the keep rate up to which dynexec is at least as fast, for every batch size, with straight lines
    between the measured rates.
    """
    table = []
    for _, members in group_rows([row for row in rows if row["realised"] is not None]):
        least = min(members, key=lambda row: row["realised"])
        batches = [list(batch) for _, batch in groupby(members, key=lambda row: (row["batch"], row["decisions"]))]
        even = min(_break_even([(row["keep"], row["realised"]) for row in batch]) for batch in batches)
        sizes = sorted({row["batch"] for row in members})
        table.append(
            [
                least["net"],
                ", ".join(machine(least)),
                ", ".join(map(str, sizes)),
                f"{factor(least['realised'])} (batch {least['batch']}, keep {COLUMNS['keep'](least)}, "
                f"{least['strongest_dense']})",
                "none" if even == float("inf") else f"{even:.2f}",
            ]
        )
    return ["net", "machine", "batch sizes", "smallest speed-up", "break-even"], table


def _break_even(points):
    """Return the keep rate from which on a dense network is faster; infinity if it is at none that was measured."""
    before = None
    for keep, realised in sorted(points):
        if realised < 1:
            if before is None:
                return keep
            (k0, r0), (k1, r1) = before, (keep, realised)
            return k0 + (k1 - k0) * (r0 - 1) / (r0 - r1)
        before = keep, realised
    return float("inf")


def candidate_table(rows):
    """Return headings and texts of a table with the time of every candidate of ``rows``."""
    names = list(dict.fromkeys(name for row in rows for name in (*row["milliseconds"], *row["unavailable"])))
    table = []
    for row in rows:
        table.append([COLUMNS["batch"](row), COLUMNS["keep"](row), *(_candidate(row, name) for name in names)])
    return ["batch", "keep", *names], table


def loss_table(rows):
    """Return headings and texts of a table with the losses of dynexec by cause."""
    # Of one that is 0 everywhere nothing was predicted.
    causes = list(dict.fromkeys(cause for row in rows for cause, loss in row["losses"].items() if loss))
    table = []
    for row in rows:
        values = [row["losses"].get(cause) for cause in causes]
        table.append([COLUMNS["batch"](row), COLUMNS["keep"](row), *("-" if v is None else f"{v:.2f}" for v in values)])
    return ["batch", "keep", *causes], table


def replace_generated(text, name, content):
    """Return ``text`` with ``content`` between the markers of a generated part.

    The markers are the lines ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``.

    Raises
    ------
    ValueError
        If the markers are not there, once each and in order.
    """
    begin, end = f"<!-- generated: {name} -->\n", f"<!-- end: {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"text must hold the lines {begin.strip()!r} and {end!r}, once each and in this order")
    before, rest = text.split(begin)
    return f"{before}{begin}{content}{end}{rest.split(end)[1]}"


def write_generated(path, name, content):
    """Replace a generated part of a file, see :func:`replace_generated`."""
    path = Path(path)
    text = replace_generated(path.read_text(), name, content)
    with replacing(path) as file:
        file.write(text)


def markdown_table(headings, rows):
    """Return headings and rows of texts as a Markdown table."""
    lines = [headings, ["---:"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _candidate(row, name):
    if name in row["unavailable"]:
        reason = row["unavailable"][name]
        return next((text for text in ("not installed", LEFT_OUT) if reason.startswith(text)), "-")
    if name in row["failed"]:
        return "wrong output"
    times = row["milliseconds"].get(name)
    return "-" if times is None else f"{rounded(times['median'], 4)} ({rounded(times['p90'], 3)})"


def _median(row, name):
    return row["milliseconds"].get(name, {}).get("median")


def largest_error(row):
    """Dynexec's error, or which outputs are wrong."""
    if row["failed"]:
        return f"WRONG: {', '.join(row['failed'])}"
    return f"{row['max_error'].get('dynexec', 0.0):.0e}"


def rounded(value, digits=3):
    """Format a number with ``digits`` digits, or with all of those before the point; "-" for None."""
    if value is None:
        return "-"
    value = float(f"{value:.{digits}g}") if abs(value) < 10**digits else value  # 999.6 is 1,000
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".rstrip(".")


def factor(value):
    """A factor with two decimals; "-" for None."""
    return "-" if value is None else f"{value:.2f}x"
