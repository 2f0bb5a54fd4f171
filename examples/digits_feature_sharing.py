"""Fully-adaptive feature sharing on handwritten digits: eight questions about each digit, one growing network.

Trains a wide network that shares everything, makes a thin one of its filters, and lets that grow: before each split it
is trained, and the affinity of the questions is measured on the validation set. Prints the tree, accuracies and FLOPs
of the thin network before and after growing, trained for as many epochs. About half a minute on one core.

    python examples/digits_feature_sharing.py --alpha 4 --draw out/tree.png

Needs scikit-learn, and matplotlib for the drawing.
"""

import argparse
import copy
import sys
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import nn

from dynexec.measure import count_flops
from dynexec.models.digits import load_digits
from dynexec.models.feature_sharing import FeatureSharing
from dynexec.models.grow import error_margins, grow, task_affinity
from dynexec.models.thin import thin

#: Question -> digits for which the answer is yes.
QUESTIONS = {
    "even": (0, 2, 4, 6, 8),
    "at least 5": (5, 6, 7, 8, 9),
    "has a loop": (0, 6, 8, 9),
    "prime": (2, 3, 5, 7),
    "multiple of 3": (0, 3, 6, 9),
    "straight lines only": (1, 4, 7),
    "a square": (0, 1, 4, 9),
    "round below": (0, 3, 5, 6, 8),
}
WIDE, THIN = (32, 32, 48, 48, 64), (4, 4, 6, 6, 8)
POOLED = (1, 3)
COLUMN_COSTS = (1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 8)


def make_network():
    """Five convolutions for 8x8 images and a head per question; everything shared."""
    stages = []
    for depth, (inputs, outputs) in enumerate(zip((1, *WIDE), WIDE)):
        layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        stages.append(nn.Sequential(*layers, *([nn.MaxPool2d(2)] if depth in POOLED else [])))
    heads = [nn.Sequential(nn.Flatten(), nn.Linear(4 * WIDE[-1], 2)) for _ in QUESTIONS]
    return FeatureSharing(stages, heads)


def answers(labels):
    """Right answers int64 ``[N, T]``, 1 for yes."""
    return torch.stack([torch.isin(labels, torch.tensor(digits)).long() for digits in QUESTIONS.values()], 1)


def train(net, data, epochs, generator, show):
    images, labels = data.train
    targets = answers(labels)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    net.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            outputs = net(data.shift(images[rows], generator))
            loss = sum(F.cross_entropy(*pair) for pair in zip(outputs, targets[rows].T))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        show(epoch + 1, epochs)
    return net.eval()


@torch.no_grad()
def measure(net, data):
    """Accuracy per question on the test set."""
    images, labels = data.test
    right = torch.stack([y.argmax(1) for y in net(images)], 1) == answers(labels)
    return right.double().mean(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alpha", type=float, default=4.0, help="how much separation counts (%(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="per training before a split; twice as many at the end")
    parser.add_argument("--draw", type=Path, help="file for a drawing of the tree")
    args = parser.parse_args()
    if args.draw is not None:
        args.draw.parent.mkdir(parents=True, exist_ok=True)  # before the work, which would be lost
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    data, start = load_digits(args.seed), perf_counter()

    def progress(what):
        def show(epoch, epochs):
            if sys.stdout.isatty():
                print(f"\r\033[K{what}, epoch {epoch} of {epochs}", end="\n" if epoch == epochs else "", flush=True)
            elif epoch == epochs:
                print(f"{what}, {epochs} epochs", flush=True)

        return show

    wide = train(make_network(), data, args.epochs, generator, progress("wide network"))
    small = thin(wide, THIN)
    trained = 0

    @torch.enable_grad()
    def affinity_of(net):
        nonlocal trained
        trained += args.epochs
        train(net, data, args.epochs, generator, progress(f"{len(net.part_names())} parts"))
        images, labels = data.validation
        return task_affinity(error_margins(net(images), answers(labels)))

    grown = grow(copy.deepcopy(small), affinity_of, COLUMN_COSTS, alpha=args.alpha, seed=args.seed)
    train(grown, data, 2 * args.epochs, generator, progress("grown network"))
    train(small, data, trained + 2 * args.epochs, generator, progress("thin network for comparison"))

    print(f"\n{grown.tree.format(list(QUESTIONS))}\n")
    if args.draw is not None:
        grown.tree.draw(args.draw, list(QUESTIONS))
    before, after, most = measure(small, data), measure(grown, data), measure(wide, data)
    print(f"{'accuracy %':24}{'wide':>8}{'thin':>8}{'grown':>8}")
    for name, *row in zip((*QUESTIONS, "mean"), *(torch.cat([a, a.mean()[None]]) for a in (most, before, after))):
        print(f"{name:24}" + "".join(f"{100 * accuracy:8.1f}" for accuracy in row))
    flops = [count_flops(net, data.test[0]) for net in (wide, small, grown)]
    print(f"{'kFLOPs':24}" + "".join(f"{count.tree / 1e3:8.0f}" for count in flops))
    print(f"{'... without sharing':24}" + "".join(f"{count.dense / 1e3:8.0f}" for count in flops))
    print(f"\n{perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
