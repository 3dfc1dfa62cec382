"""Integrals over Lagrange polynomials: the weights of multistep rules with unequal steps."""

import functools
from collections.abc import Callable, Sequence

import torch


def lagrange_integrals(
    nodes: Sequence[float],
    start: float,
    end: float,
    variable: Callable[[float], float] = lambda p: p,
    density: Callable[[float], float] = lambda p: 1.0,
) -> list[float]:
    """Return, for each node, the integral of its Lagrange polynomial: ∫ L_i(variable(p)) density(p) dp, start to end.

    Args:
        nodes: distinct values of `variable`.
        start, end: limits of p.
        variable, density: smooth between them.
    """
    weights = [0.0] * len(nodes)
    for fraction, share in _gauss_legendre():
        p = start + fraction * (end - start)
        u, mass = variable(p), share * density(p) * (end - start)
        for i, node in enumerate(nodes):
            value = 1.0  # loops: a search for tau computes many of these
            for j, other in enumerate(nodes):
                if j != i:
                    value *= (u - other) / (node - other)
            weights[i] += mass * value
    return weights


@functools.cache
def _gauss_legendre(points: int = 32) -> list[tuple[float, float]]:
    """Return nodes and weights of Gauss and Legendre's quadrature on [0, 1], by the eigenvalues of Golub and Welsch."""
    k = torch.arange(1, points, dtype=torch.float64)
    off = k / torch.sqrt(4 * k**2 - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return [((1 + x) / 2, v**2) for x, v in zip(nodes.tolist(), vectors[0].tolist(), strict=True)]
