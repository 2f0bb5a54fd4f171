"""The bench of networks of parts: AdaShare, AR-Net and AdaMML at published decision rates, and a tree of trunks.

The dense network computes every part for every row, as published code does before it multiplies by a mask; for feature
sharing it is one network per task.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from dynexec.models import create_model, published_policy
from dynexec.models.arnet_policy import rule
from dynexec.nn.routed import RoutedNetwork
from dynexec.report.nets import draw_batch_norm, make_images

#: Decisions that a timed call goes through.
DRAWS = 2


def _mean(network, decisions):
    return decisions.double().mean().item()


def _first_example(network, inputs):
    return network.example_decisions(inputs)[0]


def _obey(policy, decisions):
    own = policy.decide

    def decide(inputs):
        own(inputs)
        return decisions

    return decide


@dataclass(frozen=True)
class System:
    """A routed network of the bench.

    Attributes
    ----------
    build : callable
        Returns the network, with fresh weights.
    inputs : callable
        ``inputs(batch)``.
    draw : callable
        ``draw(network, inputs, generator)``: :data:`DRAWS` decisions that together are at the published rates.
    weights : callable
        ``weights(decisions)``: the equivalent soft decisions; None if there are none.
    size : int
        Height and width of its images.
    batches : tuple of int
        Batch sizes measured unless others are asked for.
    policy : bool
        Whether masked execution runs the policy besides everything else; AR-Net's is one of the predictors.
    kept : callable
        ``kept(network, decisions)``: the share of all (row, part) pairs that is computed.
    whole : type, optional
        ``whole(network)(inputs, weights)``: masked execution as one module for a library, if the parts would cut a
        network into pieces. ``whole(network, decisions)(inputs)``: one for these decisions alone.
    masked : callable
        ``masked(network, inputs, decisions)``: what published code computes, which is everything.
    other : callable
        ``other(network, inputs)``: decisions that give another output.
    obey : callable
        ``obey(policy, decisions)`` returns a replacement for ``policy.decide`` that computes the same and returns the
        given decisions.
    """

    build: Callable[[], RoutedNetwork]
    inputs: Callable
    draw: Callable
    weights: Callable
    size: int
    batches: tuple[int, ...] = (1,)
    policy: bool = True
    kept: Callable = _mean
    whole: type | None = None
    masked: Callable | None = None
    other: Callable = _first_example
    obey: Callable = _obey

    def run_masked(self, network, inputs, decisions):
        """Compute what published code computes."""
        if self.masked is not None:
            return self.masked(network, inputs, decisions)
        return network(inputs, None, soft_decisions=self.weights(decisions))


def _adashare(name, policy, tasks):
    return System(
        lambda: create_model(name, num_classes=tasks),
        lambda batch: make_images(batch, 224),
        lambda network, inputs, generator: [published_policy(policy)],
        lambda decisions: decisions.float(),
        224,
        policy=False,
        whole=WholeAdaShare,
    )


class WholeAdaShare(nn.Module):
    """AdaShare's masked execution, or for given ``decisions`` what each task needs, as one module to export."""

    def __init__(self, network, decisions=None):
        super().__init__()
        self.network = deepcopy(network)
        self.decisions = None if decisions is None else decisions.tolist()

    def forward(self, images, weights=None):
        heads, backbone = self.network.heads, self.network.backbone
        if self.decisions is None:
            return [head(backbone.run_soft(images, weights[task])) for task, head in enumerate(heads)]
        return [head(self._run(images, row)) for head, row in zip(heads, self.decisions, strict=True)]

    def _run(self, images, row):
        x = self.network.backbone.stem(images)
        for (block, shortcut), runs in zip(self.network.backbone.chain(), row, strict=True):
            s = x if shortcut is None else shortcut(x)
            if runs:
                x = block(x) if shortcut is None else torch.relu(block(x) + s)
            else:
                x = s
        return x


def _predicted(network, decisions):
    actions, _ = rule(decisions.cpu(), network.policy.spans)
    return (actions < network.policy.num_predictions).double().mean().item() / network.policy.num_predictions


def _obey_on_frames(policy, decisions):
    """:func:`_obey` for AR-Net, whose skips hold the state that lite predictions are made from."""
    skipped = rule(decisions.cpu(), policy.spans)[1]

    def decide(frames):
        hidden = policy.hidden_states(frames, torch.ones_like(skipped), skipped)
        policy.linear(hidden.flatten(0, 1))
        return decisions, hidden

    return decide


# Of AR-Net's actions: about what gives the published cost per frame, below, by the authors' accounting.
_SHARES = torch.tensor([0.58, 0.10, 0.05, 0.05, 0.08, 0.07, 0.07])
#: GFLOPs per frame on ActivityNet (table 3 of the paper).
ARNET_COSTS = {"arnet_resnet": 2.09, "arnet_efficientnet": 0.96}


def draw_actions(network, inputs, generator, cost):
    """Draw many random decisions of AR-Net and return the :data:`DRAWS` that are nearest to a cost per frame."""
    shape, flops = inputs.shape[:2], network.count_flops(inputs)
    pool = [torch.multinomial(_SHARES, shape.numel(), True, generator=generator).view(shape) for _ in range(200)]
    return sorted(pool, key=lambda decisions: abs(flops.published(decisions) - cost))[:DRAWS]


def _arnet(name, cost):
    return System(
        lambda: create_model(name),
        lambda batch: make_images(16 * batch, 224).unflatten(0, (batch, 16)),
        partial(draw_actions, cost=cost),
        lambda decisions: F.one_hot(decisions, len(_SHARES)).float(),
        224,
        policy=False,
        kept=_predicted,
        obey=_obey_on_frames,
    )


def draw_modalities(network, inputs, generator, names, shares):
    """Draw decisions of AdaMML that select each modality, named in order, in its share of all segments."""
    samples, segments = inputs[names[0]].shape[:2]
    total = DRAWS * samples * segments
    columns = [torch.randperm(total, generator=generator) < round(share * total) for share in shares]
    return list(torch.stack(columns, -1).view(DRAWS, samples, segments, len(names)))


def _adamml(modalities, shares, **options):
    channels = {"rgb": 3, "rgbdiff": 15, "flow": 10}

    def inputs(batch):
        names = [*modalities, *(["rgbdiff"] if "flow" in modalities else [])]
        found = {}
        for number, name in enumerate(names):
            frames, depth, size = (1, 1, 256) if name == "sound" else (8, channels[name], 224)
            images = make_images(batch * 10 * frames, size, seed=number, channels=depth)
            found[name] = images.unflatten(0, (batch, 10, frames))
        return found

    return System(
        lambda: create_model("adamml", modalities=modalities, **options),
        inputs,
        partial(draw_modalities, names=modalities, shares=shares),
        lambda decisions: decisions.float(),
        224,
    )


# A tree for eight tasks: nobody published one as a checkpoint.
_TREE = [[list(range(8))]] * 9 + [[[0, 1, 2, 3], [4, 5, 6, 7]]] * 3 + [[[0, 1], [2, 3], [4, 5], [6, 7]]] * 3


def _task_by_task(network, inputs, decisions):
    """Compute what separate networks compute, each task by itself; unwanted tasks give zeros."""
    rows = torch.eye(len(decisions), dtype=torch.bool, device=decisions.device)
    return [network(inputs, row)[task] * decisions[task] for task, row in enumerate(rows)]


_FEATURE_SHARING = System(
    lambda: create_model("feature_sharing_vgg16", num_classes=[2] * 8, tree=_TREE, width=64),
    lambda batch: make_images(batch, 224),
    lambda network, inputs, generator: [torch.ones(8, dtype=torch.bool)],
    None,
    224,
    policy=False,
    kept=lambda network, decisions: sum(map(len, _TREE)) / (8 * len(_TREE)),
    masked=_task_by_task,
    other=lambda network, inputs: torch.arange(8) > 0,
)

#: Name to system. Rates: AdaShare's published policies; AdaMML's usage of RGB, flow and sound on Kinetics-Sounds.
SYSTEMS = {
    "adashare_cityscapes": _adashare("adashare_resnet34", "cityscapes_2_tasks_resnet34", [19, 1]),
    "adashare_nyu_v2": _adashare("adashare_resnet34", "nyu_v2_3_tasks_resnet34", [40, 3, 1]),
    **{name: _arnet(name, cost) for name, cost in ARNET_COSTS.items()},
    "adamml_rgb_flow_sound": _adamml(("rgb", "flow", "sound"), (0.5506, 0.2682, 0.9512)),
    "adamml_rgb_sound": _adamml(("rgb", "sound"), (0.5506, 0.9512)),
    "feature_sharing_8_tasks": _FEATURE_SHARING,
}


def build_system(system):
    """Build a system of the bench in evaluation mode, the same every time; see :func:`dynexec.report.nets.build`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, inputs = system.build(), system.inputs(2)  # of one, maps of one pixel have no statistics

        def run():
            system.run_masked(network, inputs, network.example_decisions(inputs)[0])
            if system.policy:
                network.policy.decide(inputs)

        draw_batch_norm(network, run)
    return network.eval().requires_grad_(False)
