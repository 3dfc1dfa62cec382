"""Classifier-free guidance on a mixture of Gaussians, whose scores and posterior are known."""

import itertools
import math

import pytest
import torch

from ddim import DDIM, GuidanceSpec, GuidedModel, initial_noise, linear_schedule, linear_tau, sample, trajectory
from ddim.diffusion.guidance import Condition, evaluation_times
from ddim.diffusion.learned_variance import LearnedVariance
from ddim.diffusion.prediction import PREDICTIONS, x0_and_eps
from ddim.diffusion.registry import RULES
from ddim.diffusion.solvers import Heun
from ddim.diffusion.spec import SamplerSpec

SCHEDULE = linear_schedule(1000)
K, STD = 3, 0.3
MEANS = initial_noise(range(K), (1, 2, 2), seed=5).double()
PRIOR = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
TAU = linear_tau(1000, 20)
NO_LABEL = torch.tensor([K])


def log_terms(x, a_t):
    """log p(label) N(x_t; sqrt(a_t) m, (a_t STD² + 1 - a_t) I), up to a constant; (B, K)."""
    variance = a_t * STD**2 + 1 - a_t
    return PRIOR.log() - (x[:, None] - math.sqrt(a_t) * MEANS).square().flatten(2).sum(-1) / (2 * variance)


def network(prediction="eps", v=None):
    """The exact network of the mixture, conditional on labels 0..K-1 and on none, K; it notes how it was called."""
    calls = []

    def model(x, t, y):
        calls.append((int(t[0]), y.tolist()))
        a_t = SCHEDULE[int(t[0])]
        variance = a_t * STD**2 + 1 - a_t
        of_class = MEANS + STD**2 * math.sqrt(a_t) / variance * (x[:, None] - math.sqrt(a_t) * MEANS)  # E[x_0 | x_t, y]
        one_hot = torch.nn.functional.one_hot(y, K + 1)[:, :K].to(x)
        weights = torch.where((y == K)[:, None], log_terms(x, a_t).softmax(1), one_hot)
        x0 = (weights[..., None, None, None] * of_class).sum(1)
        eps = (x - math.sqrt(a_t) * x0) / math.sqrt(1 - a_t)
        output = PREDICTIONS[prediction].target(x0, eps, a_t)
        return output if v is None else torch.cat([output, v + y.reshape(-1, 1, 1, 1).expand_as(output)], 1)

    model.calls = calls
    return model


def start(n):
    return initial_noise(range(n), (1, 2, 2), seed=0).double()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("w", [-2.0, -1.0, -0.5, 0.0, 0.7, 4.0])
@pytest.mark.parametrize("t", [1, 200, 900])
def test_guided_eps_follows_the_posterior_of_the_label(prediction, w, t):
    """ε̂ = -sqrt(1 - a_t) (∇ log q(x_t) + (1 + w) ∇ log p(label | x_t)), by automatic differentiation."""
    a_t, y = SCHEDULE[t], torch.tensor([0, 1, 2, 1])
    x = start(4).requires_grad_()
    terms = log_terms(x, a_t)
    log_posterior = terms.log_softmax(1)[torch.arange(4), y]
    (score,) = torch.autograd.grad((terms.logsumexp(1) + (1 + w) * log_posterior).sum(), x)
    x = x.detach()
    output = GuidedModel(network(prediction), y, K, GuidanceSpec(w))(x, torch.full((4,), t))
    _, eps = x0_and_eps(prediction, "none", output, x, a_t)
    assert torch.allclose(eps, -math.sqrt(1 - a_t) * score, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("rule", [DDIM(), DDIM(1.0), Heun()])
def test_samples_of_a_label_have_its_mean_and_spread(prediction, rule):
    y = torch.arange(600) % K
    model = GuidedModel(network(prediction), y, K)
    x_0 = sample(model, SCHEDULE, start(600), linear_tau(1000, 200), rule, prediction=prediction)
    for label in range(K):
        mean, std = x_0[y == label].mean(0), x_0[y == label].std(0)
        assert torch.allclose(mean, MEANS[label], atol=0.1)
        assert torch.allclose(std, torch.full_like(std, STD), atol=0.06)


def test_more_guidance_makes_the_label_more_certain():
    y = torch.arange(300) % K
    certain = []
    for w in (-1.0, 0.0, 1.0, 3.0):
        x_0 = sample(GuidedModel(network(), y, K, GuidanceSpec(w)), SCHEDULE, start(300), TAU)
        certain.append(float(log_terms(x_0, 1.0).log_softmax(1)[torch.arange(300), y].mean()))
    assert certain == sorted(certain)


@pytest.mark.parametrize(("w", "label"), [(0.0, 1), (-1.0, K)])
def test_w_of_0_and_minus_1_are_one_network_bit_for_bit(w, label):
    y = torch.full((4,), 1)
    exact = network()
    plain = sample(lambda x, t: exact(x, t, torch.full((4,), label)), SCHEDULE, start(4), TAU)
    guided = GuidedModel(called := network(), y, K, GuidanceSpec(w))
    assert torch.equal(sample(guided, SCHEDULE, start(4), TAU), plain)
    assert [labels for _, labels in called.calls] == len(TAU) * [[label] * 4]
    assert guided.evaluations == len(TAU)


def test_both_predictions_are_one_batch_of_twice_the_size():
    guided = GuidedModel(called := network(), torch.tensor([2, 0]), K, GuidanceSpec(0.5))
    sample(guided, SCHEDULE, start(2), TAU)
    assert [labels for _, labels in called.calls] == len(TAU) * [[2, 0, K, K]]
    assert guided.evaluations == 2 * len(TAU)


def test_outside_the_interval_it_is_the_conditional_network():
    y, interval = torch.tensor([2, 0]), (200, 600)
    guided = GuidedModel(called := network(), y, K, GuidanceSpec(2.0, interval))
    list(trajectory(guided, SCHEDULE, start(2), (1000, 601, 600, 200, 199, 0)))
    assert called.calls == [
        *((t, [2, 0]) for t in (1000, 601)),
        *((t, [2, 0, K, K]) for t in (600, 200)),
        (199, [2, 0]),
    ]
    assert guided.evaluations == 7


def test_a_learned_variance_is_that_of_the_label():
    y = torch.tensor([1, 2])
    guided = GuidedModel(network(v=0.5), y, K, GuidanceSpec(3.0))
    output, t = guided(start(2), torch.tensor([300, 300])), torch.tensor([300, 300])
    means = GuidedModel(network(), y, K, GuidanceSpec(3.0))(start(2), t)
    assert torch.equal(output[:, :1], means)
    assert torch.equal(output[:, 1:], (0.5 + y).reshape(2, 1, 1, 1).expand(2, 1, 2, 2).double())
    assert sample(guided, SCHEDULE, start(2), TAU, LearnedVariance()).isfinite().all()


NAMES = sorted(RULES.keys() - {"analytic", "multinomial"})  # others need a file, or another network
SAMPLERS = [
    *(SamplerSpec(name, 0.5 if name == "ddim" else None, 8) for name in NAMES),
    SamplerSpec(clip="x0_and_eps", S=8),
    SamplerSpec(S=8, corrector_steps=2),
    SamplerSpec(S=8, last_time=1),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{s.rule} {s.clip} {s.corrector_steps} {s.last_time}")
@pytest.mark.parametrize("interval", [None, (1, 1000), (300, 700), (1000, 1000)])
def test_forecast_of_evaluations_is_what_every_sampler_takes(sampler, interval):
    condition = Condition(("a", "b", "c"), 1, GuidanceSpec(1.5, interval))

    def walk(model, x):
        return sampler.trajectory(model, SCHEDULE, x)

    model = condition.bind(called := network(v=0.5), range(2), torch.device("cpu"))
    *_, state = model.counted(walk(model, start(2)))
    seen = sum(len(labels) // 2 for _, labels in called.calls)
    assert state.x.isfinite().all()
    assert state.evaluations == seen == condition.evaluations(walk, sampler.evaluations(SCHEDULE))
    assert [t for t, _ in called.calls] == evaluation_times(walk)


def test_image_i_has_label_i_mod_k():
    condition = Condition(("a", "b", "c"), "all")
    assert condition.labels(range(7)).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert condition.labels([5, 4_000_000_000]).tolist() == [2, 4_000_000_000 % 3]
    assert Condition(("a", "b", "c"), 1).labels(range(2)).tolist() == [1, 1]
    assert Condition(("a", "b", "c"), None).labels(range(2)).tolist() == [3, 3]
    assert Condition(("a", "b", "c"), "own", own=(2, 0, 1)).labels([2, 0]).tolist() == [1, 2]


def test_settings_and_names_state_what_decides_the_numbers():
    classes = ("cat", "dog")
    for label, w, interval in itertools.product((0, "all"), (0.0, 1.0), (None, (2, 30))):
        condition = Condition(classes, label, GuidanceSpec(w, interval))
        guided_in = {"interval": [2, 30]} if interval and w else {}
        assert condition.settings() == {"label": label, "w": w, **guided_in}
        words = ["cat"] * (label == 0) + [f"w={w:g}{' in [2, 30]' if guided_in else ''}"]
        assert condition.suffix == "".join(f", {word}" for word in words)
    assert Condition(classes, None).suffix == ", no label"
    assert Condition(classes, None).settings() == {"label": None, "w": 0.0}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: GuidanceSpec(math.inf), "w=inf must be a finite number"),
        (lambda: GuidanceSpec(1.0, (0, 5)), r"interval=\[0, 5\] must be two times lo <= hi of 1..T"),
        (lambda: GuidanceSpec(1.0, (7, 5)), r"interval=\[7, 5\] must be two times"),
        (lambda: Condition(("a",), None, GuidanceSpec(1.0)), "guidance needs a label"),
    ],
)
def test_guidance_without_sense_is_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


def test_predictions_that_are_skipped_are_not_counted():
    condition, schedule = Condition(("a", "b"), 0, GuidanceSpec(1.0, (5, 10))), linear_schedule(10)

    def walk(model, x):
        return trajectory(model, schedule, x, (10, 5, 1, 0))

    assert condition.evaluations(walk, 3) == 2 + 2 + 1
    assert condition.evaluations(walk, 3, skipped=1) == 2 + 1
