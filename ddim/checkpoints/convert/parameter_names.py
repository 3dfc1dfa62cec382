"""The parameters of a network by the names of either code base: which there must be, their shapes, and the way over."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ddim.checkpoints.convert import diffusers
from ddim.io import Tensors, shown
from ddim.networks import UNetSpec, build_network


@dataclass(frozen=True)
class Parameters:
    """What a U-Net's parameters are called in a file.

    Attributes:
        network: the U-Net.
        as_diffusers: under diffusers' names, else under those of the original DDPM files, which are ours.
    """

    network: UNetSpec
    as_diffusers: bool

    @cached_property
    def shapes_here(self) -> dict[str, tuple[int, ...]]:
        """Our name -> our shape."""
        with torch.device("meta"):
            return {name: tuple(v.shape) for name, v in build_network("unet", self.network).state_dict().items()}

    @cached_property
    def names(self) -> dict[str, str]:
        """Our name -> name in the file."""
        levels = len(self.network.ch_mult)
        return {name: diffusers.name_there(name, levels) if self.as_diffusers else name for name in self.shapes_here}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name in the file -> shape in the file."""
        return {there: self.shapes_here[name][: 2 if self._linear(there) else 4] for name, there in self.names.items()}

    def problems(self, state: Mapping[str, Tensor]) -> dict[str, list[str]]:
        """Return what keeps a state dict in the file's names from fitting: kind of problem -> names."""
        found = {
            "missing": [name for name in self.shapes if name not in state],
            "unexpected": [name for name in state if name not in self.shapes],
            "of the wrong shape": [
                f"{name} {tuple(state[name].shape)} instead of {shape}"
                for name, shape in self.shapes.items()
                if name in state and tuple(state[name].shape) != shape
            ],
        }
        return {kind: names for kind, names in found.items() if names}

    def to_ours(self, state: Mapping[str, Tensor]) -> Tensors:
        """Return the weights under our names and in our shapes."""
        return {name: state[there].reshape(self.shapes_here[name]) for name, there in self.names.items()}

    def to_file(self, state: Mapping[str, Tensor]) -> Tensors:
        """Return weights of ours under the names and in the shapes of the file; undoes `to_ours`."""
        return {there: state[name].reshape(self.shapes[there]) for name, there in self.names.items()}

    def _linear(self, there: str) -> bool:
        """Whether a weight is a 1x1 convolution here and a linear layer there."""
        return self.as_diffusers and diffusers.is_linear(there)


def in_words(problems: Mapping[str, list[str]]) -> str:
    """Return problems as one phrase that names the first five of each kind."""
    phrases = []
    for kind, found in problems.items():
        names = [shown(name) for name in found]
        phrases.append(f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' * (len(names) > 5)})")
    return "; ".join(phrases)
