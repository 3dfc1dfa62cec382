"""Training a learned variance: resuming, processes, and what it is good for."""

import pytest
import torch

from ddim.checkpoints import load_model
from ddim.checkpoints.model import read_checkpoint
from ddim.config import build
from ddim.diffusion.importance import HISTORY, time_probabilities
from ddim.diffusion.learned_variance import LearnedVariance
from ddim.diffusion.sampling import sample
from ddim.errors import UserError
from ddim.training.module import COUNTS
from ddim.training.spec import TrainSpec

VLB = {
    "objective": {"weight": "vlb", "variance": "learned_range", "times": "loss_second_moment"},
    "schedule": {"T": 2, "beta_start": 0.1, "beta_end": 0.9},
    "grid": {"sampler": {"S": 1}},
}


def history(path):
    return read_checkpoint(path)[COUNTS]["loss_history"]


@pytest.mark.integration
def test_importance_times_resume_bitwise(run, same, logged, killed_run):
    trainer = {"max_steps": 9, "accumulate": 2, "checkpoint_every": 1}
    straight = run("straight", **VLB, trainer=trainer)
    killed_run(6, 1, "killed", **VLB, trainer=trainer)
    resumed = run("killed", **VLB, trainer=trainer, checkpoint="last")
    assert same(straight, resumed)
    assert torch.equal(history(straight), history(resumed))
    assert int(history(straight)[:, HISTORY].sum()) == 9 * 8
    p = time_probabilities(history(straight))
    assert p[0] != p[1]
    model = load_model(straight)
    assert (model.spec.variance, model.spec.network_spec.out_channels) == ("learned_range", 2)
    assert sample(model, model.spec.schedule, torch.zeros(2, 1, 8, 8), (1, 2), LearnedVariance()).shape == (2, 1, 8, 8)


@pytest.mark.integration
def test_importance_times_do_not_depend_on_processes(run, same, two_processes):
    robust = VLB | {"optim": {"eps": 1e-3}}  # where Adam makes no step of a gradient that is rounding alone
    one, two = run("one", **robust), run("two", **robust, trainer=two_processes)
    assert same(one, two, atol=1e-6)
    assert torch.allclose(history(one), history(two), rtol=1e-4)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"weight": "hybrid"}, "set variance=learned_range"),
        ({"variance": "learned_range"}, "set weight=hybrid or weight=vlb"),
        ({"variance": "learned_range", "weight": "min_snr"}, "is not trained by weight=min_snr"),
        ({"weight": "min_snr", "gamma": 0.0}, "gamma=0.0 must be positive"),
        ({"weight": "hybird"}, "hybrid"),
        ({"variance": "learned"}, "learned_range"),
    ],
)
def test_weights_and_variances_that_do_not_fit_are_refused(config, objective, message):
    with pytest.raises(UserError, match=message):
        build(TrainSpec, config(objective=objective), "")


def test_settings_of_the_model_that_do_not_fit_are_refused(config):
    for changes, message in (
        ({"network": {"out_channels": 2}}, "out_channels follows from objective.variance"),
        ({"schedule": {"T": 1}, "objective": {"weight": "vlb"}}, "at least two times"),
        ({"grid": {"sampler": {"rule": "learned_variance", "eta": None, "S": 5}}}, "predicts the variance"),
    ):
        with pytest.raises(UserError, match=message):
            build(TrainSpec, config(**changes), "").model_spec()


def test_the_recipe_names_new_options_only_where_they_are_set(config):
    def objective(**changes):
        recipe = build(TrainSpec, config(**changes), "").recipe()
        return {key.partition(".")[2] for key in recipe if key.startswith("objective.")}

    assert objective() == {"prediction", "reduction", "times"}
    assert objective(objective={"weight": "min_snr", "gamma": 3.0}) == {*objective(), "weight", "gamma"}
