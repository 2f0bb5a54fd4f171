"""Modules without decisions, such as policies and parts of routed networks, as fast functions."""

from functools import partial

from dynexec.executors.block import trace
from dynexec.executors.costs import are_times, device_name, digest, seconds
from dynexec.executors.proof import relative_error, tolerance
from dynexec.executors.rewrite import pack
from dynexec.executors.segment import listed, make_segments
from dynexec.executors.stage import EXECUTORS


def freeze_function(module, example, executor, backend, cache, *, in_graph):
    """Return a function that computes ``module(x)``, by the backend if possible and if that is faster or asked for.

    Parameters
    ----------
    module : nn.Module
        In evaluation mode; not changed. Its weights may be freed: keep a copy.
    example : tensor ``[N, ...]``
    executor : str or None
        The one that was asked for.
    backend : Backend
    cache : CostCache
    in_graph : bool
        Whether it will run in a CUDA graph, where the host's time does not count.

    Returns
    -------
    function : callable
    note : str or None
        What the backend does not run of it, and why.
    """
    cases = [(x, module(x.clone())) for x in (example, example[:1])]

    def difference(function):
        """Return why it cannot replace the module, or None."""
        most = tolerance(example.dtype, example.device)
        try:
            error = max(relative_error(function(x), expected) for x, expected in cases)
        except Exception as error:  # of a kernel
            return _one_line(error)
        return None if error <= most else f"its output differs by {error:.1e} of the largest value"

    try:
        graph = trace(module)
    except Exception as error:  # tracing runs the module's own Python on stand-ins
        return module, f"it cannot be traced ({_one_line(error)})"
    packed = pack(module, graph, example)
    if (reason := difference(packed.forward)) is not None:
        return module, f"with packed layers {reason}"
    if executor in EXECUTORS:
        return packed.forward, f"executor is {executor!r}"
    if backend.missing is not None:
        return packed.forward, backend.missing
    fast, segments = make_segments(packed, partial(backend.programs, 0), unknown := [])
    beside = f"unknown to the {backend.name}: {listed(unknown)}" if unknown else None
    if not segments:
        return packed.forward, beside or "no convolution"
    if (reason := difference(fast.forward)) is not None:
        return packed.forward, f"by the {backend.name} {reason}"
    if executor is None and not in_graph:
        signature = digest([module, *(segment.signature for segment in segments)])
        what = signature, tuple(example.shape), example.dtype, *backend.version, *device_name(example.device)
        runs = {backend.name: fast.forward, "layers": packed.forward}
        times = cache.get(
            cache.key("function", *what),
            are_times(runs),
            lambda: {name: seconds(partial(run, example), example.device) for name, run in runs.items()},
        )
        if times[backend.name] > times["layers"]:
            took = [f"{1e3 * times[name]:.2f} ms" for name in runs]
            return packed.forward, f"by the {backend.name} {took[0]}, by layer {took[1]} (measured)"
    for segment in segments:
        segment.release()
    return fast.forward, beside


def _one_line(error):
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
