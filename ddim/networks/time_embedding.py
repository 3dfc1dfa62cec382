"""The sinusoidal embedding of times."""

import math

import torch
from torch import Tensor


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Return the sinusoidal embedding of network times, [sin(t w_k), cos(t w_k)] with w_k = 10000^(-k / (dim/2 - 1)).

    Computed in float32 also under autocast: in bfloat16 the times 512 and 513 are equal. Source: Vaswani et al.
    2017, in the order and with the frequencies of DDPM's code.

    Args:
        t: (B,) integers, zero-based.
        dim: even, at least 4.

    Returns:
        (B, dim) float32: dim/2 sines, then dim/2 cosines.
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(k * (-math.log(10000) / (half - 1)))
    phases = t.float()[:, None] * frequencies
    return torch.cat([phases.sin(), phases.cos()], dim=1)
