"""What the variational bound is made of: KL divergences of Gaussians, and the decoder for pixels; in nats."""

import math

import torch
from torch import Tensor

PIXEL = 2 / 255  # the distance of two grey levels in [-1, 1]
SMALLEST = 1e-12  # probability of a pixel, as in Ho et al.'s code


def gaussian_kl(mean_q: Tensor, mean_p: Tensor, std_q: float | Tensor, std_p: float | Tensor) -> Tensor:
    """Return KL(N(mean_q, std_q² I) || N(mean_p, std_p² I)) of each image, (B,).

    Args:
        mean_q, mean_p: (B, C, H, W).
        std_q, std_p: > 0; floats, or tensors that broadcast to the means.
    """
    ratio = torch.as_tensor(std_q / std_p, dtype=mean_p.dtype, device=mean_p.device).square()
    return 0.5 * (((mean_q - mean_p) / std_p).square() + (ratio - 1 - ratio.log())).flatten(1).sum(1)


def discretised_log_likelihood(x0: Tensor, mean: Tensor, std: float | Tensor) -> Tensor:
    """Return log p of pixels under a Gaussian that is integrated over each grey level, (B,) (Ho et al., Eq. 13).

    Black and white take all that is beyond them. A pixel has at least the probability `SMALLEST`. The normal
    distribution is exact, where Ho et al.'s code takes an approximation by tanh.

    Args:
        x0: pixels in [-1, 1], (B, C, H, W).
        mean: like x0.
        std: > 0; a float, or a tensor that broadcasts to the mean.
    """
    upper, lower = ((x0 + half - mean) / std for half in (PIXEL / 2, -PIXEL / 2))
    above = torch.where(x0 > 1 - PIXEL / 2, math.inf, upper)
    below = torch.where(x0 < -1 + PIXEL / 2, -math.inf, lower)
    # On the side where the distribution is small, so that a difference of two numbers near 1 loses nothing. By erfc:
    # torch.special.ndtr is 0 below -5.5 in float32.
    scale = torch.where(lower > 0, 1.0, -1.0) / math.sqrt(2)
    probability = 0.5 * (torch.erfc(scale * above) - torch.erfc(scale * below)).abs()
    return probability.clamp(min=SMALLEST).log().flatten(1).sum(1)
