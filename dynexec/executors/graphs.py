"""CUDA graphs of a whole forward: one launch of the host for all of a network's kernels."""

from contextlib import contextmanager, suppress
from threading import RLock

import torch
from torch.utils._pytree import tree_map

_MOST = 8  # graphs of a network; the one not used for longest gives way to a new one
# Captures wait for the whole device, and cuDNN's setting is the process's: one at a time.
_capturing = RLock()


class Graphs:
    """Runs a function of a network as CUDA graphs, one per shape of its input, captured in its first call.

    ``graphs(x, decisions, variant)`` gives what ``function(x, decisions)`` gives, in new memory, but for
    ``decisions`` if these are a result; ``decisions`` may be None, and ``variant`` names what else the function
    depends on. The function must not wait for the device; where it does, or a capture fails for another reason,
    ``instead`` runs in its place, or it as it is, and ``failed`` says why. Calls from several streams and threads
    are put in order on the device, since a graph has its memory once.
    """

    def __init__(self, function, device, instead=None):
        self.function, self.instead = function, instead or function
        self.done = torch.cuda.Event()
        self.lock = RLock()
        self.graphs, self.failed = {}, {}

    def __call__(self, x, decisions, variant):
        key = variant, tuple(x.shape), decisions is None
        with self.lock, torch.cuda.device(x.device):
            caller = torch.cuda.current_stream()
            caller.wait_event(self.done)  # a new graph's first calls share memory with the others', too
            graph = self._find(key, x, decisions)
            results = self.instead(x, decisions) if graph is None else graph.replay(x, decisions)
            self.done.record(caller)
        return results

    def keep_only(self, variant):
        """Give up the graphs of other variants."""
        torch.cuda.synchronize()
        self.graphs = {key: graph for key, graph in self.graphs.items() if key[0] == variant}

    def _find(self, key, x, decisions):
        """The graph of a key, a new one if there is none; None where there cannot be one."""
        if key in self.failed:
            return None
        graph = self.graphs.pop(key, None)
        if graph is None:
            if len(self.graphs) >= _MOST:
                torch.cuda.synchronize()  # the oldest may still run
                del self.graphs[next(iter(self.graphs))]
            try:
                with _capturing:
                    graph = _Graph(self.function, x, decisions)
            except Exception as error:  # of anybody's code
                self.failed[key] = f"{type(error).__name__}: {error}"
                return None
        self.graphs[key] = graph  # the last one again
        return graph


class _Graph:
    def __init__(self, function, x, decisions):
        # One of its own: with a graph, torch gives up what cuBLAS keeps for the stream that it was captured on.
        self.stream = stream = torch.cuda.Stream(x.device)
        # Tensors of inference mode could not be written to by a later call outside of it.
        with torch.inference_mode(False), torch.no_grad(), choosing_algorithms():
            self.inputs = [value if value is None else value.clone() for value in (x, decisions)]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # compiles kernels, chooses algorithms, allocates what is kept between calls
                    function(*self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            self._capture(function, stream)

    def _capture(self, function, stream):
        pool = torch.cuda.graph_pool_handle()
        # What other threads do meanwhile is none of this capture's business. The outer context puts the stream back
        # where ending a capture that went wrong raises, too.
        how = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.stream(stream), torch.cuda.graph(self.graph, **how):
                self.results = function(*self.inputs)
        except Exception:
            with suppress(AttributeError, RuntimeError):  # or the allocator goes on as if this was being captured
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            # So does the generator of random numbers, on which every graph relies, until a capture goes well.
            how = {"stream": torch.cuda.Stream(stream.device), "capture_error_mode": "thread_local"}
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

        return tree_map(take, self.results)


@contextmanager
def choosing_algorithms():
    """Let cuDNN measure, for a shape that it sees for the first time, which of its algorithms is the fastest."""
    with _capturing:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before
