"""A network's outputs for some inputs, to compare with its outputs where it is loaded."""

import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils._pytree import tree_leaves, tree_map

from dynexec import dispatch
from dynexec.deployment.network import num_columns
from dynexec.executors.candidate import halves
from dynexec.executors.proof import is_rounding, relative_error
from dynexec.executors.routed import convert_inputs, tensors_of
from dynexec.nn import RoutedNetwork

_SAMPLES = 8  # of the example input that are kept
_without_autocast = dispatch.for_frozen(torch.device("cpu"))
_MARGIN = 0.01


@dataclass
class Example:
    """Inputs, decisions, and the outputs of the network on the CPU when it was saved.

    Attributes
    ----------
    inputs : tensor or dict of tensors
    decisions : list of tensors
    outputs : list of lists of tensors
        For each of the decisions, the tensors of the output, whatever its structure.
    decided, sure : tensors or None
        The policy's decisions, and where slightly larger or smaller inputs do not change them: elsewhere another
        processor's rounding might.
    """

    inputs: object
    decisions: list
    outputs: list
    decided: torch.Tensor | None = None
    sure: torch.Tensor | None = None

    @classmethod
    @_without_autocast
    @torch.no_grad()
    def record(cls, net, inputs, error):
        """Run a network on the first of its inputs. ``error`` is the relative error allowed where it is loaded."""
        net = copy.deepcopy(net).cpu().eval()
        dtype = next((p.dtype for p in net.parameters()), torch.float32)
        inputs = tree_map(lambda tensor: tensor[:_SAMPLES].detach().cpu().to(dtype), inputs)
        routed, blocks = isinstance(net, RoutedNetwork), num_columns(net)
        if routed:
            decisions = net.example_decisions(inputs)
        else:
            decisions = [halves(len(inputs), blocks), torch.ones(len(inputs), blocks, dtype=torch.bool)]
        example = cls(inputs, decisions, [_leaves(net(inputs, one)) for one in decisions])
        if routed or net.policy is not None:
            factors = [1 + sign * max(_MARGIN, error) for sign in (-1, 0, 1)]
            less, decided, more = (net(_scale(inputs, factor), return_decisions=True)[1] for factor in factors)
            example.decided, example.sure = decided, (less == decided) & (more == decided)
        return example

    @_without_autocast
    @torch.no_grad()
    def misfit(self, net):
        """Return why the example cannot have been recorded from ``net``, which is on the CPU, or None."""
        if not all(bool(tensor.isfinite().all()) for tensor in tensors_of(self.inputs)):
            return "its inputs hold NaN or infinity"
        try:
            for decisions in self.decisions:
                net(self.inputs, decisions)
            decided = None if self.decided is None else net(self.inputs, return_decisions=True)[1]
        except Exception as error:  # of any layer, on what may be anything
            return f"it cannot be run on these inputs and decisions: {error}"
        shapes = [tuple(tensor.shape) for tensor in (decided, self.decided, self.sure) if tensor is not None]
        return f"shapes of what the policy decides differ: {shapes}" if len(set(shapes)) > 1 else None

    @_without_autocast
    def difference(self, frozen, net, most):
        """Return how ``frozen``, made from ``net``, differs by more than ``most`` from what was recorded, or None."""
        inputs = convert_inputs(self.inputs, device=frozen.device)
        for number, (decisions, expected) in enumerate(zip(self.decisions, self.outputs)):
            actual = _leaves(frozen(inputs, decisions.to(frozen.device)))
            error = relative_error(actual, expected)
            if not error <= most and not self._are_roundings(net, decisions, actual, expected):
                return f"under its decisions {number} the output differs by {error:.1e} of the largest value"
        if self.decided is None:
            return None
        wrong = (frozen(inputs, return_decisions=True)[1].cpu() != self.decided) & self.sure.bool()
        return f"the policy decides otherwise {int(wrong.sum())} times of {wrong.numel()}" if wrong.any() else None

    def _are_roundings(self, net, decisions, *outputs):
        """Whether outputs differ from those that the network gives here on the CPU only as rounding affects it."""
        net = copy.deepcopy(net).cpu()
        with torch.no_grad():
            own = _leaves(net(self.inputs, decisions))
        return all(is_rounding(output, own, partial(self._run_exactly, net, decisions)) for output in outputs)

    @torch.no_grad()
    def _run_exactly(self, net, decisions):
        return _leaves(net.double()(convert_inputs(self.inputs, torch.float64), decisions))

    def tile(self, samples, device):
        """Return the inputs, repeated to ``samples`` samples, on ``device``."""
        return tree_map(lambda x: x[torch.arange(samples) % len(x)].to(device), self.inputs)

    def tensors(self):
        """Return all tensors of the example, by name."""
        inputs = self.inputs if isinstance(self.inputs, dict) else {"": self.inputs}
        found = {f"inputs.{name}": value for name, value in inputs.items()}
        for number, (decisions, outputs) in enumerate(zip(self.decisions, self.outputs)):
            found[f"decisions.{number}"] = decisions
            found |= {f"outputs.{number}.{place}": value for place, value in enumerate(outputs)}
        if self.decided is not None:
            found |= {"decided": self.decided, "sure": self.sure}
        return found

    @classmethod
    def from_tensors(cls, tensors):
        """Rebuild the example from the result of :meth:`tensors`; KeyError if one is missing."""
        inputs = {name.removeprefix("inputs."): value for name, value in tensors.items() if name.startswith("inputs.")}
        decisions = _numbered(tensors, "decisions")
        outputs = [_numbered(tensors, f"outputs.{number}") for number in range(len(decisions))]
        own = {name: tensors[name] for name in ("decided", "sure") if "decided" in tensors}
        example = cls(inputs.get("", inputs), decisions, outputs, **own)
        empty = any(x.dim() == 0 or len(x) == 0 for x in inputs.values())
        if not inputs or empty or not all((decisions, *outputs)):
            raise KeyError("inputs, decisions or outputs")
        return example


def _leaves(output):
    """Return the tensors of an output, as a list."""
    leaves = tree_leaves(output)
    if wrong := [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, torch.Tensor)]:
        raise TypeError(f"model must give tensors, or lists, tuples or dicts of them, got {wrong[0]}")
    return [leaf.cpu() for leaf in leaves]


def _scale(inputs, factor):
    return inputs if factor == 1 else tree_map(lambda tensor: tensor * factor, inputs)


def _numbered(tensors, name):
    found = []
    while f"{name}.{len(found)}" in tensors:
        found.append(tensors[f"{name}.{len(found)}"])
    return found
