"""Routes: the decisions of all blocks compiled once per forward, with the only wait for the device that blocks need."""

from dataclasses import dataclass
from itertools import pairwise

import torch

from dynexec import dispatch, ops


@dataclass(frozen=True, eq=False)
class Route:
    """Which samples take which choice, for every block. Build it with :meth:`from_decisions`.

    Attributes
    ----------
    decisions : bool or integer tensor ``[N, L]``
        The decisions it was built from. With two choices, 0 means dropped and 1 kept.
    index : int32 tensor ``[L, N]``
        Sample numbers per block, grouped by choice, ascending within a group.
    offset : int32 tensor ``[L, choices + 1]``
        Group ``c`` of block ``l`` is ``index[l, offset[l, c] : offset[l, c + 1]]``.
    choices : int
        Number of choices.
    borders : list of L lists of ``choices + 1`` ints, or None
        ``offset`` on the host; None for a device route.
    """

    decisions: torch.Tensor
    index: torch.Tensor
    offset: torch.Tensor
    choices: int
    borders: list[list[int]] | None

    @classmethod
    def from_decisions(cls, decisions, *, choices=2, exact=True):
        """Compile decisions into a route.

        Parameters
        ----------
        decisions : bool or integer tensor ``[N, L]``
            The choice of each sample in each block, ``0 <= decisions < choices``.
        choices : int
            Number of choices; 2 for bool decisions.
        exact : bool
            Whether the host needs the group sizes. An exact route waits for the device once, for all blocks. A device
            route (False) never waits, and checks the values of integer decisions on a CPU only.

        Raises
        ------
        TypeError, ValueError
            If dtype, shape, ``choices`` or a value is invalid.
        """
        ops.check_choices(choices)
        _check(decisions, choices, exact)
        index, offset = ops.plan(decisions, choices)
        borders = offset.tolist() if exact else None
        if exact and decisions.device.type != "cpu" and any(row[-1] != decisions.shape[0] for row in borders):
            raise ValueError(dispatch.first_outside(decisions, choices))
        return cls(decisions, index, offset, choices, borders)

    @property
    def num_samples(self):
        """N, the number of samples."""
        return self.decisions.shape[0]

    @property
    def num_blocks(self):
        """L, the number of blocks."""
        return self.decisions.shape[1]

    @property
    def exact(self):
        """Whether the host knows the group sizes."""
        return self.borders is not None

    @property
    def counts(self):
        """Group sizes as a tuple of L tuples of ``choices`` ints; None for a device route."""
        if self.borders is None:
            return None
        return tuple(tuple(stop - start for start, stop in pairwise(row)) for row in self.borders)

    def count(self, block, choice=1):
        """Return how many samples take ``choice`` in ``block``. RuntimeError for a device route."""
        start, stop = self._borders_of(block, choice)
        return stop - start

    def group(self, block, choice=1):
        """Return the numbers of the samples that take ``choice`` in ``block``: a view, int32 ``[count]``, ascending.

        RuntimeError for a device route: use ``index`` and ``offset``.
        """
        start, stop = self._borders_of(block, choice)
        # One view op; indexing twice costs three times as much on the host, per block and forward.
        return self.index.as_strided((stop - start,), (1,), block * self.num_samples + start)

    def _borders_of(self, block, choice):
        if self.borders is None:
            raise RuntimeError(
                "this is a device route: the host does not know its group sizes; build it with exact=True"
            )
        if not 0 <= block < len(self.borders):
            raise ValueError(f"block must be in 0..{len(self.borders) - 1}, got {block}")
        if not 0 <= choice < self.choices:
            raise ValueError(f"choice must be in 0..{self.choices - 1}, got {choice}")
        row = self.borders[block]
        return row[choice], row[choice + 1]


def _check(decisions, choices, exact):
    if not isinstance(decisions, torch.Tensor):
        return  # ops.plan says so
    ops.check_dense(decisions, "decisions")
    if exact and decisions.device.type == "meta":
        raise ValueError("decisions must have values, which those on the meta device have not, or exact be False")
    if decisions.is_floating_point():
        nan = " (these hold NaN)" if decisions.isnan().any() else ""
        raise TypeError(
            f"decisions must be a bool or integer tensor [N, L], got {decisions.dtype}: "
            f"threshold probabilities first, probabilities >= 0.5{nan}"
        )
    if decisions.dtype == torch.bool and choices != 2:
        raise ValueError(f"choices must be 2 for bool decisions, got {choices}")
