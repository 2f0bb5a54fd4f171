"""Parts of a CUDA graph that run only if some sample keeps a block."""

from contextlib import contextmanager

import torch

from dynexec import native


def conditional_missing():
    """Why a graph cannot have conditional nodes here, or None."""
    return native.cuda_missing()


class Conditional:
    """Inserts conditional nodes into the graph that the current stream is captured into.

    Nothing may be allocated inside of a body: a graph's memory pool belongs to the stream that captures it.
    """

    def __init__(self, device):
        self.stream = torch.cuda.Stream(device)
        native.cuda().prepare_conditional()

    @contextmanager
    def if_any(self, offset):
        """What is launched inside runs where ``offset``, int32 ``[2]`` on the device, has two different values."""
        (body,) = self._insert(offset, 0, 1)
        with self._capture(body):
            yield

    def switch(self, offset, size, functions):
        """One of the functions' launches, number ``ceil(count / size)`` of them, at most the last one.

        ``count`` is ``offset[1] - offset[0]``.
        """
        for body, function in zip(self._insert(offset, size, len(functions)), functions, strict=True):
            with self._capture(body):
                function()

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
