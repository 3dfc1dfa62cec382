"""The adapter between the paper's times 1..T and those of networks, 0..T-1."""

from collections.abc import Callable

from torch import Tensor


def zero_based(network: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a network that was trained on the times 0..T-1 be called with the paper's times 1..T.

    This is the only place with that shift. The paper's time 0 is data and never reaches a network: trajectories call it
    with t >= 1 only.

    Args:
        network: (x (B, C, H, W), zero-based t (B,)) -> (B, C, H, W); a conditional one takes labels y (B,) too.

    Returns:
        model(x, t) = network(x, t - 1), or model(x, t, y) = network(x, t - 1, y), with t (B,) the paper's times.
    """

    def model(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return network(x, t - 1) if y is None else network(x, t - 1, y)

    return model
