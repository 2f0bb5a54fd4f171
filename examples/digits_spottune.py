"""SpotTune on few images: which blocks of a pre-trained network to fine-tune, decided per image.

Pre-trains a small residual network on the digits 0 to 6, and adapts it to 7, 8 and 9 (three labelled images of each) or
to telling faces from other patches (ten of each): the head alone, the whole network, per image by a policy (Guo et al.,
CVPR 2019), or by chance. Then times dynexec, which runs one of a block's two sets of weights per image, against
published code, which runs both and mixes their outputs. About 20 seconds per seed on one core.

    python examples/digits_spottune.py --target digits --seeds 0 1 2 --output out/spottune

writes table.txt and results.json there. Needs scikit-learn; faces need scikit-image.
"""

import argparse
import copy
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from time import process_time

import torch
import torch.nn.functional as F
from recipe import Progress, check_equal, spread, time_lines
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dynexec
from dynexec.measure import count_flops
from dynexec.measure.environment import processor_name
from dynexec.measure.timing import compare
from dynexec.models.digits import load_digits
from dynexec.models.spottune import SpotTunePolicy, SpotTuneResNet
from dynexec.nn import DynamicNetwork

SOURCE_DIGITS = 7  # 0 to 6
LABELLED = {"digits": 3, "faces": 10}  # per class
BLOCKS, WIDTHS, POLICY_WIDTHS = (2, 2, 2), (16, 24, 32), (8, 12, 16)
PRETRAINING_STEPS, STEPS, SETTLING_STEPS = 240, 150, 75
BATCH = 64
POLICY_RATE = 3e-3
TIMING_SECONDS = 2.0


@dataclass(frozen=True)
class Problem:
    """Pairs of images ``[N, 1, 8, 8]`` and labels ``[N]``; ``shift`` augments."""

    source: tuple
    train: tuple
    test: tuple
    shift: callable
    num_classes: int


def load_problem(target, seed):
    digits = load_digits(seed)
    images, labels = (torch.cat(part) for part in zip(digits.train, digits.validation, digits.test))
    source = labels < SOURCE_DIGITS
    pretraining = images[source], labels[source]
    if target == "digits":
        images, labels = images[~source], labels[~source] - SOURCE_DIGITS
    else:
        images, labels = load_faces(seed)
    few = torch.cat([(labels == c).nonzero()[: LABELLED[target], 0] for c in labels.unique()])
    others = torch.ones(len(labels), dtype=torch.bool).index_fill(0, few, False)
    parts = (images[few], labels[few]), (images[others], labels[others])
    return Problem(pretraining, *parts, digits.shift, int(labels.max()) + 1)


def load_faces(seed):
    """100 faces (label 0) and 100 other patches of scikit-image's ``lfw_subset``, as large as digits."""
    from skimage.data import lfw_subset

    patches = torch.tensor(lfw_subset(), dtype=torch.float32)[:, None, :24, :24]
    images = F.avg_pool2d(patches, 3)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
    return ((images - images.mean()) / images.std())[order], (order >= 100).long()


def make_network(num_outputs, blocks, widths):
    return SpotTuneResNet(blocks, widths, num_outputs, stem_width=widths[0], in_channels=1, choices=False)


def train(forward, parameters, data, steps, learning_rate, generator, augment, policy=None):
    """SGD with one cosine cycle on random batches, and Adam for a policy; mean loss of the first and last ten steps."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    weights = torch.optim.SGD(parameters, learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    optimizers = [weights] if policy is None else [weights, torch.optim.Adam(policy.parameters(), POLICY_RATE)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(weights, steps)
    images, labels = data
    losses = []
    for _ in range(steps):
        rows = torch.randperm(len(images), generator=generator)[:BATCH]
        loss = F.cross_entropy(forward(augment(images[rows], generator)), labels[rows])
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return mean(losses[:10]), mean(losses[-10:])


@torch.no_grad()
def measure_accuracy(net, data, *decisions):
    images, labels = data
    return (net(images, *decisions).argmax(1) == labels).double().mean().item()


def adapt(problem, seed, show):
    """Rows of the comparison, SpotTune's network and the wholly fine-tuned one."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    test, rows = problem.test, []

    def fit(forward, parameters, steps=STEPS, learning_rate=0.03, data=problem.train, policy=None):
        return train(forward, parameters, data, steps, learning_rate, generator, problem.shift, policy)

    def row(name, net, accuracy, losses, trained, share=None, flops=None):
        """FLOPs are per image, and without those of a policy unless given."""
        rows.append({
            "name": name, "accuracy": accuracy, "fine_tuned": share, "losses": losses,
            "flops": count_flops(net, test[0]).dense if flops is None else flops,
            "parameters": count(net.parameters()), "trained": count(trained),
        })  # fmt: skip

    def pretrained():
        net = copy.deepcopy(base)
        net.linear = nn.Linear(WIDTHS[-1], problem.num_classes)
        return net.eval()  # BatchNorm keeps the statistics of pre-training: there are few images to take others from

    show("pre-training")
    base = make_network(SOURCE_DIGITS, BLOCKS, WIDTHS)
    fit(base, base.parameters(), PRETRAINING_STEPS, 0.1, problem.source)

    show("from scratch")
    scratch = make_network(problem.num_classes, BLOCKS, WIDTHS)
    losses = fit(scratch, scratch.parameters(), learning_rate=0.1)
    row("from scratch", scratch, measure_accuracy(scratch.eval(), test), losses, scratch.parameters())

    show("feature extraction")
    head = pretrained()
    losses = fit(head, head.linear.parameters(), learning_rate=0.1)
    row("feature extraction", head, measure_accuracy(head, test), losses, head.linear.parameters(), 0.0)

    show("full fine-tuning")
    full = pretrained()
    losses = fit(full, full.parameters())
    row("full fine-tuning", full, measure_accuracy(full, test), losses, full.parameters(), 1.0)

    show("SpotTune")
    spot = add_choices(pretrained())
    losses = train_spottune(spot, fit, generator)
    decisions = decide(spot, test[0])
    shuffled = decisions[torch.randperm(len(decisions), generator=generator)]
    flops = count_flops(spot, test[0])
    about = losses, trainable(spot), decisions.double().mean().item()
    row("SpotTune", spot, measure_accuracy(spot, test), *about, flops.of(decisions).double().mean().item())
    row("... decisions of another image", spot, measure_accuracy(spot, test, shuffled), *about, flops.dense)

    show("random decisions")
    control = add_choices(pretrained())
    share = decisions.double().mean().item()

    def draw(images):
        return torch.rand(len(images), sum(BLOCKS), generator=generator) < share

    losses = fit(lambda x: control(x, draw(x)), control.backbone.parameters(), STEPS + SETTLING_STEPS)
    drawn = draw(test[0])
    about = losses, trainable(control.backbone), drawn.double().mean().item(), flops.dense
    row("random decisions", control.backbone, measure_accuracy(control, test, drawn), *about)
    return rows, spot, full


def add_choices(backbone):
    """A second set of weights for each block of a pre-trained network, and a policy; the first set is frozen."""
    dynexec.convert(backbone, fine_tune="all")
    policy = make_network(2 * sum(BLOCKS), [1] * len(POLICY_WIDTHS), POLICY_WIDTHS)
    return DynamicNetwork(backbone, SpotTunePolicy(policy)).eval()


def decide(spot, images):
    with torch.no_grad():
        return spot.policy(images) >= 0.5


def train_spottune(spot, fit, generator):
    """Weights and policy by the Gumbel-softmax, which needs both sets; then weights alone, one set per image."""

    def mixed(images):
        return spot(images, soft_decisions=spot.policy.sample_soft(images, generator=generator))

    def routed(images):
        return spot(images, decide(spot, images))

    spot.policy.train()
    first, _ = fit(mixed, spot.backbone.parameters(), policy=spot.policy)
    spot.policy.eval()
    _, last = fit(routed, spot.backbone.parameters(), SETTLING_STEPS, 0.01)
    return first, last


def trainable(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def time_inference(spot, full, images):
    """CPU microseconds per image, policy included, FLOPs and relative errors: equal outputs first."""
    dense = copy.deepcopy(full)
    dynexec.convert(dense)
    everything = torch.ones(len(images), sum(BLOCKS), dtype=torch.bool)
    frozen, frozen_dense = dynexec.freeze(spot, images), dynexec.freeze(dense, images)
    candidates = {
        "both sets, weighted": lambda: spot(images, soft_decisions=(spot.policy(images) >= 0.5).float()),
        "routed": partial(spot, images),
        "frozen": partial(frozen, images),
        "one network": partial(full, images),
        "one network, frozen": partial(frozen_dense, images, everything),
    }
    references = {"one network, frozen": "one network"}
    errors = {}
    with torch.no_grad():
        for name in ("routed", "frozen", "one network, frozen"):
            reference = references.get(name, "both sets, weighted")
            errors[name] = check_equal(name, candidates[name](), candidates[reference]())
        timings = compare(candidates, seconds=TIMING_SECONDS)
        counters = {name: FlopCounterMode(display=False) for name in ("both sets, weighted", "routed", "one network")}
        for name, counter in counters.items():
            with counter:
                candidates[name]()
    flops = {name: counter.get_total_flops() / len(images) for name, counter in counters.items()}
    flops |= {"frozen": flops["routed"], "one network, frozen": flops["one network"]}
    return {
        "microseconds": {name: 1e6 * timing.cpu_median / len(images) for name, timing in timings.timings.items()},
        "flops": flops,
        "errors": errors, "spread": timings.spread, "batch": len(images),
    }  # fmt: skip


def time_training(spot, full, images, labels):
    """CPU milliseconds of a forward and backward pass for the weights: equal outputs and gradients first."""
    decisions = decide(spot, images)
    nets = {"both sets, weighted": spot, "routed": copy.deepcopy(spot), "one network": full}
    candidates = {
        "both sets, weighted": lambda: spot(images, soft_decisions=decisions.float()),
        "routed": lambda: nets["routed"](images, decisions),
        "one network": partial(full, images),
    }

    def step(name):
        nets[name].zero_grad()
        logits = candidates[name]()
        F.cross_entropy(logits, labels).backward()
        gradients = [parameter.grad for parameter in trainable(getattr(nets[name], "backbone", nets[name]))]
        return logits.detach(), gradients

    error = check_equal("a routed training step", step("routed"), step("both sets, weighted"))
    timings = compare({name: partial(step, name) for name in candidates}, seconds=TIMING_SECONDS)
    return {
        "milliseconds": {name: 1e3 * timing.cpu_median for name, timing in timings.timings.items()},
        "errors": {"routed": error}, "spread": timings.spread, "batch": len(images),
    }  # fmt: skip


def run_seed(seed, target):
    progress, start = Progress(seed), process_time()
    problem = load_problem(target, seed)
    rows, spot, full = adapt(problem, seed, progress.show)
    progress.show("timing")
    inference = time_inference(spot, full, problem.test[0])
    training = time_training(spot, full, *(part[:BATCH] for part in problem.test))
    seconds = process_time() - start
    progress.done(f"{len(problem.test[0])} test images, {seconds:.0f} s of CPU time")
    return {"seed": seed, "rows": rows, "inference": inference, "training": training, "seconds": seconds}


def make_table(runs):
    """Means over seeds and their spread; times relative to both sets, weighted."""
    lines = [f"{'':34}{'accuracy %':>16}{'fine-tuned %':>16}{'kFLOPs':>9}{'parameters':>12}{'trained':>9}   by seed"]
    for rows in zip(*(run["rows"] for run in runs)):
        accuracies = [100 * row["accuracy"] for row in rows]
        shares = [100 * row["fine_tuned"] for row in rows if row["fine_tuned"] is not None]
        lines.append(
            f"{rows[0]['name']:34}{spread(accuracies):>16}{spread(shares) if shares else '-':>16}"
            f"{rows[0]['flops'] / 1e3:9.0f}{rows[0]['parameters']:12}{rows[0]['trained']:9}   "
            + "  ".join(f"{accuracy:.1f}" for accuracy in accuracies)
        )
    return "\n".join(lines + time_lines(runs, "both sets, weighted", flops=True))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=list(LABELLED), default="digits", help="%(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("out/spottune"), help="folder (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)  # before the work, which would be lost
    runs = [run_seed(seed, args.target) for seed in args.seeds]
    table = make_table(runs)
    (args.output / "table.txt").write_text(table + "\n")
    about = {"target": args.target, "labelled": LABELLED[args.target], "processor": processor_name()}
    (args.output / "results.json").write_text(json.dumps({**about, "runs": runs}, indent=1) + "\n")
    print(f"\n{table}\n\nwritten to {args.output}")


if __name__ == "__main__":
    main()
