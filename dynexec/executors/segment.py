"""Parts of a packed graph as programs for the CPU engine."""

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from dynexec.executors.packing import PackedConv
from dynexec.executors.program import Builder, Program, Value, Weights, engine_missing
from dynexec.executors.rewrite import ACTIVATION_CALLS, ACTIVATION_MODULES, ADDITIONS
from dynexec.executors.stage import Stage

_SIGMOIDS = (torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_")
_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")


class _Padded:
    """A value with zeros around it: top, left, bottom, right. Only convolutions read it."""

    def __init__(self, value, zeros):
        self.value, self.zeros = value, zeros


class Segment:
    """Nodes of a graph that follow each other, with one input and one output, as programs: one per image size.

    Parameters
    ----------
    number : int
    nodes : list of fx.Node
    source : fx.Node
        Their input.
    result : fx.Node
        Their output.
    modules : dict
        The graph's modules by name.
    columns : int
        Of the network's decisions.
    winograd : bool
    """

    def __init__(self, number, nodes, source, result, modules, columns, winograd):
        self.__name__ = f"segment_{number}"  # what generated code calls it
        self.number, self.columns, self.winograd = number, columns, winograd
        # A graph of its own: the network's would keep all weights of the original alive.
        graph = fx.Graph()
        copies = {source: graph.placeholder("x")}
        for node in nodes:
            route = [value for value in node.all_input_nodes if value.op == "placeholder" and value not in copies]
            copies.update({value: graph.placeholder(value.name) for value in route})
            copies[node] = graph.node_copy(node, copies.__getitem__)
        self.nodes, self.source, self.result = [copies[node] for node in nodes], copies[source], copies[result]
        self.modules = {node.target: modules[node.target] for node in nodes if node.op == "call_module"}
        self.weights, self.programs = Weights(), {}
        self.group, self.together = 0, False
        shape = tuple(source.meta["tensor_meta"].shape[1:])
        self.programs[shape] = self._program(shape)

    @property
    def stages(self):
        """The stages among its nodes."""
        return [node.target for node in self.nodes if isinstance(node.target, Stage)]

    @property
    def signature(self):
        """What it computes, as text: equal for equal work."""
        return " ".join(str(program.code.tolist()) for program in self.programs.values())

    def explain(self):
        """Lines of text: the nodes, how many blocks, how it runs."""
        blocks = sum(len(stage.blocks) for stage in self.stages)
        executor = "fused" if self.together else "resident"
        names = f"{self.nodes[0].name} .. {self.nodes[-1].name}"
        sizes = ", ".join(str(shape) for shape in self.programs)
        return [f"segment {self.number}: {names}, {blocks} blocks, for images {sizes} -> {executor}"]

    def release(self):
        """Give up what only the layers' own executors need of the weights."""
        targets = [node.target for node in self.nodes]
        for stage in self.stages:
            for block in stage.blocks:
                for function in (block.shortcut, block.body):
                    if function is not None:
                        targets += [node.target for node in function.__self__.graph.nodes]
        for target in targets:
            if isinstance(target, PackedConv):
                target.release()

    def __call__(self, x, route):
        """Run on ``x`` with a Route or bool decisions ``[N, L]``; None where nothing is decided."""
        decisions = x.new_empty((len(x), 0), dtype=torch.bool) if route is None else getattr(route, "decisions", route)
        shape = tuple(x.shape[1:])
        program = self.programs.get(shape)
        if program is None:
            program = self.programs[shape] = self._program(shape)
        return program(x, decisions, self.group, self.together)

    def _program(self, shape):
        builder = Builder(self.weights, self.columns, self.winograd)
        builder.begin_unit()
        values = {self.source: builder.load(*shape)}
        if not emit_nodes(builder, self.nodes, self.modules, values):
            raise ValueError(f"x {[None, *shape]} is too small for this network")
        builder.store(values[self.result])
        self.operations = [instruction.op for instruction in builder.instructions]
        return Program(builder.finish(), self.weights.tensor())


def emit_nodes(builder, nodes, modules, values, out=None):
    """Emit instructions for ``nodes`` until one cannot be, keep the values they make; whether all could.

    ``out`` is the value that the last node must write to.
    """
    for node in nodes:
        mark = builder.mark()
        builder.begin_unit()
        value = _emit(builder, node, modules, values, out if node is nodes[-1] else None)
        if value is None:
            builder.back(mark)
            return False
        values[node] = value
    return True


def _emit(builder, node, modules, values, out):
    """The value of ``node``, or None if the engine cannot make it."""
    target = modules.get(node.target) if node.op == "call_module" else node.target
    inputs = [values.get(arg) for arg in node.args if isinstance(arg, fx.Node)]
    if isinstance(target, Stage):
        return _emit_stage(builder, target, inputs[0]) if out is None else None
    if not inputs or None in inputs or node.op not in ("call_function", "call_method", "call_module"):
        return None
    x, *others = inputs
    if isinstance(target, PackedConv):
        zeros = (0, 0, 0, 0)
        if isinstance(x, _Padded):
            x, zeros = x.value, x.zeros
        if any(isinstance(other, _Padded) for other in others):
            return None
        return builder.conv(target, x, *others, out=out if out is not x else None, zeros=zeros)
    if any(isinstance(value, _Padded) for value in inputs):
        return None
    if isinstance(target, nn.Module):
        return None if others else _emit_module(builder, target, x, out)
    return _emit_call(builder, node, x, others, out)


def _emit_module(builder, module, x, out):
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    kind = type(module)
    if kind in ACTIVATION_MODULES or kind is nn.Sigmoid:
        return builder.add(x, activation=ACTIVATION_MODULES.get(kind, "sigmoid"), out=out)
    if out is not None:
        return None
    if kind is nn.MaxPool2d:
        if module.return_indices or _pair(module.dilation) != (1, 1):
            return None
        geometry = _pair(module.kernel_size), _pair(module.stride), _pair(module.padding)
        return builder.pool(x, "max", *geometry, ceil=module.ceil_mode)
    if kind is nn.AvgPool2d:
        geometry = _pair(module.kernel_size), _pair(module.stride), _pair(module.padding)
        divisor = module.divisor_override
        if divisor is None and module.count_include_pad and any(geometry[2]):
            if module.ceil_mode:  # windows at the end count less padding
                return None
            divisor = geometry[0][0] * geometry[0][1]
        return builder.pool(x, "sum", *geometry, divisor or 0, module.ceil_mode)
    if kind is nn.AdaptiveAvgPool2d and _pair(module.output_size) == (1, 1):
        return builder.pool(x, "sum", x.shape[1:], x.shape[1:])
    if kind is nn.ZeroPad2d:
        left, right, top, bottom = module.padding
        return _Padded(x, (top, left, bottom, right)) if min(module.padding) >= 0 else None
    return None


def _emit_call(builder, node, x, others, out):
    target, constants = node.target, [arg for arg in node.args if not isinstance(arg, fx.Node)]
    if target in ADDITIONS and len(others) == 1 and not constants and not node.kwargs:
        return builder.add(x, others[0], out=out)
    if target in _PRODUCTS and len(others) == 1 and not constants and not node.kwargs and out is None:
        return builder.multiply(x, others[0]) or builder.multiply(others[0], x)
    if others:
        return None
    if target in ACTIVATION_CALLS and not constants:
        return builder.add(x, activation=ACTIVATION_CALLS[target], out=out)
    if target in _SIGMOIDS and not constants and not node.kwargs:
        return builder.add(x, activation="sigmoid", out=out)
    if out is not None:
        return None
    if target == "clone":
        return builder.add(x)
    if target is F.adaptive_avg_pool2d and _argument(node, 1, "output_size", None) in (1, (1, 1)):
        return builder.pool(x, "sum", x.shape[1:], x.shape[1:])
    if target in (torch.mean, "mean") and _argument(node, 2, "keepdim", False) is True:
        if sorted(d % 4 for d in _argument(node, 1, "dim", ())) == [2, 3]:
            return builder.pool(x, "sum", x.shape[1:], x.shape[1:])
    if target is F.pad and _argument(node, 2, "mode", "constant") == "constant":
        pad = tuple(_argument(node, 1, "pad", ()))
        if _argument(node, 3, "value", None) in (None, 0) and all(isinstance(p, int) and p >= 0 for p in pad):
            if len(pad) == 6 and not any(pad[:5]):
                return builder.add(x, channels=x.channels + pad[5])
            if len(pad) == 4:
                return _Padded(x, (pad[2], pad[0], pad[3], pad[1]))
    return None


def _emit_stage(builder, stage, x):
    for block in stage.blocks:
        x = _emit_block(builder, block, x)
        if x is None:
            return None
    return x


def _emit_block(builder, block, x):
    """All samples get the block's shortcut; those that keep it have its result put in the same place."""
    builder.begin_unit()
    s = x
    if block.shortcut is not None:
        s = _emit_function(builder, block.shortcut, [x])
    if s is None:
        return None
    gate = builder.gate(block.column)
    inputs = [x, s]
    y = _emit_function(builder, block.body, inputs, out=s)
    if y is None or y.shape != s.shape:
        return None
    if y is not s:
        builder.add(y, out=s)
    builder.end_gate(gate)
    return s


def _emit_function(builder, function, inputs, out=None):
    """What a packed function makes of ``inputs``; in ``out`` if it can be written there."""
    module = getattr(function, "__self__", None)
    if not isinstance(module, fx.GraphModule):
        return None
    nodes = list(module.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    values = dict(zip(placeholders, inputs, strict=True))
    (result,) = nodes[-1].args
    work = [node for node in nodes if node.op not in ("placeholder", "output")]
    # The last node may overwrite `out` only where that is its other input or nothing reads it any more.
    if out is not None and (not work or work[-1] is not result or _reads(work[-1], values, out) == "input"):
        out = None
    modules = dict(module.named_modules())
    units = len(builder.units)
    if not emit_nodes(builder, work, modules, values, out):
        return None
    del builder.units[units:]  # a block stays in one phase
    return values.get(result) if isinstance(result, fx.Node) else None


def _reads(node, values, out):
    """Whether ``node`` reads ``out`` as its first "input", as an "other" one, or not at all (None)."""
    read = [values.get(arg) is out for arg in node.args if isinstance(arg, fx.Node)]
    if not any(read):
        return None
    return "input" if read[0] and isinstance(node.target, PackedConv) else "other"


def _argument(node, position, name, default):
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def make_segments(module, columns, winograd=True):
    """A copy of a packed graph module in which the engine runs what it can, and the list of the segments that it runs.

    Parameters
    ----------
    module : fx.GraphModule
        As :func:`pack` or ``pack_stages`` made it: takes ``(x)`` or ``(x, route)``.
    columns : int
        Of the decisions; 0 without a route.
    winograd : bool
        Whether 3x3 convolutions may run by Winograd's algorithm.
    """
    modules = dict(module.named_modules())
    found = [] if engine_missing() else _find(list(module.graph.nodes), modules, columns)
    graph = fx.Graph()
    copies = {}
    graph.output(graph.graph_copy(module.graph, copies))
    route = next((node for node in graph.nodes if node.op == "placeholder" and node.name == "route"), None)
    segments = []
    for nodes, source, result in found:
        segment = Segment(len(segments), nodes, source, result, modules, columns, winograd)
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


def _find(nodes, modules, columns):
    """Longest runs of nodes that the engine can run, each with its one input and the one output that others use."""
    found, start = [], 0
    while start < len(nodes):
        run = _run_from(nodes, start, modules, columns)
        if run is None:
            start += 1
        else:
            found.append(run)
            start = nodes.index(run[0][-1]) + 1
    return found


def _run_from(nodes, start, modules, columns):
    inputs = _tensor_inputs(nodes[start])
    if len(inputs) != 1 or "tensor_meta" not in inputs[0].meta:
        return None
    source = inputs[0]
    meta = source.meta["tensor_meta"]
    if not hasattr(meta, "shape") or len(meta.shape) != 4 or meta.dtype != torch.float32:
        return None
    builder = Builder(Weights(), columns)
    values = {source: builder.load(*meta.shape[1:])}
    run = []
    for node in nodes[start:]:
        if all(value in values for value in _tensor_inputs(node)) and emit_nodes(builder, [node], modules, values):
            run.append(node)
        elif not run or any(value in run for value in node.all_input_nodes):
            break
    while run:
        used = [node for node in run if any(user not in run for user in node.users)]
        work = any(isinstance(node.target, (PackedConv, Stage)) for node in run)
        if len(used) == 1 and work and isinstance(values[used[0]], Value):
            return run, source, used[0]
        run.pop()
    return None


def _tensor_inputs(node):
    return [value for value in node.all_input_nodes if not (value.op == "placeholder" and value.name == "route")]
