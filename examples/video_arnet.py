"""AR-Net on a real video: per frame a resolution and a backbone, or a skip, executed as chosen.

    pip install 'dynexec[demo]'
    python examples/video_arnet.py
    python examples/video_arnet.py --clip holiday.mp4 --windows 2 --sample 2.0

The weights are untrained: what is chosen shows how choices are executed, and says nothing about accuracy. BatchNorm's
statistics are those of the clip, and the policy's last layer is scaled so that its choices differ from frame to frame.
Prints FLOPs and times after comparing outputs with the masked network's, and draws what was chosen as a timeline.
"""

import argparse
import copy
import sys

import torch
import torch.nn.functional as F

from dynexec import freeze, models
from dynexec.report import clips, media, timeline, video

_BACKBONES = {
    "arnet_resnet": ("ResNet-50", "ResNet-34", "ResNet-18"),
    "arnet_efficientnet": ("EfficientNet-b3", "EfficientNet-b1", "EfficientNet-b0"),
}


def action_names(net, name):
    """Per action its name, and the height of the images that it looks at; skips look at none."""
    lite = f"the policy's MobileNetV2 at {net.resolutions[-1]}"
    names = [f"{backbone} at {size}" for backbone, size in zip(_BACKBONES[name], net.resolutions)]
    skips = [f"skip {skip}" for skip in net.policy.skips]
    return [*names, lite, *skips], [*net.resolutions, *(0 for _ in skips)]


@torch.no_grad()
def prepare(net, frames):
    """Give an untrained network activations that resemble a trained one's, and choices that vary."""
    turns = torch.arange(net.num_frames)[None] % net.policy.num_predictions
    video.calibrate(net, lambda: net(frames[:1], turns))
    hidden = net.policy.decide(frames)[1]
    video.spread(net.policy.linear, net.policy.linear(hidden).flatten(0, 1))
    net.policy.linear.bias[net.policy.num_predictions :] -= 1.0  # a skip is for several frames: leave some to the rest


@torch.no_grad()
def draw_decisions(net, frames, args):
    """Decisions int64 ``[N, T]`` that the options ask for, or None: the policy's likeliest."""
    generator = torch.Generator().manual_seed(args.seed)
    if args.usage:
        shares = torch.tensor(args.usage)
        return torch.multinomial(shares, frames.shape[:2].numel(), True, generator=generator).view(frames.shape[:2])
    if args.sample is None:
        return None
    policy = copy.deepcopy(net.policy)
    for parameter in policy.linear.parameters():  # its output is the logits
        parameter.div_(args.sample)
    return policy.sample(frames, generator=generator)


@torch.no_grad()
def make_candidates(net, fast, frames, decisions, drawn, name):
    """Ways to run the network: the reference, everything, another network for comparison, and as decided."""
    masked, flops = video.eager_copy(net), net.count_flops(frames)
    weights = F.one_hot(decisions, net.policy.num_actions).to(frames.dtype)
    largest = torch.zeros_like(decisions)

    def as_decided():
        if not drawn:
            return fast(frames)
        fast.network.policy(frames)  # computed as it would be, although others' decisions are followed
        return fast(frames, decisions)

    everything = len(frames) * flops.dense
    return {
        "masked, eager PyTorch": video.Candidate(lambda: masked(frames, soft_decisions=weights), everything),
        "everything, dynexec": video.Candidate(lambda: fast(frames, soft_decisions=weights), everything),
        f"{_BACKBONES[name][0]} on all frames, dynexec": video.Candidate(
            lambda: fast(frames, largest), decisions.numel() * flops.backbone[0], masked(frames, largest)
        ),
        "as decided, dynexec": video.Candidate(as_decided, flops.of(decisions).sum().item()),
    }


def run(net, clip, args, show):
    """Actions as they took effect, int64 ``[N, T]``, and what :func:`dynexec.report.video.print_results` takes."""
    frames = media.normalize(torch.from_numpy(clip.frames).movedim(-1, 1)).unflatten(0, (args.windows, -1))
    show(0.0, "calibrating the network")
    prepare(net, frames)
    show(0.1, "freezing")
    fast = freeze(net, frames)
    drawn = draw_decisions(net, frames, args)
    actions = fast(frames, drawn, return_decisions=True)[1]
    candidates = make_candidates(
        net, fast, frames, actions if drawn is None else drawn, drawn is not None, args.network
    )
    errors, seconds = video.measure(candidates, args.rounds, lambda share, text: show(0.3 + 0.7 * share, text))
    return actions, (candidates, errors, seconds, "everything, dynexec")


def main(argv=None, net=None):
    """Run the example, with another AR-Net if one is given; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=list(_BACKBONES), default="arnet_resnet", help="default: %(default)s")
    parser.add_argument(
        "--windows", type=int, default=1, help="videos, of 16 frames each, that the clip is cut into (%(default)s)"
    )
    video.add_arguments(parser)
    args = parser.parse_args(argv)
    console = video.new_console()
    try:
        video.check_arguments(args)
        net = (models.create_model(args.network) if net is None else net).eval()
        names, sizes = action_names(net, args.network)
        video.check_usage(args.usage, names)
        clip = clips.read_windows(args.clip, args.windows, net.num_frames, net.resolutions[0])
    except (ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    with video.progress_bar() as show:
        actions, results = run(net, clip, args, show)
    picture = args.out / "arnet.png"
    shape = actions.shape
    timeline.plot_actions(
        clip.frames.reshape(*shape, *clip.frames.shape[1:]), clip.seconds.reshape(shape), actions.numpy(), names, sizes,
        picture, title=f"{args.network} on {args.clip.name}: {video.decided_by(args)}",
    )  # fmt: skip
    console.print(timeline.UNTRAINED, "BatchNorm and the policy's last layer are fitted to the clip.")
    console.print(f"{args.clip.name}: {shape[1]} frames in each of {shape[0]} windows; {video.decided_by(args)}")
    console.print(", ".join(f"{name}: {(actions == number).sum()}" for number, name in enumerate(names)))
    right = video.print_results(console, *results)
    console.print(f"timeline: {picture}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
