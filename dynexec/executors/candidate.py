"""The network as a backend's programs run it: whether it gives the same, in CUDA graphs too, and how fast it is."""

from functools import partial
from hashlib import sha256

import torch

from dynexec.executors.costs import device_name, seconds
from dynexec.executors.frozen import FrozenNetwork
from dynexec.executors.graphs import Graphs
from dynexec.executors.proof import relative_error, tolerance
from dynexec.executors.segment import make_segments


def try_backend(backend, network, layers, proof, executor):
    """The network with the backend's segments, or why there is none."""
    if backend.missing is not None:
        return None, backend.missing
    try:
        module, segments = make_segments(network, partial(backend.programs, layers.num_blocks))
    except ValueError as error:
        return None, str(error)
    if not segments:
        return None, "it knows none of the layers"
    taken = {stage for segment in segments for stage in segment.stages}
    left = [stage for stage in layers.stages if stage not in taken]
    like = layers.num_blocks, layers.dtype, layers.device
    fast = FrozenNetwork(module.forward, left, segments, *like, backend)
    for name in backend.executors if executor is None else (executor,):
        fast.use(name)
        try:
            # The whole batch, too: it has other tiles than a few samples.
            reason = proof.difference(fast) or _disagreement(fast, layers, proof.images)
        except Exception as error:  # a kernel that does not compile, or fails: then layers are there
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            return None, reason if executor else f"{name}: {reason}"
    if layers.device.type == "cuda" and not left:
        _use_graphs(fast, proof.images)
    return fast, None


def _disagreement(fast, layers, images):
    """How two ways to run differ on all images and blocks, or None."""
    if images.device.type == "cpu":
        return None  # the engine does the same for any batch
    decisions = torch.ones(len(images), fast.num_blocks, dtype=torch.bool, device=images.device)
    error = relative_error(fast.run(images, decisions), layers.run(images, decisions))
    return None if error <= 2 * tolerance(fast.dtype, images.device) else f"the whole batch differs by {error:.1e}"


def _use_graphs(fast, images):
    """Let a network run as CUDA graphs if the whole batch can and gives the same."""
    decisions = torch.ones(len(images), fast.num_blocks, dtype=torch.bool, device=images.device)
    expected = fast.run(images, decisions)
    try:
        fast.graphs = Graphs(fast.compute, images.device)
        error = relative_error(fast.call(images, decisions)[0], expected)
        reason = None if error <= tolerance(fast.dtype, images.device) else f"its output differs by {error:.1e}"
    except Exception as problem:  # something that waits for the device, or is no tensor
        reason = f"{type(problem).__name__}: {problem}"
    if reason is not None:
        fast.graphs = None
        fast.notes.append(f"no CUDA graphs: {reason}")


def race(fast, layers, images, cache):
    """Seconds of every way to run: the images once with half of the blocks and once with all."""
    generator = torch.Generator().manual_seed(0)
    shape = len(images), layers.num_blocks
    keeps = [(torch.rand(shape, generator=generator) < keep).to(images.device) for keep in (0.5, 1.0)]
    # Fewer samples than threads are shared by all of them in any case.
    several = 1 < torch.get_num_threads() <= len(images)
    names = [name for name, options in fast.backend.executors.items() if several or not options.get("together")]
    names.append("layers")

    def measure(name):
        network = layers if name == "layers" else fast
        if network is fast:
            fast.use(name)
        return sum(seconds(lambda d=d: network.call(images, d), images.device) for d in keeps)

    parts = [part for network in (fast, layers) for part in (*network.segments, *network.stages)]
    signature = " ".join(part.signature for part in parts)
    key = cache.key("race", digest(signature), tuple(images.shape), layers.dtype, *device_name(images.device))
    return cache.get(key, are_times(names), lambda: {name: measure(name) for name in names})


def are_times(names):
    """A check of an entry of the cost cache: positive seconds for these names."""
    return lambda entry: (
        isinstance(entry, dict)
        and entry.keys() == set(names)
        and all(isinstance(time, float) and time > 0 for time in entry.values())
    )


def digest(value):
    return sha256(str(value).encode()).hexdigest()
