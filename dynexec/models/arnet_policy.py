"""The policy of AR-Net, which is also a small predictor, and the bookkeeping of skipped frames."""

import torch
import torch.nn.functional as F
from torch import nn

from dynexec.models.arguments import check_counts
from dynexec.ops import check_floating, kind_of
from dynexec.policy import draw, gumbel_softmax
from dynexec.policy.bernoulli import check_logits


def ruling_frames(spans):
    """Return the frame whose decision rules each frame: itself, or the one at which a running skip began.

    Parameters
    ----------
    spans : int64 tensor ``[N, T]``
        Number of frames that the frame's own decision would rule, itself included: k for a skip of k, otherwise 1.

    Returns
    -------
    int64 tensor ``[N, T]``
    """
    start, left, starts = spans[:, 0], torch.zeros_like(spans[:, 0]), []
    for t in range(spans.shape[1]):
        running = left > 0
        start = torch.where(running, start, t)
        left = torch.where(running, left, spans[:, t]) - 1
        starts.append(start)
    return torch.stack(starts, 1)


def rule(decisions, spans):
    """Return the actions that take effect, int64 ``[N, T]``, and which frames a running skip ignores, bool ``[N, T]``.

    ``spans`` is the number of frames that each action rules. All on the CPU.
    """
    start = ruling_frames(torch.tensor(spans)[decisions])
    return decisions.gather(1, start), start != torch.arange(decisions.shape[1])


def resize(images, size):
    """Resize ``[rows, C, H, W]`` to ``[rows, C, size, size]`` by nearest pixels, as published."""
    return images if images.shape[2:] == (size, size) else F.interpolate(images, size=(size, size), mode="nearest")


class ARNetPolicy(nn.Module):
    """Decides frame by frame, and makes predictions of its own: a small backbone, an LSTM, and two linear layers.

    Parameters
    ----------
    lite_backbone : nn.Module
        Maps images ``[rows, 3, resolution, resolution]`` to features ``[rows, num_features]``.
    num_features, num_backbones, num_classes, resolution, hidden : int
    skips : sequence of int
    dropout : float
        Applied to the features, in training.
    cheap : bool
        What happens on frames that a running skip ignores. False ("exact"), as published: the LSTM sees them; its
        hidden state is restored afterwards but its cell state is not, so the policy's features are needed for every
        frame. True ("cheap"), which the published cost assumes: nothing is computed on them and both states stay;
        outputs differ.
    """

    def __init__(
        self, lite_backbone, num_features, *, num_backbones, num_classes, resolution, skips, hidden, dropout, cheap
    ):
        super().__init__()
        check_counts(num_classes=num_classes, skips=tuple(skips), hidden=hidden)
        self.lite_backbone = lite_backbone
        self.rnn = nn.LSTMCell(num_features, hidden)
        self.num_predictions = num_backbones + 1
        self.num_actions = self.num_predictions + len(skips)
        self.linear = nn.Linear(hidden, self.num_actions)
        self.lite_fc = nn.Linear(hidden, num_classes)
        self.resolution, self.skips, self.dropout, self.cheap = resolution, tuple(skips), dropout, cheap
        self.spans = (1,) * self.num_predictions + self.skips

    def forward(self, frames):
        """Map frames ``[N, T, 3, H, W]`` to log-probabilities ``[N, T, A]``, each after the likeliest earlier actions.

        During a running skip nothing is decided, and the entries have no effect.
        """
        return self._unroll(frames, _likeliest)[1]

    def decide(self, frames):
        """Return the likeliest actions, int64 ``[N, T]``, and hidden states ``[N, T, hidden]`` for lite predictions.

        In the frames that a running skip ignores, the skip is repeated.
        """
        weights, _, hidden = self._unroll(frames, _likeliest)
        return weights.argmax(-1), hidden

    def sample(self, frames, *, generator=None):
        """Draw actions, int64 ``[N, T]``, each following the actions drawn before it."""

        def choose(log_probabilities):
            return _one_hot(draw(log_probabilities, generator=generator), log_probabilities)

        return self._unroll(frames, choose)[0].argmax(-1)

    def relax(self, frames, temperature, *, hard=True, generator=None):
        """Draw weights ``[N, T, A]`` for ``soft_decisions``, whose gradients reach the policy.

        Arguments as in :func:`dynexec.policy.gumbel_softmax`. Published settings: hard, and temperature
        ``5 * exp(-0.045 * epoch)``.
        """

        def choose(log_probabilities):
            return gumbel_softmax(log_probabilities, temperature, hard=hard, generator=generator)

        return self._unroll(frames, choose)[0]

    def hidden_states(self, frames, needed, skipped):
        """Compute the hidden state after each frame, float ``[N, T, hidden]``; zero where not needed.

        Parameters
        ----------
        frames : tensor ``[N, T, 3, H, W]``
        needed : bool tensor ``[N, T]``, on the CPU
            Not all False. In exact mode, a prefix of the frames of each video.
        skipped : bool tensor ``[N, T]``, on the CPU
            Frames that a running skip ignores.
        """
        rows, counts = pack(needed)
        device = frames.device
        held, rows = skipped.flatten()[rows][:, None].to(device), rows.to(device)
        projected = self._project(frames.flatten(0, 1)[rows])
        h = c = projected.new_zeros(counts[0], self.rnn.hidden_size)
        outputs = []
        for gates, hold in zip(projected.split(counts), held.split(counts)):
            before = h[: len(gates)]
            after, c = self._step(gates, before, c[: len(gates)])
            h = torch.where(hold, before, after)
            outputs.append(after)
        hidden = projected.new_zeros(needed.numel(), self.rnn.hidden_size)
        return hidden.index_copy(0, rows, torch.cat(outputs)).unflatten(0, needed.shape)

    def _project(self, images):
        """Compute what the LSTM's gates get of images ``[rows, 3, H, W]``, all at once; the recurrence is serial."""
        features = self.lite_backbone(resize(images, self.resolution))
        features = F.dropout(features, self.dropout, self.training)
        return F.linear(features, self.rnn.weight_ih, self.rnn.bias_ih)

    def _step(self, gates, h, c):
        """Compute the rest of ``nn.LSTMCell``: the new hidden and cell states."""
        enter, forget, cell, leave = (gates + F.linear(h, self.rnn.weight_hh, self.rnn.bias_hh)).chunk(4, 1)
        c = forget.sigmoid() * c + enter.sigmoid() * cell.tanh()
        return leave.sigmoid() * c.tanh(), c

    def spans_of(self, weights):
        """Return how many frames each row of weights ``[..., A]`` rules: those of a skip weighing above 0.5, else 1."""
        spans = torch.ones(weights.shape[:-1], dtype=torch.int64, device=weights.device)
        for number, skip in reversed(list(enumerate(self.skips, self.num_predictions))):
            spans = torch.where(weights[..., number] > 0.5, skip, spans)
        return spans

    def _unroll(self, frames, choose):
        """Decide with ``choose(log_probabilities [n, A]) -> weights [n, A]``.

        Returns weights and log-probabilities ``[N, T, A]``, and hidden states ``[N, T, hidden]``.
        """
        check_frames(frames, ("N", "T", 3, "H", "W"))
        shape, device = frames.shape[:2], frames.device
        gates = None if self.cheap else self._project(frames.flatten(0, 1)).unflatten(0, shape)
        left = torch.zeros(shape[0], dtype=torch.int64, device=device)
        rows, steps = torch.arange(shape[0], device=device), []
        for t in range(shape[1]):
            running = left > 0
            if self.cheap:
                rows = (~running).nonzero().flatten()
            if len(rows):
                step = self._project(frames[rows, t]) if self.cheap else gates[:, t]
                if t == 0:
                    h = c = step.new_zeros(shape[0], self.rnn.hidden_size)
                after, cell = self._step(step, h[rows], c[rows])
                scores = self.linear(after)
                wide = torch.promote_types(scores.dtype, torch.float32)  # float16 would round the clamp to 0
                decided = F.softmax(scores, 1, dtype=wide).clamp(min=1e-8).log()  # clamped as published
                if t == 0:
                    weights = log_probabilities = torch.zeros_like(decided)
                hold = running[rows][:, None]
                weights = weights.index_copy(0, rows, torch.where(hold, weights[rows], choose(decided)))
                log_probabilities = log_probabilities.index_copy(0, rows, decided)
                seen, c = h.index_copy(0, rows, after), c.index_copy(0, rows, cell)
                h = h.index_copy(0, rows, torch.where(hold, h[rows], after))
            left = torch.where(running, left, self.spans_of(weights)) - 1
            steps.append((weights, log_probabilities, seen))
        return tuple(torch.stack(values, 1) for values in zip(*steps))


def pack(needed):
    """Return the rows of flattened ``[N, T]``: first the first needed frame of each video, then the second, and so on.

    Videos with more needed frames come first in each group, so that a group's videos are the leading ones of the
    previous group.

    Parameters
    ----------
    needed : bool tensor ``[N, T]``

    Returns
    -------
    (int64 tensor ``[rows]``, list of int: the size of each group)
    """
    length, order = needed.sum(1).sort(descending=True, stable=True)
    frames = (~needed).byte().sort(dim=1, stable=True).indices[order]  # per video the needed ones first
    in_group = torch.arange(needed.shape[1])[:, None] < length
    rows = (order[:, None] * needed.shape[1] + frames).T[in_group]
    return rows, [count for count in in_group.sum(1).tolist() if count]


def check_frames(frames, shape):
    """Raise unless ``frames`` are floating-point and of ``shape``, in which letters stand for any positive number."""
    text = _text(shape)
    check_floating(frames, "frames", text)
    if not _fits(frames.shape, shape):
        raise ValueError(f"frames must have shape {text}, none of it 0, got {tuple(frames.shape)}")


def check_decisions(decisions, shape, num_actions):
    """Return ``decisions`` on the CPU; raise unless they are int64, name actions, and match ``shape``."""
    text = _text(shape)
    if not isinstance(decisions, torch.Tensor) or decisions.dtype != torch.int64:
        raise TypeError(f"decisions must be an int64 tensor {text}, got {kind_of(decisions)}")
    if not _fits(decisions.shape, shape):
        raise ValueError(f"decisions must have shape {text}, got {tuple(decisions.shape)}")
    decisions = decisions.cpu()
    if wrong := decisions[(decisions < 0) | (decisions >= num_actions)].tolist():
        raise ValueError(f"decisions must be from 0 to {num_actions - 1}, got {wrong[0]}")
    return decisions


def _text(shape):
    return f"[{', '.join(map(str, shape))}]"


def _fits(shape, expected):
    pairs = zip(shape, expected)
    return len(shape) == len(expected) and all(a > 0 if isinstance(b, str) else a == b for a, b in pairs)


def _one_hot(actions, like):
    return F.one_hot(actions, like.shape[-1]).to(like.dtype)


def _likeliest(log_probabilities):
    check_logits(log_probabilities)
    return _one_hot(log_probabilities.argmax(-1), log_probabilities)
