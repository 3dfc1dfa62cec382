"""The named data sets, read from small files in the layout of the real ones."""

import hashlib
import io
import os
import sys
from pathlib import Path

import pytest
import torch
from composed import group_values
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize
from torchvision.transforms.functional import crop, resize

from ddim.config import build
from ddim.data import DATASETS, DataSpec, MemoryImages, load_images
from ddim.data.datasets import class_names
from ddim.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs" / "data"


def spec(**values):
    return build(DataSpec, values, "data")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_gives_a_spec_of_a_known_data_set(path, tmp_path):
    config = OmegaConf.create(group_values("data", path.stem))
    if path.stem == "folder":
        assert OmegaConf.missing_keys(config) == {"root", "size"}
        config.update(root=str(tmp_path), size=[8, 8])
    made = spec(**OmegaConf.to_container(config, throw_on_missing=True))
    assert made.name in DATASETS
    if made.name in ("cifar10", "celeba", "lsun"):  # the files are missing; the size is not refused
        config.update(root=str(tmp_path), download=False)
        with pytest.raises(UserError, match=r"lacks these files|does not exist; download"):
            load_images(spec(**OmegaConf.to_container(config)))


def test_digits_are_not_mirrored():
    assert OmegaConf.load(CONFIGS / "digits.yaml").flip is False


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "digits", "size": [8, 0], "channels": 1}, r"size=\[8, 0\] must be two positive"),
        ({"name": "digits", "size": [8, 8], "channels": 2}, r"channels=2 must be 1 \(grey\) or 3"),
        ({"name": "digits", "size": [8, 8], "channels": 1, "category": "tower"}, "category=tower is an option of lsun"),
        ({"name": "digits", "size": [8, 8], "channels": 1, "resize": True}, "resize=true is an option of folder"),
        ({"name": "digits", "size": [8, 8], "channels": 1, "convert": True}, "convert=true is an option of folder"),
        ({"name": "lsun", "size": [8, 8], "channels": 3, "in_memory": False}, "in_memory=false is an option of celeba"),
        (
            {"name": "digits", "size": [8, 8], "channels": 1, "labels": "folders"},
            "labels=folders is not known for digits; allowed: classes or null",
        ),
        (
            {"name": "folder", "size": [8, 8], "channels": 1, "labels": "classes"},
            "labels=classes is not known for folder; allowed: folders or null",
        ),
        (
            {"name": "lsun", "size": [8, 8], "channels": 3, "labels": "classes"},
            "labels=classes is not known for lsun; allowed: null, it has no labels",
        ),
        ({"name": "folders", "size": [8, 8], "channels": 3}, "unknown data set 'folders' .did you mean folder?"),
        ({"name": "digits", "size": [16, 16], "channels": 1}, r"digits needs size=\[8, 8\] and channels=1, not size="),
        ({"name": "cifar10", "size": [64, 64], "channels": 3}, r"cifar10 needs size=\[32, 32\] and channels=3"),
        ({"name": "celeba", "size": [64, 32], "channels": 3}, "celeba needs a square size and channels=3"),
        ({"name": "lsun", "size": [8, 8], "channels": 1}, "lsun needs channels=3"),
        ({"name": "lsun", "size": [8, 8], "channels": 3}, r"data\.category is missing"),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        load_images(spec(**values))


def test_a_data_set_of_a_plugin_decides_on_its_options(monkeypatch):
    pixels, labels = torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([1, 0])
    options = {"size": [8, 8], "channels": 1, "category": "x", "resize": True, "convert": True, "in_memory": False}
    asked = spec(name="plugin", labels="moods", **options)
    monkeypatch.setitem(
        DATASETS, "plugin", lambda given, split: MemoryImages("p", pixels, labels, (given.labels, split))
    )
    assert class_names(asked) == load_images(asked).classes == ("moods", "train")
    assert class_names(spec(name="plugin", **options)) == ()
    for wrong in (None, [1, 0], labels.int(), labels[:1], labels + 1, labels - 1):
        monkeypatch.setitem(DATASETS, "plugin", lambda *_, y=wrong: MemoryImages("p", pixels, y, ("a", "b")))
        with pytest.raises(
            UserError, match=r"^data set plugin gives no labels for data\.labels=moods; its images need"
        ):
            load_images(asked)
        assert load_images(spec(name="plugin", **options)).labels is wrong


def test_digits_have_17_grey_levels_and_one_split():
    images = load_images(spec(name="digits", size=[8, 8], channels=1))
    assert images.images.shape == (1797, 1, 8, 8)
    assert images.images.unique().tolist() == [int(v * 255 / 16 + 0.5) for v in range(17)]
    from sklearn.datasets import load_digits

    # level v lies within half a pixel value of v * 255 / 16, everywhere
    levels = torch.from_numpy(load_digits().data.reshape(1797, 1, 8, 8))
    assert (images.images.double() - levels * 255 / 16).abs().max() <= 0.5
    test = load_images(spec(name="digits", size=[8, 8], channels=1), "test")
    assert test.fingerprint() == images.fingerprint()


def test_labels_of_digits_are_the_digits():
    plain = load_images(spec(name="digits", size=[8, 8], channels=1))
    images = load_images(spec(name="digits", size=[8, 8], channels=1, labels="classes"))
    from sklearn.datasets import load_digits

    assert images.labels.dtype == torch.int64
    assert images.labels.tolist() == load_digits().target.tolist()
    assert images.classes == class_names(spec(name="digits", size=[8, 8], channels=1, labels="classes"))
    assert images.classes == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    assert (plain.labels, plain.classes) == (None, ())
    assert images.fingerprint() == plain.fingerprint()  # of the reference sets of earlier records


def test_cifar10_splits_and_axes(cifar_root):
    values = {"name": "cifar10", "size": [32, 32], "channels": 3, "root": str(cifar_root), "download": False}
    train, test = load_images(spec(**values)), load_images(spec(**values), "test")
    assert train.images.shape == (10, 3, 32, 32)
    assert train.images[:, 0, 5, 7].tolist() == list(range(10))
    assert test.images[:, 0, 5, 7].tolist() == [10, 11]
    assert train.images[3, :, 5, 7].tolist() == [3, 7, 5]
    assert (train.name, test.name) == ("cifar10-train", "cifar10-test")
    labelled = load_images(spec(**values, labels="classes"), "train")
    assert labelled.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert (labelled.classes[3], labelled.classes[9], len(labelled.classes)) == ("cat", "truck", 10)
    assert train.labels is None


def test_missing_cifar10_files_are_named(cifar_root, monkeypatch):
    values = {"name": "cifar10", "size": [32, 32], "channels": 3, "root": str(cifar_root)}
    base = cifar_root / "cifar-10-batches-py"
    kept = {name: (base / name).read_bytes() for name in ("data_batch_3", "batches.meta")}
    for name in kept:
        (base / name).unlink()
    absent = r"lacks these files in \S*cifar-10-batches-py, or they are damaged: data_batch_3, batches.meta "
    with pytest.raises(UserError, match=absent + r"\(data.download=false\); unpack cifar-10-python.tar.gz in"):
        load_images(spec(**values, download=False))

    def no_network(self):
        raise OSError("no route to host")

    monkeypatch.setattr(CIFAR10, "download", no_network)
    with pytest.raises(UserError, match=absent + r"\(the download failed: no route to host\)"):
        load_images(spec(**values))

    def download(self):
        for name, content in kept.items():
            (base / name).write_bytes(content)

    monkeypatch.setattr(CIFAR10, "download", download)
    assert len(load_images(spec(**values))) == 10


def celeba_spec(root, size=64, **values):
    return spec(name="celeba", size=[size, size], channels=3, root=str(root), download=False, **values)


def test_celeba_crop_is_that_of_the_paper(celeba_root):
    image = load_images(celeba_spec(celeba_root, size=128)).images[0].int()
    assert torch.equal(image[0], torch.arange(25, 153, dtype=torch.int32).expand(128, 128))
    assert torch.equal(image[1], torch.arange(57, 185, dtype=torch.int32)[:, None].expand(128, 128))


@pytest.mark.parametrize("in_memory", [True, False])
def test_celeba_is_resized_like_the_official_code(celeba_root, in_memory):
    train = load_images(celeba_spec(celeba_root, in_memory=in_memory))
    test = load_images(celeba_spec(celeba_root, in_memory=in_memory), "test")
    assert [[int(images[i][2, 0, 0]) for i in range(len(images))] for images in (train, test)] == [[0, 2], [3, 4]]
    with Image.open(celeba_root / "celeba/img_align_celeba/000002.jpg") as image:
        assert torch.equal(train[1], PILToTensor()(resize(crop(image, 57, 25, 128, 128), 64)))


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_attribute_labels_celeba(celeba_root, in_memory):
    smiling = celeba_spec(celeba_root, labels="Smiling", in_memory=in_memory)
    assert [load_images(smiling, split).labels.tolist() for split in ("train", "test")] == [[1, 0], [0, 1]]
    assert load_images(smiling).labels.dtype == torch.int64
    assert load_images(smiling).classes == ("not Smiling", "Smiling")
    assert load_images(celeba_spec(celeba_root, labels="Young"), "test").labels.tolist() == [1, 0]
    with pytest.raises(UserError, match=r"labels=Smilin is no .* \(did you mean Smiling\?\); allowed: Smiling, Young"):
        load_images(celeba_spec(celeba_root, labels="Smilin"))


def test_missing_celeba_files_are_named(celeba_root, monkeypatch):
    base = celeba_root / "celeba"
    (base / "list_attr_celeba.txt").unlink()
    (base / "list_eval_partition.txt").unlink()
    (base / "img_align_celeba").rename(base / "elsewhere")
    listed = r"lacks these files in \S*celeba, .*: list_attr_celeba.txt, list_eval_partition.txt, img_align_celeba/ "
    with pytest.raises(UserError, match=listed + r"\(data.download=false\); .* unpacked from img_align_celeba.zip"):
        load_images(celeba_spec(celeba_root))

    def quota(*arguments):
        raise RuntimeError("too many users")

    monkeypatch.setattr("torchvision.datasets.celeba.download_file_from_google_drive", quota)
    with pytest.raises(UserError, match=listed + r"\(the download failed: too many users\)"):
        load_images(spec(name="celeba", size=[64, 64], channels=3, root=str(celeba_root)))


def test_celeba_images_of_another_size_are_refused(celeba_root):
    Image.new("RGB", (178, 178)).save(celeba_root / "celeba/img_align_celeba/000000.jpg", format="PNG")
    with pytest.raises(UserError, match=r"000000\.jpg has \(178, 178\) pixels"):
        load_images(celeba_spec(celeba_root))


@pytest.mark.integration
def test_lsun_is_resized_also_in_worker_processes(lsun_root):
    root, originals = lsun_root
    images = load_images(spec(name="lsun", size=[32, 32], channels=3, category="bedroom", root=str(root)))
    expected = torch.stack([Compose([Resize(32), CenterCrop(32), PILToTensor()])(image) for image in originals])
    assert torch.equal(torch.stack([images[0], images[1]]), expected)
    assert len(images) == 2
    assert images.name == "lsun-bedroom-train"
    # worker processes read it too, while this one has it open
    for context in ("fork", "spawn"):
        loader = DataLoader(images, batch_size=None, sampler=[1, 0], num_workers=1, multiprocessing_context=context)
        assert torch.equal(torch.stack(list(loader)), expected.flip(0))
    images.close()


@pytest.mark.parametrize("change", ["pixels", "key", "nothing"])
def test_the_fingerprint_of_lsun_is_that_of_its_content(lsun_root, change):
    import lmdb

    root, _ = lsun_root
    values = spec(name="lsun", size=[32, 32], channels=3, category="bedroom", root=str(root))
    before = load_images(values).fingerprint()
    of_names = b"lsun-bedroom-train|2|(3, 32, 32)|shorter side bilinear, centre crop, RGB"
    assert load_images(values).earlier_fingerprint == hashlib.sha256(of_names).hexdigest()
    Image.new("RGB", (40, 40)).save(stored := io.BytesIO(), "PNG")
    with (
        lmdb.open(str(root / "bedroom_train_lmdb"), map_size=1 << 20) as database,
        database.begin(write=True) as writing,
    ):
        if change == "pixels":
            writing.put(b"bb", stored.getvalue())
        elif change == "key":
            writing.put(b"cc", writing.pop(b"bb"))
    assert (load_images(values).fingerprint() == before) == (change == "nothing")


def test_lsun_is_read_by_several_at_once(lsun_root):
    """As by two trainings of a sweep in one process; lmdb opens a database once."""
    values = spec(name="lsun", size=[32, 32], channels=3, category="bedroom", root=str(lsun_root[0]))
    first = load_images(values)
    before = first[0], first.fingerprint()
    second = load_images(values)
    assert torch.equal(second[0], before[0])
    assert second.fingerprint() == before[1]
    second.close()
    assert torch.equal(first[0], before[0])
    first.close()


def cut_short(database):
    with database.open("r+b") as file:
        file.truncate(database.stat().st_size // 2)


# What happens to data.mdb -> what the message says about it.
DAMAGED_DATABASES = {
    "another file": (lambda database: database.write_bytes(b"x" * 100_000), r"bedroom_train_lmdb cannot be read \("),
    "cut short": (cut_short, "bedroom_train_lmdb is cut short; copy or download it again"),
    "fifo": (
        lambda database: (database.unlink(), os.mkfifo(database)),
        "the LSUN database .* is a fifo, not a",
    ),
}


@pytest.mark.parametrize("case", DAMAGED_DATABASES)
def test_a_damaged_lsun_database_is_refused(tmp_path, case):
    lmdb = pytest.importorskip("lmdb")
    folder = tmp_path / "bedroom_train_lmdb"
    with lmdb.open(str(folder), map_size=1 << 20) as database, database.begin(write=True) as writing:
        for i in range(40):
            writing.put(b"%d" % i, bytes(5000))
    damage, message = DAMAGED_DATABASES[case]
    damage(folder / "data.mdb")
    with pytest.raises(UserError, match=message):
        load_images(spec(name="lsun", size=[8, 8], channels=3, category="bedroom", root=str(tmp_path)))


def test_a_damaged_lsun_image_is_named(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    Image.effect_noise((32, 32), 50).save(stored := io.BytesIO(), "PNG")
    for content in (stored.getvalue()[:-100], b"", b"no image"):
        folder = str(tmp_path / "tower_train_lmdb")
        with lmdb.open(folder, map_size=1 << 20) as database, database.begin(write=True) as writing:
            writing.put(b"abc", content)
        images = load_images(spec(name="lsun", size=[8, 8], channels=3, category="tower", root=str(tmp_path)))
        with pytest.raises(UserError, match=r"^the image abc of the LSUN database \S+ cannot be read \([^\n]*\); "):
            images[0]
        images.close()


def test_missing_lsun_files_are_named(tmp_path, monkeypatch):
    values = {"name": "lsun", "size": [32, 32], "channels": 3, "category": "tower", "root": str(tmp_path)}
    with pytest.raises(UserError, match=r"tower_val_lmdb/data\.mdb does not exist; download tower_val_lmdb\.zip"):
        load_images(spec(**values), "test")
    (tmp_path / "tower_train_lmdb").mkdir()
    (tmp_path / "tower_train_lmdb/data.mdb").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UserError, match="needs the package lmdb; install ddim with the extra 'lsun'"):
        load_images(spec(**values))
