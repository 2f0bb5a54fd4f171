"""``dynexec demo``: dynamic networks on real digits, video and photos, and the published ones at their keep rates."""

import json
from pathlib import Path

import torch
from rich.console import Console

from dynexec.files import replacing
from dynexec.measure.environment import missing_packages
from dynexec.report.arguments import seconds, threads
from dynexec.report.console import new_progress
from dynexec.report.demo_parts import PARTS, Run
from dynexec.report.demo_table import COLUMNS, NOTE, cells, plot_results, print_table
from dynexec.report.page import DEFAULT_DEMO, DEFAULT_OUT, PageTable, Section, write_html, write_sections

_TITLE = "dynexec: dynamic networks on real input"
_CAPTION = "On the diagonal, the time saved is the FLOPs saved; filled: against dynexec itself with all blocks on."


def add_arguments(parser):
    """Add the arguments of ``dynexec demo`` to an argparse parser."""
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="default: %(default)s")
    parser.add_argument("--threads", type=threads, help="default: as many as torch takes by itself")
    parser.add_argument(
        "--seconds", type=seconds, default=6.0, help="timing per network; at least five rounds (%(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(DEFAULT_OUT).parent, help="folder for page and pictures (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print results as JSON instead of a table")


def main(args):
    """Run ``dynexec demo``; return the exit status: 1 if an output was wrong or no part could run."""
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    parts, results, skipped, report = [], [], {}, None
    for part in _run_parts(args, skipped):
        parts.append(part)
        results += part.results
        report = write_page(parts, args.out)  # now, since the next part takes minutes and may fail
    if args.json:
        facts = {key: value for part in parts for key, value in part.facts.items()}
        rows = [{"what": result.what, **result.row} for result in results]
        print(json.dumps({"rows": rows, **facts, "skipped": skipped, "report": report and str(report)}))
    elif results:
        console = Console()
        print_table(console, results)
        console.print(f"{torch.get_num_threads()} threads; page and pictures: {report}")
    return int(not results or any(result.row["failed"] for result in results))


def _run_parts(args, skipped):
    """Return the results of the parts, one after the other; ``skipped`` gets those that lack packages, with these."""
    with new_progress() as progress:
        task = progress.add_task("", total=len(args.parts))
        for done, name in enumerate(args.parts):
            run_part, needs = PARTS[name]
            if absent := missing_packages(needs):
                skipped[name] = absent
                text = f"{name} skipped, not installed: {', '.join(absent)}; pip install 'dynexec[demo]' brings all"
                progress.console.print(text, markup=False, highlight=False)
            else:

                def show(share, text, done=done):
                    progress.update(task, completed=done + share, description=text)

                yield run_part(Run(args.out, args.seconds, show))
            progress.update(task, completed=done + 1, description="done")


def write_page(parts, folder):
    """Write the page, its picture, and what ``dynexec report`` needs to show them later; return the page's path.

    Parameters
    ----------
    parts : list of Part
        With at least one result among them.
    folder : Path
    """
    results = [result for part in parts for result in part.results]
    failed = tuple(number for number, result in enumerate(results) if result.row["failed"])
    table = PageTable(tuple(COLUMNS), tuple(cells(result) for result in results), failed, NOTE)
    picture = folder / "demo_speed_up.png"
    with replacing(picture, "wb") as file:
        plot_results(results, file)
    figure = str(picture), _CAPTION
    row = results[0].row
    text = f"{row['cpu']}, {row['threads']} threads, torch {row['versions']['torch']}, {row['dtype']}"
    sections = [Section("Time saved against FLOPs saved", text, (table,), (figure,))]
    sections += [section for part in parts for section in part.sections]
    write_sections(folder / Path(DEFAULT_DEMO).name, sections)
    report = folder / Path(DEFAULT_OUT).name
    write_html(report, _TITLE, sections)
    return report
