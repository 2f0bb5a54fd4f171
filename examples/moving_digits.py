"""Clips of moving digits in which resolution, or modality, matters by construction; and what the two recipes share.

Digits are scikit-learn's, cut out of their 8x8 images and drawn at a size and place of their own in every frame. Which
digits make the clips of training and which those of the test is settled before any clip is made: no image is in both.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import nn

from dynexec.executors.proof import TOLERANCE, relative_error
from dynexec.measure.timing import compare
from dynexec.models import digits

FRAMES, SIZE = 8, 32  # of the clips for AR-Net
DIGIT_SIZES = ((26, 30), (18, 21), (12, 14))  # height in pixels of large, medium and small digits
SEGMENTS, SEGMENT_FRAMES, SEGMENT_SIZE = 5, 8, 20  # of the clips for AdaMML
PITCHES = SOUND_SIZE = 24  # rows and columns of a spectrogram
NOISE = 0.1
CLEAR_LINE = "\r\033[K"


@dataclass(frozen=True)
class Clips:
    """Videos to classify.

    Attributes
    ----------
    inputs : tensor or dict of tensors
        What the network takes.
    labels : int64 tensor ``[N]``
    told : bool tensor ``[N, T]`` or ``[N, S, 2]``
        Frames in which the digit is seen; or the segments in which the picture, and the sound, tells it.
    kind : int64 tensor ``[N]``, optional
        Row of :data:`DIGIT_SIZES`.
    """

    inputs: torch.Tensor | dict
    labels: torch.Tensor
    told: torch.Tensor
    kind: torch.Tensor | None = None

    def __getitem__(self, rows):
        inputs = self.inputs
        inputs = {name: x[rows] for name, x in inputs.items()} if isinstance(inputs, dict) else inputs[rows]
        return Clips(inputs, self.labels[rows], self.told[rows], None if self.kind is None else self.kind[rows])

    def __len__(self):
        return len(self.labels)


def load_digits(seed):
    """Images ``[N, 1, 8, 8]``, from 0 (empty) to 1, and labels ``[N]``: 1437 to train with, and 360 to test with."""
    data = digits.load_digits(seed)
    parts = (torch.cat(pair) for pair in zip(data.train, data.validation)), data.test
    train, test = ((images - data.background, labels) for images, labels in parts)
    most = train[0].max()
    return (train[0] / most, train[1]), (test[0] / most, test[1])


def draw_digits(images, places, heights, size):
    """Digits ``[M, 1, 8, 8]`` in pictures ``[M, size, size]``, bilinear.

    Centres ``places`` ``[M, 2]`` (right, down) and ``heights`` ``[M]`` are in pixels, the middle being 0.
    """
    scale = size / heights
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = -places * (2 / size) * scale[:, None]
    grid = F.affine_grid(theta, (len(images), 1, size, size), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)[:, 0]


def move(count, frames, room, speed, generator):
    """Places ``[count, frames, 2]``: straight ahead from anywhere within ``room`` ``[count]``, and no further."""
    start, velocity = 2 * torch.rand(2, count, 1, 2, generator=generator) - 1
    room = room[:, None, None]
    places = room * start + speed * velocity * torch.arange(frames)[:, None]
    return torch.minimum(torch.maximum(places, -room), room)


def resolution_clips(images, labels, generator):
    """A clip per digit, in which most frames are empty, and small digits need a high resolution.

    Inputs are frames ``[N, 8, 3, 32, 32]``, their three channels alike. A digit is large, medium or small, 26 to 30, 18
    to 21 or 12 to 14 pixels high, all equally likely. It is seen in one to three frames in a row, which are anywhere in
    the clip, and moves by up to 3 pixels from frame to frame. Noise is on all frames, and on the others nothing else.
    """
    count = len(images)
    kind = torch.randint(0, len(DIGIT_SIZES), (count,), generator=generator)
    low, high = torch.tensor(DIGIT_SIZES, dtype=torch.float32)[kind].unbind(1)
    heights = low + (high - low) * torch.rand(count, generator=generator)
    length = torch.randint(1, 4, (count,), generator=generator)
    first = (torch.rand(count, generator=generator) * (FRAMES - length + 1)).long()
    number = torch.arange(FRAMES)
    told = (number >= first[:, None]) & (number < (first + length)[:, None])
    places = move(count, FRAMES, (SIZE - heights) / 2, 3.0, generator)
    clip = torch.arange(count)[:, None].expand(-1, FRAMES)[told]
    frames = NOISE * torch.randn(count, FRAMES, SIZE, SIZE, generator=generator)
    frames[told] += draw_digits(images[clip], places[told], heights[clip], SIZE)
    return Clips(frames[:, :, None].repeat(1, 1, 3, 1, 1), labels, told, kind)


def modality_clips(images, labels, generator):
    """A clip per digit, some segments of which show it, and some let it be heard.

    Inputs are rgb ``[N, 5, 8, 3, 20, 20]``, its channels alike, and sound ``[N, 5, 1, 1, 24, 24]``, pitch by time. Of
    each segment, with odds of 1 : 1 : 2, the picture tells the digit, or the sound does, or neither; in a clip that
    would tell nothing, one segment is given to either of them. A picture that tells shows the digit, 12 to 18 pixels
    high and moving, under noise. A sound that tells is a tone, of digit d at row 2 + 2 d, up to half a row off, which
    swells and fades under noise. Pictures and sounds that do not tell are noise, three times as strong.
    """
    shape = len(images), SEGMENTS
    drawn = torch.rand(shape, generator=generator)
    told = torch.stack([drawn < 0.25, (drawn >= 0.25) & (drawn < 0.5)], 2)
    silent = (~told.any(2).any(1)).nonzero().flatten()
    segment, modality = (torch.randint(0, most, (len(silent),), generator=generator) for most in (SEGMENTS, 2))
    told[silent, segment, modality] = True
    seen, heard = told.unbind(2)

    rgb = torch.randn(*shape, SEGMENT_FRAMES, SEGMENT_SIZE, SEGMENT_SIZE, generator=generator)
    rgb *= torch.where(seen, NOISE, 3 * NOISE)[..., None, None, None]
    clip = seen.nonzero()[:, 0]
    heights = 12 + 6 * torch.rand(len(clip), generator=generator)
    places = move(len(clip), SEGMENT_FRAMES, (SEGMENT_SIZE - heights) / 2, 2.0, generator)
    each = torch.arange(len(clip)).repeat_interleave(SEGMENT_FRAMES)
    pictures = draw_digits(images[clip[each]], places.flatten(0, 1), heights[each], SEGMENT_SIZE)
    rgb[seen] += pictures.unflatten(0, (-1, SEGMENT_FRAMES))

    sound = torch.randn(*shape, PITCHES, SOUND_SIZE, generator=generator)
    sound *= torch.where(heard, NOISE, 3 * NOISE)[..., None, None]
    clip = heard.nonzero()[:, 0]
    pitch = 2 + 2 * labels[clip] + torch.rand(len(clip), generator=generator) - 0.5
    tone = torch.exp(-((torch.arange(PITCHES) - pitch[:, None]) ** 2))
    phase = 6.28 * torch.rand(len(clip), 1, generator=generator)
    loudness = 0.5 + 0.5 * torch.sin(torch.arange(SOUND_SIZE) / 3 + phase)
    sound[heard] += tone[:, :, None] * loudness[:, None]
    inputs = {"rgb": rgb[:, :, :, None].repeat(1, 1, 1, 3, 1, 1), "sound": sound[:, :, None, None]}
    return Clips(inputs, labels, told)


def convolutions(channels, widths):
    """Per width a convolution that halves the picture, BatchNorm and ReLU."""
    layers = []
    for before, width in zip((channels, *widths), widths):
        layers += [nn.Conv2d(before, width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)


def epoch_of(make_clips, digits, count, generator):
    """Batches of 32 new clips, made of ``count`` of the digits."""
    images, labels = digits
    rows = torch.randperm(len(labels), generator=generator)[:count].split(32)
    return (make_clips(images[some], labels[some], generator) for some in rows)


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class Progress:
    """Tells what a seed is at, and keeps the seconds that each stage took."""

    def __init__(self, seed):
        self.seed, self.seconds, self.start = seed, {}, perf_counter()

    def epochs(self, stage, count):
        """``range(count)``, telling the stage and the epoch."""
        start = perf_counter()
        for epoch in range(count):
            if sys.stdout.isatty():
                print(f"{CLEAR_LINE}seed {self.seed}: {stage}, epoch {epoch + 1} of {count}", end="", flush=True)
            yield epoch
        self.seconds[stage] = perf_counter() - start

    def done(self):
        self.seconds["in all"] = perf_counter() - self.start
        stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in self.seconds.items())
        print(f"{CLEAR_LINE if sys.stdout.isatty() else ''}seed {self.seed}: {stages}", flush=True)


def time_all(candidates, seconds):
    """Compare outputs, and then times, taking turns.

    Parameters
    ----------
    candidates : dict of str to (callable, tensor)
        What to call, and what it must give.
    seconds : float
        For all turns together.

    Returns
    -------
    dict
        ``rows``: per candidate its name, largest ``error`` relative to the largest value expected, and median ``ms``;
        and the ``spread`` of the first one's two medians.

    Raises
    ------
    RuntimeError
        If an output is wrong: then nothing is timed.
    """
    errors = {name: relative_error(call(), expected) for name, (call, expected) in candidates.items()}
    for name, error in errors.items():
        if not error <= TOLERANCE[torch.float32]:
            raise RuntimeError(f"{name} gives a wrong output, with an error of {error:.0e}: nothing is timed")
    found = compare({name: call for name, (call, _) in candidates.items()}, seconds=seconds)
    rows = [{"name": name, "error": errors[name], "ms": 1e3 * found.timings[name].median} for name in candidates]
    return {"rows": rows, "spread": found.spread}


def training_step(net, clips, **options):
    """A call that gives the gradients of a step, all in one tensor: all of it but the optimizer's part."""
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]

    def call():
        loss = F.cross_entropy(net(clips.inputs, **options), clips.labels)
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in found])

    return call


def quality_table(results, usage):
    """Accuracy, FLOPs and what rows have under the keys of ``usage``: means over seeds, and accuracy's deviation."""
    titles = ["accuracy %", "MFLOPs per clip", *usage, f"accuracy % by seed {[result['seed'] for result in results]}"]
    lines = [f"{'':40}" + "".join(f"{title:>18}" for title in titles[:-1]) + f"   {titles[-1]}"]
    for rows in zip(*(result["rows"] for result in results), strict=True):
        accuracy = [100 * row["accuracy"] for row in rows]
        cells = [f"{mean(accuracy):.1f} +- {pstdev(accuracy):.1f}", f"{mean(row['flops'] for row in rows) / 1e6:.2f}"]
        cells += [f"{mean(row[key] for row in rows):.2f}" for key in usage]
        by_seed = "  ".join(f"{value:.1f}" for value in accuracy)
        lines.append(f"{rows[0]['name']:40}" + "".join(f"{cell:>18}" for cell in cells) + f"   {by_seed}")
    return "\n".join(lines)


def choice_table(results, usage):
    """What the policy takes of each kind of frame or segment, in percent: means over seeds."""
    lines = [f"{'the policy takes, of 100':40}" + "".join(f"{key:>10}" for key in usage)]
    for kind in results[0]["choices"]:
        shares = [mean(result["choices"][kind][key] for result in results) for key in usage]
        lines.append(f"{kind:40}" + "".join(f"{100 * share:10.1f}" for share in shares))
    return "\n".join(lines)


def time_table(results, what):
    """Milliseconds of each candidate, how many times as fast as the first it is (means over seeds), and its error."""
    first = [result[what]["rows"][0]["ms"] for result in results]
    spread = max(result[what]["spread"] for result in results)
    lines = [f"{what + f', noise {100 * spread:.0f} %':52}{'ms':>10}{'times as fast':>16}{'max error':>12}"]
    for rows in zip(*(result[what]["rows"] for result in results), strict=True):
        ms, error = mean(row["ms"] for row in rows), max(row["error"] for row in rows)
        faster = mean(slow / row["ms"] for slow, row in zip(first, rows))
        lines.append(f"{rows[0]['name']:52}{ms:10.2f}{faster:16.2f}{error:12.0e}")
    return "\n".join(lines)


def main(doc, output, run_seed, usage):
    """Run the seeds that the command line asks for, and write and print what they gave."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("out") / output, help="folder (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; one is best for such small layers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)  # before the work, which would be lost
    results = [run_seed(seed) for seed in args.seeds]
    tables = [quality_table(results, usage), choice_table(results, usage)]
    tables += [time_table(results, what) for what in ("inference", "training")]
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.output / "table.txt").write_text("\n\n".join(tables) + "\n")
    print("\n" + "\n\n".join(tables) + f"\n\nwritten to {args.output}")
