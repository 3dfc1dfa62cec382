"""Interpolation between starting points x_T (paper, section 5.3)."""

import torch
from torch import Tensor


def slerp(x: Tensor, y: Tensor, weight: float) -> Tensor:
    """Interpolate spherically between the starting points x and y (paper, Eq. 67).

    Args:
        x, y: (B, ...) float; each image is one vector.
        weight: 0 gives x, 1 gives y.
    """
    flat_x, flat_y = x.flatten(1).double(), y.flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(flat_x, flat_y, dim=1, eps=0.0).clamp(-1, 1)
    theta = torch.arccos(cosine)[:, None]
    # sin((1 - w) th) / sin(th) and sin(w th) / sin(th), with their limit where the two vectors are parallel
    parallel = theta < 1e-7
    theta = torch.where(parallel, torch.ones_like(theta), theta)
    weight_x = torch.where(parallel, 1 - weight, torch.sin((1 - weight) * theta) / torch.sin(theta))
    weight_y = torch.where(parallel, weight, torch.sin(weight * theta) / torch.sin(theta))
    return (weight_x * flat_x + weight_y * flat_y).to(x.dtype).reshape(x.shape)
