"""Parts of a packed graph as programs, for the CPU engine or for a GPU."""

from torch import fx, nn

from dynexec.executors.emit import Flat, emit_nodes
from dynexec.executors.instructions import Value
from dynexec.executors.packing import PackedConv, PackedLinear
from dynexec.executors.recent import IMAGE_SIZES, Recent
from dynexec.executors.stage import ROUTE, Stage
from dynexec.nn.structure import hooked
from dynexec.ops import counted


class Segment:
    """Consecutive nodes of a graph, with one input and one output, as programs: one per image size.

    Any number of threads may call it at once.

    Parameters
    ----------
    number : int
    nodes : list of fx.Node
    source : fx.Node
        Their input.
    result : fx.Node
        Their output.
    modules : dict
        The graph's modules by name, with ``PackedLinear`` in place of Linear layers.
    maker : Programs or LaunchPrograms
        For this segment alone.
    """

    def __init__(self, number, nodes, source, result, modules, maker):
        self.__name__ = f"segment_{number}"  # what generated code calls it
        self.number, self.maker = number, maker
        # A graph of its own: the network's would keep all weights of the original alive.
        graph = fx.Graph()
        copies = {source: graph.placeholder("x")}
        for node in nodes:
            route = [value for value in node.all_input_nodes if value.op == "placeholder" and value not in copies]
            copies.update({value: graph.placeholder(value.name) for value in route})
            copies[node] = graph.node_copy(node, copies.__getitem__)
        self.nodes, self.source, self.result = [copies[node] for node in nodes], copies[source], copies[result]
        self.modules = {node.target: modules[node.target] for node in nodes if node.op == "call_module"}
        self.programs = Recent(IMAGE_SIZES)
        self.executor, self.options = "fused", {}
        self._find(tuple(source.meta["tensor_meta"].shape[1:]))

    @property
    def stages(self):
        """The stages among its nodes."""
        return [node.target for node in self.nodes if isinstance(node.target, Stage)]

    @property
    def signature(self):
        """What it computes, as text: equal for equal work."""
        return " ".join(program.signature for program in self.programs.values())

    def explain(self):
        """Return lines of text: the nodes, the number of blocks, how it runs."""
        blocks = counted(sum(len(stage.blocks) for stage in self.stages), "block")
        names = f"{self.nodes[0].name} .. {self.nodes[-1].name}"
        sizes = ", ".join(map(str, list(self.programs)))  # a copy: other threads may add to it
        return [f"segment {self.number}: {names}, {blocks}, for images {sizes} -> {self.executor}"]

    def release(self):
        """Free the weights that are now packed in the programs, and what programs allocated while they were tried."""
        for shape, program in self.programs.items():
            self.programs[shape] = self.maker.renew(program, self.executor)
        targets = [*self.modules.values(), *(node.target for node in self.nodes)]
        for stage in self.stages:
            for block in stage.blocks:
                targets += [node.target for graph in block.graphs() for node in graph.nodes]
        for target in targets:
            if isinstance(target, (PackedConv, PackedLinear)):
                target.release()

    def __call__(self, x, route):
        """Run on ``x`` with the result of the network's ``plan``; None if nothing is decided."""
        y = self.find_program(x)(x, route, **self.options)
        return y.flatten(1) if self.flat else y

    def find_program(self, x):
        """Return the program for images like ``x``, made when these are first seen."""
        return self._find(tuple(x.shape[1:]))

    def _find(self, shape):
        return self.programs.find(shape, lambda: self._program(shape))

    def _program(self, shape):
        builder = self.maker.builder()
        builder.begin_unit()
        values = {self.source: builder.load(*shape)}
        builder.label(0, "input", "layer")
        if not emit_nodes(builder, self.nodes, self.modules, values):
            raise ValueError(
                f"x [N, {', '.join(map(str, shape))}] does not fit this network: of other channels, too small, too "
                "large for its pooling, or not what its classifier needs"
            )
        result = values[self.result]
        self.flat = isinstance(result, Flat)
        builder.store(result.value if self.flat else result)
        builder.label(-1, "output", "layer")
        self.operations = [instruction.op for instruction in builder.instructions]
        return self.maker.finish(builder)


def only_segment(function):
    """Return the segment that a packed function consists of, or None if it is more."""
    module = getattr(function, "__self__", None)
    nodes = list(module.graph.nodes) if isinstance(module, fx.GraphModule) else []
    calls = [node for node in nodes if node.op not in ("placeholder", "output")]
    whole = len(calls) == 1 and isinstance(calls[0].target, Segment) and nodes[-1].args == (calls[0],)
    return calls[0].target if whole else None


def listed(texts):
    """Join the first four of what :func:`make_segments` did not know."""
    return ", ".join(texts[:4]) + (f" and {len(texts) - 4} more" if len(texts) > 4 else "")


def make_segments(module, make_programs, unknown=None):
    """Return a copy of a packed graph module in which programs run what they can, and the list of its segments.

    Parameters
    ----------
    module : fx.GraphModule
        Made by :func:`pack` or ``pack_stages``: takes ``(x)`` or ``(x, route)``.
    make_programs : callable
        Makes the :class:`Programs` or :class:`LaunchPrograms` of a segment.
    unknown : list, optional
        Receives what no program can run, as texts.
    """
    unknown = [] if unknown is None else unknown
    modules = {
        name: PackedLinear(layer) if _is_plain_linear(layer) else layer for name, layer in module.named_modules()
    }
    found = _find(list(module.graph.nodes), modules, make_programs, unknown)
    graph = fx.Graph()
    copies = {}
    graph.output(graph.graph_copy(module.graph, copies))
    route = next((node for node in graph.nodes if node.op == "placeholder" and node.target == ROUTE), None)
    segments = []
    for nodes, source, result in found:
        segment = Segment(len(segments), nodes, source, result, modules, make_programs())
        with graph.inserting_after(copies[nodes[-1]]):
            call = graph.call_function(segment, (copies[source], route))
        copies[result].replace_all_uses_with(call)
        for node in reversed(nodes):
            graph.erase_node(copies[node])
        copies[result] = call  # for a segment that reads it
        segments.append(segment)
    copy = fx.GraphModule(module, graph)
    copy.delete_all_unused_submodules()
    return copy, segments


def _find(nodes, modules, make_programs, unknown):
    """Return the longest runs of nodes that programs can run, each with its one input and its one output for others."""
    found, start = [], 0
    while start < len(nodes):
        run = _run_from(nodes, start, modules, make_programs, unknown)
        if run is None:
            start += 1
        else:
            found.append(run)
            start = nodes.index(run[0][-1]) + 1
    return found


def _run_from(nodes, start, modules, make_programs, unknown):
    inputs = _tensor_inputs(nodes[start])
    if not inputs or nodes[start].op == "output" or not all(map(_is_images, inputs)):
        return None
    builder = make_programs().builder()
    values = {value: builder.load(*value.meta["tensor_meta"].shape[1:]) for value in inputs}
    if len(inputs) > 1:  # no segment begins here, but is it that what made these, or this, is unknown?
        if not emit_nodes(builder, [nodes[start]], modules, values):
            unknown.append(builder.unknown)
        return None
    (source,) = inputs
    run = []
    for node in nodes[start:]:
        if all(value in values for value in _tensor_inputs(node)) and emit_nodes(builder, [node], modules, values):
            run.append(node)
        elif not run:
            unknown.append(builder.unknown)
            break
        elif any(value in run for value in node.all_input_nodes):
            break
    while run:
        used = [node for node in run if any(user not in run for user in node.users)]
        work = any(isinstance(node.target, (PackedConv, Stage)) for node in run)
        if len(used) == 1 and work and _may_end(values[used[0]]):
            return run, source, used[0]
        run.pop()
    return None


def _is_images(value):
    """Whether a node makes a floating-point tensor ``[N, C, H, W]``."""
    meta = value.meta.get("tensor_meta")
    return hasattr(meta, "shape") and len(meta.shape) == 4 and meta.dtype.is_floating_point


def _is_plain_linear(layer):
    return type(layer) is nn.Linear and not hooked(layer) and type(layer.weight) is nn.Parameter


def _may_end(value):
    """Whether a segment may return this value, for images of all sizes."""
    return value.fixed if isinstance(value, Flat) else isinstance(value, Value)


def _tensor_inputs(node):
    return [value for value in node.all_input_nodes if not (value.op == "placeholder" and value.target == ROUTE)]
