"""Predictions of a frozen network for a folder of images, by any number of processes, resumable.

    pip install 'dynexec[demo]'
    python examples/infer_folder.py photos --output out/predictions
    torchrun --standalone --nproc-per-node 4 examples/infer_folder.py photos --output out/predictions

The network is EfficientNet-Lite0 with its ImageNet weights and the policy that comes with dynexec. Each process takes
every n-th file and writes its own shard, a JSON line per image: {"file", "prediction", "kept"}, with the numbers of the
blocks that were kept, or {"file", "error"} for one that cannot be read. The processes never wait for each other.

Interrupt it whenever you like, and run it again, with as many processes as you like: images whose line is in one of the
shards are not computed again. Names are relative to the folder: give another folder another output. To try an
unreadable image again, delete its line.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

import dynexec
from dynexec.report import lite0, media

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def repair(path):
    """Cut off the line at the end of a shard that an interruption left half written."""
    with open(path, "r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def append(path, records):
    """Write records to a shard in one piece."""
    with open(path, "ab", buffering=0) as file:
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())


def files_done(folder):
    """Names in all shards of a folder; other processes may be writing to some of them."""
    done = set()
    for path in sorted(folder.glob("shard-*.jsonl")):
        *lines, _ = path.read_bytes().split(b"\n")  # after the last newline there is nothing, or half a line
        for number, line in enumerate(lines, 1):
            try:
                done.add(json.loads(line)["file"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is none of this script's: {line[:80]!r}") from error
    return done


def read_image(path):
    """uint8 ``[3, 224, 224]``: the middle of the picture."""
    from PIL import Image

    with Image.open(path) as picture:
        return media.center_crop(np.asarray(picture.convert("RGB"))[None])[0]


def read_batch(folder, names):
    """(names and images that could be read, records of those that could not)."""
    good, images, bad = [], [], []
    for name in names:
        try:
            images.append(read_image(folder / name))
            good.append(name)
        except Exception as error:  # what a broken file raises depends on its format and where it is broken
            bad.append({"file": name, "error": f"{type(error).__name__}: {error}"})
    return good, images, bad


def predict(fast, images):
    """(class, numbers of the blocks kept) per image."""
    logits, decisions = fast(media.normalize(torch.stack(images)), return_decisions=True)
    kept = [row.nonzero().flatten().tolist() for row in decisions]
    return list(zip(logits.argmax(1).tolist(), kept))


def load_network(batch_size):
    """The frozen network, on this process's GPU where there is one."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    example = media.normalize(torch.zeros(batch_size, 3, 224, 224, dtype=torch.uint8)).to(device)
    frozen = dynexec.freeze(lite0.load_lite0().to(device), example)
    return lambda images, **options: frozen(images.to(device), **options)


def run(names, args, shard, fast):
    """Compute what is left of this process's share, a batch at a time; the records of unreadable files."""
    failed, start = [], time.perf_counter()
    for first in range(0, len(names), args.batch_size):
        batch = names[first : first + args.batch_size]
        good, images, bad = read_batch(args.folder, batch)
        results = predict(fast, images) if good else []
        records = [{"file": name, "prediction": label, "kept": kept} for name, (label, kept) in zip(good, results)]
        append(shard, records + bad)
        failed += bad
        count, seconds = first + len(batch), time.perf_counter() - start
        print(f"{shard.name}: {count} of {len(names)}, {count / seconds:.1f} images/s", file=sys.stderr, flush=True)
    return failed


def main(argv=None, load=load_network):
    """Run the example, with another ``load(batch_size)`` if one is given; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="searched with the folders inside")
    parser.add_argument("--output", type=Path, default=Path("out/predictions"), help="folder (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process (%(default)s)")
    args = parser.parse_args(argv)
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if not args.folder.is_dir():
        parser.error(f"folder {str(args.folder)!r} is not a folder")
    if args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {args.batch_size}")
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    shard = args.output / f"shard-{rank}-of-{world}.jsonl"
    shard.touch()
    repair(shard)
    if rank == 0:  # and what runs of other numbers of processes left, to which nobody writes any more
        for path in set(args.output.glob("shard-*.jsonl")) - set(args.output.glob(f"shard-*-of-{world}.jsonl")):
            repair(path)
    done = files_done(args.output)
    found = sorted(
        p.relative_to(args.folder).as_posix() for p in args.folder.rglob("*") if p.suffix.lower() in SUFFIXES
    )
    left = [name for name in found[rank::world] if name not in done]
    try:
        failed = run(left, args, shard, load(args.batch_size)) if left else []
    except KeyboardInterrupt:
        print(f"{shard.name}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    for record in failed:
        print(f"unreadable: {record['file']}: {record['error']}", file=sys.stderr)
    share = len(found[rank::world])
    print(f"{shard}: {len(left) - len(failed)} computed, {len(failed)} unreadable, {share - len(left)} done before")
    return 0


if __name__ == "__main__":
    sys.exit(main())
