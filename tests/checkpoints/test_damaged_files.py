"""Files that are truncated, damaged, repacked or no checkpoints: refused in one sentence, or harmless."""

import json
import os
import pickle
import random
import re
import struct
import warnings
import zipfile
from io import BytesIO

import pytest
import torch
from layouts import (
    LAYOUTS,
    SMALLEST,
    SMALLEST_GIVEN,
    attempt,
    import_refusal,
    lightning,
    raw_safetensors,
    refusal,
    save,
    survives,
)
from safetensors.torch import save_file

from ddim import io
from ddim.checkpoints import load_model, save_model
from ddim.checkpoints.model import read_checkpoint
from ddim.errors import UserError
from ddim.io import is_safetensors
from ddim.networks import UNet
from ddim.training.checkpoints import AtomicCheckpointIO

# Files that are loaded as they are, and files that are imported.
LOADED, IMPORTED = ("training", "model file"), ("zip", "legacy", "official", "safetensors", "ours")


@pytest.fixture(scope="module")
def training(smallest):
    """A training checkpoint with Adam's state."""
    network = UNet(SMALLEST)
    adam = torch.optim.Adam(network.parameters())
    network(torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.int64)).sum().backward()
    adam.step()
    return lightning(smallest) | {"optimizer_states": [adam.state_dict()]}


@pytest.fixture(scope="module")
def contents(smallest, training, tmp_path_factory):
    """One intact file of each kind: name -> bytes."""
    folder, state = tmp_path_factory.mktemp("intact"), smallest.state
    save(training, folder / "training")
    save(state, folder / "zip")
    torch.save(state, folder / "legacy", _use_new_zipfile_serialization=False)
    save([state, {"state": {}}, 0, 1, state], folder / "official")
    save_file(state, folder / "safetensors")
    save_model(smallest, folder / "model file")
    save_model(smallest, folder / "ours")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def is_refused(path, kind):
    """Whether a file of some kind is refused, in one sentence; any other exception fails the test."""
    if kind in IMPORTED:
        return survives(path, **({} if kind == "ours" else {"network": SMALLEST_GIVEN, "weights": "ema"}))
    try:
        load_model(path)
        return False
    except UserError as error:
        reason = str(error)
    assert "\n" not in reason
    return True


@pytest.mark.parametrize("kind", [*LOADED, *IMPORTED])
def test_no_truncated_file_is_read(tmp_path, contents, kind):
    content, path = contents[kind], tmp_path / "cut.ckpt"
    path.write_bytes(content)
    assert not is_refused(path, kind)  # intact, it is accepted
    ends = [*range(0, 100, 3), *range(len(content) - 150, len(content), 7), len(content) - 1]
    for size in (*ends, *range(100, len(content), len(content) // 40)):
        path.write_bytes(content[:size])
        if kind in LOADED:
            assert f"{path} cannot be read as a checkpoint: it is cut short, damaged" in refusal(load_model, path)
        else:
            options = {} if kind == "ours" else {"network": SMALLEST_GIVEN}
            message = import_refusal(path, **options)
            assert message.startswith(f"{path} cannot be read as a checkpoint: "), size


# Kind and suffix -> bytes at each end that hold names and structure (None: the header); refused at least, of how many.
FLIPS = {
    ("training", ".ckpt"): (20_000, 25, 120),
    ("model file", ".safetensors"): (None, 100, 150),
    ("zip", ".ckpt"): (3000, 9, 90),
    ("zip", ".safetensors"): (3000, 9, 90),
    ("legacy", ".pth"): (3000, 9, 90),
    ("official", ".pt"): (3000, 9, 90),
    ("safetensors", ".safetensors"): (3000, 9, 90),
    ("safetensors", ".bin"): (3000, 9, 90),
    ("ours", ".safetensors"): (3000, 9, 90),
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "suffix"), FLIPS)
def test_flipped_bits_are_refused_or_harmless(tmp_path, contents, kind, suffix):
    """Between the two ends are weights, in which a flip makes another number."""
    content, (end, least, count) = contents[kind], FLIPS[kind, suffix]
    path, generator, refused = tmp_path / f"flipped{suffix}", random.Random(f"{kind}{suffix}"), 0
    if end is None:
        places = everywhere = range(8 + struct.unpack("<Q", content[:8])[0])
    else:
        everywhere = range(len(content))
        places = [*everywhere[:end], *everywhere[-min(end, 10_000) :]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k in range(count):
            damaged = bytearray(content)
            for _ in range(1 if kind in LOADED else 1 + k % 3):
                damaged[generator.choice(places if k % 4 else everywhere)] ^= 1 << generator.randrange(8)
            path.write_bytes(damaged)
            refused += is_refused(path, kind)
    assert refused > least


def test_no_checkpoint_with_damaged_weights_is_imported(tmp_path, contents):
    """It states a checksum, without which a flipped bit of a weight would become a sound model file."""
    path, damaged_path = tmp_path / "intact.ckpt", tmp_path / "damaged.ckpt"
    path.write_bytes(contents["training"])
    checkpoint = read_checkpoint(path)
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    assert attempt(path, weights="online")[1] == ""
    values = next(v for v in checkpoint["state_dict"].values() if v.numel() > 16).numpy().tobytes()
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(values) + 2] ^= 1
    damaged_path.write_bytes(damaged)
    assert "its checksum is wrong" in import_refusal(damaged_path, weights="online")


def entry(start, stop, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


ONE = {"a": entry(0, 4)}
BROKEN = {
    "header length 0": b"\0" * 8,
    "header longer than the file": raw_safetensors({}, length=3),
    "header of 2**63": raw_safetensors(ONE, bytes(4), length=1 << 63),
    "header of 2**64 - 1": raw_safetensors(ONE, bytes(4), length=(1 << 64) - 1),
    "header of 100 MB": raw_safetensors(ONE, bytes(4), length=100 << 20),
    "header of one byte too many": raw_safetensors(ONE, length=len(json.dumps(ONE)) + 1),
    "not JSON": raw_safetensors(b"{not JSON at all}", bytes(4)),
    "JSON that goes on": raw_safetensors(b"{}}}}}}}}}", bytes(4)),
    "not UTF-8": raw_safetensors(b'{"\xff\xfe": 1}'),
    "a list": raw_safetensors(b"[1, 2, 3]"),
    "an empty object": raw_safetensors({}),
    "overlapping": raw_safetensors({"a": entry(0, 8, (2,)), "b": entry(4, 12, (2,))}, bytes(12)),
    "the same place twice": raw_safetensors(ONE | {"b": entry(0, 4)}, bytes(4)),
    "a hole": raw_safetensors(ONE | {"b": entry(8, 12)}, bytes(12)),
    "behind the end": raw_safetensors({"a": entry(0, 400, (100,))}, bytes(4)),
    "data left over": raw_safetensors(ONE, bytes(8)),
    "backwards": raw_safetensors({"a": entry(4, 0)}, bytes(4)),
    "negative": raw_safetensors({"a": entry(-4, 0)}, bytes(4)),
    "shape and size": raw_safetensors({"a": entry(0, 4, (2,))}, bytes(4)),
    "negative shape": raw_safetensors({"a": entry(0, 4, (-1,))}, bytes(4)),
    "overflowing shape": raw_safetensors({"a": entry(0, 4, (1 << 62, 1 << 62))}, bytes(4)),
    "unknown type": raw_safetensors({"a": entry(0, 4, dtype="F31")}, bytes(4)),
    "shape of text": raw_safetensors({"a": entry(0, 4) | {"shape": "1"}}, bytes(4)),
    "no offsets": raw_safetensors({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "metadata of numbers": raw_safetensors({"__metadata__": {"ddim": 1}} | ONE, bytes(4)),
    "metadata of a list": raw_safetensors({"__metadata__": [1]} | ONE, bytes(4)),
    "deep": raw_safetensors(b'{"a":' * 5000, bytes(4)),
    "four bits": raw_safetensors({"a": entry(0, 4, (8,), "F4")}, bytes(4)),
    "six bits": raw_safetensors({"a": entry(0, 3, (4,), "F6_E2M3")}, bytes(3)),
    "eight bits": raw_safetensors({"a": entry(0, 4, (4,), "F8_E8M0")}, bytes(4)),
    "sixteen bits unsigned": raw_safetensors({"a": entry(0, 4, (2,), "U16")}, bytes(4)),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_safetensors_file_is_one_sentence(tmp_path, name, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(BROKEN[name])
    message = import_refusal(path, network=SMALLEST_GIVEN)
    assert message.startswith((f"{path} cannot be read as a checkpoint: ", f"the weights in {path} do not fit "))


@pytest.mark.parametrize("tensor", ["conv_in.bias", "conv_out.bias", "norm_out.weight"])
def test_a_repacked_archive_is_read_correctly_or_refused(tmp_path, smallest, tensor):
    """Archive tools compress; the bytes of the tensors are then not in the file."""
    state, path = smallest.state, tmp_path / "packed.ckpt"
    keys = list(state)
    with zipfile.ZipFile(save(state, tmp_path / "stored.ckpt")) as before, zipfile.ZipFile(path, "w") as after:
        for name in before.namelist():
            compressed = name.endswith(f"/data/{keys.index(tensor)}")
            after.writestr(name, before.read(name), zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED)
        assert sum(info.compress_type == zipfile.ZIP_DEFLATED for info in after.infolist()) == 1
    done, reason = attempt(path, network=SMALLEST_GIVEN, weights="ema")
    assert "\n" not in reason
    assert done is None or all(torch.equal(done.model.state[name], value) for name, value in state.items())


def archive():
    with zipfile.ZipFile(buffer := BytesIO(), "w") as made:
        made.writestr("a/b", "c")
    return buffer.getvalue()


OTHER = [b"", b"\n", b"{", b"\0" * 7, b"\0" * 9, b"a text file\nof two lines\n", b"format: 1\n", b"{}", b"\x80"]
OTHER += [b"\x80\x02.", b"PK\3\4", archive(), pickle.dumps({"ddim": {}}, 2)]


@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".bin", ".pt", ".safetensors", ""])
@pytest.mark.parametrize("content", OTHER)
def test_content_of_another_kind_is_one_sentence(tmp_path, content, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    for message in (import_refusal(path), refusal(load_model, path), refusal(read_checkpoint, path)):
        assert f"{path} cannot be read as a checkpoint: it is cut short, damaged or of another kind" in message


# What a failed download leaves -> what the message says it is.
DOWNLOADS = {
    b"\n<!DOCTYPE html>\n<html><head>": "it is a web page, so its download failed: download it again",
    b"<HTML><BODY>404 Not Found": "it is a web page, so its download failed: download it again",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n": "it is a pointer of Git LFS, not the file ",
}


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("content", DOWNLOADS)
def test_a_failed_download_is_called_what_it_is(tmp_path, content, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    for message in (import_refusal(path), refusal(load_model, path), refusal(read_checkpoint, path)):
        assert message.startswith(f"{path} cannot be read as a checkpoint: {DOWNLOADS[content]}")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_an_archive_that_unfolds_to_gigabytes_is_not_read(tmp_path, monkeypatch, compression):
    path, size = tmp_path / "bomb.ckpt", 1 << 21
    monkeypatch.setattr(io, "MAX_UNFOLDED", size)
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("read"))
    with zipfile.ZipFile(path, "w", compression) as made:
        for i in range(2):
            made.writestr(f"bomb/data/{i}", bytes(size))
    for message in (import_refusal(path), refusal(load_model, path), refusal(read_checkpoint, path)):
        assert re.search(rf"cannot be read as a checkpoint: .* bytes unfold to {2 * size:,}\)\.$", message)


@pytest.mark.parametrize(
    "content",
    [{"model_state": {}, "epoch": 3}, {"a": torch.zeros(1), "b": 1}, {}, torch.zeros(3), "text", 7],
    ids=["entries", "mixed", "empty", "tensor", "text", "number"],
)
def test_saved_objects_of_another_kind_are_refused(tmp_path, content):
    path = save(content, tmp_path / "other.ckpt")
    for read in (read_checkpoint, load_model):
        assert f"{path} is not a checkpoint of this project" in refusal(read, path)
    message = import_refusal(path)
    assert [layout for layout in LAYOUTS if f"{layout}: " not in message.partition("supported are ")[2]] == []
    if isinstance(content, dict) and content:
        assert f"holds the entries {', '.join(content)}; supported are" in message


def test_other_saved_lists_and_dicts_are_no_checkpoints(tmp_path):
    for content in ([1, 2], torch.nn.Linear(2, 2).state_dict()):
        path = save(content, tmp_path / "other.ckpt")
        for read in (read_checkpoint, load_model):
            assert f"{path} is not a checkpoint of this project" in refusal(read, path)


@pytest.mark.parametrize("missing", ["ddim", "state_dict", "global_step"])
def test_a_file_without_a_required_entry_is_foreign(training, tmp_path, missing):
    for content in ({k: v for k, v in training.items() if k != missing}, training | {missing: "text"}):
        path = save(content, tmp_path / "foreign.ckpt")
        assert "is not a checkpoint of this project" in refusal(read_checkpoint, path)


NOWHERE = ["nowhere", "nowhere.ckpt", "a/b/c.safetensors", "x" * 300, "file/below", "pipe", "loop", "dangling"]


@pytest.mark.parametrize("name", NOWHERE)
def test_a_path_without_a_file_is_one_sentence(tmp_path, name):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for overwrite in (False, True):
        message = import_refusal(tmp_path / name, overwrite=overwrite)
        assert name in message
        assert ("is a fifo, not a regular file" in message) is (name == "pipe")


@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors", "diffusion_pytorch_model.bin"])
def test_a_folder_in_place_of_a_file_is_one_sentence(tmp_path, name):
    (tmp_path / name).mkdir()
    assert "holds nothing; a diffusers folder has" in import_refusal(tmp_path / name)
    assert "a diffusers folder has" in import_refusal(tmp_path)
    assert "there is no checkpoint" in refusal(is_safetensors, tmp_path / name)
    for path in (tmp_path, tmp_path / "none.ckpt"):
        message = refusal(read_checkpoint, path)
        assert f"there is no checkpoint {path}" in message
        assert "scripts/train.py" in message
