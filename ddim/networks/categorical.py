"""The U-Net for pixels of K categories (multinomial diffusion): it takes one-hot vectors and returns logits."""

from dataclasses import asdict, dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ddim.diffusion.multinomial import to_categories
from ddim.networks.unet import UNet, UNetSpec


@dataclass(frozen=True)
class CategoricalUNetSpec(UNetSpec):
    """The hyperparameters of a `CategoricalUNet`: those of `UNetSpec`, and the number of categories.

    Args:
        categories: K, grey levels of a pixel, 2 to 256.

    Raises:
        ValueError: a value out of range, or values that do not fit together.
    """

    categories: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.categories <= 256:
            raise ValueError(f"categories={self.categories} must be 2 to 256 grey levels.")
        if self.classes is not None:
            raise ValueError(
                f"classes={self.classes} is not for pixels of categories (multinomial diffusion), whose network is "
                "unconditional; leave it null, and data.labels too."
            )


class CategoricalUNet(nn.Module):
    """A U-Net with K channels for each channel of the image: x_t, (B, C, H, W), to logits (B, C·K, H, W)."""

    def __init__(self, spec: CategoricalUNetSpec) -> None:
        super().__init__()
        self.spec = spec
        values = asdict(spec)
        K = values.pop("categories")
        self.unet = UNet(UNetSpec(**values | {"channels": spec.channels * K}))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Evaluate the network.

        Args:
            x: (B, C, H, W) float, each pixel the value in [-1, 1] of its category.
            t: (B,) integer, zero-based network times 0..T-1.

        Returns:
            (B, C·K, H, W): the logits of category k of channel c in channel c·K + k.

        Raises:
            ValueError: x or t has the wrong shape.
        """
        one_hot = F.one_hot(to_categories(x, self.spec.categories), self.spec.categories)
        dtype = next(self.unet.parameters()).dtype
        return self.unet(rearrange(one_hot, "b c h w k -> b (c k) h w").to(dtype), t)
