"""CUDA graphs of a whole forward: the host launches all of a network's kernels at once."""

from contextlib import contextmanager, suppress
from threading import RLock, local
from weakref import WeakValueDictionary

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

_MOST = 8  # graphs of a network; the one not used for longest gives way to a new one
# Captures wait for the whole device, and cuDNN's setting is the process's: one at a time.
_capturing = RLock()
_STREAMS = 32  # that torch has, and gives in turn
_taken = WeakValueDictionary()  # what holds those that something was captured on, by the streams' handles
_this_thread = local()


class Graphs:
    """Runs a function of a network as CUDA graphs, one per shape of its input, captured at its first call.

    ``graphs(x, decisions, variant)`` returns the result of ``function(x, decisions)`` in new memory, except for
    ``decisions`` if these are a result; ``decisions`` may be None, and ``variant`` names what else the function depends
    on. The function must not wait for the device. If it does, or if its capture fails for another reason, it is
    replaced by the first of the equivalent functions ``instead`` that can be captured, and ``replaced`` says why. If
    none can be, the last one runs without a graph, and ``failed`` says why; where memory was short, the next call tries
    again, and then ever later ones. Calls from several streams and threads are ordered on the device, since a graph has
    its memory only once. ``layout`` is the memory format of the graph's ``x``; if networks read images as
    channels_last, copying them there also converts them.
    """

    def __init__(self, function, instead=(), layout=torch.preserve_format):
        self.function, self.instead, self.layout = function, instead, layout
        self.done = torch.cuda.Event()
        self.lock = RLock()
        self.graphs, self.replaced, self.failed = {}, {}, {}
        self._hopeless = set()  # keys of those that failed for another reason than a shortage of memory
        self._short = {}  # of those that lacked memory: how often so far, and calls until it is tried again

    def __call__(self, x, decisions, variant):
        key = variant, tuple(x.shape), decisions is None
        with self.lock, torch.cuda.device(x.device):
            caller = torch.cuda.current_stream()
            caller.wait_event(self.done)  # a new graph's first calls share memory with the others', too
            graph = self._find(key, x, decisions)
            results = (self.function, *self.instead)[-1](x, decisions) if graph is None else graph.replay(x, decisions)
            self.done.record(caller)
        return results

    def keep_only(self, variant):
        """Free the graphs of other variants."""
        torch.cuda.synchronize()
        self.graphs = {key: graph for key, graph in self.graphs.items() if key[0] == variant}

    def _find(self, key, x, decisions):
        """Return the graph of a key, a new one if there is none, or None if it cannot be captured."""
        if key in self._hopeless:
            return None
        times, calls = self._short.get(key, (0, 0))
        if calls:
            self._short[key] = times, calls - 1
            return None
        graph = self.graphs.pop(key, None)
        if graph is None:
            graph = self._make(key, x, decisions)
            if len(self.graphs) >= _MOST and key not in self._hopeless:  # also for want of memory, which this frees
                torch.cuda.synchronize()  # the oldest may still run
                del self.graphs[next(iter(self.graphs))]
        if graph is not None:
            self.graphs[key] = graph  # the last one again
        return graph

    def _make(self, key, x, decisions):
        """Return a graph of the first function that can be captured; None, and why in ``failed``, if there is none."""
        self.failed.pop(key, None)
        reasons = []
        for function in (self.function, *self.instead):
            try:
                with _capturing:
                    graph = _Graph(function, x, decisions, self.layout)
            except Exception as error:  # of anybody's code
                reasons.append(f"{type(error).__name__}: {error}")
                if isinstance(error, torch.OutOfMemoryError):
                    self.failed[key] = reasons[-1]
                    times, _ = self._short.get(key, (0, 0))
                    self._short[key] = times + 1, 2**times - 1
                    return None
            else:
                if reasons:
                    self.replaced[key] = reasons[0]
                self._short.pop(key, None)
                return graph
        self.failed[key] = reasons[0]
        self._hopeless.add(key)
        return None


class _Graph:
    def __init__(self, function, x, decisions, layout):
        self.taken = take_stream(x.device)
        stream = self.taken.stream
        # Tensors of inference mode could not be written to by a later call outside of it.
        with torch.inference_mode(False), torch.no_grad(), choosing_algorithms():
            self.inputs = [x.clone(memory_format=layout), decisions if decisions is None else decisions.clone()]
            stream.wait_stream(torch.cuda.current_stream())
            self.graph = torch.cuda.CUDAGraph()
            with _making():
                with torch.cuda.stream(stream):
                    for _ in range(2):  # compiles kernels, chooses algorithms, allocates what is kept between calls
                        function(*self.inputs)
                torch.cuda.current_stream().wait_stream(stream)
                self._capture(function, stream)

    def _capture(self, function, stream):
        pool = torch.cuda.graph_pool_handle()
        # What other threads do meanwhile is none of this capture's business. The outer context puts the stream back
        # where ending a capture that went wrong raises, too.
        how = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.stream(stream), torch.cuda.graph(self.graph, **how):
                self.results, self.structure = tree_flatten(function(*self.inputs))
        except Exception:
            with suppress(AttributeError, RuntimeError):  # or the allocator goes on as if this was being captured
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            # So does the generator of random numbers, on which every graph relies, until a capture goes well.
            how = {"stream": take_stream(stream.device).stream, "capture_error_mode": "thread_local"}
            with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), **how):
                torch.zeros(1, device=stream.device)
            raise

    def replay(self, *given):
        for value, new in zip(self.inputs, given, strict=True):
            if value is not None:
                value.copy_(new)
        self.graph.replay()

        def take(value):
            if value is not None and value is self.inputs[1]:
                return given[1]  # nothing writes to decisions; the other input may have become the result in place
            return value.clone() if isinstance(value, torch.Tensor) else value

        return tree_unflatten([take(value) for value in self.results], self.structure)


@contextmanager
def _making():
    before, _this_thread.makes = makes_graph(), True
    try:
        yield
    finally:
        _this_thread.makes = before


def makes_graph():
    """Whether this thread is calling a function for a graph of :class:`Graphs`, before or during its capture.

    All graphs of a network are ordered, so they may write to the same memory.
    """
    return getattr(_this_thread, "makes", False)


class TakenStream:
    """Holds a ``torch.cuda.Stream``, and is referenced weakly in its place.

    torch 2.11 does not clear the weak references to a stream that is freed, and Python crashes when it meets them
    (PyTorch's pull request 183403).
    """

    def __init__(self, stream):
        self.stream = stream


def take_stream(device):
    """Return a TakenStream to capture on, whose stream no other one that is alive holds, as long as there is one.

    When a graph is freed, torch frees what cuBLAS keeps for the graph's stream, which others of that stream rely on.
    """
    with _capturing:
        for _ in range(_STREAMS):
            stream = torch.cuda.Stream(device)
            if stream.cuda_stream not in _taken:
                break
        _taken[stream.cuda_stream] = taken = TakenStream(stream)
        return taken


@contextmanager
def choosing_algorithms():
    """Let cuDNN measure, for each shape that it sees for the first time, which of its algorithms is the fastest."""
    with _capturing:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before
