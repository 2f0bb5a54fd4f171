"""The cost model: predicts the time of each executor for a route, from the measured costs of the blocks."""

from operator import getitem

from dynexec.executors.recent import Recent

#: What time is lost to, see :meth:`StageCosts.losses`.
CAUSES = ("small batches", "row moves", "dropped rows computed")


_TABLES = 4  # batch sizes whose sums are kept: they take memory proportional to batch size and blocks


class StageCosts:
    """Predicts the seconds of a stage under each executor.

    Parameters
    ----------
    blocks : list of BlockCost
        Costs of the stage's blocks, in order.
    """

    def __init__(self, blocks):
        self.blocks = blocks
        self._tables = Recent(_TABLES)

    def predict(self, kept, parts, num_samples):
        """Predict seconds by executor.

        Parameters
        ----------
        kept : list of int
            Number of samples that keep each block.
        parts : dict
            The result of ``grouped.prepare``: samples by the blocks that they keep.
        num_samples : int
        """
        compact, masked, body, shortcuts = self._tables.find(num_samples, lambda: self._table(num_samples))
        rest = len(parts) > 1
        grouped = 0.0
        for pattern, samples in parts.items():
            n = len(samples)
            if rest:
                grouped += self.blocks[0].move(n)
            runs = zip(pattern, self.blocks, body[n], strict=True)
            grouped += shortcuts[n] + sum(seconds for keep, block, seconds in runs if keep or block.both)
        return {
            "compact": sum(map(getitem, compact, kept)),
            "masked": sum(
                full if count == num_samples else some for (some, full), count in zip(masked, kept, strict=True)
            ),
            "grouped": grouped,
        }

    def losses(self, executor, kept, parts, num_samples):
        """Predict the seconds above the dense time of the kept rows, by cause; arguments as in ``predict``.

        Small batches cost more per row; row moves are gathering and scattering. Only of ``grouped`` are ``parts`` read.
        """
        small = moves = computed = 0.0
        dense = [block.body(num_samples) / num_samples for block in self.blocks]
        if executor == "grouped":
            for pattern, samples in parts.items():
                n = len(samples)
                runs = zip(self.blocks, dense, pattern, strict=True)
                small += sum(b.body(n) - row * n for b, row, keep in runs if keep or b.both)
                small += sum(b.shortcut(n) - b.shortcut(num_samples) * n / num_samples for b in self.blocks)
                moves += self.blocks[0].move(n) if len(parts) > 1 else 0.0
        for block, row, count in zip(self.blocks, dense, kept, strict=True):
            if count == num_samples or executor == "grouped":
                continue
            if executor == "compact":
                for rows in (count, num_samples - count) if block.both else (count,):
                    small += block.body(rows) - row * rows
                    moves += block.move(rows)
            else:
                computed += row * (num_samples if block.both else num_samples - count) + block.select(num_samples)
        return dict(zip(CAUSES, (small, moves, computed), strict=True))

    def _table(self, n):
        """Compute sums for a batch of ``n``.

        Seconds of compact by block and count; of masked by block, with some kept and with all kept; of the bodies by
        number of rows; of the shortcuts by number of rows.
        """
        compact = [[b.shortcut(n) + _some(b, k, n) for k in range(n)] for b in self.blocks]
        full = [b.shortcut(n) + b.body(n) for b in self.blocks]
        for row, seconds in zip(compact, full, strict=True):
            row.append(seconds)
        masked = [
            (seconds + b.select(n) + (b.body(n) if b.both else 0.0), seconds)
            for b, seconds in zip(self.blocks, full, strict=True)
        ]
        body = [[b.body(k) for b in self.blocks] for k in range(n + 1)]
        shortcuts = [sum(b.shortcut(k) for b in self.blocks) for k in range(n + 1)]
        return compact, masked, body, shortcuts


def _some(block, kept, num_samples):
    """Return the seconds of a block that computes ``kept`` of its samples and, with ``both``, also the others."""
    rest = num_samples - kept
    return block.body(kept) + block.move(kept) + (block.body(rest) + block.move(rest) if block.both else 0.0)
