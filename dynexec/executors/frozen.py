"""The inference network that ``freeze`` builds."""

from contextlib import contextmanager
from threading import RLock

import torch
from torch import fx, nn

from dynexec import dispatch
from dynexec.executors.choose import CAUSES
from dynexec.executors.launch_program import most_dropped
from dynexec.executors.profile import check_rounds, profile
from dynexec.executors.proof import relative_error, tolerance
from dynexec.executors.segment import only_segment
from dynexec.nn.context import check_decisions
from dynexec.ops import check_dense, counted
from dynexec.policy import threshold
from dynexec.route import Route


class FrozenNetwork(nn.Module):
    """The result of :func:`freeze`: call ``frozen(x, decisions)`` or, with a policy, ``frozen(x)``.

    It is specific to the processor and thread count that it was made on: to store it, pass the original model to
    :func:`dynexec.save`. Any number of threads may call it at once.
    """

    def __init__(self, network, stages, segments, num_blocks, dtype, device, backend=None):
        super().__init__()
        self.network, self.num_blocks, self.dtype, self.device = network, num_blocks, dtype, device
        self.stages, self.segments, self.backend = tuple(stages), tuple(segments), backend
        self.executors = list(backend.executors) if backend is not None else []  # those that were proven
        self.executor, self.expected = None, {}  # the one in use; seconds of each by a model
        self.switch_at = 1.0  # of the executor "switched"
        self._lock = RLock()
        self.one_launch = backend is not None and backend.plans  # whether a policy may run in the resident kernel
        self.policy, self.samples_at_once, self.graphs, self.notes = None, None, None, []

    @torch.no_grad()
    def forward(self, x, decisions=None, *, return_decisions=False):
        """Run the network on the blocks that the decisions keep, without gradients, in its dtype even under autocast.

        Parameters
        ----------
        x : float tensor ``[N, C, H, W]``
            Of any floating-point type; converted to the network's.
        decisions : bool tensor ``[N, L]`` or ``[L]``, optional
            None: the policy decides, keeping a block if its probability is at least 0.5.
        return_decisions : bool
            Also return the decisions, bool ``[N, L]``: the given ones, or the policy's.
        """
        x, decisions = self._check(x, decisions)
        with dispatch.for_frozen(x.device):
            y, decisions = self.call(x, decisions)
        return (y, decisions) if return_decisions else y

    @torch.no_grad()
    def profile(self, x, decisions=None, *, rounds=20):
        """Measure where the time of a call goes: per part of the network, and how much is lost to which cause.

        Parameters
        ----------
        x, decisions
            As for :meth:`forward`; at least one image.
        rounds : int
            Number of rounds of four measurements each: an ordinary call and a recorded one, with these decisions and
            with everything kept. The least of each time counts, since noise only ever adds.

        Returns
        -------
        Profile
            Prints as a table. On a GPU, recorded calls run without CUDA graphs.

        Raises
        ------
        ValueError
            Also if ``rounds`` is not a positive int.
        """
        check_rounds(rounds)
        x, decisions = self._check(x, decisions)
        if len(x) == 0:
            raise ValueError("x must hold at least one image to profile, got a batch of 0")
        with dispatch.for_frozen(x.device):
            return profile(self, x, decisions, rounds)

    def _check(self, x, decisions):
        """Return the arguments of :meth:`call`, or raise if they are invalid."""
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x must be a tensor [N, C, H, W], got {type(x).__name__}")
        check_dense(x, "x")
        if not x.is_floating_point():
            raise TypeError(f"x must be a floating-point tensor [N, C, H, W], got {x.dtype}")
        if x.dim() != 4:
            raise ValueError(f"x must be a tensor [N, C, H, W], got {tuple(x.shape)}")
        if x.device != self.device:
            raise ValueError(f"x is on {x.device}, but the network was frozen on {self.device}: move x there")
        x = x.to(self.dtype)
        if not self.segments:  # these read any layout
            x = x.contiguous(memory_format=torch.channels_last)
        if decisions is not None:
            decisions = self._check_decisions(decisions, x)
        elif self.policy is None:
            raise ValueError(f"decisions is None, but there is no policy: give bool [N, {self.num_blocks}]")
        return x, decisions

    def call(self, x, decisions):
        """Return output and decisions in the fastest available way; arguments as for :meth:`compute`."""
        if self.graphs is None:
            return self.compute(x, decisions)
        if len(x) == 0 or torch.cuda.is_current_stream_capturing():
            return self.compute_without_nodes(x, decisions)
        with self.graphs.lock:  # another thread may be using another executor meanwhile
            return self.graphs(x, decisions, self.executor)

    def compute_without_nodes(self, x, decisions):
        """:meth:`compute` outside a graph of this network's own; only such graphs have conditional nodes."""
        with self.using("fused" if self.executor in ("conditional", "switched") else self.executor):
            return self.compute(x, decisions)

    def compute_plainly(self, x, decisions):
        """:meth:`compute` where the bodies of conditional nodes do not support dependent launches."""
        from dynexec.kernels.device import plain_launches

        with plain_launches():
            return self.compute(x, decisions)

    def in_graphs(self, x, decisions):
        """Return the output of :meth:`call` alone."""
        return self.call(x, decisions)[0]

    def graph_notes(self):
        """Return lines of text: for which inputs so far there is no CUDA graph, or not the intended one, and why."""
        if self.graphs is None:
            return []
        return [
            f"{what} CUDA graph for {executor}, {shape}, decisions {'by the policy' if decided else 'given'}: {reason}"
            for what, found in (("no", self.graphs.failed), ("another", self.graphs.replaced))
            for (executor, shape, decided), reason in list(found.items())  # a copy: other threads may add to it
        ]

    def compute(self, x, decisions):
        """Return output and decisions for ``x``, in the network's dtype, and ``decisions`` bool ``[N, L]`` or None."""
        if decisions is None and (found := self._decide_in_one_launch(x)) is not None:
            return found
        if decisions is None:
            decisions = self.decide(x)
        return self.run_in_parts(x, decisions), decisions

    def decide(self, x):
        """Return the policy's decisions, bool ``[N, L]``."""
        return self._check_decisions(threshold(self.policy(x)), x)

    def _decide_in_one_launch(self, x):
        """Return output and decisions if one kernel can run policy and network together; otherwise None."""
        if self.executor != "resident" or not self.one_launch or len(x) == 0:
            return None
        segments = [only_segment(function) for function in (self.policy, self.network)]
        if None in segments:
            return None
        policy, network = (segment.find_program(x) for segment in segments)
        try:
            policy, network = policy.resident(), network.resident()
        except ValueError:
            return None
        y, decisions = network.decide(x, policy)
        return (y.flatten(1) if segments[1].flat else y), decisions

    def prove_one_launch(self, x):
        """Compare policy and network in one launch with running them in turn, and turn that off if they differ."""
        if (found := self._decide_in_one_launch(x)) is None:
            return
        y, decisions = found
        probabilities = self.policy(x).float()
        sure = (probabilities - 0.5).abs() > 0.01  # of the others rounding may decide
        error = relative_error(y, self.run_in_parts(x, decisions))
        self.one_launch = torch.equal(decisions[sure], probabilities[sure] >= 0.5) and error <= tolerance(
            y.dtype, y.device
        )
        if not self.one_launch:
            self.notes.append(
                f"policy not in the resident kernel: other decisions, or an output that differs by {error:.1e}"
            )

    def run_in_parts(self, x, decisions):
        """Run ``x``, in the network's dtype, with ``decisions`` bool ``[N, L]``, ``samples_at_once`` at a time."""
        parts = list(zip(*self.split(x, decisions), strict=True))
        return self.run(*parts[0]) if len(parts) == 1 else torch.cat([self.run(*part) for part in parts])

    def run(self, x, decisions):
        """Run the whole batch at once."""
        return self.network(x, self.plan(decisions))

    def plan(self, decisions):
        """Return what the network takes for bool decisions ``[N, L]``: a Route, or themselves if only the engine runs.

        Only stages that run by layer need to know on the host how many samples keep a block.
        """
        if self.stages or self.backend.plans:
            return Route.from_decisions(decisions, exact=bool(self.stages))
        return decisions

    def use(self, executor):
        """Make segments run with this executor of the :class:`Backend`."""
        self.executor = executor
        for segment in self.segments:
            segment.executor, segment.options = executor, dict(self.backend.executors[executor])
            if executor == "switched":
                segment.options["switch_at"] = self.switch_at

    @contextmanager
    def using(self, executor):
        """Context manager in which segments run with this executor; other threads' calls in graphs wait."""
        with self._lock if self.graphs is None else self.graphs.lock:
            before = self.executor
            self.use(executor)
            try:
                yield
            finally:
                self.use(before)

    def executor_for(self, decisions):
        """Return the executor in use, resolving ``switched`` for bool decisions ``[N, L]``. Waits for the device.

        ``switched`` resolves to ``dense`` also if nothing is dropped, although a static network runs then.
        """
        if self.executor != "switched":
            return self.executor
        dropped = int((~decisions).sum())
        return "dense" if dropped <= most_dropped(self.switch_at, decisions.numel()) else "fused"

    def keep_only(self):
        """Free the weights and graphs that the chosen way to run does not need; return the network."""
        if self.graphs is not None:
            self.graphs.keep_only(self.executor)
        for segment in self.segments:
            segment.release()
        for stage in self.stages:
            stage.used = dict.fromkeys(stage.used, 0)  # so far it was tried, not used
        self.network.__self__.delete_all_unused_submodules()
        return self

    def split(self, *tensors):
        """Split each tensor into parts of ``samples_at_once`` samples."""
        size = self.samples_at_once or max(len(tensors[0]), 1)
        return [tensor.split(size) for tensor in tensors]

    def _check_decisions(self, decisions, x):
        decisions = check_decisions(decisions)
        expected = (len(x), self.num_blocks)
        if tuple(decisions.shape) not in (expected, expected[1:]):
            raise ValueError(
                f"decisions must be bool [{expected[0]}, {expected[1]}] or [{expected[1]}] for this batch and network, "
                f"got {tuple(decisions.shape)}"
            )
        if decisions.device != x.device:
            raise ValueError(f"decisions is on {decisions.device}, but x is on {x.device}: move it there")
        return decisions.expand(expected)

    def predict_losses(self, decisions):
        """Predict the seconds lost against dense speed on the kept rows, by cause.

        The causes are those of the executors that would be chosen for ``decisions``, bool ``[N, L]``.
        """
        routes = [Route.from_decisions(part) for part in self.split(decisions)[0]]
        found = [stage.predict_losses(route) for route in routes for stage in self.stages]
        return {cause: sum(losses[cause] for losses in found) for cause in CAUSES}  # segments have none of them

    def train(self, mode=True):
        """Stay in evaluation mode, whatever a parent module does."""
        return super().train(False)

    def explain(self):
        """Describe as text what runs where and why: stages, executors with their measured costs, what was refused."""
        by = f" of the {self.backend.name} ({self.backend.runs_on})" if self.segments else ""
        graphs = ", in CUDA graphs" if self.graphs is not None else ""
        lines = [
            f"{counted(self.num_blocks, 'block')}, {counted(len(self.segments), 'segment')}{by}{graphs}, "
            f"{counted(len(self.stages), 'stage')} by layer, {self.dtype}, "
            f"{counted(self.samples_at_once or 'all', 'sample')} at once, policy: {self._policy_name()}",
            *self.notes,
            *self.graph_notes(),
        ]
        for part in (*self.segments, *self.stages):
            lines += part.explain()
        return "\n".join(lines)

    def _policy_name(self):
        if self.policy is None:
            return "none, decisions must be given"
        return "packed" if isinstance(getattr(self.policy, "__self__", None), fx.GraphModule) else "as it is"

    def __getstate__(self):
        raise TypeError("a FrozenNetwork cannot be pickled or copied: save the original model by dynexec.save")
