"""CUDA graphs of a whole forward: one launch of the host for all of a network's kernels."""

from contextlib import contextmanager
from threading import Lock

import torch

_MOST = 8  # input shapes with a graph; the one not used for longest gives way to a new one


class Graphs:
    """Runs a function of a network as CUDA graphs, one per shape of its input, captured in its first call.

    ``graphs(x, decisions)`` gives what ``function(x, decisions)`` gives, in new memory; ``decisions`` may be None. The
    function must not wait for the device. Calls from several streams and threads are put in order on the device, since
    a graph has its memory once.
    """

    def __init__(self, function, device):
        self.function = function
        self.stream = torch.cuda.Stream(device)
        self.done = torch.cuda.Event()
        self.lock = Lock()
        self.graphs = {}

    def __call__(self, x, decisions):
        key = tuple(x.shape), decisions is None
        with self.lock, torch.cuda.device(x.device):
            if key not in self.graphs and len(self.graphs) >= _MOST:
                torch.cuda.synchronize()  # the oldest may still run
                del self.graphs[next(iter(self.graphs))]
            caller = torch.cuda.current_stream()
            caller.wait_event(self.done)  # a new graph's first calls share memory with the others', too
            graph = self.graphs.pop(key, None) or _Graph(self.function, x, decisions, self.stream)
            self.graphs[key] = graph
            results = graph.replay(x, decisions)
            self.done.record(caller)
        return results


class _Graph:
    def __init__(self, function, x, decisions, stream):
        # Tensors of inference mode could not be written to by a later call outside of it.
        with torch.inference_mode(False), torch.no_grad(), choosing_algorithms():
            self.inputs = [value if value is None else value.clone() for value in (x, decisions)]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # compiles kernels, chooses algorithms, allocates what is kept between calls
                    function(*self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            # What other threads do meanwhile is none of this capture's business.
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.results = function(*self.inputs)

    def replay(self, *given):
        for value, new in zip(self.inputs, given, strict=True):
            if value is not None:
                value.copy_(new)
        self.graph.replay()
        return tuple(result.clone() for result in self.results)


@contextmanager
def choosing_algorithms():
    """Let cuDNN measure which of its algorithms is the fastest, for a shape that it sees for the first time."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
