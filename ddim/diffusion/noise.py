"""The noise of sampling: x_T, and the fresh noise of each step and corrector step: functions of (seed, image, step)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddim.random import CORRECTOR, SAMPLING, gaussian


def initial_noise(
    indices: Sequence[int] | Tensor, shape: Sequence[int], seed: int, device: torch.device | str | None = None
) -> Tensor:
    """Return x_T ~ N(0, I), float32 (B, *shape): the starting points of the images numbered `indices`.

    Args:
        indices: (B,) image numbers, 0 .. 2**32 - 1.
        shape: of one image, (C, H, W).
        seed: 0 .. 2**64 - 1.
        device: where the noise is made; it is bitwise the same everywhere.
    """
    return step_noise(indices, shape, seed, step=0, device=device)


def step_noise(
    indices: Sequence[int] | Tensor,
    shape: Sequence[int],
    seed: int,
    step: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the noise of sampling step 1, 2, ..., float32 (B, *shape); see `initial_noise`, which is step 0."""
    return gaussian(seed, SAMPLING, step, torch.as_tensor(indices, dtype=torch.int64, device=device), shape)


def corrector_noise(
    indices: Sequence[int] | Tensor,
    shape: Sequence[int],
    seed: int,
    step: int,
    number: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the noise of corrector step `number` = 1, 2, ..., 1023 after a sampling step; see `step_noise`."""
    indices = torch.as_tensor(indices, dtype=torch.int64, device=device)
    return gaussian(seed, CORRECTOR, step << 10 | number, indices, shape)
