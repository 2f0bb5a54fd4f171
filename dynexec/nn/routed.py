"""Networks of dense parts, each of which runs only on the rows that decisions send to it."""

from torch import nn


class RoutedNetwork(nn.Module):
    """Base of networks that choose among parts: a backbone per frame, modalities per segment, or blocks per task.

    A part is a submodule that maps a tensor ``[rows, ...]`` to one with as many rows, each computed from its own row
    alone; rows are images, frames or segments.
    ``forward(inputs, decisions=None, *, return_decisions=False, soft_decisions=None)`` gathers the rows that each part
    needs and calls it once with all of them, or not at all if there are none. :func:`dynexec.freeze` replaces the parts
    by fast ones and leaves ``forward`` as it is, which is why parts must be called as modules. If the network decides
    by itself, it does so by ``policy.decide(inputs)``.

    ``soft_decisions`` are float weights in place of choices: everything is computed and weighted, as published code
    does in training and in evaluation. Weights of another dtype are converted to that of what they weight. Gradients
    reach them, so that a policy can be trained through them. Decisions are tested against the output of such weights.
    """

    counts_own_flops = True

    def part_names(self):
        """Return the names of the submodules that are parts, as ``get_submodule`` takes them."""
        raise NotImplementedError(f"{type(self).__name__} has no part_names")

    def example_decisions(self, inputs):
        """Return a list of decision tensors for ``inputs`` such that every part runs under at least one of them."""
        raise NotImplementedError(f"{type(self).__name__} has no example_decisions")

    def run_dense(self, inputs):
        """Compute every part on every row, without a policy, which is what ``count_flops(inputs).dense`` counts."""
        raise NotImplementedError(f"{type(self).__name__} has no run_dense")

    def check_inputs(self, inputs):
        """Raise TypeError or ValueError unless ``inputs`` are valid for the network, with at least one sample."""
        raise NotImplementedError(f"{type(self).__name__} has no check_inputs")

    def count_flops(self, inputs):
        """Count the FLOPs for ``inputs``; see :func:`dynexec.measure.count_flops`.

        Returns an object with ``dense`` (per sample, everything computed) and ``of(decisions)``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no count_flops")
