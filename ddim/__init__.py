"""Denoising Diffusion Implicit Models (Song, Meng, Ermon, ICLR 2021). `import ddim` needs torch only."""

from pathlib import Path
from typing import TYPE_CHECKING

from ddim.diffusion.guidance import GuidanceSpec, GuidedModel
from ddim.diffusion.interpolation import slerp
from ddim.diffusion.noise import initial_noise, step_noise
from ddim.diffusion.objective import add_noise, antithetic_times, per_sample_loss, q_sample, uniform_times, velocity
from ddim.diffusion.prediction import Clip
from ddim.diffusion.rules import DDIM, SigmaHat
from ddim.diffusion.sampling import State, encode, sample, step, trajectory
from ddim.diffusion.schedule import (
    SCHEDULES,
    NoiseSchedule,
    cosine_schedule,
    from_betas,
    linear_schedule,
    scaled_linear_schedule,
    zero_terminal_snr,
)
from ddim.diffusion.spec import SamplerSpec
from ddim.diffusion.timesteps import (
    SPACINGS,
    cosine_tau,
    leading_tau,
    linear_tau,
    linspace_tau,
    quadratic_tau,
    reference_quad_tau,
    reference_uniform_tau,
    respaced_tau,
    trailing_tau,
)

if TYPE_CHECKING:
    from ddim.inference.model import Model

__version__ = "0.1.0"

__all__ = [
    "DDIM",
    "SCHEDULES",
    "SPACINGS",
    "Clip",
    "GuidanceSpec",
    "GuidedModel",
    "NoiseSchedule",
    "SamplerSpec",
    "SigmaHat",
    "State",
    "add_noise",
    "antithetic_times",
    "cosine_schedule",
    "cosine_tau",
    "encode",
    "from_betas",
    "initial_noise",
    "leading_tau",
    "linear_schedule",
    "linear_tau",
    "linspace_tau",
    "load_model",
    "per_sample_loss",
    "q_sample",
    "quadratic_tau",
    "reference_quad_tau",
    "reference_uniform_tau",
    "respaced_tau",
    "sample",
    "scaled_linear_schedule",
    "slerp",
    "step",
    "step_noise",
    "trailing_tau",
    "trajectory",
    "uniform_times",
    "velocity",
    "zero_terminal_snr",
]


def load_model(path: str | Path, weights: str = "ema") -> "Model":
    """Return the model in a checkpoint, on the CPU; `.sample(indices, sampler, seed)` makes images.

    Args:
        path: a file that `scripts/train.py`, `scripts/import_checkpoint.py` or `scripts/export_checkpoint.py` wrote.
        weights: "ema" for the EMA weights, "online" for the weights that the optimiser updates, "ema_RATE" for an
            additional EMA.

    Raises:
        UserError: the file does not exist, is damaged or unknown, lacks these weights, or its weights do not fit its
            description.
    """
    from ddim.inference import model  # here, because it needs more than torch

    return model.load_model(path, weights)
