"""``freeze``: turns a model with dynamic blocks into a fast inference network."""

import copy

import torch
from torch import nn

from dynexec import dispatch
from dynexec.executors.backends import choose_backend
from dynexec.executors.candidate import halves, race, try_backend
from dynexec.executors.costs import CostCache, device_name, digest, seconds
from dynexec.executors.frozen import FrozenNetwork
from dynexec.executors.function import freeze_function
from dynexec.executors.memory import keep_freed_memory
from dynexec.executors.partition import pack_stages
from dynexec.executors.proof import PROOF_SAMPLES, TOLERANCE, Proof, relative_error
from dynexec.executors.routed import FrozenRouted, freeze_routed, tensors_of
from dynexec.executors.stage import EXECUTORS
from dynexec.nn.batch_norm import batch_norms
from dynexec.nn.context import decide, undecided
from dynexec.nn.network import DynamicNetwork
from dynexec.nn.residual import DynamicBlock, apply_layers, dynamic_blocks
from dynexec.nn.routed import RoutedNetwork
from dynexec.route import Route


@torch.no_grad()
@undecided()
def freeze(
    model,
    example_input,
    *,
    dtype=None,
    executor=None,
    policy=None,
    winograd=True,
    batch_invariant=False,
    cost_cache=None,
    measure=True,
    keep_memory=True,
):
    """Build a fast inference network from a model with dynamic blocks; the model itself is not changed.

    BatchNorm is folded, activations and residual additions run inside the convolutions, activations are channels_last
    and the residual stream is updated in place. Several ways to run the network are built, compared with the original
    model on ``example_input`` and timed; the fastest is used (times are cached on disk):

    * On a CPU, the engine: native code that runs all layers it supports, usually the whole network, in one call.
      ``resident``: each thread takes a few samples at a time through all layers, while their activations stay in its
      cache. ``fused``: all threads share one layer after the other. Dropped blocks are skipped; no rows are moved.
    * On a GPU, Triton kernels (``fused``) that read and write the kept samples in place. Only the device knows how many
      these are, so the host never waits, and the whole forward, policy and planning included, is one CUDA graph per
      input shape. ``dense`` computes all samples by cuDNN up to a block's last convolution, or including it, if it is
      long, and copies the dropped samples back; ``switched`` is ``dense`` or ``fused``, chosen on the device by how
      many samples keep the blocks, or a static network where all do; ``conditional`` is ``fused`` with a node around
      every block, tried for very few samples; ``resident`` is one kernel that takes a sample through a whole network,
      for images of up to 32 pixels, in 16 bits.
    * Layers: the library's convolutions, on a CPU oneDNN's fused ones. Consecutive blocks of one shape form a stage,
      and a cost model chooses per stage and call among ``masked`` (compute all, put dropped ones back), ``compact``
      (gather, compute, scatter) and ``grouped`` (samples with equal decisions share a static sub-network).

    Layers that none of these support run as they are. In a :class:`dynexec.nn.RoutedNetwork` (AdaShare, AR-Net, AdaMML,
    feature sharing) each part is replaced: on a CPU by the faster of the engine and layers, on a GPU by the kernels if
    they can run it, else by layers. The forward stays.

    Parameters
    ----------
    model : nn.Module
        A converted model, a :class:`DynamicNetwork`, a RoutedNetwork, or one of ``dynexec.models``.
    example_input : tensor ``[N, C, H, W]``, or the input of a RoutedNetwork
        With the image size and about the batch size that will be used; other batch sizes work as well.
    dtype : torch.dtype, optional
        Default: the model's. On a CPU float32 is the fast one; others run through plain ``F.conv2d``. On a GPU float16
        and bfloat16 are fast, and float32 uses TF32 if ``torch.backends.cudnn.allow_tf32`` is set.
    executor : str, optional
        Use this one everywhere instead of choosing: "resident" or "fused", on a GPU also "dense", "switched" or
        "conditional"; layer by layer "masked", "compact" or "grouped".
    policy : nn.Module, optional
        ``policy(images)`` returns probabilities ``[N, L]`` for calls without decisions. Default: the model's own.
    winograd : bool
        Whether the engine may compute 3x3 convolutions by Winograd's F(4x4, 3x3) (Lavin and Gray, 2016): up to three
        times as fast, with larger rounding errors, still around 1e-6 of the largest value. An infinity becomes NaN in
        its neighbourhood.
    batch_invariant : bool
        Whether with the executor ``fused`` on a GPU a sample's result must not depend, even by rounding, on which other
        samples keep its blocks; costs time where few do. It holds for one batch size, since cuDNN's algorithms differ.
        On a CPU the engine's results never depend on it.
    cost_cache : path, optional
        File of measured times. Default: ``~/.cache/dynexec/costs.json``.
    measure : bool
        Whether to measure times that are not in the file. False pins every choice to the file: a missing time is a
        ValueError, and freezing the model with the same file on a machine of the same kind gives the same network.
    keep_memory : bool
        Let the process keep the memory of freed tensors for the next call, instead of returning large blocks to the
        system and having them zeroed each time. A setting of glibc, for the whole process; ignored elsewhere.

    Returns
    -------
    FrozenNetwork, or FrozenRouted for a RoutedNetwork

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, the model has no dynamic blocks, or its forward cannot be traced.
    RuntimeError
        If the frozen network's output is not the original's, or ``executor`` cannot run the network.
    """
    flags = {"winograd": winograd, "batch_invariant": batch_invariant, "measure": measure, "keep_memory": keep_memory}
    device = check_arguments(model, example_input, dtype, policy, **flags)
    backend = choose_backend(device, winograd, batch_invariant)
    known = sorted((*EXECUTORS, *backend.executors))
    if executor is not None and executor not in known:
        raise ValueError(f"executor must be None or one of {known} on {device.type}, got {executor!r}")
    if keep_memory:
        keep_freed_memory()
    cache = CostCache(cost_cache, measure)
    if isinstance(model, RoutedNetwork):
        frozen = freeze_routed(model, example_input, dtype, executor, backend, cache)
        cache.save()
        return frozen
    backbone = model
    if isinstance(model, DynamicNetwork):
        backbone, policy = model.backbone, policy if policy is not None else model.policy
    dtype = dtype or next((p.dtype for p in backbone.parameters()), torch.float32)
    backbone = copy.deepcopy(backbone).eval().requires_grad_(False).to(dtype, memory_format=torch.channels_last)
    images = example_input.detach().to(dtype).contiguous(memory_format=torch.channels_last)
    with dispatch.for_frozen(device):
        if policy is not None:
            policy = copy.deepcopy(policy).eval().requires_grad_(False).to(dtype, memory_format=torch.channels_last)
            in_graph = backend.plans  # there kernels run in a graph
            policy, note = freeze_function(policy, images, executor, backend, cache, in_graph=in_graph)
        frozen = _freeze_backbone(backbone, images, executor, backend, cache)
    frozen.policy = policy
    if policy is not None:
        if note is not None:
            frozen.notes.append(f"policy: {note}")
        with dispatch.for_frozen(device):
            frozen.prove_one_launch(images)
            if frozen.graphs is not None:
                frozen.call(images, None)
    cache.save()
    return frozen


def _freeze_backbone(backbone, images, executor, backend, cache):
    by_layer = executor if executor in EXECUTORS else None
    network, stages = pack_stages(backbone, images, by_layer, PROOF_SAMPLES)
    columns = sum(len(stage.blocks) for stage, _, _ in stages)
    like = columns, images.dtype, images.device
    layers = FrozenNetwork(network.forward, [stage for stage, _, _ in stages], [], *like)
    proof = Proof(backbone, images, columns)
    if executor not in backend.executors:
        _prove_and_measure(stages, cache)
        if (reason := proof.difference(layers)) is not None:
            raise RuntimeError(f"model cannot be frozen: {reason}; does it have hooks, or change tensors in place?")
        layers.samples_at_once = _measure_samples_at_once(layers, images, cache)
    fast, reason = None, f"executor is {executor!r}"
    if by_layer is None:
        fast, reason = try_backend(backend, network, layers, proof, images, executor, cache)
    if executor in backend.executors:
        if reason is not None:
            raise RuntimeError(f"executor {executor!r} cannot run this network: {reason}")
        return fast.keep_only()
    if fast is None:
        layers.notes.append(f"{backend.name} not used: {reason}")
        return layers.keep_only()
    times = race(fast, layers, images, cache)
    fastest = min(times, key=times.get)
    chosen = layers if fastest == "layers" else fast
    if chosen is fast:
        fast.use(fastest)
    else:
        layers.notes += fast.notes + fast.graph_notes()
        fast.graphs = None  # and their memory
    expected = {name: f" ({1e3 * seconds:.2f} expected)" for name, seconds in fast.expected.items()}
    compared = ", ".join(f"{name} {1e3 * times[name]:.2f} ms{expected.get(name, '')}" for name in times)
    chosen.notes.append(f"batch {len(images)}, keep 0.5 and 1 together: {compared} (measured) -> {fastest}")
    return chosen.keep_only()


def check_arguments(model, example_input, dtype=None, policy=None, **flags):
    """Return the device of a model and its example input; TypeError or ValueError if :func:`freeze` refuses them.

    ``flags`` are its other arguments that are True or False.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, (FrozenNetwork, FrozenRouted)):
        raise TypeError(f"model must be the original one, got a {type(model).__name__}, which freeze made of it")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(f"model must be the network itself, got {type(model).__name__}: pass model.module")
    if isinstance(model, RoutedNetwork):
        if policy is not None:
            raise ValueError("policy must be None for a network that has its own")
        model.check_inputs(example_input)
    elif not any(block.placement for block in dynamic_blocks(model)):
        raise ValueError("model has no dynamic blocks: call dynexec.convert(model) first")
    elif not isinstance(example_input, torch.Tensor) or example_input.dim() != 4 or len(example_input) == 0:
        shape = tuple(example_input.shape) if isinstance(example_input, torch.Tensor) else type(example_input).__name__
        raise ValueError(f"example_input must be a tensor [N, C, H, W] with N >= 1, got {shape}")
    kinds = {tensor.dtype for tensor in tensors_of(example_input) if not tensor.is_floating_point()}
    if kinds:
        raise TypeError(f"example_input must be of floating-point numbers, got {', '.join(map(str, kinds))}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    if policy is not None and not isinstance(policy, nn.Module):
        raise TypeError(f"policy must be an nn.Module, got {type(policy).__name__}")
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers(), *tensors_of(example_input))}
    if len(devices) > 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"model and example_input must be on one device, the CPU or a GPU, got {found}")
    for tensor in tensors_of(example_input):
        if not bool(tensor.isfinite().all()):
            raise ValueError("example_input must be finite, as outputs for it are compared; it holds NaN or infinity")
    _check_batch_norm(model)
    return next(iter(devices))


def _check_batch_norm(model):
    for name, block in model.named_modules():
        if isinstance(block, DynamicBlock) and any(norm.running_mean is None for norm in batch_norms(block)):
            where = f"block {name!r}" if name else "the model itself"
            raise ValueError(
                f"model cannot be frozen: a BatchNorm of {where} has no running statistics "
                "(track_running_stats=False), so what a sample becomes depends on the others"
            )


def _prove_and_measure(stages, cache):
    """Compare every executor of every stage with the original blocks, then measure the cost of its blocks."""
    generator = torch.Generator().manual_seed(0)
    total = sum(len(stage.blocks) for stage, _, _ in stages)
    for stage, originals, x in stages:
        x = x.repeat(-(-PROOF_SAMPLES // len(x)), 1, 1, 1)[:PROOF_SAMPLES].contiguous(memory_format=torch.channels_last)
        for keep in (0.5, 1.0):
            decisions = torch.rand(len(x), total, generator=generator) < keep
            decisions[1] = decisions[0]  # two samples that agree, for the grouped executor
            decisions[2:] &= keep == 1.0  # and one that keeps nothing, beside others
            decisions = decisions.to(x.device)
            with decide(decisions):
                reference = apply_layers(originals, x)
            stage.prove(x, Route.from_decisions(decisions), reference)
        stage.measure(cache)


def _measure_samples_at_once(frozen, images, cache):
    """Return the number of samples that go through the network fastest, per sample; None for the whole batch.

    Large activations are slow: they leave the caches, and the system allocates and frees their memory every time.
    """
    n = len(images)
    decisions = halves(n, frozen.num_blocks).to(images.device)
    sizes = [2**i for i in range(n.bit_length()) if 2**i < n]
    if not sizes or not _splits(frozen, images, decisions, sizes[-1]):
        return None
    signature = " ".join(stage.signature for stage in frozen.stages)
    key = cache.key(
        "samples at once", digest(signature), tuple(images.shape), frozen.dtype, *device_name(images.device)
    )

    def measure():
        per_sample = {
            size: seconds(lambda size=size: frozen.run(images[:size], decisions[:size]), images.device) / size
            for size in (*sizes, n)
        }
        fastest = min(per_sample.values())
        return max(size for size in per_sample if per_sample[size] <= 1.03 * fastest)

    best = cache.get(key, lambda entry: type(entry) is int and entry in (*sizes, n), measure)
    return best if best < n else None


def _splits(frozen, images, decisions, size):
    """Whether the network gives the same for a batch as for its parts, in one tensor."""
    whole = frozen.run(images, decisions)
    if not isinstance(whole, torch.Tensor) or whole.dim() == 0 or len(whole) != len(images):
        return False
    parts = [frozen.run(*part) for part in zip(images.split(size), decisions.split(size), strict=True)]
    return relative_error(torch.cat(parts), whole) <= TOLERANCE[frozen.dtype]
