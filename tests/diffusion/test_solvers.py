"""Rules of higher order: their order, their agreement with diffusers, and the evaluations that they cost."""

import dataclasses
import math

import pytest
import torch

from ddim import DDIM, encode, initial_noise, linear_schedule, linear_tau, sample, step_noise, trajectory
from ddim.diffusion.analytic import AnalyticVariance
from ddim.diffusion.learned_variance import LearnedVariance
from ddim.diffusion.multinomial import Multinomial
from ddim.diffusion.quadrature import lagrange_integrals
from ddim.diffusion.registry import RULES
from ddim.diffusion.rules import Estimate, Rule, SigmaHat, apply, sigma_bar
from ddim.diffusion.sampling import count_evaluations, last_state
from ddim.diffusion.solvers import (
    DEIS,
    IPNDM,
    DPMSolverPP,
    Heun,
    Multistep,
    ProbabilityFlow,
    SDEDPMSolverPP,
    UniPC,
)
from ddim.diffusion.timesteps import reference_quad_tau
from ddim.testing import check_order

SCHEDULE = linear_schedule(1000)
SHAPE = (1, 2, 2)


def variants(rule: type[Rule]) -> list[Rule]:
    """Every order and variant of a rule."""
    orders = rule.orders if issubclass(rule, Multistep) else (None,)
    rules = [rule() if order is None else rule(order=order) for order in orders]
    names = {f.name for f in dataclasses.fields(rule)}
    for name, values in (("variable", ("t", "log_rho")), ("variant", ("B1", "B2")), ("corrector", (True, False))):
        if name in names:
            rules = [dataclasses.replace(r, **{name: value}) for r in rules for value in values]
    return rules


# The others are built from a file, or need a network that predicts a variance, or pixels that are categories.
KINDS = [kind for kind in RULES.values() if isinstance(kind, type) and kind not in (LearnedVariance, Multinomial)]
DEFAULTS = {str(kind()) for kind in KINDS}
ALL = [rule for kind in KINDS for rule in variants(kind)]
ALL += [AnalyticVariance(eta, [(SCHEDULE[t], 0.5) for t in range(1000, 0, -1)]) for eta in (0.0, 1.0)]
DETERMINISTIC = [rule for rule in ALL if rule.convergence is not None]


def network(x, t):
    """A made-up network: depends on x nonlinearly and on t."""
    return torch.tanh(x) * (0.5 + t.reshape(-1, 1, 1, 1).to(x.dtype) / 1000) + 0.1 * x.flip(-1)


class Counter:
    """A network that counts its evaluations."""

    def __init__(self):
        self.count = 0

    def __call__(self, x, t):
        self.count += 1
        return network(x, t)


# ---------------------------------------------------------------- order


@pytest.mark.parametrize(
    "rule", [pytest.param(r, marks=[] if str(r) in DEFAULTS else pytest.mark.slow, id=str(r)) for r in DETERMINISTIC]
)
def test_order_of_convergence_is_the_claimed_one(rule):
    if "lower_order_below" in {f.name for f in dataclasses.fields(rule)}:
        rule = dataclasses.replace(rule, lower_order_below=0)  # else the last steps are of a lower order
    check_order(rule)


def test_a_false_claim_of_an_order_is_found():
    @dataclasses.dataclass(frozen=True)
    class Boastful(DDIM):
        convergence = 2

    with pytest.raises(AssertionError, match="claims order 2, but its error on gaussian data falls with order"):
        check_order(Boastful())


def test_published_3m_lacks_half_of_the_curvature():
    """Exact on x̂0 quadratic in λ: the polynomial through three points is, the published 3M is not."""
    levels, a_s = (SCHEDULE[500], SCHEDULE[600], SCHEDULE[700]), SCHEDULE[400]
    lam = [-math.log(sigma_bar(a)) for a in levels]
    estimates = [Estimate(a, torch.tensor(x**2), torch.tensor(0.0)) for a, x in zip(levels, lam, strict=True)]
    start, end = lam[0], -math.log(sigma_bar(a_s))
    integral = math.sqrt(1 - a_s) * (antiderivative(end) - antiderivative(start))
    x_t = math.sqrt(levels[0]) * lam[0] ** 2
    exact = math.sqrt((1 - a_s) / (1 - levels[0])) * x_t + integral

    def error(rule):
        return abs(float(apply(rule.coefficients(levels, a_s), estimates)) - exact)

    assert error(UniPC(order=3)) < 1e-6
    assert error(DPMSolverPP(order=3)) > 1e-3


def antiderivative(x: float) -> float:
    """Of x² exp(x)."""
    return math.exp(x) * (x * x - 2 * x + 2)


# ---------------------------------------------------------------- weights


def test_lagrange_integrals_are_exact_on_polynomials():
    nodes, start, end = [3.0, 4.5, 7.0, 7.5], 3.0, 1.0
    weights = lagrange_integrals(nodes, start, end)
    for power in range(4):
        exact = (end ** (power + 1) - start ** (power + 1)) / (power + 1)
        assert sum(w * n**power for w, n in zip(weights, nodes, strict=True)) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("rule", ALL, ids=str)
@pytest.mark.parametrize(("times", "s"), [((500, 700, 900, 990), 300), ((21, 500, 600, 700), 1), ((2, 3, 4, 5), 0)])
def test_constant_predictions_give_the_step_of_ddim(rule, times, s):
    """x̂0 and ε̂ that never change are followed exactly; noise keeps the variance of the marginal."""
    levels = tuple(SCHEDULE[t] for t in times[: rule.memory])
    c = rule.coefficients(levels, SCHEDULE[s])
    eps = c.eps + sum(e for _, e in c.past)
    assert c.x0 + sum(x for x, _ in c.past) == pytest.approx(math.sqrt(SCHEDULE[s]), abs=1e-12)
    if not isinstance(rule, ProbabilityFlow | SigmaHat | AnalyticVariance):
        assert eps**2 + c.noise**2 == pytest.approx(1 - SCHEDULE[s], abs=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if issubclass(kind, Multistep)])
def test_order_one_of_every_rule_is_ddim(kind):
    x_T, tau = initial_noise(range(2), SHAPE, seed=0).double(), linear_tau(1000, 7)
    rule = dataclasses.replace(kind(order=1), corrector=False) if kind is UniPC else kind(order=1)
    expected = sample(network, SCHEDULE, x_T, tau, DDIM(1.0 if kind is SDEDPMSolverPP else 0.0), seed=3)
    assert torch.allclose(sample(network, SCHEDULE, x_T, tau, rule, seed=3), expected, atol=1e-12)


def test_equation_15_is_the_step_in_the_square():
    """Term by term as printed: x̄_s = x̄_t + ½ ((1 - a_s) / a_s - (1 - a_t) / a_t) sqrt(a_t / (1 - a_t)) ε."""
    x0, eps = initial_noise(range(2), SHAPE, seed=0).double(), initial_noise(range(2), SHAPE, seed=1).double()
    for t, s in ((1000, 900), (500, 100), (3, 0)):
        a_t, a_s = SCHEDULE[t], SCHEDULE[s]
        x_t = math.sqrt(a_t) * x0 + math.sqrt(1 - a_t) * eps
        change = ((1 - a_s) / a_s - (1 - a_t) / a_t) / 2 * math.sqrt(a_t / (1 - a_t))
        expected = math.sqrt(a_s) * (x_t / math.sqrt(a_t) + change * eps)
        x_s = apply(ProbabilityFlow().coefficients((a_t,), a_s), [Estimate(a_t, x0, eps)])
        assert torch.allclose(x_s, expected, atol=1e-12)


def test_sde_2m_is_the_published_step():
    """Term by term: x_s = (σ_s / σ_t) e^-h x_t + √a_s (1 - e^-2h) (x̂0 + (x̂0 - x̂0') / 2r) + σ_s √(1 - e^-2h) z."""
    x0, before, eps, z = (initial_noise(range(2), SHAPE, seed=seed).double() for seed in range(4))
    for times in ((900, 600, 200), (300, 290, 10), (50, 20, 1)):
        a_r, a_t, a_s = (SCHEDULE[t] for t in times)
        r, t, s = (math.log(a / (1 - a)) / 2 for a in (a_r, a_t, a_s))  # λ
        slope = (x0 - before) / (2 * (t - r) / (s - t))
        x_t = math.sqrt(a_t) * x0 + math.sqrt(1 - a_t) * eps
        gained = 1 - math.exp(2 * (t - s))
        expected = math.sqrt((1 - a_s) / (1 - a_t)) * math.exp(t - s) * x_t
        expected += math.sqrt(a_s) * gained * (x0 + slope) + math.sqrt((1 - a_s) * gained) * z
        c = SDEDPMSolverPP().coefficients((a_t, a_r), a_s)
        x_s = apply(c, [Estimate(a_t, x0, eps), Estimate(a_r, before, eps)], z)
        assert torch.allclose(x_s, expected, atol=1e-12)


# ---------------------------------------------------------------- evaluations, ends, encoding


@pytest.mark.parametrize("rule", ALL, ids=str)
@pytest.mark.parametrize("last_time", [0, 1])
def test_evaluations_are_what_a_counter_sees(rule, last_time):
    for S in (1, 2, 5, 20):
        tau, model = linear_tau(1000, S), Counter()
        x_0 = sample(model, SCHEDULE, initial_noise(range(1), SHAPE, seed=0), tau, rule, last_time=last_time)
        times = (*reversed(tau), last_time)
        assert model.count == count_evaluations(rule, SCHEDULE, times) == (2 * S - 1 if isinstance(rule, Heun) else S)
        assert torch.isfinite(x_0).all()


@pytest.mark.parametrize(("T", "S"), [(1000, 100), (50, 10)])
@pytest.mark.parametrize("rule", ALL[:-2], ids=str)  # the last two have a variance for each of 1000 times
def test_repeated_times_change_nothing(rule, T, S):
    """Also not which steps near the end have a lower order; UniPC's correction counts them, as documented."""
    x_T, tau = initial_noise(range(2), SHAPE, seed=0).double(), reference_quad_tau(T, S)
    assert len(set(tau)) < len(tau)
    repeated, once = (sample(network, linear_schedule(T), x_T, t, rule) for t in (tau, sorted(set(tau))))
    if rule.convergence is not None and not getattr(rule, "corrector", False):
        assert torch.allclose(repeated, once, rtol=0, atol=1e-10)
    assert torch.isfinite(repeated).all()


@pytest.mark.parametrize("rule", DETERMINISTIC, ids=str)
def test_encoding_and_sampling_come_back(rule):
    """Up and down again over 200 times; the better the higher the order. Eq. 15 cannot go up."""
    x_0, tau = 0.3 * initial_noise(range(4), SHAPE, seed=4).double(), linear_tau(1000, 200)
    if isinstance(rule, ProbabilityFlow):
        with pytest.raises(ValueError, match="cannot go up"):
            trajectory(network, SCHEDULE, x_0, (0, *tau), rule)
        return
    x_T = last_state(trajectory(network, SCHEDULE, x_0, (0, *tau), rule))
    ddim = (sample(network, SCHEDULE, encode(network, SCHEDULE, x_0, tau), tau) - x_0).abs().max()
    error = (sample(network, SCHEDULE, x_T, tau, rule) - x_0).abs().max()
    assert error <= ddim * 1.01


@pytest.mark.parametrize("rule", ALL, ids=str)
def test_samples_do_not_depend_on_the_batch(rule):
    x_T, tau = initial_noise(range(5), SHAPE, seed=0), linear_tau(1000, 6)
    together = sample(network, SCHEDULE, x_T, tau, rule, seed=1)
    alone = sample(network, SCHEDULE, x_T[3:4], tau, rule, seed=1, indices=[3])
    assert torch.equal(together[3:4], alone)


# ---------------------------------------------------------------- diffusers


def run_diffusers(scheduler, S, x, model):
    """Return x_0 and our times; noise levels in double precision, which the schedulers round to single."""
    scheduler.set_timesteps(S)
    times = [round(float(t)) + 1 for t in scheduler.timesteps]
    last = int((SCHEDULE.alpha_bar - 1 / (1 + float(scheduler.sigmas[-1]) ** 2)).abs().argmin())
    levels = [SCHEDULE[t] for t in (*times, last)]
    scheduler.sigmas = torch.tensor([sigma_bar(a) for a in levels], dtype=torch.float64)
    scheduler.alphas_cumprod = SCHEDULE.alpha_bar[1:]
    for k, t in enumerate(scheduler.timesteps):
        output = model(x, torch.full((len(x),), times[k]))
        if scheduler.config.get("algorithm_type", "").startswith("sde"):
            noise = step_noise(torch.arange(len(x)), SHAPE, 0, k + 1).double()
            x = scheduler.step(output, t, x, variance_noise=noise).prev_sample
        else:
            x = scheduler.step(output, t, x).prev_sample
    return x, times, last


DIFFUSERS = {
    "deis": ("DEISMultistepScheduler", lambda p: {}, lambda p: DEIS(p, "log_rho", 15), (1, 2, 3)),
    "2m": ("DPMSolverMultistepScheduler", lambda p: {}, lambda p: DPMSolverPP(p), (1, 2, 3)),
    "2m at least": (
        "DPMSolverMultistepScheduler",
        lambda p: {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        lambda p: DPMSolverPP(p, 0),
        (2, 3),
    ),
    "sde 2m": (
        "DPMSolverMultistepScheduler",
        lambda p: {"algorithm_type": "sde-dpmsolver++"},
        lambda p: SDEDPMSolverPP(p),
        (1, 2),
    ),
    "unipc B2": ("UniPCMultistepScheduler", lambda p: {"solver_type": "bh2"}, lambda p: UniPC(p, "B2"), (1, 2, 3)),
    # With final_sigmas_type="zero", its default, bh1 gives NaN in diffusers: an infinite B(h) times 0.
    "unipc B1": (
        "UniPCMultistepScheduler",
        lambda p: {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        lambda p: UniPC(p, "B1"),
        (1, 2, 3),
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
@pytest.mark.parametrize("S", [5, 7, 10, 15, 50, 300])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name", DIFFUSERS)
def test_trajectories_equal_those_of_diffusers(name, spacing, S):
    diffusers = pytest.importorskip("diffusers")
    kind, options, rule, orders = DIFFUSERS[name]
    x_T = initial_noise(range(2), SHAPE, seed=0).double()
    for order in orders if S < 300 else orders[-1:]:
        # steps_offset=1: with leading, the last step of DEIS is otherwise from its time 0 to the same level.
        scheduler = getattr(diffusers, kind)(
            beta_end=0.02, solver_order=order, timestep_spacing=spacing, steps_offset=1, **options(order)
        )
        expected, times, last = run_diffusers(scheduler, S, x_T, network)
        actual = last_state(trajectory(network, SCHEDULE, x_T, (*times, last), rule(order)))
        assert torch.allclose(actual, expected, atol=1e-5), (order, float((actual - expected).abs().max()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
@pytest.mark.parametrize(("name", "rule"), [("DPMSolverMultistep", DPMSolverPP()), ("UniPCMultistep", UniPC())])
def test_thresholding_of_diffusers_is_x0_and_eps(name, rule):
    """With clip=x0, which is refused, the state that a step starts from would not be x_t."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, f"{name}Scheduler")(beta_end=0.02, timestep_spacing="trailing", thresholding=True)
    x_T = initial_noise(range(2), SHAPE, seed=0).double()
    expected, times, last = run_diffusers(scheduler, 20, x_T, network)
    x0, both = (
        last_state(trajectory(network, SCHEDULE, x_T, (*times, last), rule, clip=clip)) for clip in ("x0", "x0_and_eps")
    )
    assert torch.allclose(both, expected, atol=1e-5)
    assert (x0 - expected).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
@pytest.mark.parametrize("S", [5, 10, 50, 300])
def test_heun_equals_that_of_diffusers(S):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.HeunDiscreteScheduler(beta_end=0.02, timestep_spacing="trailing")
    scheduler.set_timesteps(S)
    visited = [round(float(t)) + 1 for t in scheduler.timesteps]  # each but the first twice
    times = (visited[0], *visited[1::2], 0)
    first, *others = (sigma_bar(SCHEDULE[t]) for t in times)
    scheduler.sigmas = torch.tensor([first, *(s for s in others[:-1] for _ in range(2)), 0.0], dtype=torch.float64)
    x_T = initial_noise(range(2), SHAPE, seed=0).double()
    x = x_T / math.sqrt(SCHEDULE[times[0]])  # x / sqrt(a), in which the scheduler works
    for t, at in zip(scheduler.timesteps, visited, strict=True):
        output = network(x * math.sqrt(SCHEDULE[at]), torch.full((2,), at))
        x = scheduler.step(output, t, x).prev_sample
    actual = last_state(trajectory(network, SCHEDULE, x_T, times, Heun()))
    assert torch.allclose(actual, x, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("S", [5, 10, 50])
def test_ipndm_is_the_multistep_part_of_pndm(S):
    """Each step of PNDM with four predictions; its first steps, which this rule does not have, are left out."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.PNDMScheduler(beta_end=0.02, skip_prk_steps=True, set_alpha_to_one=True)
    scheduler.set_timesteps(S)
    scheduler.alphas_cumprod = SCHEDULE.alpha_bar[1:]
    x, *history = (initial_noise(range(2), SHAPE, seed=i).double() for i in range(5))
    for t in range(1000 // S, 1000 - 3 * (1000 // S), 1000 // S):
        times = [t + i * (1000 // S) for i in range(4)]  # newest first
        scheduler.counter, scheduler.ets = 9, history[:0:-1]
        expected = scheduler.step(history[0], t - 1, x).prev_sample
        levels = [SCHEDULE[time] for time in times]
        x0 = (x - math.sqrt(1 - levels[0]) * history[0]) / math.sqrt(levels[0])
        zero = torch.zeros_like(x)
        estimates = [Estimate(levels[0], x0, history[0])]
        estimates += [Estimate(a, zero, eps) for a, eps in zip(levels[1:], history[1:], strict=True)]
        s = t - 1000 // S
        actual = apply(IPNDM(4).coefficients(levels, SCHEDULE[s]), estimates)
        assert torch.allclose(actual, expected, atol=1e-10)
