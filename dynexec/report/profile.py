"""``dynexec profile``: where the time of a frozen network goes."""

from pathlib import Path

import torch

from dynexec.executors import freeze
from dynexec.report.bench import keep_share, make_settings, positive
from dynexec.report.experiment import PUBLISHED, num_blocks
from dynexec.report.nets import NETS, build, make_images


def add_arguments(parser):
    """Add the arguments of ``dynexec profile`` to an argparse parser."""
    add = parser.add_argument
    add("net", choices=list(NETS), help=", ".join(NETS))
    add("--batch", type=positive, default=8, help="images (%(default)s)")
    add("--keep", type=keep_share, default=0.5, help=f"share of blocks kept, or {PUBLISHED!r} (%(default)s)")
    add("--rounds", type=positive, default=20, help="timed rounds (%(default)s)")
    add("--threads", type=positive, help="default: as many as torch takes by itself")
    add("--chrome", type=Path, metavar="FILE", help="write one call as Chrome trace events")
    add("--json", type=Path, metavar="FILE", help="write all numbers as JSON")


def main(args):
    """Run ``dynexec profile``; return the exit status: 1 if the network cannot be built here."""
    if args.threads:
        torch.set_num_threads(args.threads)
    net = NETS[args.net]
    if (reason := net.missing()) is not None:
        print(f"{args.net}: {reason}")
        return 1
    for path in filter(None, (args.chrome, args.json)):
        path.parent.mkdir(parents=True, exist_ok=True)
    model, images = build(net), make_images(args.batch, net.size)
    settings = make_settings(net, num_blocks(model), args.batch, [args.keep])
    if not settings:
        print(f"{args.net}: nothing is published about its decisions")
        return 1
    profile = freeze(model, images).profile(images, settings[0].draws[0], rounds=args.rounds)
    print(profile)
    if args.chrome is not None:
        profile.chrome_trace(args.chrome)
    if args.json is not None:
        profile.write_json(args.json)
    return 0
