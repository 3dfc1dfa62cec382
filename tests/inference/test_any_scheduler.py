"""Schedulers of diffusers through the adapter: their steps, the evaluations that they cost, their noise."""

import dataclasses
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddim import DDIM, initial_noise, linear_schedule, sample
from ddim.checkpoints.model import LoadedModel
from ddim.diffusion.labels import row_label, title
from ddim.diffusion.rules import Rule
from ddim.diffusion.sampling import State
from ddim.diffusion.solvers import DPMSolverPP, Heun
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.evaluation.fidelity import EvaluateSpec, evaluate
from ddim.inference.compute import ComputeSpec
from ddim.inference.diffusers_scheduler import check_scheduler, scheduler_tau, scheduler_trajectory
from ddim.inference.generate import check_sampler, generate, network_evaluations
from ddim.results.records import RECORDS
from ddim.results.report import write_report
from ddim.results.schema import evaluation_records

# The warning is of diffusers with NumPy 2.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")]
diffusers = pytest.importorskip("diffusers")
SCHEDULE = linear_schedule(1000)
SHAPE = (1, 2, 2)


def scheduler(name: str, S: int = 5, **kwargs: Any) -> SamplerSpec:
    return SamplerSpec("diffusers", None, S, "scheduler", kwargs=kwargs, scheduler=name)


class Network:
    """A made-up network: depends on x nonlinearly and on t; it keeps the times that it was asked at."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.times.append(float(t[0]))
        return torch.tanh(x) * (0.5 + t.reshape(-1, 1, 1, 1).to(x.dtype) / 1000) + 0.1 * x.flip(-1)


def states(sampler: SamplerSpec, x_T: Tensor, indices: Any = None, seed: int = 3) -> list[State]:
    indices = range(len(x_T)) if indices is None else indices
    return [*scheduler_trajectory(sampler, Network(), SCHEDULE, x_T, prediction="eps", seed=seed, indices=indices)]


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("sampler", "rule", "first"),
    [
        (scheduler("DDIMScheduler", clip_sample=False), DDIM(), 1),
        (scheduler("DDIMScheduler", clip_sample=False, steps_offset=1, set_alpha_to_one=True), DDIM(), 2),
        (scheduler("EulerDiscreteScheduler", timestep_spacing="leading"), DDIM(), 1),
        (scheduler("HeunDiscreteScheduler", timestep_spacing="leading"), Heun(), 1),
        (scheduler("DPMSolverMultistepScheduler", timestep_spacing="trailing"), DPMSolverPP(2), 200),
    ],
    ids=["ddim", "offset", "euler", "heun", "2m"],
)
def test_schedulers_agree_with_our_rules(sampler: SamplerSpec, rule: Rule, first: int) -> None:
    x_T, times = initial_noise(range(3), SHAPE, seed=0), range(first, 1001, 200)
    assert sorted(set(scheduler_tau(sampler, SCHEDULE, "eps"))) == list(times)
    expected = sample(Network(), SCHEDULE, x_T, times, rule)
    torch.testing.assert_close(states(sampler, x_T)[-1].x, expected, rtol=0, atol=1e-4)


STEPS = {"timestep_spacing": "leading", "steps_offset": 1}
COUNTED = [
    (scheduler("DDIMScheduler"), 5),
    (scheduler("DDPMScheduler"), 5),
    (scheduler("PNDMScheduler", skip_prk_steps=True), 6),
    (scheduler("PNDMScheduler"), 14),
    (scheduler("DEISMultistepScheduler", **STEPS), 5),
    (scheduler("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"), 5),
    (scheduler("DPMSolverMultistepScheduler", use_karras_sigmas=True), 5),
    (scheduler("DPMSolverSinglestepScheduler"), 5),
    (scheduler("UniPCMultistepScheduler"), 5),
    (scheduler("EulerDiscreteScheduler"), 5),
    (scheduler("EulerDiscreteScheduler", use_karras_sigmas=True, s_churn=4.0), 5),
    (scheduler("EulerAncestralDiscreteScheduler"), 5),
    (scheduler("HeunDiscreteScheduler"), 9),
    (scheduler("KDPM2DiscreteScheduler"), 9),
    (scheduler("LMSDiscreteScheduler"), 5),
    (scheduler("SASolverScheduler"), 5),
]


@pytest.mark.parametrize(("sampler", "count"), COUNTED, ids=[row_label(sampler) for sampler, _ in COUNTED])
def test_evaluations_are_what_a_counter_sees(sampler: SamplerSpec, count: int) -> None:
    """And x̂0 and ε̂ make up the state before the step, at a noise level near that of its time."""
    network, x_T = Network(), initial_noise(range(2), SHAPE, seed=0)
    check_scheduler(sampler, SCHEDULE, "eps")
    walked = [*scheduler_trajectory(sampler, network, SCHEDULE, x_T, prediction="eps", seed=0, indices=[0, 1])]
    tau = scheduler_tau(sampler, SCHEDULE, "eps")
    assert sorted(network.times) == pytest.approx(tau)
    assert len(network.times) == walked[-1].evaluations == count
    assert walked[-1].t == 0
    assert all(torch.isfinite(state.x).all() for state in walked)
    for before, after in pairwise(walked):
        torch.testing.assert_close(after.eps, Network()(before.x, torch.full((2,), network.times[after.k - 1])))
        a_t = SCHEDULE[round(network.times[after.k - 1])]
        x_t = a_t**0.5 * after.x0 + (1 - a_t) ** 0.5 * after.eps
        torch.testing.assert_close(x_t, before.x, rtol=0, atol=0.02 * float(after.x0.abs().max()))


# ---------------------------------------------------------------- noise

STOCHASTIC = [
    scheduler("DDPMScheduler"),
    scheduler("DDIMScheduler", eta=1.0),
    scheduler("EulerAncestralDiscreteScheduler"),
    scheduler("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
]


@pytest.mark.parametrize("sampler", STOCHASTIC, ids=row_label)
def test_noise_depends_on_seed_and_image_only(sampler: SamplerSpec) -> None:
    x_T = initial_noise([7], SHAPE, seed=0).expand(5, *SHAPE)
    generator = torch.get_rng_state()
    together = states(sampler, x_T, range(5))[-1].x
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(states(sampler, x_T[:2], [3, 1])[-1].x, together[[3, 1]])
    assert torch.equal(states(sampler, x_T[:1], [4])[-1].x, together[4:])
    other = states(sampler, x_T, range(5), seed=4)[-1].x
    assert len({image.numpy().tobytes() for image in (*together, *other)}) == 10


def test_eta_of_a_step_is_the_papers() -> None:
    """The spread around the deterministic sample is that of our DDPM."""
    x_T = initial_noise([7], SHAPE, seed=0).expand(2000, *SHAPE)
    theirs = states(scheduler("DDIMScheduler", eta=1.0, clip_sample=False), x_T)[-1].x
    ours = sample(Network(), SCHEDULE, x_T, (1, 201, 401, 601, 801), DDIM(1.0), seed=0)
    torch.testing.assert_close(theirs.std(0), ours.std(0), rtol=0.08, atol=0)
    torch.testing.assert_close(theirs.mean(0), ours.mean(0), rtol=0, atol=0.1 * float(ours.std(0).max()))


# ---------------------------------------------------------------- from a checkpoint


def test_the_state_stays_float32_under_autocast() -> None:
    sampler, x_T = scheduler("UniPCMultistepScheduler", 8, solver_order=3), initial_noise(range(3), SHAPE, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        x_0 = states(sampler, x_T)[-1].x
    torch.testing.assert_close(x_0, states(sampler, x_T)[-1].x, rtol=0, atol=0)


@pytest.mark.parametrize(
    "sampler", [scheduler("DPMSolverMultistepScheduler", 4), scheduler("EulerAncestralDiscreteScheduler", 4)]
)
def test_images_are_the_same_for_every_batch_size(model: LoadedModel, sampler: SamplerSpec) -> None:
    images = generate(model, sampler, range(9), 3, ComputeSpec("cpu", 64))
    parts = generate(model, sampler, range(9), 3, ComputeSpec("cpu", 4))
    assert images.shape == (9, 1, 8, 8)
    assert int((images.int() - parts.int()).abs().max()) <= 1
    assert network_evaluations(model, sampler) == len(check_sampler(model, sampler)) == 4


def test_settings_state_the_scheduler_and_the_version() -> None:
    sampler = scheduler("DEISMultistepScheduler", 7, solver_order=3)
    assert sampler.settings() == {
        "rule": "diffusers",
        "eta": None,
        "clip": "none",
        "last_time": 0,
        "kwargs": {"solver_order": 3},
        "scheduler": "DEISMultistepScheduler",
        "diffusers": diffusers.__version__,
    }
    assert title(sampler) == "DEISMultistepScheduler (solver_order=3) S=7 scheduler"


def test_a_scheduler_has_its_row_with_its_evaluations(spec: EvaluateSpec, tmp_path: Path) -> None:
    for sampler, tau in (
        (scheduler("HeunDiscreteScheduler", 3, timestep_spacing="leading"), [1, 1, 17, 17, 33]),
        (scheduler("EulerDiscreteScheduler", 3, timestep_spacing="linspace"), [1, 25.5, 50]),
    ):
        record, _ = evaluate(dataclasses.replace(spec, sampler=sampler, n=4))
        assert record["sampler"] == {**sampler.settings(), "tau": tau}
        assert (record["S"], record["nfe"], record["network_evaluations"]) == (3, len(tau), 4 * len(tau))
    records = evaluation_records(Path(spec.output_dir) / RECORDS).read()
    write_report(records, tmp_path / "report")
    written = (tmp_path / "report" / "table.md").read_text()
    assert "| HeunDiscreteScheduler (timestep_spacing=leading) |" in written
    assert "τ: scheduler: S=3 (EulerDiscreteScheduler (timestep_spacing=linspace)): 1, 25.5, 50; S=3 (Heun" in written


class OwnNoise(diffusers.DDIMScheduler):
    """Draws from the global generator."""

    def step(self, model_output: Tensor, timestep: int, sample: Tensor) -> Any:
        return super().step(model_output, timestep, sample + torch.randn_like(sample))


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (scheduler("DEISMultistepSheduler"), r"not known to diffusers \(did you mean DEISMultistepScheduler\?\)"),
        (scheduler("DDIMScheduler", sigma=1), "DDIMScheduler does not take sigma, .* it takes clip_sample, "),
        (scheduler("DDIMScheduler", beta_end=0.1), "does not take beta_end"),
        (scheduler("DEISMultistepScheduler", solver_order="two"), "solver_order='two' .* must be an integer"),
        (scheduler("DPMSolverMultistepScheduler", algorithm_type="rk45"), "cannot sample .*; diffusers says: "),
        (scheduler("DEISMultistepScheduler", 2, solver_order=3, **STEPS), "solver_order=3 needs at least 3 steps"),
        (scheduler("UniPCMultistepScheduler", solver_type="bh1"), "not finite with kwargs="),
        (scheduler("DDIMScheduler", timestep_spacing="lagging"), "diffusers says: lagging is not supported"),
        (scheduler("DDIMScheduler", 2000), "cannot sample with S=2000 .*; diffusers says: "),
        (scheduler("IPNDMScheduler"), "IPNDMScheduler follows noise levels of its own"),
        (scheduler("FlowMatchEulerDiscreteScheduler"), "follows noise levels of its own"),
        (scheduler("CogVideoXDDIMScheduler"), "follows noise levels of its own"),
        (scheduler("RePaintScheduler"), "needs original_image, mask besides the output"),
        (scheduler("DDIMInverseScheduler"), "goes from images to noise"),
        (scheduler("OwnNoiseScheduler"), "draws noise that depends on the other images"),
    ],
    ids=lambda value: row_label(value) if isinstance(value, SamplerSpec) else "",
)
def test_what_cannot_sample_is_refused(
    model: LoadedModel, sampler: SamplerSpec, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusers, "OwnNoiseScheduler", OwnNoise, raising=False)
    with pytest.raises(UserError, match=message) as caught:
        check_sampler(model, sampler)
    assert str(caught.value).startswith("sampler: ")


def test_diffusers_that_is_missing_is_named(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"scheduler=DDIMScheduler needs diffusers: pip install -e '\.\[diffusers\]'"):
        check_sampler(model, scheduler("DDIMScheduler"))


@pytest.mark.parametrize("ask", [SamplerSpec.build_rule, lambda sampler: sampler.tau(1000)])
def test_schedulers_neither_encode_nor_have_a_rule(ask: Any) -> None:
    with pytest.raises(ValueError, match="choose a rule: ddim, sigma_hat"):
        ask(scheduler("DDIMScheduler"))
