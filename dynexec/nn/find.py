"""Finds the blocks of a model that ``convert`` makes obey decisions, or compute stochastic depth by subsets."""

from fnmatch import fnmatchcase
from math import prod

import torch
from torch import fx

from dynexec.nn.network import DynamicNetwork
from dynexec.nn.residual import DynamicBlock
from dynexec.nn.stochastic_depth import SubsetBranches, drop_path_blocks, read_branches
from dynexec.nn.structure import CONVOLUTIONS, Adapter, NoSkip, NotABlock, is_candidate, read_structure
from dynexec.nn.swap import Converted, swapped_class

_NO_RULE = object()
_GRAPHS = (fx.GraphModule, torch.jit.ScriptModule)
_RESERVED = [name for name in vars(DynamicBlock) if not name.startswith("__") and name != "forward"]
_RESERVED += ["expert", "fine_tuned"]


def as_rules(match):
    """Return ``match``, the argument of ``convert``, as a list of rules; raise TypeError if one is invalid."""
    rules = list(match) if isinstance(match, (list, tuple)) else [match]
    for rule in rules:
        _check_rule(rule)
    return rules


def _check_rule(rule):
    if isinstance(rule, type) and issubclass(rule, Adapter):
        raise TypeError(f"match must be an Adapter, got its class: {rule.__name__}(block_type)")
    if rule is not None and not isinstance(rule, (str, Adapter)) and not callable(rule):
        raise TypeError(
            "match must be a type, a name pattern, a predicate (name, module) -> bool, an Adapter or a list of these, "
            f"got {type(rule).__name__}"
        )


def find_blocks(model, rules):
    """Return the adapters of the modules to convert, by name (None for dynexec's blocks), and why others are not."""
    found, reasons = {}, {}
    modules = dict(model.named_modules())
    deciding = {inner for module in modules.values() for inner in _policy_modules(module)}
    for name, module in reversed(modules.items()):  # children before parents
        rule = next((rule for rule in rules if _fits(rule, name, module)), _NO_RULE)
        asked = rule is not None and not isinstance(rule, str)  # for this kind of module, so say why it is none
        if rule is _NO_RULE or module in deciding or not (asked or _may_be_block(module)):
            continue
        inside = [other for other in found if _contains(name, other)]
        if inside and not _outweighs(module, [modules[other] for other in inside], rule):
            continue
        try:
            adapter = None if isinstance(module, DynamicBlock) else _read(module, rule)
        except NotABlock as reason:
            reasons[name] = reason
            continue
        for other in inside:
            del found[other]
        found[name] = adapter
    skipped = [(n, type(modules[n]).__name__, str(reason)) for n, reason in _worth_saying(modules, found, reasons)]
    return found, skipped


def _policy_modules(module):
    """Return the modules of a network that run before there are decisions."""
    if not isinstance(module, DynamicNetwork) or module.policy is None:
        return set()
    return set(module.policy.modules()) - set(module.backbone.modules())


def _may_be_block(module):
    return isinstance(module, (DynamicBlock, *_GRAPHS)) or is_candidate(module)


def _outweighs(module, inside, rule):
    """Whether to try a module as a block although it contains blocks."""
    if isinstance(rule, Adapter) or isinstance(module, DynamicBlock):
        return True
    return _weights([module]) > 2 * _weights(inside)


def _weights(modules):
    layers = {layer for module in modules for layer in module.modules() if isinstance(layer, CONVOLUTIONS)}
    return sum(layer.out_channels * layer.in_channels // layer.groups * prod(layer.kernel_size) for layer in layers)


def _worth_saying(modules, found, reasons):
    """Of modules that neither contain nor lie in a converted block, yield the near misses and the outermost ones."""

    def nested(name, others):
        return any(_contains(name, other) or _contains(other, name) for other in others)

    apart = {name: reason for name, reason in reversed(reasons.items()) if not nested(name, found)}
    almost = [name for name, reason in apart.items() if not isinstance(reason, NoSkip)]
    for name, reason in apart.items():
        layers = sum(isinstance(layer, CONVOLUTIONS) for layer in modules[name].modules())
        outermost = not (nested(name, almost) or any(_contains(other, name) for other in apart))
        if name in almost or (outermost and (layers > 1 or not found)):
            yield name, reason


def _read(module, rule):
    """Return the adapter for a module that matches a rule."""
    _check_swap(module, Converted)
    adapter = isinstance(rule, Adapter)
    if not adapter and not is_candidate(module):
        raise NotABlock("one of torch's own layers, or no convolution inside: it takes a dynexec.Adapter")
    taken = next((name for name in _RESERVED if hasattr(module, name)), None)
    if taken is not None:
        raise NotABlock(f"it has an attribute {taken!r}, a name that dynexec needs")
    if not adapter:
        return read_structure(module)
    if rule.shortcut_layers(module) and rule.residual_layers(module) is None:
        raise ValueError(f"{type(rule).__name__} gives shortcut_layers, which need residual_layers, but gives none")
    return rule


def _check_swap(module, base):
    """Raise :class:`NotABlock` unless the class of ``module`` can be swapped for one with ``base`` before it."""
    if isinstance(module, _GRAPHS):
        raise NotABlock("a traced or scripted graph has no blocks: convert the model before")
    if "forward" in vars(module):
        raise NotABlock("its forward is replaced on the object, not in its class")
    original = type(module)
    try:
        module.__class__ = swapped_class(original, base)
        module.__class__ = original
    except TypeError as error:
        raise NotABlock(f"its class cannot be swapped ({error})") from error


def find_stochastic_depth(model, rules):
    """Return what was read of the blocks to convert, by name, and why other blocks or branches are not converted."""
    found, skipped = {}, []
    for name, drop_paths in drop_path_blocks(model).items():
        block = model.get_submodule(name)
        if not any(_fits(rule, name, block) for rule in rules):
            continue
        try:
            _check_swap(block, SubsetBranches)
            branches = read_branches(block)
        except NotABlock as reason:
            skipped.append((name, type(block).__name__, str(reason)))
            continue
        if branches.branches:
            found[name] = branches
        called = {branch.drop_path for branch in branches.branches}
        for drop_path in drop_paths:
            reason = branches.reasons.get(drop_path, "the forward of its block does not call it itself")
            if drop_path in branches.reasons or drop_path not in called:
                path = f"{name}.{drop_path}".removeprefix(".")
                skipped.append((path, type(block.get_submodule(drop_path)).__name__, reason))
    return found, skipped


def _fits(rule, name, module):
    if rule is None:
        return True
    if isinstance(rule, str):
        return fnmatchcase(name, rule)
    if isinstance(rule, Adapter):
        return isinstance(module, rule.block_type)
    if isinstance(rule, type):
        return isinstance(module, rule)
    return bool(rule(name, module))


def _contains(outer, inner):
    return inner != outer and inner.startswith(outer + "." if outer else "")
