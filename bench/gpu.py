"""What ``bench/gpu.sh`` runs: tests, networks against every baseline, timelines, a step of training, rates of the GPU.

    python bench/gpu.py FOLDER [--minutes 10] [--steps tests headline] [--dry]

Every step is a process of its own with a time limit, so that none takes another one's results with it; one that is
interrupted ends with all that it started. The rows of a network and batch size are written when they are measured:
``rates.jsonl``, ``gpu.jsonl`` (as of ``dynexec bench``), and after each step ``summary.md``; what is there already is
not measured again. ``--dry`` does the same on a CPU, with a tiny network and kernels in
Triton's interpreter.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import torch
from predict import program

from dynexec import freeze
from dynexec.executors.forecast import program_seconds
from dynexec.kernels.offline import compile_launches
from dynexec.kernels.plan import find_body, plan
from dynexec.measure.roofline import H100
from dynexec.models import adashare_resnet
from dynexec.report.baselines import BASELINES, DenseEager
from dynexec.report.experiment import Dynexec, draw_decisions, num_blocks, run_experiment
from dynexec.report.nets import NETS, build, make_images
from dynexec.report.rows import append_row, read_rows
from dynexec.report.systems import SYSTEMS, System, build_system
from dynexec.report.systems_experiment import run_system
from dynexec.report.tables import LEFT_OUT, markdown

ROOT = Path(__file__).parents[1]
TESTS = [f"tests/test_{name}.py" for name in ("graphs", "conditional", "resident", "experts", "launches", "kernels")]
# Not those that compile or emulate what shall run on a GPU: other machines run these.
ON_A_GPU = "test_graphs or test_launches or test_kernels or a_gpu or kernels or switch or if_runs"
KEEPS = (0.5, 0.25, 0.75, 0.9, 1.0)
# Network and batch size, the most important first.
HEADLINE = [
    *(("resnet101", 32), ("spottune", 64), ("resnet101", 128), ("resnet110", 128), ("resnet101", 8)),
    *(("efficientnet_lite0", 64), ("resnet110", 1024), ("resnet50", 64), ("resnet101", 256), ("resnet101", 1)),
    *(("resnet101", 64), ("resnet110", 32), ("resnet32", 128), ("resnet110", 1)),
]
# Systems that choose among parts, and how many of their samples.
PARTS = [("arnet_resnet", 4), ("adamml_rgb_flow_sound", 1), ("adashare_nyu_v2", 2)]
COMPILED = [("resnet110", 128)]
SHARDS = 16
TINY = 4  # pixels of an image of the tiny network's


def tests(folder, dry, seconds):
    """The tests of the kernels and of what runs them, in several processes; their compiled kernels are cached."""
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider", "-k", ON_A_GPU]
    deadline = time.monotonic() + seconds - 10.0
    # The interpreter is slow: a few of them show that they run.
    shards = [f"{number}/{120 if dry else SHARDS}" for number in range(1 if dry else SHARDS)]
    files = TESTS[-1:] if dry else TESTS
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # of whatever is installed there
    with (folder / "tests.txt").open("w") as file:  # what was found is there if the step takes too long
        processes = [
            subprocess.Popen([*command, "--shard", shard, *files], cwd=ROOT, stdout=file, stderr=file, env=environment)
            for shard in shards
        ]
        codes = wait(processes, deadline)
    print("tests, exit status of each shard:", codes, flush=True)
    return int(any(codes))


def wait(processes, deadline, patience=8.0):
    """Exit statuses of pytest; at the deadline all are interrupted, and have so many seconds to say what has failed."""
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(deadline - time.monotonic(), 0.0))
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGINT)
    for process in running:
        try:
            process.wait(max(deadline + patience - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
    return [process.wait() for process in processes]


def warm_up(folder, dry, seconds):
    """Compile the kernels of all networks, on all cores: each compilation takes one of them for a second."""
    if dry:
        return 0
    cores = os.cpu_count()
    with ProcessPoolExecutor(cores, get_context("spawn")) as pool:
        failed = [text for texts in pool.map(compile_share, range(cores), [cores] * cores) for text in texts]
    print(*failed, sep="\n", flush=True)
    return len(failed)


def compile_share(first, step):
    """Compile some of the kernels of all networks for the GPU that is here; a list of what failed."""
    torch.set_num_threads(1)
    architecture, meta, failed = choose_architecture(), torch.device("meta"), []
    once = cache(program)  # several entries are of one network
    for net, batch in HEADLINE:
        if NETS[net].missing() is not None:
            continue
        columns, found = once(net, meta)
        x = torch.empty(batch, 3, NETS[net].size, NETS[net].size, dtype=torch.float16, device=meta)
        index, offset = (torch.empty(columns, n, dtype=torch.int32, device=meta) for n in (batch, 3))
        route = SimpleNamespace(index=index, offset=offset)
        calls = {name: partial(found, x, route, executor=name) for name in ("fused", "dense", "static")}
        calls["planning"] = partial(plan, torch.empty(batch, columns, dtype=torch.bool, device=meta), 2)
        # Numbers that 16 divides make another kernel of it.
        calls |= {f"choice of a body, {most}": partial(find_body, offset, most) for most in (16, 17)}
        for name, call in calls.items():
            try:
                with torch.inference_mode():
                    compile_launches(call, architecture, (first, step))
            except Exception as error:  # the others are worth having
                failed.append(f"{net}, batch {batch}, {name}: {type(error).__name__}: {error}")
    return failed


def choose_architecture():
    """Of the GPU; 90 where there is none."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return 10 * major + minor


def rates(folder, dry, seconds):
    """Rates of the GPU, and of the kernels against the library's."""
    return subprocess.call([sys.executable, Path(__file__).parent / "gpu_rates.py", folder, *["--dry"] * dry])


def headline(folder, dry, seconds):
    """Networks against all baselines but ``torch.compile``, which takes minutes."""
    return networks(folder, dry, [("tiny", 3)] if dry else HEADLINE, compiled=False)


def systems(folder, dry, seconds):
    """Systems that choose among parts, at the published rates."""
    failed = 0
    for name, batch in [("tiny", 2)] if dry else PARTS:
        command = [sys.executable, __file__, folder, *["--dry"] * dry, "--system", name, str(batch)]
        failed += subprocess.call(command) != 0
    return failed


def measure_system(folder, dry, name, batch):
    """The row of one system and batch size, if it is not there."""
    path = folder / "gpu.jsonl"
    if path.exists() and any((row["net"], row["batch"]) == (name, batch) for row in read_rows(path)):
        return 0
    system = tiny_system() if dry else SYSTEMS[name]
    how = {"dtype": torch.float32 if dry else torch.float16, "seconds": 0.0 if dry else 4.0, "libraries": (DenseEager,)}
    (row,) = run_system(build_system(system).to("cpu" if dry else "cuda"), system, batch, name=name, **how)
    append_row(path, row)
    times = ", ".join(f"{key} {value['median']:.3f} ms" for key, value in row["milliseconds"].items())
    print(f"{name} batch {batch}: {times}; failed: {row['failed'] or 'none'}", flush=True)
    return int(bool(row["failed"]))


def training(folder, dry, seconds):
    """A step of routed training, and what takes its time."""
    what = ["--device", "cuda", "--only", "bottleneck", "--batch", "64", "--size", "224", "--seconds", "3"]
    if dry:
        what = ["--only", "9 pre", "--batch", "2", "--size", "8", "--seconds", "0"]
    how = ["--kinds", "frozen", "--profile"]
    with (folder / "training.txt").open("w") as file:
        command = [sys.executable, Path(__file__).parent / "training.py", *what, *how]
        return subprocess.call(command, stdout=file, stderr=file)


def timeline(folder, dry, seconds):
    """The kernels of one call, and the gaps between them."""
    what = ["resnet32", "4", "--dry"] if dry else ["resnet101", "32"]
    with (folder / "timeline.txt").open("w") as file:
        command = [sys.executable, Path(__file__).parent / "gpu_timeline.py", *what]
        return subprocess.call(command, stdout=file, stderr=file)


def compiled(folder, dry, seconds):
    """Networks against all baselines."""
    return networks(folder, dry, [] if dry else COMPILED, compiled=True)


def networks(folder, dry, plan, compiled):
    """Each in a process of its own, so that one that fails does not end the others; the number of failures."""
    path, done, failed = folder / "gpu.jsonl", {}, 0
    for row in read_rows(path) if path.exists() else []:
        unavailable = [name for name, reason in row["unavailable"].items() if reason != LEFT_OUT]
        done[row["net"], row["batch"], row["keep"]] = {*row["milliseconds"], *row["failed"], *unavailable}
    for net, batch in plan:
        names = [baseline.name for baseline in choose_baselines(batch, dry, compiled)]
        if not all(set(names) <= done.get((net, batch, keep), set()) for keep in choose_keeps(dry)):
            command = [sys.executable, __file__, folder, *["--dry"] * dry, "--network", net, str(batch), *names]
            failed += subprocess.call(command) != 0
    return failed


def choose_keeps(dry):
    return KEEPS[:1] if dry else KEEPS


def choose_baselines(batch, dry, compiled):
    found = [baseline for baseline in BASELINES if baseline.device in (None, "cpu" if dry else "cuda")]
    if dry:
        return found[:2]
    # With many samples this one has hundreds of policies, and runs the network once for each.
    few = [baseline for baseline in found if batch <= 8 or baseline.name != "group by policy"]
    return [baseline for baseline in few if compiled or baseline.name != "dense compiled"]


def measure_network(folder, dry, net, batch, names):
    """Rows of one network and batch size."""
    device, dtype = torch.device("cpu" if dry else "cuda"), torch.float32 if dry else torch.float16
    if dry:
        use_kernels_on_the_cpu()
    elif (reason := NETS[net].missing()) is not None:
        print(f"{net}: {reason}")
        return 0
    model = (tiny() if dry else build(NETS[net])).to(device)
    images = make_images(batch, TINY if dry else NETS[net].size).to(device)
    settings = [draw_decisions(keep, num_blocks(model), batch) for keep in choose_keeps(dry)]
    frozen = []

    class Kept(Dynexec):
        def prepare(self, model, images, threads):
            self.model = freeze(model, images, executor="fused" if dry else None)
            frozen.append(self.model)

    baselines = [baseline for baseline in BASELINES if baseline.name in names]
    how = {"baselines": baselines, "executor": Kept, "dtype": dtype, "seconds": 0.0 if dry else 1.0}
    failed = False
    for row in run_experiment(model, images, settings, name=net, **how):
        append_row(folder / "gpu.jsonl", row)
        failed |= bool(row["failed"])
        expected = predict(frozen[0], row, settings, dtype)
        print(
            f"{net} batch {batch} keep {row['keep']}: "
            + ", ".join(f"{name} {times['median']:.3f} ms" for name, times in row["milliseconds"].items())
            + f"; expected {expected:.3f} ms; efficiency {row['efficiency'] or float('nan'):.2f}; "
            f"failed: {row['failed'] or 'none'}",
            flush=True,
        )
    print(frozen[0].explain().replace("\n", "\n  "), flush=True)
    print(frozen[0].profile(images.to(dtype), settings[0].draws[0].to(device), rounds=1 if dry else 3), flush=True)
    return int(failed)


def predict(frozen, row, settings, dtype):
    """Milliseconds that the model expects of segments."""
    setting = next(setting for setting in settings if setting.keep == row["keep"])
    programs = [program for segment in frozen.segments for program in segment.programs.values()]
    seconds = [
        program_seconds(H100, program, row["batch"], draw.sum(0).tolist(), dtype, frozen.executor)
        for program in programs
        for draw in setting.draws
    ]
    return 1e3 * sum(seconds) / len(setting.draws) if seconds else float("nan")


def tiny():
    """A network that the interpreter runs in a tenth of a second."""
    from dynexec.models import blockdrop_resnet
    from dynexec.report.nets import randomize_batch_norm

    model = blockdrop_resnet((1,), (8,), num_classes=4).eval()
    randomize_batch_norm(model, make_images(4, TINY))
    return model.requires_grad_(False)


def tiny_system():
    """An AdaShare network that takes a second."""
    return System(
        lambda: adashare_resnet(18, blocks=(1, 1), widths=(4, 8), num_classes=(2, 1), head_width=4),
        lambda batch: make_images(batch, 32),
        lambda network, inputs, generator: [torch.tensor([[True, False], [True, True]])],
        lambda decisions: decisions.float(),
        32,
        policy=False,
    )


def use_kernels_on_the_cpu():
    from dynexec.executors.backends import kernels

    sys.modules["dynexec.executors.freeze"].choose_backend = lambda device, _, invariant: kernels(device, invariant)


# What it does, one after the other, and its share of the time.
STEPS = [
    *((tests, 0.15), (warm_up, 0.05), (headline, 0.35), (timeline, 0.1), (systems, 0.1)),
    *((training, 0.05), (rates, 0.1), (compiled, 0.1)),
]


def run_apart(step, folder, dry, seconds):
    """Exit status of a step in a process of its own, None after its time; what it started does not outlive it."""
    # Forked, importing torch takes seconds. No step uses the GPU itself, which a forked process could not: others do.
    process = get_context("fork").Process(target=lead, args=(step, folder, dry, seconds))
    process.start()
    try:
        process.join(max(seconds, 1))
        return process.exitcode
    finally:
        if process.is_alive():  # after its time, or this one is interrupted
            with suppress(ProcessLookupError):  # it leads no group yet
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()


def lead(step, folder, dry, seconds):
    """Run a step as the first process of a group."""
    os.setsid()
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"
    sys.exit(step(folder, dry, seconds))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--steps", nargs="+", choices=[step.__name__ for step, _ in STEPS])
    parser.add_argument("--network", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--system", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.network:
        net, batch, *names = args.network
        return measure_network(args.folder, args.dry, net, int(batch), names)
    if args.system:
        return measure_system(args.folder, args.dry, args.system[0], int(args.system[1]))
    if not args.dry and not torch.cuda.is_available():
        sys.exit("torch sees no GPU; --dry runs without one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which ends the step, as SIGINT does
    steps = [(step, share) for step, share in STEPS if args.steps is None or step.__name__ in args.steps]
    codes, start, left = {}, time.monotonic(), sum(share for _, share in steps)
    for step, share in steps:
        # What an earlier step left of its time goes to all later ones.
        seconds = (60 * args.minutes - (time.monotonic() - start)) * share / left
        left -= share
        print(f"{step.__name__}, {seconds:.0f} s at most", flush=True)
        code = run_apart(step, args.folder, args.dry, seconds)
        if code is None:
            time.sleep(2.0)  # while the device is given back
        codes[step.__name__] = "stopped after its time" if code is None else code
        rows = read_rows(args.folder / "gpu.jsonl") if (args.folder / "gpu.jsonl").exists() else []
        (args.folder / "summary.md").write_text(markdown(rows) if rows else "no rows\n")
    print(json.dumps({"steps": codes, "rows": len(rows), "seconds": round(time.monotonic() - start)}))
    return int(not rows or any(code not in (0, "stopped after its time") for code in codes.values()))


if __name__ == "__main__":
    sys.exit(main())
