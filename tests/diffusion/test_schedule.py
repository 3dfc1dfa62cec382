import math

import numpy as np
import pytest
import torch

from ddim import (
    SCHEDULES,
    NoiseSchedule,
    cosine_schedule,
    from_betas,
    linear_schedule,
    scaled_linear_schedule,
    zero_terminal_snr,
)
from ddim.diffusion.schedule import ScheduleSpec

ARGUMENTS = {"custom": {"betas": [0.1, 0.2, 0.3]}}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_decreases_from_one_and_knows_its_name(name):
    schedule = SCHEDULES[name](**ARGUMENTS.get(name, {"T": 1000}))
    assert schedule[0] == 1.0
    assert schedule.alpha_bar.dtype == torch.float64
    assert bool((schedule.alpha_bar.diff() < 0).all())
    assert schedule[schedule.T] > 0
    assert schedule.name == name


def test_linear_has_the_published_values():
    """alpha_bar of the released configuration at code indices 0, 800, 900, 990, 999, which are our times plus one."""
    schedule = linear_schedule(1000)
    for t, value in [(1, 0.9999), (801, 1.507521e-3), (901, 2.702445e-4), (991, 4.837048e-5), (1000, 4.035830e-5)]:
        assert schedule[t] == pytest.approx(value, rel=1e-6)


def test_linear_is_the_cumulative_product_in_double():
    expected = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    assert np.allclose(linear_schedule(1000).alpha_bar[1:].numpy(), expected, rtol=1e-14)


def test_scaled_linear_has_linear_roots():
    betas = 1 - scaled_linear_schedule(1000).alpha_bar[1:] / scaled_linear_schedule(1000).alpha_bar[:-1]
    assert torch.allclose(
        betas.sqrt().diff(), torch.full((999,), (0.012**0.5 - 0.00085**0.5) / 999).double(), atol=1e-12
    )


def test_cosine_is_the_published_curve_until_the_cap():
    schedule = cosine_schedule(1000)

    def f(t: int) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (1, 10, 500, 990):
        assert schedule[t] == pytest.approx(f(t) / f(0), rel=1e-9)
    assert 1 - schedule[1000] / schedule[999] == pytest.approx(0.999)


@pytest.mark.parametrize("name", SCHEDULES)
def test_zero_terminal_snr_is_lin_et_als_algorithm_1(name):
    schedule = SCHEDULES[name](**ARGUMENTS.get(name, {"T": 1000}))
    rescaled = zero_terminal_snr(schedule)
    roots = np.sqrt(schedule.alpha_bar[1:].numpy())
    first, last = roots[0], roots[-1]
    assert np.allclose(np.sqrt(rescaled.alpha_bar[1:].numpy()), (roots - last) * first / (first - last), atol=1e-14)
    assert (rescaled[0], rescaled[1], rescaled[schedule.T]) == (1, schedule[1], 0)
    assert rescaled.name == f"{name}_zero_terminal_snr"
    spec = ScheduleSpec(name, **ARGUMENTS.get(name, {}), zero_terminal_snr=True)
    assert torch.equal(spec.build().alpha_bar, rescaled.alpha_bar)
    assert from_betas([0.1, 1.0]).alpha_bar.tolist() == [1, 0.9, 0]


def test_bad_schedules_are_refused():
    with pytest.raises(ValueError, match=r"beta_2=1.5 must lie strictly between 0 and 1"):
        from_betas([0.1, 1.5])
    with pytest.raises(ValueError, match=r"beta_1=1.0 must lie strictly between 0 and 1"):
        from_betas([1.0, 0.5])
    with pytest.raises(ValueError, match="never be negative"):
        NoiseSchedule(torch.tensor([1.0, 0.5, -0.5], dtype=torch.float64))
    with pytest.raises(ValueError, match="never be negative"):
        NoiseSchedule(torch.tensor([1.0, 0.5, math.nan], dtype=torch.float64))
    with pytest.raises(ValueError, match="T must be at least 2"):
        zero_terminal_snr(linear_schedule(1))
    with pytest.raises(ValueError, match="at least one"):
        from_betas([])
    with pytest.raises(ValueError, match="T=0"):
        linear_schedule(0)
    with pytest.raises(ValueError, match="float64"):
        NoiseSchedule(torch.tensor([1.0, 0.5]))
    with pytest.raises(ValueError, match="decrease strictly"):
        NoiseSchedule(torch.tensor([1.0, 0.5, 0.5], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"outside 0\.\.1000"):
        linear_schedule(1000)[1001]
    with pytest.raises(ValueError, match=r"outside 0\.\.1000"):
        linear_schedule(1000)[-1]
