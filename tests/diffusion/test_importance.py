"""Importance sampling of training times by the losses of earlier steps."""

import pytest
import torch

from ddim import uniform_times
from ddim.diffusion.importance import HISTORY, empty_history, importance_times, record_losses, time_probabilities

LOSSES = torch.tensor([0.0, 4.0, 1.0, 0.5, 0.25])  # at t = 1..4


def full_history():
    t = torch.arange(1, 5).repeat(HISTORY)
    return record_losses(empty_history(4), t, LOSSES[t])


def test_probabilities_are_the_root_of_the_second_moment():
    history = full_history()
    expected = 0.999 * LOSSES[1:] / LOSSES.sum() + 0.001 / 4
    assert torch.allclose(time_probabilities(history), expected.double(), rtol=1e-6)
    mixed = record_losses(history, torch.tensor([2] * 5), torch.full((5,), 3.0))
    p = time_probabilities(mixed)
    assert float((p[1] - 0.00025) / (p[0] - 0.00025)) == pytest.approx(((5 * 1 + 5 * 9) / 10) ** 0.5 / 4)


def test_times_are_uniform_until_each_has_enough_losses():
    t = torch.arange(1, 5).repeat(HISTORY)[1:]
    history = record_losses(empty_history(4), t, LOSSES[t])
    assert torch.allclose(time_probabilities(history), torch.full((4,), 0.25).double())
    drawn, weights = importance_times(history, 0, 3, range(1000))
    assert torch.equal(drawn, uniform_times(4, 0, 3, range(1000)))
    assert torch.equal(weights, torch.ones(1000))


def test_weighted_losses_have_the_mean_of_uniform_times():
    t, weights = importance_times(full_history(), 0, 7, range(20_000))
    counts = torch.bincount(t, minlength=5)[1:] / 20_000
    assert torch.allclose(counts.double(), time_probabilities(full_history()), atol=0.012)
    assert float((weights * LOSSES[t]).mean()) == pytest.approx(float(LOSSES[1:].mean()), rel=0.01)


def test_importance_times_are_addressed():
    history = full_history()
    t, weights = importance_times(history, 0, 7, range(64))
    parts = [importance_times(history, 0, 7, range(first, first + 16)) for first in range(0, 64, 16)]
    assert torch.equal(t, torch.cat([part[0] for part in parts]))
    assert torch.equal(weights, torch.cat([part[1] for part in parts]))
    assert not torch.equal(t, importance_times(history, 0, 8, range(64))[0])
    assert not torch.equal(t, importance_times(history, 1, 7, range(64))[0])


def test_the_last_finite_losses_are_kept_in_their_order():
    generator = torch.Generator().manual_seed(0)
    history, lists = empty_history(3), {t: [] for t in (1, 2, 3)}
    for _ in range(4):
        t = torch.randint(1, 4, (20,), generator=generator)
        losses = torch.rand(20, generator=generator)
        losses[3] = torch.nan
        history = record_losses(history, t, losses)
        for time, loss in zip(t.tolist(), losses.tolist(), strict=True):
            lists[time] += [loss] if loss == loss else []
    many = record_losses(history, torch.full((25,), 2), torch.arange(25.0))
    assert sorted(many[2, :HISTORY].tolist()) == list(range(15, 25))
    for t, values in lists.items():
        assert sorted(history[t, :HISTORY].tolist()) == sorted(values[-HISTORY:])
        assert int(history[t, HISTORY]) == len(values)
    assert (history[0] == 0).all()
