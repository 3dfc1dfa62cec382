"""Sample with a scheduler of diffusers, driven through its own `set_timesteps`, `scale_model_input` and `step`.

Their times are 0..T-1, ours 1..T: their time i is our i + 1. Some can lie between two steps of the training (Euler's
with linspace); the network then gets the fraction. Some schedulers (Euler, Heun, LMS) keep x_t / sqrt(a_t), and
`scale_model_input` makes x_t of it; states here hold x_t.
"""

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

from ddim.config import suggest
from ddim.diffusion.noise import initial_noise
from ddim.diffusion.prediction import check_level, split_output, x0_and_eps
from ddim.diffusion.registry import check_arguments
from ddim.diffusion.sampling import Model, State, last_state
from ddim.diffusion.schedule import NoiseSchedule
from ddim.diffusion.spec import SamplerSpec
from ddim.random import SAMPLING, random_words

_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
# What the checkpoint decides: its noise schedule, and what its network predicts.
_OF_THE_CHECKPOINT = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    *("prediction_type", "use_flow_sigmas"),
)
_STEP = ("self", "model_output", "timestep", "sample", "generator", "return_dict")
_GENERATORS = 0xFFFFFFFF  # the step at which the seeds of the generators are drawn; no trajectory gets that far
_TRIED_STEPS = 20  # from 15 on, some schedulers take their full order in the last step


def check_scheduler(sampler: SamplerSpec, schedule: NoiseSchedule, prediction: str) -> None:
    """Check that a scheduler can sample a network; takes a fraction of a second, without evaluating the network.

    A trial of up to 20 steps on two tiny images, together and alone, shows whether an image depends on the others.

    Args:
        sampler: with a scheduler.
        schedule: that the network was trained with.
        prediction: what it returns, a key of PREDICTIONS.

    Raises:
        ValueError: diffusers is not installed or has no such scheduler; the scheduler cannot follow the schedule, does
            not take these arguments, or fails with them; or its noise cannot be tied to the number of an image.
    """
    scheduler, _ = _build(sampler, schedule, prediction)  # with all the steps
    check_level(prediction, schedule[int(max(_times(scheduler)))])
    order = scheduler.config.get("solver_order", 1)
    if order > len(scheduler.timesteps):
        raise ValueError(f"solver_order={order} needs at least {order} steps, not S={sampler.S}.")
    short = dataclasses.replace(sampler, S=min(sampler.S or 1, _TRIED_STEPS))
    with torch.random.fork_rng(devices=[]):  # the caller's generator stays as it is, whatever the scheduler draws
        together, alone = (_trial(short, schedule, prediction, indices) for indices in ((0, 1), (1,)))
    if not bool(torch.isfinite(together).all()):
        raise ValueError(f"{sampler.scheduler} gives numbers that are not finite with kwargs={sampler.kwargs}.")
    if not torch.equal(together[1:], alone):
        raise ValueError(
            f"{sampler.scheduler} draws noise that depends on the other images of a batch with "
            f"kwargs={sampler.kwargs}; take a scheduler that is deterministic, or whose step takes a generator."
        )


def scheduler_tau(sampler: SamplerSpec, schedule: NoiseSchedule, prediction: str) -> tuple[float, ...]:
    """Return the times of the network's evaluations, rising, integers where they are whole; some can repeat (Heun).

    Raises:
        ValueError: see `check_scheduler`.
    """
    return tuple(sorted(_times(_build(sampler, schedule, prediction)[0])))


def scheduler_trajectory(
    sampler: SamplerSpec,
    model: Model,
    schedule: NoiseSchedule,
    x_T: Tensor,
    *,
    prediction: str,
    seed: int,
    indices: Sequence[int] | Tensor,
) -> Iterator[State]:
    """Yield the state after each step of a scheduler, each of which evaluates the network once.

    Arguments are those of `ddim.diffusion.sampling.trajectory`. x̂0 and ε̂ of a state follow from the network's output,
    not clipped. The noise of image i comes from a generator of torch, seeded by (seed, i).

    Raises:
        ValueError: see `check_scheduler`.
    """
    scheduler, arguments = _build(sampler, schedule, prediction, x_T.device)
    if "generator" in inspect.signature(scheduler.step).parameters:
        seeds = random_words(seed, SAMPLING, _GENERATORS, torch.as_tensor(indices).cpu())[:, 0].tolist()
        arguments["generator"] = [torch.Generator().manual_seed(word) for word in seeds]
    return _walk(scheduler, arguments, model, schedule, x_T, prediction)


def _walk(
    scheduler: Any, arguments: dict[str, Any], model: Model, schedule: NoiseSchedule, x_T: Tensor, prediction: str
) -> Iterator[State]:
    times, timesteps = (*_times(scheduler), 0), scheduler.timesteps
    with torch.no_grad():
        x = x_T * scheduler.init_noise_sigma
        x_t = scheduler.scale_model_input(x, timesteps[0])
    for k, timestep in enumerate(timesteps):
        with torch.no_grad():
            a_t = _level(scheduler, schedule, k, times[k])
            output = model(x_t, torch.full((len(x_t),), times[k], device=x_t.device)).to(x_t.dtype)
            output, _ = split_output(output, x_t)
            x0, eps = x0_and_eps(prediction, "none", output, x_t, a_t)
            with torch.autocast(x.device.type, enabled=False):  # the state is float32; UniPC multiplies matrices
                x = scheduler.step(output, timestep, x, **arguments).prev_sample
            x_t = x if k + 1 == len(timesteps) else scheduler.scale_model_input(x, timesteps[k + 1])
        yield State(k + 1, round(times[k + 1]), x_t, x0, eps, k + 1)  # t of a state is an integer


def _level(scheduler: Any, schedule: NoiseSchedule, k: int, t: float) -> float:
    """Return alpha_bar of the network's input, as the scheduler has it."""
    scale = float(scheduler.scale_model_input(torch.ones(()), scheduler.timesteps[k]))
    if scale != 1:
        return scale**2
    if hasattr(scheduler, "sigmas"):  # σ̄; off the schedule's own levels with Karras' spacing
        return 1 / (1 + float(scheduler.sigmas[k]) ** 2)
    return schedule[int(t)]


def _times(scheduler: Any) -> list[float]:
    return [int(t) + 1 if t == int(t) else t + 1 for t in scheduler.timesteps.tolist()]


def _trial(sampler: SamplerSpec, schedule: NoiseSchedule, prediction: str, indices: Sequence[int]) -> Tensor:
    x_T = initial_noise(indices, (1, 2, 2), seed=0)
    try:
        return last_state(
            scheduler_trajectory(
                sampler, lambda x, t: 0.1 * x, schedule, x_T, prediction=prediction, seed=0, indices=indices
            )
        )
    except Exception as error:
        raise _failure(sampler, error) from error


def _build(
    sampler: SamplerSpec, schedule: NoiseSchedule, prediction: str, device: torch.device | None = None
) -> tuple[Any, dict[str, Any]]:
    """Return the scheduler with its timesteps, and those of the arguments that belong to its `step`."""
    kind = _scheduler_class(sampler.scheduler or "")
    constructor, step = _numbers_and_text(kind.__init__), _numbers_and_text(kind.step)
    kwargs = sampler.kwargs or {}
    check_arguments(f"scheduler={sampler.scheduler}", kwargs, constructor | step)
    betas = (1 - schedule.alpha_bar[1:] / schedule.alpha_bar[:-1]).tolist()
    given = {"trained_betas": betas, "num_train_timesteps": schedule.T, "prediction_type": _PREDICTIONS[prediction]}
    try:
        scheduler = kind(**given, **{name: value for name, value in kwargs.items() if name in constructor})
        scheduler.set_timesteps(sampler.S, device=device)
    except Exception as error:
        raise _failure(sampler, error) from error
    levels = getattr(scheduler, "alphas_cumprod", torch.zeros(())).double().cpu()
    if levels.shape != (schedule.T,) or not torch.allclose(levels, schedule.alpha_bar[1:], rtol=1e-3, atol=1e-6):
        raise _other_schedule(sampler.scheduler)
    if float(scheduler.timesteps[0]) < float(scheduler.timesteps[-1]):
        raise ValueError(f"{sampler.scheduler} goes from images to noise; choose one that samples.")
    return scheduler, {name: value for name, value in kwargs.items() if name in step}


def _scheduler_class(name: str) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(f"scheduler={name} needs diffusers: pip install -e '.[diffusers]'.") from error
    known = [other for other in dir(diffusers) if other.endswith("Scheduler")]
    if name not in known:
        raise ValueError(f"scheduler={name} is not known to diffusers{suggest(name, known)}; see its Schedulers page.")
    kind = getattr(diffusers, name)
    if missing := getattr(kind, "_backends", None):  # a stand-in for a class that cannot be imported
        raise ValueError(f"scheduler={name} needs a package that is not installed, one of {', '.join(missing)}.")
    needed = [p.name for p in inspect.signature(kind.step).parameters.values() if p.default is p.empty]
    if others := [parameter for parameter in needed if parameter not in _STEP]:
        raise ValueError(f"a step of {name} needs {', '.join(others)} besides the output of a network.")
    if not {"trained_betas", "prediction_type"} <= inspect.signature(kind.__init__).parameters.keys():
        raise _other_schedule(name)
    return kind


def _numbers_and_text(function: Any) -> dict[str, Any]:
    """Return name and type of what a user can give to a constructor or a step."""
    hints, parameters = get_type_hints(function), inspect.signature(function).parameters.values()
    hidden = (*_OF_THE_CHECKPOINT, *_STEP, "variance_noise")
    return {p.name: hints.get(p.name) for p in parameters if p.name not in hidden and p.kind is not p.VAR_KEYWORD}


def _other_schedule(name: str | None) -> ValueError:
    return ValueError(
        f"{name} follows noise levels of its own, not those that the network was trained with; take one that samples "
        "with given betas, such as DEISMultistepScheduler or EulerDiscreteScheduler."
    )


def _failure(sampler: SamplerSpec, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return ValueError(
        f"{sampler.scheduler} cannot sample with S={sampler.S} and kwargs={sampler.kwargs}; diffusers says: {reason}"
    )
