"""Video files in the form that video networks take: frames, differences of frames, and spectrograms of the sound.

Sizes, steps and spectrograms are those of the published data loaders of AR-Net and AdaMML in evaluation.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dynexec.report.media import Clip, normalize

#: Modalities that a video file gives. Optical flow takes other packages.
MODALITIES = ("rgb", "sound", "rgbdiff")
SOUND_RATE = 24000  # samples per second
SOUND_SECONDS = 1.28  # around the middle of a segment; gives as many columns as rows

_DIFFERENCES = 5  # of successive frames, stacked
_FFT, _WINDOW, _HOP = 511, 240, 120  # in samples: 256 rows; 10 ms, every 5 ms
_SMALLEST_POWER = 1e-6  # added before the logarithm
_CROPPED = 0.875  # of the scaled frame's shorter side


@dataclass(frozen=True)
class Sound:
    """One channel, float32 ``[samples]`` at :data:`SOUND_RATE`, and the time in the clip at which it begins."""

    samples: np.ndarray
    start: float


@dataclass(frozen=True)
class Segments:
    """S segments of a clip, which overlap if it is short.

    Attributes
    ----------
    clip_seconds : float
        Length of the clip.
    seconds : float64 array ``[S, F]``
        Time of each frame in it.
    frames : uint8 array ``[S, F, size, size, 3]``
    differences : uint8 array ``[S, F, 5, size, size, 3]`` or None
        From each of five successive frames to the next, halved; 127 where nothing changes.
    sound : Sound or None
        Sound of the whole clip.
    """

    clip_seconds: float
    seconds: np.ndarray
    frames: np.ndarray
    differences: np.ndarray | None
    sound: Sound | None

    @property
    def centers(self):
        """Time halfway between each segment's first and last frame, float64 ``[S]``."""
        return (self.seconds[:, 0] + self.seconds[:, -1]) / 2

    @property
    def overlapping(self):
        """Number of segments that begin before the previous one has ended."""
        return int((self.seconds[1:, 0] <= self.seconds[:-1, -1]).sum())

    def inputs(self, modalities):
        """Return what :class:`dynexec.models.AdaMML` takes for one video: float ``[1, S, F, C, H, W]`` by modality."""
        make = {
            "rgb": lambda: _to_input(self.frames),
            "rgbdiff": lambda: _to_input(self.differences).flatten(2, 3),
            "sound": lambda: log_spectrogram(sound_windows(self.sound, self.centers))[:, None, None],
        }
        return {name: make[name]()[None].contiguous() for name in modalities}


def read_times(path):
    """Read the time of each frame of a video file in seconds, float64 ``[T]``.

    Raises
    ------
    ValueError
        If the file cannot be read, or contains no pictures.
    """
    with _opened(path) as container:
        if not container.streams.video:
            raise ValueError(f"{path} holds no pictures")
        return np.array([float(frame.time) for frame in container.decode(video=0)])


def read_frames(path, numbers, size=224):
    """Read frames of a video file, with the shorter side scaled to ``size / 0.875`` and the centre cropped.

    Parameters
    ----------
    path : path-like
    numbers : sequence of int
        Which frames, in any order; may repeat.
    size : int

    Returns
    -------
    uint8 array ``[len(numbers), size, size, 3]``, RGB
    """
    wanted, place = np.unique(numbers, return_inverse=True)
    pictures, last = [], wanted[-1]
    wanted = set(wanted.tolist())
    with _opened(path) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                pictures.append(_crop(frame, size))
            if number == last:
                break
    return np.stack(pictures)[place]


def read_sound(path):
    """Read the sound track of a video file, with all channels mixed to one.

    Raises
    ------
    ValueError
        If the file cannot be read, or has no sound track.
    """
    import av

    # 16 bits, as published: to floating point FFmpeg would mix channels without keeping their sum below 1.
    resampler = av.AudioResampler(format="s16", layout="mono", rate=SOUND_RATE)
    parts, start = [], None
    with _opened(path) as container:
        if not container.streams.audio:
            raise ValueError(f"{path} has no sound track, which the modality sound is made of")
        for frame in container.decode(audio=0):
            start = float(frame.time) if start is None else start
            parts += [part.to_ndarray()[0] for part in resampler.resample(frame)]
        parts += [part.to_ndarray()[0] for part in resampler.resample(None)]
    samples = np.concatenate(parts) if parts else np.zeros(0, np.int16)
    return Sound(samples.astype(np.float32) / 32768, start or 0.0)


def read_windows(path, num_windows, num_frames, size=224):
    """Read frames spread evenly over a clip: the middle one of each of its equal parts.

    Parameters
    ----------
    path : path-like
    num_windows : int
        Number of consecutive windows.
    num_frames : int
        Frames per window.
    size : int

    Returns
    -------
    Clip
        With ``num_windows * num_frames`` frames.

    Raises
    ------
    ValueError
        If the file cannot be read or has fewer frames, or a number is below 1.
    """
    _check_counts(num_windows=num_windows, num_frames=num_frames)
    times, total = read_times(path), num_windows * num_frames
    if len(times) < total:
        raise ValueError(
            f"{path} is too short: it has {len(times)} frames, and {num_windows} x {num_frames} different ones are to "
            "be shown to the network"
        )
    numbers = ((np.arange(total) + 0.5) * len(times) / total).astype(int)
    return Clip(read_frames(path, numbers, size), times[numbers])


def read_segments(path, modalities, *, num_segments=10, num_frames=8, step=4, size=224):
    """Read segments of a clip whose beginnings are spread evenly, whether or not they overlap.

    Parameters
    ----------
    path : path-like
    modalities : sequence of str
        From :data:`MODALITIES`.
    num_segments, num_frames : int
        S and F.
    step : int
        Step between frames of a segment: 4 shows every fourth.
    size : int

    Returns
    -------
    Segments

    Raises
    ------
    ValueError
        If the file cannot be read, is shorter than one segment, or lacks requested sound; or if a modality is unknown
        or a number is below 1.
    """
    _check_counts(num_segments=num_segments, num_frames=num_frames, step=step)
    if unknown := [name for name in modalities if name not in MODALITIES]:
        raise ValueError(f"modalities must be of {', '.join(MODALITIES)}, got {unknown[0]!r}")
    times = read_times(path)
    after = _DIFFERENCES if "rgbdiff" in modalities else 0
    length = num_frames * step
    if len(times) < length + after:
        more = f", and {after} more for their differences" if after else ""
        raise ValueError(
            f"{path} is too short: it has {len(times)} frames, and a segment takes {length} (every {step}th is shown)"
            f"{more}"
        )
    sound = read_sound(path) if "sound" in modalities else None
    if sound is not None and len(sound.samples) < SOUND_SECONDS * SOUND_RATE:
        raise ValueError(
            f"{path} is too short: its sound track has {len(sound.samples) / SOUND_RATE:.2f} s, and a segment takes "
            f"{SOUND_SECONDS}"
        )
    starts = np.linspace(0, len(times) - length - after, num_segments).astype(int)
    numbers = starts[:, None] + step * np.arange(num_frames)
    frames = read_frames(path, numbers[..., None] + np.arange(after + 1), size)
    differences = _halve_differences(frames) if after else None
    between = (times[-1] - times[0]) / (len(times) - 1)
    return Segments(float(times[-1] + between), times[numbers], frames[:, :, 0], differences, sound)


def sound_windows(sound, centers):
    """Return the sound around each of ``centers`` (seconds), moved to lie within the track: float ``[S, 30720]``."""
    length = round(SOUND_SECONDS * SOUND_RATE)
    first = np.round((np.asarray(centers) - sound.start - SOUND_SECONDS / 2) * SOUND_RATE).astype(int)
    first = first.clip(0, len(sound.samples) - length)
    return torch.from_numpy(sound.samples[first[:, None] + np.arange(length)])


def log_spectrogram(samples):
    """Compute the logarithm of the power of sound by frequency and time.

    Parameters
    ----------
    samples : float tensor ``[..., n]``

    Returns
    -------
    float tensor ``[..., 256, 1 + (n - 1) // 120]``
        Frequencies from 0 to half the sampling rate; 256 columns for :data:`SOUND_SECONDS`.
    """
    window = torch.hann_window(_WINDOW, dtype=samples.dtype)
    flat = samples.reshape(-1, samples.shape[-1])
    spectrum = torch.stft(flat, _FFT, _HOP, _WINDOW, window, pad_mode="constant", return_complex=True)
    power = torch.view_as_real(spectrum).square().sum(-1)
    return (power + _SMALLEST_POWER).log().reshape(*samples.shape[:-1], *power.shape[1:])


def _check_counts(**counts):
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be 1 or more, got {count}")


@contextmanager
def _opened(path):
    """Open a PyAV container; errors of the file, also while decoding, become a ValueError that names it."""
    import av

    if not Path(path).is_file():
        raise ValueError(f"{path} cannot be read: there is no such file")
    try:
        with av.open(str(path)) as container:
            yield container
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _crop(frame, size):
    """Return the middle of a decoded frame, the right way up."""
    scale = size / _CROPPED / min(frame.width, frame.height)
    width, height = round(frame.width * scale), round(frame.height * scale)
    picture = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA")
    top, left = (height - size) // 2, (width - size) // 2
    return np.rot90(picture[top : top + size, left : left + size], round(frame.rotation / 90))


def _halve_differences(frames):
    """Map uint8 ``[..., n + 1, H, W, 3]`` to uint8 ``[..., n, H, W, 3]``: each frame to the next, from 0 to 255."""
    change = frames[..., 1:, :, :, :].astype(np.int16) - frames[..., :-1, :, :, :]
    return ((change + 255) // 2).astype(np.uint8)


def _to_input(pictures):
    """Map uint8 ``[..., H, W, 3]`` to normalised float ``[..., 3, H, W]``."""
    images = torch.from_numpy(pictures).movedim(-1, -3)
    return normalize(images.flatten(0, -4)).unflatten(0, images.shape[:-3])
