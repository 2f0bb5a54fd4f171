"""The inference network that ``freeze`` builds from a :class:`dynexec.nn.RoutedNetwork`."""

import copy
from functools import partial

import torch
from torch import fx, nn

from dynexec import dispatch
from dynexec.executors.function import freeze_function
from dynexec.executors.graphs import Graphs
from dynexec.executors.profile import check_rounds
from dynexec.executors.proof import is_rounding, relative_error, tolerance
from dynexec.executors.routed_profile import profile_routed
from dynexec.nn.batch_norm import uses_batch_statistics
from dynexec.ops import counted


class FrozenRouted(nn.Module):
    """A routed network with frozen parts: ``frozen(inputs, decisions)``; without decisions its policy decides."""

    def __init__(self, network, dtype, device):
        super().__init__()
        self.network, self.dtype, self.device = network, dtype, device

    @torch.no_grad()
    def forward(self, inputs, decisions=None, **options):
        """Run the network's own forward, without gradients; ``options`` are its other arguments.

        Inputs of another floating-point type are converted, and autocast has no effect.
        """
        self._check(inputs)
        with dispatch.for_frozen(self.device):
            return self.network(convert_inputs(inputs, self.dtype), decisions, **options)

    @torch.no_grad()
    def profile(self, inputs, decisions=None, *, rounds=20):
        """Measure where the time of a call goes: per part, in the policy, between parts, and what is lost by cause.

        Parameters
        ----------
        inputs, decisions
            As for :meth:`forward`; at least one sample.
        rounds : int
            Number of rounds of four measurements each: an ordinary call and a recorded one, with these decisions and of
            :meth:`RoutedNetwork.run_dense`. The least of each time counts, since noise only ever adds.

        Returns
        -------
        dynexec.measure.Profile
            Prints as a table. No other thread may call the network meanwhile.

        Raises
        ------
        ValueError
            Also if ``rounds`` is not a positive int.
        """
        check_rounds(rounds)
        self._check(inputs)
        inputs = convert_inputs(inputs, self.dtype)
        if (samples := len(tensors_of(inputs)[0])) == 0:
            raise ValueError("inputs must hold at least one sample to profile, got a batch of 0")
        with dispatch.for_frozen(self.device):
            return profile_routed(self.network, inputs, decisions, samples, rounds, self.device, self.dtype)

    def _check(self, inputs):
        for tensor in tensors_of(inputs):
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise TypeError(f"inputs must be of floating-point tensors, got {kind}")
            if tensor.device != self.device:
                raise ValueError(f"inputs are on {tensor.device}, but the network was frozen on {self.device}")

    def train(self, mode=True):
        """Stay in evaluation mode, whatever a parent module does."""
        return super().train(False)

    def explain(self):
        """Describe as text what runs each part."""
        parts = {name: self.network.get_submodule(name) for name in self.network.part_names()}
        return "\n".join(f"{name}: {part.explain()}" for name, part in parts.items())

    def __getstate__(self):
        raise TypeError("a FrozenRouted cannot be pickled or copied: save the original model by dynexec.save")


# Numbers of rows that a part has graphs for.
_BUCKETS = 8


class FrozenPart(nn.Module):
    """A part as returned by :func:`freeze_function`; ``run`` calls it, possibly in graphs."""

    def __init__(self, function, note, run=None):
        super().__init__()
        self.function, self.note, self.run = function, note, run or function

    def forward(self, x):
        return self.run(x)

    def explain(self):
        """Describe as text what runs the part."""
        in_graphs = ""
        if isinstance(self.run, InGraphs):
            failed = next(iter(self.run.graphs.failed.values()), None)
            in_graphs = ", in CUDA graphs" if failed is None else f", without CUDA graphs: {failed}"
        note = f" ({self.note})" if self.note is not None else ""
        return self._explain_function() + in_graphs + note

    def _explain_function(self):
        module = getattr(self.function, "__self__", None)
        if not isinstance(module, fx.GraphModule):
            return "as it is"
        calls = [node.target for node in module.graph.nodes if node.op == "call_function"]
        segments = [call for call in calls if hasattr(call, "programs")]
        if not segments:
            return "by layer"
        instructions = counted(sum(len(segment.operations) for segment in segments), "instruction")
        others = counted(len(calls) - len(segments), "other layer")
        return f"{counted(len(segments), 'segment')} of {instructions}, {others}"


class InGraphs:
    """A part in CUDA graphs, since launching its layers one by one takes the host longer than they run.

    Only the decisions tell how many rows there are. There are graphs for one eighth of ``most``, two eighths and so on;
    the rows are padded with zeros to the size of a graph.
    """

    def __init__(self, function, most):
        self.function, self.step = function, -(-most // _BUCKETS)
        self.graphs = Graphs(lambda x, _: function(x))

    def __call__(self, x):
        rows = len(x)
        if rows == 0:
            return self.function(x)
        if more := -rows % self.step:
            x = torch.cat([x, x.new_zeros(more, *x.shape[1:])])
        return self.graphs(x, None, "rows")[:rows]


def freeze_routed(model, inputs, dtype, executor, backend, cache):
    """Freeze a routed network; see :func:`dynexec.freeze`."""
    dtype = dtype or next((p.dtype for p in model.parameters()), torch.float32)
    network = copy.deepcopy(model).eval().requires_grad_(False).to(dtype, memory_format=torch.channels_last)
    inputs = convert_inputs(inputs, dtype)
    device = next(iter(tensors_of(inputs))).device
    cases = []
    with dispatch.for_frozen(device):
        examples = {}
        hooks = [
            network.get_submodule(name).register_forward_pre_hook(_record(examples, name), with_kwargs=True)
            for name in network.part_names()
        ]
        for decisions in network.example_decisions(inputs):
            cases.append((decisions, network(inputs, decisions)))
        for hook in hooks:
            hook.remove()
        for name in network.part_names():
            if name not in examples:
                raise RuntimeError(f"model cannot be frozen: no example decisions reach its part {name}")
            part, example = network.get_submodule(name), examples.pop(name)
            graphs = device.type == "cuda" and not uses_batch_statistics(part)  # there rows of zeros are added
            function, note = freeze_function(part, example, executor, backend, cache, in_graph=graphs)
            run = InGraphs(function, len(example)) if graphs else None
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, FrozenPart(function, note, run))
        for decisions, expected in cases:
            actual = network(inputs, decisions)
            error = relative_error(actual, expected)
            exactly = partial(_run_exactly, model, inputs, decisions)
            if not error <= tolerance(dtype, device) and not is_rounding(actual, expected, exactly):
                raise RuntimeError(f"model cannot be frozen: its output differs by {error:.1e} of the largest value")
    return FrozenRouted(network, dtype, device)


def _run_exactly(model, inputs, decisions):
    return copy.deepcopy(model).eval().double()(convert_inputs(inputs, torch.float64), decisions)


def _record(examples, name):
    def hook(part, arguments, options):
        if options or len(arguments) != 1 or not isinstance(arguments[0], torch.Tensor):
            raise ValueError(f"a network's forward must call its part {name!r} with one tensor, by position")
        (x,) = arguments
        examples.setdefault(name, x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x)

    return hook


def tensors_of(inputs):
    """Return the tensors of a network's input: the input itself, or the values of a dict."""
    return list(inputs.values()) if isinstance(inputs, dict) else [inputs]


def convert_inputs(inputs, dtype=None, device=None):
    """Return the input with its tensors in ``dtype`` and on ``device``; None: unchanged."""
    if isinstance(inputs, dict):
        return {name: value.to(dtype=dtype, device=device) for name, value in inputs.items()}
    return inputs.to(dtype=dtype, device=device)
