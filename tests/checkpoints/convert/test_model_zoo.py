"""The published files and architectures, compared with independently written tables."""

import hashlib
import random
import re
from pathlib import Path

import pytest
import torch
import yaml

from ddim.checkpoints.convert.model_zoo import DOWNLOADS, HUB_FILES, KNOWN_FILES, PRESETS, Checksums, file_checksums
from ddim.networks import build_network

ROOT = Path(__file__).resolve().parents[3]

# From the download table of the official implementation: name -> steps, MD5, share.
TABLE = {
    "cifar10": (790000, "82ed3067fd1002f5cf4c339fb80c4669", "869980b53bf5416c8a28"),
    "ema_cifar10": (790000, "1fa350b952534ae442b1d5235cce5cd3", "2e4f01e2d9ee49bab1d5"),
    "lsun_bedroom": (2388000, "f70280ac0e08b8e696f42cb8e948ff1c", "f179d4f21ebc4d43bbfe"),
    "ema_lsun_bedroom": (2388000, "1921fa46b66a3665e450e42f36c2720f", "b95206528f384185889b"),
    "lsun_cat": (1761000, "bbee0e7c3d7abfb6e2539eaf2fb9987b", "fac870bd988348eab88e"),
    "ema_lsun_cat": (1761000, "646f23f4821f2459b8bafc57fd824558", "0701aac3aa69457bbe34"),
    "lsun_church": (4432000, "eb619b8a5ab95ef80f94ce8a5488dae3", "2711a6f712e34b06b9d8"),
    "ema_lsun_church": (4432000, "fdc68a23938c2397caba4a260bc2445f", "44ccb50ef3c6436db52e"),
}
CONFIGURED = [  # preset, network, data set, image shape, published number of parameters
    ("cifar10", "unet_cifar10", "cifar10", (3, 32, 32), 35_746_307),
    ("celeba", "unet_celeba", "celeba", (3, 64, 64), 78_700_803),
    ("lsun", "unet_lsun", "lsun_bedroom", (3, 256, 256), 113_673_219),
    ("lsun", "unet_lsun", "lsun_church", (3, 256, 256), 113_673_219),
]


def configuration(group, name):
    """Return the values of a configuration, on top of those that it starts from."""
    values = yaml.safe_load((ROOT / "configs" / group / f"{name}.yaml").read_text())
    bases = [configuration(group, base) for base in values.pop("defaults", [])]
    return {key: value for layer in (*bases, values) for key, value in layer.items()}


@pytest.mark.parametrize(("preset", "network", "data", "shape", "count"), CONFIGURED)
def test_a_preset_is_the_configured_network(preset, network, data, shape, count):
    values, images = configuration("network", network), configuration("data", data)
    assert values.pop("name") == "unet"
    references = {"${data.size}": images["size"], "${data.channels}": images["channels"]}
    found = {key: references.get(value, value) if isinstance(value, str) else value for key, value in values.items()}
    spec = PRESETS[preset]
    assert found.keys() == vars(spec).keys()
    for key, value in found.items():
        assert getattr(spec, key) == (tuple(value) if isinstance(value, list) else value), key
    assert (spec.channels, *spec.image_size) == shape
    with torch.device("meta"):
        parameters = build_network("unet", spec).parameters()
    assert sum(value.numel() for value in parameters) == count


@pytest.mark.parametrize("name", TABLE)
def test_a_download_is_that_of_the_table(name):
    file, (step, md5, share) = DOWNLOADS[name], TABLE[name]
    assert (file.name, file.step, file.checksum) == (name, step, md5)
    assert file.weights == ("ema" if name.startswith("ema_") else "online")
    assert file.data == name.removeprefix("ema_")
    assert file.url == f"https://heibox.uni-heidelberg.de/f/{share}/?dl=1"
    assert file.file_name == f"{name}.ckpt"


def test_checksums_are_well_formed_and_unique():
    assert set(PRESETS) == {"cifar10", "celeba", "lsun"}
    assert set(DOWNLOADS) == set(TABLE)
    files = [*DOWNLOADS.values(), *HUB_FILES]
    assert len(files) == len(KNOWN_FILES) == 10
    assert len({file.name for file in files}) == 10
    assert all(re.fullmatch(r"[0-9a-f]{32}|[0-9a-f]{64}", file.checksum) for file in files)
    urls = [file.url for file in files if file.url]
    assert len(set(urls)) == len(urls) == 8


def test_published_files_are_known_by_their_checksum():
    for name, (_, md5, _) in TABLE.items():
        assert Checksums(md5=md5, sha256="0" * 64).published == DOWNLOADS[name]
    assert len(HUB_FILES) == 2
    for file in HUB_FILES:
        assert Checksums(md5="0" * 32, sha256=file.checksum).published == file
        assert len(file.checksum) == 64
        assert file.name.startswith("google/ddpm-cifar10-32")
        assert (file.weights, file.data, file.step, file.url) == ("online", "cifar10", None, "")
    for md5 in ("0" * 32, TABLE["cifar10"][1][:-1] + "0"):
        assert Checksums(md5=md5, sha256="0" * 64).published is None


@pytest.mark.parametrize("size", [0, 1, 1000, 2**20 - 1, 2**20, 2**20 + 1, 2_500_000])
def test_checksums_cover_the_complete_file(tmp_path, size):
    content = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    sums = file_checksums(tmp_path / "file")
    assert sums.md5 == hashlib.md5(content, usedforsecurity=False).hexdigest()
    assert sums.sha256 == hashlib.sha256(content).hexdigest()
    assert sums.published is None


def test_the_config_names_the_downloads_and_presets():
    text = (ROOT / "configs" / "import_checkpoint.yaml").read_text()
    comment = re.search(r"^download: null #(.*)$", text, re.MULTILINE)[1]
    assert set(re.findall(r"\w*(?:cifar|lsun)\w+", comment)) == {name for name in TABLE if name.startswith("ema_")}
    comment = re.search(r"^preset: null #(.*)$", text, re.MULTILINE)[1]
    assert re.findall(r"cifar10|celeba|lsun", comment) == ["cifar10", "celeba", "lsun"]


@pytest.mark.parametrize(("option", "names"), [("download", set(TABLE)), ("preset", {"cifar10", "celeba", "lsun"})])
def test_documented_options_exist(option, names):
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    files += [path for name in ("configs", "scripts", "ddim") for path in (ROOT / name).rglob("*.*")]
    written = {
        (path.name, name)
        for path in files
        if path.suffix in (".md", ".yaml", ".py", ".sh")
        for name in re.findall(rf"\b{option}=([a-z]\w+)", path.read_text())
    }
    if option == "download":
        assert ("import_checkpoint.py", "ema_cifar10") in written  # the search finds something
    assert not {(path, name) for path, name in written if name not in names | {"true", "false", "null"}}
