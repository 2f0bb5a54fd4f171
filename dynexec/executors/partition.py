"""Splits a traced network into stages of dynamic blocks and the rest around them."""

from inspect import signature
from keyword import iskeyword

from torch import fx, nn

from dynexec.executors.block import FrozenBlock, trace
from dynexec.executors.packing import PackedConv
from dynexec.executors.rewrite import pack
from dynexec.executors.stage import ROUTE, Stage
from dynexec.nn.residual import DynamicBlock


def pack_stages(backbone, images, executor, samples):
    """Turn the backbone into a graph in which runs of blocks are :class:`Stage` calls and the rest is packed.

    Parameters
    ----------
    backbone : nn.Module
        In evaluation mode.
    images : tensor ``[N, C, H, W]``
        An example input, channels_last.
    executor : key of EXECUTORS, or None
    samples : int
        Number of images for which to record the stages' inputs.

    Returns
    -------
    module : fx.GraphModule
        Takes ``(images, route)``.
    stages : list of (Stage, its original blocks as functions, its recorded input)
    """
    required = [
        parameter.name
        for parameter in signature(backbone.forward).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if len(required) > 1:
        raise ValueError(f"model cannot be frozen: its forward takes {', '.join(required)}, and may take images only")
    try:
        graph = trace(backbone)
    except Exception as error:
        raise ValueError(f"model cannot be frozen: its forward cannot be traced ({error})") from error
    try:
        module = pack(backbone, graph, images)
    except SyntaxError as error:  # in what torch.fx writes of its graph
        owned = (*backbone.named_modules(), *backbone.named_parameters(), *backbone.named_buffers())
        names = ", ".join(repr(name) for name, _ in owned if not _is_attribute(name))
        raise ValueError(f"model cannot be frozen: torch.fx needs names as Python has them, got {names}") from error
    modules = dict(module.named_modules())
    runs = _runs(graph, modules)
    inputs = _Recorder(module, {run[0] for run in runs}).record(images[:samples])
    with graph.inserting_after(next(node for node in graph.nodes if node.op == "placeholder")):
        route = graph.placeholder(ROUTE)
    stages = []
    for number, run in enumerate(runs):
        source = run[0].args[0]
        blocks = []
        for node in run:
            meta = node.args[0].meta["tensor_meta"]
            if len(meta.shape) != 4:
                raise ValueError(
                    f"model cannot be frozen: block {node.target} takes {tuple(meta.shape)}, not images [N, C, H, W]"
                )
            block = modules[node.target]
            like = meta.shape[1:], meta.dtype, images.device
            blocks.append(FrozenBlock(node.target, block, *like, node.args[1:], node.kwargs))
        stage = Stage(number, blocks, _is_fresh(source, modules), executor, len(images))
        with graph.inserting_before(run[0]):
            call = graph.call_function(stage, (source, route))
        call.meta = dict(run[-1].meta)
        run[-1].replace_all_uses_with(call)
        originals = [_with_constants(modules[node.target], node) for node in run]
        stages.append((stage, originals, inputs[run[0]]))
        for node in reversed(run):
            graph.erase_node(node)
    module.recompile()
    return module, stages


def _is_attribute(name):
    """Whether a module's name can stand in code; numbers are positions in lists."""
    return all(
        not iskeyword(part) and (part.isidentifier() or part.isdigit()) for part in filter(None, name.split("."))
    )


def _runs(graph, modules):
    """Return the block calls of the graph as consecutive runs; a block with a shortcut or a new shape begins one."""
    runs, last, columns = [], None, []
    for node in graph.nodes:
        block = modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(block, DynamicBlock):
            continue
        more = bool(node.args[1:] or node.kwargs)
        if not node.args or node.all_input_nodes != [node.args[0]] or (more and block.shortcut_layers()):
            raise ValueError(
                f"model cannot be frozen: block {node.target} must be called with its input alone, by position"
            )
        follows = last is not None and node.args[0] is last and len(last.users) == 1
        reshapes = node.meta["tensor_meta"].shape != node.args[0].meta["tensor_meta"].shape
        if follows and not block.shortcut_layers() and not reshapes:
            runs[-1].append(node)
        else:
            runs.append([node])
        last = node
        columns.append(block.placement.column)
    total = modules[last.target].placement.num_columns if columns else 0
    if columns != list(range(total)):
        raise ValueError(
            f"model cannot be frozen: it runs its blocks in the order of the columns {columns}, and must run each of "
            f"its {total} blocks once, in the order of their columns"
        )
    return runs


def _with_constants(block, node):
    """Return the block as a function of its input alone, called as in ``node``."""
    return lambda x: block(x, *node.args[1:], **node.kwargs)


def _is_fresh(node, modules):
    """Whether the value of ``node`` is new memory that only its single user reads."""
    maker = modules.get(node.target) if node.op == "call_module" else node.target
    fresh = isinstance(maker, (PackedConv, Stage, nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d))
    return fresh and len(node.users) == 1


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the first input of given nodes."""

    def __init__(self, module, nodes):
        super().__init__(module)
        self.nodes, self.inputs = nodes, {}

    def record(self, *args):
        self.run(*args)
        return self.inputs

    def run_node(self, node):
        if node in self.nodes:
            self.inputs[node] = self.env[node.args[0]].clone()
        return super().run_node(node)
