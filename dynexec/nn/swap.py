"""Swaps the classes of blocks of existing models: the mechanism, and the classes with which blocks obey decisions."""

import copy
from functools import cache

from torch import nn

from dynexec.nn.batch_norm import batch_norms
from dynexec.nn.experts import ExpertBlock
from dynexec.nn.residual import DynamicBlock, ResidualBlock
from dynexec.nn.structure import CONVOLUTIONS

#: What of the first set of weights is frozen where blocks get a second one.
FROZEN = ("convolutions", "all", "nothing")


class Swapped:
    """Mixin placed before a block's own class in the bases of the class that it is swapped to.

    ``_dynexec_kept`` names the attributes that swapped blocks and their copies have besides their own.
    """

    _dynexec_kept = ()
    _dynexec_prefix = "Dynamic"  # of the class's name, before that of the block's own class

    def __reduce_ex__(self, protocol):
        # The class exists in memory only: pickle and deepcopy make the block as one of its own class, in its own way.
        function, arguments, *state = super().__reduce_ex__(protocol)
        arguments = tuple(self._dynexec_original if argument is type(self) else argument for argument in arguments)
        return _rebuild, (function, arguments, self._dynexec_base, _kept(self)), *state


class Converted(Swapped, DynamicBlock):
    """A block that is kept or dropped, split as an adapter says."""

    _dynexec_kept = ("_dynexec_adapter", "placement")

    def residual_layers(self):
        return self._dynexec_adapter.residual_layers(self)

    def shortcut_layers(self):
        return self._dynexec_adapter.shortcut_layers(self)

    def activation_layer(self):
        return self._dynexec_adapter.activation_layer(self)


class ConvertedExpert(Swapped, ExpertBlock):
    """A block with a second set of weights, its submodule ``fine_tuned``."""

    _dynexec_kept = ("_dynexec_frozen", "placement")

    def expert(self):
        return self.fine_tuned

    def train(self, mode=True):
        super().train(mode)
        if self._dynexec_frozen == "all":
            for name, child in self.named_children():
                if name != "fine_tuned":
                    child.eval()
        return self


def swap(block, base, **kept):
    """Swap the class of ``block`` for one with ``base`` before it in its bases, set ``kept``, and return the block."""
    block.__class__ = swapped_class(original_class(block), base)
    vars(block).update(kept)
    return block


def unswap(block):
    """Give ``block`` its original class back, and take from it what it had besides its own."""
    for name in block._dynexec_kept:
        del vars(block)[name]
    if isinstance(block, ConvertedExpert):
        del block.fine_tuned
    block.__class__ = block._dynexec_original


@cache
def swapped_class(original, base):
    """Return the class for blocks of class ``original``, with ``base``, a :class:`Swapped`, before it in its bases."""
    namespace = {"__module__": original.__module__, "_dynexec_original": original, "_dynexec_base": base}
    if hasattr(original, "__deepcopy__"):
        namespace["__deepcopy__"] = _deepcopy
    return type(f"{base._dynexec_prefix}{original.__name__}", (base, original), namespace)


def original_class(block):
    """Return the block's original class."""
    return block._dynexec_original if isinstance(block, Swapped) else type(block)


def _kept(block):
    return {name: getattr(block, name) for name in block._dynexec_kept}


def _deepcopy(block, memo):
    """Let the block copy itself in its own way, which may yield one of its original class, and swap the copy's."""
    copied = block._dynexec_original.__deepcopy__(block, memo)
    return swap(copied, block._dynexec_base, **copy.deepcopy(_kept(block), memo))


def _rebuild(function, arguments, base, kept):
    return swap(function(*arguments), base, **kept)


def second_weights(block, frozen):
    """Copy ``block`` as its second set of weights; ValueError if the first cannot be frozen as ``frozen`` says."""
    second = copy.deepcopy(block)
    if isinstance(second, ResidualBlock) and second.shortcut_layers():
        if frozen == "all" and batch_norms(*second.shortcut_layers()):
            raise ValueError(
                f'fine_tune must not be "all" for a {type(block).__name__} whose shortcut is registered elsewhere: its '
                'BatchNorm cannot be held in evaluation mode from here; take "convolutions"'
            )
        (second.shortcut,) = second.shortcut_layers()  # it is referred to; the copy's own is to be trained and saved
    return second


def add_expert(block, second, frozen):
    """Give ``block`` its second set of weights, and freeze the first as ``frozen`` says."""
    kinds = {"convolutions": CONVOLUTIONS, "all": nn.Module, "nothing": ()}[frozen]
    shortcut = block.shortcut_layers() if isinstance(block, ResidualBlock) else []
    for layer in (layer for part in (block, *shortcut) for layer in part.modules()):
        if isinstance(layer, kinds):
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(False)
    swap(block, ConvertedExpert, _dynexec_frozen=frozen, placement=None)
    block.fine_tuned = second
    if frozen == "all":
        block.train(block.training)
