"""The cost model: predicts what each executor takes for a route, from the measured costs of the blocks."""

from operator import getitem

from dynexec.executors.recent import Recent

#: What time is lost to, see :meth:`StageCosts.losses`.
CAUSES = ("small batches", "row moves", "dropped rows computed")


_TABLES = 4  # batch sizes whose sums are kept: they take memory proportional to batch size and blocks


class StageCosts:
    """Predicted seconds of a stage under each executor.

    Parameters
    ----------
    blocks : list of BlockCost
        Of the stage's blocks, in order.
    """

    def __init__(self, blocks):
        self.blocks = blocks
        self._tables = Recent(_TABLES)

    def predict(self, kept, parts, num_samples):
        """Seconds by executor.

        Parameters
        ----------
        kept : list of int
            How many samples keep each block.
        parts : dict
            What ``grouped`` prepares: samples by the blocks that they keep.
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
        """Predicted seconds above the dense time of the kept rows, by cause; arguments as in ``predict``.

        A convolution of few rows takes longer per row; moves are gathering and scattering.
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
        """Sums for a batch of ``n``.

        Compact's seconds by block and count; masked's by block, some kept and all kept; the bodies' by number of rows;
        the shortcuts' by number of rows.
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
    """Seconds of a block that computes ``kept`` of some samples, and of ``both`` also the others."""
    rest = num_samples - kept
    return block.body(kept) + block.move(kept) + (block.body(rest) + block.move(rest) if block.both else 0.0)
