"""``convert`` makes the residual blocks of an existing model obey decisions; ``revert`` undoes this."""

from dataclasses import dataclass
from glob import escape

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dynexec.nn.find import as_rules, find_blocks, find_stochastic_depth
from dynexec.nn.residual import check_batch_norm, dynamic_blocks, place
from dynexec.nn.stochastic_depth import SubsetBranches
from dynexec.nn.structure import Adapter, TracedAdapter
from dynexec.nn.swap import (
    FROZEN,
    Converted,
    ConvertedExpert,
    Swapped,
    add_expert,
    original_class,
    second_weights,
    swap,
    swapped_class,
    unswap,
)
from dynexec.ops import counted


@dataclass(frozen=True)
class Conversion:
    """The result of :func:`convert`; ``print`` it.

    Attributes
    ----------
    converted : tuple of (column, name, class name, shortcut) rows
        With stochastic depth (number, name, class name, names of its stochastic-depth modules).
    skipped : tuple of (name, class name, reason) rows
    fine_tune : str or None
        What is frozen of the first set of weights; None if blocks have one set.
    stochastic_depth : bool
        Whether blocks compute what stochastic depth keeps instead of obeying decisions.
    """

    converted: tuple
    skipped: tuple
    fine_tune: str | None = None
    stochastic_depth: bool = False

    @property
    def num_blocks(self):
        """Number of converted blocks: L, the number of columns that decisions must have, where blocks obey them."""
        return len(self.converted)

    def __str__(self):
        lines = self._stochastic_depth_lines() if self.stochastic_depth else self._decision_lines()
        if self.skipped:
            lines += [f"{len(self.skipped)} not converted:", *_reason_lines(self.skipped)]
        return "\n".join(lines)

    def _stochastic_depth_lines(self):
        lines = [
            f"{counted(self.num_blocks, 'block')} converted: they train on the samples that stochastic depth keeps"
        ]
        for _, name, kind, drop_paths in self.converted:
            lines.append(f"  {name or 'the model itself'} ({kind}): {', '.join(drop_paths)}")
        return lines

    def _decision_lines(self):
        lines = [f"{counted(self.num_blocks, 'block')} converted: decisions are bool [N, {self.num_blocks}]"]
        if self.fine_tune is not None:
            lines.append(f"each has two sets of weights; frozen of the first: {self.fine_tune}")
        for column, name, kind, shortcut in self.converted:
            what = kind if self.fine_tune is not None else f"{kind}, {shortcut} shortcut"
            lines.append(f"  column {column:3d}  {name or 'the model itself'} ({what})")
        return lines


def _reason_lines(skipped):
    return [f"  {name or 'the model itself'} ({kind}): {reason}" for name, kind, reason in skipped]


def convert(model, match=None, *, batch_norm="all", fine_tune=None, stochastic_depth=False):
    """Make the residual blocks of ``model`` obey :class:`dynexec.decide`, in place.

    Blocks are found by structure: modules whose forward is ``activation(residual(x) + shortcut(x))`` with convolutions
    in the residual branch (the basic, bottleneck, inverted-residual and MBConv blocks of torchvision, timm and others).
    Of nested blocks the inner ones are converted, unless most convolution weights of the outer one lie outside of them,
    as in a bottleneck with residual attention inside. Only the class of a block changes: parameters, state_dict, hooks,
    ``isinstance``, pickling and copying work as before, and outside ``decide`` its output is the same.

    Parameters
    ----------
    model : nn.Module
    match : type, str, callable, Adapter, or a list or tuple of these, optional
        Which modules to convert: instances of a type; modules whose name matches a shell pattern such as
        ``"layer3.*"``; modules for which ``match(name, module)`` is true; or the blocks of an :class:`Adapter`, split
        as it says. None: every block that is found. In a list or tuple, the first entry that matches a module applies.
    batch_norm : {"all", "kept", "frozen"}
        Which samples BatchNorm computes its statistics over in training. "all", as published, computes every sample up
        to the last BatchNorm of a branch, which is all of most branches; only layers after it run on the kept samples
        alone. "kept" computes the residual branch of the kept samples only and is a different function; it needs exact
        mode and more than one value per channel (one kept sample with 1x1 maps is an error). "frozen" holds the
        BatchNorm of the blocks in evaluation mode, which needs neither, until :func:`revert`.
    fine_tune : {None, "convolutions", "all", "nothing"}
        None: blocks are kept or dropped. Otherwise every block gets a second set of weights, a copy of itself as its
        submodule ``fine_tuned``; samples whose decision is True run the copy, the others the block itself (SpotTune,
        Guo et al., CVPR 2019). The value says what is frozen of the first set: the weights of its convolutions, as in
        the published code, where its BatchNorm keeps training; all of it, with BatchNorm in evaluation mode; or
        nothing. The weights are copied at this call: load pre-trained ones before.
    stochastic_depth : bool
        True: instead of obeying decisions, blocks with ``shortcut + drop_path(branch(x))`` in their forward, with
        timm's DropPath or a similar module, compute these branches for the kept samples only during training, like
        :class:`dynexec.nn.SubsetDropPath`. ``match`` selects the blocks (no Adapter). Here ``batch_norm`` "all" means
        that a branch with BatchNorm in training mode runs on all samples, as it does with DropPath.

    Returns
    -------
    Conversion
        Printable: each converted block with its column (registration order, which in these models is execution order),
        and what was not converted and why.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, nothing can be converted, or the model is converted already.

    Notes
    -----
    For blocks whose shortcut is not the identity, and with ``batch_norm="all"`` for every block with BatchNorm,
    constants that the block's forward reads from its attributes are read at conversion, and whatever that forward
    stores on its block is not stored inside ``decide``. Revert the model before ``torch.jit.script``. To change a
    block's class by other means (parametrizations of its own parameters, ``fully_shard``), do so before converting, or
    undo that change before :func:`revert`. Convert with ``fine_tune`` before wrapping the model in
    ``DistributedDataParallel``.
    """
    _check_model(model)
    check_batch_norm(batch_norm, {})
    if not isinstance(stochastic_depth, bool):
        raise TypeError(f"stochastic_depth must be True or False, got {stochastic_depth!r}")
    if fine_tune not in (None, *FROZEN):
        raise ValueError(f"fine_tune must be None or one of {FROZEN}, got {fine_tune!r}")
    if fine_tune is not None and any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "fine_tune adds weights, which a DistributedDataParallel that is there already would never average: "
            "convert the model before wrapping it"
        )
    if any(block.placement for block in dynamic_blocks(model)):
        remedy = "its class gives its blocks their columns, so use it without convert"
        if _reversible(model):
            remedy = "call dynexec.revert(model) before converting it anew"
        raise ValueError(f"model obeys decisions already: {remedy}")
    if _subset_blocks(model):
        raise ValueError("model computes stochastic depth by subsets already: call dynexec.revert(model) before")
    rules = as_rules(match)
    if stochastic_depth:
        return _convert_stochastic_depth(model, match, rules, batch_norm, fine_tune)
    found, skipped = find_blocks(model, rules)
    if not found:
        wanted = "" if match is None else f" that fits match={match!r}"
        raise ValueError("\n".join([f"model has no residual block{wanted} to convert", *_reason_lines(skipped)]))
    modules = dict(model.named_modules())
    columns = [name for name in modules if name in found]
    check_batch_norm(batch_norm, {name: modules[name] for name in columns})
    if fine_tune is not None:
        for name, second in {name: second_weights(modules[name], fine_tune) for name in columns}.items():
            add_expert(modules[name], second, fine_tune)
    else:
        for name in columns:
            if found[name] is not None:
                swap(modules[name], Converted, _dynexec_adapter=found[name], placement=None)
    place({name: modules[name] for name in columns}, batch_norm, by_convert=True)
    rows = []
    for column, name in enumerate(columns):
        shortcut = "projection" if modules[name].shortcut_layers() else "identity"
        rows.append((column, name, original_class(modules[name]).__name__, shortcut))
    return Conversion(tuple(rows), tuple(skipped), fine_tune)


def _convert_stochastic_depth(model, match, rules, batch_norm, fine_tune):
    if fine_tune is not None:
        raise ValueError(f"fine_tune must be None with stochastic_depth=True, got {fine_tune!r}: convert does either")
    if batch_norm == "frozen":
        raise ValueError(
            'batch_norm must be "all" or "kept" with stochastic_depth=True, got "frozen": put the BatchNorm layers in '
            "evaluation mode, then branches with them run on the kept samples, too"
        )
    if any(isinstance(rule, Adapter) for rule in rules):
        raise ValueError("match must not hold an Adapter with stochastic_depth=True: blocks are read from their trace")
    found, skipped = find_stochastic_depth(model, rules)
    if not found:
        wanted = "" if match is None else f" that fits match={match!r}"
        raise ValueError("\n".join([f"model has no stochastic depth{wanted} to convert", *_reason_lines(skipped)]))
    rows = []
    for number, (name, branches) in enumerate(found.items()):
        block = model.get_submodule(name)
        drop_paths = tuple(dict.fromkeys(branch.drop_path for branch in branches.branches))
        rows.append((number, name, type(block).__name__, drop_paths))
        swap(block, SubsetBranches, _dynexec_branches=branches, _dynexec_batch_norm=batch_norm)
    return Conversion(tuple(rows), tuple(skipped), stochastic_depth=True)


def revert(model):
    """Undo :func:`convert`, in place: converted blocks get their original class back and no longer obey decisions.

    Blocks that got their columns in other ways, such as those of :class:`dynexec.models.BlockDrop`, keep them. A second
    set of weights is removed; what was frozen stays frozen.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    int
        Number of reverted blocks.

    Raises
    ------
    TypeError
        If ``model`` is not an nn.Module.
    ValueError
        If the class of a block was changed after :func:`convert`. Nothing is reverted then.
    """
    _check_model(model)
    blocks = [*_reversible(model), *_subset_blocks(model)]
    swapped = [block for block in blocks if isinstance(block, Swapped)]
    for block in swapped:
        if swapped_class(original_class(block), block._dynexec_base) is not type(block):
            raise ValueError(f"a block is a {type(block).__name__} since it was converted: undo that change first")
    for block in blocks:
        if isinstance(block, Swapped):
            unswap(block)
        else:
            del block.placement
    return len(blocks)


def recall(model):
    """Return the arguments with which :func:`convert` would convert a twin of ``model`` the same way, as plain values.

    None if no block obeys decisions because of it, or if blocks were split by an :class:`Adapter` of the caller.
    """
    blocks = _reversible(model)
    if not blocks:
        return None
    adapters = [block._dynexec_adapter for block in blocks if isinstance(block, Converted)]
    if not all(isinstance(adapter, TracedAdapter) for adapter in adapters):
        return None
    fine_tune = next((block._dynexec_frozen for block in blocks if isinstance(block, ConvertedExpert)), None)
    names = [escape(name) for name, module in model.named_modules() if module in blocks]
    return {"match": names, "batch_norm": blocks[0].placement.batch_norm, "fine_tune": fine_tune}


def _check_model(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def _reversible(model):
    """The blocks that :func:`convert` changed: those of other classes, and dynexec's own that had no column before."""
    placed = [block for block in dynamic_blocks(model) if block.placement]
    return [block for block in placed if isinstance(block, (Converted, ConvertedExpert)) or block.placement.by_convert]


def _subset_blocks(model):
    return [module for module in model.modules() if isinstance(module, SubsetBranches)]
