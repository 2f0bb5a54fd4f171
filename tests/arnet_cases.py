"""A small AR-Net, clips, and the frame-by-frame network that it is compared with."""

import torch
import torch.nn.functional as F
from torch import nn
from toys import finish

from dynexec.models.arnet import build_arnet

SIZES = (29, 21, 15, 11)  # odd, and no multiples of each other
FRAMES, CLASSES, ACTIONS = 7, 5, 7
LITE, SKIP1, SKIP2, SKIP4 = 3, 4, 5, 6
MODES = ["exact", "cheap"]


class Small(nn.Sequential):
    """Two convolutions and pooling."""

    def __init__(self, features):
        super().__init__(
            nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, features, 3, 1, 1, bias=False), nn.BatchNorm2d(features), nn.ReLU6(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.num_features = features


def small_net(mode="exact", *, num_frames=FRAMES, dtype=torch.float32):
    """Weights large enough for decisions and hidden states of all kinds."""
    net = build_arnet(
        [Small(8), Small(4), Small(6)], lite_backbone=Small(9), hidden=10, num_classes=CLASSES, num_frames=num_frames,
        resolutions=SIZES, policy_mode=mode,
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.LSTMCell)):
            for parameter in module.parameters():
                nn.init.normal_(parameter, 0.0, 0.6)
    nn.init.normal_(net.policy.linear.weight, 0.0, 6.0)
    return finish(net).to(dtype)


def clips(n, *, num_frames=FRAMES, layout=torch.contiguous_format):
    """Frames, which vary enough for the policy to change its mind."""
    frames = torch.randn(n, num_frames, 3, SIZES[0], SIZES[0]) + 2 * torch.randn(n, num_frames, 3, 1, 1)
    return frames.flatten(0, 1).contiguous(memory_format=layout).unflatten(0, (n, num_frames))


def nearest(image, size):
    """Pixel ``floor(i * old / new)``, in whole numbers."""
    index = torch.arange(size) * image.shape[-1] // size
    return image[..., index, :][..., index]


def watch_video(net, frames, decide, cheap):
    """One video, frame by frame: actions as decided by ``decide(t, log_probabilities)``, hidden states, predictions.

    Yields per frame: action (None where ignored), log-probabilities, hidden state, lite prediction.
    """
    policy, sizes = net.policy, net.resolutions
    h = c = frames.new_zeros(1, policy.rnn.hidden_size)
    left = 0
    for t, frame in enumerate(frames):
        running, action, scores, lite = left > 0, None, None, None
        if not (cheap and running):
            after, c = policy.rnn(policy.lite_backbone(nearest(frame[None], sizes[-1])), (h, c))
            scores, lite = policy.linear(after).log_softmax(1), policy.lite_fc(after)
            h = h if running else after
        if not running:
            action = decide(t, scores)
            left = policy.skips[action - SKIP1] if action >= SKIP1 else 1
        left -= 1
        yield action, scores, lite


def reference(net, frames, decisions, *, cheap=False):
    """The logits, video by video and frame by frame."""
    logits = []
    for video, row in zip(frames, decisions.tolist()):
        found = []
        for frame, (action, _, lite) in zip(video, watch_video(net, video, lambda t, _: row[t], cheap)):  # noqa: B023
            if action is not None and action < LITE:
                features = net.base_model_list[action](nearest(frame[None], net.resolutions[action]))
                found.append(net.new_fc_list[action](features))
            elif action == LITE:
                found.append(lite)
        logits.append(sum(found, torch.zeros(1, CLASSES, dtype=frames.dtype)) / max(len(found), 1))
    return torch.cat(logits)


def patterns(n, num_frames=FRAMES):
    """(name, decisions), from the simplest to the most awkward ones."""
    for action in range(ACTIONS):
        yield f"all {action}", torch.full((n, num_frames), action)
    yield "random", torch.randint(ACTIONS, (n, num_frames))
    yield "lite after skips", torch.tensor([SKIP2, 0, LITE, SKIP4, LITE, 1, LITE]).expand(n, -1)[:, :num_frames]
    yield "skip at the end", torch.tensor([LITE, 0, SKIP1, 1, LITE, 2, SKIP4]).expand(n, -1)[:, :num_frames]
    yield "skip in a skip", torch.tensor([SKIP4, SKIP4, SKIP4, SKIP2, LITE, SKIP2, 2]).expand(n, -1)[:, :num_frames]
    mixed = torch.randint(ACTIONS, (n, num_frames))
    mixed[0] = LITE
    mixed[-1] = SKIP4
    yield "lite beside skipped", mixed


def relative(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-9)).item()


def one_hot(decisions, dtype=torch.float32):
    return F.one_hot(decisions, ACTIONS).to(dtype)
