"""Random tensors that depend on their shape and a seed only."""

import torch


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian32(*shape: int, seed: int = 0) -> torch.Tensor:
    return gaussian(*shape, seed=seed, dtype=torch.float32)
