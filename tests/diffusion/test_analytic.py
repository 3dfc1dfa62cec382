"""The optimal variance of the reverse step: exact on Gaussian data; its bounds; its file."""

import json
import math
import os

import pytest

from ddim import DDIM, SamplerSpec, SigmaHat, initial_noise, linear_schedule, linear_tau, trajectory
from ddim.diffusion.analytic import AnalyticVariance, table_hash
from ddim.diffusion.labels import row_label
from ddim.diffusion.sampling import rows

SCHEDULE = linear_schedule(1000)
V = 0.25  # variance of the data
ETAS = (0.0, 0.3, 1.0)


def variance_at(t):
    """Of x_t, for data N(0, V I)."""
    a = SCHEDULE[t]
    return V * a + 1 - a


def exact_eps(x, t):
    """E[ε | x_t], linear in x."""
    t = int(t[0])
    return x * math.sqrt(1 - SCHEDULE[t]) / variance_at(t)


def exact_table(schedule=SCHEDULE):
    """E||ε̂||²/d = (1 - a_t) / Var(x_t)."""
    levels = schedule.alpha_bar.tolist()[:0:-1]
    return tuple((a, (1 - a) / (V * a + 1 - a)) for a in levels)


def constant_table(m):
    return tuple((a, m) for a, _ in exact_table())


def variances(rule, S):
    """(variance that the rule's linear steps give, exact one) at each time between T and 0."""
    times = (*reversed(linear_tau(1000, S)), 0)
    variance, result = variance_at(1000), []
    for t, s, c, _ in rows(rule, SCHEDULE, times)[:-1]:
        a_t = SCHEDULE[t]
        of_x_t = c.x0 * V * math.sqrt(a_t) + c.eps * math.sqrt(1 - a_t)  # x̂0 and ε̂ are linear in x_t
        variance = (of_x_t / variance_at(t)) ** 2 * variance + c.noise**2
        result.append((variance, variance_at(s)))
    return result


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("S", [2, 5, 20])
def test_variance_of_gaussian_data_is_exact_at_every_time(S, eta):
    for variance, exact in variances(AnalyticVariance(eta, exact_table()), S):
        assert variance == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("rule", [*map(DDIM, ETAS), SigmaHat()], ids=str)
def test_other_variances_are_not_exact_with_few_steps(rule):
    assert max(abs(variance / exact - 1) for variance, exact in variances(rule, 5)) > 0.05


def test_samples_of_gaussian_data_have_the_variance():
    x_T = initial_noise(range(2000), (1, 4, 4), seed=0) * math.sqrt(variance_at(1000))
    rule = AnalyticVariance(0.0, exact_table())
    *inner, last = trajectory(exact_eps, SCHEDULE, x_T, (1000, 700, 400, 100, 0), rule, seed=1)
    for state in inner:
        assert float(state.x.var()) == pytest.approx(variance_at(state.t), rel=4 * math.sqrt(2 / x_T.numel()))
    assert last.x.equal(last.x0)  # the last step adds no noise


@pytest.mark.parametrize("eta", ETAS)
def test_a_mean_square_of_one_gives_ddim(eta):
    for t, s in ((1000, 800), (500, 499), (2, 1), (1, 0), (7, 7)):
        rule = AnalyticVariance(eta, constant_table(1.0))
        assert rule.coefficients((SCHEDULE[t],), SCHEDULE[s]) == DDIM(eta).coefficients((SCHEDULE[t],), SCHEDULE[s])


@pytest.mark.parametrize("eta", ETAS)
def test_the_bounds_hold_unless_they_are_not_clipped(eta):
    step = ((SCHEDULE[800],), SCHEDULE[400])
    posterior = DDIM(eta).coefficients(*step)
    assert AnalyticVariance(eta, constant_table(9.0)).coefficients(*step) == posterior
    largest = AnalyticVariance(eta, constant_table(0.0)).coefficients(*step).noise
    spread = math.sqrt((1 - SCHEDULE[800]) * SCHEDULE[400] / SCHEDULE[800]) - posterior.eps
    assert largest == pytest.approx(math.hypot(posterior.noise, spread))
    unclipped = AnalyticVariance(eta, constant_table(1.0002), clip_bound=False)
    if eta:
        assert unclipped.coefficients(*step).noise < posterior.noise
    with pytest.raises(ValueError, match="exceeds 1 there; set clip_bound=true"):
        AnalyticVariance(eta, constant_table(9.0), clip_bound=False).coefficients(*step)


def test_steps_that_the_rule_does_not_have_are_refused():
    rule = AnalyticVariance(0.0, exact_table())
    for times, message in (((1, 500), "analytic cannot go up"), ((2000, 1000, 0), "was not estimated")):
        with pytest.raises(ValueError, match=message):
            trajectory(exact_eps, linear_schedule(2000), initial_noise(range(1), (1, 1, 1), 0), times, rule)


# ---------------------------------------------------------------- file

TABLE = exact_table(linear_schedule(50))
CONTENT = {
    "alpha_bar": [a for a, _ in TABLE],
    "mean_square": [m for _, m in TABLE],
    "hash": table_hash(TABLE),
    "weights_hash": "0" * 64,
}


def write(path, **changes):
    path.write_text(json.dumps(CONTENT | changes))
    return SamplerSpec("analytic", 1.0, S=5, kwargs={"file": str(path)})


def test_a_file_gives_back_the_table_exactly(tmp_path, monkeypatch):
    spec = write(tmp_path / "variance.json")
    assert spec.build_rule() == AnalyticVariance(1.0, TABLE, "0" * 64)
    spec.check(linear_schedule(50), "eps")
    (tmp_path / "variance.json").unlink()
    assert spec.evaluations(linear_schedule(50)) == 5  # read when the spec was created, and not again
    write(tmp_path / "variance.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert SamplerSpec("analytic", kwargs={"file": "~/variance.json"}).build_rule().eta == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha_bar": [0.5, math.nan], "mean_square": [0.5, 0.5]}, "must increase in"),
        ({"alpha_bar": [0.5, 0.5], "mean_square": [0.5, 0.5]}, "must increase in"),
        ({"alpha_bar": [0.5, 1.0], "mean_square": [0.5, 0.5]}, "must increase in"),
        ({"alpha_bar": [], "mean_square": []}, "at least one level"),
        ({"mean_square": [0.5]}, "zip"),
        ({"mean_square": [math.nan] * 50}, "is nan, but must be finite and not negative"),
        ({"mean_square": [-0.5] * 50}, "is -0.5, but must be finite and not negative"),
        ({"mean_square": ["much"] * 50}, "could not convert"),
        ({"mean_square": [0.5] * 50}, "not those of the hash"),
        ({"mean_square": 3}, "not iterable"),
    ],
)
def test_a_damaged_file_is_refused_with_the_reason(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"variance.json was not written by .*{message}.*estimate again\.$"):
        write(tmp_path / "variance.json", **changes)


@pytest.mark.parametrize("text", ["", "[1, 2]", "3", '{"tau": [1]}', "\x93NUMPY", "[" * 100_000])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "other").write_text(text)
    with pytest.raises(ValueError, match=r"other was not written by scripts/estimate_variance\.py"):
        SamplerSpec("analytic", 1.0, kwargs={"file": str(tmp_path / "other")})


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "missing", "."):
        with pytest.raises(ValueError, match="does not exist or is no regular file"):
            SamplerSpec("analytic", 1.0, kwargs={"file": str(tmp_path / name)})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kwargs": {}}, "needs file=PATH"),
        ({"kwargs": {"file": 0}}, "needs file=PATH"),
        ({"eta": None}, "needs an eta"),
        ({"eta": 2.0}, "must lie in"),
        ({"kwargs": {"file": "FILE", "clip_bound": "no"}}, "must be true or false"),
        ({"kwargs": {"file": "FILE", "order": 2}}, "does not take order"),
    ],
)
def test_arguments_that_the_rule_does_not_take_are_refused(tmp_path, fields, message):
    path = str(tmp_path / "variance.json")
    write(tmp_path / "variance.json")
    kwargs = fields.pop("kwargs", {"file": "FILE"})
    kwargs = {key: path if value == "FILE" else value for key, value in kwargs.items()}
    with pytest.raises(ValueError, match=message):
        SamplerSpec(**{"rule": "analytic", "eta": 1.0, "kwargs": kwargs} | fields)


def test_a_file_of_another_schedule_is_refused_before_work(tmp_path):
    spec = write(tmp_path / "variance.json")
    with pytest.raises(ValueError, match=r"was not estimated: the file is of another schedule, or of other times"):
        spec.check(SCHEDULE, "eps")


@pytest.mark.parametrize(
    ("eta", "clip_bound", "label"),
    [
        (1.0, True, "Analytic-DDPM"),
        (0.0, True, "Analytic-DDIM"),
        (0.5, True, "Analytic-DDIM η=0.5"),
        (1.0, False, "Analytic-DDPM, bound not clipped"),
    ],
)
def test_label_names_what_differs(tmp_path, eta, clip_bound, label):
    file = write(tmp_path / "variance.json").kwargs["file"]
    assert row_label(SamplerSpec("analytic", eta, kwargs={"file": file, "clip_bound": clip_bound})) == label
