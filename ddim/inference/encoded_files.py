"""Files of encoded images: the x_T that scripts/encode.py writes, and what it takes to decode them."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim.checkpoints import LoadedModel
from ddim.diffusion.inversion import Inversion
from ddim.diffusion.rules import Rule
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.inference.compute import ComputeSpec
from ddim.inference.conditioning import condition_settings
from ddim.io import check_regular_file, is_safetensors, read_safetensors, write_safetensors

log = logging.getLogger(__name__)
X_T, SECOND = "x_T", "second"  # names of the tensors


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Images as starting points.

    Attributes:
        x_T: float32 (N, C, H, W), the states at the last of the times.
        second: the states at the last time but one, which bdia needs to decode exactly; None of other methods.
        metadata: where they are from, as JSON values: weights_hash, tau, inversion, files, ...
    """

    x_T: Tensor
    second: Tensor | None
    metadata: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write safetensors, each value of the metadata as JSON; `load_encoded` reads it.

        Raises:
            OSError: the file cannot be written.
        """
        tensors = {X_T: self.x_T} if self.second is None else {X_T: self.x_T, SECOND: self.second}
        as_json = {key: json.dumps(value, ensure_ascii=False) for key, value in self.metadata.items()}
        write_safetensors(path, tensors, as_json)

    def start(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor | None]:
        """Return x_T and `second` of some of the images, (B, C, H, W)."""
        chosen = torch.as_tensor(indices)
        return self.x_T[chosen], None if self.second is None else self.second[chosen]

    def decoder(self) -> Rule:
        """Return the rule that encoding inverted."""
        return Inversion(**self.metadata["inversion"]).decoder()


def load_encoded(path: str, model: LoadedModel) -> EncodedImages:
    """Read a file that scripts/encode.py wrote, for the model that encoded it.

    Raises:
        UserError: there is no such file, it is of another kind, or other weights encoded it.
    """
    file = Path(path)
    check_regular_file(file, "file of x_T")
    if not file.is_file():
        raise UserError(f"there is no file x_T={path}; give one that scripts/encode.py wrote.")
    tensors, as_json = read_safetensors(file) if is_safetensors(file) else ({}, {})
    try:
        metadata = {key: json.loads(value) for key, value in as_json.items() if key != "format"}
        encoded = EncodedImages(tensors[X_T], tensors.get(SECOND), metadata)
        weights_hash, *_ = (metadata[key] for key in ("weights_hash", "tau", "decode_with", "sampler"))
        encoded.decoder()
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"x_T={path} holds no encoded images; give a file that scripts/encode.py wrote.") from error
    if weights_hash != model.weights_hash:
        raise UserError(
            f"x_T={path} was encoded with the weights {str(weights_hash)[:8]}, not with {model.weights_hash[:8]} "
            f"({model.weights}); give the checkpoint and weights=... that encoded it, or encode the images again."
        )
    for x in (encoded.x_T, encoded.second):
        if x is not None and (x.shape[1:] != model.spec.image_shape or not len(x) or x.dtype != torch.float32):
            raise UserError(
                f"x_T={path} holds {x.dtype} states of the shape {tuple(x.shape)}, not float32 ones of "
                f"{('N', *model.spec.image_shape)}; encode the images again."
            )
    return encoded


def in_precision_of(encoded: EncodedImages, compute: ComputeSpec) -> ComputeSpec:
    """Return settings with the precision in which images were encoded, where none is given.

    The way back follows the way there only as closely as the network's values agree: BDIA from float32 is exact in
    float32, and in bfloat16 no closer than the others.
    """
    encoded_in = bool(encoded.metadata.get("bf16")) and not compute.winograd
    bf16 = encoded_in if compute.bf16 is None else compute.bf16
    tf32 = bool(encoded.metadata.get("tf32")) if compute.tf32 is None else compute.tf32
    return dataclasses.replace(compute, bf16=bf16, tf32=tf32)


def check_images(x_T: Tensor, path: str | None, indices: Sequence[int]) -> None:
    """Check that a file has the images asked for.

    Raises:
        UserError: it has not.
    """
    if (largest := max(indices)) >= len(x_T):
        raise UserError(f"x_T={path} holds the images 0 .. {len(x_T) - 1}, not {largest}; ask for these.")


def say_what_differs(
    encoded: EncodedImages, path: str, model: LoadedModel, sampler: SamplerSpec, tau: Sequence[float]
) -> bool:
    """Return whether a sampler is the one that encoding inverted, and warn where it is not.

    Args:
        encoded, path: the file.
        model: with its label and guidance.
        sampler, tau: the sampler and its times.
    """
    rule = None if sampler.scheduler is not None else sampler.build_rule()
    condition = condition_settings(model).get("condition")
    inverted, settings = encoded.metadata["sampler"], sampler.settings()

    def agrees(*names: str) -> bool:
        return all(inverted.get(name) == settings.get(name) for name in names)

    same = {
        "times": list(tau) == encoded.metadata["tau"],
        "rule": rule == encoded.decoder(),
        "last time": agrees("last_time"),
        "clip policy": agrees("clip", "clip_range", "threshold_ratio", "threshold_max"),
        "number of corrector steps": agrees("corrector_steps"),
        "label and guidance": condition == encoded.metadata.get("condition"),
    }
    if differs := " and ".join(name for name, is_same in same.items() if not is_same):
        log.warning(
            "x_T=%s was encoded for %s, whose %s this sampler does not have; the images come back less exactly.",
            path,
            encoded.metadata["decode_with"],
            differs,
        )
    return not differs
