"""Multinomial diffusion: the method for discrete data (paper, appendix A).

A pixel is one of K categories, here K grey levels. With x_0 and x_t as one-hot vectors and u = 1/K in every entry:

    q(x_t | x_0)      = Cat( a_t x_0 + (1 - a_t) u )                                                       (Eq. 17)
    q(x_s | x_t, x_0) = Cat( σ x_t + (a_s - σ a_t) x_0 + ((1 - a_s) - (1 - a_t) σ) u )                     (Eq. 19)
    p(x_s | x_t)      = the same with f_θ(x_t), the network's probabilities of the categories, for x_0        (Eq. 20)

Here a_t multiplies x_0 itself, not by its root. Probabilities are tensors (..., K). Images hold a category as one of K
values at equal distances in [-1, 1], so that networks, files and metrics take them as they take other images.

The Gaussian loop (`sampling.py`) adds up what a step is made of; this one draws from it. The times, the rows of
coefficients and the random numbers are the same.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ddim.diffusion.rules import Rule
from ddim.diffusion.sampling import Model, State, rows
from ddim.diffusion.schedule import NoiseSchedule
from ddim.random import SAMPLING, random_words

Level = TypeVar("Level", float, Tensor)


class Mixture(NamedTuple):
    """A step as a row: the probabilities that a pixel of x_s is that of x_t, that of x_0, or any category (Eq. 19).

    Attributes:
        x_t, x0, uniform: each in [0, 1]; they sum to 1.
    """

    x_t: float
    x0: float
    uniform: float


def mixture(a_t: Level, a_s: Level, sigma_fraction: float) -> Mixture:
    """Return the row of the step from a_t to a_s >= a_t, floats or float64 tensors; see `Multinomial`."""
    sigma_t = sigma_fraction * (1 - a_s) / (1 - a_t)
    return Mixture(sigma_t, a_s - sigma_t * a_t, (1 - sigma_fraction) * (1 - a_s))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Multinomial(Rule):
    """The family of Eq. 19: σ = sigma_fraction · (1 - a_s) / (1 - a_t).

    All three probabilities are in [0, 1] exactly for σ in 0 .. (1 - a_s) / (1 - a_t), and the paper says no more of σ.
    It is not η: there is no Gaussian noise, and for more than two categories no σ makes the forward process Markovian.

    Attributes:
        sigma_fraction: σ as a fraction of its largest value, in [0, 1]. 1 is the least random, the DDIM of the family:
            a pixel stays, or is drawn from the prediction. 0 is the most random: x_s depends on x_t through the
            prediction only.

    Raises:
        ValueError: sigma_fraction outside [0, 1].
    """

    sigma_fraction: float = 1.0
    zero_snr = True

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_fraction <= 1:
            raise ValueError(f"sigma_fraction={self.sigma_fraction} must lie in [0, 1]: 1 is the least random.")

    def coefficients(self, levels: Sequence[float], a_s: float) -> Mixture:  # type: ignore[override]
        """Return the probabilities of Eq. 19, which the Gaussian loop does not take; there are no upward steps."""
        if not levels[0] <= a_s or levels[0] == 1:
            raise ValueError(f"multinomial cannot go up from alpha_bar={levels[0]} to {a_s}: it only samples.")
        return mixture(levels[0], a_s, self.sigma_fraction)


def to_categories(x: Tensor, categories: int) -> Tensor:
    """Return the category nearest to each value in [-1, 1], int64 0 .. K-1 of the same shape."""
    return ((x + 1) * ((categories - 1) / 2)).round().long().clamp(0, categories - 1)


def to_values(c: Tensor, categories: int) -> Tensor:
    """Return the values in [-1, 1] that hold the categories c, float32 of the same shape."""
    return c.float() * (2 / (categories - 1)) - 1


def marginal(x0: Tensor, a_t: float | Tensor) -> Tensor:
    """Return the probabilities of q(x_t | x_0), (..., K) as x0, which may itself be probabilities (Eq. 17)."""
    return a_t * x0 + (1 - a_t) / x0.shape[-1]


def posterior(row: Mixture, x_t: Tensor, x0: Tensor) -> Tensor:
    """Return the probabilities of q(x_s | x_t, x_0) (Eq. 19), or of p(x_s | x_t) where x0 is f_θ(x_t) (Eq. 20).

    Args:
        row: of the step.
        x_t: one-hot, (..., K).
        x0: one-hot or probabilities, (..., K).
    """
    return row.x_t * x_t + row.x0 * x0 + row.uniform / x0.shape[-1]


def draw(probabilities: Tensor, words: Tensor) -> Tensor:
    """Return categories drawn from float64 probabilities (..., K), int64 (...): the quantiles of uniform numbers.

    Args:
        probabilities: of the categories, summing to 1.
        words: 32-bit words (...) of `random_words`.
    """
    uniform = (words.double() + 0.5) * 2.0**-32
    return (probabilities.cumsum(-1)[..., :-1] <= uniform[..., None]).sum(-1)


def initial_state(
    indices: Sequence[int] | Tensor,
    shape: Sequence[int],
    seed: int,
    categories: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return x_T ~ Cat(u), float32 (B, *shape), for the images numbered `indices`; arguments as in `initial_noise`."""
    words = words_of(seed, SAMPLING, 0, torch.as_tensor(indices, dtype=torch.int64, device=device), shape)
    return to_values(words * categories >> 32, categories)


def words_of(seed: int, stream: int, step: int, indices: Sequence[int] | Tensor, shape: Sequence[int]) -> Tensor:
    """Return a 32-bit word for each pixel to draw its category with, int64 (B, *shape); arguments as in `gaussian`."""
    return random_words(seed, stream, step, indices, math.prod(shape)).reshape(-1, *shape)


def _category_logits(model: Model, x: Tensor, t: Tensor) -> Tensor:
    """Return the network's logits, float64 (B, C, H, W, K), from its output (B, C·K, H, W) with K fastest."""
    return model(x, t).double().unflatten(1, (x.shape[1], -1)).movedim(2, -1)


def trajectory(
    model: Model,
    schedule: NoiseSchedule,
    x: Tensor,
    times: Sequence[int],
    rule: Multinomial,
    *,
    seed: int = 0,
    indices: Sequence[int] | Tensor | None = None,
) -> Iterator[State]:
    """Walk x through descending `times`, one network evaluation a step, and yield the state after each.

    Its x0 is the most probable category of each pixel, and its eps x_t itself, where Eq. 12 has what points to x_t.

    Args:
        model: (x_t (B,C,H,W), t (B,)) -> logits (B, C·K, H, W), with K fastest.
        schedule: alpha_bar.
        x: the state at times[0], (B, C, H, W), categories as values in [-1, 1].
        times: (*reversed(tau), 0).
        rule: the choice of σ.
        seed, indices: decide the draws, as in `ddim.diffusion.sampling.trajectory`.

    Raises:
        ValueError: a time outside 0..T, or a step that goes up.
    """
    steps = rows(rule, schedule, times)
    addresses = torch.as_tensor(range(len(x)) if indices is None else indices, dtype=torch.int64, device=x.device)
    return _walk(model, x, [(row.t, row.s, row.step) for row in steps], seed, addresses)  # type: ignore[misc]


def _walk(
    model: Model, x: Tensor, steps: Sequence[tuple[int, int, Mixture]], seed: int, addresses: Tensor
) -> Iterator[State]:
    for k, (t, s, row) in enumerate(steps, start=1):
        with torch.no_grad():
            x0 = _category_logits(model, x, torch.full((len(x),), t, device=x.device)).softmax(-1)
            K = x0.shape[-1]
            words = words_of(seed, SAMPLING, k, addresses, x.shape[1:])
            x_t, x = x, to_values(draw(posterior(row, F.one_hot(to_categories(x, K), K), x0), words), K)
        yield State(k, s, x, to_values(x0.argmax(-1), K), x_t, k)


def per_sample_loss(
    model: Model,
    alpha_bar: Tensor,
    x0: Tensor,
    t: Tensor,
    words: Tensor,
    categories: int,
    loss: str = "cross_entropy",
    sigma_fraction: float = 1.0,
) -> Tensor:
    """Return the loss of each image in nats, its mean over the pixels, float64 (B,).

    Args:
        model: (x_t, t) -> logits (B, C·K, H, W).
        alpha_bar: float64 (T+1,) on the device of x0.
        x0: images in [-1, 1], (B, C, H, W); each value is taken to the nearest category.
        t: times in 1..T, int64 (B,).
        words: to draw x_t with, (B, C, H, W) of `words_of`.
        categories: K.
        loss: a key of LOSSES.
        sigma_fraction: of the step from t to t - 1, for `kl` and `bound`.
    """
    clean = F.one_hot(to_categories(x0, categories), categories).double()
    a_t, a_s = (alpha_bar[time].reshape(-1, 1, 1, 1, 1) for time in (t, t - 1))
    c = draw(marginal(clean, a_t), words)
    log_x0 = _category_logits(model, to_values(c, categories), t).log_softmax(-1)
    row = mixture(a_t, a_s, sigma_fraction)
    return LOSSES[loss](row, F.one_hot(c, categories), clean, log_x0).flatten(1).mean(1)


def cross_entropy(row: Mixture, x_t: Tensor, x0: Tensor, log_x0: Tensor) -> Tensor:
    """Return KL(x_0 || f_θ) = -log f_θ of the true category, (..., 1): the bound with weight 1, as γ = 1 in Eq. 5."""
    return -(x0 * log_x0).sum(-1, keepdim=True)


def bound(row: Mixture, x_t: Tensor, x0: Tensor, log_x0: Tensor) -> Tensor:
    """Return (a_s - σ a_t) KL(x_0 || f_θ), which is at least `kl` because KL is convex, (..., 1)."""
    return row.x0 * cross_entropy(row, x_t, x0, log_x0)


def kl(row: Mixture, x_t: Tensor, x0: Tensor, log_x0: Tensor) -> Tensor:
    """Return KL(q(x_s | x_t, x_0) || p(x_s | x_t)) of Eq. 19 and 20, (..., 1)."""
    q, p = posterior(row, x_t, x0), posterior(row, x_t, log_x0.exp())
    return (torch.xlogy(q, q) - torch.xlogy(q, p)).sum(-1, keepdim=True)


LOSSES: dict[str, Callable[[Mixture, Tensor, Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "bound": bound,
    "kl": kl,
}
