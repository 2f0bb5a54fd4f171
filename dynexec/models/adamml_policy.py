"""AdaMML's policy: which modalities each segment of a video is worth (Panda et al., ICCV 2021)."""

import torch
import torch.nn.functional as F
from torch import nn

from dynexec.models.mobilenet import NUM_FEATURES, STAGES, InvertedResidual, conv_bn_relu6, initialize
from dynexec.ops import check_dtype
from dynexec.policy import draw
from dynexec.policy.bernoulli import check_logits

#: Channels of a frame of each modality: stacks of five flow fields and of five differences; one spectrogram.
CHANNELS = {"rgb": 3, "flow": 10, "rgbdiff": 15, "sound": 1}
HIDDEN = 256  # of the LSTM
JOINT = 2048  # features of all modalities together


def pool_frames(x, frames):
    """Take the maximum over three neighbouring frames at every second one, which halves the frames of each clip.

    Parameters
    ----------
    x : tensor ``[rows * frames, C, H, W]``
        The frames of a clip are consecutive.
    frames : int
        Per clip; even.

    Returns
    -------
    tensor ``[rows * frames / 2, C, H, W]``
        channels_last if ``x`` is.

    Notes
    -----
    Equivalent to ``F.max_pool3d`` of clips ``[rows, C, frames, H, W]`` with kernel (3, 1, 1), stride (2, 1, 1) and
    padding (1, 0, 0), which takes several times as long because it also keeps indices.
    """
    clips = x.unflatten(0, (-1, frames))
    odd = clips[:, 1::2]
    largest = torch.maximum(clips[:, ::2], odd)
    if frames > 2:
        first, others = largest.split([1, frames // 2 - 1], 1)
        others = torch.maximum(others, odd[:, :-1])
        # As volumes [rows, C, frames, H, W], the layout of which torch.cat keeps.
        largest = torch.cat([first.transpose(1, 2), others.transpose(1, 2)], 2).transpose(1, 2)
    return largest.flatten(0, 1)


class PooledResidual(InvertedResidual):
    """An inverted residual block that first pools the frames, ``frames`` per clip."""

    def __init__(self, frames, *shape):
        super().__init__(*shape, flat=True)
        self.frames = frames

    def forward(self, x):
        return super().forward(pool_frames(x, self.frames))


class PolicyMobileNet(nn.Module):
    """MobileNetV2 that pools frames at the first blocks with 64 and with 160 channels, until one is left.

    ``features.0 .. features.17`` and ``conv``, with flat names: maps clips ``[rows, frames, C, H, W]`` to
    ``[rows, 1280]``.

    Parameters
    ----------
    in_channels : int
    frames : int
        Per clip: 1, 2 or 4.
    """

    def __init__(self, in_channels, frames):
        super().__init__()
        layers = [nn.Sequential(*conv_bn_relu6(in_channels, 32, 3, 2))]
        channels = 32
        for expansion, width, count, stride in STAGES:
            for number in range(count):
                shape = channels, width, 1 if number else stride, expansion
                if number == 0 and width in (64, 160) and frames > 1:
                    layers.append(PooledResidual(frames, *shape))
                    frames //= 2
                else:
                    layers.append(InvertedResidual(*shape, flat=True))
                channels = width
        self.features = nn.Sequential(*layers)
        self.conv = nn.Sequential(*conv_bn_relu6(channels, NUM_FEATURES, 1))
        initialize(self)

    def forward(self, clips):
        x = self.conv(self.features(clips.flatten(0, 1)))
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


class JointFeatures(nn.Module):
    """One network per modality, ``nets``, and two layers over their joined features, ``joint``.

    Parameters
    ----------
    nets : sequence of PolicyMobileNet
    """

    def __init__(self, nets):
        super().__init__()
        self.nets = nn.ModuleList(nets)
        self.joint = nn.Sequential(
            nn.Linear(len(nets) * NUM_FEATURES, JOINT), nn.ReLU(), nn.Linear(JOINT, JOINT), nn.ReLU()
        )

    def forward(self, clips):
        """Map one tensor ``[rows, frames, C, H, W]`` per network to ``[rows, 2048]``."""
        return self.joint(torch.cat([net(x) for net, x in zip(self.nets, clips, strict=True)], 1))


class AdaMMLPolicy(nn.Module):
    """Decision logits for every segment and modality, from a glance at all of them.

    Of visual modalities it sees every second frame, resized to ``size``. All segments are looked at together; only the
    LSTM goes from one to the next. Besides the features it reads the previous segment's logits rather than its
    decisions, so the logits do not depend on how decisions are drawn.

    Parameters
    ----------
    modalities : sequence of str
        Keys of :data:`CHANNELS`: what the policy looks at, one per column of the decisions.
    num_frames : int
        Frames of a visual segment, before every second one is left out.
    size : int
        Height and width.
    """

    def __init__(self, modalities, num_frames, size=160):
        super().__init__()
        self.modalities, self.num_frames, self.size = tuple(modalities), num_frames, size
        glance = (num_frames + 1) // 2
        self.joint_net = JointFeatures(
            [PolicyMobileNet(CHANNELS[name], 1 if name == "sound" else glance) for name in self.modalities]
        )
        self.lstm = nn.LSTMCell(JOINT + 2 * len(self.modalities), HIDDEN)
        self.fcs = nn.ModuleList(nn.Linear(HIDDEN, 2) for _ in self.modalities)

    def forward(self, inputs):
        """Compute logits ``[N, S, M, 2]``, of leaving a modality out and of running it.

        Parameters
        ----------
        inputs : dict
            As for :class:`AdaMML`; other modalities in it are ignored.

        Raises
        ------
        TypeError, ValueError
            If ``inputs`` is invalid.
        """
        samples, segments = check_clips(inputs, self.modalities, self.num_frames, self.lstm.weight_ih.dtype)
        features = self.joint_net([self.glance(name, inputs[name]) for name in self.modalities])
        return self._recur(features.unflatten(0, (samples, segments))).unflatten(2, (len(self.modalities), 2))

    def glance(self, name, clips):
        """Reduce ``[N, S, F, C, H, W]`` to what is looked at, ``[N * S, ceil(F / 2), C, size, size]``; keep sound as it
        is.
        """
        clips = clips.flatten(0, 1)
        if name == "sound":
            return clips
        rows, size = len(clips), (self.size, self.size)
        frames = clips[:, ::2].flatten(0, 1)
        if frames.shape[-2:] != size:
            frames = F.interpolate(frames, size, mode="bilinear", align_corners=False)
        return frames.unflatten(0, (rows, -1))

    def _recur(self, features):
        """Map features ``[N, S, 2048]`` to logits ``[N, S, 2 * M]``: the LSTM, and the decision layers after it."""
        lstm = self.lstm
        weight, bias = (torch.cat([getattr(fc, name) for fc in self.fcs]) for name in ("weight", "bias"))
        from_features, from_logits = lstm.weight_ih.split([JOINT, 2 * len(self.fcs)], 1)
        # The largest of the products waits for nothing: for all segments at once it reads its weights once.
        waiting = F.linear(features, from_features, lstm.bias_ih + lstm.bias_hh).unbind(1)
        hidden, cell, found = None, None, []
        for gates in waiting:
            if hidden is not None:
                gates = gates + F.linear(found[-1], from_logits) + F.linear(hidden, lstm.weight_hh)
            write, keep, value, show = gates.chunk(4, 1)
            written = write.sigmoid() * value.tanh()
            cell = written if cell is None else keep.sigmoid() * cell + written
            hidden = show.sigmoid() * cell.tanh()
            found.append(F.linear(hidden, weight, bias))
        return torch.stack(found, 1)

    def decide(self, inputs):
        """Return decisions bool ``[N, S, M]``: a modality runs if its second logit is strictly greater than its first.

        Raises
        ------
        TypeError, ValueError
            As in :meth:`forward`; and if a logit is NaN. NaN is checked on the CPU only, because elsewhere the check
            would wait for the device; there NaN runs nothing.
        """
        logits = self(inputs)
        check_logits(logits)
        return logits[..., 1] > logits[..., 0]

    def sample(self, inputs, *, generator=None):
        """Draw decisions bool ``[N, S, M]``, each with its probability ``softmax(logits)[..., 1]``.

        The published code draws decisions this way, in training and in tests. ``generator`` is on the device of the
        inputs; the same state draws the same decisions.
        """
        return draw(self(inputs), generator=generator).bool()

    def count_head(self, segments):
        """Count the FLOPs of what follows the networks, per video: joint layers, LSTM and decision layers."""
        recurrent = self.lstm.weight_hh.numel() + 4 * HIDDEN * 2 * len(self.fcs)  # not in the first segment
        each = [*self.joint_net.joint[::2], *self.fcs]
        each = sum(layer.weight.numel() for layer in each) + 4 * HIDDEN * JOINT
        return 2 * (segments * each + (segments - 1) * recurrent)


def check_clips(inputs, modalities, num_frames, dtype):
    """Return N and S of ``inputs``; TypeError or ValueError unless it holds valid clips of all these modalities."""
    if not isinstance(inputs, dict):
        raise TypeError(f"inputs must be a dict of a tensor per modality, got {type(inputs).__name__}")
    if missing := [name for name in modalities if name not in inputs]:
        raise ValueError(
            f"inputs must hold {', '.join(modalities)}; got {', '.join(map(str, inputs))}: no {missing[0]}"
        )
    first = None
    for name in modalities:
        value = inputs[name]
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"inputs[{name!r}] must be a {dtype} tensor, got {type(value).__name__}")
        check_dtype(value, f"inputs[{name!r}]", dtype)
        frames = 1 if name == "sound" else num_frames
        shape = tuple(value.shape)
        if len(shape) != 6 or shape[2:4] != (frames, CHANNELS[name]) or value.numel() == 0:
            raise ValueError(
                f"inputs[{name!r}] must have shape [N, S, {frames}, {CHANNELS[name]}, H, W] and hold at least one "
                f"sample and segment, got {shape}"
            )
        first = first or (name, shape[:2])
        if shape[:2] != first[1]:
            raise ValueError(
                f"inputs must have as many samples and segments in every modality, got {first[1]} in {first[0]!r} "
                f"and {shape[:2]} in {name!r}"
            )
    return first[1]
