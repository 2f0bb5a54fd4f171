"""The network as run by a backend's programs: whether its output is right, in CUDA graphs too, and how fast it is."""

from functools import partial

import torch

from dynexec.executors.conditional import conditional_missing
from dynexec.executors.costs import MissingTime, are_times, device_name, digest, seconds
from dynexec.executors.frozen import FrozenNetwork
from dynexec.executors.graphs import Graphs, choosing_algorithms
from dynexec.executors.segment import listed, make_segments

# Shares of blocks that are kept, at which ``dense`` and ``fused`` are compared for ``switched``.
_SHARES = tuple(number / 8 for number in range(1, 9))
# An executor that is expected to take so many times as long as the best one that works is not tried.
_HOPELESS = 2.0


def try_backend(backend, network, layers, proof, images, executor, cache):
    """Return (the network with the backend's segments, None), or (None, why there is none)."""
    if backend.missing is not None:
        return None, backend.missing
    try:
        module, segments = make_segments(network, partial(backend.programs, layers.num_blocks), unknown := [])
    except ValueError as error:
        return None, str(error)
    if not segments:
        return None, f"it does not know {listed(unknown)}" if unknown else "there is no convolution"
    taken = {stage for segment in segments for stage in segment.stages}
    left = [stage for stage in layers.stages if stage not in taken]
    like = layers.num_blocks, layers.dtype, layers.device
    if executor is not None and left:
        return None, f"it does not know {listed(unknown)}"
    fast = FrozenNetwork(module.forward, left, segments, *like, backend)
    if layers.device.type == "cuda" and not left:
        instead = fast.compute_plainly, fast.compute_without_nodes
        fast.graphs = Graphs(fast.compute, instead, torch.channels_last)
    if unknown:
        fast.notes.append(f"by PyTorch, being unknown to the {backend.name}: {listed(unknown)}")
    refused, accepted = {}, []
    fast.expected = _expect(fast, images)
    names = [name for name in backend.executors if len(images) <= backend.up_to.get(name, len(images))]
    fast.executors = names = names if executor is None else [executor]
    for name in sorted(names, key=lambda name: (name == "switched", fast.expected.get(name, 0.0))):
        if name == "switched" and executor is None and not _can_switch(fast, accepted, refused):
            fast.executors.remove(name)
            continue
        better = next((other for other in accepted if other != "resident"), None)  # of that one all is guessed
        if better and fast.expected and fast.expected[name] > _HOPELESS * fast.expected[better]:
            fast.notes.append(
                f"{name} not tried: {1e3 * fast.expected[name]:.2f} ms expected, {better} "
                f"{1e3 * fast.expected[better]:.2f} ms"
            )
            fast.executors.remove(name)
            continue
        dense = executor is not None or "dense" in accepted
        reason = _refusal(fast, name, dense, proof, images, cache)
        if reason is not None:
            refused[name] = reason
            fast.executors.remove(name)
        else:
            accepted.append(name)
    if refused and (backend.strict or not fast.executors or executor is not None):
        fast.graphs = None
        return None, refused[executor] if executor else "; ".join(f"{name}: {why}" for name, why in refused.items())
    fast.notes += [f"{name} refused: {reason}" for name, reason in refused.items()]
    return fast, None


def _refusal(fast, name, dense, proof, images, cache):
    """Try an executor; return why it cannot be used, or None. ``dense``: whether that one may be a body of a switch."""
    try:
        if name == "switched":
            fast.switch_at = _measure_switch(fast, images, cache) if dense else 1.0
            share = f"{100 * fast.switch_at:.0f} % of blocks"
            fast.notes.append(f"switched: static where all blocks are kept, dense from {share} on, else fused")
        fast.use(name)
        with choosing_algorithms():
            reason = proof.difference(fast)
            if reason is None and fast.graphs is not None:
                reason = proof.difference(fast, FrozenNetwork.in_graphs)
        return reason
    except MissingTime:
        raise
    except Exception as error:  # a kernel that does not compile, or fails: then layers are there
        return f"{type(error).__name__}: {error}"


def _can_switch(fast, accepted, refused):
    """Whether there are nodes that choose among bodies that run."""
    return (
        fast.graphs is not None
        and conditional_missing() is None
        and "fused" in accepted
        and "dense" not in refused  # what fails in a graph fails in a body of it
    )


def _measure_switch(fast, images, cache):
    """Measure the share of kept (sample, block) pairs from which on ``dense`` is faster than ``fused``.

    0 if it is faster at all shares; 1 if at none, or if there are no graphs in which a node could choose.
    """
    if fast.graphs is None or conditional_missing() is not None:
        return 1.0
    generator = torch.Generator().manual_seed(0)
    shape = len(images), fast.num_blocks
    draws = [(torch.rand(shape, generator=generator) < share).to(images.device) for share in _SHARES]

    def measure():
        times = []
        for name in ("dense", "fused"):
            fast.use(name)
            with choosing_algorithms():
                times.append([seconds(lambda d=d: fast.call(images, d), images.device) for d in draws])
        slower = [number for number, (dense, fused) in enumerate(zip(*times, strict=True)) if dense >= fused]
        return found[max(slower, default=-1) + 1]

    found = [0.0, *(sum(shares) / 2 for shares in zip(_SHARES, _SHARES[1:], strict=False)), 1.0]
    return cache.get(_key(cache, "switch", [fast], images), lambda entry: entry in found, measure)


def _key(cache, what, networks, images):
    """Return the key of what was measured with these images on networks, the first of which has a backend."""
    parts = [part for network in networks for part in (*network.segments, *network.stages)]
    signature = digest(" ".join(part.signature for part in parts))
    version = networks[0].backend.version
    return cache.key(what, signature, tuple(images.shape), images.dtype, *version, *device_name(images.device))


def _expect(fast, images):
    """Predict what :func:`race` would measure, by the backend's model: {executor: seconds}, empty without a model."""
    if fast.backend.expected is None:
        return {}
    programs = [program for segment in fast.segments for program in segment.programs.values()]
    kept = [keep.sum(0).tolist() for keep in _keeps(images, fast.num_blocks)]
    return {
        name: sum(
            fast.backend.expected(program, len(images), counts, fast.dtype, name)
            for program in programs
            for counts in kept
        )
        for name in fast.backend.executors
    }


def _keeps(images, num_blocks):
    half = halves(len(images), num_blocks).to(images.device)
    return half, torch.ones_like(half)


def race(fast, layers, images, cache):
    """Measure the seconds of every way to run: the images once with half of the blocks and once with all."""
    keeps = _keeps(images, layers.num_blocks)
    # Fewer samples than threads are shared by all of them in any case.
    several = 1 < torch.get_num_threads() <= len(images)
    options = fast.backend.executors
    names = [name for name in fast.executors if several or not options[name].get("together")]
    names.append("layers")

    def measure(name):
        network = layers if name == "layers" else fast
        if network is fast:
            fast.use(name)
        return sum(seconds(lambda d=d: network.call(images, d), images.device) for d in keeps)

    key = _key(cache, "race", (fast, layers), images)
    return cache.get(key, are_times(names), lambda: {name: measure(name) for name in names})


def halves(num_samples, num_blocks):
    """Return random decisions for measuring: of every two neighbours exactly one keeps the block.

    A library builds and keeps something for every number of rows that it meets (oneDNN some hundred kilobytes), and
    independent decisions would give nearly every block another number.
    """
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(-(-num_samples // 2), 1, num_blocks, generator=generator) < 0.5
    return torch.cat((one, ~one), 1).flatten(0, 1)[:num_samples]
