"""Networks of dense parts, each of which runs only on the rows that decisions send to it."""

from torch import nn


class RoutedNetwork(nn.Module):
    """Base of networks that choose among parts: per frame a backbone, per segment modalities, per task blocks.

    A part is a submodule that takes a tensor ``[rows, ...]`` and gives one with as many rows, each made from its own
    row alone; rows are images, frames or segments. ``forward(inputs, decisions=None, *, return_decisions=False,
    soft_decisions=None)`` gathers for each part the rows that need it, calls it once with all of them, and not at all
    where there are none. :func:`dynexec.freeze` replaces the parts by fast ones and leaves ``forward`` as it is, which
    is why parts must be called as modules. What decides, where anything does, is ``policy.decide(inputs)``.

    ``soft_decisions`` are float weights instead of choices: everything is computed and weighted, as published code
    does in training and in evaluation. Gradients reach the weights, so that a policy can be trained through them; and
    it is the reference that decisions are tested against.
    """

    counts_own_flops = True

    def part_names(self):
        """Names of the submodules that are parts, as ``get_submodule`` takes them."""
        raise NotImplementedError(f"{type(self).__name__} has no part_names")

    def example_decisions(self, inputs):
        """Decisions for ``inputs``, a list of tensors, such that every part runs under at least one of them."""
        raise NotImplementedError(f"{type(self).__name__} has no example_decisions")

    def run_dense(self, inputs):
        """Compute every part on every row, without a policy: what ``count_flops(inputs).dense`` counts."""
        raise NotImplementedError(f"{type(self).__name__} has no run_dense")

    def check_inputs(self, inputs):
        """Raise TypeError or ValueError unless ``inputs`` are what the network takes, with at least one sample."""
        raise NotImplementedError(f"{type(self).__name__} has no check_inputs")

    def count_flops(self, inputs):
        """FLOPs for ``inputs`` as an object with ``dense`` (per sample, everything computed) and ``of(decisions)``, see
        :func:`dynexec.measure.count_flops`."""
        raise NotImplementedError(f"{type(self).__name__} has no count_flops")
