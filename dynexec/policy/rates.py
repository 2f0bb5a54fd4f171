"""Keep rates as scalars for a log."""

import torch

from dynexec.ops import check_bool


def keep_rates(decisions):
    """Compute the shares of samples that keep a block, as named scalars for TensorBoard or any other log.

    Waits for the device once.

    Parameters
    ----------
    decisions : bool tensor ``[N, L]`` or ``[L]``, N and L at least 1

    Returns
    -------
    dict of str to float
        ``"keep_rate"``, the mean over samples and blocks, and ``"keep_rate/block_0"``, ``"keep_rate/block_1"``, ... per
        block.

    Raises
    ------
    TypeError, ValueError
        If ``decisions`` is not bool with one or two dimensions, or is empty.
    """
    check_bool(decisions, "decisions", "[N, L] or [L]")
    if decisions.dim() not in (1, 2) or decisions.numel() == 0:
        raise ValueError(f"decisions must be [N, L] or [L] and not empty, got shape {tuple(decisions.shape)}")
    rates = torch.atleast_2d(decisions).double().mean(0).tolist()
    by_block = {f"keep_rate/block_{block}": rate for block, rate in enumerate(rates)}
    return {"keep_rate": sum(rates) / len(rates), **by_block}
