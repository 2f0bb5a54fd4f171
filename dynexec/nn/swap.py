"""Classes that blocks of existing models are swapped to so that they obey decisions."""

import copy
from functools import cache

from torch import nn

from dynexec.nn.batch_norm import batch_norms
from dynexec.nn.experts import ExpertBlock
from dynexec.nn.residual import DynamicBlock, ResidualBlock
from dynexec.nn.structure import CONVOLUTIONS

#: What of the first set of weights is frozen where blocks get a second one.
FROZEN = ("convolutions", "all", "nothing")


class Swapped(DynamicBlock):
    """Mixin placed before a block's own class in the bases of the class that it is swapped to."""

    def __reduce_ex__(self, protocol):
        # The class exists in memory only: pickle and deepcopy make the block as one of its own class, in its own way.
        function, arguments, *state = super().__reduce_ex__(protocol)
        arguments = tuple(self._dynexec_original if argument is type(self) else argument for argument in arguments)
        swap = self._dynexec_adapter, self.placement, self._dynexec_base
        return _rebuild, (function, arguments, *swap), *state


class Converted(Swapped):
    """A block that is kept or dropped, split as an adapter says."""

    def residual_layers(self):
        return self._dynexec_adapter.residual_layers(self)

    def shortcut_layers(self):
        return self._dynexec_adapter.shortcut_layers(self)

    def activation_layer(self):
        return self._dynexec_adapter.activation_layer(self)


class ConvertedExpert(ExpertBlock, Swapped):
    """A block with a second set of weights, its submodule ``fine_tuned``."""

    def expert(self):
        return self.fine_tuned

    def train(self, mode=True):
        super().train(mode)
        if self._dynexec_adapter == "all":
            for name, child in self.named_children():
                if name != "fine_tuned":
                    child.eval()
        return self


def make_dynamic(block, adapter, base=Converted, placement=None):
    """Swap the class of ``block`` for one with ``base`` before it in its bases; return the block."""
    block.__class__ = dynamic_class(original_class(block), base)
    vars(block).update(_dynexec_adapter=adapter, placement=placement)
    return block


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
    make_dynamic(block, frozen, ConvertedExpert)
    block.fine_tuned = second
    if frozen == "all":
        block.train(block.training)


def undo(block):
    """Give a block its original class back, with only its first set of weights."""
    if isinstance(block, ConvertedExpert):
        del block.fine_tuned
    block.__class__ = block._dynexec_original
    del block._dynexec_adapter


@cache
def dynamic_class(original, base=Converted):
    """Return the class for blocks of class ``original``."""
    namespace = {"__module__": original.__module__, "_dynexec_original": original, "_dynexec_base": base}
    if hasattr(original, "__deepcopy__"):
        namespace["__deepcopy__"] = _deepcopy
    return type(f"Dynamic{original.__name__}", (base, original), namespace)


def original_class(block):
    """Return the block's original class."""
    return block._dynexec_original if isinstance(block, Swapped) else type(block)


def _deepcopy(block, memo):
    """Let the block copy itself in its own way, which may yield one of its original class, and convert the copy."""
    copied = block._dynexec_original.__deepcopy__(block, memo)
    return make_dynamic(copied, block._dynexec_adapter, block._dynexec_base, block.placement)


def _rebuild(function, arguments, adapter, placement, base):
    return make_dynamic(function(*arguments), adapter, base, placement)
