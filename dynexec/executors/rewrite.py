"""Rewrites a traced graph so that its convolutions become :class:`PackedConv`; everything else runs as it is."""

import operator
from dataclasses import dataclass
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dynexec.executors.packing import PackedConv
from dynexec.nn.structure import ADDITIONS, IN_PLACE_OPERATORS, hooked

ACTIVATION_MODULES = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}
ACTIVATION_CALLS = {
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    "relu": "relu",
    "relu_": "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
}


@dataclass
class _Conv:
    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: tuple
    padding: tuple
    dilation: tuple
    groups: int


def pack(root, graph, *example, may_overwrite=()):
    """Fold and fuse the convolutions of ``graph``, a trace of ``root`` in evaluation mode.

    Parameters
    ----------
    root : nn.Module
        Holds what the graph refers to; it is not changed.
    graph : fx.Graph
        Changed in place.
    example : tensors
        Example inputs, for the shapes.
    may_overwrite : tuple of str
        Names of inputs whose memory the caller gives up: a residual addition at the end of the graph writes there.

    Returns
    -------
    fx.GraphModule
        Use its ``forward``; calling the module itself does the same more slowly.
    """
    module = fx.GraphModule(root, graph)
    with torch.no_grad():
        ShapeProp(module).propagate(*example)
    _flatten_views(graph)
    modules = dict(module.named_modules())
    # Fusing moves a computation behind nodes that follow it, so nothing in between may change what it reads.
    fuse = not any(_changes_in_place(modules, node) for node in graph.nodes)
    for node in list(graph.nodes):
        conv = _read_conv(module, modules, node) if fuse else None
        if conv is not None and "tensor_meta" in node.meta and len(node.meta["tensor_meta"].shape) == 4:
            _replace(module, modules, node, conv, may_overwrite)
    for node in list(graph.nodes):
        if node.op == "call_module" and isinstance(modules.get(node.target), (nn.Identity, nn.Dropout)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    module.delete_all_unused_submodules()
    return module


def _flatten_views(graph):
    """Replace ``x.view(x.size(0), -1)`` by ``torch.flatten(x, 1)``: programs only make tensors, not sizes."""
    for node in list(graph.nodes):
        if node.op != "call_method" or node.target not in ("view", "reshape") or len(node.args) != 3 or node.kwargs:
            continue
        x, size, rest = node.args
        if rest != -1 or not _is_batch_size(size) or "tensor_meta" not in x.meta or "tensor_meta" not in node.meta:
            continue
        before, after = x.meta["tensor_meta"].shape, node.meta["tensor_meta"].shape
        if len(before) > 1 and before[0] == after[0]:
            with graph.inserting_before(node):
                flat = graph.call_function(torch.flatten, (x, 1))
            flat.meta = dict(node.meta)
            node.replace_all_uses_with(flat)
            graph.erase_node(node)


def _is_batch_size(node):
    """Whether a node is ``x.size(0)``, ``x.size()[0]`` or ``x.shape[0]`` of a value that is not a constant."""
    if not isinstance(node, fx.Node):
        return False
    if node.target is operator.getitem and node.args[1] == 0 and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        sizes = node.target is getattr and node.args[1] == "shape" or node.target == "size" and len(node.args) == 1
    else:
        sizes = node.target == "size" and node.args[1:] == (0,)
    return sizes and not node.kwargs and node.args[0].op != "get_attr"


def _read_conv(module, modules, node):
    """Return what a convolution node computes, or None for other nodes and unsupported convolutions."""
    if node.op == "call_module":
        conv = modules[node.target]
        if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return None
        if len(node.args) != 1 or hooked(conv):
            return None
        return _Conv(conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    if node.op == "call_function" and node.target is F.conv2d or node.target is torch.conv2d:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        tensors = [_constant(module, given.get(name)) for name in ("weight", "bias")]
        geometry = [pair(given.get(name, default)) for name, default in zip(names[3:6], (1, 0, 1), strict=True)]
        if tensors[0] is not None and None not in geometry and (tensors[1] is not None or given.get("bias") is None):
            return _Conv(*tensors, *geometry, given.get("groups", 1))
    return None


def _replace(module, modules, node, conv, may_overwrite):
    """Fuse what surrounds the convolution ``node`` and replace all of it by one PackedConv."""
    x, last = _input_of(node), node
    padding = _zero_padding(modules, x)
    if padding is not None and len(x.users) == 1:
        conv.padding, x = tuple(p + q for p, q in zip(conv.padding, padding, strict=True)), x.args[0]
    weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
    user = _only_user(last)
    if user is not None and (norm := _read_batch_norm(module, modules, user)) is not None:
        weight, bias = _fold(weight, bias, norm)
        last, user = user, _only_user(user)
    if bias is None:
        bias = weight.new_zeros(weight.shape[0])
    other = None
    if user is not None and _adds_same_shape(user, last):
        other = next(operand for operand in user.args if operand is not last)
        last, user = user, _only_user(user)
    activation = None if user is None else _read_activation(modules, user)
    if other is not None and activation != "relu":
        activation = None  # oneDNN fuses no other activation behind an addition
    if activation is not None:
        last = user
    ends_graph = any(user.op == "output" for user in last.users) and len(last.users) == 1
    overwrites = (
        other is not None
        and other is not x
        and other.op == "placeholder"
        and other.name in may_overwrite
        and ends_graph
    )
    packed = PackedConv(
        f"packed_{node.name}", weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups,
        activation, overwrites, tuple(x.meta["tensor_meta"].shape),
    )  # fmt: skip
    with module.graph.inserting_after(last):
        new = module.graph.call_function(packed, (x,) if other is None else (x, other))
    new.meta = dict(last.meta)
    last.replace_all_uses_with(new)


def _fold(weight, bias, norm):
    """Fold a BatchNorm into a convolution's weights and bias; half precision is rounded once, at the end."""
    mean, variance, eps, *affine = norm
    wide = [p if p is None else p.detach().to(torch.promote_types(p.dtype, torch.float32)) for p in (bias, *affine)]
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    folded = fuse_conv_bn_weights(exact, wide[0], mean.to(exact.dtype), variance.to(exact.dtype), eps, *wide[1:])
    return tuple(p.detach().to(weight.dtype) for p in folded)


def _only_user(node):
    return next(iter(node.users)) if len(node.users) == 1 else None


def _input_of(node):
    return node.args[0] if node.args else node.kwargs["input"]


def _changes_in_place(modules, node):
    """Whether the node changes a value that other nodes read, too."""
    target = modules.get(node.target) if node.op == "call_module" else node.target
    in_place = (
        getattr(target, "inplace", False) is True
        or node.kwargs.get("inplace", False) is True
        or (target is F.relu and len(node.args) > 1 and node.args[1] is True)
        or target is torch.relu_
        or target in IN_PLACE_OPERATORS
        or (node.op == "call_method" and target.endswith("_") and not target.endswith("__"))
    )
    return in_place and len(node.args[0].users) > 1


def _constant(module, node):
    """Return the tensor that a get_attr node refers to, or None."""
    if not (isinstance(node, fx.Node) and node.op == "get_attr"):
        return None
    path, _, name = node.target.rpartition(".")
    return getattr(module.get_submodule(path), name)


def pair(value):
    """Return a whole number for both dimensions as two; None for what is neither one such number nor several."""
    if isinstance(value, Integral):  # numpy's, too
        return int(value), int(value)
    several = isinstance(value, (tuple, list)) and all(isinstance(v, Integral) for v in value)
    return tuple(map(int, value)) if several else None


def _zero_padding(modules, node):
    """Return (height, width) padding of a symmetric ZeroPad2d node, or None."""
    if node.op != "call_module" or type(modules[node.target]) is not nn.ZeroPad2d:
        return None
    left, right, top, bottom = modules[node.target].padding
    return (top, left) if left == right and top == bottom and min(left, top) >= 0 else None


def _read_batch_norm(module, modules, node):
    """Return (mean, variance, eps, weight, bias) of an evaluation-mode BatchNorm node, or None."""
    if node.op == "call_module":
        norm = modules[node.target]
        if type(norm) is nn.BatchNorm2d and norm.running_mean is not None and not norm.training and not hooked(norm):
            return norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    if node.op == "call_function" and node.target is F.batch_norm:
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        mean, variance, weight, bias = (_constant(module, given.get(name)) for name in names[1:5])
        if mean is not None and variance is not None and given.get("training", False) is False:
            return mean, variance, given.get("eps", 1e-5), weight, bias
    return None


def _adds_same_shape(node, operand):
    if node.op not in ("call_function", "call_method") or node.target not in ADDITIONS or node.kwargs:
        return False
    others = [other for other in node.args if other is not operand]
    if len(node.args) != 2 or len(others) != 1 or not isinstance(others[0], fx.Node):
        return False
    same = others[0].meta["tensor_meta"].shape == operand.meta["tensor_meta"].shape
    return same and _has_samples(others[0])


def _has_samples(node):
    """Whether a value is computed from the input: any other has the shape of a single sample, whatever the batch."""
    found = {node}
    while found and all(value.op != "placeholder" for value in found):
        found = {value for values in found for value in values.all_input_nodes}
    return bool(found)


def _read_activation(modules, node):
    if node.op == "call_module":
        return None if hooked(modules[node.target]) else ACTIVATION_MODULES.get(type(modules[node.target]))
    if node.op in ("call_function", "call_method") and len(node.all_input_nodes) == 1 and len(node.args) == 1:
        return ACTIVATION_CALLS.get(node.target)
    return None
