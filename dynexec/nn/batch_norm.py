"""Which samples BatchNorm computes its statistics over while only some run, and recomputing running statistics."""

import torch
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynexec.measure import evaluation_mode


def batch_norms(*parts):
    """Return the BatchNorm layers (including SyncBatchNorm) inside those of ``parts`` that are modules."""
    modules = (module for part in parts if isinstance(part, nn.Module) for module in part.modules())
    return [module for module in modules if isinstance(module, _BatchNorm)]


def uses_batch_statistics(*parts):
    """Whether a BatchNorm inside ``parts`` computes statistics from the batch."""
    return any(norm.training or norm.running_mean is None for norm in batch_norms(*parts))


def meets_other_processes(*parts):
    """Whether a SyncBatchNorm inside ``parts`` waits for other processes, in forward and backward."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return any(isinstance(norm, nn.SyncBatchNorm) and norm.training for norm in batch_norms(*parts))


def hold_batch_norm(*parts):
    """Put the BatchNorm layers inside ``parts`` into evaluation mode."""
    for norm in batch_norms(*parts):
        if norm.training:
            norm.eval()


class HoldsBatchNorm:
    """Mixin whose ``train`` keeps BatchNorm layers in evaluation mode if the block's placement says they are frozen."""

    def train(self, mode=True):
        super().train(mode)
        if self.placement is not None and self.placement.batch_norm == "frozen":
            hold_batch_norm(self)
        return self


def split_at_statistics(layers, block, shortcuts):
    """Split ``layers`` into (those up to the last BatchNorm with batch statistics, those after it).

    None if such a BatchNorm of the block is in none of ``layers`` or ``shortcuts``: it may be anywhere.
    """
    known = {norm for norm in batch_norms(*layers, *shortcuts)}
    if any(norm not in known and uses_batch_statistics(norm) for norm in batch_norms(block)):
        return None
    last = max((number for number, layer in enumerate(layers, 1) if uses_batch_statistics(layer)), default=0)
    return layers[:last], layers[last:]


def explain_batch_norm(error, placement, samples):
    """Re-raise ``error`` in terms of the block if BatchNorm raised it for having one value per channel to train on."""
    if placement.batch_norm == "all" or "more than 1 value per channel" not in str(error):
        return
    raise ValueError(
        f'batch_norm="{placement.batch_norm}": {samples} the block of column {placement.column} give BatchNorm one '
        f'value per channel, and it cannot train on that: keep more samples, or use "all" ({error})'
    ) from error


def recompute_batch_norm(model, batches, forward=None):
    """Recompute the running statistics of BatchNorm under the decisions that the network will run with.

    Running statistics do not match the activations at test time if the network was trained with ``batch_norm="kept"``,
    if its decisions have changed since, or if its weights were averaged. During the call every other layer is in
    evaluation mode (no dropout) and nothing is learned; afterwards each layer is back in its own mode.

    Parameters
    ----------
    model : nn.Module
    batches : iterable
        The inputs of ``forward``, one after the other: a data loader, or a part of it.
    forward : callable, optional
        ``forward(batch)`` runs the model, for example ``lambda batch: net(batch[0].to(device), decisions)``. None:
        ``model(batch)``, or ``model(batch[0])`` for a list or tuple; a :class:`dynexec.nn.DynamicNetwork` then decides
        by its policy.

    Raises
    ------
    ValueError
        If ``batches`` is empty, or no BatchNorm of the model has running statistics. The statistics are left unchanged,
        as after any other error; so are those of a BatchNorm that no sample reached.

    Notes
    -----
    Statistics are averaged over batches, weighted by the number of values in each: batches, and the kept samples in
    them, may differ in number. For equal batches this is :func:`torch.optim.swa_utils.update_bn`. Frozen BatchNorm is
    recomputed as well; in its blocks, statistics are over the kept samples, the only ones that run.
    """
    norms = [norm for norm in batch_norms(model) if norm.running_mean is not None]
    if not norms:
        raise ValueError(f"model must have a BatchNorm with running statistics, got a {type(model).__name__} with none")
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)} for norm in norms]
    averages = [_Average(norm) for norm in norms]
    try:
        with evaluation_mode(model), torch.no_grad():
            for norm in norms:
                norm.training = True
            empty = True
            for batch in batches:
                empty = False
                if forward is not None:
                    forward(batch)
                else:
                    model(batch[0] if isinstance(batch, (list, tuple)) else batch)
        if empty:
            raise ValueError("batches must hold at least one batch, got none")
    except BaseException:
        for norm, buffers in zip(norms, before):
            for name, buffer in buffers.items():
                norm.get_buffer(name).copy_(buffer)
        raise
    finally:
        for average in averages:
            average.remove()


class _Average:
    """While installed, makes a BatchNorm average its batch statistics, weighted by their numbers of values."""

    def __init__(self, norm):
        self.momentum, self.norm, self.values = norm.momentum, norm, 0
        self.hook = norm.register_forward_pre_hook(self.weigh, with_kwargs=True)

    def weigh(self, norm, arguments, named):
        x = (*arguments, *named.values())[0]
        values = x.numel() // x.shape[1]
        if self.values == 0 and values:
            norm.reset_running_stats()
        self.values += values
        norm.momentum = values / max(self.values, 1)

    def remove(self):
        self.hook.remove()
        self.norm.momentum = self.momentum
