"""Consecutive frozen blocks of one shape, and the choice of the executor that runs them."""

import torch

from dynexec.executors import compact, grouped, masked
from dynexec.executors.choose import StageCosts
from dynexec.executors.costs import measure_block
from dynexec.executors.proof import relative_error, tolerance
from dynexec.ops import counted
from dynexec.route import Route

#: The input of a packed network that says what runs; no name that a module or an argument of a user's would have.
ROUTE = "dynexec_route"

EXECUTORS = {"compact": compact, "masked": masked, "grouped": grouped}


class Stage:
    """A run of frozen blocks in which only the first may change the shape.

    ``stage(x, route)`` runs it with the executor named by ``executor``, or with the one that the cost model predicts to
    be the fastest for this route among ``proven``, those whose output was compared with the original blocks'.

    Parameters
    ----------
    number : int
    blocks : list of FrozenBlock
    owns_input : bool
        Whether nothing else reads the stage's input, so that it may be overwritten.
    executor : key of EXECUTORS, or None
    batch : int
        The batch size to be fast at.
    """

    def __init__(self, number, blocks, owns_input, executor, batch):
        self.__name__ = f"stage_{number}"  # what generated code calls it
        self.number, self.blocks = number, blocks
        self.owns_input, self.executor, self.batch = owns_input, executor, batch
        self.output_shape = blocks[-1].output_shape
        self.chunk, self.costs = 1, None
        self.proven, self.refused = list(EXECUTORS), {}
        self.used = dict.fromkeys(EXECUTORS, 0)

    def __call__(self, x, route):
        if not self.owns_input:
            x = x.clone()
        name, given = self.choose(route)
        self.used[name] += 1
        return EXECUTORS[name].run(self, x, given)

    @property
    def signature(self):
        """What it computes, as text: equal for equal work."""
        return " ".join(block.signature for block in self.blocks)

    def choose(self, route):
        """Return the name of the executor for ``route``, and what its ``run`` takes."""
        if self.executor is not None or len(self.proven) == 1 or route.num_samples <= 1:
            name = self.executor or self.proven[0]
            return name, self._prepare(name, route)
        seconds, parts = self.predict(route)
        name = min(self.proven, key=seconds.get)
        return name, parts if name == "grouped" else route

    def _prepare(self, name, route):
        return grouped.prepare(self, route) if name == "grouped" else route

    def predict(self, route):
        """Predict the seconds of each ``proven`` executor; return also what ``grouped`` takes, empty if refused."""
        parts = grouped.prepare(self, route) if "grouped" in self.proven else {}
        return self.costs.predict(self._kept(route), parts, route.num_samples), parts

    def predict_losses(self, route):
        """Predict seconds by cause, see :meth:`StageCosts.losses`, for the executor that would be chosen."""
        name, given = self.choose(route)
        return self.costs.losses(name, self._kept(route), given, route.num_samples)

    def _kept(self, route):
        return [route.count(block.column) for block in self.blocks]

    def measure(self, cache):
        """Measure the costs of the blocks; the most common chunk becomes the stage's."""
        costs = [measure_block(block, self.batch, cache) for block in self.blocks]
        self.costs = StageCosts(costs)
        chunks = [cost.chunk for cost in costs]
        self.chunk = max(set(chunks), key=chunks.count)

    def prove(self, x, route, reference):
        """Run ``x`` with every executor and refuse those whose output is not ``reference``."""
        for name in list(self.proven):
            y = EXECUTORS[name].run(self, x.clone(), self._prepare(name, route))
            error = relative_error(y, reference)
            if not error <= tolerance(reference.dtype, reference.device):
                self.proven.remove(name)
                self.refused[name] = f"its output differs by {error:.1e} of the largest value"
        wanted = self.executor or "compact"
        if self.executor in self.refused or not self.proven:
            raise RuntimeError(f"executor {wanted!r} cannot run {self.blocks[0].name}...: {self.refused[wanted]}")

    def explain(self):
        """Return lines of text: the blocks, the cost of each executor at three keep rates, what was chosen so far."""
        first, last = self.blocks[0], self.blocks[-1]
        lines = [
            f"stage {self.number}: {counted(len(self.blocks), 'block')} {first.name} .. {last.name}, "
            f"rows {first.input_shape} -> {self.output_shape}, {counted(self.chunk, 'row')} at a time"
        ]
        n = self.batch
        for keep in (0.25, 0.5, 1.0):
            route = Route.from_decisions(spread_decisions(n, last.column + 1, keep))
            seconds, _ = self.predict(route)
            times = ", ".join(f"{name} {1e3 * seconds[name]:.2f} ms" for name in self.proven)
            chosen = self.executor or min(self.proven, key=seconds.get)
            lines.append(f"  batch {n}, keep {keep}: {times} (predicted) -> {chosen}")
        lines += [f"  {name} refused: {reason}" for name, reason in self.refused.items()]
        used = ", ".join(f"{name} {count}" for name, count in self.used.items() if count)
        return [*lines, f"  calls so far: {used or 'none'}"]


def spread_decisions(num_samples, num_blocks, keep):
    """Return Bernoulli decisions with a fixed seed, for predictions."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(num_samples, num_blocks, generator=generator) < keep
