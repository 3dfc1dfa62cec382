"""Fingerprints of images that are read on demand: those of their pixels."""

import os

import pytest
from folders import load, write

from ddim.data import image_files
from ddim.errors import UserError


@pytest.fixture
def fingerprint(tmp_path, monkeypatch):
    """fingerprint(): that of the images of tmp_path/images on demand, which is that of the same in memory."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))

    def fingerprint():
        lazy = load(tmp_path / "images", in_memory=False).fingerprint()
        assert lazy == load(tmp_path / "images").fingerprint()
        return lazy

    return fingerprint


@pytest.mark.parametrize("tick", [-1 << 62, 1 << 62], ids=["kept", "not kept"])
def test_fingerprint_on_demand_is_that_of_the_pixels(fingerprint, tmp_path, monkeypatch, tick):
    """Whether it is kept, or not as long as a later change of a file might leave its times as they are."""
    monkeypatch.setattr(image_files, "_CLOCK_TICK", tick)
    for i in range(2):
        write(tmp_path / "images" / f"{i}.bmp", (i, 2, 3))
    before = fingerprint()
    (tmp_path / "images").rename(tmp_path / "elsewhere")  # the same images in another folder, by other names
    (tmp_path / "elsewhere" / "1.bmp").rename(tmp_path / "elsewhere" / "x.bmp")
    (tmp_path / "images").symlink_to(tmp_path / "elsewhere")
    assert fingerprint() == before
    stat = (tmp_path / "images" / "x.bmp").stat()
    write(tmp_path / "images" / "x.bmp", (1, 2, 4))  # other pixels in as many bytes
    os.utime(tmp_path / "images" / "x.bmp", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint() != before


def test_unchanged_files_are_decoded_once_for_the_fingerprint(fingerprint, tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "_CLOCK_TICK", -1)
    write(tmp_path / "images" / "0.png")
    expected = fingerprint()
    monkeypatch.setattr(image_files, "hash_pixels", lambda *args: pytest.fail("decoded"))
    assert fingerprint() == expected
    (kept,) = (tmp_path / "cache" / "ddim" / "fingerprints").iterdir()
    assert kept.read_text() == expected
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    kept.write_text("")  # as after a power cut
    assert fingerprint() == expected
    monkeypatch.setenv("TORCH_HOME", "/dev/null/nowhere")  # a cache that cannot be written is none
    assert fingerprint() == expected


def test_fingerprint_of_a_damaged_image_is_refused_by_name(tmp_path):
    write(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    (tmp_path / "2.png").symlink_to(tmp_path / "nowhere")
    for message in (
        r"^2 of 3 image files cannot be read: \S*1\.png, \S*2\.png; ",
        r"^the image file .*2\.png cannot be read",
    ):
        with pytest.raises(UserError, match=message):
            load(tmp_path, in_memory=False).fingerprint()
        (tmp_path / "1.png").unlink(missing_ok=True)
