"""The description of a model that is stored with its weights, in plain values."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddim.config import build, choose, convert
from ddim.diffusion import multinomial
from ddim.diffusion.learned_variance import VARIANCES
from ddim.diffusion.noise import initial_noise
from ddim.diffusion.prediction import PREDICTIONS
from ddim.diffusion.schedule import NoiseSchedule
from ddim.errors import UserError
from ddim.io import printable
from ddim.networks import NETWORKS

FORMAT = 1
SAME_ALPHA_BAR = 1e-9  # relative difference below which two schedules are one
KEY = "ddim"  # the entry of a checkpoint that holds the description


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """Everything about a model except its weights.

    Images are float tensors (C, H, W) in [-1, 1]; networks take the times 0..T-1.

    Attributes:
        network: a key of NETWORKS.
        network_spec: the spec of that network.
        schedule: the noise levels of the training.
        prediction: what the network predicts, a key of PREDICTIONS.
        data: name of the training set, human-readable.
        plugins: the user's modules that were imported for the training, by name; loading never imports them.
        variance: one of VARIANCES: fixed, or learned_range for a network with twice the channels of the image.
        classes: names of the labels 0..K-1 of a conditional network; () if it is unconditional, or they are unknown.

    Raises:
        UserError: an unknown name, another number of output channels, or another number of classes.
    """

    network: str
    network_spec: Any
    schedule: NoiseSchedule
    prediction: str = "eps"
    data: str = ""
    plugins: tuple[str, ...] = ()
    variance: str = "fixed"
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        choose("prediction", self.prediction, PREDICTIONS)
        channels = self.network_spec.channels
        outputs = getattr(self.network_spec, "out_channels", None) or channels
        if outputs != (needed := channels * choose("variance", self.variance, VARIANCES)):
            raise UserError(f"variance={self.variance} needs {needed} output channels; the network has {outputs}.")
        if self.classes and len(self.classes) != self.num_classes:
            raise UserError(f"{len(self.classes)} names of classes do not fit a network of classes={self.num_classes}.")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.network_spec.channels, *self.network_spec.image_size)

    @property
    def num_classes(self) -> int | None:
        """K, where the network is conditional on labels 0..K-1; None where it is unconditional."""
        return getattr(self.network_spec, "classes", None)

    @property
    def categories(self) -> int | None:
        """K, where pixels are one of K categories (multinomial diffusion); None where they are numbers."""
        return getattr(self.network_spec, "categories", None)

    def x_T(self, indices: Sequence[int] | Tensor, seed: int, device: torch.device | str | None = None) -> Tensor:
        """Return the starting points of the images numbered `indices`, float32 (B, C, H, W); see `initial_noise`."""
        if self.categories is None:
            return initial_noise(indices, self.image_shape, seed, device)
        return multinomial.initial_state(indices, self.image_shape, seed, self.categories, device)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values and one tensor (alpha_bar), as stored in a checkpoint."""
        network_spec = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self.network_spec).items()
            # As before there were these fields: records have a hash of it.
            if not (key in ("out_channels", "classes") and value is None)
        }
        return {
            "format": FORMAT,
            "network": {"name": self.network, **network_spec},
            "schedule": {"name": self.schedule.name, "alpha_bar": self.schedule.alpha_bar},
            "prediction": self.prediction,
            "image": {"shape": list(self.image_shape), "range": [-1.0, 1.0]},
            "data": self.data,
            **({"plugins": list(self.plugins)} if self.plugins else {}),
            **({} if self.variance == "fixed" else {"variance": self.variance}),
            **({"classes": list(self.classes)} if self.classes else {}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelSpec":
        """Undo `to_dict`.

        Raises:
            UserError: another format version, or an entry that is missing or invalid.
        """
        if values.get("format") != FORMAT:
            raise UserError(f"the checkpoint has format {values.get('format')!r}; this version reads format {FORMAT}.")
        try:
            network = dict(values["network"])
            name = network.pop("name")
            plugins = convert(values.get("plugins", ()), tuple[str, ...], "plugins")
            if name not in NETWORKS:
                trained = "and the checkpoint was trained with plugins" if plugins else "so it is one of a plugin"
                names = ",".join(map(printable, plugins)) or "MODULE"
                raise UserError(
                    f"the network {name!r} is none of this package, {trained}; add plugins=[{names}] to the command, "
                    "or import the plugin before you load it."
                )
            schedule = NoiseSchedule(values["schedule"]["alpha_bar"], values["schedule"]["name"])
            network_spec = build(choose("network", name, NETWORKS)[0], network, "network")
            variance = values.get("variance", "fixed")
            classes = convert(values.get("classes", ()), tuple[str, ...], "classes")
            spec = cls(name, network_spec, schedule, values["prediction"], values["data"], plugins, variance, classes)
            texts = {"data": spec.data, "schedule.name": schedule.name}
            if wrong := [f"{key}={text!r}" for key, text in texts.items() if not isinstance(text, str)]:
                raise ValueError(f"{', '.join(wrong)} must be text")
            if (image := values["image"]) != (mine := spec.to_dict()["image"]):
                raise ValueError(f"image={image!r} does not belong to the network, which has {mine}")
            return spec
        except KeyError as error:
            raise UserError(f"the checkpoint's description of its model lacks {error}.") from error
        except (TypeError, ValueError, AttributeError) as error:
            reason = str(error).rstrip(".")
            raise UserError(f"the checkpoint's description of its model is not understood: {reason}.") from error

    def differences(self, other: "ModelSpec") -> list[str]:
        """Return one phrase for each reason why the weights of one model cannot be used in the other; [] if none."""
        mine, theirs = self.to_dict(), other.to_dict()
        reasons = [
            f"network.{key}: {mine['network'].get(key)} and {theirs['network'].get(key)}"
            for key in {**mine["network"], **theirs["network"]}
            # Dropout and initialization affect the training, not the meaning of the weights.
            if key not in ("dropout", "init") and mine["network"].get(key) != theirs["network"].get(key)
        ]
        a, b = self.schedule.alpha_bar, other.schedule.alpha_bar
        # torch's linspace rounds the last digit differently on some processors.
        if a.shape != b.shape or not torch.allclose(a, b, rtol=SAME_ALPHA_BAR, atol=0):
            reasons.append(
                f"schedule: {self.schedule.name} with T={self.schedule.T} and "
                f"{other.schedule.name} with T={other.schedule.T}"
            )
        if self.prediction != other.prediction:
            reasons.append(f"prediction: {self.prediction} and {other.prediction}")
        if self.classes != other.classes:
            reasons.append(f"classes: {', '.join(self.classes) or 'none'} and {', '.join(other.classes) or 'none'}")
        return reasons
