"""The likelihood of images by the probability-flow equation, log p(x_0) in nats; `bits_per_dim` converts.

A deterministic sampler of infinitely many steps maps x_T to x_0 (paper, Eq. 14), and the density changes by the trace
of what it follows (Song et al. 2021). With the angle φ = arctan σ̄, so that sqrt(a) = cos φ and sqrt(1 - a) = sin φ,

    dx / dφ = v,   v = cos φ ε̂ - sin φ x̂0,      log p(x at φ_0) = log N(x_T; 0, I) + ∫ tr(∂v/∂x) dφ,

the integral running from the data to x_T. No term for a change of variables remains, and v is finite at both ends. The
trace is Hutchinson's estimate z · (∂v/∂x) z with random z, E z zᵀ = I, which has no bias.

The prior is N(0, I) at the last time. The data stand at time 0, alpha_bar = 1 (below t = 1 the network is asked at
t = 1, as samplers do), or as they are at time 1. They are continuous: `dequantise` makes them of pixels.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddim.diffusion.gaussians import PIXEL
from ddim.diffusion.prediction import PREDICTIONS, check_level, split_output
from ddim.diffusion.rules import Rule
from ddim.diffusion.sampling import Model, last_state, trajectory
from ddim.diffusion.schedule import NoiseSchedule
from ddim.random import gaussian, random_words

PROBE_NOISE, DEQUANTISATION = 16, 17  # streams of random numbers, as in ddim.random

Field = Callable[[Tensor], Tensor]  # x (B, ...) -> the same shape


def bits_per_dim(log_likelihood: Tensor, dimensions: int) -> Tensor:
    """Return -log2 p / D for log-likelihoods in nats of any shape."""
    return -log_likelihood / (dimensions * math.log(2))


def dequantise(x0: Tensor, seed: int, indices: Sequence[int] | Tensor) -> Tensor:
    """Return x0 + u, float64, with u uniform within half a grey level on both sides.

    With p the density of the result, log p + D log PIXEL is on average at most the log-probability of the pixels.

    Args:
        x0: pixels in [-1, 1], (B, C, H, W).
        seed, indices: decide u: that of image indices[i] is a function of (seed, indices[i]).
    """
    addresses = torch.as_tensor(indices, dtype=torch.int64, device=x0.device)
    words = random_words(seed, DEQUANTISATION, 0, addresses, math.prod(x0.shape[1:]))
    return x0.double() + PIXEL * ((words.double() + 0.5) * 2.0**-32 - 0.5).reshape(x0.shape)


def rademacher(seed: int, stream: int, step: int, indices: Sequence[int] | Tensor, shape: Sequence[int]) -> Tensor:
    """Return -1 or 1 with equal probability, float32 (B, *shape); arguments as in `ddim.random.gaussian`."""
    bits = random_words(seed, stream, step, indices, math.prod(shape)) & 1
    return (2 * bits - 1).float().reshape(-1, *shape)


def draw_probes(kind: str, count: int, x: Tensor, seed: int, indices: Sequence[int] | Tensor) -> list[Tensor]:
    """Return `count` random z like x; those of an image depend on (seed, its index).

    Args:
        kind: a key of PROBES.
        x: (B, C, H, W).
        seed, indices: number k of image indices[i] is a function of (seed, k, indices[i]).
    """
    addresses = torch.as_tensor(indices, dtype=torch.int64, device=x.device)
    return [PROBES[kind](seed, PROBE_NOISE, k, addresses, x.shape[1:]).to(x.dtype) for k in range(count)]


def hutchinson(field: Field, x: Tensor, probes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return field(x) and Hutchinson's estimate of the trace of its Jacobian J, (B,): the mean of z · J z.

    Args:
        field: each image for itself.
        x: (B, ...).
        probes: z, each like x.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = field(x)
        products = [
            torch.autograd.grad(y, x, z, retain_graph=k < len(probes))[0].mul(z).flatten(1).sum(1)
            for k, z in enumerate(probes, start=1)
        ]
    return y.detach(), torch.stack(products).mean(0)


def log_prior(x_T: Tensor) -> Tensor:
    """Return log N(x_T; 0, I) of each image, (B,)."""
    return -0.5 * (x_T.square() + math.log(2 * math.pi)).flatten(1).sum(1)


class Solved(NamedTuple):
    """What the probability-flow equation gives.

    Attributes:
        log_likelihood: log p(x), float64 (B,).
        x_T: where the trajectories end, float64 (B, C, H, W).
        evaluations: of the network, with a gradient for each probe, int64 (B,).
    """

    log_likelihood: Tensor
    x_T: Tensor
    evaluations: Tensor


@torch.no_grad()
def fixed_steps(
    model: Model,
    schedule: NoiseSchedule,
    x: Tensor,
    tau: Sequence[int],
    rule: Rule,
    probes: Sequence[Tensor],
    *,
    prediction: str = "eps",
    first_time: int = 0,
    after_evaluation: Callable[[int], object] = lambda count: None,
) -> Solved:
    """Return the likelihood by a deterministic rule over the times tau: `trajectory` with one more dimension.

    That dimension is sqrt(a) l with dl = tr(∂v/∂x) dφ = (sqrt(a) tr(∂ε̂/∂x) - D sqrt(a (1 - a))) dσ̄, which a rule
    integrates like each pixel: the bracket is its ε̂.

    Args:
        model, schedule, prediction: as in `ddim.diffusion.sampling.trajectory`.
        x: continuous images, (B, C, H, W).
        tau: increasing times, as of a sampler.
        rule: a deterministic one that goes up.
        probes: z, see `draw_probes`.
        first_time: of the data, 0 or 1.
        after_evaluation: is called with the number of images that the network was evaluated for.

    Raises:
        ValueError: what `trajectory` refuses, or alpha_bar[T] = 0, where σ̄ is infinite.
    """
    times = ascending_times(tau, first_time)
    if schedule[times[-1]] == 0:
        raise ValueError("σ̄ is infinite at alpha_bar=0 (zero terminal SNR); take the adaptive rule, which needs none.")
    D, evaluations = math.prod(x.shape[1:]), 0

    def augmented(state: Tensor, t: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        # The loop asks for t = 1 where the time is 0, which only the first one can be.
        a = schedule[times[0] if evaluations == 1 else int(t[0])]
        x_t = state[:, :D].reshape(x.shape)
        eps, trace = hutchinson(lambda x_t: _eps(model, prediction, x_t, t, a), x_t, probes)
        after_evaluation(len(x))
        change = math.sqrt(a) * trace - D * math.sqrt(a * (1 - a))
        return torch.cat([eps.flatten(1), change[:, None]], 1)

    start = torch.cat([x.double().flatten(1), x.new_zeros(len(x), 1, dtype=torch.float64)], 1)
    state = last_state(trajectory(augmented, schedule, start, times, rule))
    x_T = state[:, :D].reshape(x.shape)
    integral = state[:, D] / math.sqrt(schedule[times[-1]])
    return Solved(log_prior(x_T) + integral, x_T, torch.full((len(x),), evaluations))


def ascending_times(tau: Sequence[int], first_time: int) -> tuple[int, ...]:
    """Return the times from the data on, increasing strictly: first_time (0 or 1), and those of tau above it."""
    return (first_time, *sorted({t for t in tau if t > first_time}))


def _eps(model: Model, prediction: str, x_t: Tensor, t: Tensor, a: float | Tensor) -> Tensor:
    return PREDICTIONS[prediction].eps(split_output(model(x_t.float(), t).double(), x_t)[0], x_t, a)


# Dormand and Prince's pair of orders 5 and 4: the weights of earlier slopes for each slope; the last row is the step
# itself, whose slope is the first of the following one. Then the difference to the solution of order 4.
_SLOPES: tuple[tuple[float, ...], ...] = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
FIRST_STEP, END = 1e-3, 1e-12  # of φ; what is left of it at the end is rounding
MOST_STEPS = 1000


@torch.no_grad()
def adaptive_steps(
    model: Model,
    schedule: NoiseSchedule,
    x: Tensor,
    tolerance: float,
    probes: Sequence[Tensor],
    *,
    prediction: str = "eps",
    first_time: int = 0,
    after_evaluation: Callable[[int], object] = lambda count: None,
) -> Solved:
    """Return the likelihood by Dormand and Prince's rule of order 5(4) in φ, with steps of its own for each image.

    A step is accepted where its error is at most `tolerance` (absolute, and relative to values above 1): the root mean
    square over the pixels, and that of the integral / D, in nats per dimension.

    Args:
        model: as in `fixed_steps`; also asked at fractional times, float32 (B,): t is linear in φ between whole ones.
        schedule, x, probes, prediction, first_time: as in `fixed_steps`.
        tolerance: in (0, 1).
        after_evaluation: as in `fixed_steps`.

    Raises:
        ValueError: a tolerance out of range, or one that takes more than 1,000 steps, or what `check_level` refuses.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance={tolerance} must lie between 0 and 1.")
    slope = _slope(model, schedule, prediction, x.shape[1:], probes, first_time)
    D, y = math.prod(x.shape[1:]), torch.cat([x.double().flatten(1), x.new_zeros(len(x), 1, dtype=torch.float64)], 1)
    phi = torch.full((len(x),), _angle(schedule[first_time]), dtype=torch.float64, device=x.device)
    end, h, members = _angle(schedule[schedule.T]), torch.full_like(phi, FIRST_STEP), torch.arange(len(x)).to(x.device)
    first, evaluations = slope(y, phi, members), torch.ones_like(members)
    for _ in range(MOST_STEPS):
        step = torch.minimum(h[members], end - phi[members])
        slopes = [first[members]]
        for row in _SLOPES:
            stage = y[members] + step[:, None] * _weighted(row, slopes)
            slopes.append(slope(stage, phi[members] + sum(row) * step, members))
        evaluations[members] += len(_SLOPES)
        after_evaluation(len(_SLOPES) * len(members))
        scale = tolerance * torch.maximum(y[members].abs(), stage.abs()).clamp(min=1)
        error = step[:, None] * _weighted(_ERROR, slopes) / scale
        size = torch.maximum(error[:, :D].square().mean(1).sqrt(), error[:, D].abs())
        accepted = size <= 1
        kept = members[accepted]
        y[kept], first[kept], phi[kept] = stage[accepted], slopes[-1][accepted], (phi[members] + step)[accepted]
        h[members] = step * (0.9 * size.clamp(min=1e-10) ** -0.2).clamp(0.2, 5.0)
        members = members[end - phi[members] > END]
        if not len(members):
            x_T = y[:, :D].reshape(x.shape)
            return Solved(log_prior(x_T) + D * y[:, D], x_T, evaluations)
    raise ValueError(f"tolerance={tolerance} is not kept in {MOST_STEPS:,} steps; take a larger one.")


def _slope(
    model: Model,
    schedule: NoiseSchedule,
    prediction: str,
    shape: Sequence[int],
    probes: Sequence[Tensor],
    first_time: int,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return (y (b, D + 1), φ (b,), members (b,)) -> (v, tr(∂v/∂x) / D), for the images numbered `members`."""
    for t in (first_time, schedule.T):
        check_level(prediction, schedule[t])
    convert = PREDICTIONS[prediction]
    angles = torch.tensor([_angle(a) for a in schedule.alpha_bar.tolist()], dtype=torch.float64)

    def slope(y: Tensor, phi: Tensor, members: Tensor) -> Tensor:
        grid = angles.to(y.device)
        above = torch.searchsorted(grid, phi).clamp(1, schedule.T)
        t = (above - (grid[above] - phi) / (grid[above] - grid[above - 1])).clamp(1, schedule.T).float()
        a = phi.cos().square().reshape(-1, *[1] * len(shape))

        def v(x_t: Tensor) -> Tensor:
            output, _ = split_output(model(x_t.float(), t).double(), x_t)
            return PREDICTIONS["v"].target(convert.x0(output, x_t, a), convert.eps(output, x_t, a), a)

        value, trace = hutchinson(v, y[:, :-1].reshape(-1, *shape), [z[members] for z in probes])
        return torch.cat([value.flatten(1), trace[:, None] / math.prod(shape)], 1)

    return slope


def _angle(a: float) -> float:
    """φ = arctan σ̄; accurate at both ends, where arccos of sqrt(a) is not."""
    return math.atan2(math.sqrt(1 - a), math.sqrt(a))


def _weighted(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    return torch.stack([w * k for w, k in zip(weights, slopes, strict=True)]).sum(0)


PROBES: dict[str, Callable[[int, int, int, Tensor, Sequence[int]], Tensor]] = {
    "rademacher": rademacher,
    "gaussian": gaussian,
}
