"""``convert`` makes the residual blocks of an existing model obey decisions; ``revert`` undoes it."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

from torch import nn

from dynexec.nn.residual import DynamicBlock, assign_columns, check_batch_norm, dynamic_blocks
from dynexec.nn.structure import Adapter, NotABlock, is_candidate, read_structure


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` did; ``print`` it.

    Attributes
    ----------
    converted : tuple of (column, name, class name, shortcut) rows
    skipped : tuple of (name, class name, reason) rows
    """

    converted: tuple
    skipped: tuple

    @property
    def num_blocks(self):
        """L, the number of columns that decisions must have."""
        return len(self.converted)

    def __str__(self):
        lines = [f"{self.num_blocks} blocks converted: decisions are bool [N, {self.num_blocks}]"]
        lines += [
            f"  column {c:3d}  {name} ({kind}, {shortcut} shortcut)" for c, name, kind, shortcut in self.converted
        ]
        if self.skipped:
            lines += [f"{len(self.skipped)} not converted:"]
            lines += [f"  {name} ({kind}): {reason}" for name, kind, reason in self.skipped]
        return "\n".join(lines)


class _Converted(DynamicBlock):
    """Stands before the block's own class in the bases of the class it is swapped to."""

    def residual_layers(self):
        return self._dynexec_adapter.residual_layers(self)

    def shortcut_layers(self):
        return self._dynexec_adapter.shortcut_layers(self)

    def activation_layer(self):
        return self._dynexec_adapter.activation_layer(self)

    def __reduce_ex__(self, protocol):
        # The swapped class exists in memory only: pickle and deepcopy go through the block's own class.
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _rebuild, (_original_class(self),), state


def convert(model, match=None, *, batch_norm="all"):
    """Make the residual blocks of ``model`` obey :class:`dynexec.decide`, in place.

    Blocks are found by structure: modules whose forward is ``activation(residual(x) + shortcut(x))`` with convolutions
    in the residual branch (the basic, bottleneck, inverted-residual and MBConv blocks of torchvision, timm and others),
    innermost first. Only the class of a block changes: parameters, state_dict, hooks, ``isinstance``, pickling and
    copying stay as they were, and outside ``decide`` so does its output.

    Parameters
    ----------
    model : nn.Module
    match : type, str, callable, Adapter, or a list of these, optional
        Which modules to convert: instances of a type; names that fit a shell pattern, such as ``"layer3.*"``;
        modules for which ``match(name, module)`` is true; or the blocks of an :class:`Adapter`, split as it says.
        None: every block that is found.
    batch_norm : {"all", "kept"}
        Which samples train-mode BatchNorm takes its statistics over. "all", as the published implementations do,
        needs every sample computed and so saves nothing while BatchNorm trains. "kept" computes the kept samples only
        and is a different function. Evaluation-mode BatchNorm needs neither.

    Returns
    -------
    Conversion
        Printable: each converted block with its column (registration order, which in these models is execution
        order), and what was not converted and why.

    Raises
    ------
    ValueError
        If nothing can be converted, or the model is converted already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    check_batch_norm(batch_norm)
    if any(block.placement for block in dynamic_blocks(model)):
        raise ValueError("model has dynamic blocks already: call dynexec.revert(model) before converting it anew")
    rules = list(match) if isinstance(match, list) else [match]
    found, skipped = _find(model, rules)
    if not found:
        reasons = "".join(f"\n  {name} ({kind}): {reason}" for name, kind, reason in skipped)
        wanted = "" if match is None else f" that fits match={match!r}"
        raise ValueError(f"model has no residual block{wanted} that can be converted{reasons}")
    for name, adapter in found.items():
        block = model.get_submodule(name)
        if adapter is not None:
            block._dynexec_adapter = adapter
            block.__class__ = _dynamic_class(type(block))
    order = [name for name, module in model.named_modules() if isinstance(module, DynamicBlock)]
    assign_columns(model, batch_norm=batch_norm)
    rows = []
    for column, name in enumerate(order):
        block = model.get_submodule(name)
        kind = "projection" if block.shortcut_layers() else "identity"
        rows.append((column, name, _original_class(block).__name__, kind))
    return Conversion(tuple(rows), tuple(skipped))


def revert(model):
    """Undo :func:`convert`: every converted block of ``model`` gets its own class back, in place.

    Returns
    -------
    int
        How many blocks were reverted.
    """
    converted = [block for block in dynamic_blocks(model) if isinstance(block, _Converted)]
    for block in converted:
        block.__class__ = _original_class(block)
        del block._dynexec_adapter, block.placement
    return len(converted)


def _find(model, rules):
    """Adapters of the modules to convert, by name (None for blocks of our own), and why others are not."""
    found, reasons = {}, {}
    for name, module in reversed(list(model.named_modules())):  # children before parents: the innermost block wins
        inside = name + "." if name else ""
        if any(other.startswith(inside) for other in found):
            continue
        rule = next((rule for rule in rules if _fits(rule, name, module)), _NO_RULE)
        if rule is _NO_RULE:
            continue
        if isinstance(module, DynamicBlock):
            found[name] = None
        elif isinstance(rule, Adapter):
            found[name] = rule
        elif is_candidate(module):
            try:
                found[name] = read_structure(module)
            except NotABlock as reason:
                reasons[name] = str(reason)
    # Only the outermost of the modules that hold no converted block and lie in none need an explanation.
    apart = {n: r for n, r in reasons.items() if not any(_contains(n, f) or _contains(f, n) for f in found)}
    skipped = [
        (name, type(model.get_submodule(name)).__name__, reason)
        for name, reason in reversed(apart.items())
        if not any(_contains(other, name) for other in apart)
    ]
    return found, skipped


_NO_RULE = object()


def _fits(rule, name, module):
    if rule is None:
        return True
    if isinstance(rule, str):
        return fnmatchcase(name, rule)
    if isinstance(rule, Adapter):
        return isinstance(module, rule.block_type)
    if isinstance(rule, (type, tuple)):
        return isinstance(module, rule)
    if callable(rule):
        return bool(rule(name, module))
    raise TypeError(
        f"match must be a type, a name pattern, a predicate (name, module) -> bool, an Adapter or a list of these, "
        f"got {type(rule).__name__}"
    )


def _contains(outer, inner):
    return inner != outer and inner.startswith(outer + "." if outer else "")


@lru_cache(maxsize=None)
def _dynamic_class(original):
    return type(f"Dynamic{original.__name__}", (_Converted, original), {"__module__": original.__module__})


def _original_class(block):
    return type(block).__bases__[1] if isinstance(block, _Converted) else type(block)


def _rebuild(original):
    converted = _dynamic_class(original)
    return converted.__new__(converted)
