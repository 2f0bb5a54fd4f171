"""``torch.fx`` tracing in a process of several threads, and where it may be interrupted."""

import threading

from torch import fx, nn
from torch.fx import _symbolic_trace

_lock = threading.RLock()


class Tracer(fx.Tracer):
    """An ``fx.Tracer`` that leaves the rest of the process alone.

    While one traces, torch.fx replaces ``nn.Module.__call__`` for all threads. Two at once would leave each other's
    replacement behind, and an interrupt may leave it there, or where the next ``torch.compile`` brings it back. So one
    traces at a time, what was there before is put back in any case, and modules that other threads call meanwhile run
    as ever.
    """

    def trace(self, root, concrete_args=None):
        """The graph of ``root``, an ``nn.Module``."""
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
        """What a module's call becomes: a node, or in another thread the call."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)
