"""Features of images: the extractors by name, and an extractor loaded on a device."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ddim.checkpoints import weights_hash
from ddim.config import choose
from ddim.errors import UserError
from ddim.evaluation.feature_stats import Features
from ddim.inference.batching import map_batches, split
from ddim.networks import float32_products


class ExtractorInfo(NamedTuple):
    """What is known of an extractor before it is loaded.

    Attributes:
        registered_name: torch-fidelity's name for it.
        feature_layer: the layer that distances are computed from, by torch-fidelity's name.
        logits_layer: the layer of class logits, or None.
        resize: how images are resized, in words.
        takes_grey: whether it takes images of one channel.
    """

    registered_name: str
    feature_layer: str
    logits_layer: str | None
    resize: str
    takes_grey: bool


class FeatureExtractor:
    """A feature extractor loaded on one device.

    Args:
        name: a key of EXTRACTORS.
        device: where it runs.
        logits: extract the class logits too.
        weights_path: Inception's weights file; None takes torch-fidelity's download.
        batch_size: images per forward pass.
        bf16: run the network in bfloat16 under autocast; features are float32 still.

    Attributes:
        weights_hash: SHA-256, in hex, of the published parameters and buffers in the order of their names. Names,
            shapes, types and values count; the device and the file they came from do not.

    Raises:
        UserError: the Inception weights or the package of an extractor are missing; the message names what to fetch.
    """

    def __init__(
        self,
        name: str,
        device: torch.device | str,
        logits: bool = False,
        weights_path: str | None = None,
        batch_size: int = 64,
        bf16: bool = False,
    ) -> None:
        from ddim.evaluation.extractor_networks import INCEPTION, fold_normalisation, load_network

        self.name, self.device, self.batch_size, self.bf16 = name, torch.device(device), batch_size, bf16
        self.info: ExtractorInfo = choose("extractor", name, EXTRACTORS)
        layers = [self.info.feature_layer]
        if logits and self.info.logits_layer is not None:
            layers.append(self.info.logits_layer)
        self.network = load_network(self.info.registered_name, layers, weights_path)
        self.weights_hash = weights_hash(self.network.state_dict())  # before the normalisation is folded
        if self.info.registered_name == INCEPTION:
            fold_normalisation(self.network)
        self.network.to(self.device)
        if self.device.type != "cpu":  # where it is faster
            self.network.to(memory_format=torch.channels_last)

    @property
    def layers(self) -> list[str]:
        """The layers that `extract` returns; distances are computed from the first."""
        return self.network.features_list

    def dimension(self, shape: tuple[int, int, int]) -> int:
        """Return the number of features of an image (C, H, W) in the first layer; layers are named by it."""
        return math.prod(shape) if self.layers[0] == "pixels" else int(self.layers[0])

    @torch.no_grad()
    def extract(self, images: Tensor | Dataset[Tensor]) -> Features:
        """Return the features of uint8 images, in float32 without TF32, or in bfloat16 where that was asked for.

        Args:
            images: (N, C, H, W) or a data set of (C, H, W) items, uint8, C = 1 or 3. Grey images are repeated to three
                channels for networks that need them.

        Returns:
            (N, D) float32 on the CPU per layer, in the order of the images whatever the batch size.

        Raises:
            UserError: no images, not uint8, not (N, C, H, W), or of a size that the extractor refuses.
        """
        count = len(images)  # type: ignore[arg-type]
        if count == 0:
            raise UserError("there are no images to extract features from; generate or load at least one.")
        batches = split(range(count), self.batch_size)
        with float32_products(tf32=False):
            done = list(map_batches(batches, lambda batch: self._extract_batch(images, batch)))
        if len(done) > len(batches):  # some did not fit into memory; the following calls start with what fits
            self.batch_size = max(len(batch) for batch, _ in done)
        return {layer: torch.cat([features[layer] for _, features in done]) for layer in done[0][1]}

    def _extract_batch(self, images: Tensor | Dataset[Tensor], batch: range) -> Features:
        pixels = _stack(images, batch)
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
            raise UserError(
                f"images must be uint8 of shape (N, 1 or 3, H, W), not {pixels.dtype} {tuple(pixels.shape)}; "
                "convert samples to 8-bit pixels first."
            )
        if pixels.shape[1] == 1 and not self.info.takes_grey:
            pixels = pixels.expand(-1, 3, -1, -1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            outputs = self.network.convert_features_tuple_to_dict(self.network(pixels.to(self.device)))
        features = {layer: values.float().cpu() for layer, values in outputs.items()}
        for layer, values in features.items():
            if not torch.isfinite(values).all():
                raise UserError(f"the features of layer {layer} are not finite; check the extractor's weights.")
        return features


def _stack(images: Tensor | Dataset[Tensor], batch: range) -> Tensor:
    if isinstance(images, Tensor):
        return images[batch.start : batch.stop]
    items = [images[i] for i in batch]
    if not isinstance(items[0], Tensor):
        raise UserError(f"the items of an image data set must be tensors, not {type(items[0]).__name__}.")
    return torch.stack(items)


EXTRACTORS: dict[str, ExtractorInfo] = {
    "inception": ExtractorInfo(
        "inception-v3-compat",
        feature_layer="2048",
        logits_layer="logits_unbiased",
        resize="TF1-style bilinear to 299x299, no antialiasing",
        takes_grey=False,
    ),
    "digits_classifier": ExtractorInfo("digits-classifier", "64", "logits", "none (8x8 only)", takes_grey=True),
    "pixels": ExtractorInfo("pixels", "pixels", None, "none", takes_grey=True),
    "efficientnet": ExtractorInfo(
        "efficientnet-lite0",
        feature_layer="1280",
        logits_layer="logits",
        resize="antialiased bilinear to 64x64 when no side exceeds 64, else to 224x224",
        takes_grey=True,
    ),
}
