"""The variational bound of DDPM, term by term (Ho et al. 2020, Eq. 5), for pixels; in nats.

    -log p(x_0) <= KL(q(x_T|x_0) || N(0, I)) + Σ_t KL(q(x_s|x_t,x_0) || p(x_s|x_t)) - E log p(x_0|x_1)
                   L_T                         L_{t-1}, with s = t - 1 on all times     L_0

q is the paper's Eq. 7, with σ of η = 1 for DDPM; p is the step that samples: the same mean of the predicted x̂0 and ε̂.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ddim.diffusion.gaussians import discretised_log_likelihood, gaussian_kl
from ddim.diffusion.learned_variance import LearnedVariance
from ddim.diffusion.objective import q_sample
from ddim.diffusion.prediction import Clip, check_level, split_output, x0_and_eps
from ddim.diffusion.rules import DDIM, Estimate, Rule, SigmaHat, apply, noise_std
from ddim.diffusion.sampling import Model
from ddim.diffusion.schedule import NoiseSchedule
from ddim.random import gaussian

BOUND_NOISE = 18  # a stream of random numbers, as in ddim.random


@torch.no_grad()
def bound_terms(
    model: Model,
    schedule: NoiseSchedule,
    x0: Tensor,
    tau: Sequence[int],
    rule: Rule,
    *,
    prediction: str = "eps",
    clip: str | Clip = "none",
    seed: int = 0,
    indices: Sequence[int] | Tensor,
    after_evaluation: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """Return the terms of the bound -log p(x_0) <= Σ terms, nats, float64 (B, S + 1); with one x_t for each time.

    First L_0, then that of the step from each later time of tau to the time before it, at last L_T. All are KL
    divergences but L_0, whose decoder has the standard deviation of the step after it, as in Ho et al.'s code; a
    learned one lies between that and sqrt(β_1), as in Nichol and Dhariwal's.

    Args:
        model, schedule, prediction, clip: as in `ddim.diffusion.sampling.trajectory`.
        x0: pixels in [-1, 1], (B, C, H, W).
        tau: increasing times, two or more; 1..T for DDPM's bound.
        rule: DDIM(1), the posterior variance ("fixed small"); SigmaHat(), the larger one ("fixed large"); or DDIM(eta)
            with eta > 0, the bound of the paper's family; or LearnedVariance(), for a network that predicts it.
        seed, indices: decide the noise in x_t: that of image indices[i] is a function of (seed, t, indices[i]).
        after_evaluation: is called with the number of images that the network was evaluated for.

    Raises:
        ValueError: times that do not increase, a rule without noise, or what `check_level` refuses.
    """
    check_bound(schedule, tau, rule, prediction)
    addresses = torch.as_tensor(indices, dtype=torch.int64, device=x0.device)
    family = rule if isinstance(rule, DDIM) else DDIM(1.0)  # of q
    decoder = family.coefficients((schedule[tau[1]],), schedule[tau[0]]).noise
    pixels, terms = x0.double(), []
    for s, t in pairwise((0, *tau)):
        a_t, a_s = schedule[t], schedule[s]
        level = schedule.alpha_bar[t].to(x0.device)
        eps = gaussian(seed, BOUND_NOISE, t, addresses, x0.shape[1:]).double()
        x_t = q_sample(pixels, eps, level)
        output, v = split_output(model(x_t.float(), torch.full((len(x_t),), t, device=x_t.device)).double(), x_t)
        predicted = Estimate(a_t, *x0_and_eps(prediction, clip, output, x_t, a_t))
        q, p = (r.coefficients((a_t,), a_s) for r in (family, rule))
        mean_p = apply(p._replace(noise=0.0), [predicted])
        if s == 0:
            p = p._replace(noise=decoder, noise_max=math.sqrt(1 - a_t) if isinstance(rule, LearnedVariance) else None)
            terms.append(-discretised_log_likelihood(pixels, mean_p, noise_std(p, v)))
        else:
            mean_q = apply(q._replace(noise=0.0), [Estimate(a_t, pixels, eps)])
            terms.append(gaussian_kl(mean_q, mean_p, q.noise, noise_std(p, v)))
        after_evaluation(len(x0))
    a_T = schedule[tau[-1]]
    terms.append(gaussian_kl(math.sqrt(a_T) * pixels, torch.zeros_like(pixels), math.sqrt(1 - a_T), 1.0))
    return torch.stack(terms, 1)


def check_bound(schedule: NoiseSchedule, tau: Sequence[int], rule: Rule, prediction: str) -> None:
    """Refuse times or a rule that have no bound; see `bound_terms`."""
    check_rule(rule)
    if len(tau) < 2 or any(t <= s for s, t in pairwise((0, *tau))):
        raise ValueError("the bound needs two or more times that increase; take spacing=linear.")
    for t in tau:
        check_level(prediction, schedule[t])


def check_rule(rule: Rule) -> None:
    """Refuse a rule whose steps are not Gaussian with the mean of q.

    Raises:
        ValueError: it is neither SigmaHat, LearnedVariance nor DDIM with eta > 0.
    """
    if not isinstance(rule, SigmaHat | LearnedVariance) and not (isinstance(rule, DDIM) and rule.eta > 0):
        raise ValueError(
            "the bound needs the noise of ddim with eta > 0, of sigma_hat or of learned_variance; take sampler=ddpm."
        )
