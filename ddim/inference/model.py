"""A checkpoint as one object that makes images: what `ddim.load_model` returns."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ddim import checkpoints
from ddim.checkpoints import LoadedModel
from ddim.diffusion.guidance import GuidanceSpec
from ddim.diffusion.schedule import NoiseSchedule
from ddim.diffusion.spec import SamplerSpec
from ddim.inference.compute import ComputeSpec, prepare_model
from ddim.inference.conditioning import conditioned
from ddim.inference.generate import generate


class Model(LoadedModel):
    """A network ready to sample from; see `LoadedModel` for its attributes, and `ddim.load_model` to get one.

    It is called as `ddim.sample` and `ddim.trajectory` call a network: (x_t (B, C, H, W), t (B,), the times 1..T) ->
    its prediction (B, C, H, W), of the kind `spec.prediction`.
    """

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise levels of the training."""
        return self.spec.schedule

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> "Model":
        """Move the network to a device, in place, and return this model.

        Raises:
            ValueError: there is no such device, or none of that number here (UserError).
        """
        prepare_model(self, ComputeSpec(str(device)))
        return self

    def sample(
        self,
        indices: Sequence[int] | Tensor,
        sampler: SamplerSpec | None = None,
        seed: int = 0,
        *,
        label: int | str | None = None,
        guidance: GuidanceSpec | None = None,
        batch_size: int = 250,
        bf16: bool = False,
    ) -> Tensor:
        """Return the images numbered `indices`, uint8 (len(indices), C, H, W) on the CPU.

        Image i is a function of (weights, sampler, seed, i) alone, up to the rounding of the network: it is image i of
        `scripts/sample.py`, whatever else is asked for. For samples x_0 in [-1, 1], or from an x_T of your own, use
        `ddim.sample`.

        Args:
            indices: image numbers, 0 .. 2**32 - 1, such as range(16) or [3, 17].
            sampler: how to sample; None for DDIM with η = 0 and S = 50.
            seed: of x_T and of the noise of the steps, 0 .. 2**64 - 1.
            label: the class of all images, by number or name, or "all" for each in turn; None for no label.
            guidance: such as ddim.GuidanceSpec(w=1.0); None for the conditional network alone.
            batch_size: images in one network evaluation; halved where they do not fit into memory.
            bf16: run the network in bfloat16.

        Raises:
            ValueError: a number or the seed is out of range; or (UserError) there are no indices, the sampler does not
                fit the model, the model knows no such class, or the samples are not finite.
        """
        compute = ComputeSpec(str(self.device), batch_size, bf16)
        model = conditioned(self, label, guidance or GuidanceSpec())
        return generate(model, sampler or SamplerSpec(), indices, seed, compute)


def load_model(path: str | Path, weights: str = "ema") -> Model:
    """Return the model in a checkpoint; see `ddim.load_model`."""
    return Model(**vars(checkpoints.load_model(path, weights)))
