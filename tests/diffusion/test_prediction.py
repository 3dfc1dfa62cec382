import math

import pytest
import torch

from ddim.diffusion.objective import q_sample
from ddim.diffusion.prediction import (
    CLIP_POLICIES,
    PREDICTIONS,
    Clip,
    check_level,
    eps_from_x0,
    x0_and_eps,
    x0_from_eps,
)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x0 * 0.7, eps


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("a_t", [0.9999, 0.5, 4e-5])
def test_the_target_gives_back_x0_and_eps(prediction, a_t, data):
    x0, eps = data
    x_t = q_sample(x0, eps, torch.tensor(a_t, dtype=torch.float64))
    output = PREDICTIONS[prediction].target(x0, eps, a_t)
    for clip, expected in (("none", x0), ("x0", x0.clamp(-1, 1))):
        x0_hat, eps_hat = x0_and_eps(prediction, clip, output, x_t, a_t)
        assert torch.allclose(x0_hat, expected, atol=1e-10)
        assert torch.allclose(eps_hat, eps, atol=1e-10)


def test_equation_9_in_numbers():
    assert float(x0_from_eps(torch.tensor(0.5), torch.tensor(1.0), 0.25)) == pytest.approx(
        (1 - math.sqrt(0.75) * 0.5) / 0.5
    )
    assert float(eps_from_x0(torch.tensor(0.5), torch.tensor(1.0), 0.25)) == pytest.approx((1 - 0.25) / math.sqrt(0.75))


def test_v_is_salimans_and_hos():
    x0, eps = torch.tensor(0.3), torch.tensor(-0.8)
    assert float(PREDICTIONS["v"].target(x0, eps, 0.64)) == pytest.approx(0.8 * -0.8 - 0.6 * 0.3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_rederived_eps_explains_x_t_with_the_clipped_x0(prediction, data):
    x0, eps = data
    a_t = 0.3
    x_t = q_sample(3 * x0, eps, torch.tensor(a_t, dtype=torch.float64))
    output = PREDICTIONS[prediction].target(3 * x0, eps, a_t)
    x0_hat, eps_hat = x0_and_eps(prediction, "x0_and_eps", output, x_t, a_t)
    assert torch.equal(x0_hat, x0_hat.clamp(-1, 1))
    assert (eps_hat - eps).abs().max() > 0.1
    assert torch.allclose(q_sample(x0_hat, eps_hat, torch.tensor(a_t, dtype=torch.float64)), x_t, atol=1e-12)


def test_policies_differ_from_each_other(data):
    x0, eps = data
    x_t = q_sample(3 * x0, eps, torch.tensor(0.3, dtype=torch.float64))
    results = [torch.cat(x0_and_eps("eps", clip, eps, x_t, 0.3)) for clip in CLIP_POLICIES]
    assert len({r.sum().item() for r in results}) == 3


def test_nothing_is_rederived_where_there_is_no_noise(data):
    x0, eps = data
    x0_hat, eps_hat = x0_and_eps("eps", "x0_and_eps", eps, x0, 1.0)
    assert torch.equal(eps_hat, eps)
    assert torch.equal(x0_hat, x0.clamp(-1, 1))


@pytest.mark.parametrize("ratio", [0.3, 0.75, 0.995, 1.0])
@pytest.mark.parametrize("maximum", [None, 1.2])
def test_dynamic_thresholding_is_imagens(ratio, maximum, data):
    x0 = 2 * data[0] * torch.tensor([0.1, 1.0, 2.0, 4.0]).reshape(-1, 1, 1, 1)
    limited = Clip("x0", threshold_ratio=ratio, threshold_max=maximum).limit(x0)
    for image, result in zip(x0, limited, strict=True):  # each image has its own s
        s = min(max(float(torch.quantile(image.abs(), ratio)), 1), maximum or 1e9)
        assert torch.allclose(result, image.clamp(-s, s) / s)
    assert torch.equal(limited[0], x0[0])  # within [-1, 1]: unchanged


def test_clip_range_is_symmetric(data):
    assert torch.equal(Clip("x0", clip_range=0.5).limit(data[0]), data[0].clamp(-0.5, 0.5))


def test_levels_that_determine_nothing_are_refused():
    for prediction, a_t, words in (("eps", 0.0, "zero terminal SNR"), ("x0", 1.0, "no ε at t=0")):
        with pytest.raises(ValueError, match=words):
            check_level(prediction, a_t)
    for prediction, a_t in (("eps", 1.0), ("x0", 0.0), ("v", 0.0), ("v", 1.0)):
        check_level(prediction, a_t)
