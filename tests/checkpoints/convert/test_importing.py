"""Import: every layout gives the same model bit for bit, with its origin."""

import hashlib
import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layouts import (
    GIVEN,
    LAYOUTS,
    MODELS,
    NETWORK,
    NO_AVERAGE,
    UNLABELLED,
    at_root,
    bring,
    export,
    foreign_folder,
    import_refusal,
    lightning,
    put,
    same,
    save,
    weights,
)
from safetensors import safe_open

from ddim.checkpoints import ModelSpec, StoredModel, load_model, read_model, weights_hash
from ddim.checkpoints.convert.importing import ImportSpec, import_checkpoint
from ddim.checkpoints.convert.model_zoo import KNOWN_FILES, PRESETS, PublishedFile
from ddim.diffusion.schedule import linear_schedule
from ddim.networks import UNet

pytestmark = pytest.mark.integration


def assert_same_model(back, spec, state, step):
    assert same(back.state, state)
    assert back.spec.differences(spec) == spec.differences(back.spec) == []
    assert torch.equal(back.spec.schedule.alpha_bar, spec.schedule.alpha_bar)
    assert back.spec.schedule.name == spec.schedule.name
    assert (back.spec.network, back.spec.prediction) == ("unet", spec.prediction)
    assert back.spec.network_spec == spec.network_spec  # the dropout, too
    assert back.spec.data == spec.data
    assert back.step == step


STATES_LABEL = ("diffusers", "safetensors")
CASES = [
    (layout, which, label)
    for layout in LAYOUTS
    for which in MODELS
    for label in (("ema", "online", "unlabelled") if layout in STATES_LABEL and which == "plain" else ("ema",))
    if (layout, which) != ("diffusers", "wide first")
]


@pytest.mark.integration
@pytest.mark.parametrize(("layout", "which", "label"), CASES)
def test_a_round_trip_gives_the_same_model_bit_for_bit(tmp_path, layout, which, label):
    spec, options = MODELS[which]
    model = StoredModel(spec, weights(spec.network_spec), label, 1234)
    path, options = put(model, tmp_path, layout, options)
    done = bring(path, layout=layout, **options)
    # The file, and not only what was returned, is that model.
    asked = "online" if label == "online" else "ema"
    for back in (done.model, read_model(done.path, asked)):
        assert_same_model(back, spec, model.state, None if layout == "flat" else 1234)
        assert back.weights == label
        assert back.origin["layout"] == layout
    assert done.weights_hash == weights_hash(model.state) == load_model(done.path, asked).weights_hash
    assert done.warnings == {"ema": [], "online": [NO_AVERAGE], "unlabelled": [UNLABELLED]}[label]
    if label == "unlabelled":
        assert bring(path, weights="online", overwrite=True).model.weights == "online"
    elif layout in STATES_LABEL:
        message = import_refusal(path, weights={"ema": "online", "online": "ema"}[label], overwrite=True)
        assert message.endswith(f" holds {label} weights only; choose weights=auto.")


FULL = {"cifar10": 35_746_307, "celeba": 78_700_803, "lsun": 113_673_219}


# Every layout at the smallest size, and with other networks one whose names are ours and one where they are not.
SIZES = [("cifar10", layout) for layout in LAYOUTS]
SIZES += [(name, layout) for name in ("celeba", "lsun") for layout in ("official", "diffusers")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), SIZES)
def test_a_round_trip_at_the_published_size(tmp_path, name, layout):
    state = weights(PRESETS[name])
    spec = ModelSpec("unet", PRESETS[name], linear_schedule(), data=name)
    path, options = put(StoredModel(spec, state, "ema", 500_000), tmp_path, layout, {"trained_on": name})
    done = bring(path, **options)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert f"{FULL[name]:,} parameters" in done.lines[2]
    if layout in ("flat", "official"):
        assert f"network: preset {name}, " in done.lines[2]
    back = read_model(done.path)
    assert_same_model(back, spec, state, None if layout == "flat" else 500_000)
    assert (back.weights, done.warnings) == ("ema", [])
    shutil.rmtree(tmp_path)


def conditional_folder(tmp_path):
    """Write a folder of diffusers as another project writes it, with four embeddings of classes; return its weights."""
    network = replace(NETWORK, classes=3)
    state = weights(network)
    return foreign_folder(
        StoredModel(ModelSpec("unet", network, linear_schedule()), state, "ema", None), tmp_path
    ), state


def test_the_last_embedding_of_diffusers_is_that_of_no_label(tmp_path):
    folder, state = conditional_folder(tmp_path)
    done = bring(folder, classes=("cat", "dog", "bird"), weights="ema")
    assert (done.model.spec.num_classes, done.model.spec.classes) == (3, ("cat", "dog", "bird"))
    assert same(done.model.state, state)
    assert "the last of the 4 embeddings of classes is taken as that of no label" in "\n".join(done.warnings)
    assert "2 names of classes do not fit a network of classes=3" in import_refusal(
        folder, classes=("cat", "dog"), overwrite=True
    )


def test_without_an_embedding_of_no_label_the_mean_stands_in(tmp_path, model):
    folder, state = conditional_folder(tmp_path)
    done = bring(folder, no_label="none", weights="ema")
    assert (done.model.spec.num_classes, done.model.spec.classes) == (4, ())
    rows = done.model.state.pop("class_emb.weight")
    theirs = state.pop("class_emb.weight")
    assert torch.equal(rows[:4], theirs)
    torch.testing.assert_close(rows[4], theirs.mean(0))
    assert same(done.model.state, state)
    assert "no embedding of no label was trained" in "\n".join(done.warnings)
    ours, _ = put(model, tmp_path / "ours", "diffusers", {})
    assert "is for a network with classes that diffusers wrote" in import_refusal(ours, no_label="none")


def test_a_chain_through_every_layout_changes_nothing(tmp_path, model):
    latest = model
    for i, layout in enumerate(["diffusers", "flat", "safetensors", "diffusers", "official", "lightning", "flat"]):
        (tmp_path / str(i)).mkdir()
        path, needed = put(replace(latest, step=5), tmp_path / str(i), layout, MODELS["plain"][1])
        latest = bring(path, **needed).model
    assert same(latest.state, model.state)
    assert latest.spec.differences(model.spec) == []


# What a source is, and what it is called.


@pytest.mark.parametrize("name", ["cifar10", "celeba", "lsun"])
@pytest.mark.parametrize("asked", [False, True])
def test_the_fitting_preset_is_chosen(tmp_path, presets, name, asked):
    mine = weights(presets[name])
    path = save(mine, tmp_path / "flat.ckpt")
    done = bring(path, preset=name if asked else None)
    assert done.model.spec.network_spec == presets[name]
    assert done.lines[2] == (
        f"network: preset {name}, {sum(v.numel() for v in mine.values()):,} parameters, every name and shape checked"
    )
    assert same(done.model.state, mine)
    for other in presets.keys() - {name}:
        assert f"do not fit preset {other}: " in import_refusal(path, preset=other, overwrite=True)


def test_a_flat_file_gets_the_published_defaults(flat):
    done = bring(flat, network=GIVEN)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    assert torch.equal(done.model.spec.schedule.alpha_bar[1:], alpha_bar)
    assert (done.model.spec.prediction, done.model.spec.data, done.model.step) == ("eps", "", None)
    assert done.model.weights == "unlabelled"
    assert done.warnings == [UNLABELLED]
    for label in ("ema", "online"):
        done = bring(flat, network=GIVEN, weights=label, overwrite=True)
        assert (done.model.weights, done.warnings) == (label, [])


def test_the_summary_and_the_origin_are_complete(flat):
    done = bring(flat, network=GIVEN, trained_on="cats", weights="ema")
    sha256 = hashlib.sha256(flat.read_bytes()).hexdigest()
    count = sum(parameter.numel() for parameter in UNet(NETWORK).parameters())
    assert done.lines == [
        f"source: {flat} (layout flat, SHA-256 {sha256[:16]}...)",
        "known file: none that is published",
        f"network: the given network, {count:,} parameters, every name and shape checked",
        "schedule: linear, T=1000; prediction: eps",
        f"weights: ema, hash {done.weights_hash[:16]}",
    ]
    with safe_open(done.path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    description = json.loads(metadata["ddim"])
    assert description["origin"] == {"file": "flat.ckpt", "layout": "flat", "sha256": sha256}
    assert (description["weights"], description["step"], description["data"]) == ("ema", None, "cats")


def test_the_summary_of_a_described_source(tmp_path, model):
    done = bring(save(lightning(model), tmp_path / "last.ckpt"))
    assert ": described by the file, " in done.lines[2]
    assert done.lines[4].startswith("weights: ema at step 790,000, hash ")
    renamed = bring(tmp_path / "last.ckpt", trained_on="dogs", overwrite=True)
    assert renamed.model.spec.data == "dogs"


def test_the_model_file_has_default_permissions(flat, tmp_path):
    (tmp_path / "plain").touch()
    assert bring(flat, network=GIVEN).path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_file_is_named_after_its_source(tmp_path, flat, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, name in (("flat.ckpt", "flat"), ("folder", "folder"), ("folder/unet", "unet")):
        done = import_checkpoint(ImportSpec("out", "downloads", checkpoint=source, network=GIVEN))
        assert done.path == Path("out") / f"{name}.safetensors"
        assert done.path.is_file()
    (tmp_path / "v1.5").mkdir()
    folder.rename(tmp_path / "v1.5" / "net-2.0")
    done = import_checkpoint(ImportSpec("out", "downloads", checkpoint="v1.5/net-2.0"))
    assert done.path == Path("out") / "net-2.0.safetensors"
    assert not (tmp_path / "downloads").exists()


# Files that are known.


@contextmanager
def known(monkeypatch, path, label, algorithm):
    """Within: a file is a published one."""
    checksum = hashlib.new(algorithm, path.read_bytes()).hexdigest()
    with monkeypatch.context() as patch:
        patch.setitem(KNOWN_FILES, checksum, PublishedFile("the_file", label, "cats", 123_000, checksum))
        yield checksum


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
@pytest.mark.parametrize("label", ["ema", "online"])
def test_a_published_file_is_known_by_its_checksum(flat, monkeypatch, label, algorithm):
    other = {"ema": "online", "online": "ema"}[label]
    warning = (
        "the_file is known to hold online, not EMA weights: on CIFAR-10 an FID near 12 instead of 3 with all steps; "
        "for the paper's numbers take the EMA weights (download=ema_cifar10 and so on)"
    )
    with known(monkeypatch, flat, label, algorithm) as checksum:
        for asked in ("auto", label):
            done = bring(flat, network=GIVEN, weights=asked, overwrite=True)
            model = done.model
            assert (model.weights, model.step, model.spec.data) == (label, 123_000, "cats")
            assert model.origin["published"] == "the_file"
            assert done.lines[1] == f"known file: the_file, checksum {checksum}"
            assert done.warnings == ([warning] if label == "online" else [])
        message = import_refusal(flat, network=GIVEN, weights=other, overwrite=True)
        assert message == f"{flat} is known to hold {label} weights, not {other}; leave weights=auto."
        assert bring(flat, network=GIVEN, trained_on="dogs", overwrite=True).model.spec.data == "dogs"
    done = bring(flat, network=GIVEN, overwrite=True)
    assert (done.model.weights, done.model.step, done.model.spec.data) == ("unlabelled", None, "")
    assert "published" not in done.model.origin


@pytest.mark.parametrize("name", ["ddpm-cifar10-32", "models--google--ddpm-cifar10-32"])
def test_a_copy_of_the_online_upload_is_known_by_its_folder(folder, name, monkeypatch):
    at_root(folder)
    place = folder.parent / name
    if name.startswith("models--"):  # the hub's cache: snapshots of links to blobs
        (place / "blobs").mkdir(parents=True)
        (snapshot := place / "snapshots" / "x").mkdir(parents=True)
        for i, file in enumerate(path for path in folder.iterdir() if path.is_file()):
            file.rename(place / "blobs" / f"{i:040x}")
            (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / f"{i:040x}")
        place = snapshot
    else:
        folder.rename(place)
    out = folder.parent / "out.safetensors"
    for source in (place, place / "diffusion_pytorch_model.safetensors"):
        done = bring(source, out=out, overwrite=True)
        assert done.model.weights == "online"
        [warning] = done.warnings
        assert warning.startswith("ddpm-cifar10-32 is known to hold online, not EMA weights: ")
        assert done.model.step is None
        assert "published" not in done.model.origin
    # A name is no proof: somebody's own EMA weights may lie there.
    assert bring(place, out=out, weights="ema", overwrite=True).model.weights == "ema"
    monkeypatch.chdir(place)  # a relative path does not show the name
    [warning] = bring(Path("diffusion_pytorch_model.safetensors"), out=out, overwrite=True).warnings
    assert warning.startswith("ddpm-cifar10-32 is known")


def test_the_header_of_our_export_beats_the_folder_name(tmp_path, model):
    done = bring(export(model, tmp_path, "diffusers", "ddpm-cifar10-32"))
    assert (done.model.weights, done.warnings) == ("ema", [])


def test_a_similar_name_is_not_the_online_upload(folder):
    path = folder.rename(folder.parent / "ddpm-cifar10-32-mine")
    assert bring(path).warnings == [UNLABELLED]
