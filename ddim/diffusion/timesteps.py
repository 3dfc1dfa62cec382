"""The sub-sequence tau of 1..T on which a trajectory runs (paper, sections 4.2, C.1 and D.2).

A rule takes (T, S) and returns the times in increasing order. The paper's rules and `cosine` return exactly S times,
strictly increasing, ending at T. The two rules of the official implementation keep their quirks, because published
numbers were made with them: `uniform` returns more than S times when S does not divide T; `quad` stops at 0.8 T and
repeats small times, and a repeated time is a step that costs a network evaluation and changes nothing.
"""

import math
from collections.abc import Callable, Iterable, Sequence


def linear_tau(T: int, S: int) -> tuple[int, ...]:
    """The paper's linear rule, tau_i = floor(c i) with c = T/S (section D.2); used for every set but CIFAR-10.

    Raises:
        ValueError: S is not in 1..T. (So do all rules.)
    """
    _check(T, S)
    return tuple(T * i // S for i in range(1, S + 1))


def quadratic_tau(T: int, S: int) -> tuple[int, ...]:
    """The paper's quadratic rule, tau_i = floor(c i^2) with c = T/S^2 (section D.2); used for CIFAR-10.

    Where flooring gives 0 or repeats a time, the paper is silent; here tau_i is then the least time above
    tau_{i-1}. That keeps S distinct times in 1..T, and changes the first few only.
    """
    _check(T, S)
    return _strictly_increasing(T * i * i // (S * S) for i in range(1, S + 1))


def cosine_tau(T: int, S: int) -> tuple[int, ...]:
    """Cosine spacing, tau_i = floor(T (1 - cos(pi i/S)) / 2), dense at both ends; repaired like `quadratic_tau`."""
    _check(T, S)
    tau = _strictly_increasing(math.floor(T * (1 - math.cos(math.pi * i / S)) / 2) for i in range(1, S + 1))
    # The repair pushes up from the left; towards T, where the spacing is dense again, times must also leave room.
    return tuple(min(t, T - (S - i)) for i, t in enumerate(tau, start=1))


def reference_uniform_tau(T: int, S: int) -> tuple[int, ...]:
    """`--skip_type uniform` of the official implementation: every (T // S)-th time from 1 on.

    Returns ceil(T / (T // S)) times, which is more than S whenever S does not divide T (S=300, T=1000: 334).
    """
    _check(T, S)
    return tuple(range(1, T + 1, T // S))


def reference_quad_tau(T: int, S: int) -> tuple[int, ...]:
    """`--skip_type quad` of the official implementation: squares of S equal steps from 0 to sqrt(0.8 T), truncated.

    Returns S times, the last near 0.8 T, with repeats at the low end from about S=50 on (96 of 100 are distinct).
    The CIFAR-10 numbers of Table 1 come out with this rule. S=1 gives time 1 alone.
    """
    _check(T, S)
    top = math.sqrt(0.8 * T)
    roots = [i * (top / (S - 1)) for i in range(S - 1)] + [top] if S > 1 else [0.0]
    return tuple(int(root**2) + 1 for root in roots)


def quad_or_full_tau(T: int, S: int) -> tuple[int, ...]:
    """What Table 1 needs for CIFAR-10: the official `quad`, and the full chain 1..T at S = T.

    Section D.2 gives its rules for dim(tau) < T only; `quad` would stop at 0.8 T and repeat a third of its times there.
    """
    return linear_tau(T, S) if S == T else reference_quad_tau(T, S)


def explicit_tau(T: int, times: Sequence[int]) -> tuple[int, ...]:
    """Return the user's own times.

    Raises:
        ValueError: empty, not strictly increasing, or outside 1..T.
    """
    tau = tuple(times)
    if not tau or any(b <= a for a, b in zip((0, *tau), tau, strict=False)) or tau[-1] > T:
        raise ValueError(f"times={list(tau)} must be a list of times in 1..{T}, each larger than the one before.")
    return tau


def distinct_evaluations(tau: Sequence[float]) -> int:
    """How many of the network evaluations of a trajectory over `tau` are at a time of their own."""
    return len(set(tau))


def _check(T: int, S: int) -> None:
    if not 1 <= S <= T:
        raise ValueError(f"S={S} steps cannot be chosen from T={T} times; S must lie in 1..{T}.")


def _strictly_increasing(times: Iterable[int]) -> tuple[int, ...]:
    tau: list[int] = []
    last = 0
    for t in times:
        last = max(t, last + 1)
        tau.append(last)
    return tuple(tau)


SPACINGS: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "linear": linear_tau,
    "quadratic": quadratic_tau,
    "cosine": cosine_tau,
    "uniform": reference_uniform_tau,
    "quad": reference_quad_tau,
    "quad_or_full": quad_or_full_tau,
}
