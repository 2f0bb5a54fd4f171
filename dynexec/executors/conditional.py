"""Parts of a CUDA graph that run depending on decisions."""

import weakref
from contextlib import contextmanager

import torch

from dynexec import native
from dynexec.executors.graphs import take_stream


def conditional_missing():
    """Return why a graph cannot have conditional nodes here, or None."""
    return native.cuda_missing()


class Conditional:
    """Inserts conditional nodes into the graph that the current stream is captured into.

    A graph's memory pool belongs to the stream that captures it, not to that of a body. Inside ``if_any`` nothing may
    be allocated; what a function of ``switch`` allocates is memory that all of them share, so nothing persists there.
    """

    def __init__(self, device):
        self.device, self._taken = device, take_stream(device)
        self.stream = self._taken.stream
        self._memory = None
        native.cuda().prepare_conditional()

    @contextmanager
    def if_any(self, offset):
        """Make what is launched inside run if ``offset``, int32 ``[2]`` on the device, has two different values.

        It always runs while nothing is captured.
        """
        if not torch.cuda.is_current_stream_capturing():
            yield
            return
        (body,) = self._insert(offset, 0, 1)
        with self._capture(body):
            yield

    def switch(self, offset, size, functions):
        """Insert a node that runs what one of the functions launches and allocates.

        This is number ``ceil(count / size)``, at most the last one, where ``offset`` is int32 ``[2]`` on the device and
        ``count`` is ``offset[1] - offset[0]``. While nothing is captured all of them run, in their order, since the
        host does not know which one to choose.
        """
        if not torch.cuda.is_current_stream_capturing():
            # On the stream of the bodies, for which the libraries then have what they keep for every stream.
            current = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                for function in functions:
                    function()
            current.wait_stream(self.stream)
            return
        for body, function in zip(self._insert(offset, size, len(functions)), functions, strict=True):
            with self._own_memory(), self._capture(body):
                function()

    @contextmanager
    def _own_memory(self):
        """Make this thread allocate from a pool that is released when this object is gone.

        Like ``torch.cuda.use_mem_pool``, but a ``torch.cuda.MemPool`` ends the process if it happens to be collected
        while a graph is captured; releasing a pool's memory is allowed at any time.
        """
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
            torch._C._cuda_beginAllocateCurrentThreadToPool(index, self._memory)  # this one use of it stays
            torch._C._cuda_endAllocateToPool(index, self._memory)
            weakref.finalize(self, torch._C._cuda_releasePool, index, self._memory).atexit = False
        torch._C._cuda_beginAllocateCurrentThreadToPool(index, self._memory)
        try:
            yield
        finally:
            torch._C._cuda_endAllocateToPool(index, self._memory)
            torch._C._cuda_releasePool(index, self._memory)

    def _insert(self, offset, size, bodies):
        current = torch.cuda.current_stream(offset.device).cuda_stream
        return native.cuda().insert_conditional(current, offset.data_ptr(), size, bodies)

    @contextmanager
    def _capture(self, body):
        native.cuda().begin_body(self.stream.cuda_stream, body)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            native.cuda().end_body(self.stream.cuda_stream)  # after an error, too, or the stream stays in capture
