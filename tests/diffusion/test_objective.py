import pytest
import torch

from ddim import antithetic_times, linear_schedule, per_sample_loss, uniform_times
from ddim.diffusion.objective import drop_labels, min_snr_weight, q_sample, training_noise
from ddim.diffusion.prediction import PREDICTIONS, eps_from_x0

SCHEDULE = linear_schedule(1000)
X0 = torch.linspace(-1, 1, 6 * 3 * 4 * 4).reshape(6, 3, 4, 4)
EPS = training_noise(seed=0, step=0, positions=range(6), shape=(3, 4, 4))
T = torch.tensor([1, 2, 500, 500, 999, 1000])


def test_the_model_sees_x_t_of_equation_4_and_the_papers_time():
    seen = {}

    def model(x_t, t):
        seen.update(x_t=x_t, t=t)
        return torch.zeros_like(x_t)

    loss = per_sample_loss(model, SCHEDULE.alpha_bar, X0, T, EPS)
    for i, t in enumerate(T.tolist()):
        a = SCHEDULE[t]
        assert torch.allclose(seen["x_t"][i], a**0.5 * X0[i] + (1 - a) ** 0.5 * EPS[i], atol=1e-6)
    assert torch.equal(seen["t"], T)
    assert seen["x_t"].dtype == torch.float32
    assert torch.allclose(loss, (EPS**2).mean((1, 2, 3)))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_true_target_has_no_loss_and_another_has(prediction):
    def oracle(x_t, t):
        a_t = SCHEDULE.alpha_bar[t].reshape(-1, 1, 1, 1)
        return PREDICTIONS[prediction].target(X0, EPS, a_t).float()

    arguments = (SCHEDULE.alpha_bar, X0, T, EPS)
    assert per_sample_loss(oracle, *arguments, prediction=prediction).max() < 1e-10
    shifted = per_sample_loss(lambda x, t: oracle(x, t) + 2, *arguments, prediction=prediction)
    assert torch.allclose(shifted, torch.full((6,), 4.0), atol=1e-4)


def test_sum_is_the_mean_times_the_dimensions():
    arguments = (lambda x, t: 0.5 * x, SCHEDULE.alpha_bar, X0, T, EPS)
    mean, total = (per_sample_loss(*arguments, reduction=r) for r in ("mean", "sum"))
    assert torch.allclose(total, 48 * mean)


def test_variance_is_preserved_for_unit_data():
    x0 = training_noise(1, 0, range(100), (3, 16, 16))
    eps = training_noise(1, 1, range(100), (3, 16, 16))
    for t in (1, 300, 1000):
        assert float(q_sample(x0, eps, torch.tensor(SCHEDULE[t]).double()).var()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("times", [uniform_times, antithetic_times])
def test_times_are_uniform_on_1_to_T_and_addressed(times):
    t = times(10, 0, 3, range(20000))
    counts = torch.bincount(t, minlength=11)
    assert counts[0] == 0
    assert len(counts) == 11
    assert ((counts[1:] - 2000).abs() < 4.5 * 2000**0.5).all()
    assert torch.equal(t[500:507], times(10, 0, 3, range(500, 507)))
    assert not torch.equal(t, times(10, 0, 4, range(20000)))
    assert not torch.equal(t, times(10, 1, 3, range(20000)))


def test_antithetic_pairs_sum_to_T_plus_1():
    t = antithetic_times(1000, 0, 0, range(4000))
    assert torch.equal(t[0::2] + t[1::2], torch.full((2000,), 1001))
    assert abs(torch.corrcoef(torch.stack([t[0:-2:2], t[2::2]]).double())[0, 1]) < 0.1
    uniform = uniform_times(1000, 0, 0, range(4000)).double()
    assert abs(torch.corrcoef(torch.stack([uniform[0::2], uniform[1::2]]))[0, 1]) < 0.1


def test_dropped_labels_are_a_share_and_addressed():
    y = torch.arange(20_000) % 7
    dropped = drop_labels(y, 7, 0.1, 0, 3, range(20_000))
    assert torch.equal(dropped[dropped != 7], y[dropped != 7])
    assert float((dropped == 7).double().mean()) == pytest.approx(0.1, abs=4 * 0.3 / 20_000**0.5)  # standard errors
    assert torch.equal(drop_labels(y[500:600], 7, 0.1, 0, 3, torch.arange(500, 600)), dropped[500:600])
    assert not torch.equal(drop_labels(y, 7, 0.1, 0, 4, range(20_000)), dropped)
    assert not torch.equal(drop_labels(y, 7, 0.1, 1, 3, range(20_000)), dropped)
    more = drop_labels(y, 7, 0.3, 0, 3, range(20_000))
    assert bool((more[dropped == 7] == 7).all())
    assert torch.equal(drop_labels(y, 7, 0.0, 0, 3, range(20_000)), y)
    # Independent of the time that the sample is trained at.
    t = uniform_times(1000, 0, 3, range(20_000)).double()
    assert float(t[dropped == 7].mean()) == pytest.approx(500, abs=4 * 289 / 2000**0.5)


def test_min_snr_weights_are_hang_et_als():
    a_t = SCHEDULE.alpha_bar[1:]
    snr = a_t / (1 - a_t)
    least = torch.minimum(snr, torch.tensor(5.0).double())
    for prediction, expected in {"eps": least / snr, "x0": least, "v": least / (snr + 1)}.items():
        assert torch.allclose(min_snr_weight(prediction, a_t, 5.0), expected, rtol=1e-12)


def test_min_snr_does_not_depend_on_what_is_predicted():
    """The same x̂0 in three ways; with a large γ it is the squared error of x0 times SNR."""
    x0_hat, a_t = X0 + 0.3 * EPS.flip(0), SCHEDULE.alpha_bar[T].reshape(-1, 1, 1, 1)
    eps_hat = eps_from_x0(x0_hat, q_sample(X0, EPS, a_t), a_t)
    for gamma in (5.0, 1e9):
        losses = [
            per_sample_loss(
                lambda x, t, p=p: PREDICTIONS[p].target(x0_hat, eps_hat, a_t).float(),
                SCHEDULE.alpha_bar,
                X0,
                T,
                EPS,
                prediction=p,
                weight="min_snr",
                gamma=gamma,
            )
            for p in PREDICTIONS
        ]
        snr = (a_t / (1 - a_t)).flatten().clamp(max=gamma)
        expected = snr * ((x0_hat - X0) ** 2).mean((1, 2, 3)).double()
        assert all(torch.allclose(loss.double(), expected, rtol=2e-3) for loss in losses)
