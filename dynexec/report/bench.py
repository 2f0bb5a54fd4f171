"""``dynexec bench``: theoretical against realised speed-up, against every baseline."""

import json
import os
import sys
import tempfile
from argparse import ArgumentTypeError
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dynexec.report.arguments import file, keep_share, positive, seconds, threads
from dynexec.report.baselines import BASELINES
from dynexec.report.console import new_progress, print_wide
from dynexec.report.experiment import PUBLISHED, describe_error, draw_decisions, num_blocks, run_experiment
from dynexec.report.nets import DEFAULT_NETS, NETS, build, make_images
from dynexec.report.rows import append_row, read_rows
from dynexec.report.systems import SYSTEMS, build_system
from dynexec.report.systems_experiment import LIBRARIES, run_system
from dynexec.report.tables import COLUMNS, LEFT_OUT, LEGEND, cells, with_noise

KEEPS = (0.25, 0.5, 0.75, 0.9, 1.0, PUBLISHED)
DEFAULT_OUT = "out/bench.jsonl"
SYSTEM_KEEP = f"its decisions are the published ones: leave out --keep, or give {PUBLISHED}"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_WIDE = 200  # columns of text that the whole table needs


def add_arguments(parser):
    """Add the arguments of ``dynexec bench`` to an argparse parser."""
    names = [baseline.name for baseline in BASELINES]
    add = parser.add_argument
    nets = [*NETS, *SYSTEMS]
    add("--nets", nargs="+", default=DEFAULT_NETS, choices=nets, help=f"default: {' '.join(DEFAULT_NETS)}")
    add("--batch", nargs="+", type=positive, help="batch sizes; default: those that suit each network")
    add(
        "--keep",
        nargs="+",
        type=keep_share,
        help=f"shares of blocks kept between 0 and 1; {PUBLISHED!r}: decisions like those of the trained policy, where "
        f"they are known, as all networks of parts have them; default: {' '.join(map(str, KEEPS))}",
    )
    add("--baselines", nargs="+", default=names, choices=names, metavar="NAME", help=f"only these of: {names}")
    add("--device", type=_device, default="cpu", help="cpu or cuda; default: %(default)s")
    add(
        "--dtype",
        choices=list(_DTYPES),
        help="default: float32 on the CPU, float16 on a GPU; outputs are compared with float32's",
    )
    add("--threads", type=threads, help="default: as many as torch takes by itself")
    add(
        "--seconds",
        type=seconds,
        default=60.0,
        help="timing per network and batch, but at least five rounds (%(default)s)",
    )
    add("--out", type=file, help=f"file of result rows; default: {DEFAULT_OUT}, which is replaced")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--append", action="store_true", help="keep the rows that the file has already")
    existing.add_argument("--overwrite", action="store_true", help="replace the file of --out, if it is there")
    add("--json", action="store_true", help="print rows as JSON lines instead of a table")


def main(args):
    """Run ``dynexec bench``; return the exit status: 1 if an output was not equal to the reference's.

    Also 1 after an error of a network, or if nothing was measured; 2 if nothing was tried, because arguments or the
    file of rows are unsuitable.
    """
    out = args.out or Path(DEFAULT_OUT)
    if (reason := _keep_refused(args) or _prepare(out, args)) is not None:
        print(f"dynexec bench: {reason}", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    rows, errors = [], []
    try:
        with new_progress() as progress:
            for row in _measure(args, progress, errors):
                row["unavailable"] = _left_out(args, row["net"]) | row["unavailable"]
                append_row(out, row, anew=not (rows or args.append))
                rows.append(row)
                if args.json:
                    print(json.dumps(row), flush=True)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{len(rows)} rows written to {out}") from None
    if not rows:
        print(f"dynexec bench: nothing was measured, {out} was not written", file=sys.stderr)
        return 1
    console = Console(stderr=args.json)
    if not args.json:
        print_table(console, rows)
    unavailable = {name: reason for row in rows for name, reason in row["unavailable"].items()}
    for name, reason in unavailable.items():
        if reason != LEFT_OUT:
            console.print(f"{name}: {reason}", markup=False)
    console.print(f"{len(rows)} rows written to {out}, {torch.get_num_threads()} threads", markup=False, soft_wrap=True)
    for net, name in sorted({(row["net"], name) for row in rows for name in row["failed"]}):
        console.print(f"{name} on {net} differs from the reference: no speed for it", style="bold red")
    return int(bool(errors) or any(row["failed"] for row in rows))


def _keep_refused(args):
    """Return why networks of parts cannot have these keep rates, or None."""
    systems = [name for name in args.nets if name in SYSTEMS]
    if systems and args.keep is not None and set(args.keep) != {PUBLISHED}:
        return f"{systems[0]}: {SYSTEM_KEEP}"
    return None


def _prepare(out, args):
    """Make the folder of the file of rows; return why the file cannot take the rows, or None.

    This comes before anything is measured: afterwards hours would be lost.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists() and not out.is_file():  # a device or a pipe
        return None
    with tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(out))):
        pass  # OSError where no file can be written
    if not out.exists():
        return None
    if args.append:
        try:
            read_rows(out)
        except ValueError as error:
            return f"cannot append: {error}"
    elif args.out is not None and not args.overwrite and out.stat().st_size:
        return f"{out} is there already: --append keeps what it holds, --overwrite replaces it"
    return None


def _measure(args, progress, errors):
    """Yield rows, network by network and batch by batch; errors raised instead are appended to ``errors``."""
    known = NETS | SYSTEMS
    plan = [(name, batch) for name in args.nets for batch in args.batch or known[name].batches]
    task = progress.add_task("", total=len(plan))
    baselines = [baseline for baseline in BASELINES if baseline.name in args.baselines]
    dtype = _DTYPES[args.dtype or ("float16" if args.device == "cuda" else "float32")]
    model, built = None, None
    for done, (name, batch) in enumerate(plan):
        net, label = known[name], f"{name}, batch {batch}"
        progress.update(task, completed=done, description=f"{label}: building")
        how = {"dtype": dtype, "seconds": args.seconds, "progress": partial(_report, progress, task, done, label)}
        try:
            if name in SYSTEMS:
                libraries = [library for library in LIBRARIES if library.name in args.baselines]
                system = build_system(net).to(args.device)
                yield from run_system(system, net, batch, name=name, libraries=libraries, **how)
                continue
            if (reason := net.missing()) is not None:
                progress.console.print(f"{name}: {reason}", markup=False)
                continue
            if built != name:
                model, built = build(net).to(args.device), name
            settings = make_settings(net, num_blocks(model), batch, args.keep or KEEPS)
            if not settings:
                progress.console.print(f"{name}: nothing is published about its decisions", markup=False)
                continue
            images = make_images(batch, net.size).to(args.device)
            yield from run_experiment(model, images, settings, name=name, baselines=baselines, **how)
        except Exception as error:  # too large a batch, for instance: the others are measured all the same
            text = f"{label}: {describe_error(error)}"
            progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
            errors.append(label)
    progress.update(task, completed=len(plan), description="done")


def _left_out(args, net):
    """Return the dense networks that ``--baselines`` leaves out, for a row to name: any might be the strongest."""
    offered = LIBRARIES if net in SYSTEMS else BASELINES
    offered = [one for one in offered if one.dense and not one.own and one.device in (None, args.device)]
    return {one.name: LEFT_OUT for one in offered if one.name not in args.baselines}


def _report(progress, task, done, label, share, text):
    progress.update(task, completed=done + share, description=f"{label}: {text}")


def print_table(console, rows):
    """Print rows as a table; those with an unequal output are red."""
    table = Table("net", *COLUMNS, caption=LEGEND, caption_justify="left", row_styles=["", "dim"])
    for row in with_noise(rows):
        table.add_row(row["net"], *cells(row), style="bold red" if row["failed"] else None)
    print_wide(console, table, _WIDE)


def _device(text):
    if text not in ("cpu", "cuda"):
        raise ArgumentTypeError(f"must be cpu or cuda, got {text!r}")
    if text == "cuda" and not torch.cuda.is_available():
        raise ArgumentTypeError("torch sees no GPU here")
    return text


def make_settings(net, blocks, batch, keeps):
    """Return a :class:`Setting` for each of ``keeps``, except those for which nothing is published."""
    settings = []
    for keep in keeps:
        if keep != PUBLISHED:
            settings.append(draw_decisions(keep, blocks, batch))
        elif net.published is not None:
            settings.append(draw_decisions(net.published.kept / blocks, blocks, batch, policies=net.published.policies))
    return settings
