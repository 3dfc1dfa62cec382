"""What a step trains on: the whole objective of the configuration, in the products that it asks for."""

from types import SimpleNamespace

import pytest
import torch

from ddim.config import build
from ddim.diffusion.importance import HISTORY, importance_times, record_losses
from ddim.diffusion.objective import per_sample_loss, training_noise, uniform_times
from ddim.training.module import DiffusionModule
from ddim.training.spec import TrainSpec

OBJECTIVES = [
    {"weight": "min_snr", "gamma": 0.5},
    {"weight": "vlb"},
    {"weight": "hybrid", "variance": "learned_range", "vlb_weight": 0.7},
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective["weight"])
@pytest.mark.parametrize("importance", [False, True])
def test_the_module_trains_on_the_whole_objective(config, objective, importance):
    times = {"times": "loss_second_moment"} if importance else {}
    spec = build(TrainSpec, config(objective=objective | times), "")
    module = DiffusionModule(spec.model_spec(), spec.objective, spec.optim, spec.seed)
    module.trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=1, global_rank=0)
    x0, positions = torch.linspace(-1, 1, 8 * 64).reshape(8, 1, 8, 8), torch.arange(8)
    t, weights = uniform_times(20, spec.seed, 9, positions), torch.ones(8)
    if importance:  # with a full history of losses that grow with t, so that the weights differ
        every = torch.arange(1, 21).repeat(HISTORY)
        module.loss_history.copy_(record_losses(module.loss_history, every, every.double()))
        t, weights = importance_times(module.loss_history, spec.seed, 9, positions)
        assert not torch.equal(weights, torch.ones(8))
    out = module.training_step({"images": x0, "step": 9, "positions": positions}, 0)
    options = {name: value for name, value in objective.items() if name != "variance"}
    eps = training_noise(spec.seed, 9, positions, (1, 8, 8))
    losses = per_sample_loss(module.model, module.alpha_bar, x0, t, eps, **options)
    torch.testing.assert_close(out["losses"], losses.detach())
    torch.testing.assert_close(out["loss"], (weights * losses).mean().to(out["loss"].dtype))


@pytest.mark.integration
@pytest.mark.parametrize("tf32", [False, True])
def test_a_run_trains_in_the_products_it_asked_for(run, after_loss, tf32):
    seen = set()
    after_loss(lambda *_: seen.add((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)))
    run(trainer={"max_steps": 1, "tf32": tf32})
    assert seen == {(tf32, tf32)}
