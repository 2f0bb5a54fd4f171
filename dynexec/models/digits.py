"""BlockDrop on scikit-learn's handwritten digits: a small network of the family, trained from scratch on a CPU.

There are 1,797 images of 8x8 pixels in ten classes: few enough to train network and policy in half a minute, real
enough that dropping the wrong blocks costs accuracy.
"""

import copy
from dataclasses import dataclass, replace
from time import perf_counter

import torch
import torch.nn.functional as F

from dynexec.measure import count_flops
from dynexec.models.blockdrop import blockdrop_resnet
from dynexec.models.training import evaluate, fine_tune, train_dense, train_policy

BLOCKS = (4, 4, 4)
WIDTHS = (16, 24, 32)
POLICY_WIDTHS = (8, 12, 16)
FINE_TUNING_EPOCHS = 10


@dataclass(frozen=True)
class Digits:
    """Images float ``[N, 1, 8, 8]``, standardised, and labels int64 ``[N]``, split 1077 / 360 / 360 by seed.

    ``background`` is the value of an empty pixel.
    """

    train: tuple[torch.Tensor, torch.Tensor]
    validation: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    background: float

    def shift(self, images, generator):
        """Augmentation: move each image by up to one pixel in each direction."""
        padded = F.pad(images, (1, 1, 1, 1), value=self.background)
        right, down = torch.randint(0, 3, (2, len(images), 1, 1), generator=generator)
        rows, columns = torch.arange(8)[:, None] + down, torch.arange(8) + right
        return padded[torch.arange(len(images))[:, None, None], 0, rows, columns][:, None]


def load_digits(seed=0):
    """Load the data of scikit-learn's ``load_digits`` as :class:`Digits`; requires scikit-learn."""
    from sklearn.datasets import load_digits as load

    raw = load()
    images, labels = torch.tensor(raw.images, dtype=torch.float32)[:, None], torch.tensor(raw.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, validation, test = order.split([len(labels) - 720, 360, 360])
    mean, spread = images[train].mean(), images[train].std()
    images = (images - mean) / spread
    parts = [(images[rows], labels[rows]) for rows in (train, validation, test)]
    return Digits(*parts, background=((0 - mean) / spread).item())


def digits_network():
    """Build the untrained network: 12 blocks, 0.14 million parameters, and a policy with 6 % of its FLOPs."""
    net = blockdrop_resnet(BLOCKS, WIDTHS, policy_widths=POLICY_WIDTHS, in_channels=1)
    for segment in net.backbone.blocks:
        for block in segment:  # start as the shortcut alone: deep and narrow networks learn faster so
            torch.nn.init.zeros_(block.bn2.weight)
    return net


@dataclass(frozen=True)
class TrainedDigits:
    """Result of :func:`train_digits`.

    Attributes
    ----------
    net : BlockDrop
        With its policy, fine-tuned.
    dense : BlockDrop
        Before the policy's training: used to measure "all blocks on".
    seconds : dict
        Time per stage.
    """

    net: torch.nn.Module
    dense: torch.nn.Module
    seconds: dict


def train_digits(data, seed=0, *, on_epoch=None):
    """Train network, policy, and both together; takes about half a minute on one core.

    The method is the paper's; four settings are adapted to a thousand easy images. There are fewer epochs, so each adds
    half a block to the curriculum. The entropy weighs 0.02. A mistake costs 0.3: where nearly everything is right, a
    larger penalty buys no accuracy, only blocks. Exploration is 0.9, and 0.98 in fine-tuning: with 0.8 there, the
    network learns to tolerate any random dropping, and nothing is left to decide.

    Parameters
    ----------
    data : Digits
    seed : int
    on_epoch : callable, optional
        Called as ``on_epoch(stage, record)`` after each epoch.

    Returns
    -------
    TrainedDigits
    """
    images, labels = data.train
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = digits_network()
    seconds, dense = {}, None
    curriculum = dict(epochs=40, blocks_per_epoch=0.5, penalty=-0.3, exploration=0.9, entropy=0.02, learning_rate=3e-3)
    joint = dict(epochs=FINE_TUNING_EPOCHS, penalty=-0.3, exploration=0.98, learning_rate=1e-3)
    stages = (
        ("network", train_dense, dict(epochs=12)),
        ("policy", train_policy, curriculum),
        ("fine-tuning", fine_tune, joint),
    )
    for stage, train, settings in stages:
        start = perf_counter()
        report = None if on_epoch is None else lambda record, stage=stage: on_epoch(stage, record)
        train(net, images, labels, batch_size=64, generator=generator, augment=data.shift, on_epoch=report, **settings)
        seconds[stage] = perf_counter() - start
        dense = copy.deepcopy(net) if dense is None else dense
    return TrainedDigits(net.eval(), dense.eval(), seconds)


def compare_digits(trained, data, *, seed=0, draws=10, train_control=True):
    """Measure the policy on the test set against all blocks on and against dropping blocks without looking.

    Parameters
    ----------
    trained : TrainedDigits
    data : Digits
        The split it was trained on.
    seed, draws : int
        Random decisions are drawn that many times and averaged.
    train_control : bool
        Also fine-tune the dense network under random dropping at the policy's keep rate, for as long as the policy's
        own fine-tuning took, and measure random dropping on it.

    Returns
    -------
    list of dict
        ``name``; ``accuracy`` and its standard deviation over draws ``spread``; ``kept``, blocks per image; ``saving``,
        the theoretical share of FLOPs saved, with the policy charged where it is needed.
    """
    net, dense = trained.net, trained.dense
    images, labels = data.test
    generator = torch.Generator().manual_seed(seed)
    flops = count_flops(net, images)
    policy = evaluate(net, images, labels).decisions
    count = policy.shape[1]

    def row(name, model, draw, repeats=1, charged=False):
        results = [evaluate(model, images, labels, draw()) for _ in range(repeats)]
        accuracy = torch.tensor([result.accuracy for result in results], dtype=torch.float64)
        cost = flops if charged else replace(flops, policy=0)
        return {
            "name": name,
            "accuracy": accuracy.mean().item(),
            "spread": accuracy.std(correction=0).item(),
            "kept": results[0].kept,
            "saving": cost.saving(results[0].decisions),
        }

    def random_order():  # every image keeps as many blocks as the policy keeps for it, but others
        order = torch.rand(policy.shape, generator=generator).argsort(1)
        return policy.gather(1, order)

    def favourites():
        chosen = policy.float().mean(0).topk(round(policy.sum().item() / len(policy))).indices
        return torch.zeros(count, dtype=torch.bool).index_fill(0, chosen, True)

    everything = torch.ones(count, dtype=torch.bool)
    rows = [
        row("all blocks on", dense, lambda: everything),
        row("policy", net, lambda: policy, charged=True),
        row("random, same number", net, random_order, draws),
        row("random, network before fine-tuning", dense, random_order, draws),
        row("policy of another image", net, lambda: policy[torch.randperm(len(policy), generator=generator)], draws),
        row("static: most kept blocks", net, favourites),
        row("all blocks on, fine-tuned", net, lambda: everything),
    ]
    if train_control:
        control = copy.deepcopy(dense)
        keep = policy.float().mean().item()
        options = dict(epochs=FINE_TUNING_EPOCHS, keep=keep, batch_size=64, generator=generator, augment=data.shift)
        train_dense(control, *data.train, learning_rate=0.05, **options)
        rows.append(row("random, network trained for it", control, random_order, draws))
    return rows
