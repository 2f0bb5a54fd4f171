"""``dynexec bench``: theoretical against realised speed-up, against every baseline."""

import json
import math
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dynexec.report.baselines import BASELINES
from dynexec.report.experiment import PUBLISHED, draw_decisions, num_blocks, run_experiment
from dynexec.report.nets import DEFAULT_NETS, NETS, build, make_images
from dynexec.report.rows import append_row
from dynexec.report.tables import COLUMNS, LEGEND, cells

KEEPS = ("0.25", "0.5", "0.75", "0.9", "1", PUBLISHED)
DEFAULT_OUT = "out/bench.jsonl"
_WIDE = 200  # columns of text that the whole table needs


def add_arguments(parser):
    """Add the arguments of ``dynexec bench`` to an argparse parser."""
    names = [baseline.name for baseline in BASELINES]
    parser.add_argument("--nets", nargs="+", default=DEFAULT_NETS, choices=list(NETS), help="default: %(default)s")
    parser.add_argument("--batch", nargs="+", type=int, help="batch sizes; default: those that suit each network")
    parser.add_argument(
        "--keep",
        nargs="+",
        default=KEEPS,
        help=f"shares of blocks kept, and {PUBLISHED!r}: decisions like those of the trained policy, where there is one; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--baselines", nargs="+", default=names, choices=names, help="only these (masked eager is always the reference)"
    )
    parser.add_argument("--threads", type=int, help="default: as many as torch takes by itself")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="timing per network and batch; at least five rounds (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path(DEFAULT_OUT), help="file of result rows (%(default)s)")
    parser.add_argument("--append", action="store_true", help="keep the rows that the file has already")
    parser.add_argument("--json", action="store_true", help="print rows as JSON lines instead of a table")


def main(args):
    """Run ``dynexec bench``; return the exit status: 1 if an output was not equal to the reference's."""
    batches, keeps = _check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.append:
        args.out.unlink(missing_ok=True)
    console = Console(stderr=args.json)
    baselines = [baseline for baseline in BASELINES if baseline.name in args.baselines]
    plan = [(name, batch) for name in args.nets for batch in batches or NETS[name].batches]
    rows, model, built = [], None, None
    with _progress() as progress:
        task = progress.add_task("", total=len(plan))
        for done, (name, batch) in enumerate(plan):
            if (reason := NETS[name].missing()) is not None:
                progress.console.print(f"{name}: {reason}")
                continue
            if built != name:
                model, built = build(NETS[name]), name
            settings = _settings(NETS[name], num_blocks(model), batch, keeps)
            if not settings:
                progress.console.print(f"{name}: nothing is published about its decisions")
                continue

            def show(share, text, done=done, label=f"{name}, batch {batch}"):
                progress.update(task, completed=done + share, description=f"{label}: {text}")

            found = run_experiment(
                model,
                make_images(batch, NETS[name].size),
                settings,
                name=name,
                baselines=baselines,
                seconds=args.seconds,
                progress=show,
            )
            for row in found:
                append_row(args.out, row)
                if args.json:
                    print(json.dumps(row), flush=True)
            rows += found
            progress.update(task, completed=done + 1)
    _print(console, rows, args)
    return int(any(row["failed"] for row in rows))


def print_table(console, rows):
    """Print rows as a table; those with an unequal output are red."""
    table = Table("net", *COLUMNS, caption=LEGEND, caption_justify="left", row_styles=["", "dim"])
    for row in rows:
        table.add_row(row["net"], *cells(row), style="bold red" if row["failed"] else None)
    if console.width < _WIDE and not console.is_terminal:
        console.width = _WIDE
    console.print(table)


def _print(console, rows, args):
    if not args.json:
        print_table(console, rows)
        for row in rows[:1]:
            for name, reason in row["unavailable"].items():
                console.print(f"{name}: {reason}")
    console.print(f"{len(rows)} rows in {args.out}, {torch.get_num_threads()} threads")
    wrong = sorted({(row["net"], name) for row in rows for name in row["failed"]})
    for net, name in wrong:
        console.print(f"{name} on {net} differs from the reference: no speed for it", style="bold red")


def _check(args):
    """Batch sizes and keep rates from the command line, or ValueError."""
    batches, keeps = args.batch or [], []
    if any(batch < 1 for batch in batches):
        raise ValueError(f"--batch must be 1 or more, got {batches}")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads must be 1 or more, got {args.threads}")
    for keep in args.keep:
        try:
            value = None if keep == PUBLISHED else float(keep)
        except ValueError:
            value = math.nan
        if value is not None and not 0.0 <= value <= 1.0:
            raise ValueError(f"--keep must be shares between 0 and 1, or {PUBLISHED!r}; got {keep!r}")
        keeps.append(value)
    return batches, keeps


def _settings(net, blocks, batch, keeps):
    settings = []
    for keep in keeps:
        if keep is not None:
            settings.append(draw_decisions(keep, blocks, batch))
        elif net.published is not None:
            settings.append(draw_decisions(net.published.kept / blocks, blocks, batch, policies=net.published.policies))
    return settings


def _progress():
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=Console(file=sys.stderr)
    )
