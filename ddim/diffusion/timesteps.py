"""The sub-sequence tau of 1..T on which a trajectory runs (paper, sections 4.2, C.1 and D.2).

A rule takes (T, S) and returns the times in increasing order. The paper's rules and `cosine` return exactly S times,
strictly increasing, ending at T. The two rules of the official implementation keep their quirks, because published
numbers were made with them: `uniform` returns more than S times when S does not divide T; `quad` stops at 0.8 T and
repeats small times, and a repeated time costs a network evaluation and changes next to nothing. `leading`,
`trailing` and `linspace` are diffusers' `timestep_spacing`, whose index i is the time i + 1; they return S times.
"""

import itertools
import math
import re
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
    """`--skip_type quad` of the official implementation: squares of S numbers at equal distances.

    These go from 0 to sqrt(0.8 T), and their squares are truncated; our times are one more.
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


def leading_tau(T: int, S: int, steps_offset: int = 0) -> tuple[int, ...]:
    """diffusers' `leading`: S times, T // S apart, from 1 + steps_offset on. `uniform` without its surplus times.

    Raises:
        ValueError: S is not in 1..T, or steps_offset is negative or leads beyond T.
    """
    _check(T, S)
    tau = tuple(1 + steps_offset + i * (T // S) for i in range(S))
    if steps_offset < 0 or tau[-1] > T:
        raise ValueError(
            f"steps_offset={steps_offset} must be 0 or more, and S={S} times from it on must end by T={T}."
        )
    return tau


def trailing_tau(T: int, S: int) -> tuple[int, ...]:
    """diffusers' `trailing`: T, T - T/S, T - 2 T/S, ..., each rounded. In its floating point, for the same ties."""
    _check(T, S)
    stride = T - T / S - T
    return tuple(round(T + i * stride) for i in reversed(range(S)))


def linspace_tau(T: int, S: int) -> tuple[int, ...]:
    """diffusers' `linspace`: S equal distances from 1 to T, rounded as its indices are; S=1 gives time 1 alone."""
    _check(T, S)
    stride = (T - 1) / max(S - 1, 1)
    return tuple(1 + round(i * stride) for i in range(S))


def respaced_count(name: str) -> int | None:
    """Return how many times a name of Improved DDPM's respacing asks for, None if it is no such name."""
    if not re.fullmatch(r"ddim\d+|\d+(,\d+)*", name):
        return None
    return sum(map(int, name.removeprefix("ddim").split(",")))


def respaced_tau(T: int, name: str) -> tuple[int, ...]:
    """Improved DDPM's respacing by its names (Nichol and Dhariwal 2021; openai/improved-diffusion, `space_timesteps`).

    `ddimN`: every i-th time from 1 on, with the least i that gives exactly N times. `N1,N2,...`: 1..T is cut into equal
    sections, of which the first are longer by one where T does not divide; each has N_i times at equal distances from
    its first to its last, added up in floating point and rounded.

    Raises:
        ValueError: there is no such stride, or a section has fewer times than it is to give.
    """
    if name.startswith("ddim"):
        N = int(name.removeprefix("ddim"))
        stride = next((i for i in range(1, T) if len(range(0, T, i)) == N), None)
        if stride is None:
            raise ValueError(f"spacing={name} does not exist for T={T}: no stride gives exactly {N} times.")
        return tuple(range(1, T + 1, stride))
    counts = [int(count) for count in name.split(",")]
    tau: list[int] = []
    start = 1
    for section, count in enumerate(counts):
        size = T // len(counts) + (section < T % len(counts))
        if not 1 <= count <= size:
            raise ValueError(f"spacing={name}: a section of {size} of the T={T} times cannot give {count} of them.")
        apart = (size - 1) / max(count - 1, 1)
        distances = itertools.accumulate([apart] * (count - 1), initial=0.0)
        tau += [start + round(distance) for distance in distances]
        start += size
    return tuple(tau)


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
    "leading": leading_tau,
    "trailing": trailing_tau,
    "linspace": linspace_tau,
}
