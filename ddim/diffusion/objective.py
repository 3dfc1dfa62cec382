"""The training objective: L_1 of the paper (Eq. 5 with all weights 1), which is DDPM's L_simple, and other weights.

|| ε - ε_θ( sqrt(a_t) x_0 + sqrt(1 - a_t) ε, t ) ||²
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddim.diffusion.learned_variance import vlb_terms
from ddim.diffusion.prediction import PREDICTIONS, split_output
from ddim.diffusion.sampling import Model
from ddim.diffusion.schedule import NoiseSchedule
from ddim.random import LABEL_DROP, TRAINING_NOISE, TRAINING_TIME, gaussian, random_words


def q_sample(x0: Tensor, eps: Tensor, a_t: Tensor) -> Tensor:
    """Return x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) ε (Eq. 4).

    Args:
        x0, eps: (B, C, H, W).
        a_t: alpha_bar at each image's time, float64, broadcastable to x0. The roots are rounded once.
    """
    return a_t.sqrt().to(x0.dtype) * x0 + (1 - a_t).sqrt().to(x0.dtype) * eps


def add_noise(schedule: NoiseSchedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return x_t (Eq. 4) of images x0 and noise ε, (B, C, H, W), at their times t in 0..T, int64 (B,).

    Raises:
        ValueError: a time outside 0..T.
    """
    return q_sample(x0, eps, _levels(schedule, t, x0))


def velocity(schedule: NoiseSchedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return v = sqrt(a_t) ε - sqrt(1 - a_t) x_0, the target of prediction `v`; arguments as in `add_noise`.

    Raises:
        ValueError: a time outside 0..T.
    """
    return PREDICTIONS["v"].target(x0, eps, _levels(schedule, t, x0))


def _levels(schedule: NoiseSchedule, t: Tensor, x0: Tensor) -> Tensor:
    """Return alpha_bar at each image's time, float64, broadcastable to x0."""
    if bool(((t < 0) | (t > schedule.T)).any()):
        raise ValueError(f"t={t.tolist()} must hold times in 0..{schedule.T}.")
    return schedule.alpha_bar.to(x0.device)[t].reshape(-1, *[1] * (x0.ndim - 1))


def per_sample_loss(
    model: Model,
    alpha_bar: Tensor,
    x0: Tensor,
    t: Tensor,
    eps: Tensor,
    *,
    prediction: str = "eps",
    reduction: str = "mean",
    weight: str = "simple",
    gamma: float = 5.0,
    vlb_weight: float = 0.001,
) -> Tensor:
    """Return the loss of each image, float32 (B,).

    Args:
        model: (x_t, t) -> prediction, (B, C, H, W), or (B, 2C, H, W) with v of a learned variance.
        alpha_bar: float64 (T+1,) on the device of x0.
        x0: images in [-1, 1], (B, C, H, W).
        t: times in 1..T, int64 (B,).
        eps: standard normal, (B, C, H, W).
        prediction: a key of PREDICTIONS.
        reduction: over the C H W dimensions of an image, a key of REDUCTIONS: `mean` (Ho et al.) or `sum` (the official
            implementation).
        weight: one of LOSS_WEIGHTS. `simple`: all squares count alike. `min_snr`: see `min_snr_weight`. `vlb`: T times
            the bound's term at t in bits per dimension, which is L_vlb on average over t. `hybrid`: simple plus
            vlb_weight times vlb, which trains v alone: x̂0 is a constant in it (Nichol and Dhariwal 2021, Eq. 16).
        gamma: γ of `min_snr`.
        vlb_weight: λ of `hybrid`.
    """
    a_t = alpha_bar[t].reshape(-1, *[1] * (x0.ndim - 1))
    x_t = q_sample(x0, eps, a_t)
    target = PREDICTIONS[prediction].target(x0, eps, a_t)
    output, v = split_output(model(x_t, t).float(), x_t)
    loss = ((output - target) ** 2).flatten(1)
    if weight == "min_snr":
        loss = min_snr_weight(prediction, alpha_bar[t], gamma).to(loss.dtype)[:, None] * loss
    elif weight in ("vlb", "hybrid"):
        x0_hat = PREDICTIONS[prediction].x0(output.detach() if weight == "hybrid" else output, x_t, a_t)
        nats = vlb_terms(alpha_bar, t, x0, x0_hat, v)
        bits = (len(alpha_bar) - 1) * nats[:, None] / (loss.shape[1] * math.log(2))  # of each dimension
        loss = loss + vlb_weight * bits if weight == "hybrid" else bits.expand_as(loss)
    return REDUCTIONS[reduction](loss)


def min_snr_weight(prediction: str, a_t: Tensor, gamma: float) -> Tensor:
    """Return the weight of the squared error of what the network predicts (Hang et al. 2023, Min-SNR-γ).

    With SNR = a_t / (1 - a_t), the squared error of x̂0 counts min(SNR, γ) times. It is 1 / SNR times that of ε̂, and
    1 - a_t = 1 / (SNR + 1) times that of v.

    Args:
        prediction: a key of PREDICTIONS.
        a_t: alpha_bar, float64, below 1; above 0 for `eps`.
        gamma: γ > 0; 5 in the paper.
    """
    snr = a_t / (1 - a_t)
    return snr.clamp(max=gamma) / {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1}[prediction]


def uniform_times(T: int, seed: int, step: int, positions: Sequence[int] | Tensor) -> Tensor:
    """Return independent uniform times in 1..T for the samples at `positions` of the global batch, int64 (B,)."""
    words = random_words(seed, TRAINING_TIME, step, positions)[:, 0]
    return 1 + (words * T >> 32)


def antithetic_times(T: int, seed: int, step: int, positions: Sequence[int] | Tensor) -> Tensor:
    """Return uniform times in antithetic pairs: positions 2m and 2m + 1 get t and T + 1 - t.

    The official implementation pairs the first half of its batch with the second. Pairing neighbours has the same
    distribution and makes a sample's time a function of (seed, step, position) alone, whatever the batch size.
    """
    positions = torch.as_tensor(positions, dtype=torch.int64)
    t = uniform_times(T, seed, step, positions // 2)
    return torch.where(positions % 2 == 0, t, T + 1 - t)


def drop_labels(
    y: Tensor, classes: int, probability: float, seed: int, step: int, positions: Sequence[int] | Tensor
) -> Tensor:
    """Return the labels with some replaced by K, that of no label (classifier-free guidance, Ho and Salimans 2022).

    Args:
        y: of the samples at `positions` of the global batch of optimiser step `step`, int64 (B,) in 0..K-1.
        classes: K.
        probability: with which a label is dropped, in [0, 1].
        seed: which of them are follows from it, the step and the position.
    """
    words = random_words(seed, LABEL_DROP, step, positions)[:, 0]
    return torch.where(words < probability * 2**32, classes, y)


def training_noise(seed: int, step: int, positions: Sequence[int] | Tensor, shape: Sequence[int]) -> Tensor:
    """Return ε for the samples at `positions` of the global batch of optimiser step `step`, float32 (B, *shape)."""
    return gaussian(seed, TRAINING_NOISE, step, positions, shape)


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {  # (B, D) -> (B,)
    "mean": lambda square: square.mean(1),
    "sum": lambda square: square.sum(1),
}
LOSS_WEIGHTS = ("simple", "min_snr", "vlb", "hybrid")
TIME_SAMPLERS: dict[str, Callable[[int, int, int, Sequence[int] | Tensor], Tensor]] = {
    "uniform": uniform_times,
    "antithetic": antithetic_times,
}
