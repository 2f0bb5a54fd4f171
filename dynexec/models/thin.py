"""Makes a thin network from the filters of a wide one, where feature sharing starts (Lu et al., CVPR 2017)."""

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynexec.models.feature_sharing import FeatureSharing
from dynexec.nn.structure import CONVOLUTIONS


def select_filters(weight, count):
    """Select the filters that best represent all filters of a layer, by simultaneous orthogonal matching pursuit.

    Filters are selected one by one: always the one onto which the residuals of all filters project most, by the sum of
    squares. The residuals are what is left of the filters outside the span of the selected ones. This is a greedy
    solution of ``min over S of min over A of ||W - A W_S||``.

    Parameters
    ----------
    weight : float tensor ``[filters, ...]``
    count : int
        From 1 to the number of filters.

    Returns
    -------
    int64 tensor ``[count]``
        In the order of selection. If fewer filters span all of them, it is filled up with the first of the others.

    Raises
    ------
    ValueError
        If there are not ``count`` filters.
    """
    filters = weight.detach().double().flatten(1)
    if not 1 <= count <= len(filters):
        raise ValueError(f"count must be from 1 to the {len(filters)} filters, got {count}")
    norms = filters.norm(dim=1)
    free, chosen, residual = norms > 0, [], filters.clone()
    for _ in range(count):
        score = (filters @ residual.T).norm(dim=1) / norms
        best = score.where(free, -1.0).argmax().item()
        direction = residual[best]
        if not free[best] or direction.norm() <= 1e-9 * norms[best]:
            break  # the chosen ones make all filters
        free[best] = False
        chosen.append(best)
        direction = direction / direction.norm()
        residual = residual - torch.outer(residual @ direction, direction)
    chosen += [filter for filter in range(len(filters)) if filter not in chosen][: count - len(chosen)]
    return torch.tensor(chosen, device=weight.device)


def thin(network, widths):
    """Build a thinner network from the filters that :func:`select_filters` selects, layer by layer.

    A layer's filters are selected by their weights for the inputs that the layer below has kept; BatchNorm keeps the
    entries of these filters. Biases and BatchNorm do not affect the selection.

    Parameters
    ----------
    network : FeatureSharing
        With one column per layer; not changed. Its layers are sequences of convolutions, linear layers, BatchNorm and
        layers that act on each channel alone.
    widths : sequence of L int
        Outputs of the last convolution or linear layer of each stage; others in a stage keep their width.

    Returns
    -------
    FeatureSharing

    Raises
    ------
    ValueError
        If the tree has branches; if there is not one width per layer, from 1 to the layer's own; if a convolution has
        groups; or if there are other layers with parameters.
    """
    if any(len(layer) > 1 for layer in network.tree.layers):
        raise ValueError(f"network must have one column per layer, got the tree\n{network.tree}")
    widths = tuple(widths)
    if len(widths) != network.tree.num_layers:
        raise ValueError(f"widths must be {network.tree.num_layers}, one per layer, got {len(widths)}")
    kept, stages = None, []
    for depth, width in enumerate(widths):
        stage = copy.deepcopy(network.columns(depth)[0])
        kept = _thin_layers(stage, kept, width, f"widths[{depth}]")
        stages.append(stage)
    heads = [copy.deepcopy(head) for head in network.task_heads()]
    for head in heads:
        _thin_layers(head, kept, None, "")
    return FeatureSharing(stages, heads, network.tree)


def _thin_layers(module, kept, width, name):
    """Thin the layers of ``module`` in place; ``kept``: (number of input channels, those that are left); None: all."""
    layers = [m for m in module.modules() if _has_size(m)]
    weighted = [m for m in layers if isinstance(m, (*CONVOLUTIONS, nn.Linear))]
    for layer in layers:
        if isinstance(layer, _BatchNorm):
            if kept is not None:
                _keep_norm(layer, *kept)
            continue
        if layer not in weighted:
            if kept is not None:
                raise ValueError(f"network must be of convolutions, linear layers and BatchNorm, got {layer}")
            continue
        if getattr(layer, "groups", 1) != 1:
            raise ValueError(f"network must have convolutions without groups, got {layer}")
        if kept is not None:
            _keep_inputs(layer, *kept)
        filters = len(layer.weight)
        if width is not None and layer is weighted[-1]:
            if not isinstance(width, int) or not 1 <= width <= filters:
                raise ValueError(f"{name} must be from 1 to the {filters} outputs that the layer has, got {width!r}")
            chosen = select_filters(layer.weight, width) if width < filters else torch.arange(filters)
            kept = filters, chosen.to(layer.weight.device)
            _keep_outputs(layer, kept[1])
        else:
            kept = None
    return kept


def _has_size(module):
    """Whether a layer stores values per channel, or a number of groups."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    kinds = (*CONVOLUTIONS, nn.Linear, _BatchNorm, nn.GroupNorm)
    return isinstance(module, kinds) or any(values.numel() > 1 for values in own)


def _keep_inputs(layer, before, kept):
    """Keep the weights of some of ``before`` channels; a linear layer may read several values of each channel."""
    weight = layer.weight.data
    inputs = weight.shape[1]
    if inputs % before:
        raise ValueError(f"network must be a sequence of layers: {layer} does not read the {before} channels before it")
    weight = weight.unflatten(1, (before, inputs // before))[:, kept].flatten(1, 2)
    layer.weight = nn.Parameter(weight.contiguous(), layer.weight.requires_grad)
    setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", weight.shape[1])


def _keep_outputs(layer, kept):
    for name in ("weight", "bias"):
        if (old := getattr(layer, name)) is not None:
            setattr(layer, name, nn.Parameter(old.data[kept], old.requires_grad))
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", len(kept))


def _keep_norm(norm, before, kept):
    """:func:`_keep_inputs` for BatchNorm, which after a ``Flatten`` has several values of each channel."""
    if norm.num_features % before:
        raise ValueError(f"network must be a sequence of layers: {norm} does not read the {before} channels before it")
    kept = torch.arange(norm.num_features, device=kept.device).unflatten(0, (before, -1))[kept].flatten()
    for name in ("weight", "bias"):
        if (old := getattr(norm, name)) is not None:
            setattr(norm, name, nn.Parameter(old.data[kept], old.requires_grad))
    for name in ("running_mean", "running_var"):
        if (old := getattr(norm, name)) is not None:
            setattr(norm, name, old[kept])
    norm.num_features = len(kept)
