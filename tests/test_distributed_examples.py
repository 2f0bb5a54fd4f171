"""The examples for many processes: interrupted at any time, they go on, and nothing is computed twice."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from example_scripts import EXAMPLES, load_example, needs_examples

from dynexec import convert, freeze
from dynexec.nn import DynamicNetwork
from dynexec.report import media

pytestmark = needs_examples
needs_torchrun = pytest.mark.skipif(
    not (sys.platform == "linux" and torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="needs gloo, and the list of a process's children",
)


def small_network():
    """As the example's, but small; its decisions depend on the image."""
    torch.manual_seed(0)
    backbone = toys.torchvision_style()
    policy = toys.Policy(convert(backbone).num_blocks)
    torch.nn.init.normal_(policy.logit.weight, std=3.0)
    return DynamicNetwork(backbone, policy).eval()


@cache
def frozen_network():
    return freeze(small_network(), torch.randn(2, 3, 224, 224), executor="compact")


def load_small(batch_size, pause=0.0):
    frozen = frozen_network()

    def fast(images, **options):
        time.sleep(pause)
        return frozen(images, **options)

    return fast


@pytest.fixture
def photos(tmp_path):
    """Nine pictures of several sizes and kinds in two folders, and three files that are none."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "photos"
    (folder / "inside").mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(9):
        # Of few colours: JPEG, too, must give nearly the same image again.
        pixels = np.tile(random.integers(0, 256, 3, np.uint8), (230 + 10 * number, 260, 1))
        path = folder / "inside" if number % 3 == 0 else folder
        picture = image.fromarray(pixels)
        picture = picture.convert("L") if number == 4 else picture
        picture.save(path / f"{number} ä.{'jpg' if number % 2 else 'PNG'}")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "half.png").write_bytes((folder / "2 ä.PNG").read_bytes()[:-40])
    (folder / "readme.txt").write_text("not looked at")
    return folder


def infer(monkeypatch, photos, rank=0, world=1, load=load_small, batch_size=2):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    arguments = [str(photos), "--output", str(photos.parent / "out"), "--batch-size", str(batch_size)]
    return load_example("infer_folder").main(arguments, load)


def records(photos):
    """All records, by file; each may be there once."""
    lines = [
        json.loads(line) for path in (photos.parent / "out").iterdir() for line in path.read_bytes().splitlines(True)
    ]
    assert len({line["file"] for line in lines}) == len(lines)
    return {line.pop("file"): line for line in lines}


def names(photos):
    return {path.relative_to(photos).as_posix() for path in photos.rglob("*.*") if path.suffix != ".txt"}


def test_every_image_once_as_the_network_predicts(photos, monkeypatch, capsys):
    from PIL import Image

    for rank in (1, 0):
        assert infer(monkeypatch, photos, rank, 2) == 0
    found = records(photos)
    assert found.keys() == names(photos) and len(found) == 11
    net = small_network()
    for name, record in found.items():
        if name in ("broken.png", "half.png"):
            continue
        pixels = np.asarray(Image.open(photos / name).convert("RGB"))
        with torch.no_grad():
            logits, decisions = net(media.normalize(media.center_crop(pixels[None])), return_decisions=True)
        kept = decisions[0].nonzero().flatten().tolist()
        assert record == {"prediction": logits.argmax(1).item(), "kept": kept}, name
    assert len({str(record["kept"]) for record in found.values() if "kept" in record}) > 1
    assert found["broken.png"].keys() == {"error"} and "cannot identify" in found["broken.png"]["error"]
    assert re.search("truncated", found["half.png"]["error"])
    printed = capsys.readouterr()
    assert "unreadable: broken.png: UnidentifiedImageError" in printed.err and "unreadable: half.png" in printed.err
    assert "2 of 6" in printed.err and "6 of 6" in printed.err
    assert "shard-1-of-2.jsonl: " in printed.out


def counting(batches):
    def load(batch_size):
        fast = load_small(batch_size)

        def counted(images, **options):
            batches.append(len(images))
            return fast(images, **options)

        return counted

    return load


def test_resumes_and_repairs_what_is_half_written(photos, monkeypatch, capsys):
    infer(monkeypatch, photos)
    expected, batches = records(photos), []
    shard = photos.parent / "out" / "shard-0-of-1.jsonl"
    whole = shard.read_bytes()
    assert infer(monkeypatch, photos, load=counting(batches)) == 0 and batches == []
    assert "0 computed, 0 unreadable, 11 done before" in capsys.readouterr().out
    shard.write_bytes(whole[: whole.rfind(b"\n", 0, -1) - 5])  # the last line is lost, the one before it torn
    assert infer(monkeypatch, photos, load=counting(batches)) == 0
    assert sum(batches) == 2 - sum("error" in json.loads(line) for line in whole.splitlines()[-2:])
    assert records(photos) == expected
    shard.write_bytes(whole[:-5])
    for rank in range(3):  # more processes than before; another one's torn line is repaired, too
        assert infer(monkeypatch, photos, rank, 3) == 0
    assert shard.read_bytes() == whole[: whole.rfind(b"\n", 0, -1) + 1]
    assert records(photos) == expected


def test_what_is_refused(photos, monkeypatch, capsys):
    shard = photos.parent / "out" / "shard-7-of-9.jsonl"
    shard.parent.mkdir()
    shard.write_text('{"file": "a.png"}\nsomething else\n')
    with pytest.raises(ValueError, match="shard-7-of-9.jsonl, line 2 is none of this script's: b'something else'"):
        infer(monkeypatch, photos)
    shard.unlink()
    with pytest.raises(SystemExit):
        infer(monkeypatch, photos, batch_size=0)
    with pytest.raises(SystemExit):
        infer(monkeypatch, photos / "nowhere")
    assert "--batch-size must be at least 1, got 0" in capsys.readouterr().err
    (photos / "empty").mkdir()
    assert infer(monkeypatch, photos / "empty") == 0


_SLOW = """
import signal, sys, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
sys.path.insert(0, sys.argv[1])
import test_distributed_examples as tests
sys.exit(tests.load_example("infer_folder").main(sys.argv[2:], lambda size: tests.load_small(size, pause=0.3)))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_interrupted_by_a_signal(name, photos, monkeypatch):
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW, Path(__file__).parent, photos, "--output", photos.parent / "out",
         "--batch-size", "2"], stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while "2 of 11" not in (line := process.stderr.readline()):
            assert line, "it ended early"
        process.send_signal(getattr(signal, name))
        rest = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == (130 if name == "SIGINT" else -signal.SIGKILL)
    assert ("interrupted; run the same command again to go on" in rest) == (name == "SIGINT")
    before, batches = records(photos), []
    assert 2 <= len(before) < 11
    assert infer(monkeypatch, photos, load=counting(batches)) == 0
    after = records(photos)
    assert after.keys() == names(photos) and before.items() <= after.items()
    computed = {name for name in after.keys() - before.keys() if "error" not in after[name]}
    assert sum(batches) == len(computed)


def test_another_seed_does_not_go_on_from_a_network_that_saw_other_images(tmp_path):
    pytest.importorskip("sklearn")
    example, threads, weights = load_example("train_distributed"), torch.get_num_threads(), []
    try:
        for seed in ("0", "1", "0"):
            example.main(["--output", str(tmp_path), "--epochs", "0", "0", "0", "--seed", seed])
            weights.append(torch.load(tmp_path / "weights.pt", weights_only=True)["backbone.fc.weight"])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])


def torchrun(output):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         EXAMPLES / "train_distributed.py", "--output", output, "--epochs", "1", "2", "1", "--timeout", "60"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def children(process):
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@needs_torchrun
@pytest.mark.skipif("DYNEXEC_SLOW_TESTS" not in os.environ, reason="set DYNEXEC_SLOW_TESTS: minutes on a busy machine")
def test_after_a_killed_process_the_same_command_goes_on_bit_for_bit(tmp_path):
    pytest.importorskip("sklearn")
    whole, torn, again = torchrun(tmp_path / "whole"), None, None
    try:
        printed = whole.communicate(timeout=240)[0]
        assert whole.returncode == 0, printed
        torn = torchrun(tmp_path / "torn")
        lines = []
        while "policy 1/2" not in (line := torn.stdout.readline()):
            assert line, "".join(lines)
            lines.append(line)
        os.kill(children(torn)[-1], signal.SIGKILL)
        printed_again = "".join(lines) + torn.communicate(timeout=240)[0]
        assert torn.returncode != 0, printed_again
        again = torchrun(tmp_path / "torn")
        printed_again += again.communicate(timeout=240)[0]
    finally:
        for process in (whole, torn, again):
            if process is not None:
                process.terminate()  # and torchrun its workers
    assert again.returncode == 0, printed_again
    assert "network 1/1" not in printed_again.partition("policy 1/2")[2]  # it was not trained anew
    assert re.search(r"Connection closed by peer|Connection reset|exitcode.*-9|Signal 9", printed_again), printed_again
    for report in re.findall(r"test: accuracy.*", printed):
        assert report in printed_again
    assert re.search(r"test: accuracy 0\.\d+, \d+\.\d of 12 blocks kept", printed)
    weights = [torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("whole", "torn")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    if (tmp_path / "whole" / "log.jsonl").exists():  # else TensorBoard is installed
        lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
        scalars = {name for line in lines for name in line}
        assert {"step", "network/loss", "policy/reward", "fine-tuning/loss", "keep_rate"} <= scalars
        assert {f"keep_rate/block_{block}" for block in range(12)} <= scalars
        assert max(line["step"] for line in lines) == 3
