"""AdaMML from scratch on moving digits with sound: does the policy look where the picture tells, and listen elsewhere?

Trains a small network per modality, then both with the policy still untrained, then networks and policy in turns with
Gumbel-softmax decisions and the published cost per modality, then the networks under the policy's decisions, for
several seeds. Compares accuracy and FLOPs with decisions that do not look at the clip, and the time of inference and
training as decided with computing everything. About two minutes per seed on one core.

    python examples/moving_digits_adamml.py --seeds 0 1 2 --output out/moving_digits_adamml

writes table.txt and results.json there. Needs scikit-learn. docs/recipes_video.md says what the clips are.
"""

import copy
from dataclasses import replace
from functools import partial

import moving_digits as md
import torch
import torch.nn.functional as F
from torch import nn

from dynexec import freeze
from dynexec.models import AdaMML
from dynexec.models.adamml_policy import CHANNELS, JOINT
from dynexec.policy import exponential_temperature, gumbel_softmax, modality_loss

MODALITIES = ("rgb", "sound")
WIDTHS = {"rgb": (16, 32, 48), "sound": (8, 16)}
GLANCE_WIDTHS, FEATURES, HIDDEN, GLANCE_SIZE = (8, 16), 16, 16, 10  # of the policy
SHOWN, ALONE, WARM_UP, IN_TURNS, AFTERWARDS = 10, 4, 1, 8, 3  # epochs of the stages
CLIPS_PER_EPOCH = 1024
COSTS = (1.0, 0.05)  # published
RATE = 1e-3  # of the policy; 0.01 published
DRAWS = 10  # of random decisions
TIMED, STEP = 100, 64  # clips
SECONDS = 4.0  # per comparison of times


class ClipNet(nn.Module):
    """Clips ``[rows, frames, C, H, W]`` to ``[rows, outputs]``, whose features are the mean over frames.

    Of a spectrogram it is the mean over time too: what is left tells the pitch.
    """

    def __init__(self, modality, widths, size, outputs):
        super().__init__()
        self.layers, self.listens = md.convolutions(CHANNELS[modality], widths), modality == "sound"
        side = -(-size // 2 ** len(widths))
        self.fc = nn.Linear(widths[-1] * (side if self.listens else side**2), outputs)

    def forward(self, clips):
        x = self.layers(clips.flatten(0, 1)).unflatten(0, clips.shape[:2]).mean(1)
        return self.fc((x.mean(3) if self.listens else x).flatten(1))


def make_network():
    """An AdaMML with small networks in place of those that it comes with, and a small LSTM."""
    net = AdaMML(MODALITIES, 10, md.SEGMENTS, md.SEGMENT_FRAMES, depth=18, policy_size=GLANCE_SIZE)
    sizes, glance_sizes = (md.SEGMENT_SIZE, md.PITCHES), (GLANCE_SIZE, md.PITCHES)
    net.main_net.nets = nn.ModuleList(ClipNet(name, WIDTHS[name], size, 10) for name, size in zip(MODALITIES, sizes))
    net.policy.joint_net.nets = nn.ModuleList(
        ClipNet(name, GLANCE_WIDTHS, size, FEATURES) for name, size in zip(MODALITIES, glance_sizes)
    )
    net.policy.joint_net.joint = nn.Sequential(nn.Linear(len(MODALITIES) * FEATURES, JOINT), nn.ReLU())
    net.policy.lstm = nn.LSTMCell(JOINT + 2 * len(MODALITIES), HIDDEN)
    nn.init.normal_(net.policy.lstm.weight_ih, 0.0, JOINT**-0.5)  # by default of so few units its gates start saturated
    net.policy.fcs = nn.ModuleList(nn.Linear(HIDDEN, 2) for _ in MODALITIES)
    return net


def count_flops(net, inputs):
    """As ``net.count_flops``, which takes the LSTM to be as large as the published one."""
    policy, segments = net.policy, inputs["rgb"].shape[1]
    recurrent = policy.lstm.weight_hh.numel() + 4 * HIDDEN * 2 * len(MODALITIES)
    each = policy.joint_net.joint[0].weight.numel() + 4 * HIDDEN * JOINT + sum(fc.weight.numel() for fc in policy.fcs)
    return replace(net.count_flops(inputs), head=2 * (segments * each + (segments - 1) * recurrent))


def only(net, clips, *columns):
    """Decisions that take these modalities in all segments."""
    return torch.isin(torch.arange(len(net.modalities)), torch.tensor(columns)).expand(len(clips), md.SEGMENTS, -1)


def train_alone(net, batches, progress):
    """First: each modality, as if there was no other. They learn to read digits and tones, and then what noise is."""
    optimizer = torch.optim.Adam(net.main_net.nets.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, SHOWN + ALONE)
    net.train()
    for epoch in progress.epochs("each modality alone", SHOWN + ALONE):
        for clips in batches():
            used = clips.told | (epoch >= SHOWN)
            every = (net(clips.inputs, used & only(net, clips, column)) for column in range(len(MODALITIES)))
            md.step(optimizer, sum(F.cross_entropy(logits, clips.labels) for logits in every))
        schedule.step()


def train_control(net, batches, progress):
    """For comparison: both networks on everything, for as many epochs more as they get with a policy."""
    epochs = WARM_UP + IN_TURNS + AFTERWARDS
    optimizer = torch.optim.Adam(net.main_net.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    net.train()
    for _ in progress.epochs("control", epochs):
        for clips in batches():
            md.step(optimizer, F.cross_entropy(net(clips.inputs, only(net, clips, 0, 1)), clips.labels))
        schedule.step()
    return net.eval()


def train_in_turns(net, batches, generator, progress):
    """Then the networks under an untrained policy's draws, and an epoch of networks and one of the policy in turns."""
    networks, policy = (
        torch.optim.Adam(net.main_net.parameters(), 1e-3),
        torch.optim.Adam(net.policy.parameters(), RATE),
    )
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, IN_TURNS) for optimizer in (networks, policy)]

    def run_epoch(optimizer, temperature):
        net.main_net.train(optimizer is networks)
        net.policy.train(optimizer is policy)
        net.main_net.requires_grad_(optimizer is networks)
        net.policy.requires_grad_(optimizer is policy)
        for clips in batches():
            logits = net.policy(clips.inputs)
            weights = gumbel_softmax(logits, temperature, hard=True, generator=generator)[..., 1]
            logits = net(clips.inputs, soft_decisions=weights)
            costs = (weights, COSTS) if optimizer is policy else ()
            md.step(optimizer, modality_loss(logits, clips.labels, *costs))

    for _ in progress.epochs("policy untrained", WARM_UP):
        run_epoch(networks, 5.0)
    for epoch in progress.epochs("in turns", IN_TURNS):
        temperature = exponential_temperature(epoch, decay=0.965 ** (20 / IN_TURNS))  # 20 epochs published
        run_epoch(networks, temperature)
        run_epoch(policy, temperature)
        for schedule in schedules:
            schedule.step()


def train_networks(net, batches, progress):
    """Last: only what the policy decides is computed, and the policy stays as it is."""
    net.eval()  # BatchNorm keeps its statistics, so that it makes no difference which segments are left out
    net.policy.requires_grad_(False)
    net.main_net.requires_grad_(True)
    optimizer = torch.optim.Adam(net.main_net.parameters(), 5e-4)
    for _ in progress.epochs("policy frozen", AFTERWARDS):
        for clips in batches():
            md.step(optimizer, modality_loss(net(clips.inputs), clips.labels))


@torch.no_grad()
def compare_quality(net, before, control, clips, generator):
    """Rows: accuracy, FLOPs per clip, and in how many segments each modality is taken per clip."""
    flops = count_flops(net, clips.inputs)
    decided = net.policy.decide(clips.inputs)
    everything = only(net, clips, 0, 1)

    def row(name, model, draw, policy=False, draws=1):
        accuracy, cost, usage = 0.0, 0.0, 0.0
        for _ in range(draws):
            decisions = draw()
            right = model(clips.inputs, decisions).argmax(1) == clips.labels
            accuracy += right.double().mean().item() / draws
            cost += (flops.of(decisions).mean().item() - (0 if policy else flops.policy)) / draws
            usage = decisions.double().mean(0).sum(0)
        return {"name": name, "accuracy": accuracy, "flops": cost} | dict(zip(MODALITIES, usage.tolist()))

    def shuffled():  # each modality as often as the policy takes it, in any segments of any clips
        columns = (column.flatten() for column in decided.unbind(2))
        mixed = [column[torch.randperm(len(column), generator=generator)] for column in columns]
        return torch.stack(mixed, 1).view_as(decided)

    def exchanged():  # those of another clip
        return decided[torch.randperm(len(decided), generator=generator)]

    half = everything & (torch.arange(md.SEGMENTS) % 2 == 0)[:, None]
    return [
        row("policy", net, lambda: decided, policy=True),
        row("all, networks before the policy", before, lambda: everything),
        row("all, networks trained as long", control, lambda: everything),
        row("all, networks after the policy", net, lambda: everything),
        *(row(f"{name} only", before, lambda k=k: only(net, clips, k)) for k, name in enumerate(MODALITIES)),
        row("every second segment", control, lambda: half),
        row("random, at the policy's rates", net, shuffled, draws=DRAWS),
        row("random, networks before the policy", before, shuffled, draws=DRAWS),
        row("policy of another clip", net, exchanged, draws=DRAWS),
        row("told by construction", before, lambda: clips.told),
    ]  # fmt: skip


@torch.no_grad()
def choices(net, clips):
    """Share of segments in which the policy takes each modality: by what tells there."""
    decided, (seen, heard) = net.policy.decide(clips.inputs).double(), clips.told.unbind(2)
    kinds = {
        "segments where the picture tells": seen,
        "where the sound does": heard,
        "where none does": ~(seen | heard),
    }
    return {name: dict(zip(MODALITIES, decided[rows].mean(0).tolist())) for name, rows in kinds.items()}


def compare_times(net, clips):
    """Inference of some clips, and a step of the last stage, as decided and with everything computed."""
    some, few = clips[:TIMED], clips[:STEP]
    fast = freeze(net, some.inputs)

    def masked_with_policy(network, weights):  # the masked network takes decisions, so it has to make them
        network.policy(some.inputs)
        return network(some.inputs, soft_decisions=weights)

    with torch.no_grad():
        decided, everything = net.policy.decide(some.inputs), only(net, some, 0, 1)
        masked = partial(masked_with_policy, net, decided.float())
        dense = net(some.inputs, soft_decisions=everything.float())
        candidates = {
            "everything, masked, PyTorch": (masked, masked()),
            "everything, masked, frozen": (partial(masked_with_policy, fast.network, decided.float()), masked()),
            "all, no policy, PyTorch": (partial(net, some.inputs, everything), dense),
            "all, no policy, frozen": (partial(fast, some.inputs, everything), dense),
            "as decided, not frozen": (partial(net, some.inputs), masked()),
            "as decided, frozen": (partial(fast, some.inputs), masked()),
        }
        inference = md.time_all(candidates, SECONDS)
    decided, everything = decided[:STEP], everything[:STEP]
    masked = md.training_step(net, few, soft_decisions=decided.float())
    dense = md.training_step(net, few, soft_decisions=everything.float())()

    def masked_step():
        with torch.no_grad():
            net.policy(few.inputs)
        return masked()

    candidates = {
        "everything, masked": (masked_step, masked()),
        "all, no policy": (md.training_step(net, few, decisions=everything), dense),
        "as decided": (md.training_step(net, few), masked()),
    }
    return {"inference": inference, "training": md.time_all(candidates, SECONDS)}


def run_seed(seed):
    torch.manual_seed(seed)
    generator, progress = torch.Generator().manual_seed(seed), md.Progress(seed)
    digits, test_digits = md.load_digits(seed)
    net = make_network()
    batches = partial(md.epoch_of, md.modality_clips, digits, CLIPS_PER_EPOCH, generator)
    train_alone(net, batches, progress)
    before = copy.deepcopy(net).eval()
    train_in_turns(net, batches, generator, progress)
    train_networks(net, batches, progress)
    clips = md.modality_clips(*test_digits, torch.Generator().manual_seed(seed))
    control = train_control(copy.deepcopy(before), batches, progress)
    rows = compare_quality(net, before, control, clips, generator)
    times = compare_times(net, clips)
    progress.done()
    return {"seed": seed, "seconds": progress.seconds, "rows": rows, "choices": choices(net, clips), **times}


if __name__ == "__main__":
    md.main(__doc__, "moving_digits_adamml", run_seed, MODALITIES)
