"""Folders of classes: which images get which label, and what is refused."""

import re

import pytest
import torch
from folders import load, write

from ddim.data.datasets import DataSpec, class_names
from ddim.errors import UserError


@pytest.mark.parametrize("in_memory", [True, False])
def test_labels_are_the_sorted_folders_of_the_classes(tmp_path, in_memory):
    """As torchvision's ImageFolder; folders inside one are of its class."""
    for i, name in enumerate(["dog/0.png", "cat/9.png", "cat/persian/1.png", "a bird/2.png", "cat.b/3.png"]):
        write(tmp_path / name, (i, 0, 0))
    images = load(tmp_path, labels="folders", in_memory=in_memory)
    assert images.classes == ("a bird", "cat", "cat.b", "dog")
    assert images.labels.dtype == torch.int64
    by_image = {int(images[i][0, 0, 0]): images.classes[images.labels[i]] for i in range(5)}
    assert by_image == {0: "dog", 1: "cat", 2: "cat", 3: "a bird", 4: "cat.b"}
    from torchvision.datasets import ImageFolder

    assert ImageFolder(tmp_path).classes == list(images.classes)
    plain = load(tmp_path, in_memory=in_memory)
    assert (plain.labels, plain.classes, plain.fingerprint()) == (None, (), images.fingerprint())


def test_a_test_split_has_the_labels_of_the_training_images(tmp_path):
    for name in ("train/a/0.png", "train/b/0.png", "train/c/0.png", "test/c/0.png", "test/a/0.png"):
        write(tmp_path / name)
    assert load(tmp_path, labels="folders").labels.tolist() == [0, 1, 2]
    assert load(tmp_path, "test", labels="folders").labels.tolist() == [0, 2]  # none of b is no error
    assert class_names(DataSpec("folder", (4, 6), 3, str(tmp_path), labels="folders")) == ("a", "b", "c")
    write(tmp_path / "test/d/0.png")
    with pytest.raises(UserError, match="test/d is of no class of the training images, which are a, b, c; rename"):
        load(tmp_path, "test", labels="folders")


LAYOUTS = [
    (("0.png", "1.png"), "needs a folder for each class, two at least, and .* holds none; set data.root to"),
    (("cats/0.png",), "needs a folder for each class, two at least, and .* holds cats; set data.root"),
    (("data/a/0.png", "data/b/0.png"), "two at least, and .* holds data; set data.root to the folder that holds them"),
    (("a/0.png", "b/0.png", "1.png", "2.png"), "images outside the folders of classes: .*1.png, .*2.png; move each"),
    (("a/0.png", "b/0.png", "c/"), "/c holds no images of its class; add some or remove the folder"),
    (("a/0.png", "b/", "train/c/0.png"), "holds train beside a, which may be splits or classes"),
    (("test/a/0.png", "test/b/0.png"), "is divided into train and test, but .*train does not exist"),
]


@pytest.mark.parametrize(("names", "message"), LAYOUTS)
def test_other_layouts_are_refused_in_one_sentence(tmp_path, names, message):
    for name in names:
        (tmp_path / name).mkdir() if name.endswith("/") else write(tmp_path / name)
    with pytest.raises(UserError) as caught:
        load(tmp_path, labels="folders")
    assert re.search(message, str(caught.value))
    assert re.fullmatch(r"[^\n]*[^.\s]\.", str(caught.value))
