"""The mapping between pixels and [-1, 1], and the two kinds of image sets."""

import hashlib

import pytest
import torch
from PIL import Image
from torchvision.utils import save_image

from ddim.data import LazyImages, MemoryImages, normalize, to_uint8


class Ramp(LazyImages):
    name, shape, transform = "ramp", (1, 1, 2), "none"

    def __init__(self, length=3):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor([[[index, 0]]], dtype=torch.uint8)


def test_every_pixel_value_survives_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    scaled = normalize(pixels)
    assert scaled.dtype == torch.float32
    assert scaled[0] == -1
    assert scaled[255] == 1
    torch.testing.assert_close(scaled.double(), torch.arange(256).double() / 127.5 - 1, atol=1e-7, rtol=0)
    assert torch.equal(to_uint8(scaled), pixels)
    assert torch.equal(to_uint8(scaled.double()), pixels)


def test_to_uint8_equals_save_image_of_torchvision(tmp_path):
    x = torch.linspace(-1.2, 1.2, 60 * 50).reshape(60, 50)
    save_image((x + 1) / 2, tmp_path / "x.png")
    written = torch.tensor(list(Image.open(tmp_path / "x.png").convert("L").tobytes()), dtype=torch.uint8)
    assert torch.equal(to_uint8(x).flatten(), written)


def test_to_uint8_clamps_and_does_not_change_its_input():
    x = torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0])
    assert to_uint8(x).tolist() == [0, 0, 128, 255, 255]
    assert x.tolist() == [-7, -1, 0, 1, 7]


def test_wrong_dtypes_are_refused():
    with pytest.raises(TypeError, match="uint8"):
        normalize(torch.zeros(2))
    with pytest.raises(TypeError, match="floating"):
        to_uint8(torch.zeros(2, dtype=torch.uint8))


def test_batch_holds_the_images_at_the_indices():
    memory = MemoryImages("a", torch.tensor([[[[i, 0]]] for i in range(3)], dtype=torch.uint8))
    for images in (memory, Ramp()):
        assert images.batch(torch.tensor([2, 0, 2])).tolist() == [[[[i, 0]]] for i in (2, 0, 2)]


def test_fingerprint_in_memory_depends_on_the_pixels():
    pixels = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)
    images = MemoryImages("a", pixels)
    assert images.fingerprint() == hashlib.sha256(bytes(range(24))).hexdigest()
    assert MemoryImages("b", pixels.clone()).fingerprint() == images.fingerprint()
    assert MemoryImages("a", pixels.flip(0)).fingerprint() != images.fingerprint()
    # not on the memory order of the given tensor
    strided = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert MemoryImages("a", strided).fingerprint() == images.fingerprint()
    assert len(images) == 2
    assert images.shape == (3, 2, 2)
    assert images[1].tolist() == pixels[1].tolist()
    with pytest.raises(ValueError, match="uint8"):
        MemoryImages("a", pixels.float())


def test_fingerprint_of_lazy_images_is_that_of_the_pixels():
    one, other = Ramp(), Ramp(length=4)
    assert one.fingerprint() == MemoryImages("a", torch.stack([one[i] for i in range(3)])).fingerprint()
    assert one.fingerprint() != other.fingerprint()
