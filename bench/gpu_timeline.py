"""What a GPU does in one call: kernels, what they take, and the gaps between them, of every way to run a network.

    python bench/gpu_timeline.py NETWORK BATCH [--keep 1.0 0.9 0.5] [--dry]

The ways are the static network in cuDNN's convolutions, in one graph, and the executors, in one graph each. Their
outputs are compared with the original's. Per way and keep rate: milliseconds of a call behind others and of one alone,
by the GPU's clock; then, by the profiler, the number of kernels of a call, how long it takes from the first to the
last, the sums of when any runs and of the gaps between them, and the kernels by name, those that take most first. A
kernel that begins while the one before still runs counts from that one's end on. ``--dry`` runs a network's executor
on a CPU.
"""

import argparse
import sys
from collections import defaultdict
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from dynexec import decide, freeze
from dynexec.executors.costs import seconds
from dynexec.executors.proof import relative_error, tolerance
from dynexec.report.baselines import DenseLibrary
from dynexec.report.experiment import draw_decisions, num_blocks
from dynexec.report.nets import NETS, build, make_images

EXECUTORS = ("fused", "dense", "switched")
MOST = 12  # lines of kernels


def prepare(model, images, device, dry):
    """{name: call of decisions} of all that can run the network, and remarks: why others cannot, what runs in these."""
    ways, remarks = {}, []
    if not dry:
        library = object.__new__(DenseLibrary)
        library.prepare(model, images, 1)
        ways["dense cuDNN"] = partial(library, images)
    for name in EXECUTORS[:1] if dry else EXECUTORS:
        try:
            frozen = freeze(model, images, executor=name)
            ways[name] = partial(frozen, images)
            remarks += [f"{name}: {note}" for note in (*frozen.notes, *frozen.graph_notes())]
        except RuntimeError as error:
            remarks.append(f"{name}: {error}")
    return ways, remarks


def alone(call, device):
    """Milliseconds of a call that the GPU has nothing to do before, the median of a few."""
    if device.type != "cuda":
        return float("nan")
    times = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def trace(call, device):
    """Begin, end and name of what one call runs, in microseconds: the second of two, the first may load something."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        for _ in range(2):
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    events = [event for event in found.events() if event.device_type == kind and event.cpu_parent is None]
    both = sorted((event.time_range.start, event.time_range.end, event.name) for event in events)
    return both[len(both) // 2 :]


def describe(events):
    """Lines about the events of one call."""
    if not events:
        return ["  the profiler saw no kernels"]
    kernels, gaps, free = defaultdict(list), 0.0, events[0][0]
    for begin, end, name in events:
        kernels[name].append(max(end - max(begin, free), 0.0))
        gaps += max(begin - free, 0.0)
        free = max(free, end)
    total = sum(map(sum, kernels.values()))
    longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:MOST]
    return [
        f"  {len(events)} kernels in {free - events[0][0]:.0f} us: {total:.0f} us, and {gaps:.0f} us between them",
        *(f"  {sum(t):8.1f} us  {len(t):4} x {sum(t) / len(t):7.2f}  {name[:80]}" for name, t in longest),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=NETS)
    parser.add_argument("batch", type=int)
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.9, 0.5])
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    device, dtype = torch.device("cpu" if args.dry else "cuda"), torch.float32 if args.dry else torch.float16
    model = build(NETS[args.network]).to(device, dtype)
    images = make_images(args.batch, NETS[args.network].size).to(device, dtype)
    ways, remarks = prepare(model, images, device, args.dry)
    print(*remarks, sep="\n", flush=True)
    runs, wrong = {}, 0
    for keep in args.keep:
        decisions = draw_decisions(keep, num_blocks(model), args.batch).draws[0].to(device)
        with decide(decisions):
            expected = getattr(model, "backbone", model)(images)
        for name, call in ways.items():
            if name == "dense cuDNN" and keep < 1:
                continue
            run = partial(call, decisions)
            try:
                error = relative_error(run(), expected)
                times = f"{1e3 * seconds(run, device):.3f} ms, alone {alone(run, device):.3f} ms"
            except RuntimeError as reason:  # no graph, for one; the others are worth having
                wrong += 1
                print(f"{name}, keep {keep}: {reason}", flush=True)
                continue
            runs[f"{name}, keep {keep}"] = run
            wrong += error > tolerance(dtype, device)
            print(
                f"{name}, keep {keep}: {times}; differs by {error:.1e} of the largest output from the original's",
                flush=True,
            )
    for name, run in runs.items():  # behind all timings: the profiler may leave something behind
        print(name, *describe(trace(run, device)), sep="\n", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
