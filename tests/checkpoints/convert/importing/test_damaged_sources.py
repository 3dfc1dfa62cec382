"""Files to import that are truncated, damaged, repacked or no checkpoints: refused in one sentence, or harmless."""

import json
import os
import random
import warnings
import zipfile

import pytest
import torch
from foreign import SMALLEST_GIVEN, attempt, raw_safetensors, refusal, survives
from safetensors.torch import save_file

from ddim.checkpoints import save_model
from ddim.errors import UserError
from ddim.io import is_safetensors


def entry(start, stop, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


BROKEN = {
    "header length 0": b"\0" * 8,
    "header longer than the file": raw_safetensors({}, length=3),
    "header of 2**63": raw_safetensors({"a": entry(0, 4)}, bytes(4), length=1 << 63),
    "header of 2**64 - 1": raw_safetensors({"a": entry(0, 4)}, bytes(4), length=(1 << 64) - 1),
    "header of 100 MB": raw_safetensors({"a": entry(0, 4)}, bytes(4), length=100 << 20),
    "header of one byte too many": raw_safetensors(
        {"a": entry(0, 4)}, b"", length=len(json.dumps({"a": entry(0, 4)})) + 1
    ),
    "not JSON": raw_safetensors(b"{not JSON at all}", bytes(4)),
    "JSON that goes on": raw_safetensors(b"{}}}}}}}}}", bytes(4)),
    "not UTF-8": raw_safetensors(b'{"\xff\xfe": 1}'),
    "a list": raw_safetensors(b"[1, 2, 3]"),
    "an empty object": raw_safetensors({}),
    "overlapping": raw_safetensors({"a": entry(0, 8, (2,)), "b": entry(4, 12, (2,))}, bytes(12)),
    "the same place twice": raw_safetensors({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)),
    "a hole": raw_safetensors({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "behind the end": raw_safetensors({"a": entry(0, 400, (100,))}, bytes(4)),
    "data left over": raw_safetensors({"a": entry(0, 4)}, bytes(8)),
    "backwards": raw_safetensors({"a": entry(4, 0)}, bytes(4)),
    "negative": raw_safetensors({"a": entry(-4, 0)}, bytes(4)),
    "shape and size": raw_safetensors({"a": entry(0, 4, (2,))}, bytes(4)),
    "negative shape": raw_safetensors({"a": entry(0, 4, (-1,))}, bytes(4)),
    "overflowing shape": raw_safetensors({"a": entry(0, 4, (1 << 62, 1 << 62))}, bytes(4)),
    "unknown type": raw_safetensors({"a": entry(0, 4, dtype="F31")}, bytes(4)),
    "shape of text": raw_safetensors({"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}, bytes(4)),
    "no offsets": raw_safetensors({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "metadata of numbers": raw_safetensors({"__metadata__": {"ddim": 1}, "a": entry(0, 4)}, bytes(4)),
    "metadata of a list": raw_safetensors({"__metadata__": [1], "a": entry(0, 4)}, bytes(4)),
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
    message = refusal(path, network=SMALLEST_GIVEN)
    assert message.startswith((f"{path} cannot be read as a checkpoint: ", f"the weights in {path} do not fit "))


def contents(state, model, folder):
    """Return one whole file of each kind: name -> bytes."""
    torch.save(state, folder / "zip")
    torch.save(state, folder / "legacy", _use_new_zipfile_serialization=False)
    torch.save([state, {"state": {}}, 0, 1, state], folder / "official")
    save_file(state, folder / "safetensors")
    save_model(model, folder / "ours")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("kind", ["zip", "legacy", "official", "safetensors", "ours"])
def test_no_truncated_file_is_imported(tmp_path, state, model, kind):
    content = contents(state, model, tmp_path)[kind]
    path = tmp_path / "cut.ckpt"
    path.write_bytes(content)
    options = {} if kind == "ours" else {"network": SMALLEST_GIVEN, "weights": "ema"}
    assert not survives(path, **options)  # whole, it is fine
    sizes = {*range(0, 40, 3), *range(40, len(content), len(content) // 30), *range(len(content) - 60, len(content), 7)}
    for size in sorted(sizes | {len(content) - 1}):
        path.write_bytes(content[:size])
        assert refusal(path, **options).startswith(f"{path} cannot be read as a checkpoint: "), size


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("zip", ".ckpt"),
        ("zip", ".safetensors"),
        ("legacy", ".pth"),
        ("official", ".pt"),
        ("safetensors", ".safetensors"),
        ("safetensors", ".bin"),
        ("ours", ".safetensors"),
    ],
)
def test_flipped_bits_are_refused_or_harmless(tmp_path, state, model, kind, suffix):
    """Names and structure lie at both ends; in between are weights, in which a flip makes another number."""
    content = contents(state, model, tmp_path)[kind]
    path, generator, refused = tmp_path / f"flipped{suffix}", random.Random(f"{kind}{suffix}"), 0
    ends = [*range(3000), *range(len(content) - 3000, len(content))]
    options = {} if kind == "ours" else {"network": SMALLEST_GIVEN, "weights": "ema"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k in range(90):
            damaged = bytearray(content)
            for _ in range(1 + k % 3):
                place = generator.choice(ends) if k % 4 else generator.randrange(len(content))
                damaged[place] ^= 1 << generator.randrange(8)
            path.write_bytes(damaged)
            refused += survives(path, **options)
    assert refused > 9


@pytest.mark.parametrize("tensor", ["conv_in.bias", "conv_out.bias", "norm_out.weight"])
def test_a_repacked_archive_is_read_correctly_or_refused(tmp_path, state, tensor):
    """Tools compress what they pack; the numbers in the file are then not where their names say."""
    torch.save(state, tmp_path / "stored.ckpt")
    keys = list(state)
    path = tmp_path / "packed.ckpt"
    with zipfile.ZipFile(tmp_path / "stored.ckpt") as before, zipfile.ZipFile(path, "w") as after:
        for name in before.namelist():
            compressed = name.endswith(f"/data/{keys.index(tensor)}")
            after.writestr(name, before.read(name), zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED)
        assert sum(info.compress_type == zipfile.ZIP_DEFLATED for info in after.infolist()) == 1
    done, reason = attempt(path, network=SMALLEST_GIVEN, weights="ema")
    assert "\n" not in reason
    assert done is None or all(torch.equal(done.model.state[name], value) for name, value in state.items())


@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".bin", ".pt", ".safetensors", ""])
@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"{", b"\0" * 7, b"\0" * 9, b"a text file\nof two lines\n", b"{}", b"\x80", b"\x80\x02.", b"PK\3\4"],
)
def test_other_content_is_one_sentence(tmp_path, content, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    assert refusal(path).startswith(
        f"{path} cannot be read as a checkpoint: it is cut short, damaged or of another kind"
    )


@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors", "diffusion_pytorch_model.bin"])
def test_a_folder_in_place_of_a_file_is_one_sentence(tmp_path, name):
    (tmp_path / name).mkdir()
    assert "holds nothing; a diffusers folder has" in refusal(tmp_path / name)
    assert "a diffusers folder has" in refusal(tmp_path)
    with pytest.raises(UserError, match="there is no checkpoint"):
        is_safetensors(tmp_path / name)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.ckpt", "a/b/c.safetensors", "x" * 300, "file/below"])
def test_a_missing_path_is_one_sentence(tmp_path, name):
    (tmp_path / "file").touch()
    assert name in refusal(tmp_path / name)


def test_pipes_and_broken_links_are_one_sentence(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("pipe", "loop", "dangling"):
        assert name in refusal(tmp_path / name)
