"""Small AdaMML networks, what they must compute, and the parameter names in published checkpoints."""

import official_keys
import torch
import torch.nn.functional as F
from toys import finish

from dynexec.models.adamml import AdaMML

CHANNELS = {"rgb": 3, "flow": 10, "rgbdiff": 15, "sound": 1}
CASES = {
    "rgb and sound": dict(modalities=("rgb", "sound")),
    "three": dict(modalities=("rgb", "sound", "flow"), num_frames=2),
    "flow looks at flow": dict(modalities=("flow", "rgb"), flow_policy="flow", learnable_weights=False, num_frames=8),
    "one frame": dict(modalities=("sound", "rgbdiff"), num_frames=1),
    "sound alone": dict(modalities=("sound",), num_frames=2),
}


def make(case="rgb and sound", **arguments):
    """A network in evaluation mode: BatchNorm and fusion weights random, decisions of both kinds."""
    torch.manual_seed(0)  # fixtures are made before a test is seeded
    net = AdaMML(**dict(num_classes=5, num_frames=4, depth=18, policy_size=33) | CASES[case] | arguments)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):  # weights for training let the input fade before BatchNorm has run
            torch.nn.init.kaiming_normal_(module.weight)
    finish(net)
    if net.main_net.lf_weights is not None:
        net.main_net.lf_weights.data.uniform_(0.1, 0.6)
    with torch.no_grad():
        inputs = inputs_for(net)
        for fc in net.policy.fcs:
            fc.weight *= 5
        for _ in range(3):  # the logits feed back
            logits = net.policy(inputs)
            for column, fc in enumerate(net.policy.fcs):
                fc.bias[1] -= (logits[:, :, column, 1] - logits[:, :, column, 0]).median()
    return net


def inputs_for(net, samples=3, segments=3, size=(41, 35)):
    """Fresh random clips of odd sizes, sound of another size than the rest; each segment louder or softer."""
    shapes = {name: (net.num_frames, CHANNELS[name], *size) for name in (*net.modalities, *net.policy.modalities)}
    if "sound" in shapes:
        shapes["sound"] = (1, 1, size[0] + 6, size[1])
    loudness = 0.2 + 3 * torch.rand(samples, segments, 1, 1, 1, 1)
    return {name: torch.randn(samples, segments, *shape) * loudness for name, shape in shapes.items()}


def draw(net, inputs, keep=0.5):
    """Random decisions."""
    first = inputs[net.modalities[0]]
    return torch.rand(*first.shape[:2], len(net.modalities)) < keep


def error(actual, expected):
    """Largest difference, relative to the largest value."""
    assert actual.shape == expected.shape
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


def pooled(frames):
    """The largest of each three neighbours, every second time."""
    return torch.stack([frames[max(0, i - 1) : i + 2].amax(0) for i in range(0, len(frames), 2)])


def video_network(net, clip):
    """Frames ``[F, C, H, W]`` of one segment to logits."""
    x = F.max_pool2d(F.relu(net.bn1(net.conv1(clip))), 3, 2, 1)
    for layer in (net.layer1, net.layer2, net.layer3):
        x = pooled(layer(x))
    x = net.layer4(x).mean((2, 3))
    return net.fc(x).mean(0)


def mobile_features(features, frames):
    """The seventeen blocks of MobileNetV2, frames pooled before 64 and before 160 channels."""
    x = features[0](frames)
    for number in range(1, 18):
        x = pooled(x) if number in (7, 14) else x
        y = features[number].conv(x)
        x = x + y if x.shape == y.shape else y
    return x


def sound_network(net, clip):
    """Spectrogram ``[1, 1, H, W]`` of one segment to logits."""
    x = net.features[18](mobile_features(net.features, clip)).mean((2, 3))
    return net.classifier[1](x)[0]


def masked_forward(net, inputs, weights, *, divide=None):
    """The published arithmetic, segment by segment: compute everything, multiply by the mask, divide by all segments.

    ``divide``: how many segments to divide a sample by, given the weights ``[S, M]`` of it.
    """
    learned, count = net.main_net.lf_weights, len(net.modalities)
    fusion = [1 / count] * count if learned is None else [*learned, 1 - learned.sum()]
    videos = []
    for sample, mask in enumerate(weights.to(inputs[net.modalities[0]].dtype)):
        total = 0
        for segment in range(len(mask)):
            for column, name in enumerate(net.modalities):
                run = sound_network if name == "sound" else video_network
                logits = run(net.main_net.nets[column], inputs[name][sample, segment])
                total = total + fusion[column] * mask[segment, column] * logits
        videos.append(total / (len(mask) if divide is None else divide(mask)))
    return torch.stack(videos)


def policy_logits(policy, inputs):
    """What the policy must give, ``[N, S, M, 2]``: video by video, segment by segment, with torch's LSTM cell."""
    names, size = policy.modalities, (policy.size, policy.size)
    videos = []
    for sample in range(len(inputs[names[0]])):
        logits, state, segments = torch.zeros(1, 2 * len(names)), None, []
        for segment in range(inputs[names[0]].shape[1]):
            features = []
            for name, net in zip(names, policy.joint_net.nets):
                frames = inputs[name][sample, segment]
                if name != "sound":
                    frames = F.interpolate(frames, size, mode="bilinear", align_corners=False)[::2]
                x = net.conv(mobile_features(net.features, frames)).mean((2, 3))
                features.append(x)
            features = policy.joint_net.joint(torch.cat(features, 1))
            state = policy.lstm(torch.cat([features, logits], 1), state)
            logits = torch.cat([fc(state[0]) for fc in policy.fcs], 1)
            segments.append(logits.view(len(names), 2))
        videos.append(torch.stack(segments))
    return torch.stack(videos)


def network_shapes(section, channels):
    """Name to shape of one network."""
    return official_keys.official_shapes(section, "adamml", channels)


def official_shapes(modalities):
    """Name to shape of a trained network for 31 classes, the policy of which looks at rgbdiff in place of flow."""
    count, shapes = len(modalities), {}
    for column, name in enumerate(modalities):
        looked_at = "rgbdiff" if name == "flow" else name
        nets = {
            f"policy_net.joint_net.nets.{column}": network_shapes("policy network", CHANNELS[looked_at]),
            f"main_net.nets.{column}": network_shapes(
                "sound network" if name == "sound" else "residual network", CHANNELS[name]
            ),
        }
        for prefix, own in nets.items():
            shapes |= {f"{prefix}.{key}": shape for key, shape in own.items()}
        shapes |= {f"policy_net.fcs.{column}.weight": (2, 256), f"policy_net.fcs.{column}.bias": (2,)}
    return shapes | {
        "policy_net.joint_net.joint.0.weight": (2048, 1280 * count),
        "policy_net.joint_net.joint.0.bias": (2048,),
        "policy_net.joint_net.joint.2.weight": (2048, 2048),
        "policy_net.joint_net.joint.2.bias": (2048,),
        "policy_net.lstm.weight_ih": (1024, 2048 + 2 * count),
        "policy_net.lstm.weight_hh": (1024, 256),
        "policy_net.lstm.bias_ih": (1024,),
        "policy_net.lstm.bias_hh": (1024,),
        "main_net.lf_weights": (count - 1,),
    }


def official_state(shapes):
    """Random values under these names; positive, so that they serve as variances too."""
    return {
        name: torch.tensor(7) if name.endswith("num_batches_tracked") else torch.rand(shape) * 0.1 + 0.01
        for name, shape in shapes.items()
    }
