"""Time and memory of a training step: dynexec against masked, dense and naive gather, for each kind of BatchNorm.

    python bench/training.py                # prints a table
    python bench/training.py --write        # also into docs/routed_training.md
    python bench/training.py --device cuda --only bottleneck --size 224 --batch 64

A step is forward, backward and SGD with momentum, on one thread. Times are CPU seconds of the process: on an idle core
the elapsed time, on a shared one still the work; on a GPU they are those of its own clock. The gradients of candidates
that compute the same function are compared before they are timed, in float64. Memory is what autograd saves for the
backward pass, each storage once, without the parameters.
"""

import argparse
import copy
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from drop_path import saved_megabytes
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dynexec import decide
from dynexec.executors.memory import keep_freed_memory
from dynexec.measure.environment import processor_name
from dynexec.measure.timing import compare
from dynexec.models.blockdrop import BasicBlock, Bottleneck, SegmentedResNet
from dynexec.nn import assign_columns, dynamic_blocks, recompute_batch_norm
from dynexec.nn.batch_norm import hold_batch_norm, split_at_statistics
from dynexec.nn.residual import apply_layers
from dynexec.report.arguments import positive, seconds
from dynexec.report.tables import markdown_table, write_generated

DOCS = Path(__file__).parents[1] / "docs" / "routed_training.md"
KEEPS = (0.25, 0.5, 0.75, 1.0)
TOLERANCE = 1e-9  # of the norm of each parameter's gradient, in float64: in float32 inputs of ReLUs close to zero flip
HEADINGS = (
    *("BatchNorm", "keep", "dense, ms", "masked, ms", "naive gather, ms", "dynexec, ms", "theoretical", "realised"),
    *("efficiency", "saved share", "kept for backward, MB: dense", "masked", "naive", "dynexec"),
)


class PreActivation(BasicBlock):
    """BatchNorm and ReLU before each convolution (He et al., ECCV 2016): a layer follows the last BatchNorm."""

    def __init__(self, in_channels, width, stride, shortcut=None):
        super().__init__(in_channels, width, stride, shortcut)
        self.bn1 = nn.BatchNorm2d(in_channels)

    def residual_layers(self):
        return [self.bn1, torch.relu, self.conv1, self.bn2, torch.relu, self.conv2]

    def activation_layer(self):
        return None


#: Title -> how to build it, image size, the kinds of BatchNorm to measure, and batch sizes.
NETWORKS = {
    "a third of BlockDrop's ResNet-110: 18 basic blocks": (
        lambda: SegmentedResNet(BasicBlock, (6, 6, 6), (16, 32, 64), num_classes=10),
        *(32, ("frozen", "kept", "all"), (16, 128)),
    ),
    "ResNet with 11 bottleneck blocks": (
        lambda: SegmentedResNet(Bottleneck, (2, 3, 4, 2), (64, 128, 256, 512), large_images=True, num_classes=10),
        *(64, ("frozen", "kept", "all"), (16, 32)),
    ),
    "9 pre-activation blocks": (
        lambda: SegmentedResNet(PreActivation, (3, 3, 3), (16, 32, 64), num_classes=10),
        *(32, ("all",), (16, 128)),
    ),
}


class Candidate:
    """A network of its own, and a way to run it."""

    def __init__(self, net, images, labels, forward):
        self.net, self.images, self.labels = copy.deepcopy(net), images, labels
        self.forward = forward
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-4, momentum=0.9)

    def logits(self):
        return self.forward(self.net, self.images)

    def backward(self):
        self.optimizer.zero_grad()
        F.cross_entropy(self.logits(), self.labels).backward()

    def step(self):
        self.backward()
        self.optimizer.step()

    def gradients(self):
        """Gradients of a step in float64, made on a copy."""
        twin = Candidate(self.net.double(), self.images.double(), self.labels, self.forward)
        self.net.float()
        twin.backward()
        return [parameter.grad for parameter in twin.net.parameters()]


def dense(net, images):
    return net(images)


def masked(decisions):
    def forward(net, images):
        with decide(decisions.float(), mode="soft"):
            return net(images)

    return forward


def routed(decisions):
    def forward(net, images):
        with decide(decisions):
            return net(images)

    return forward


def naive(decisions):
    """What one writes in ten lines: index, run, copy back, block by block."""

    def forward(net, images):
        x = net.stem_pool(torch.relu(net.bn1(net.conv1(images))))
        for column, block in enumerate(dynamic_blocks(net)):
            shortcut, index = apply_layers(block.shortcut_layers(), x), decisions[:, column].nonzero().flatten()
            if len(index):
                rows = apply_layers(block.residual_layers(), x[index]) + shortcut[index]
                activation = block.activation_layer()
                x = shortcut.index_copy(0, index, rows if activation is None else activation(rows))
            else:
                x = shortcut
        return net.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))

    return forward


def difference(actual, expected):
    """Largest difference of a parameter's gradient, relative to its norm; a parameter that was not met has zeros."""
    errors = [0.0]
    for a, e in zip(actual, expected, strict=True):
        a, e = (torch.zeros(()) if gradient is None else gradient for gradient in (a, e))
        errors.append(float((a - e).norm() / max(float(e.norm()), 1e-6)))
    return max(errors)


def count_flops(net, images, labels, batch_norm):
    """FLOPs of a dense step, and per block those of the layers that a dropped sample can skip, for the whole batch."""
    skippable = []

    def count(block, inputs):
        layers = block.residual_layers()
        if batch_norm == "all":
            layers = split_at_statistics(layers, block, block.shortcut_layers())[1]
        x = apply_layers([layer for layer in block.residual_layers() if layer not in layers], inputs[0].detach())
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            y = apply_layers(layers, x.detach().requires_grad_())
            if y.grad_fn is not None:
                y.sum().backward()
        skippable.append(counter.get_total_flops())

    candidate = Candidate(net, images, labels, dense)
    with FlopCounterMode(display=False) as counter:
        candidate.backward()
    hooks = [block.register_forward_pre_hook(count) for block in dynamic_blocks(candidate.net)]
    with torch.no_grad():
        candidate.net(images)
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops(), skippable


def build(make, size, batch, layout, batch_norm, device):
    torch.manual_seed(0)
    net = make().to(device, memory_format=layout)
    images = torch.randn(batch, 3, size, size).to(device, memory_format=layout)
    labels = torch.randint(10, (batch,)).to(device)
    recompute_batch_norm(net, [images])  # of an untrained network they are 0 and 1, which is nothing like them
    assign_columns(net.train(), batch_norm=batch_norm)
    if batch_norm == "frozen":
        hold_batch_norm(net)  # the stem's too, as in fine-tuning
    return net, images, labels


def measure_apart(*job):
    """:func:`measure` in a process of its own, which gives the memory back that it keeps."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=set_up) as pool:
        return pool.submit(measure, *job).result()


def set_up():
    torch.set_num_threads(1)
    keep_freed_memory()  # as an allocator of a GPU does, for all candidates alike


def measure(title, size, batch, batch_norm, layout, seconds, device, profiled):
    """Table rows of a network with a kind of BatchNorm, and a line on how it went."""
    make = NETWORKS[title][0]
    net, images, labels = build(make, size, batch, layout, batch_norm, device)
    generator = torch.Generator().manual_seed(0)
    draws = {keep: torch.rand(batch, len(dynamic_blocks(net)), generator=generator) < keep for keep in KEEPS}
    decisions = {keep: draw.to(device) for keep, draw in draws.items()}
    total, skippable = count_flops(net, images, labels, batch_norm)
    others = net
    if batch_norm == "kept":  # masking cannot do that: it is timed as it is published
        others = copy.deepcopy(net)
        assign_columns(others)
    candidates = {"dense": Candidate(net, images, labels, dense)}
    candidates["masked"] = Candidate(others, images, labels, masked(decisions[0.5]))
    for keep in KEEPS:
        candidates[f"dynexec {keep}"] = Candidate(net, images, labels, routed(decisions[keep]))
        if batch_norm != "all":
            candidates[f"naive {keep}"] = Candidate(net, images, labels, naive(decisions[keep]))
    error = max(check(candidates, others, decisions[keep], keep, batch_norm) for keep in KEEPS)
    megabytes = {name: saved_megabytes(one.net, one.logits) for name, one in candidates.items()}
    steps = {name: candidate.step for name, candidate in candidates.items()}
    found = compare(steps, device=device, seconds=seconds, min_rounds=5)
    note = f'"{batch_norm}": gradients within {error:.0e}, {found.rounds} rounds, noise {found.spread:.1%}'
    print(note, file=sys.stderr, flush=True)
    if profiled:
        for name in ("dense", "dynexec 0.5"):
            print(f"{name}:\n{profile(candidates[name].step, device)}", file=sys.stderr, flush=True)
    on_gpu = device.type == "cuda"
    times = {name: timing.median if on_gpu else timing.cpu_median for name, timing in found.timings.items()}
    milliseconds = {name: 1e3 * seconds for name, seconds in times.items()}
    rows = []
    for keep in KEEPS:
        names = ("dense", "masked", f"naive {keep}", f"dynexec {keep}")
        kept = decisions[keep].float().mean(0).tolist()
        needed = total - sum(flops * (1 - share) for flops, share in zip(skippable, kept))
        theoretical, realised = total / needed, milliseconds["dense"] / milliseconds[f"dynexec {keep}"]
        saved = f"{(1 - 1 / realised) / (1 - 1 / theoretical):.2f}" if theoretical > 1.001 else "-"
        rows.append(
            [batch_norm, f"{keep}"]
            + [f"{float(f'{milliseconds[name]:.3g}'):g}" if name in milliseconds else "-" for name in names]
            + [f"{theoretical:.2f}x", f"{realised:.2f}x", f"{realised / theoretical:.2f}", saved]
            + [f"{megabytes[name]:.1f}" if name in megabytes else "-" for name in names]
        )
    return rows, note


def profile(step, device):
    """What torch's profiler says of a step: the operations that took most of its time."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    by = "self_cpu_time_total"
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
        by = "self_device_time_total"
    step()
    with torch.profiler.profile(activities=kinds) as found:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return found.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=60)


def check(candidates, others, decisions, keep, batch_norm):
    """Largest difference of gradients from those of the reference, masked or else naive; RuntimeError if too large."""
    first = candidates[f"dynexec {keep}"]
    reference = candidates[f"naive {keep}"] if batch_norm == "kept" else None
    if reference is None:
        reference = Candidate(others, first.images, first.labels, masked(decisions))
    expected = reference.gradients()
    names = [name for name in (f"dynexec {keep}", f"naive {keep}") if name in candidates]
    error = max(difference(candidates[name].gradients(), expected) for name in names)
    if not error <= TOLERANCE:
        raise RuntimeError(f'gradients differ by {error:.0e} with batch_norm="{batch_norm}" at keep {keep}')
    return error


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table into docs/routed_training.md")
    parser.add_argument("--batch", type=positive, help="instead of those of the network")
    parser.add_argument("--seconds", type=seconds, default=20.0, help="per network and kind of BatchNorm, at least")
    parser.add_argument("--only", default="", help="networks whose title holds this")
    parser.add_argument("--size", type=positive, help="of the images, instead of that of the network")
    parser.add_argument("--kinds", nargs="+", choices=("frozen", "kept", "all"), help="of BatchNorm, likewise")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--profile", action="store_true", help="also print what takes the time of a step, dense and .5")
    parser.add_argument("--layout", choices=("channels_last", "contiguous_format"), default="channels_last")
    args = parser.parse_args()
    args.device = torch.device(args.device)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    if not any(args.only in title for title in NETWORKS):
        parser.error(f"no network is called {args.only!r}; these are: {'; '.join(NETWORKS)}")
    if args.write and (args.device.type != "cpu" or args.only or args.size or args.batch or args.kinds):
        parser.error("--write is for all networks, as they are, on a CPU")
    set_up()
    layout = getattr(torch, args.layout)
    where = torch.cuda.get_device_name() if args.device.type == "cuda" else processor_name()
    parts = [f"{where}, 1 thread, torch {torch.__version__}, float32, {args.layout}\n"]
    print(parts[0])
    run = measure_apart if args.device.type == "cpu" else measure  # there a process takes seconds to begin
    for title, (_, size, kinds, batches) in NETWORKS.items():
        for batch in [args.batch] if args.batch else batches:
            if args.only not in title:
                continue
            size = args.size or size
            kinds = args.kinds or kinds
            how = layout, args.seconds, args.device, args.profile
            found = [run(title, size, batch, kind, *how) for kind in kinds]
            table = markdown_table(HEADINGS, [row for rows, _ in found for row in rows])
            parts.append(
                f"{title}, {size}x{size}, batch {batch}:\n\n{table}\n{'; '.join(note for _, note in found)}.\n"
            )
            print(parts[-1], flush=True)
    if args.write:
        write_generated(DOCS, "training", "\n".join(parts))


if __name__ == "__main__":
    main()
