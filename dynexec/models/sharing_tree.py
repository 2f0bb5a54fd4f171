"""Which tasks share which layers: the tree of fully-adaptive feature sharing (Lu et al., CVPR 2017)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Trunk:
    """A chain of layers between two branchings.

    Attributes
    ----------
    start, stop : int
        Its layers are ``start`` to ``stop - 1``.
    column : int
        Its number among the columns of layer ``start``.
    tasks : tuple of int
        The tasks that need it.
    parent : int or None
        The trunk whose output it reads, as a number in :meth:`SharingTree.trunks`; None: it reads the images.
    """

    start: int
    stop: int
    column: int
    tasks: tuple[int, ...]
    parent: int | None


@dataclass(frozen=True)
class SharingTree:
    """For each layer, the groups of tasks that share a column of it.

    Each layer partitions the tasks and refines the partition of the layer below it: tasks that have separated never
    meet again. A column reads the column of the layer below that holds its tasks.

    Parameters
    ----------
    layers : sequence of sequences of sequences of int
        From the layer that reads the images to the one that the heads read.

    Raises
    ------
    ValueError
        If a layer is not a partition of the tasks 0 to T - 1, or does not refine the one below.
    """

    layers: tuple[tuple[tuple[int, ...], ...], ...]

    def __post_init__(self):
        layers = tuple(tuple(tuple(group) for group in layer) for layer in self.layers)
        object.__setattr__(self, "layers", layers)
        if not layers:
            raise ValueError("layers must hold at least one layer, got none")
        tasks = sum(len(group) for group in layers[0])
        for depth, layer in enumerate(layers):
            if sorted(task for group in layer for task in group) != list(range(tasks)) or () in layer or not tasks:
                raise ValueError(
                    f"layers[{depth}] must hold each of the tasks 0 to T - 1 once, in groups that are not empty, "
                    f"got {_show(layer)}"
                )
            if depth and any(len({self.column_of(depth - 1, task) for task in group}) > 1 for group in layer):
                raise ValueError(
                    f"layers[{depth}] must not join tasks that layers[{depth - 1}] has parted: "
                    f"got {_show(layer)} above {_show(layers[depth - 1])}"
                )

    @classmethod
    def shared(cls, num_layers, num_tasks):
        """Return the tree from which growing starts: ``num_tasks`` tasks share all of ``num_layers`` layers."""
        return cls([[range(num_tasks)]] * num_layers)

    @property
    def num_layers(self):
        """L, the number of layers."""
        return len(self.layers)

    @property
    def num_tasks(self):
        """T, the number of tasks."""
        return sum(len(group) for group in self.layers[0])

    def column_of(self, depth, task):
        """Return the column of layer ``depth`` that holds ``task``."""
        return next(column for column, group in enumerate(self.layers[depth]) if task in group)

    def replace(self, depth, groups):
        """Return the tree with other ``groups`` at layer ``depth``; ValueError if adjacent layers do not match them."""
        self.check_depth(depth)
        return type(self)([*self.layers[:depth], groups, *self.layers[depth + 1 :]])

    def check_depth(self, depth):
        """Raise ValueError unless there is a layer ``depth``."""
        if not 0 <= depth < self.num_layers:
            raise ValueError(f"depth must be from 0 to {self.num_layers - 1}, got {depth}")

    def trunks(self):
        """Return the maximal chains of columns without a branching inside, parents first, depth first.

        A list of :class:`Trunk`.
        """
        trunks = []
        for column in range(len(self.layers[0])):
            self._add_trunks(trunks, 0, column, None)
        return trunks

    def _add_trunks(self, trunks, start, column, parent):
        tasks = self.layers[start][column]
        stop, above = start + 1, self._above(start, column)
        while len(above) == 1:
            stop, above = stop + 1, self._above(stop, above[0])
        trunks.append(Trunk(start, stop, column, tasks, parent))
        number = len(trunks) - 1
        for child in above:
            self._add_trunks(trunks, stop, child, number)

    def _above(self, depth, column):
        """Return the columns of the next layer that read this one."""
        if depth + 1 == self.num_layers:
            return []
        held = self.layers[depth][column]
        return [number for number, group in enumerate(self.layers[depth + 1]) if group[0] in held]

    def format(self, names=None):
        """Return the tree as text, one line per trunk; ``names`` of the tasks default to their numbers."""
        names = _names(self, names)
        trunks = self.trunks()
        lines = []

        def add(number, margin, branch):
            trunk = trunks[number]
            last = trunk.stop - 1
            layers = f"layer {last}" if trunk.start == last else f"layers {trunk.start}-{last}"
            lines.append(f"{margin}{branch}{layers}: {', '.join(names[task] for task in trunk.tasks)}")
            children = [child for child, other in enumerate(trunks) if other.parent == number]
            inner = margin + {"": "", "|-- ": "|   ", "`-- ": "    "}[branch]
            for child in children:
                add(child, inner, "`-- " if child == children[-1] else "|-- ")

        for number, trunk in enumerate(trunks):
            if trunk.parent is None:
                add(number, "", "")
        return "\n".join(lines)

    def __str__(self):
        return self.format()

    def draw(self, path=None, names=None):
        """Draw the tree, with a dot per column and the images at the bottom; requires matplotlib.

        Parameters
        ----------
        path : path, optional
            File to save the figure to, in the format of its suffix.
        names : sequence of str, optional
            Names of the tasks; default their numbers.

        Returns
        -------
        matplotlib.figure.Figure
        """
        from matplotlib.figure import Figure

        names = _names(self, names)
        order = [task for group in self._drawing_order() for task in group]
        place = {task: number for number, task in enumerate(order)}
        figure = Figure(figsize=(max(4.0, 0.35 * self.num_tasks), max(3.0, 0.35 * self.num_layers)), layout="tight")
        axes = figure.subplots()

        def middle(group):
            return sum(place[task] for task in group) / len(group)

        for depth, layer in enumerate(self.layers):
            for group in layer:
                below = self.layers[depth - 1][self.column_of(depth - 1, group[0])] if depth else order
                axes.plot([middle(below), middle(group)], [depth - 1, depth], color="tab:blue", zorder=1)
                axes.scatter([middle(group)], [depth], s=20, color="tab:blue", zorder=2)
        for task in order:
            group = self.layers[-1][self.column_of(-1, task)]
            axes.plot([middle(group), place[task]], [self.num_layers - 1, self.num_layers], color="0.7", zorder=0)
        axes.set_xticks(range(self.num_tasks), [names[task] for task in order], rotation=90)
        axes.xaxis.tick_top()
        axes.set(ylabel="layer", yticks=range(-1, self.num_layers), ylim=(-1.5, self.num_layers))
        axes.set_yticklabels(["images", *map(str, range(self.num_layers))])
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _drawing_order(self):
        """Return the groups of the last layer, sorted so that no two lines cross."""
        columns = range(self.num_layers)
        return sorted(self.layers[-1], key=lambda group: [self.column_of(depth, group[0]) for depth in columns])


def _names(tree, names):
    names = list(map(str, range(tree.num_tasks) if names is None else names))
    if len(names) != tree.num_tasks:
        raise ValueError(f"names must be {tree.num_tasks}, one per task, got {len(names)}")
    return names


def _show(layer):
    return [list(group) for group in layer]
