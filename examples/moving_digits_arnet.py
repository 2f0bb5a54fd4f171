"""AR-Net from scratch on moving digits: does the policy find the frames, and the resolution, that tell the digit?

Trains small backbones for 32, 24 and 16 pixels and the policy with its lite prediction at 8, then all of it together
with Gumbel-softmax decisions and the published losses, then the predictions under the policy's decisions, for several
seeds. Compares accuracy and FLOPs with decisions that do not look at the clip, and the time of inference and training
as decided with computing everything. About a minute and a half per seed on one core.

    python examples/moving_digits_arnet.py --seeds 0 1 2 --output out/moving_digits_arnet

writes table.txt and results.json there. Needs scikit-learn. docs/recipes_video.md says what the clips are.
"""

import copy
import math
from functools import partial

import moving_digits as md
import torch
import torch.nn.functional as F
from torch import nn

from dynexec import freeze
from dynexec.models import build_arnet
from dynexec.policy import efficiency_loss, exponential_temperature

RESOLUTIONS = (32, 24, 16, 8)  # the last one is the policy's
USAGE = [f"at {size}" for size in RESOLUTIONS]
WIDTHS = ((16, 32, 48, 48), (12, 24, 32, 32), (12, 24, 32), (16, 32))
SHOWN, ALONE, TOGETHER, AFTERWARDS = 16, 6, 12, 4  # epochs of the stages
CLIPS_PER_EPOCH = 1024
LOSS = dict(accuracy=0.95, efficiency=0.5, balance=0.3)  # published: 0.95, 0.05 and 3.0
RATE, POLICY_RATE = 2e-3, 1e-2
GMAC = 4.09  # published of the largest backbone: what the loss charges for the largest one here
DRAWS = 10  # of random decisions
TIMED, STEP = 100, 64  # clips
SECONDS = 4.0  # per comparison of times


class Backbone(nn.Module):
    """Images ``[rows, 3, size, size]`` to features ``[rows, num_features]``: of all places, or the largest of them."""

    def __init__(self, widths, size):
        super().__init__()
        self.layers, self.keeps_places = md.convolutions(3, widths), size <= 16
        self.num_features = widths[-1] * (4 if self.keeps_places else 1)

    def forward(self, images):
        x = self.layers(images)
        return x.flatten(1) if self.keeps_places else x.amax((2, 3))


def make_network():
    *backbones, lite = (Backbone(*pair) for pair in zip(WIDTHS, RESOLUTIONS))
    return build_arnet(
        backbones, lite_backbone=lite, num_classes=10, num_frames=md.FRAMES, resolutions=RESOLUTIONS, hidden=32,
        dropout=0.0,
    )  # fmt: skip


def constant(net, clips, action):
    return torch.full((len(clips), net.num_frames), action)


def train_alone(net, batches, progress):
    """First: each resolution, as if there was no other. They learn to read digits, and then what empty frames are."""
    actions, skip = range(net.policy.num_predictions), net.policy.num_predictions
    optimizer = torch.optim.Adam(net.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, SHOWN + ALONE)
    net.train()
    for epoch in progress.epochs("each resolution alone", SHOWN + ALONE):
        for clips in batches():
            used = clips.told | (epoch >= SHOWN)
            every = (net(clips.inputs, torch.where(used, action, skip)) for action in actions)
            md.step(optimizer, sum(F.cross_entropy(logits, clips.labels) for logits in every))
        schedule.step()


def train_control(net, batches, progress):
    """For comparison: the largest backbone alone, on all frames, for as many epochs more as the policy gets."""
    epochs = TOGETHER + AFTERWARDS
    optimizer = torch.optim.Adam([*net.base_model_list[0].parameters(), *net.new_fc_list[0].parameters()], RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    net.train()
    for _ in progress.epochs("control", epochs):
        for clips in batches():
            md.step(optimizer, F.cross_entropy(net(clips.inputs, constant(net, clips, 0)), clips.labels))
        schedule.step()
    return net.eval()


def train_together(net, batches, generator, progress):
    """Then: predictions and policy, under drawn decisions."""
    costs = net.count_flops(next(batches()).inputs).costs
    costs = [GMAC * cost / costs[0] for cost in costs]
    predictions = [*net.base_model_list.parameters(), *net.new_fc_list.parameters()]
    groups = [{"params": predictions}, {"params": net.policy.parameters(), "lr": POLICY_RATE}]
    optimizer = torch.optim.Adam(groups, RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TOGETHER)
    net.train()
    for epoch in progress.epochs("together", TOGETHER):
        temperature = exponential_temperature(epoch, decay=math.exp(-0.045 * 50 / TOGETHER))  # 50 epochs published
        for clips in batches():
            weights = net.policy.relax(clips.inputs, temperature, generator=generator)
            logits = net(clips.inputs, soft_decisions=weights)
            md.step(optimizer, efficiency_loss(logits, clips.labels, weights, costs, **LOSS))
        schedule.step()


def train_predictions(net, batches, progress):
    """Last: only what the policy decides is computed, and the policy stays as it is."""
    net.eval()  # BatchNorm keeps its statistics, so that it makes no difference which frames are left out
    net.policy.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 5e-4)
    for _ in progress.epochs("policy frozen", AFTERWARDS):
        for clips in batches():
            md.step(optimizer, F.cross_entropy(net(clips.inputs), clips.labels))


@torch.no_grad()
def compare_quality(net, before, control, clips, generator):
    """Rows: accuracy, FLOPs per clip, and how many frames each action got per clip."""
    flops = net.count_flops(clips.inputs)
    decided = net.policy.decide(clips.inputs)[0]
    largest, skip = constant(net, clips, 0), net.policy.num_predictions

    def row(name, model, draw, policy=False, draws=1):
        accuracy, cost = [], []
        for _ in range(draws):
            logits, actions = model(clips.inputs, draw(), return_decisions=True)
            accuracy.append((logits.argmax(1) == clips.labels).double().mean().item())
            cost.append((flops.of(actions) if policy else cost_without_policy(flops, actions)).mean().item())
        usage = F.one_hot(actions.clamp(max=skip), skip + 1).sum(1).double().mean(0)
        result = {"name": name, "accuracy": sum(accuracy) / draws, "flops": sum(cost) / draws}
        return result | dict(zip(USAGE, usage.tolist()))

    def shuffled():  # every action as often as the policy takes it, on any frames of any clips
        actions = decided.clamp(max=skip).flatten()  # a longer skip would take other frames with it
        return actions[torch.randperm(len(actions), generator=generator)].view_as(decided)

    def reassigned():
        actions, looked = decided.clone(), decided < skip - 1  # by a backbone
        chosen = decided[looked]
        actions[looked] = chosen[torch.randperm(len(chosen), generator=generator)]
        return actions

    def exchanged():  # those of another clip
        return decided[torch.randperm(len(decided), generator=generator)]

    half = torch.where(torch.arange(net.num_frames) % 2 == 0, 0, skip).expand(len(clips), -1)
    constructed = torch.where(clips.told, clips.kind.new_tensor([2, 1, 0])[clips.kind][:, None], skip)
    return [
        row("policy", net, lambda: decided, policy=True),
        row("all frames at 32, before the policy", before, lambda: largest),
        row("all frames at 32, trained as long", control, lambda: largest),
        row("all frames at 32, after the policy", net, lambda: largest),
        *(row(f"all frames at {RESOLUTIONS[k]}", before, lambda k=k: constant(net, clips, k)) for k in (1, 2, 3)),
        row("every second frame at 32", control, lambda: half),
        row("random, at the policy's rates", net, shuffled, draws=DRAWS),
        row("its frames, resolutions exchanged", net, reassigned, draws=DRAWS),
        row("random, network before the policy", before, shuffled, draws=DRAWS),
        row("policy of another clip", net, exchanged, draws=DRAWS),
        row("told by construction", before, lambda: constructed),
    ]  # fmt: skip


@torch.no_grad()
def choices(net, clips):
    """Share of frames that the policy takes at each resolution: of those that show a digit, by size, and of others."""
    decided = net.policy.decide(clips.inputs)[0]
    kinds = torch.where(clips.told, clips.kind[:, None], len(md.DIGIT_SIZES))
    taken = decided[..., None] == torch.arange(len(USAGE))
    names = ("frames with a large digit", "with a medium one", "with a small one", "empty frames")
    shares = (taken[kinds == number].double().mean(0).tolist() for number in range(len(names)))
    return {name: dict(zip(USAGE, share)) for name, share in zip(names, shares)}


def cost_without_policy(flops, actions):
    """FLOPs ``[N]`` if decisions come from elsewhere: the policy's features are needed up to the last lite frame."""
    per_action = torch.tensor((*flops.backbone, flops.lite, *(0 for _ in flops.skips)), dtype=torch.float64)
    needed = (actions == len(flops.backbone)).flip(1).cumsum(1) > 0
    return per_action[actions].sum(1) + needed.sum(1) * flops.features


def compare_times(net, clips):
    """Inference of some clips, and a step of the last stage, as decided and with everything computed."""
    some, few = clips[:TIMED], clips[:STEP]
    fast = freeze(net, some.inputs)

    def weights(decisions):
        return F.one_hot(decisions, net.policy.num_actions).float()

    with torch.no_grad():
        decided, largest = net.policy.decide(some.inputs)[0], constant(net, some, 0)
        masked = partial(net, some.inputs, soft_decisions=weights(decided))
        all_at_32 = net(some.inputs, soft_decisions=weights(largest))
        candidates = {
            "everything, masked, PyTorch": (masked, masked()),
            "everything, masked, frozen": (partial(fast, some.inputs, soft_decisions=weights(decided)), masked()),
            "all frames at 32, no policy, PyTorch": (partial(net, some.inputs, largest), all_at_32),
            "all frames at 32, no policy, frozen": (partial(fast, some.inputs, largest), all_at_32),
            "as decided, not frozen": (partial(net, some.inputs), masked()),
            "as decided, frozen": (partial(fast, some.inputs), masked()),
        }
        inference = md.time_all(candidates, SECONDS)
    decided, largest = decided[:STEP], constant(net, few, 0)
    masked = md.training_step(net, few, soft_decisions=weights(decided))
    all_at_32 = md.training_step(net, few, soft_decisions=weights(largest))()
    candidates = {
        "everything, masked": (masked, masked()),
        "all frames at 32, no policy": (md.training_step(net, few, decisions=largest), all_at_32),
        "as decided": (md.training_step(net, few), masked()),
    }
    return {"inference": inference, "training": md.time_all(candidates, SECONDS)}


def run_seed(seed):
    torch.manual_seed(seed)
    generator, progress = torch.Generator().manual_seed(seed), md.Progress(seed)
    digits, test_digits = md.load_digits(seed)
    net = make_network()
    batches = partial(md.epoch_of, md.resolution_clips, digits, CLIPS_PER_EPOCH, generator)
    train_alone(net, batches, progress)
    before = copy.deepcopy(net).eval()
    train_together(net, batches, generator, progress)
    train_predictions(net, batches, progress)
    clips = md.resolution_clips(*test_digits, torch.Generator().manual_seed(seed))
    control = train_control(copy.deepcopy(before), batches, progress)
    rows = compare_quality(net, before, control, clips, generator)
    times = compare_times(net, clips)
    progress.done()
    return {"seed": seed, "seconds": progress.seconds, "rows": rows, "choices": choices(net, clips), **times}


if __name__ == "__main__":
    md.main(__doc__, "moving_digits_arnet", run_seed, USAGE)
