"""Modules that decide nothing, policies and parts of routed networks, as fast functions."""

from functools import partial

from torch import fx

from dynexec.executors.block import pack_module
from dynexec.executors.costs import are_times, device_name, digest, seconds
from dynexec.executors.proof import relative_error, tolerance
from dynexec.executors.segment import make_segments
from dynexec.executors.stage import EXECUTORS


def freeze_function(module, example, executor, backend, cache, *, in_graph):
    """A function that computes what ``module(x)`` does, by the backend where it is faster, or asked for, and possible.

    Parameters
    ----------
    module : nn.Module
        In evaluation mode; not changed. Its weights may be given up: keep a copy.
    example : tensor ``[N, ...]``
    executor : str or None
        The one that was asked for.
    backend : Backend
    cache : CostCache
    in_graph : bool
        Whether it will run in a CUDA graph, where the host's time does not count.
    """
    cases = [(x, module(x.clone())) for x in (example, example[:1])]

    def gives_the_same(function):
        most = tolerance(example.dtype, example.device)
        try:
            return all(relative_error(function(x), expected) <= most for x, expected in cases)
        except Exception:  # of a kernel: the module runs as it is
            return False

    layers = pack_module(module, example)
    if not gives_the_same(layers):
        return module
    packed = getattr(layers, "__self__", None)
    if not isinstance(packed, fx.GraphModule) or executor in EXECUTORS or backend.missing is not None:
        return layers
    fast, segments = make_segments(packed, partial(backend.programs, 0))
    if not segments or not gives_the_same(fast.forward):
        return layers
    if executor is None and not in_graph:
        signature = digest([module, *(segment.signature for segment in segments)])
        key = cache.key("function", signature, tuple(example.shape), *device_name(example.device))
        runs = {"engine": lambda: fast.forward(example), "layers": lambda: layers(example)}
        times = cache.get(
            key, are_times(runs), lambda: {name: seconds(run, example.device) for name, run in runs.items()}
        )
        if times["engine"] > times["layers"]:
            return layers
    for segment in segments:
        segment.release()
    return fast.forward
