"""BlockDrop from scratch on handwritten digits: does the policy know which blocks to drop?

Trains a small residual network, then its policy, then both together, for several seeds, and compares the policy with
all blocks on and with dropping blocks without looking at the image. About 40 seconds per seed on one core, and 10 for
the control.

    python examples/digits_blockdrop.py --seeds 0 1 2 --output out/digits

writes table.txt, results.json and lesion.png (what deleting blocks costs the network before it has a policy) there.
Needs scikit-learn, and matplotlib for the plot.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, pstdev
from time import perf_counter

import torch

from dynexec import models
from dynexec.models.digits import compare_digits, load_digits, train_digits

CLEAR_LINE = "\r\033[K"


def run_seed(seed, control):
    """Rows of the comparison, seconds per stage and a lesion study for one seed."""
    data = load_digits(seed)

    def show(stage, record):
        kept = f", {record['kept']:.1f} blocks kept" if "kept" in record else ""
        print(f"{CLEAR_LINE}seed {seed}: {stage}, epoch {record['epoch'] + 1}{kept}", end="", flush=True)

    trained = train_digits(data, seed, on_epoch=show if sys.stdout.isatty() else None)
    start = perf_counter()
    rows = compare_digits(trained, data, seed=seed, train_control=control)
    seconds = {**trained.seconds, "comparison": perf_counter() - start}
    summary = ", ".join(f"{stage} {time:.1f} s" for stage, time in seconds.items())
    print(f"{CLEAR_LINE if sys.stdout.isatty() else ''}seed {seed}: {summary}", flush=True)
    return rows, seconds, models.lesion_study(trained.dense, *data.test, seed=seed)


def make_table(seeds, runs):
    """Mean over seeds, its spread, and every seed's accuracy."""
    lines = [f"{'':34} accuracy %      blocks kept     FLOPs saved %   accuracy % by seed {list(seeds)}"]
    for rows in zip(*runs, strict=True):
        cells = []
        for key, scale in (("accuracy", 100), ("kept", 1), ("saving", 100)):
            values = [scale * row[key] for row in rows]
            cells.append(f"{mean(values):5.2f} +- {pstdev(values):4.2f}")
        by_seed = "  ".join(f"{100 * row['accuracy']:.1f}" for row in rows)
        lines.append(f"{rows[0]['name']:34} " + "   ".join(cells) + f"   {by_seed}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("out/digits"), help="folder (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; one is best for such small layers")
    parser.add_argument("--no-control", action="store_true", help="skip the network trained under random dropping")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)  # before the work, which would be lost
    runs, times, studies = zip(*(run_seed(seed, not args.no_control) for seed in args.seeds), strict=True)
    table = make_table(args.seeds, runs)
    (args.output / "table.txt").write_text(table + "\n")
    results = [
        {"seed": seed, "seconds": seconds, "rows": rows, "deleted_one": study.by_block, "deleted_many": study.by_count}
        for seed, rows, seconds, study in zip(args.seeds, runs, times, studies, strict=True)
    ]
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    models.plot_lesion(studies[0], args.output / "lesion.png")
    print(f"\n{table}\n\nwritten to {args.output}")


if __name__ == "__main__":
    main()
