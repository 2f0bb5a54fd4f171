"""``dynexec profile``: where the time of a frozen network goes."""

import os
import sys
from functools import partial

import torch

from dynexec.executors import freeze
from dynexec.report.arguments import file, keep_share, positive, threads
from dynexec.report.bench import SYSTEM_KEEP, make_settings
from dynexec.report.experiment import PUBLISHED, describe_error, num_blocks
from dynexec.report.nets import NETS, build, make_images
from dynexec.report.systems import SYSTEMS, build_system
from dynexec.report.systems_experiment import follow


def add_arguments(parser):
    """Add the arguments of ``dynexec profile`` to an argparse parser."""
    add = parser.add_argument
    add("net", choices=[*NETS, *SYSTEMS], metavar="net", help=", ".join([*NETS, *SYSTEMS]))
    add("--batch", type=positive, help="images, 8 if not given; videos of a network of parts, 1")
    add(
        "--keep", type=keep_share,
        help=f"share of blocks kept, 0.5 if not given, or {PUBLISHED!r}, as all networks of parts have it",
    )  # fmt: skip
    add("--rounds", type=positive, default=20, help="timed rounds (%(default)s)")
    add("--threads", type=threads, help="default: as many as torch takes by itself")
    add("--chrome", type=file, metavar="FILE", help="write one call as Chrome trace events")
    add("--json", type=file, metavar="FILE", help="write all numbers as JSON")


def main(args):
    """Run ``dynexec profile``; return the exit status: 1 if there is no such network or setting here.

    1 also where memory does not suffice; 2 if both files are the same one.
    """
    if args.chrome and args.json and os.path.realpath(args.chrome) == os.path.realpath(args.json):
        print(f"dynexec profile: --chrome and --json must be two files, both are {args.json}", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    net = (NETS | SYSTEMS)[args.net]
    for path in filter(None, (args.chrome, args.json)):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        profile = (profile_system if args.net in SYSTEMS else profile_net)(net, args)
    except (MemoryError, RuntimeError) as error:
        if not _is_shortage(error):
            raise
        print(f"dynexec profile: {args.net}: {describe_error(error)}", file=sys.stderr)
        return 1
    if isinstance(profile, str):
        print(f"{args.net}: {profile}")
        return 1
    print(profile)
    if args.chrome is not None:
        profile.chrome_trace(args.chrome)
    if args.json is not None:
        profile.write_json(args.json)
    return 0


def _is_shortage(error):
    """Whether memory did not suffice; torch says so on a CPU by a RuntimeError."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or any(words in str(error) for words in ("allocate memory", "Storage size"))


def profile_net(net, args):
    """Return the profile of a network of blocks, or why there is none."""
    if (reason := net.missing()) is not None:
        return reason
    model, images = build(net), make_images(args.batch or 8, net.size)
    settings = make_settings(net, num_blocks(model), len(images), [0.5 if args.keep is None else args.keep])
    if not settings:
        return "nothing is published about its decisions"
    return freeze(model, images).profile(images, settings[0].draws[0], rounds=args.rounds)


def profile_system(system, args):
    """Return the profile of a network of parts, or why there is none."""
    if args.keep not in (None, PUBLISHED):
        return SYSTEM_KEEP
    network, inputs = build_system(system), system.inputs(args.batch or system.batches[0])
    decisions = system.draw(network, inputs, torch.Generator().manual_seed(0))[0]
    frozen = freeze(network, inputs)
    policy = getattr(frozen.network, "policy", None)
    return follow(partial(frozen.profile, rounds=args.rounds), policy, system, inputs, decisions)
