"""Folders of images: what is read, in which order, and what is refused."""

import logging
import os
import re
import struct
import zlib

import pytest
import torch
from folders import load, noise, write
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

from ddim.data import LazyImages, image_files
from ddim.data.datamodule import _Reader, _unchanged
from ddim.data.image_files import resize_and_center_crop, to_array
from ddim.errors import UserError


def test_images_come_in_the_order_of_their_paths(tmp_path):
    for i, name in enumerate(["b/1.png", "a/2.bmp", "a/10.png", "c.WEBP", "a.b/0.png"]):
        write(tmp_path / name, (i, 2 * i, 255 - i), lossless=True)
    images = load(tmp_path)
    assert images.images.dtype == torch.uint8
    assert images.images.shape == (5, 3, 4, 6)
    assert images.images[:, :, 0, 0].tolist() == [[i, 2 * i, 255 - i] for i in (4, 2, 1, 0, 3)]
    assert images.name == f"{tmp_path.name}-train"


def test_logs_of_the_command_that_sampled_them_are_no_images(tmp_path):
    """As scripts/sample.py format=png leaves them; a class may have the same name."""
    write(tmp_path / "000.png", (1, 2, 3))
    (tmp_path / "hydra" / "2026-01-01").mkdir(parents=True)
    (tmp_path / "hydra" / "2026-01-01" / "sample.log").touch()
    assert len(load(tmp_path)) == 1
    write(tmp_path / "hydra" / "001.png", (1, 2, 3))
    with pytest.raises(UserError, match=r"holds 1 files that are not images: .*sample\.log"):
        load(tmp_path)


def test_pixels_of_colour_images_are_unchanged(tmp_path):
    image = noise((4, 6))
    image.save(tmp_path / "x.png")
    assert torch.equal(load(tmp_path).images[0], PILToTensor()(image))


def test_pixels_of_grey_images_are_unchanged(tmp_path):
    image = noise((4, 6)).convert("L")
    image.save(tmp_path / "x.png")
    assert torch.equal(load(tmp_path, channels=1).images[0], PILToTensor()(image))


def test_hidden_files_and_those_of_file_managers_are_ignored(tmp_path):
    write(tmp_path / "x.png")
    for name in (".DS_Store", "Thumbs.db", ".cache/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert len(load(tmp_path)) == 1


def test_linked_folders_are_followed(tmp_path):
    write(tmp_path / "elsewhere" / "x.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "cats").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert len(load(tmp_path / "root")) == 1


def test_split_selects_a_sub_folder_if_there_is_one(tmp_path):
    write(tmp_path / "train/cat/0.png", (1, 1, 1))
    with pytest.raises(UserError, match="test does not exist"):
        load(tmp_path, split="test")
    write(tmp_path / "test/cat/0.png", (2, 2, 2))
    (tmp_path / "README.md").write_text("next to the splits")
    assert [int(load(tmp_path, split).images[0, 0, 0, 0]) for split in ("train", "test")] == [1, 2]
    write(tmp_path / "undivided/0.png", (3, 3, 3))
    assert [len(load(tmp_path / "undivided", split)) for split in ("train", "test")] == [1, 1]
    with pytest.raises(UserError, match="split='valid' is not known; allowed: train, test"):
        load(tmp_path, "valid")


def test_other_sizes_are_refused_without_resize(tmp_path):
    write(tmp_path / "a.png")
    write(tmp_path / "b.png", size=(12, 9))
    with pytest.raises(UserError, match=r"b\.png is 12 x 9 pixels .*data\.size=\[4, 6\]; set data\.resize=true"):
        load(tmp_path)
    assert load(tmp_path, resize=True).images.shape == (2, 3, 4, 6)


AMBIGUOUS = {
    "a class called train": ["train", "airplane", "bus"],
    "both splits and a class": ["train", "test", "airplane"],
    "capital letters": ["Train", "Test"],
    "a class with a capital letter": ["Train", "airplane"],
    "two spellings": ["train", "Train", "test"],
    "images at the top": ["train", "test", "."],
}


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("case", AMBIGUOUS)
def test_folders_that_may_be_splits_or_classes_are_refused(tmp_path, case, in_memory):
    for name in AMBIGUOUS[case]:
        write(tmp_path / name / "0.png")
    with pytest.raises(UserError, match=r"may be splits or classes; for splits name them train and test and .*\.$"):
        load(tmp_path, in_memory=in_memory)


def test_what_is_left_out_beside_the_splits_is_logged(tmp_path, caplog):
    for name in ("train", "test", "val"):
        write(tmp_path / name / "0.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "0.txt").write_text("no image")
    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path)) == 1
    assert caplog.messages == [f"{tmp_path / 'train'} is read; val beside it is left out."]


@pytest.mark.parametrize("stored", [(40, 40), (41, 97), (97, 41), (20, 33), (300, 257)])
def test_resizing_to_a_square_equals_torchvision(stored):
    image = noise(stored)
    expected = Compose([Resize(32), CenterCrop(32), PILToTensor()])(image)
    assert torch.equal(torch.from_numpy(to_array(resize_and_center_crop(image, (32, 32)))), expected)


@pytest.mark.parametrize("stored", [(10, 30), (30, 10), (20, 31), (16, 24)])
def test_resizing_keeps_proportions_and_the_centre(stored):
    # a linear ramp of grey levels stays linear around the same centre; its slope gives the scale
    height, width = stored
    scale = max(8 / height, 12 / width)
    for axis, inner in ((0, 3), (1, 7)):
        levels = torch.arange(stored[axis], dtype=torch.uint8) * 4
        ramp = (levels[:, None] if axis == 0 else levels[None]).expand(stored)
        cut = torch.from_numpy(to_array(resize_and_center_crop(Image.fromarray(ramp.contiguous().numpy()), (8, 12))))
        assert cut.shape == (1, 8, 12)
        middle = cut[0, 2:6, 2:10].double()  # away from the borders, where the filter is cut off
        rise = middle.diff(dim=axis).sum(dim=axis).mean() / inner
        assert float(rise) == pytest.approx(4 / scale, rel=0.12)
        assert float(middle.mean()) == pytest.approx(float(ramp.double().mean()), abs=3 / scale)


@pytest.mark.parametrize(
    ("mode", "colour", "channels", "message"),
    [
        ("L", 7, 3, r"is grey, but data\.channels=3; set data\.channels=1 if all .* or data\.convert=true to convert"),
        ("RGB", (1, 2, 3), 1, r"in colour, but data\.channels=1; set data\.channels=3 if .* or data\.convert=true to"),
        ("I;16", 300, 1, r"x\.png has pixels of mode I;16, not 8 bits"),
        ("RGBA", (1, 2, 3, 254), 3, r"x\.png has transparent pixels"),
    ],
)
def test_images_of_other_modes_are_refused(tmp_path, mode, colour, channels, message):
    write(tmp_path / "x.png", colour, mode=mode)
    with pytest.raises(UserError, match=message):
        load(tmp_path, channels=channels)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_colour_images_are_converted_if_wished(tmp_path, channels):
    image = noise((4, 6))
    image.save(tmp_path / "a.png")
    image.convert("L").save(tmp_path / "b.png")
    images = load(tmp_path, channels=channels, convert=True).images
    grey = PILToTensor()(image.convert("L"))
    assert torch.equal(images[0], PILToTensor()(image) if channels == 3 else grey)
    assert torch.equal(images[1], grey.expand(channels, 4, 6))


def test_opaque_alpha_and_palettes_are_read(tmp_path):
    image = noise((4, 6))
    image.convert("RGBA").save(tmp_path / "a.png")
    image.quantize(256).save(tmp_path / "b.png")
    images = load(tmp_path).images
    assert torch.equal(images[0], PILToTensor()(image))
    assert (images[1].int() - images[0].int()).abs().max() < 40


def exif(orientation, resolution):
    """EXIF of two entries: the orientation, and the resolution as text, of a wrong type if it is not a fraction."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0) + struct.pack("<HHI4s", 0x011A, 2, 3, resolution)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)


# EXIF orientation -> how an upright image is stored with it.
STORED = {
    1: lambda image: image,
    2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda image: image.rotate(180),
    4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.rotate(90, expand=True),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.rotate(-90, expand=True),
}


@pytest.mark.parametrize("orientation", STORED)
def test_orientation_is_applied_whatever_the_other_metadata(tmp_path, orientation):
    image = noise((4, 6))
    STORED[orientation](image).save(tmp_path / "x.png", exif=exif(orientation, b"72\0\0"))
    assert torch.equal(load(tmp_path).images[0], PILToTensor()(image))


def test_damaged_files_are_counted_and_five_are_named(tmp_path):
    write(tmp_path / "good.png")
    noise((4, 6)).save(tmp_path / "0.png")
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:-40])
    for i in range(1, 7):
        (tmp_path / f"{i}.png").write_bytes(b"" if i % 2 else b"no image")
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert message.startswith("7 of 8 image files cannot be read: ")
    assert all(f"{i}.png" in message for i in range(5))
    assert "5.png" not in message


@pytest.mark.parametrize("in_memory", [True, False])
def test_refused_files_are_counted_and_five_give_reasons(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(image_files, "_DECODED_AT_ONCE", 8)
    write(tmp_path / "good.png")
    (tmp_path / "0.png").write_bytes(b"")
    noise((4, 6)).convert("L").save(tmp_path / "1.png")
    for name in "23456":
        noise((5, 5)).save(tmp_path / f"{name}.png")
    with pytest.raises(UserError) as caught:
        load(tmp_path, in_memory=in_memory).fingerprint()
    message = str(caught.value)
    assert message.startswith("7 of 8 image files cannot be used: the image file ")
    assert re.search(
        r"0\.png cannot be read \(.*\); replace it; \S*1\.png is grey, but .*; \S*2\.png is 5 x 5 pixels", message
    )
    assert message.endswith("; and others.")
    assert ("4.png" in message, "5.png" in message) == (True, False)
    for name in "abcdefghijkl":  # so many that the rest is not looked at
        noise((5, 5)).save(tmp_path / f"{name}.png")
    with pytest.raises(UserError, match=r"^at least 8 of 20 image files cannot be used"):
        load(tmp_path, in_memory=in_memory).fingerprint()


def png(height, width):
    """A PNG of any size that ends before its pixels."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"]
    framed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def narrow(path):
    Image.new("L", (1, 60_000)).save(path)


# What is in place of x.png -> what the message says about it.
UNREADABLE = {
    "cut short": (lambda path: path.write_bytes(png(4, 6)), r"cannot be read \(.*\); replace it"),
    "empty": (lambda path: path.write_bytes(b""), r"cannot be read \(.*\); replace it"),
    "web page": (
        lambda path: path.write_bytes(b"\n<!DOCTYPE html><html>"),
        r"\(it is a web page, so its download fail",
    ),
    "pointer": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "of Git LFS, not the"),
    "huge": (lambda path: path.write_bytes(png(19_200, 19_200)), "more than 178,956,970 pixels, the most that are"),
    "too narrow": (narrow, r"cannot be read \(60000 x 1 pixels are too narrow to cover 64 x 64\)"),
    "fifo": (os.mkfifo, "is a fifo, not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a regular file"),
    "lost link": (lambda path: path.symlink_to("nowhere"), "cannot be read"),
    "a name in latin-1": (lambda path: path.with_name("caf\udce9.png").write_bytes(b""), r"caf\\udce9\.png' cannot be"),
}


def unreadable(folder, case):
    """Return the options and the message of a folder with one image that cannot be read."""
    write(folder / "a.png", size=(64, 64))
    UNREADABLE[case][0](folder / "x.png")
    return {"size": [64, 64], "channels": 3, "resize": True, "convert": True}, UNREADABLE[case][1]


@pytest.mark.parametrize("case", UNREADABLE)
def test_an_unreadable_image_is_one_sentence_for_all_readers(tmp_path, case):
    options, expected = unreadable(tmp_path, case)
    with pytest.raises(UserError, match=expected) as eager:
        load(tmp_path, **options)
    lazy = load(tmp_path, in_memory=False, **options)
    assert lazy[0].shape == (3, 64, 64)
    assert "\n" not in str(eager.value)
    for read in (lambda: lazy[1], lazy.fingerprint):
        with pytest.raises(UserError) as caught:
            read()
        assert str(caught.value) == str(eager.value)


@pytest.mark.integration
def test_a_worker_reports_an_unreadable_image_in_one_sentence(tmp_path):
    options, _ = unreadable(tmp_path, "cut short")
    lazy = load(tmp_path, in_memory=False, **options)
    batches = [{"indices": torch.tensor([i]), "step": 0, "positions": torch.tensor([0])} for i in range(2)]
    read, error = DataLoader(_Reader(batches, lazy), None, sampler=[0, 1], num_workers=1, collate_fn=_unchanged)
    assert read["images"].shape == (1, 3, 64, 64)
    with pytest.raises(UserError) as caught:
        lazy[1]
    assert str(error) == str(caught.value)


@pytest.mark.parametrize("links", [{"a/x": "a"}, {"a/x": "."}, {"a/x": "b", "b/y": "a"}])
def test_a_folder_that_links_to_itself_is_refused(tmp_path, links):
    for link, target in links.items():
        write(tmp_path / target / "0.png")
        (tmp_path / link).parent.mkdir(exist_ok=True)
        (tmp_path / link).symlink_to(tmp_path / target, target_is_directory=True)
    with pytest.raises(UserError, match=r"is a link to \S+, which contains it; remove the link\."):
        load(tmp_path)


@pytest.mark.parametrize("name", ["folder", "cifar10", "celeba", "lsun"])
def test_a_file_in_place_of_the_root_is_refused(tmp_path, name):
    (tmp_path / "x.zip").write_bytes(b"PK")
    size = [32, 32]
    with pytest.raises(UserError, match=r"x\.zip is not a folder; unpack it if it is an archive, and give the folder"):
        load(tmp_path / "x.zip", name=name, size=size, **({"category": "tower"} if name == "lsun" else {}))


def test_files_that_are_not_images_are_refused(tmp_path):
    write(tmp_path / "x.png")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds 1 files that are not images: \S*notes\.txt; move them away"):
        load(tmp_path)


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist; set data\.root"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no images; put files there that end in \.png"):
        load(tmp_path)


def test_images_can_be_read_on_demand(tmp_path):
    for i in range(3):
        noise((4, 6), seed=i).save(tmp_path / f"{i}.png")
    memory, lazy = load(tmp_path), load(tmp_path, in_memory=False)
    assert isinstance(lazy, LazyImages)
    assert lazy.shape == memory.shape
    assert torch.equal(torch.stack([lazy[i] for i in range(len(lazy))]), memory.images)
