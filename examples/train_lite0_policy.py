"""Train the policy network that decides which blocks of a pretrained EfficientNet-Lite0 to run.

    pip install 'dynexec[demo]'
    python examples/train_lite0_policy.py --out policy.pt

BlockDrop's first stage (Wu et al., CVPR 2018): REINFORCE with the self-critical baseline under the curriculum over
blocks. There are no labels: a decision is right if the network then predicts what the full network predicts. The
training images are crops of photos, and of frames of three clips; judged are scenes and photos that they leave out.
The network itself stays as it is, so that its speed-up is that of a network nobody trained for dropping.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from dynexec import freeze
from dynexec.models.training import train_policy
from dynexec.nn import DynamicNetwork
from dynexec.report import lite0, media

_SHARES = {"photos": 0.55, "bikes": 0.3, "bigbuckbunny": 0.075, "carphone_pristine": 0.075}


class FastNetwork(DynamicNetwork):
    """Computes through the frozen network, which is faster: the backbone needs no gradient here."""

    def __init__(self, backbone, policy, example):
        super().__init__(backbone, policy)
        self.frozen = (freeze(backbone, example),)  # in a tuple: not a child, so that only the policy is trained

    def forward(self, images, decisions=None):
        return self.frozen[0](images, decisions)


def training_crops(count, generator):
    """uint8 ``[count, 3, 224, 224]``: crops of the training photos and of the scenes that may be seen."""
    sources = {"photos": [media.read_photo(name) for name in media.TRAINING_PHOTOS]}
    for clip in media.CLIPS:
        frames = media.read_clip(clip, shorter_side=272).frames
        sources[clip] = list(frames[: lite0.FIRST_HELD_OUT_FRAME] if clip == "bikes" else frames)
    parts = [media.random_crops(sources[name], round(share * count), generator) for name, share in _SHARES.items()]
    return torch.cat(parts)


def held_out():
    """Images that training never sees, by name: frames of later scenes, photos, and random crops of these photos."""
    photos = [media.read_photo(name) for name in media.HELD_OUT_PHOTOS]
    return {
        "clip, later scenes": media.center_crop(media.read_clip("bikes").frames[lite0.FIRST_HELD_OUT_FRAME :]),
        "photos": torch.cat([media.center_crop(photo[None]) for photo in photos]),
        "photos, 120 crops": media.random_crops(photos, 120, torch.Generator().manual_seed(1)),
    }


def predictions(net, images, progress):
    """What the full network predicts for uint8 images: int64 ``[N]``."""
    everything = torch.ones(lite0.NUM_BLOCKS, dtype=torch.bool)
    task = progress.add_task("labels", total=len(images))
    labels = []
    for batch in images.split(32):
        labels.append(net(media.normalize(batch), everything).argmax(1))
        progress.advance(task, len(batch))
    return torch.cat(labels)


def report(console, net):
    """Print how the trained policy does on images it has not seen."""
    frozen = freeze(net, media.normalize(torch.zeros(16, 3, 224, 224, dtype=torch.uint8)))
    console.print("held out             agreement  random  static  shifted  blocks kept  FLOPs saved")
    for name, images in held_out().items():
        judged = lite0.judge(net, frozen, images)
        kept = judged.kept.double()
        console.print(
            f"{name:20} {judged.rate:10.3f} {judged.random:7.3f} {judged.static:7.3f} {judged.shifted:8.3f} "
            f"{kept.mean():7.2f} +- {kept.std():.2f} {judged.saving:9.3f}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/lite0_policy.pt"), help="the weights (%(default)s)")
    parser.add_argument("--crops", type=int, default=2500, help="training images (%(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="passes over them (%(default)s)")
    parser.add_argument("--penalty", type=float, default=-0.6, help="reward of a wrong prediction (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)  # before the work, which would be lost
    console, start = Console(width=120), time.perf_counter()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images = training_crops(args.crops, generator)
    net = lite0.load_lite0(policy_weights=None)
    net.policy.requires_grad_(True)
    fast = FastNetwork(net.backbone, net.policy, media.normalize(images[:64]))
    with Progress(console=Console(file=sys.stderr)) as progress:
        labels = predictions(fast, images, progress)
        task = progress.add_task("training", total=args.epochs)

        def on_epoch(record):
            progress.advance(task)
            console.print(
                f"epoch {record['epoch'] + 1}: agreement {record['accuracy']:.3f}, kept {record['kept']:.2f}, "
                f"reward {record['reward']:.3f}, {time.perf_counter() - start:.0f} s"
            )

        train_policy(
            fast,
            images,
            labels,
            epochs=args.epochs,
            blocks_per_epoch=2 * lite0.NUM_BLOCKS / args.epochs,
            penalty=args.penalty,
            entropy=0.02,
            batch_size=32,
            learning_rate=4e-3,
            generator=generator,
            augment=lambda batch, generator: media.normalize(batch),
            on_epoch=on_epoch,
        )
    torch.save(net.policy.state_dict(), args.out)
    report(console, net.eval())
    console.print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} kB, {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
