"""Grows a tree of shared trunks (Lu et al., CVPR 2017): the affinity of tasks, and splits from the top down.

The network starts thin and shared by all tasks, see :mod:`dynexec.models.thin`. Then, from the last layer to the first,
each layer gets one column per group of the columns above it (of the tasks, for the last layer). The number of groups
follows from a price per column and the affinity of the tasks. Growing ends when one group is left: all layers below
stay shared.
"""

import copy

import torch

from dynexec.models.feature_sharing import FeatureSharing


def error_margins(outputs, targets):
    """Compute how far each prediction is from right: 1 minus the probability of the right class.

    Parameters
    ----------
    outputs : list of T float tensors ``[N, C_t]``
        Logits.
    targets : int64 tensor ``[N, T]``
        Classes; negative if not known.

    Returns
    -------
    float tensor ``[N, T]``, NaN where not known
    """
    columns = []
    for logits, target in zip(outputs, targets.T, strict=True):
        right = logits.detach().softmax(1).gather(1, target.clamp(min=0)[:, None])[:, 0]
        columns.append((1 - right).masked_fill(target < 0, torch.nan))
    return torch.stack(columns, 1)


def task_affinity(margins):
    """Compute how often two tasks find the same samples difficult, or the same ones easy: float64 ``[T, T]``, 0 to 1.

    A sample is difficult for a task if its margin is at least the task's mean. The affinity of two tasks is the share
    of samples that are difficult for both or easy for both, among those where both are known (0.5 if there are none).

    Parameters
    ----------
    margins : float tensor ``[N, T]``
        See :func:`error_margins`; NaN: not known.
    """
    if margins.dim() != 2 or not margins.is_floating_point() or len(margins) == 0:
        raise ValueError(f"margins must be float [N, T], N at least 1, got {margins.dtype} {tuple(margins.shape)}")
    margins = margins.double()
    known = margins.isfinite()
    difficult = ((margins >= margins.nanmean(0)) & known).double()
    easy = known.double() - difficult
    both = known.double().T @ known.double()
    agree = difficult.T @ difficult + easy.T @ easy
    return torch.where(both > 0, agree / both.clamp(min=1), 0.5)


def group_affinity(affinity, groups):
    """Compute the affinity of groups of tasks, float64 ``[groups, groups]``; on the diagonal, of each with itself.

    This is each task's least affinity with the tasks of the other group, averaged over the group; then the mean of both
    directions.
    """
    pairs = torch.stack(
        [torch.stack([affinity[list(a)][:, list(b)].amin(1).mean() for b in groups]) for a in groups]
    ).double()
    return (pairs + pairs.T) / 2


def separation_cost(affinity, clusters):
    """Compute the cost of keeping together units that do not belong together.

    This is 1 minus each unit's least affinity in its cluster, averaged over the cluster, then over clusters.
    """
    return sum(1 - affinity[c][:, c].amin(1).mean().item() for c in map(list, clusters)) / len(clusters)


def find_groups(tree, depth, affinity, *, column_cost, alpha=1.0, max_columns=None, repeats=5, seed=0):
    """Find the groups into which the single column of a layer is best split.

    For each number of groups C, the groups come from spectral clustering of the columns of the layer above (of the
    tasks, for the last layer). The least ``(C - 1) * column_cost + alpha * separation_cost`` wins; on a tie, the
    smaller C. Requires scikit-learn unless C is 1 or the number of columns or tasks.

    Parameters
    ----------
    tree : SharingTree
    depth : int
        A layer with one column.
    affinity : float tensor ``[T, T]``
        Symmetric, not negative.
    column_cost : float
        Price of an additional column here.
    alpha : float
        Weight of separation; the larger, the more columns.
    max_columns : int, optional
        Largest number of groups.
    repeats : int
        How often clustering is repeated from other starts; the groups with the least separation cost are used.
    seed : int
        The same seed gives the same groups.

    Returns
    -------
    list of lists of int
        Tasks of each group, in order.

    Raises
    ------
    ImportError
        If scikit-learn is needed and missing.
    ValueError
        If an argument is invalid.
    """
    tree.check_depth(depth)
    if len(tree.layers[depth]) != 1:
        raise ValueError(f"tree must have one column at layer {depth}, got {len(tree.layers[depth])}")
    tasks = tree.num_tasks
    affinity = torch.as_tensor(affinity).detach().double().cpu()
    if affinity.shape != (tasks, tasks) or not torch.allclose(affinity, affinity.T) or not (affinity >= 0).all():
        raise ValueError(
            f"affinity must be [{tasks}, {tasks}], symmetric and not negative, got shape {tuple(affinity.shape)}"
        )
    if column_cost < 0 or alpha < 0 or repeats < 1 or (max_columns is not None and max_columns < 1):
        raise ValueError(
            "column_cost and alpha must not be negative, repeats and max_columns at least 1, got "
            f"{column_cost}, {alpha}, {repeats} and {max_columns}"
        )
    last = depth == tree.num_layers - 1
    units = [(task,) for task in range(tasks)] if last else tree.layers[depth + 1]
    between = group_affinity(affinity, units)
    best, least = None, float("inf")
    for count in range(1, min(len(units), max_columns or len(units)) + 1):
        clusters = _cluster(between, count, repeats, seed)
        if clusters is None:
            continue
        cost = (count - 1) * column_cost + alpha * separation_cost(between, clusters)
        if cost < least:
            best, least = clusters, cost
    return sorted(sorted(task for unit in cluster for task in units[unit]) for cluster in best)


def _cluster(affinity, count, repeats, seed):
    """Group units into ``count`` clusters, a list of lists; None if clustering finds fewer."""
    units = len(affinity)
    if count == 1:
        return [list(range(units))]
    if count == units:
        return [[unit] for unit in range(units)]
    try:
        from sklearn.cluster import SpectralClustering
    except ImportError as error:
        raise ImportError("grouping tasks needs scikit-learn: pip install scikit-learn") from error
    best, least = None, float("inf")
    for repeat in range(repeats):
        clustering = SpectralClustering(count, affinity="precomputed", random_state=seed + repeat)
        labels = clustering.fit_predict(affinity.numpy())
        clusters = [(labels == label).nonzero()[0].tolist() for label in range(count)]
        if all(clusters) and (cost := separation_cost(affinity, clusters)) < least:
            best, least = clusters, cost
    return best


def widen(network, depth, groups):
    """Return the network with one column per group at layer ``depth``, copied from the columns that held its tasks.

    The outputs stay the same; only training makes the columns differ.

    Parameters
    ----------
    network : FeatureSharing
        Not changed.
    depth : int
    groups : sequence of sequences of int
        They refine the groups of this layer and of the one below, and join those of the layer above.

    Returns
    -------
    FeatureSharing

    Raises
    ------
    ValueError
        If the groups do not match the tree.
    """
    tree = network.tree.replace(depth, groups)
    stages = []
    for number, layer in enumerate(tree.layers):
        old = network.columns(number)
        for group in layer:
            if len({network.tree.column_of(number, task) for task in group}) > 1:
                raise ValueError(f"groups must not join the tasks of different columns, got {list(map(list, groups))}")
        stages.append([copy.deepcopy(old[network.tree.column_of(number, group[0])]) for group in layer])
    return FeatureSharing(stages, [copy.deepcopy(head) for head in network.task_heads()], tree)


def split(network, depth, affinity, **options):
    """:func:`widen` by the groups of :func:`find_groups`, which takes ``options``; ``network`` itself for one group."""
    groups = find_groups(network.tree, depth, affinity, **options)
    return network if len(groups) == 1 else widen(network, depth, groups)


def grow(network, affinity_of, column_costs, *, max_columns=None, on_split=None, **options):
    """Split layer after layer, from the last one down, until a layer is best left whole.

    Parameters
    ----------
    network : FeatureSharing
        Usually with one column per layer; not changed.
    affinity_of : callable
        ``affinity_of(network)`` returns the affinity ``[T, T]`` before each split: it should train the network and
        measure :func:`task_affinity`.
    column_costs : sequence of L float
        Price of an additional column per layer.
    max_columns : sequence of L int, optional
        Largest number of columns per layer.
    on_split : callable, optional
        Called as ``on_split(depth, network)`` after each split, with the new network.
    **options
        ``alpha``, ``repeats`` and ``seed``, see :func:`find_groups`.

    Returns
    -------
    FeatureSharing
        As after the last split, not trained since.
    """
    layers = network.tree.num_layers
    max_columns = [None] * layers if max_columns is None else max_columns
    for name, numbers in (("column_costs", column_costs), ("max_columns", max_columns)):
        if len(numbers) != layers:
            raise ValueError(f"{name} must be {layers}, one per layer, got {len(numbers)}")
    for depth in reversed(range(layers)):
        bounds = dict(column_cost=column_costs[depth], max_columns=max_columns[depth])
        grown = split(network, depth, affinity_of(network), **bounds, **options)
        if grown is network:
            break
        network = grown
        if on_split is not None:
            on_split(depth, network)
    return network
