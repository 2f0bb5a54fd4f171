"""Training of dynamic networks on tensors in memory: first dense, then the policy by curriculum, then both together.

The recipe of BlockDrop (Wu et al., CVPR 2018, section 3) for any :class:`dynexec.nn.DynamicNetwork`. Without labels,
the full network's predictions can be used in their place: the reward is then agreement with it.

Several processes can train one network, each on its own images, if backbone and policy are wrapped separately:
``DynamicNetwork(DistributedDataParallel(backbone), DistributedDataParallel(policy))``. Reported values are then the
mean over processes.
"""

from dataclasses import dataclass
from numbers import Real

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dynexec.measure import evaluation_mode
from dynexec.models.training_checkpoint import TrainingCheckpoint, check_same_settings, training_group
from dynexec.nn import DynamicNetwork
from dynexec.nn.residual import count_blocks
from dynexec.policy import (
    curriculum_loss,
    curriculum_mask,
    explore,
    finetuning_loss,
    force_untrained,
    sample,
    threshold,
    usage_reward,
)


@dataclass(frozen=True)
class Evaluation:
    """Result of :func:`evaluate`.

    Attributes
    ----------
    accuracy : float
        Share of right predictions.
    kept : float
        Mean number of blocks kept per image.
    decisions : bool tensor ``[N, L]``
        The decisions taken.
    """

    accuracy: float
    kept: float
    decisions: torch.Tensor


def evaluate(net, images, labels, decisions=None, *, batch_size=512):
    """Run a network in evaluation mode and count its right predictions.

    Parameters
    ----------
    net : DynamicNetwork
    images : float tensor ``[N, C, H, W]``
    labels : tensor of integers ``[N]``
    decisions : bool tensor ``[N, L]`` or ``[L]``, optional
        None: the policy decides.
    batch_size : int

    Returns
    -------
    Evaluation

    Raises
    ------
    TypeError, ValueError
        If images, labels or decisions are not tensors, differ in number, or are empty.
    """
    _check_data(images, labels, batch_size)
    if decisions is not None:
        if not isinstance(decisions, torch.Tensor):
            raise TypeError(f"decisions must be a bool tensor [N, L] or [L], got {type(decisions).__name__}")
        if decisions.dim() == 1:
            decisions = decisions.expand(len(images), -1)
        if decisions.dim() == 0 or len(decisions) != len(images):
            raise ValueError(f"decisions must be one row per image, {len(images)}, got {tuple(decisions.shape)}")
    labels = labels.long()  # torch compares few others with what argmax gives
    right, taken = 0, []
    with evaluation_mode(net), torch.no_grad():
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            given = None if decisions is None else decisions[rows]
            logits, used = net(images[rows], given, return_decisions=True)
            right += (logits.argmax(1) == labels[rows]).sum().item()
            taken.append(used)
    taken = torch.cat(taken)
    return Evaluation(right / len(images), taken.sum(1).double().mean().item(), taken)


def train_dense(net, images, labels, *, epochs, keep=1.0, batch_size=128, learning_rate=0.1, **options):
    """Train the backbone alone, by SGD with momentum 0.9, weight decay 5e-4 and one cosine cycle.

    Parameters
    ----------
    net, images, labels, epochs, batch_size, learning_rate
        As in :func:`train_policy`, except for the optimizer.
    keep : float
        Below 1, blocks are dropped at random with this keep rate in every step: the control for what a policy gains
        over a network that merely got used to missing blocks.
    **options
        ``generator``, ``augment``, ``on_epoch`` and ``checkpoint``, see :func:`train_policy`.

    Returns
    -------
    list of dict
        Per epoch: loss and accuracy on the augmented training images.

    Raises
    ------
    TypeError, ValueError
        As in :func:`train_policy`; no policy is needed.
    """
    _check_network(net)
    settings = dict(
        stage="train_dense", epochs=epochs, batch_size=batch_size, learning_rate=float(learning_rate), keep=keep
    )
    optimizer = torch.optim.SGD(
        net.backbone.parameters(), settings["learning_rate"], momentum=0.9, nesterov=True, weight_decay=5e-4
    )

    def step(x, y, epoch, generator):
        rates = torch.full((len(x), count_blocks(net.backbone)), float(keep), device=x.device)
        logits = net.backbone(x) if keep == 1 else net(x, sample(rates, generator=generator))
        return F.cross_entropy(logits, y), {"accuracy": (logits.argmax(1) == y).float().mean()}

    net.backbone.train()
    return _train(net, step, optimizer, images, labels, settings, **options)


def train_policy(
    net,
    images,
    labels,
    *,
    epochs,
    blocks_per_epoch=1,
    penalty=-1.0,
    exploration=0.8,
    entropy=0.1,
    batch_size=256,
    learning_rate=1e-3,
    **options,
):
    """First stage: train the policy by REINFORCE under the curriculum; the backbone is frozen in evaluation mode.

    Parameters
    ----------
    net : DynamicNetwork
        With a trained backbone.
    images : float tensor ``[N, C, H, W]``
    labels : tensor of integers ``[N]``
    epochs : int
    blocks_per_epoch : float
        In epoch e the policy decides for the last ``1 + e * blocks_per_epoch`` blocks; the earlier ones are on.
    penalty, exploration, entropy : float
        See :func:`dynexec.policy.usage_reward`, :func:`dynexec.policy.explore` and
        :func:`dynexec.policy.curriculum_loss`.
    batch_size, learning_rate
        For Adam.
    **options
        ``generator``: a CPU torch.Generator for the order of images and the sampling; ``augment(images, generator)``:
        applied to every batch; ``on_epoch(record)``: called after each epoch with that epoch's entry of the result;
        ``checkpoint``: path of a file that is written atomically after each epoch. If the file exists already, training
        continues from it, bit for bit as if it had not been interrupted; a finished training is not repeated. It holds
        network, optimizer, schedule, epoch and the states of ``generator`` and of PyTorch's own generators; give the
        same arguments again.

    Returns
    -------
    list of dict
        Per epoch: loss, and accuracy, blocks kept and reward of the thresholded policy, on the training images.

    Raises
    ------
    TypeError, ValueError
        If ``net`` is not a DynamicNetwork, or has no policy; if there are no images, or not one label per image; if a
        setting is out of range; if ``checkpoint`` is damaged or of another training. File and network are then left as
        they are.
    """
    _check_policy(net)
    settings = dict(
        stage="train_policy", epochs=epochs, batch_size=batch_size, learning_rate=float(learning_rate),
        blocks_per_epoch=blocks_per_epoch, penalty=penalty, exploration=exploration, entropy=entropy,
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.policy.parameters(), settings["learning_rate"])

    def step(x, y, epoch, generator):
        trained = curriculum_mask(count_blocks(net.backbone), epoch, blocks_per_epoch=blocks_per_epoch)
        probabilities = net.policy(x)
        drawn = force_untrained(sample(probabilities, generator=generator, exploration=exploration), trained)
        greedy = force_untrained(threshold(probabilities.detach()), trained)
        with torch.no_grad():
            logits = net(torch.cat([x, x]), torch.cat([drawn, greedy]))
        reward, baseline, metrics = _rewards(logits[: len(x)], logits[len(x) :], drawn, greedy, y, penalty)
        loss = curriculum_loss(
            probabilities, drawn, reward - baseline, exploration=exploration, entropy=entropy, trained=trained
        )
        return loss, metrics

    net.backbone.eval()
    net.policy.train()
    return _train(net, step, optimizer, images, labels, settings, **options)


def fine_tune(
    net, images, labels, *, epochs, penalty=-5.0, exploration=0.8, batch_size=256, learning_rate=1e-4, **options
):
    """Second stage: train policy and backbone together, with the policy deciding for all blocks.

    Arguments, result and errors are as in :func:`train_policy`. BatchNorm sees both paths, the sampled and the
    thresholded one. By default, as published, it computes its statistics over all samples of the batch, kept or
    dropped; in blocks with ``batch_norm="kept"``, see :func:`dynexec.convert`, over the kept ones, and in those with
    ``"frozen"`` it computes none.
    """
    _check_policy(net)
    settings = dict(
        stage="fine_tune", epochs=epochs, batch_size=batch_size, learning_rate=float(learning_rate),
        penalty=penalty, exploration=exploration,
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), settings["learning_rate"])

    def step(x, y, epoch, generator):
        probabilities = net.policy(x)
        drawn = sample(probabilities, generator=generator, exploration=exploration)
        greedy = threshold(probabilities.detach())
        with torch.no_grad():
            greedy_logits = net(x, greedy)
        logits = net(x, drawn)
        reward, baseline, metrics = _rewards(logits.detach(), greedy_logits, drawn, greedy, y, penalty)
        loss = finetuning_loss(probabilities, drawn, reward - baseline, logits, y, exploration=exploration)
        return loss, metrics

    net.train()
    return _train(net, step, optimizer, images, labels, settings, **options)


def _check_network(net):
    if not isinstance(net, DynamicNetwork):
        raise TypeError(f"net must be a DynamicNetwork, got {type(net).__name__}")


def _check_policy(net):
    _check_network(net)
    if net.policy is None:
        raise ValueError("net must have a policy to train, got net.policy=None: give DynamicNetwork one")


def _check_data(images, labels, batch_size):
    if not (isinstance(images, torch.Tensor) and isinstance(labels, torch.Tensor)):
        raise TypeError(f"images and labels must be tensors, got {type(images).__name__} and {type(labels).__name__}")
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be integers [N], got {labels.dtype} of shape {tuple(labels.shape)}")
    if not len(images) == len(labels) > 0:
        raise ValueError(f"images and labels must be equally many, at least one, got {len(images)} and {len(labels)}")
    if not hasattr(batch_size, "__index__"):
        raise TypeError(f"batch_size must be an int, got {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def _check_settings(settings):
    """Raise what the first step would raise, before a file is written."""
    for name, value in settings.items():
        if name != "stage" and not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0.0 <= settings.get("keep", 1.0) <= 1.0:
        raise ValueError(f"keep must be between 0 and 1, got {settings['keep']}")
    even = torch.full((1, 1), 0.5)
    explore(even, settings.get("exploration", 1.0))
    curriculum_mask(1, 0, blocks_per_epoch=settings.get("blocks_per_epoch", 1))
    usage_reward(even >= 0.5, even[0] >= 0.5, penalty=settings.get("penalty", 0.0))


def _rewards(drawn_logits, greedy_logits, drawn, greedy, labels, penalty):
    reward = usage_reward(drawn, drawn_logits.argmax(1) == labels, penalty=penalty)
    correct = greedy_logits.argmax(1) == labels
    baseline = usage_reward(greedy, correct, penalty=penalty)
    metrics = {"accuracy": correct.float().mean(), "kept": greedy.float().sum(1).mean(), "reward": baseline.mean()}
    return reward, baseline, metrics


def _train(
    net, step, optimizer, images, labels, settings, *, generator=None, augment=None, on_epoch=None, checkpoint=None
):
    """Minimise ``step(x, y, epoch, generator) -> (loss, metrics)`` over shuffled batches; one cosine cycle."""
    # Of Python's own types: NumPy's numbers would not be read again without executing code.
    settings = {name: value.item() if hasattr(value, "item") else value for name, value in settings.items()}
    settings["images"] = len(images)
    epochs, batch_size = settings["epochs"], settings["batch_size"]
    group, saved, history = training_group(net), None, []
    if group is not None:
        check_same_settings(settings, group)
    _check_data(images, labels, batch_size)
    if not hasattr(epochs, "__index__"):
        raise TypeError(f"epochs must be an int, got {epochs!r}")
    if epochs < 0:
        raise ValueError(f"epochs must be at least 0, got {epochs}")
    _check_settings(settings)
    labels = labels.long()  # the only integers of which torch has a cross-entropy
    steps = -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    if checkpoint is not None:
        saved = TrainingCheckpoint(checkpoint, settings, net, optimizer, schedule, generator, group)
        history = saved.start()
    for epoch in range(len(history), epochs):
        order = torch.randperm(len(images), generator=generator).to(images.device)
        totals = {}
        for rows in order.split(batch_size):
            x, y = images[rows], labels[rows]
            if augment is not None:
                x = augment(x, generator)
            loss, metrics = step(x, y, epoch, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            for name, value in {"loss": loss.detach(), **metrics}.items():
                totals[name] = totals.get(name, 0.0) + value.item() * len(rows) / len(images)
        history.append({"epoch": epoch, **_mean(totals, group, images.device)})
        if saved is not None:
            saved.save(history)
        if on_epoch is not None:
            on_epoch(history[-1])
    return history


def _mean(metrics, group, device):
    """Average the metrics over the processes of ``group``."""
    if group is None:
        return metrics
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=device)
    dist.all_reduce(values, group=group)
    return dict(zip(metrics, (values / group.size()).tolist()))
