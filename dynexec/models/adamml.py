"""AdaMML: videos whose segments are seen only in the modalities that help (Panda et al., ICCV 2021, section 3)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dynexec import ops
from dynexec.measure.flops import FlopCount, count_call
from dynexec.models.adamml_checkpoints import read_checkpoint
from dynexec.models.adamml_policy import CHANNELS, AdaMMLPolicy, check_clips, pool_frames
from dynexec.models.arguments import check_counts
from dynexec.models.mobilenet import MobileNetV2
from dynexec.models.resnet import ResNet
from dynexec.nn import RoutedNetwork
from dynexec.nn.residual import with_zero_gradients
from dynexec.route import Route

FRAMES = (1, 2, 4, 8)  # the policy halves them once by leaving some out, and pools twice


class VideoResNet(ResNet):
    """A residual network that pools the frames of a clip before each of its last three stages, until one is left.

    Maps clips ``[rows, frames, C, H, W]`` to ``[rows, classes]``; arguments as in :class:`ResNet`.
    """

    def __init__(self, depth, frames, *, in_channels, num_classes, dropout):
        super().__init__(depth, in_channels=in_channels, num_classes=num_classes)
        self.frames = frames
        self.dropout = nn.Dropout(dropout)

    def forward(self, clips):
        x, frames = self.layer1(self.stem(clips.flatten(0, 1))), self.frames
        for layer in (self.layer2, self.layer3, self.layer4):
            if frames > 1:
                x, frames = pool_frames(x, frames), frames // 2
            x = layer(x)
        return self.fc(self.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1)))


class SoundNet(MobileNetV2):
    """MobileNetV2 for log-spectrograms: clips ``[rows, 1, 1, H, W]`` to ``[rows, classes]``."""

    def forward(self, clips):
        return super().forward(clips.flatten(0, 1))


class LateFusion(nn.Module):
    """One network per modality, ``nets``, and the weights of their logits: ``lf_weights``, and what remains to 1.

    Without learnable weights all weigh the same.
    """

    def __init__(self, nets, learnable):
        super().__init__()
        self.nets = nn.ModuleList(nets)
        initial = torch.full((len(nets) - 1,), 1 / len(nets))
        self.lf_weights = nn.Parameter(initial) if learnable else None

    def weights(self, like):
        """Return the weights ``[M]``; if they are not learnable, with the dtype and device of the tensor ``like``."""
        if self.lf_weights is None:
            return like.new_full((len(self.nets),), 1 / len(self.nets))
        return torch.cat([self.lf_weights, 1 - self.lf_weights.sum(0, keepdim=True)])


@dataclass(frozen=True)
class ModalityFlops(FlopCount):
    """FLOPs of one video. A multiply-add counts as two; only convolutions and matrix products count.

    Attributes
    ----------
    segments : int
        S.
    main : tuple of int
        Each modality's network, per segment.
    glance : tuple of int
        Each of the policy's networks, per segment.
    head : int
        The rest of the policy, per video: joint layers, LSTM, decision layers.
    """

    segments: int
    main: tuple[int, ...]
    glance: tuple[int, ...]
    head: int

    @property
    def dense(self):
        """All modalities of all segments, without a policy."""
        return self.segments * sum(self.main)

    @property
    def policy(self):
        """The policy, which looks at all modalities of all segments."""
        return self.segments * sum(self.glance) + self.head

    def of(self, decisions):
        """Count the FLOPs that each video needs under ``decisions``, policy included.

        Parameters
        ----------
        decisions : bool tensor ``[N, S, M]`` or ``[S, M]``

        Returns
        -------
        float64 tensor ``[N]`` or scalar
        """
        shape = f"[N, {self.segments}, {len(self.main)}]"
        ops.check_bool(decisions, "decisions", shape)
        if decisions.shape[-2:] != (self.segments, len(self.main)):
            raise ValueError(f"decisions must be bool {shape}, got shape {tuple(decisions.shape)}")
        main = torch.tensor(self.main, dtype=torch.float64, device=decisions.device)
        return self.policy + (decisions * main).sum((-2, -1))


class AdaMML(RoutedNetwork):
    """A network that classifies videos from segments, each in the modalities that decisions select.

    ``net(inputs)`` follows the policy, ``net(inputs, decisions)`` replays bool ``[N, S, M]``, with columns in the order
    of ``modalities``. The logits are the weighted sum over the selected modalities, summed over segments and divided by
    S, however many are selected: a video of which nothing is selected has logits of exactly zero. They are in the
    dtype of the parameters, also under autocast.

    ``inputs`` is a dict: ``[N, S, F, C, H, W]`` for each visual modality, with 3 channels for "rgb", 10 for "flow" and
    15 for "rgbdiff", and ``[N, S, 1, 1, H, W]`` for "sound". Sizes may differ between modalities, S between calls.

    Parameters
    ----------
    modalities : sequence of str
        M different ones of "rgb", "sound", "flow" and "rgbdiff", but not the last two together.
    num_classes : int
    num_segments : int
        S, as published for evaluation (training: 5). For information only: calls may have another S.
    num_frames : {1, 2, 4, 8}
        F, per segment.
    depth : {18, 34, 50, 101}
        Depth of the residual networks.
    learnable_weights : bool
        Learn the weight of each modality's logits, as published; otherwise their mean is taken.
    flow_policy : {"rgbdiff", "flow"}
        What the policy looks at in place of flow. Differences of frames are almost free to compute; ``inputs`` must
        then contain them, too.
    policy_size : int
        Height and width of the frames that the policy looks at.
    dropout : float
        Before the classifiers, in training.
    """

    def __init__(
        self,
        modalities=("rgb", "sound"),
        num_classes=31,
        num_segments=10,
        num_frames=8,
        depth=50,
        *,
        learnable_weights=True,
        flow_policy="rgbdiff",
        policy_size=160,
        dropout=0.5,
    ):
        super().__init__()
        self.modalities = _check_modalities(modalities)
        if num_frames not in FRAMES:
            raise ValueError(f"num_frames must be one of {FRAMES}, so that pooling leaves one, got {num_frames!r}")
        check_counts(num_classes=num_classes, num_segments=num_segments, policy_size=policy_size)
        if flow_policy not in ("rgbdiff", "flow"):
            raise ValueError(f"flow_policy must be 'rgbdiff' or 'flow', got {flow_policy!r}")
        self.num_classes, self.num_segments, self.num_frames = num_classes, num_segments, num_frames
        nets = [
            SoundNet(in_channels=CHANNELS[name], num_classes=num_classes, dropout=dropout)
            if name == "sound"
            else VideoResNet(depth, num_frames, in_channels=CHANNELS[name], num_classes=num_classes, dropout=dropout)
            for name in self.modalities
        ]
        self.main_net = LateFusion(nets, learnable_weights)
        looked_at = [flow_policy if name == "flow" else name for name in self.modalities]
        self.policy = AdaMMLPolicy(looked_at, num_frames, policy_size)

    def forward(self, inputs, decisions=None, *, return_decisions=False, soft_decisions=None):
        """Compute the logits of the videos.

        Parameters
        ----------
        inputs : dict
            See the class.
        decisions : bool tensor ``[N, S, M]``, optional
            Which segments to look at in which modality; only these are computed. None: the policy decides,
            deterministically, see :meth:`AdaMMLPolicy.decide`.
        return_decisions : bool
            Also return the decisions, or the given soft decisions.
        soft_decisions : float tensor ``[N, S, M]``, optional
            In place of decisions: everything is computed, and weighted. Gradients reach them.

        Returns
        -------
        float tensor ``[N, classes]``, or ``(output, decisions)``

        Raises
        ------
        TypeError, ValueError
            If an argument is invalid, or both kinds of decisions are given.
        """
        self.check_inputs(inputs)
        if soft_decisions is not None:
            if decisions is not None:
                raise ValueError("decisions and soft_decisions are both given: expected one of them")
            self._check_decisions("soft_decisions", soft_decisions, inputs)
            output, decisions = self._weigh(inputs, soft_decisions), soft_decisions
        else:
            if decisions is None:
                with torch.no_grad():
                    decisions = self.policy.decide(inputs)
            self._check_decisions("decisions", decisions, inputs)
            output = self._replay(inputs, decisions)
        return (output, decisions) if return_decisions else output

    def _replay(self, inputs, decisions):
        samples, segments = decisions.shape[:2]
        route = Route.from_decisions(decisions.flatten(0, 1))
        weights = self.main_net.weights(self.policy.lstm.weight_ih)
        # In their dtype, which is that of the parameters: autocast computes logits in a narrower one.
        total, idle = weights.new_zeros(samples * segments, self.num_classes), nn.ModuleList()
        for column, (name, net) in enumerate(zip(self.modalities, self.main_net.nets)):
            rows, clips = route.group(column), inputs[name].flatten(0, 1)
            if len(rows) == 0:
                idle.append(net)
                continue
            if len(rows) < len(clips):
                clips = ops.gather_rows(clips, rows)
            logits = weights[column] * net(clips)
            total = total.index_add(0, rows, logits.to(total.dtype))
        if idle:
            total = with_zero_gradients(total, idle if len(idle) < len(self.modalities) else self.main_net)
        return total.unflatten(0, (samples, segments)).mean(1)

    def _weigh(self, inputs, soft_decisions):
        samples, segments = soft_decisions.shape[:2]
        logits = [net(inputs[name].flatten(0, 1)) for name, net in zip(self.modalities, self.main_net.nets)]
        weights = self.main_net.weights(self.policy.lstm.weight_ih)
        weights = soft_decisions.flatten(0, 1).to(weights.dtype) * weights
        total = (torch.stack(logits, 1) * weights[..., None]).sum(1)
        return total.unflatten(0, (samples, segments)).mean(1)

    def part_names(self):
        """Return the names of each modality's network, and of the network by which the policy looks at it."""
        columns = range(len(self.modalities))
        return [f"{nets}.{column}" for nets in ("main_net.nets", "policy.joint_net.nets") for column in columns]

    def example_decisions(self, inputs):
        """Return decisions that select everything, those of the policy, and two patterns that select a part."""
        decided = self.policy.decide(inputs)  # runs the policy's networks, which decisions do not
        number = torch.arange(decided.numel(), device=decided.device).view(decided.shape)
        return [torch.ones_like(decided), decided, number % 3 == 0, number % 5 > 1]

    def run_dense(self, inputs):
        """Compute all modalities of all segments."""
        first = inputs[self.modalities[0]]
        return self(inputs, soft_decisions=first.new_ones(*first.shape[:2], len(self.modalities)))

    def check_inputs(self, inputs):
        """Raise TypeError or ValueError unless ``inputs`` contains what the class describes, and nothing else."""
        expected = [*self.modalities, *(name for name in self.policy.modalities if name not in self.modalities)]
        check_clips(inputs, expected, self.num_frames, self.policy.lstm.weight_ih.dtype)
        if unknown := [name for name in inputs if name not in expected]:
            raise ValueError(f"inputs must hold {', '.join(expected)}; this network does not take {unknown[0]!r}")

    def _check_decisions(self, name, decisions, inputs):
        first = inputs[self.modalities[0]]
        shape = *first.shape[:2], len(self.modalities)
        check = ops.check_bool if name == "decisions" else ops.check_floating
        check(decisions, name, list(shape))
        if tuple(decisions.shape) != shape or decisions.device != first.device:
            raise ValueError(
                f"{name} must have shape {list(shape)} (samples, segments, {', '.join(self.modalities)}) on "
                f"{first.device} like the inputs, got {list(decisions.shape)} on {decisions.device}"
            )

    def count_flops(self, inputs):
        """Count the FLOPs of a video like ``inputs``, whose values are not read.

        Returns
        -------
        ModalityFlops
        """
        self.check_inputs(inputs)
        dtype, size = self.policy.lstm.weight_ih.dtype, self.policy.size
        main = [
            count_call(net, 1, *inputs[name].shape[2:], dtype=dtype)
            for name, net in zip(self.modalities, self.main_net.nets)
        ]
        glance = []
        for name, net in zip(self.policy.modalities, self.policy.joint_net.nets):
            frames, channels, *full = inputs[name].shape[2:]
            shape = (1, 1, 1, *full) if name == "sound" else (1, (frames + 1) // 2, channels, size, size)
            glance.append(count_call(net, *shape, dtype=dtype))
        segments = inputs[self.modalities[0]].shape[1]
        return ModalityFlops(segments, tuple(main), tuple(glance), self.policy.count_head(segments))

    def read_official(self, checkpoint, given):
        """Read the checkpoint in a mapping of any published layout; see :func:`dynexec.models.load_official`.

        Trained networks (``state_dict`` with the names ``policy_net.*`` and ``main_net.*``; one of them may be
        missing), and networks of one modality (``state_dict`` with the names of a residual network or MobileNetV2),
        which are recognised by their input channels. Or the ``state_dict`` alone.
        """
        return read_checkpoint(self, checkpoint, given)


def _check_modalities(modalities):
    """Return modalities as a tuple; ValueError unless they are known, different, and compatible."""
    modalities = tuple(modalities)
    unknown = [name for name in modalities if name not in CHANNELS]
    if not modalities or unknown or len(set(modalities)) < len(modalities):
        raise ValueError(f"modalities must be different ones of {', '.join(CHANNELS)}, got {modalities}")
    if "flow" in modalities and "rgbdiff" in modalities:
        raise ValueError("modalities hold both flow and rgbdiff: with flow, rgbdiff is what the policy looks at")
    return modalities
