"""Denoising Diffusion Implicit Models (Song, Meng, Ermon, ICLR 2021). `import ddim` needs torch only."""

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

__version__ = "0.1.0"

__all__ = [
    "DDIM",
    "SCHEDULES",
    "SPACINGS",
    "Clip",
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
