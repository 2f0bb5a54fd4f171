"""``dynexec report``: one self-contained HTML page of bench rows and, if there are any, demo and profile results."""

import base64
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from jinja2 import Environment

from dynexec.files import replacing
from dynexec.measure import Profile
from dynexec.report.arguments import file
from dynexec.report.plots import plot_speed_up
from dynexec.report.profile_plots import plot_losses, plot_parts
from dynexec.report.rows import read_rows
from dynexec.report.tables import COLUMNS, LEGEND, candidate_table, cells, group_rows, machine, versions

DEFAULT_RESULTS = ("bench/results", "out/bench.jsonl")
DEFAULT_DEMO = "out/demo.json"
DEFAULT_PROFILES = "out/profile*.json"
DEFAULT_OUT = "out/report.html"

_PROFILE_TEXT = (
    "A bar is what a part took under these decisions, the black line its theoretical time: the share of its dense "
    "time that its samples are of all. What a bar has beyond the line is lost. The diamond is the part's roofline, "
    "which the machine's arithmetic and memory allow; a part may pass it, as FLOPs are those of the direct algorithm "
    "and caches spare traffic."
)
_PROFILE_NOTE = "Kept: samples (or rows) that run the part, of how many. Dense: the same part where everything is kept."

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; }
table { margin-top: 1rem; border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; }
tr { border-bottom: 1px solid color-mix(in srgb, currentColor 25%, transparent); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
tr.failed td { color: #d33; font-weight: bold; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
.figures:has(> :only-child) { grid-template-columns: minmax(0, 60rem); }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; background: #fff; border-radius: .4rem; padding: .4rem; box-sizing: border-box; }
figcaption, .note { font-size: .85rem; opacity: .8; }
pre { overflow-x: auto; font-size: .8rem; }
@page { size: A4 landscape; margin: 12mm; }
@media print {
  body { font-size: 10pt; max-width: none; padding: 0; }
  table { font-size: 7pt; } th, td { padding: .1rem .3rem; white-space: normal; }
  .scroll { overflow: visible; } .figures { grid-template-columns: repeat(3, 1fr); }
  img { max-height: 14cm; }
  tr, figure { break-inside: avoid; } h2 { break-after: avoid; }
}
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% for paragraph in section.text.split("\\n\\n") if paragraph %}<p>{{ paragraph }}</p>
{% endfor %}
{% if section.figures %}<div class="figures">
{% for source, caption in section.figures %}
<figure><img src="{{ source | data_uri }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
</div>{% endif %}
{% for table in section.tables %}
<div class="scroll"><table>
<thead><tr>{% for heading in table.headings %}<th>{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr{% if loop.index0 in table.failed %} class="failed"{% endif %}>
{%- for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% if table.note %}<p class="note">{{ table.note }}</p>{% endif %}
{% endfor %}
</section>
{% endfor %}
</body>
</html>
"""


@dataclass(frozen=True)
class PageTable:
    """A table of a page: texts under headings, the numbers of the rows to print in red, and a note below."""

    headings: tuple
    rows: tuple
    failed: tuple = ()
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes
    ----------
    title : str
    text : str
        Paragraphs, separated by empty lines.
    tables : tuple of PageTable
    figures : tuple of (path, str)
        PNG files and their captions.
    """

    title: str
    text: str = ""
    tables: tuple[PageTable, ...] = ()
    figures: tuple[tuple[str, str], ...] = ()


def write_html(path, title, sections):
    """Write an HTML page that needs no other file, pictures included. For screens of any width, light or dark."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = _data_uri
    html = environment.from_string(_PAGE).render(title=title, sections=sections)
    with replacing(path) as file:
        file.write(html)


def write_sections(path, sections):
    """Write sections as JSON for a later :func:`read_sections`; figures by their path relative to the file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    described = [asdict(section) for section in sections]
    for section in described:
        section["figures"] = [(os.path.relpath(figure, path.parent), caption) for figure, caption in section["figures"]]
    with replacing(path) as file:
        file.write(json.dumps(described, indent=1) + "\n")


def read_sections(path):
    """Read sections written by :func:`write_sections`; ValueError names a file that is something else."""
    path = Path(path)
    sections = []
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, list):
            raise TypeError(f"it must hold a list, got {type(found).__name__}")
        for section in found:
            tables = tuple(PageTable(**table) for table in section["tables"])
            figures = tuple((str(path.parent / figure), caption) for figure, caption in section["figures"])
            sections.append(Section(section["title"], section["text"], tables, figures))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not what dynexec demo writes: {type(error).__name__}: {error}") from error
    for figure in (figure for section in sections for figure, _ in section.figures):
        if not Path(figure).is_file():
            raise ValueError(f"{path} names a picture that is not there: {figure}")
    return sections


def bench_sections(rows, folder):
    """Return sections for result rows; their plots are written to ``folder``."""
    figures = _speed_up_figures([row for row in rows if row["realised"] is not None], Path(folder))
    sections = []
    if figures:
        text = "On the diagonal, the time saved follows the FLOPs saved."
        sections.append(Section("Theoretical against realised speed-up", text, figures=figures))
    if rows:
        sections.append(Section("How to read the tables", LEGEND))
    for title, members in group_rows(rows):
        failed = tuple(number for number, row in enumerate(members) if row["failed"])
        main = PageTable(tuple(COLUMNS), tuple(map(tuple, map(cells, members))), failed)
        headings, times = candidate_table(members)
        note = "Milliseconds per batch, median (90th percentile) of one interleaved run per batch size."
        sections.append(Section(title, versions(members), (main, PageTable(headings, times, failed, note))))
    return sections


def profile_sections(profiles, folder):
    """Return a section for each :class:`Profile`, by path of its file; their plots are written to ``folder``."""
    sections = []
    for number, (path, profile) in enumerate(profiles.items()):
        stem = f"{folder}/profile_{number}"
        figures = [(picture, "Per part: bars are measured.") for picture in plot_parts(profile, stem)]
        figures.append((plot_losses(profile, f"{stem}_losses.png"), "Lost, by cause; below zero: gained."))
        times = f"Measured {1e3 * profile.measured:.3f} ms, theoretical {1e3 * profile.theoretical:.3f} ms."
        if profile.moved is not None:
            times += f" Gathering and scattering rows moves {profile.moved / 1e6:.2f} MB."
        text = "\n\n".join([". ".join((*profile.summary(), times)), _PROFILE_TEXT])
        headings, rows = profile.table()
        table = PageTable(headings, rows, note=_PROFILE_NOTE)
        sections.append(Section(f"Where the time went: {Path(path).stem}", text, (table,), tuple(figures)))
    return sections


def _speed_up_figures(rows, folder):
    """Return (PNG, caption) per network, and per machine for all networks with one row for each batch size."""
    several, single = {}, {}
    for title, members in group_rows(rows):
        if len(members) > len({row["batch"] for row in members}):
            several[title] = members
        else:
            single.setdefault(", ".join(machine(members[0])), []).extend(members)
    hollow = "Hollow: decisions like those of the trained policy, its network included."
    plots = several | {f"networks of parts, {where}": members for where, members in single.items()}
    return tuple(
        (str(plot_speed_up(members, folder / f"speed_up_{number}.png", title=title)), f"{title}. {hollow}")
        for number, (title, members) in enumerate(plots.items())
    )


def add_arguments(parser):
    """Add the arguments of ``dynexec report`` to an argparse parser."""
    parser.add_argument("--results", nargs="+", type=Path, help="files or folders of bench rows (bench/results, out)")
    parser.add_argument("--demo", type=Path, help=f"what dynexec demo wrote ({DEFAULT_DEMO}, if it is there)")
    parser.add_argument(
        "--profiles", nargs="+", type=Path, help=f"files of dynexec profile --json ({DEFAULT_PROFILES})"
    )
    parser.add_argument("--out", type=file, default=Path(DEFAULT_OUT), help="the page (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def main(args):
    """Run ``dynexec report``; return the exit status: 1 if there is nothing to report, or a file is invalid."""
    paths = args.results or [Path(path) for path in DEFAULT_RESULTS if Path(path).exists()]
    try:
        rows = read_rows(*paths)
        profiles = {path: Profile.read_json(path) for path in args.profiles or sorted(Path().glob(DEFAULT_PROFILES))}
        demos = [args.demo] if args.demo else [path for path in (Path(DEFAULT_DEMO),) if path.exists()]
        sections = [section for path in demos for section in read_sections(path)]
    except (OSError, ValueError) as error:
        print(f"dynexec report: {error}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        sections += bench_sections(rows, folder)
        sections += profile_sections(profiles, folder)
        if sections:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_html(args.out, "dynexec: time saved against FLOPs saved", sections)
    written = str(args.out) if sections else None
    if args.json:
        print(
            json.dumps(
                {
                    "report": written,
                    "rows": len(rows),
                    "profiles": len(profiles),
                    "sections": [section.title for section in sections],
                }
            )
        )
    elif written:
        print(f"{written}: {len(sections)} sections, {len(rows)} bench rows, {len(profiles)} profiles")
    else:
        print("nothing to report yet: run dynexec bench, demo or profile first")
    return 0 if sections else 1


def _data_uri(path):
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()
