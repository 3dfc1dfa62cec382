"""Importance sampling of the times of a training (Nichol and Dhariwal 2021, section 3.3): p(t) ∝ sqrt(E L_t²).

The expectation is over the last losses at each time; until each time has that many, times are uniform. A step's
times are functions of (seed, step, position) and of the losses of earlier steps, which are taken in the order of their
positions: they depend neither on the number of processes, nor on interruptions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddim.random import TRAINING_TIME, random_words

LOSS_SECOND_MOMENT = "loss_second_moment"  # the name of it
HISTORY = 10  # losses that are kept of each time
UNIFORM = 0.001  # the share of uniform times, so that none is left out


def empty_history(T: int) -> Tensor:
    """Return a history without losses, float64 (T + 1, HISTORY + 1): row t has the last losses at t, and their count.

    The count is that of all losses so far; a new one replaces the oldest. Row 0 stays 0.
    """
    return torch.zeros(T + 1, HISTORY + 1, dtype=torch.float64)


def time_probabilities(history: Tensor) -> Tensor:
    """Return p(t) for t = 1..T, float64 (T,)."""
    losses, counts = history[1:, :HISTORY], history[1:, HISTORY]
    p = losses.square().mean(1).sqrt()
    p = (1 - UNIFORM) * p / p.sum() + UNIFORM / len(p)
    return torch.where((counts >= HISTORY).all(), p, 1 / len(p))


def importance_times(history: Tensor, seed: int, step: int, positions: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Return the times in 1..T of the samples at `positions` of a step, int64 (B,), and the weights of their losses.

    With the weights 1 / (T p(t)), float32 (B,), the mean of the losses is that of uniform times on average.
    """
    p = time_probabilities(history)
    words = random_words(seed, TRAINING_TIME, step, positions)[:, 0].to(p.device)
    cumulative = p.cumsum(0)
    uniform = (words.double() + 0.5) * 2.0**-32 * cumulative[-1]
    index = torch.searchsorted(cumulative, uniform).clamp(max=len(p) - 1)
    return 1 + index, (1 / (len(p) * p[index])).float()


def record_losses(history: Tensor, t: Tensor, losses: Tensor) -> Tensor:
    """Return the history after the losses of a step, (B,), at their times (B,), in the order of their positions.

    Losses that are not finite are left out.
    """
    t = torch.where(losses.isfinite(), t, 0)
    same = t[:, None] == t
    earlier, later = same.tril(-1).sum(1), same.triu(1).sum(1)
    slot = (history[t, HISTORY].long() + earlier) % HISTORY
    history = history.clone()
    history[torch.where(later < HISTORY, t, 0), slot] = losses.double()  # row 0 takes what is not kept
    history[:, HISTORY] += torch.bincount(t, minlength=len(history))
    history[0] = 0
    return history
