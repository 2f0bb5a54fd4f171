"""Finds ``shortcut + drop_path(branch(x))`` in blocks of existing models, and computes only the kept samples of it.

No third-party imports: a stochastic-depth module is one whose class has the name and attributes of timm's or
torchvision's; where it is added is read from the traced forward of the block that calls it.
"""

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from dynexec.nn.batch_norm import uses_batch_statistics
from dynexec.nn.drop_path import SubsetDropPath, add_branch, draw_samples, needs_fixed_shapes
from dynexec.nn.structure import BlockTracer, NotABlock, OneInput, is_addition, overwrites
from dynexec.nn.swap import Swapped, original_class

_ARITHMETIC = {operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod}


def read_rate(module):
    """Return (drop probability, whether kept samples are divided by the keep probability), or None if not applicable.

    timm's DropPath has ``drop_prob`` and ``scale_by_keep``; torchvision's StochasticDepth has ``p`` and ``mode``, which
    must be "row".
    """
    if not type(module).__name__.endswith(("DropPath", "StochasticDepth")) or isinstance(module, SubsetDropPath):
        return None
    rate = getattr(module, "drop_prob", getattr(module, "p", None))
    return rate or 0.0, getattr(module, "scale_by_keep", True)


def drop_path_blocks(model):
    """Return the modules that hold stochastic depth: by name, the names inside them of their stochastic-depth modules.

    torch's own containers, such as ``ModuleList``, do not count: the module that holds the container does.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found, names = {}, {}
    for name, module in modules.items():
        if name and read_rate(module) is not None:
            block = name.rpartition(".")[0]
            while block and (type(modules[block]).forward.__module__ or "").startswith("torch.nn."):
                block = block.rpartition(".")[0]
            first = names.setdefault(modules[block], block)  # a block may be registered under two names
            if first == block:
                found.setdefault(block, []).append(name.removeprefix(f"{block}."))
    return found


@dataclass(frozen=True)
class Branch:
    """One branch that may be dropped: ``function(block, rows)``, and the names of what it uses of the block.

    ``first``: the branch is the first operand of its addition, and the sum has its memory layout.
    """

    drop_path: str
    first: bool
    function: Callable
    modules: tuple[str, ...]
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Branches:
    """What was read of a block.

    ``run(block, x, block)`` is its forward, with each of ``branches`` and its addition replaced by a call of the
    block's ``_dynexec_add_branch``. ``defaults`` are the values of the forward's other parameters in the trace;
    ``reasons`` says by name which stochastic-depth modules stay as they are, and why.
    """

    branches: tuple[Branch, ...]
    reasons: dict[str, str]
    defaults: dict[str, object]
    run: Callable

    def __reduce__(self):
        return _unread, ()  # functions made from a graph cannot be pickled: a copied block reads itself anew


def _unread():
    return None


def read_branches(block):
    """Trace ``block`` in training mode and return its :class:`Branches`; raise :class:`NotABlock` if that fails."""
    signature = inspect.signature(original_class(block).forward)
    parameters = list(signature.parameters.values())[2:]  # without the block and its input
    graph = _training_graph(block)
    for node in reversed(graph.nodes):
        if not node.users and _measured(node) is not None:  # as of ``n, h, w, c = x.shape``, where nobody reads n
            graph.erase_node(node)
    holder = _add_input(graph)
    branches, reasons = [], {}
    for node in list(graph.nodes):
        if node.op != "call_module" or read_rate(_module(block, node)) is None:
            continue
        try:
            addition, shortcut = _addition(block, node)
            nodes, x = _branch_nodes(block, node)
        except NotABlock as reason:
            reasons[_path(node)] = str(reason)
            continue
        with graph.inserting_before(addition):
            arguments = holder, len(branches), shortcut, x
            addition.replace_all_uses_with(graph.call_method("_dynexec_add_branch", arguments))
        branches.append(_branch(block, node, nodes, x, first=shortcut is addition.args[1]))
        for done in (addition, node, *reversed(nodes)):
            graph.erase_node(done)
    defaults = {parameter.name: parameter.default for parameter in parameters}
    return Branches(tuple(branches), reasons, defaults, _compile(block, graph))


def _training_graph(block):
    modes = {module: module.training for module in block.modules()}
    for module in modes:
        module.training = True
    attributes = dict(vars(block))
    buffers = {
        name: (buffer, buffer._version, buffer.clone())
        for name, buffer in block.named_buffers()
        if not buffer.is_inference()
    }
    try:
        graph = BlockTracer(block).trace(OneInput(block))
    except Exception as error:  # tracing runs the block's own Python on stand-ins: anything may be raised
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NotABlock(f"its forward cannot be traced ({reason})") from error
    finally:
        stored = [name for name, value in vars(block).items() if attributes.get(name, block) is not value]
        vars(block).clear()  # what was stored are the tracer's stand-ins
        vars(block).update(attributes)
        for module, training in modes.items():
            module.training = training
        counted = [name for name, (buffer, version, _) in buffers.items() if buffer._version != version]
        with torch.no_grad():
            for name in counted:
                buffers[name][0].copy_(buffers[name][2])
    if counted:
        raise NotABlock(f"its forward changes {', '.join(counted)}, and what is run instead would not")
    if stored:
        raise NotABlock(f"its forward stores {', '.join(stored)} on the block, and what is run instead would not")
    if any(node.op == "get_attr" and not node.target.startswith("block.") for node in graph.nodes):
        raise NotABlock("its forward makes a tensor, which would be the same whenever what is run instead needs it")
    return graph


def _add_input(graph):
    """Add a second input to the graph: the block whose ``_dynexec_add_branch`` it calls."""
    x = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(x):
        return graph.placeholder("block")


def _addition(block, drop_path):
    """Return (the addition after ``drop_path``, its other operand)."""
    module = _module(block, drop_path)
    if getattr(module, "mode", "row") != "row":
        raise NotABlock(f"its mode is {module.mode!r}, which does not drop samples")
    if len(drop_path.users) != 1 or not is_addition(addition := next(iter(drop_path.users))):
        raise NotABlock("its output is not added to a shortcut, or is used elsewhere, too")
    first, second = addition.args
    if first is not drop_path and addition.target in (operator.iadd, "add_"):
        raise NotABlock("it is added to its shortcut in place")
    return addition, second if first is drop_path else first


def _branch_nodes(block, drop_path):
    """Return (the nodes that lead only to ``drop_path``, in order, and the one value that they start from)."""
    inside = {drop_path}
    for node in reversed(list(drop_path.graph.nodes)):
        if node.op != "placeholder" and node.users and all(user in inside for user in node.users):
            inside.add(node)
    nodes = [node for node in drop_path.graph.nodes if node in inside and node is not drop_path]
    if not drop_path.args or drop_path.args[0] not in nodes:
        raise NotABlock("what it drops is used elsewhere, too")
    starts = {start for node in nodes for start in node.all_input_nodes if start.op != "get_attr"} - inside
    sizes = {start for start in starts if _measured(start) is not None}  # for the kept samples they are read anew
    starts = starts - sizes or {_measured(size) for size in sizes}
    if len(starts) != 1:
        raise NotABlock(f"its branch starts from {len(starts)} values of its block, not from one")
    (x,) = starts
    if any(_measured(size) is not x for size in sizes):
        raise NotABlock("its branch needs the size of another value than the one it starts from")
    if any(overwrites(block, user, x) for user in x.users):
        raise NotABlock("an operation in place overwrites what its branch starts from")
    return nodes, x


def _measured(node):
    """Return the value from whose sizes alone ``node`` is computed, or None."""
    reads = (node.op == "call_function" and node.target is getattr and node.args[1] == "shape") or (
        node.op == "call_method" and node.target == "size"
    )
    if reads:
        return node.args[0]
    if node.op != "call_function" or node.target not in _ARITHMETIC:
        return None
    found = {_measured(value) for value in node.all_input_nodes}
    return found.pop() if len(found) == 1 else None


def _branch(block, drop_path, nodes, x, first):
    """Turn the nodes of a branch into a graph of their own."""
    graph = fx.Graph()
    copies = {x: graph.placeholder("x")}

    def copy(node):
        if node not in copies:  # in order, all but parameters that others use, too, are there already
            copies[node] = graph.node_copy(node, copy)
        return copies[node]

    for node in nodes:
        copy(node)
    graph.output(copies[drop_path.args[0]])
    used = {kind: tuple({_path(n) for n in graph.nodes if n.op == kind}) for kind in ("call_module", "get_attr")}
    return Branch(_path(drop_path), first, _compile(block, graph), used["call_module"], used["get_attr"])


def _compile(block, graph):
    """Turn the graph into a function of the block and the graph's inputs."""
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = _path(node)
    return type(fx.GraphModule(block, graph)).forward


def _path(node):
    return node.target.removeprefix("block.")


def _module(block, node):
    return block.get_submodule(_path(node))


class _BoundBranch:
    """A branch of a given block, as much like a module as is needed."""

    def __init__(self, block, branch):
        self.block, self.branch = block, branch

    def __call__(self, rows):
        return self.branch.function(self.block, rows)

    def modules(self):
        return [self.block.get_submodule(name) for name in self.branch.modules]

    def parameters(self):
        yield from (parameter for module in self.modules() for parameter in module.parameters())
        yield from (operator.attrgetter(name)(self.block) for name in self.branch.parameters)


class SubsetBranches(Swapped):
    """A block that computes its branches for the samples only that its stochastic depth keeps."""

    _dynexec_kept = ("_dynexec_branches", "_dynexec_batch_norm")
    _dynexec_prefix = "Subset"

    def forward(self, *args, **kwargs):
        if not (self.training and args and isinstance(args[0], torch.Tensor)) or needs_fixed_shapes(args[0]):
            return super().forward(*args, **kwargs)
        if self._dynexec_branches is None:
            self._dynexec_branches = read_branches(self)
        if not _as_traced(self._dynexec_branches.defaults, args[1:], kwargs):
            return super().forward(*args, **kwargs)
        return self._dynexec_branches.run(self, args[0], self)

    def _dynexec_add_branch(self, number, shortcut, x):
        branch = _BoundBranch(self, self._dynexec_branches.branches[number])
        drop_path = self.get_submodule(branch.branch.drop_path)
        rate, divides = read_rate(drop_path) or (0.0, False)
        all_samples = self._dynexec_batch_norm == "all" and uses_batch_statistics(*branch.modules())
        if all_samples or not drop_path.training or not 0 < rate < 1:
            rows = drop_path(branch(x))
            return rows + shortcut if branch.branch.first else shortcut + rows
        keep, scale = draw_samples(x.shape[0], rate)
        return add_branch(shortcut, x, branch, keep, scale if divides else 1.0, branch_first=branch.branch.first)


def _as_traced(defaults, others, kwargs):
    """Whether a block is called with its input alone, or with the default values of its other parameters."""
    given = dict(zip(defaults, others)) | kwargs
    known = len(others) <= len(defaults)
    return known and all(name in defaults and value is defaults[name] for name, value in given.items())
