"""``torch.fx`` tracing that is safe in a process with several threads, and when interrupted."""

import threading

from torch import fx, nn
from torch.fx import _symbolic_trace

_lock = threading.RLock()


class Tracer(fx.Tracer):
    """An ``fx.Tracer`` that does not affect the rest of the process.

    While tracing, torch.fx replaces ``nn.Module.__call__`` for all threads. Two traces at once would each leave the
    other's replacement behind, and an interrupt may leave it in place, or where the next ``torch.compile`` restores it.
    Therefore only one trace runs at a time, the previous state is always restored, and modules that other threads call
    meanwhile run as usual.
    """

    def trace(self, root, concrete_args=None):
        """Return the graph of ``root``, an ``nn.Module``."""
        with _lock:
            self._thread = threading.get_ident()
            call, get, state = nn.Module.__call__, nn.Module.__getattr__, vars(_symbolic_trace)
            before = {name: state[name] for name in ("CURRENT_PATCHER", "_is_fx_tracing_flag") if name in state}
            try:
                return super().trace(root, concrete_args)
            finally:
                nn.Module.__call__, nn.Module.__getattr__ = call, get
                state.update(before)

    def call_module(self, m, forward, args, kwargs):
        """Turn a module call into a node; in another thread, perform the call."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)
