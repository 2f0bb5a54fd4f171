"""The parts of ``dynexec demo``: each runs one experiment on real input and returns what came out."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from dynexec.executors import freeze
from dynexec.files import replacing
from dynexec.models.digits import compare_digits, load_digits, train_digits
from dynexec.models.training import evaluate
from dynexec.report import lite0, media
from dynexec.report.baselines import DenseEager, DenseFrozen, MaskedEager
from dynexec.report.experiment import PUBLISHED, Setting, draw_decisions, num_blocks, run_experiment
from dynexec.report.nets import NETS, build, make_images
from dynexec.report.page import PageTable, Section
from dynexec.report.plots import plot_clip

BASELINES = (MaskedEager, DenseEager, DenseFrozen)
_DIGITS_BATCH, _CLIP_BATCH, _RESNET_BATCHES = 128, 16, {"resnet110": 16, "resnet101": 4}
_STREAMED_FRAMES = 16  # whose decisions a timing with one frame at a time goes through
_EXAMPLE_FRAMES = (15, 60, 110, 160, 215)  # one of each scene


@dataclass(frozen=True)
class Run:
    """Settings from the command line for a part.

    Attributes
    ----------
    folder : Path
        Where pictures go.
    seconds : float
        Timing per experiment.
    progress : callable
        Called with the share of the part done (0 to 1) and the current step.
    """

    folder: Path
    seconds: float
    progress: Callable[[float, str], None] = lambda share, text: None

    def between(self, low, high, prefix=""):
        """Return ``progress`` for a step that takes the part from the share ``low`` to ``high``."""
        return lambda share, text="": self.progress(low + (high - low) * share, prefix + text)


@dataclass(frozen=True)
class Result:
    """One line of the demo's table.

    Attributes
    ----------
    what : str
        Network and input.
    quality : str
        Accuracy or agreement, with what it compares to; empty if weights are random.
    num_blocks : int
    row : dict
        See :data:`dynexec.report.rows.SCHEMA`.
    """

    what: str
    quality: str
    num_blocks: int
    row: dict


@dataclass(frozen=True)
class Part:
    """The result of a part of the demo: lines of the table, sections of the page, and figures for ``--json``."""

    results: tuple[Result, ...]
    sections: tuple[Section, ...]
    facts: dict = field(default_factory=dict)


def digits(run):
    """A BlockDrop network trained here, on the test set of scikit-learn's digits."""
    stages = {"network": 0.0, "policy": 0.15, "fine-tuning": 0.55}

    def on_epoch(stage, record):
        run.progress(stages[stage], f"digits: training {stage}, epoch {record['epoch'] + 1}")

    data = load_digits()
    trained = train_digits(data, on_epoch=on_epoch)
    run.progress(0.7, "digits: test set")
    measured = compare_digits(trained, data, train_control=False)
    images = data.test[0][:_DIGITS_BATCH]
    decisions = evaluate(trained.net, images, data.test[1][:_DIGITS_BATCH]).decisions
    (row,) = run_experiment(
        trained.net, images, [_of_policy(decisions)], name="digits ResNet", baselines=BASELINES,
        seconds=run.seconds, progress=run.between(0.75, 1.0, "digits: "),
    )  # fmt: skip
    count = decisions.shape[1]
    accuracy = {entry["name"]: _percent(entry["accuracy"]) for entry in measured}
    quality = (
        f"accuracy {accuracy['policy']} (all blocks {accuracy['all blocks on']}, "
        f"random {accuracy['random, same number']})"
    )
    lines = tuple(
        (entry["name"], _percent(entry["accuracy"]), f"{entry['kept']:.2f} of {count}", _percent(entry["saving"]))
        for entry in measured
    )
    text = (
        f"A residual network of {count} blocks and its policy, trained from scratch just now on {len(data.train[0])} "
        f"handwritten digits by the recipe of BlockDrop (in {sum(trained.seconds.values()):.0f} s), judged on "
        f"{len(data.test[0])} others. Random: every image keeps as many blocks as the policy keeps for it, but others."
    )
    table = PageTable(("decisions", "accuracy", "blocks kept", "FLOPs saved"), lines)
    return Part(
        (Result("digits, its policy", quality, count, row),),
        (Section("Handwritten digits: a policy trained here", text, (table,)),),
        {"digits": measured},
    )


def clip(run):
    """A pretrained EfficientNet-Lite0 with its policy on the frames of a video clip and on photos."""
    run.progress(0.0, "Lite0: reading the clip and the photos")
    recorded = media.read_clip("bikes")
    frames = media.center_crop(recorded.frames)
    photos = torch.cat([media.center_crop(media.read_photo(name)[None]) for name in media.HELD_OUT_PHOTOS])
    net = lite0.load_lite0()
    run.progress(0.05, "Lite0: freezing")
    frozen = freeze(net, media.normalize(frames[:_CLIP_BATCH]))
    split = lite0.FIRST_HELD_OUT_FRAME
    judged = {
        "seen": lite0.judge(
            net, frozen, frames[:split], draws=1, progress=run.between(0.1, 0.25, "Lite0: seen scenes")
        ),
        "new": lite0.judge(net, frozen, frames[split:], draws=3, progress=run.between(0.25, 0.55, "Lite0: new scenes")),
        "photos": lite0.judge(net, frozen, photos, draws=20, progress=run.between(0.55, 0.6, "Lite0: photos")),
    }
    new = judged["new"]
    rows = _time_clip(run, net, frames[split:], new.decisions)
    quality = f"agreement {_percent(new.rate)} (random {_percent(new.random)})"
    results = tuple(
        Result(
            f"Lite0, its policy, {'clip' if row['batch'] > 1 else 'clip, frame by frame'}",
            quality,
            lite0.NUM_BLOCKS,
            row,
        )
        for row in rows
    )
    return Part(results, (_clip_section(run, recorded, judged),), {"clip": {k: _summary(j) for k, j in judged.items()}})


def _time_clip(run, net, frames, decisions):
    """Return rows for a batch of frames spread over the clip, and for one frame at a time."""
    chosen = torch.linspace(0, len(frames) - 1, _CLIP_BATCH).round().long()
    images = media.normalize(frames[chosen])
    common = {"name": "EfficientNet-Lite0", "baselines": BASELINES, "seconds": run.seconds}
    streamed = replace(_of_policy(decisions[chosen]), draws=decisions[chosen][:_STREAMED_FRAMES].split(1))
    rows = run_experiment(
        net, images, [_of_policy(decisions[chosen])], progress=run.between(0.6, 0.85, "Lite0, batch: "), **common
    )
    rows += run_experiment(net, images[:1], [streamed], progress=run.between(0.85, 1.0, "Lite0, frames: "), **common)
    return rows


def _clip_section(run, recorded, judged):
    kept = torch.cat([judged["seen"].kept, judged["new"].kept])
    split = lite0.FIRST_HELD_OUT_FRAME
    picture = run.folder / "clip.png"
    title = f"Blocks that the policy keeps; scenes after {recorded.seconds[split]:.1f} s were not in its training"
    with replacing(picture, "wb") as file:
        plot_clip(
            kept.tolist(),
            {number: recorded.frames[number] for number in _EXAMPLE_FRAMES},
            file,
            title=title,
            num_blocks=lite0.NUM_BLOCKS,
            seconds=recorded.seconds,
        )
    titles = {
        "seen": f"clip, scenes of the training ({len(judged['seen'].kept)} frames)",
        "new": f"clip, other scenes ({len(judged['new'].kept)} frames)",
        "photos": f"photos not trained on ({', '.join(media.HELD_OUT_PHOTOS)})",
    }
    lines = tuple(
        (
            titles[key],
            _percent(j.rate),
            _percent(j.random),
            _percent(j.static),
            _percent(j.shifted),
            f"{j.kept.double().mean():.2f}",
            _percent(j.saving),
        )
        for key, j in judged.items()
    )
    text = (
        "EfficientNet-Lite0 as it was trained on ImageNet, without any dropping; "
        f"{lite0.NUM_BLOCKS} of its 16 blocks have an identity shortcut and can be dropped. Its policy was trained "
        "with agreement with the full network as the reward, on other photos and on the first scenes of this clip. "
        "There are no labels here, and the frames of a clip resemble each other: agreement is all that is claimed, "
        "not accuracy.\n\n"
        "Random: as many blocks per frame as the policy keeps, but others. Static: always the blocks that the policy "
        "keeps most often. Full, shifted: the full network on the same pictures moved by four pixels; how often that "
        "alone changes the prediction tells how much agreement there is to have."
    )
    table = PageTable(("input", "agreement", "random", "static", "full, shifted", "blocks kept", "FLOPs saved"), lines)
    caption = "Blocks kept over the frames of the clip."
    return Section("A pretrained network on video and photos", text, (table,), ((str(picture), caption),))


def published(run):
    """ResNet-110 and ResNet-101 with as many blocks kept as published."""
    results = []
    for number, (name, batch) in enumerate(_RESNET_BATCHES.items()):
        progress = run.between(number / len(_RESNET_BATCHES), (number + 1) / len(_RESNET_BATCHES), f"{name}: ")
        progress(0.0, "building")
        model = build(NETS[name])
        count, kept = num_blocks(model), NETS[name].published.kept
        # Of this kind because the policy network runs and is charged, though its decisions are not used.
        setting = replace(draw_decisions(kept / count, count, batch), kind=PUBLISHED)
        images = make_images(batch, NETS[name].size)
        rows = run_experiment(
            model, images, [setting], name=name, baselines=BASELINES, seconds=run.seconds, progress=progress
        )
        results.append(Result(f"{name}, {kept:.4g} of {count} kept", "", count, rows[0]))
    text = (
        "The networks of the BlockDrop paper with as many blocks kept as its trained policies keep on CIFAR-10 and "
        "ImageNet. Weights and batch norm statistics are random and every block of every image is kept by a coin toss "
        "with that rate, so this says nothing of accuracy; the policy network runs and is charged."
    )
    return Part(tuple(results), (Section("Published networks at their published keep rates", text),))


#: Name -> (function, modules that must be installed).
PARTS = {
    "digits": (digits, ("sklearn",)),
    "clip": (clip, (*media.NEEDS, *NETS["efficientnet_lite0"].needs)),
    "published": (published, ()),
}


def _of_policy(decisions):
    """Return a setting with the decisions that a policy took."""
    return Setting(decisions.double().mean().item(), PUBLISHED, (decisions,))


def _summary(judged):
    return {
        "images": len(judged.kept),
        "agreement": judged.rate,
        "random": judged.random,
        "static": judged.static,
        "shifted": judged.shifted,
        "saving": judged.saving,
        "kept": judged.kept.tolist(),
    }


def _percent(share):
    return f"{100 * share:.1f} %"
