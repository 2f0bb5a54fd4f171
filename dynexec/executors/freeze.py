"""``freeze``: a model of dynamic blocks as a fast inference network."""

import copy
from hashlib import sha256

import torch
from torch import fx, nn

from dynexec.executors.block import pack_module
from dynexec.executors.costs import CostCache, seconds
from dynexec.executors.memory import keep_freed_memory
from dynexec.executors.partition import pack_stages
from dynexec.executors.stage import EXECUTORS
from dynexec.nn.context import check_decisions, decide
from dynexec.nn.network import DynamicNetwork
from dynexec.nn.residual import apply_layers, dynamic_blocks
from dynexec.policy import threshold
from dynexec.route import Route

_PROOF_SAMPLES = 3


def freeze(model, example_input, *, dtype=None, executor=None, policy=None, cost_cache=None, keep_memory=True):
    """Make a fast inference network of a model with dynamic blocks; the model itself is not changed.

    BatchNorm is folded, activations and residual additions run inside the convolutions, activations are channels_last
    and the residual stream is updated in place. Consecutive blocks of one shape form a stage; how a stage runs is
    chosen per call by a cost model measured here (and cached on disk), among the executors whose output was compared
    with the original blocks' on ``example_input``. Layers that dynexec does not know run as they are.

    Parameters
    ----------
    model : nn.Module
        A converted model, a :class:`DynamicNetwork` or one of ``dynexec.models``.
    example_input : tensor ``[N, C, H, W]``
        Of the size and about the batch size that will be used; other batch sizes work as well.
    dtype : torch.dtype, optional
        Default: the model's. On a CPU float32 is the fast one; others run through plain ``F.conv2d``.
    executor : {"masked", "compact", "grouped"}, optional
        Use this one everywhere instead of choosing.
    policy : nn.Module, optional
        ``policy(images)`` gives probabilities ``[N, L]`` for calls without decisions. Default: the model's own.
    cost_cache : path, optional
        File of measured times. Default: ``~/.cache/dynexec/costs.json``.
    keep_memory : bool
        Let the process keep the memory of freed tensors for the next call, instead of giving large blocks back to the
        system and having them zeroed anew each time. A setting of glibc, for the whole process; elsewhere ignored.

    Returns
    -------
    FrozenNetwork

    Raises
    ------
    TypeError, ValueError
        If an argument is not what it should be, the model has no dynamic blocks, or its forward cannot be traced.
    RuntimeError
        If the frozen blocks' output is not the original's.
    """
    _check(model, example_input, executor)
    if keep_memory:
        keep_freed_memory()
    backbone = model
    if isinstance(model, DynamicNetwork):
        backbone, policy = model.backbone, policy if policy is not None else model.policy
    dtype = dtype or next((p.dtype for p in backbone.parameters()), torch.float32)
    backbone = copy.deepcopy(backbone).eval().requires_grad_(False).to(dtype, memory_format=torch.channels_last)
    images = example_input.detach().to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        if policy is not None:
            policy = copy.deepcopy(policy).eval().requires_grad_(False).to(dtype, memory_format=torch.channels_last)
            policy = pack_module(policy, images)
        network, stages = pack_stages(backbone, images, executor, _PROOF_SAMPLES)
        cache = CostCache(cost_cache)
        _prove_and_measure(stages, cache)
        network.delete_all_unused_submodules()  # the original blocks, needed until now
        frozen = FrozenNetwork(network.forward, [stage for stage, _, _ in stages], policy, dtype)
        frozen.samples_at_once = _measure_samples_at_once(frozen, images, cache)
    cache.save()
    return frozen


class FrozenNetwork(nn.Module):
    """What :func:`freeze` returns: ``frozen(x, decisions)`` or, with a policy, ``frozen(x)``.

    It belongs to the processor and thread count it was made on: save the original model and freeze it again.
    """

    def __init__(self, network, stages, policy, dtype):
        super().__init__()
        self.network, self.policy, self.dtype = network, policy, dtype
        self.stages = tuple(stages)
        self.num_blocks = sum(len(stage.blocks) for stage in stages)
        self.samples_at_once = None

    @torch.no_grad()
    def forward(self, x, decisions=None, *, return_decisions=False):
        """Run the network on the blocks that the decisions keep, without gradients.

        Parameters
        ----------
        x : float tensor ``[N, C, H, W]``
        decisions : bool tensor ``[N, L]`` or ``[L]``, optional
            None: the policy decides, keeping a block where its probability is at least 0.5.
        return_decisions : bool
            Also return the decisions, bool ``[N, L]``.
        """
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        if decisions is None:
            if self.policy is None:
                raise ValueError(f"decisions is None, but there is no policy: give bool [N, {self.num_blocks}]")
            decisions = threshold(self.policy(x))
        decisions = self._check_decisions(decisions, x)
        parts = list(zip(*self._split(x, decisions), strict=True))
        y = self.run(*parts[0]) if len(parts) == 1 else torch.cat([self.run(*part) for part in parts])
        return (y, decisions) if return_decisions else y

    def run(self, x, decisions):
        """The whole batch at once: ``x`` channels_last in the network's dtype, ``decisions`` bool ``[N, L]``."""
        return self.network(x, Route.from_decisions(decisions))

    def _split(self, *tensors):
        size = self.samples_at_once or max(len(tensors[0]), 1)
        return [tensor.split(size) for tensor in tensors]

    def _check_decisions(self, decisions, x):
        decisions = check_decisions(decisions)
        expected = (len(x), self.num_blocks)
        if tuple(decisions.shape) not in (expected, expected[1:]):
            raise ValueError(
                f"decisions must be bool [{expected[0]}, {expected[1]}] or [{expected[1]}] for this batch and network, "
                f"got {tuple(decisions.shape)}"
            )
        if decisions.device != x.device:
            raise ValueError(f"decisions is on {decisions.device}, but x is on {x.device}: move it there")
        return decisions.expand(expected)

    def predict_losses(self, decisions):
        """Where time is expected to be lost against dense speed on the kept rows: seconds by cause.

        The causes are those of the executors that would be chosen for ``decisions``, bool ``[N, L]``.
        """
        routes = [Route.from_decisions(part) for part in self._split(decisions)[0]]
        found = [stage.predict_losses(route) for route in routes for stage in self.stages]
        return {cause: sum(losses[cause] for losses in found) for cause in found[0]}

    def explain(self):
        """What runs where and why, as text: stages, executors with their measured costs, what was refused."""
        lines = [
            f"{self.num_blocks} blocks in {len(self.stages)} stages, {self.dtype}, "
            f"{self.samples_at_once or 'all'} samples at once, policy: {self._policy_name()}"
        ]
        for stage in self.stages:
            lines += stage.explain()
        return "\n".join(lines)

    def _policy_name(self):
        if self.policy is None:
            return "none, decisions must be given"
        return "packed" if isinstance(getattr(self.policy, "__self__", None), fx.GraphModule) else "as it is"

    def __getstate__(self):
        raise TypeError("a FrozenNetwork cannot be pickled or copied: save the original model and freeze it again")


def _check(model, example_input, executor):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not any(block.placement for block in dynamic_blocks(model)):
        raise ValueError("model has no dynamic blocks: call dynexec.convert(model) first")
    if not isinstance(example_input, torch.Tensor) or example_input.dim() != 4 or len(example_input) == 0:
        shape = tuple(example_input.shape) if isinstance(example_input, torch.Tensor) else type(example_input).__name__
        raise ValueError(f"example_input must be a tensor [N, C, H, W] with N >= 1, got {shape}")
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers(), example_input)}
    if devices != {torch.device("cpu")}:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"freeze runs on the CPU so far, not on {found}, where model and example_input are")
    if executor is not None and executor not in EXECUTORS:
        raise ValueError(f"executor must be None or one of {sorted(EXECUTORS)}, got {executor!r}")


def _prove_and_measure(stages, cache):
    """Compare every executor of every stage with the original blocks, then measure what its blocks cost."""
    generator = torch.Generator().manual_seed(0)
    total = sum(len(stage.blocks) for stage, _, _ in stages)
    for stage, originals, x in stages:
        x = x.repeat(-(-_PROOF_SAMPLES // len(x)), 1, 1, 1)[:_PROOF_SAMPLES].contiguous(
            memory_format=torch.channels_last
        )
        for keep in (0.5, 1.0):
            decisions = torch.rand(len(x), total, generator=generator) < keep
            decisions[1] = decisions[0]  # two samples that agree, for the grouped executor
            with decide(decisions):
                reference = apply_layers(originals, x)
            stage.prove(x, Route.from_decisions(decisions), reference)
        stage.measure(cache)


def _measure_samples_at_once(frozen, images, cache):
    """The number of samples that go through the network fastest, per sample; None: as many as there are.

    Large activations are slow: they leave the caches, and the system hands out and takes back their memory every time.
    """
    n = len(images)
    decisions = torch.rand(n, frozen.num_blocks, generator=torch.Generator().manual_seed(0)) < 0.5
    sizes = [2**i for i in range(n.bit_length()) if 2**i < n]
    if not sizes or not _splits(frozen, images, decisions, sizes[-1]):
        return None
    signature = " ".join(block.signature for stage in frozen.stages for block in stage.blocks)
    key = cache.key("samples at once", sha256(signature.encode()).hexdigest(), tuple(images.shape), frozen.dtype)
    if key not in cache.entries:
        per_sample = {
            size: seconds(lambda size=size: frozen.run(images[:size], decisions[:size])) / size for size in (*sizes, n)
        }
        fastest = min(per_sample.values())
        cache.entries[key] = max(size for size in per_sample if per_sample[size] <= 1.03 * fastest)
    best = cache.entries[key]
    return best if best < n else None


def _splits(frozen, images, decisions, size):
    """Whether the network gives for a batch what it gives for its parts, in one tensor."""
    whole = frozen.run(images, decisions)
    if not isinstance(whole, torch.Tensor) or whole.dim() == 0 or len(whole) != len(images):
        return False
    parts = [frozen.run(*part) for part in zip(images.split(size), decisions.split(size), strict=True)]
    return float((torch.cat(parts) - whole).abs().max()) <= 1e-4 * float(whole.abs().max())
