"""Damaged and hostile input: every one must give an error of ours that says what is wrong, or the right answer.

    python bench/fuzz.py --seconds 60 --seed 0                  # all targets, 60 seconds together
    python bench/fuzz.py --seconds 60 --seed 0 decisions        # this one
    python bench/fuzz.py --seed 0 --only 17 decisions           # its input number 17, in this process

Batches of inputs run in processes of their own, so that a crash or a hang is seen, too. An input is made of seed
and number alone. bench/fuzz_targets.py says what counts as an error of ours. Exit status 1 if an input failed.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time

import torch
from fuzz_targets import TARGETS

BATCH = 20.0  # seconds of inputs per process, besides its start
LIMIT = 120.0  # more and it hangs


def run_batch(target, seed, first, seconds):
    """Try inputs in this process, one at least, and print one JSON line before and after each; whether one failed."""
    failed = False
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        attempt = TARGETS[target](folder)
        number, end = first, time.monotonic() + seconds
        while number == first or time.monotonic() < end:
            print(json.dumps({"begins": number}), flush=True)
            found = outcome(attempt, seed, number)
            print(json.dumps({"number": number, **found}), flush=True)
            failed |= found["is"] == "failure"
            number += 1
    return failed


def outcome(attempt, seed, number):
    """What an input gave: "error", "right" or "failure", and what is to be said of it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    torch.manual_seed(number)
    try:
        return {"is": attempt(generator)}
    except Exception as error:
        return {"is": "failure", "text": f"{type(error).__name__}: {error}"[:300]}


def run_process(target, seed, first, seconds):
    """The outcomes of a batch, each a dict; of one that ended the process, that it did."""
    command = [sys.executable, "-W", "ignore", __file__, target, "--batch", str(seed), str(first), str(seconds)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        output, ended = result.stdout, f"ended with status {result.returncode}: {result.stderr[-300:]}"
        whole = result.returncode == 0
    except subprocess.TimeoutExpired as error:
        output, ended, whole = (error.stdout or b"").decode(), f"took longer than {LIMIT} seconds", False
    begun, found = first - 1, []
    for line in map(json.loads, output.splitlines()):
        begun = line.get("begins", begun)
        if "number" in line:
            found.append(line)
    if not whole:
        found.append({"number": max(begun, first), "is": "failure", "text": f"the process {ended}"})
    return found


def fuzz(target, seed, seconds):
    """Counts of outcomes of one target, of one input at least, and its failures."""
    counts, failures, number = {"error": 0, "right": 0, "failure": 0}, [], 0
    end = time.monotonic() + seconds
    while number == 0 or time.monotonic() < end:
        found = run_process(target, seed, number, min(max(end - time.monotonic(), 0.0), BATCH))
        for one in found:
            counts[one["is"]] += 1
            if one["is"] == "failure":
                failures.append(one)
        number = found[-1]["number"] + 1
    return counts, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="of all targets together (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="repeat one input of the target in this process")
    parser.add_argument("--batch", nargs=3, type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    targets = args.targets or list(TARGETS)
    if unknown := [name for name in targets if name not in TARGETS]:
        parser.error(f"unknown target {unknown[0]!r}; these are: {', '.join(TARGETS)}")
    if not 0 < args.seconds < math.inf:
        parser.error(f"argument --seconds: must be more than 0, got {args.seconds}")
    if args.batch is not None:
        seed, first, seconds = args.batch
        run_batch(targets[0], int(seed), int(first), seconds)
        return 0
    if args.only is not None:
        if len(targets) > 1:
            parser.error("--only needs one target")
        return int(run_batch(targets[0], args.seed, args.only, 0.0))
    print(f"{'target':12} {'inputs':>8} {'errors':>8} {'right':>8} {'failures':>8}")
    failed = False
    for target in targets:
        counts, failures = fuzz(target, args.seed, args.seconds / len(targets))
        numbers = sum(counts.values()), counts["error"], counts["right"], counts["failure"]
        print(f"{target:12} " + " ".join(f"{number:>8}" for number in numbers), flush=True)
        for failure in failures[:5]:
            print(f"  {target} --seed {args.seed} --only {failure['number']}: {failure['text']}", flush=True)
        failed |= bool(failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
