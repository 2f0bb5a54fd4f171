"""``convert`` makes the residual blocks of an existing model obey decisions; ``revert`` undoes it."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import fx, nn

from dynexec.nn.network import DynamicNetwork
from dynexec.nn.residual import DynamicBlock, check_batch_norm, dynamic_blocks, place
from dynexec.nn.structure import CONVOLUTIONS, Adapter, NoSkip, NotABlock, is_candidate, read_structure
from dynexec.nn.swap import (
    FROZEN,
    Swapped,
    add_expert,
    dynamic_class,
    make_dynamic,
    original_class,
    second_weights,
    undo,
)


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` did; ``print`` it.

    Attributes
    ----------
    converted : tuple of (column, name, class name, shortcut) rows
    skipped : tuple of (name, class name, reason) rows
    fine_tune : str or None
        What of the first set of weights is frozen; None where there is one set.
    """

    converted: tuple
    skipped: tuple
    fine_tune: str | None = None

    @property
    def num_blocks(self):
        """L, the number of columns that decisions must have."""
        return len(self.converted)

    def __str__(self):
        lines = [f"{self.num_blocks} blocks converted: decisions are bool [N, {self.num_blocks}]"]
        if self.fine_tune is not None:
            lines.append(f"each has two sets of weights; frozen of the first: {self.fine_tune}")
        for column, name, kind, shortcut in self.converted:
            what = kind if self.fine_tune is not None else f"{kind}, {shortcut} shortcut"
            lines.append(f"  column {column:3d}  {name or 'the model itself'} ({what})")
        if self.skipped:
            lines += [f"{len(self.skipped)} not converted:", *_reason_lines(self.skipped)]
        return "\n".join(lines)


def _reason_lines(skipped):
    return [f"  {name or 'the model itself'} ({kind}): {reason}" for name, kind, reason in skipped]


def convert(model, match=None, *, batch_norm="all", fine_tune=None):
    """Make the residual blocks of ``model`` obey :class:`dynexec.decide`, in place.

    Blocks are found by structure: modules whose forward is ``activation(residual(x) + shortcut(x))`` with convolutions
    in the residual branch (the basic, bottleneck, inverted-residual and MBConv blocks of torchvision, timm and others).
    Of nested blocks the inner ones count, unless the outer one has most of its convolution weights outside of them, as
    a bottleneck with residual attention inside. Only the class of a block changes: parameters, state_dict, hooks,
    ``isinstance``, pickling and copying stay as they were, and outside ``decide`` so does its output.

    Parameters
    ----------
    model : nn.Module
    match : type, str, callable, Adapter, or a list or tuple of these, optional
        Which modules to convert: instances of a type; names that fit a shell pattern, such as ``"layer3.*"``;
        modules for which ``match(name, module)`` is true; or the blocks of an :class:`Adapter`, split as it says.
        None: every block that is found. In a list or tuple, the first that fits a module counts.
    batch_norm : {"all", "kept"}
        Which samples train-mode BatchNorm takes its statistics over. "all", as the published implementations do,
        needs every sample computed and so saves nothing while BatchNorm trains. "kept" computes the residual branch of
        the kept samples only and is a different function; it needs exact mode, and more than one value per channel
        (one kept sample with 1x1 maps is an error). Evaluation-mode BatchNorm needs neither.
    fine_tune : {None, "convolutions", "all", "nothing"}
        None: blocks are kept or dropped. Otherwise every block gets a second set of weights, a copy of it that is its
        submodule ``fine_tuned``; a sample whose decision is True runs that one, others the block itself (SpotTune, Guo
        et al., CVPR 2019). Of the first set this much is frozen: the weights of its convolutions, as in the published
        code, where its BatchNorm goes on training; all of it, with BatchNorm in evaluation mode; or nothing. Copied as
        they are now: load pre-trained weights before.

    Returns
    -------
    Conversion
        Printable: each converted block with its column (registration order, which in these models is execution
        order), and what was not converted and why.

    Raises
    ------
    TypeError, ValueError
        If an argument is not what it should be, nothing can be converted, or the model is converted already.

    Notes
    -----
    Constants that a block's forward reads from its attributes are read here, for blocks whose shortcut is not the
    identity. ``torch.jit.script`` needs the reverted model. To change a block's class by other means (parametrizations
    of its own parameters, ``fully_shard``), do so first, or undo that before :func:`revert`.
    """
    _check_model(model)
    check_batch_norm(batch_norm)
    if fine_tune not in (None, *FROZEN):
        raise ValueError(f"fine_tune must be None or one of {FROZEN}, got {fine_tune!r}")
    if any(block.placement for block in dynamic_blocks(model)):
        remedy = "call dynexec.revert(model) before converting it anew" if _reversible(model) else "as it was built to"
        raise ValueError(f"model obeys decisions already: {remedy}")
    rules = list(match) if isinstance(match, (list, tuple)) else [match]
    for rule in rules:
        _check_rule(rule)
    found, skipped = _find(model, rules)
    if not found:
        wanted = "" if match is None else f" that fits match={match!r}"
        raise ValueError("\n".join([f"model has no residual block{wanted} to convert", *_reason_lines(skipped)]))
    modules = dict(model.named_modules())
    columns = [name for name in modules if name in found]
    if fine_tune is not None:
        for name, second in {name: second_weights(modules[name], fine_tune) for name in columns}.items():
            add_expert(modules[name], second, fine_tune)
    else:
        for name in columns:
            if found[name] is not None:
                make_dynamic(modules[name], found[name])
    place([modules[name] for name in columns], batch_norm, by_convert=True)
    rows = []
    for column, name in enumerate(columns):
        shortcut = "projection" if modules[name].shortcut_layers() else "identity"
        rows.append((column, name, original_class(modules[name]).__name__, shortcut))
    return Conversion(tuple(rows), tuple(skipped), fine_tune)


def revert(model):
    """Undo :func:`convert`, in place: the blocks that it changed get their own class back and obey no decisions.

    Blocks that had their columns without it, such as those of :class:`dynexec.models.BlockDrop`, keep them. A second
    set of weights is gone then; what was frozen stays frozen.

    Returns
    -------
    int
        How many blocks were reverted.

    Raises
    ------
    TypeError
        If ``model`` is not an nn.Module.
    ValueError
        If the class of a block was changed after :func:`convert`. Nothing is reverted then.
    """
    _check_model(model)
    blocks = _reversible(model)
    for block in blocks:
        own = dynamic_class(block._dynexec_original, block._dynexec_base) if isinstance(block, Swapped) else None
        if own not in (None, type(block)):
            raise ValueError(f"a block is a {type(block).__name__} since it was converted: undo that change first")
    for block in blocks:
        del block.placement
        if isinstance(block, Swapped):
            undo(block)
    return len(blocks)


def _check_model(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def _reversible(model):
    """The blocks that :func:`convert` changed: those of other classes, and our own that had no column before."""
    placed = [block for block in dynamic_blocks(model) if block.placement]
    return [block for block in placed if isinstance(block, Swapped) or block.placement.by_convert]


def _find(model, rules):
    """Adapters of the modules to convert, by name (None for blocks of our own), and why others are not."""
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
    """The modules of a network that run before there are decisions."""
    if not isinstance(module, DynamicNetwork) or module.policy is None:
        return set()
    return set(module.policy.modules()) - set(module.backbone.modules())


def _may_be_block(module):
    return isinstance(module, (DynamicBlock, *_GRAPHS)) or is_candidate(module)


def _outweighs(module, inside, rule):
    """Whether to try a module as a block although there are blocks inside it."""
    if isinstance(rule, Adapter) or isinstance(module, DynamicBlock):
        return True
    return _weights([module]) > 2 * _weights(inside)


def _weights(modules):
    layers = {layer for module in modules for layer in module.modules() if isinstance(layer, CONVOLUTIONS)}
    return sum(layer.out_channels * layer.in_channels // layer.groups * prod(layer.kernel_size) for layer in layers)


def _worth_saying(modules, found, reasons):
    """Of the modules that hold no converted block and lie in none: those that almost are blocks, and the outermost."""

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
    """The adapter for a module that fits a rule."""
    adapter = isinstance(rule, Adapter)
    if isinstance(module, _GRAPHS):
        raise NotABlock("a traced or scripted graph has no blocks: convert the model before")
    if not adapter and not is_candidate(module):
        raise NotABlock("one of torch's own layers, or no convolution inside: it takes a dynexec.Adapter")
    if "forward" in vars(module):
        raise NotABlock("its forward is replaced on the object, not in its class")
    taken = next((name for name in _RESERVED if hasattr(module, name)), None)
    if taken is not None:
        raise NotABlock(f"it has an attribute {taken!r}, a name that dynexec needs")
    original = type(module)
    try:
        module.__class__ = dynamic_class(original)
        module.__class__ = original
    except TypeError as error:
        raise NotABlock(f"its class cannot be swapped ({error})") from error
    if not adapter:
        return read_structure(module)
    if rule.shortcut_layers(module) and rule.residual_layers(module) is None:
        raise ValueError(f"{type(rule).__name__} gives shortcut_layers, which need residual_layers, but gives none")
    return rule


_NO_RULE = object()
_GRAPHS = (fx.GraphModule, torch.jit.ScriptModule)
_RESERVED = [name for name in vars(DynamicBlock) if not name.startswith("__") and name != "forward"]
_RESERVED += ["expert", "fine_tuned"]


def _check_rule(rule):
    if isinstance(rule, type) and issubclass(rule, Adapter):
        raise TypeError(f"match must be an Adapter, got its class: {rule.__name__}(block_type)")
    if rule is not None and not isinstance(rule, (str, Adapter)) and not callable(rule):
        raise TypeError(
            "match must be a type, a name pattern, a predicate (name, module) -> bool, an Adapter or a list of these, "
            f"got {type(rule).__name__}"
        )


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
