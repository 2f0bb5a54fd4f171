"""AdaShare on handwritten digits: which blocks of one network each of three tasks runs.

The tasks are the digit, whether it has a loop, and how much ink it took (which quarter of the training images), of one
small residual network. Compares a network per task, hard sharing (one network, three heads), AdaShare (Sun et al.,
NeurIPS 2020: policy and weights in turn, then re-training from scratch under the policy) and as many blocks drawn by
chance. Then times dynexec, which computes what tasks share once, against published code, which runs the network once
per task with all blocks. About 35 seconds per seed on one core.

    python examples/digits_adashare.py --seeds 0 1 2 --output out/adashare

writes table.txt and results.json there. Needs scikit-learn.
"""

import argparse
import copy
import json
from functools import partial
from pathlib import Path
from statistics import mean
from time import process_time

import torch
import torch.nn.functional as F
from recipe import Progress, check_equal, spread, time_lines
from torch import nn

import dynexec
from dynexec import policy
from dynexec.measure import count_flops
from dynexec.measure.environment import processor_name
from dynexec.measure.timing import compare
from dynexec.models.adashare import AdaShare
from dynexec.models.adashare_policy import TaskPolicy
from dynexec.models.deeplab import BasicBlock, DilatedResNet
from dynexec.models.digits import load_digits

TASKS = {"digit": 10, "loop": 2, "ink": 4}  # and how many classes
LOOPS = (0, 6, 8, 9)
SIZE = 16  # the network's stem divides it by four
BLOCKS, WIDTHS = (2, 2, 2), (8, 8, 8)
WARM_UP_EPOCHS, POLICY_EPOCHS, EPOCHS = 6, 12, 12
BATCH = 64
LEARNING_RATE, POLICY_RATE = 1e-2, 5e-2
BLOCKS_PER_EPOCH, COOLING = 0.75, 0.9
SPARSITY, SHARING = 0.05, 0.02
TIMING_SECONDS = 2.0


def load_parts(seed):
    """Pairs of images ``[N, 1, 16, 16]`` and labels ``[N, 3]``: to train weights, to train the policy, and to test."""
    digits = load_digits(seed)
    quarters = torch.quantile(digits.train[0].sum((1, 2, 3)), torch.tensor([0.25, 0.5, 0.75]))
    parts = []
    for images, labels in (digits.train, digits.validation, digits.test):
        loop = torch.isin(labels, torch.tensor(LOOPS)).long()
        ink = torch.bucketize(images.sum((1, 2, 3)), quarters)
        enlarged = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear")
        parts.append((enlarged, torch.stack([labels, loop, ink], 1)))
    return parts


def make_network(num_classes):
    """AdaShare's backbone with a linear head per task, whose "maps" are logits ``[N, C]``."""
    backbone = DilatedResNet(BasicBlock, BLOCKS, WIDTHS, in_channels=1)
    heads = [
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(backbone.num_features, classes))
        for classes in num_classes
    ]
    return AdaShare(backbone, heads, TaskPolicy(len(heads), sum(BLOCKS)))


def all_blocks(tasks):
    """Decisions of hard sharing."""
    return torch.ones(tasks, sum(BLOCKS), dtype=torch.bool)


def sum_losses(outputs, labels):
    return sum(F.cross_entropy(logits, answers) for logits, answers in zip(outputs, labels.T, strict=True))


def weights_of(net):
    return [*net.backbone.parameters(), *net.heads.parameters()]


def train(net, data, epochs, generator, **given):
    """Adam with one cosine cycle, under fixed decisions; the mean loss of the first and of the last epoch."""
    optimizer = torch.optim.Adam(weights_of(net), LEARNING_RATE)
    images, labels = data
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(images) // BATCH))
    net.train()
    losses = []
    for _ in range(epochs):
        losses.append([])
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            loss = sum_losses(net(images[rows], **given), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses[-1].append(loss.item())
    net.eval()
    return mean(losses[0]), mean(losses[-1])


def learn_policy(net, weight_data, policy_data, generator):
    """Train weights and logits in turn, an epoch each, under the curriculum; decisions bool ``[T, L]``."""
    weights = torch.optim.Adam(weights_of(net), LEARNING_RATE / 3)
    logits = torch.optim.Adam(net.policy.parameters(), POLICY_RATE)
    net.train()
    for epoch in range(POLICY_EPOCHS):
        trained = policy.curriculum_mask(net.num_blocks, epoch, blocks_per_epoch=BLOCKS_PER_EPOCH)
        temperature = policy.exponential_temperature(epoch, decay=COOLING)
        for optimizer, (images, labels) in ((weights, weight_data), (logits, policy_data)):
            for rows in torch.randperm(len(images), generator=generator).split(BATCH):
                mix = policy.gumbel_softmax(net.policy(), temperature, generator=generator)[..., 0]
                mix = policy.open_untrained(mix, trained)
                loss = sum_losses(net(images[rows], soft_decisions=mix), labels[rows])
                if optimizer is logits:
                    loss = loss + SPARSITY * policy.sparsity_loss(net.policy(), trained=trained)
                    loss = loss + SHARING * policy.sharing_loss(net.policy())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    net.eval()
    return net.policy.decide()


@torch.no_grad()
def measure_accuracies(outputs, labels):
    """Per task."""
    return {
        task: (logits.argmax(1) == answers).double().mean().item()
        for task, logits, answers in zip(TASKS, outputs, labels.T, strict=True)
    }


def compare_sharing(parts, seed, show):
    """Rows of the comparison, and the networks and decisions behind them."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    training, validation, (images, labels) = parts
    untrained = make_network(TASKS.values())
    flops = count_flops(untrained, images)
    rows, nets = [], {}

    def row(name, run, losses, needed, seconds, unshared=None, decisions=None):
        """``run()`` gives the outputs of all tasks; FLOPs per image, heads included."""
        with torch.no_grad():
            accuracies = measure_accuracies(run(), labels)
        base = rows[0]["accuracy"] if rows else accuracies
        gain = mean(accuracies[task] / base[task] - 1 for task in TASKS)
        rows.append({
            "name": name, "accuracy": accuracies, "gain": gain, "losses": losses, "flops": float(needed),
            "flops_unshared": float(needed if unshared is None else unshared), "seconds": seconds,
            "decisions": None if decisions is None else decisions.int().tolist(),
        })  # fmt: skip

    def retrain(name, given, earlier=0.0, executed=None):
        """From the same initial weights, under fixed decisions."""
        show(name)
        net, start = copy.deepcopy(untrained), process_time()
        losses = train(net, training, EPOCHS, generator, **given)
        seconds = earlier + process_time() - start
        decisions = given["decisions"] if "decisions" in given else given["soft_decisions"].bool()
        unshared = flops.backbone(decisions, shared=False) + sum(flops.head)
        needed = flops.of(decisions) if executed is None else executed
        row(name, lambda: net(images, decisions), losses, needed, seconds, unshared, decisions)
        nets[name] = net

    show("a network per task")
    start, singles, losses = process_time(), [], []
    for number, classes in enumerate(TASKS.values()):
        singles.append(make_network([classes]))
        own = training[0], training[1][:, number : number + 1]
        losses.append(train(singles[-1], own, EPOCHS, generator, decisions=all_blocks(1)))
    losses = tuple(map(sum, zip(*losses, strict=True)))
    seconds = process_time() - start
    row("a network per task", partial(run_singles, singles, images), losses, flops.dense, seconds)
    retrain("hard sharing", {"decisions": all_blocks(len(TASKS))})

    show("warm-up and policy")
    learner, start = copy.deepcopy(untrained), process_time()
    train(learner, training, WARM_UP_EPOCHS, generator, decisions=all_blocks(len(TASKS)))
    decisions = learn_policy(learner, training, validation, generator)
    seconds = process_time() - start
    retrain("AdaShare", {"decisions": decisions}, seconds)
    retrain("AdaShare, re-trained as published", {"soft_decisions": decisions.float()}, seconds, flops.dense)
    # Its tasks' passes differ, and the running statistics are one mean of all: with their own it shows what it knows.
    twin, last = copy.deepcopy(nets[rows[-1]["name"]]).train(), rows[-1]
    run = partial(twin, images, soft_decisions=decisions.float())
    costs = last["losses"], flops.dense, last["seconds"], last["flops_unshared"]
    row("... statistics of the test images", run, *costs, decisions)
    shuffled = decisions.gather(1, torch.rand(decisions.shape, generator=generator).argsort(1))
    retrain("as many blocks by chance", {"decisions": shuffled})
    return rows, nets, singles, decisions


def run_singles(singles, images):
    return [net(images, all_blocks(1))[0] for net in singles]


def time_inference(nets, singles, decisions, images):
    """CPU microseconds per image of all tasks, and relative errors: equal outputs first."""
    net, hard, everything = nets["AdaShare"], nets["hard sharing"], all_blocks(len(TASKS))
    candidates = {
        "a pass per task, weighted": partial(net, images, soft_decisions=decisions.float()),
        "routed": partial(net, images, decisions),
        "frozen": partial(dynexec.freeze(net, images), images, decisions),
        "hard sharing": partial(hard, images, everything),
        "hard sharing, frozen": partial(dynexec.freeze(hard, images), images, everything),
        "a network per task": partial(run_singles, singles, images),
    }
    with torch.no_grad():
        errors = {
            name: check_equal(name, candidates[name](), candidates[reference]())
            for name, reference in (
                ("routed", "a pass per task, weighted"),
                ("frozen", "a pass per task, weighted"),
                ("hard sharing, frozen", "hard sharing"),
            )
        }
        timings = compare(candidates, seconds=TIMING_SECONDS)
    times = {name: 1e6 * timing.cpu_median / len(images) for name, timing in timings.timings.items()}
    return {"microseconds": times, "errors": errors, "spread": timings.spread, "batch": len(images)}


def time_training(nets, singles, decisions, images, labels):
    """CPU milliseconds of a forward and backward pass for all tasks.

    Outputs and gradients are compared first, with BatchNorm in evaluation mode: in training mode its statistics are
    those of the rows that run together, in published code those of each task's pass.
    """
    masked, routed, hard = (copy.deepcopy(nets[name]) for name in ("AdaShare", "AdaShare", "hard sharing"))
    singles = copy.deepcopy(nn.ModuleList(singles))
    candidates = {
        "a pass per task, weighted": (masked, lambda: masked(images, soft_decisions=decisions.float())),
        "routed": (routed, lambda: routed(images, decisions)),
        "hard sharing": (hard, lambda: hard(images, all_blocks(len(TASKS)))),
        "a network per task": (singles, lambda: run_singles(singles, images)),
    }

    def step(name):
        net, run = candidates[name]
        net.zero_grad()
        outputs = run()
        sum_losses(outputs, labels).backward()
        gradients = {  # of a block that no task runs there are none
            key: torch.zeros_like(value) if value.grad is None else value.grad for key, value in net.named_parameters()
        }
        return [output.detach() for output in outputs], gradients

    error = check_equal("a routed training step", step("routed"), step("a pass per task, weighted"))
    for net, _ in candidates.values():
        net.train()
    timings = compare({name: partial(step, name) for name in candidates}, seconds=TIMING_SECONDS)
    times = {name: 1e3 * timing.cpu_median for name, timing in timings.timings.items()}
    return {"milliseconds": times, "errors": {"routed": error}, "spread": timings.spread, "batch": len(images)}


def run_seed(seed):
    progress, start = Progress(seed), process_time()
    parts = load_parts(seed)
    rows, nets, singles, decisions = compare_sharing(parts, seed, progress.show)
    progress.show("timing")
    images, labels = parts[2]
    inference = time_inference(nets, singles, decisions, images)
    training = time_training(nets, singles, decisions, images[:BATCH], labels[:BATCH])
    seconds = process_time() - start
    blocks = ", ".join(f"{task} {''.join(map(str, row.int().tolist()))}" for task, row in zip(TASKS, decisions))
    progress.done(f"{blocks}; {seconds:.0f} s of CPU time")
    return {"seed": seed, "rows": rows, "inference": inference, "training": training, "seconds": seconds}


def make_table(runs):
    """Means over seeds and their spread; times relative to a pass per task."""
    lines = [f"{'accuracy %':34}" + "".join(f"{task:>15}" for task in TASKS)]
    lines[0] += f"{'gain %':>15}{'kFLOPs':>9}{'unshared':>9}{'training':>15}   gain by seed"
    for rows in zip(*(run["rows"] for run in runs)):
        cells = [spread([100 * row["accuracy"][task] for row in rows]) for task in TASKS]
        gains = [100 * row["gain"] for row in rows]
        costs = [row["seconds"] / run["rows"][1]["seconds"] for row, run in zip(rows, runs)]  # of hard sharing
        flops = [mean(row[key] for row in rows) / 1e3 for key in ("flops", "flops_unshared")]
        lines.append(
            f"{rows[0]['name']:34}" + "".join(f"{cell:>15}" for cell in (*cells, spread(gains)))
            + "".join(f"{count:9.0f}" for count in flops) + f"{spread(costs):>15}   "
            + "  ".join(f"{gain:+.1f}" for gain in gains)
        )  # fmt: skip
    return "\n".join(lines + time_lines(runs, "a pass per task, weighted"))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("out/adashare"), help="folder (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)  # before the work, which would be lost
    runs = [run_seed(seed) for seed in args.seeds]
    table = make_table(runs)
    (args.output / "table.txt").write_text(table + "\n")
    (args.output / "results.json").write_text(
        json.dumps({"processor": processor_name(), "runs": runs}, indent=1) + "\n"
    )
    print(f"\n{table}\n\nwritten to {args.output}")


if __name__ == "__main__":
    main()
