"""AR-Net: a resolution and a backbone, or a skip, per video frame (Meng et al., ECCV 2020, section 3)."""

import re

import torch
import torch.nn.functional as F
from torch import nn

from dynexec.models.arguments import check_counts
from dynexec.models.arnet_flops import count_arnet
from dynexec.models.arnet_policy import ARNetPolicy, check_decisions, check_frames, resize, rule, ruling_frames
from dynexec.models.checkpoints import Checkpoint, check_mapping, rename, shorten, without_prefix
from dynexec.models.efficientnet import EfficientNet
from dynexec.models.mobilenet import NUM_FEATURES, MobileNetV2
from dynexec.models.resnet import ResNet
from dynexec.nn import RoutedNetwork
from dynexec.nn.residual import with_zero_gradients
from dynexec.ops import check_dtype, check_floating


class ARNet(RoutedNetwork):
    """A video network that chooses per frame: one of K backbones, the policy's lite prediction, or to skip frames.

    ``net(frames)`` follows the policy (the likeliest action, no noise); ``net(frames, decisions)`` replays int64
    ``[N, T]``: 0 to K - 1 for a backbone, K for lite, K + 1 and up for ``skips``. A skip of k leaves out its frame and
    the next k - 1, whose own entries are ignored. ``return_decisions=True`` also returns the actions that took effect,
    with a skip repeated for the frames that it ignores, or the weights that did.

    The output is the sum of the chosen predictions divided by the number of frames that have one, or zero if none has.

    ``soft_decisions`` are float weights ``[N, T, A]``: everything is computed, and the output is the weighted sum of
    predictions divided by the sum of their weights or by 1, whichever is greater. A skip that weighs more than 0.5
    begins; in the frames that it ignores, the weights of its first frame are repeated.

    Parameters
    ----------
    backbones : sequence of nn.Module
        Map images ``[rows, 3, H, W]`` to features ``[rows, num_features]``, with an attribute ``num_features``.
    policy : ARNetPolicy
    num_classes, num_frames : int
    resolutions : sequence of int
        Image sizes: one per backbone, and the policy's. Frames are given at the first.
    dropout : float
        Applied to the features, in training.
    """

    def __init__(self, backbones, policy, num_classes, num_frames, resolutions, dropout):
        super().__init__()
        check_counts(num_classes=num_classes, num_frames=num_frames, resolutions=tuple(resolutions))
        self.base_model_list = nn.ModuleList(backbones)
        self.new_fc_list = nn.ModuleList(nn.Linear(model.num_features, num_classes) for model in backbones)
        self.policy = policy
        self.num_classes, self.num_frames, self.resolutions = num_classes, num_frames, tuple(resolutions)
        self.dropout = dropout
        for linear in (*self.new_fc_list, policy.linear, policy.lite_fc):  # as published
            nn.init.normal_(linear.weight, 0.0, 0.001)
            nn.init.zeros_(linear.bias)

    def forward(self, frames, decisions=None, *, return_decisions=False, soft_decisions=None):
        """Compute logits ``[N, classes]`` of frames ``[N, T, 3, H, W]``.

        Parameters
        ----------
        frames : float tensor ``[N, T, 3, H, W]``
            H and W are the first of ``resolutions``.
        decisions : int64 tensor ``[N, T]``, optional
            If neither these nor soft decisions are given, the policy decides.
        return_decisions : bool
            Also return the decisions, or weights, that took effect.
        soft_decisions : float tensor ``[N, T, A]``, optional
            In place of decisions: the weight of each action.

        Returns
        -------
        float tensor ``[N, classes]``, or ``(output, decisions)``

        Raises
        ------
        TypeError, ValueError
            If an argument is invalid, or both kinds of decisions are given.
        """
        self.check_inputs(frames)
        if soft_decisions is not None:
            if decisions is not None:
                raise ValueError("decisions and soft_decisions were both given: expected at most one of them")
            logits, taken = self._weigh(frames, soft_decisions)
        else:
            hidden = None
            if decisions is None:
                decisions, hidden = self.policy.decide(frames)
            decisions = check_decisions(decisions, frames.shape[:2], self.policy.num_actions)
            logits, taken = self._route(frames, decisions, hidden)
        return (logits, taken.to(frames.device)) if return_decisions else logits

    def _route(self, frames, decisions, hidden):
        """Compute what ``decisions``, on the CPU, choose; ``hidden`` are the policy's hidden states, or None."""
        actions, skipped = rule(decisions, self.policy.spans)
        lite = actions == len(self.base_model_list)
        images, rows, outputs, idle = frames.flatten(0, 1), [], [], nn.ModuleList()
        for number in range(len(self.base_model_list)):
            chosen = (actions == number).flatten().nonzero().flatten()
            if len(chosen):
                rows.append(chosen)
                outputs.append(self._predict(number, images[chosen.to(images.device)]))
            else:
                idle.extend([self.base_model_list[number], self.new_fc_list[number]])
        if not lite.any():
            idle.extend(part for name, part in self.policy.named_children() if name != "linear")  # which only decides
        else:
            if hidden is None:
                needed = lite.flip(1).cumsum(1).flip(1) > 0  # up to the video's last lite frame
                hidden = self.policy.hidden_states(frames, needed & ~skipped if self.policy.cheap else needed, skipped)
            rows.append(lite.flatten().nonzero().flatten())
            outputs.append(self.policy.lite_fc(hidden.flatten(0, 1)[rows[-1].to(hidden.device)]))
        if not outputs:
            return with_zero_gradients(frames.new_zeros(len(frames), self.num_classes), idle), actions
        outputs, rows = torch.cat(outputs), torch.cat(rows).to(frames.device)
        used = (actions < self.policy.num_predictions).sum(1, keepdim=True).clamp(min=1).to(frames.device)
        # Each frame to its own row first: sums do not depend on the order of rows, unlike those of index_add.
        logits = outputs.new_zeros(actions.numel(), self.num_classes).index_copy(0, rows, outputs)
        logits = logits.unflatten(0, actions.shape).sum(1) / used
        return with_zero_gradients(logits, idle) if idle else logits, actions

    def _weigh(self, frames, weights):
        """Run the masked network; see ``soft_decisions``."""
        policy, shape = self.policy, (*frames.shape[:2], self.policy.num_actions)
        check_floating(weights, "soft_decisions", shape)
        if weights.shape != shape:
            raise ValueError(f"soft_decisions must have shape {shape}, got {tuple(weights.shape)}")
        start = ruling_frames(policy.spans_of(weights).cpu())
        skipped = start != torch.arange(shape[1])
        start = start[..., None].to(weights.device)
        weights = weights.gather(1, start.expand(shape))
        if policy.cheap:  # a frame that is not seen has the state of the one where the skip began
            hidden = policy.hidden_states(frames, ~skipped, skipped)
            hidden = hidden.gather(1, start.expand(hidden.shape))
        else:
            hidden = policy.hidden_states(frames, torch.ones_like(skipped), skipped)
        images = frames.flatten(0, 1)
        outputs = [self._predict(number, images) for number in range(len(self.base_model_list))]
        outputs.append(policy.lite_fc(hidden.flatten(0, 1)))
        outputs = torch.stack(outputs, 1).unflatten(0, shape[:2])
        used = weights[..., : policy.num_predictions].to(outputs.dtype)
        return (outputs * used[..., None]).sum((1, 2)) / used.sum((1, 2)).clamp(min=1)[:, None], weights

    def _predict(self, number, images):
        """Compute the logits ``[rows, classes]`` of one backbone for images of the first resolution."""
        features = self.base_model_list[number](resize(images, self.resolutions[number]))
        return self.new_fc_list[number](F.dropout(features, self.dropout, self.training))

    def part_names(self):
        """Return the names of the backbones, their heads, and the policy's features and head."""
        numbers = range(len(self.base_model_list))
        heads = [f"{name}.{number}" for name in ("base_model_list", "new_fc_list") for number in numbers]
        return [*heads, "policy.lite_backbone", "policy.lite_fc"]

    def example_decisions(self, inputs):
        """Return all predictions in turn, until each had a frame; then all actions, in two orders."""
        shape, policy = inputs.shape[:2], self.policy
        numbers = torch.arange(shape.numel()).view(shape)
        turns = [
            (numbers + shift) % policy.num_predictions for shift in range(0, policy.num_predictions, numbers.numel())
        ]
        every = (numbers + numbers // shape[1]) % policy.num_actions
        return [decisions.to(inputs.device) for decisions in (*turns, every, every.flip(1))]

    def run_dense(self, inputs):
        """Compute every prediction of every frame; only the first backbone's have a weight."""
        weights = inputs.new_zeros(*inputs.shape[:2], self.policy.num_actions)
        weights[..., 0] = 1.0
        return self(inputs, soft_decisions=weights)

    def check_inputs(self, inputs):
        """Raise unless ``inputs`` are frames ``[N, T, 3, H, W]`` with N at least 1 and all else as constructed."""
        self._check_shape(inputs)
        check_dtype(inputs, "frames", self.policy.rnn.weight_ih.dtype)

    def count_flops(self, inputs):
        """Count the FLOPs of one video of ``inputs``, of which only the shape matters: :class:`ARNetFlops`."""
        self._check_shape(inputs)
        return count_arnet(self)

    def _check_shape(self, frames):
        check_frames(frames, ("N", self.num_frames, 3, self.resolutions[0], self.resolutions[0]))

    def read_official(self, checkpoint, given):
        """Read the :class:`Checkpoint` in a mapping of any published layout; see :func:`dynexec.models.load_official`.

        ``state_dict`` or parameters by name, either of the whole network or of a single-resolution network
        (``base_model.*, new_fc.*``), as its parts are trained first. The latter is loaded into the backbone that it
        matches; a MobileNetV2 becomes the policy's, without its head. MobileNetV2's blocks may have nested
        (``conv.0.0``) or flat (``conv.0``) names.
        """
        state, entry, info = checkpoint, given, {}
        if "state_dict" in checkpoint:
            state, entry = checkpoint["state_dict"], f"{given}['state_dict']"
            info = {key: value for key, value in checkpoint.items() if key != "state_dict"}
        check_mapping(state, "network", entry, given)
        state = without_prefix(state)
        if any(key.startswith("base_model.") for key in state):
            return self._read_one_resolution(state, given, info)
        if not any(key.startswith("base_model_list.") for key in state):
            raise ValueError(
                f"{entry} has the entries {shorten(map(repr, state))}: expected 'state_dict', or parameters with names "
                "such as 'base_model_list.0.conv1.weight' (whole) or 'base_model.conv1.weight' (of one resolution)"
            )
        own = ("base_model_list.", "new_fc_list.")
        renamed = {key if key.startswith(own) else f"policy.{key}": value for key, value in state.items()}
        return Checkpoint({"network": (self, _nest_blocks(renamed, "policy.lite_backbone."))}, info=info)

    def _read_one_resolution(self, state, given, info):
        body = {key.removeprefix("base_model."): value for key, value in state.items() if key.startswith("base_model.")}
        rest = {key: value for key, value in state.items() if not key.startswith("base_model.")}
        parts = [f"backbone {number}" for number in range(len(self.base_model_list))]
        if any(key.startswith("features.") for key in body):
            lite = {"policy.lite_backbone": (self.policy.lite_backbone, _nest_blocks(body, ""))}
            return Checkpoint(lite, (*parts, "rest of the policy"), list(rest), info)
        misfits = [len(_shapes(model.state_dict()) ^ _shapes(body)) for model in self.base_model_list]
        best = min(misfits)
        if best == 0 and misfits.count(0) > 1:
            fits = [str(number) for number, misfit in enumerate(misfits) if misfit == 0]
            raise ValueError(
                f"{given} fits the backbones {', '.join(fits)}: load it into the one that it is for, as "
                "net.base_model_list[number].load_state_dict(...)"
            )
        number = misfits.index(best)
        head = {key.removeprefix("new_fc."): value for key, value in rest.items()}
        found = {parts[number]: (self.base_model_list[number], body), "its head": (self.new_fc_list[number], head)}
        return Checkpoint(found, (*parts[:number], *parts[number + 1 :], "policy"), info=info)


def _shapes(state):
    """Return names and shapes of a state for comparison, without batch counters, which may be missing."""
    shapes = {key: getattr(value, "shape", None) for key, value in state.items()}
    return {item for item in shapes.items() if not item[0].endswith("num_batches_tracked")}


def _nest_blocks(state, prefix):
    """Return the state with MobileNetV2's flat blocks (``conv.4``) renamed to nested ones (``conv.1.1``)."""
    if not any(key.startswith(f"{prefix}features.1.conv.4.") for key in state):
        return state

    def nested(key):
        if (match := re.fullmatch(rf"({re.escape(prefix)}features\.(\d+)\.conv)\.(\d+)\.(.*)", key)) is None:
            return key
        block, number, layer, name = match.groups()
        group, place = divmod(int(layer), 3)  # convolution, BatchNorm, ReLU6
        last = 1 if number == "1" else 2  # the projection, which is not nested
        return f"{block}.{last + place}.{name}" if group == last else f"{block}.{group}.{place}.{name}"

    return rename(state, nested)


def build_arnet(
    backbones=(50, 34, 18),
    *,
    num_classes=200,
    num_frames=16,
    resolutions=(224, 168, 112, 84),
    skips=(1, 2, 4),
    policy_mode="exact",
    lite_backbone=None,
    hidden=512,
    dropout=0.5,
):
    """Build an AR-Net with any backbones.

    Parameters
    ----------
    backbones : sequence of int, str or nn.Module
        Depth of a ResNet, variant of an EfficientNet ("b0"), or a module that returns features, with ``num_features``.
    num_classes, num_frames : int
    resolutions : sequence of int
        One per backbone, and the policy's. Frames are given at the first.
    skips : sequence of int
        Number of frames that each skip leaves out, its own included.
    policy_mode : {"exact", "cheap"}
        Whether the policy sees the frames that a running skip ignores: see :class:`ARNetPolicy`.
    lite_backbone : nn.Module, optional
        Computes the policy's features, with ``num_features``; default a MobileNetV2.
    hidden : int
        Size of the LSTM's state.
    dropout : float
        Applied to all features, in training.

    Returns
    -------
    ARNet
        Untrained.

    Raises
    ------
    ValueError
        If ``resolutions``, ``skips``, ``policy_mode`` or a number is invalid.
    """
    resolutions, skips = tuple(resolutions), tuple(skips)
    if len(resolutions) != len(backbones) + 1:
        raise ValueError(
            f"resolutions must be one per backbone and the policy's, {len(backbones) + 1} sizes, got {resolutions}"
        )
    if policy_mode not in ("exact", "cheap"):
        raise ValueError(f"policy_mode must be 'exact' or 'cheap', got {policy_mode!r}")
    policy = ARNetPolicy(
        MobileNetV2() if lite_backbone is None else lite_backbone,
        NUM_FEATURES if lite_backbone is None else lite_backbone.num_features,
        num_backbones=len(backbones),
        num_classes=num_classes,
        resolution=resolutions[-1],
        skips=skips,
        hidden=hidden,
        dropout=dropout,
        cheap=policy_mode == "cheap",
    )
    return ARNet([_backbone(which) for which in backbones], policy, num_classes, num_frames, resolutions, dropout)


def _backbone(which):
    if isinstance(which, nn.Module):
        return which
    return EfficientNet(which) if isinstance(which, str) else ResNet(which)


#: The published networks: name to arguments of :func:`build_arnet`.
PUBLISHED = {
    "arnet_resnet": dict(backbones=(50, 34, 18)),
    "arnet_efficientnet": dict(backbones=("b3", "b1", "b0")),
}
