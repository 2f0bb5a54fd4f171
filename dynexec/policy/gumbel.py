"""The Gumbel-softmax estimator: random choices that gradients pass through (Jang et al., ICLR 2017)."""

import torch

from dynexec.policy.bernoulli import check_softmax


def gumbel_softmax(logits, temperature, *, hard=False, generator=None):
    """Draw weights over the last dimension whose gradients reach the logits.

    Parameters
    ----------
    logits : float tensor ``[..., choices]``
        Unnormalised log-probabilities.
    temperature : float
        Above 0. The lower, the closer to one-hot.
    hard : bool
        Return one-hot weights, with the gradient of the soft ones (the straight-through estimator).
    generator : torch.Generator, optional
        On the device of ``logits``; the same state draws the same weights.

    Returns
    -------
    float tensor ``[..., choices]``, adding up to 1

    Raises
    ------
    TypeError, ValueError
        If ``logits`` is not a floating-point tensor or, on the CPU, holds NaN, inf, or -inf for all choices; or if
        ``temperature`` is not above 0 and finite in the dtype of ``logits``.

    Notes
    -----
    Equivalent to ``torch.nn.functional.gumbel_softmax(logits, temperature, hard)``, which takes no generator.
    """
    check_softmax(logits)
    if not torch.finfo(logits.dtype).tiny <= temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 and finite in {logits.dtype}, got {temperature}")
    # In 16 bits noise may be infinite, and ties would favour the first choice.
    wide = torch.promote_types(logits.dtype, torch.float32)
    scores = logits - torch.empty_like(logits, dtype=wide).exponential_(generator=generator).log()
    # Softmax does not mind the difference, and cold ones would be infinite.
    soft = ((scores - scores.detach().amax(-1, keepdim=True)) / temperature).softmax(-1).to(logits.dtype)
    if not hard:
        return soft
    one_hot = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    return one_hot - soft.detach() + soft


def draw(logits, *, generator=None):
    """Draw a choice per row from ``softmax(logits)``: int64 ``[...]`` for logits ``[..., choices]``.

    Has the distribution of ``gumbel_softmax(logits, t, hard=True).argmax(-1)`` at any temperature t. ``logits``,
    ``generator`` and errors are as in :func:`gumbel_softmax`.
    """
    with torch.no_grad():
        return gumbel_softmax(logits, 1.0, generator=generator).argmax(-1)


def exponential_temperature(step, *, initial=5.0, decay=0.965):
    """Return ``initial * decay ** step``: as published, 5 and 0.965 per epoch for AdaShare and AdaMML.

    AR-Net's ``5 * exp(-0.045 * epoch)`` is ``decay=math.exp(-0.045)``; SpotTune stays at 5, ``decay=1``. ValueError
    unless ``step`` is at least 0, ``initial`` above 0, and ``decay`` above 0 and at most 1.
    """
    if not step >= 0 or not initial > 0 or not 0 < decay <= 1:
        raise ValueError(
            f"step must be at least 0, initial above 0 and decay in (0, 1], got {step}, {initial} and {decay}"
        )
    return initial * decay**step
