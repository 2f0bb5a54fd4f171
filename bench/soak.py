"""Thousands of calls of frozen networks, no two alike: right outputs, and memory that does not grow.

    python bench/soak.py --calls 10000

A frozen BlockDrop network and a frozen AdaShare one, whose parts are chosen per task, run on random batch sizes from 0
to 16, eleven image sizes and random decisions. Every tenth output, drawn at random, is compared with what the model
gives that computes everything and masks it. The last quarter of the calls comes from four threads at once. Resident
memory is read every hundred calls. Within either phase, after a third of it for warming up, it may grow by 4 MB (16 in
fewer than 10,000 calls, which warm up for less long) and by 32 MB. ``--checked 0`` runs the frozen networks alone. Exit
status 1 if it grew more, or an output was another. Linux only.
"""

import argparse
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

# For the models that outputs are compared with, torch and oneDNN keep up to 1024 convolutions for each thread and for
# the process, one for every shape that was met: 20 MB each, which would hide what grows elsewhere. Read on import.
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

import torch
from memory import resident

import dynexec
from dynexec.executors.proof import relative_error
from dynexec.models import adashare_resnet, blockdrop_resnet

SIZES = range(8, 49, 4)  # more than programs are kept for
LARGEST_BATCH = 16
THREADS = 4
TOLERANCE = 1e-5
MANY = 10000  # calls
# MB, of many calls in one thread, of fewer, and in several threads, each of which fills a heap of its own first.
GROWTH_OF_MANY, GROWTH_OF_FEW, GROWTH_OF_THREADS = 4.0, 16.0, 32.0


class Soak:
    """Counts of what was done; safe to call from several threads.

    Parameters
    ----------
    name : str
    reference, frozen : callable
        Of ``(x, decisions)``.
    draw : callable
        ``draw(n, generator)`` gives decisions for a batch of n.
    smallest : int
        Batch.
    """

    def __init__(self, name, reference, frozen, draw, smallest=0):
        self.name, self.reference, self.frozen = name, reference, frozen
        self.draw, self.smallest = draw, smallest
        self.checks, self.failures, self.lock = 0, [], threading.Lock()

    def call(self, seed, checked):
        """One call, with input from a seed; a share of them is ``checked``."""
        generator = torch.Generator().manual_seed(seed)
        n = int(torch.randint(self.smallest, LARGEST_BATCH + 1, (), generator=generator))
        size = SIZES[int(torch.randint(len(SIZES), (), generator=generator))]
        x, decisions = torch.randn(n, 3, size, size, generator=generator), self.draw(n, generator)
        actual = self.frozen(x, decisions)
        if float(torch.rand((), generator=generator)) >= checked:
            return
        with torch.no_grad():
            error = relative_error(actual, self.reference(x, decisions))
        with self.lock:
            self.checks += 1
            if not error < TOLERANCE:
                self.failures.append(f"{self.name}, seed {seed}, batch {n}, size {size}: differs by {error:.1e}")


def blockdrop():
    """A network of one engine segment; its columns are kept with a rate that is drawn anew for each call."""
    model = blockdrop_resnet((2, 2, 2), (8, 16, 24)).eval()
    frozen = dynexec.freeze(model, torch.randn(8, 3, SIZES[-1], SIZES[-1]))

    def draw(n, generator):
        return torch.rand(n, 6, generator=generator) < torch.rand((), generator=generator)

    return Soak("blockdrop", partial(model, mode="capacity"), frozen, draw)


def adashare():
    """A network of parts; decisions per image and task."""
    model = adashare_resnet(18, num_classes=(4, 3), blocks=(1, 1, 1, 1), widths=(8, 8, 8, 8), head_width=8).eval()
    frozen = dynexec.freeze(model, torch.randn(2, 3, SIZES[-1], SIZES[-1]))

    def draw(n, generator):
        return torch.rand(n, 2, 4, generator=generator) < torch.rand((), generator=generator)

    def reference(x, decisions):
        return model(x, soft_decisions=decisions.float())

    return Soak("adashare", reference, frozen, draw, smallest=1)


def soak(calls, seed, checked):
    """Run; return the soaks and, of each phase, the resident memory in MB after every hundred calls."""
    torch.manual_seed(seed)
    soaks, memory = [blockdrop(), adashare()], ([], [])
    alone = calls * 3 // 4
    for number in range(alone):
        soaks[number % 2].call(seed * calls + number, checked)
        if number % 100 == 99:
            memory[0].append(resident("VmRSS"))
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(alone, calls, 100):
            numbers = range(start, min(start + 100, calls))
            list(pool.map(lambda number: soaks[number % 2].call(seed * calls + number, checked), numbers))
            memory[1].append(resident("VmRSS"))
    return soaks, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10000, help="at least 300 (%(default)s)")
    parser.add_argument("--checked", type=float, default=0.1, help="share of the outputs to compare (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.calls < 300:
        parser.error(f"--calls must be at least 300, got {args.calls}")
    soaks, memory = soak(args.calls, args.seed, args.checked)
    checks = sum(one.checks for one in soaks)
    failures = [failure for one in soaks for failure in one.failures]
    print(f"{args.calls} calls, {checks} outputs compared, {len(failures)} failures")
    grew = []
    limits = GROWTH_OF_MANY if args.calls >= MANY else GROWTH_OF_FEW, GROWTH_OF_THREADS
    for name, found, limit in zip(("one thread", f"{THREADS} threads"), memory, limits):
        first, *later = found[len(found) // 3 :]
        most = max((first, *later))
        if most - first > limit:
            grew.append(f"{name}: memory grew by more than {limit:.0f} MB")
        print(f"{name}: resident {first:.1f} MB after warming up, at most {most:.1f} MB, at the end {found[-1]:.1f} MB")
    for line in failures[:5] + grew:
        print(line)
    return int(bool(failures or grew))


if __name__ == "__main__":
    sys.exit(main())
