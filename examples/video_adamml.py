"""AdaMML on a real video: per segment the modalities to look at it in, executed as chosen.

    pip install 'dynexec[demo]'
    python examples/video_adamml.py
    python examples/video_adamml.py --clip holiday.mp4 --modalities rgb sound rgbdiff --usage 0.55 0.95 0.27

The weights are untrained: what is chosen shows how choices are executed, and says nothing about accuracy. BatchNorm's
statistics are those of the clip, and the policy's last layers are scaled so that its choices differ from segment to
segment. Prints FLOPs and times after comparing outputs with the masked network's, and draws the choices as a timeline.
"""

import argparse
import sys

import torch

from dynexec import freeze, models
from dynexec.policy import draw
from dynexec.report import clips, timeline, video

_FITTED = 4  # segments that BatchNorm's statistics are taken from
_FROZEN = 2  # segments that the network is frozen with; any number runs then


@torch.no_grad()
def prepare(net, inputs):
    """Give an untrained network activations that resemble a trained one's, and choices that vary."""
    count = next(iter(inputs.values())).shape[1]
    spaced = torch.linspace(0, count - 1, min(count, _FITTED)).long()
    some = {name: value[:, spaced] for name, value in inputs.items()}
    everything = torch.ones(1, len(spaced), len(net.modalities), dtype=torch.bool)

    def everywhere():
        net.policy(some)
        net(some, everything)

    video.calibrate(net, everywhere)
    logits, lstm = net.policy(inputs).flatten(0, 1), net.policy.lstm
    scales = [video.spread(linear, logits[:, column]) for column, linear in enumerate(net.policy.fcs)]
    # The LSTM reads the logits of the segment before: it is to find the same in them as it did.
    weight = lstm.weight_ih[:, -logits[0].numel() :]
    lstm.bias_ih.add_(weight @ logits.flatten(1).mean(0))
    weight.div_(torch.cat(scales))


@torch.no_grad()
def draw_decisions(net, inputs, args):
    """Decisions bool ``[1, S, M]`` that the options ask for, or None: the policy's likeliest."""
    generator = torch.Generator().manual_seed(args.seed)
    if args.usage:
        return torch.rand(1, args.segments, len(args.usage), generator=generator) < torch.tensor(args.usage)
    if args.sample is None:
        return None
    return draw(net.policy(inputs) / args.sample, generator=generator).bool()


@torch.no_grad()
def make_candidates(net, fast, inputs, decisions, drawn):
    """Ways to run the network: the reference, everything, and as decided."""
    masked, flops = video.eager_copy(net), net.count_flops(inputs)
    weights = decisions.to(next(iter(inputs.values())).dtype)

    def reference():
        masked.policy(inputs)
        return masked(inputs, soft_decisions=weights)

    def as_decided():
        if not drawn:
            return fast(inputs)
        fast.network.policy(inputs)  # computed as it would be, although others' decisions are followed
        return fast(inputs, decisions)

    return {
        "masked, eager PyTorch": video.Candidate(reference, flops.policy + flops.dense),
        "everything, dynexec": video.Candidate(lambda: fast(inputs, soft_decisions=weights), flops.dense),
        "as decided, dynexec": video.Candidate(as_decided, flops.of(decisions).item()),
    }


def run(net, segments, args, show):
    """Decisions bool ``[S, M]``, and what :func:`dynexec.report.video.print_results` takes."""
    show(0.0, "calibrating the network")
    inputs = segments.inputs(net.modalities)
    prepare(net, inputs)
    show(0.1, "freezing")
    fast = freeze(net, {name: value[:, :_FROZEN] for name, value in inputs.items()})
    drawn = draw_decisions(net, inputs, args)
    decisions = fast(inputs, drawn, return_decisions=True)[1]
    candidates = make_candidates(net, fast, inputs, decisions, drawn is not None)
    errors, seconds = video.measure(candidates, args.rounds, lambda share, text: show(0.3 + 0.7 * share, text))
    return decisions[0], (candidates, errors, seconds, "everything, dynexec")


def main(argv=None, net=None, size=224):
    """Run the example, with another AdaMML for frames of another size if one is given; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--modalities", nargs="+", default=["rgb", "sound"], choices=clips.MODALITIES, help="default: rgb sound"
    )
    parser.add_argument("--segments", type=int, default=10, help="of the clip (%(default)s)")
    video.add_arguments(parser)
    args = parser.parse_args(argv)
    console = video.new_console()
    try:
        video.check_arguments(args)
        net = (models.create_model("adamml", modalities=args.modalities) if net is None else net).eval()
        video.check_usage(args.usage, net.modalities)
        segments = clips.read_segments(
            args.clip, net.modalities, num_segments=args.segments, num_frames=net.num_frames, size=size
        )
    except (ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    with video.progress_bar() as show:
        decisions, results = run(net, segments, args, show)
    picture = args.out / "adamml.png"
    title = f"AdaMML on {args.clip.name}: {video.decided_by(args)}"
    timeline.plot_modalities(segments, decisions.numpy(), net.modalities, picture, title=title)
    console.print(timeline.UNTRAINED, "BatchNorm and the policy's last layers are fitted to the clip.")
    overlap = f"{segments.overlapping} of them begin before the one before them ends; " if segments.overlapping else ""
    console.print(
        f"{args.clip.name}, {segments.clip_seconds:.2f} s: {args.segments} segments of {net.num_frames} frames, "
        f"{overlap}{video.decided_by(args)}"
    )
    used = ", ".join(f"{name}: {count}" for name, count in zip(net.modalities, decisions.sum(0).tolist()))
    console.print(f"{used} of {args.segments} segments")
    right = video.print_results(console, *results)
    console.print(f"timeline: {picture}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
