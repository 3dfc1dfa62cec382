"""Which files an export writes, and when it refuses to."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from exported import FILES, SMALL, tree, weights
from safetensors import safe_open
from stored import same

from ddim.checkpoints import weights_hash
from ddim.checkpoints.convert.exporting import FILES as LAYOUT_FILES
from ddim.checkpoints.convert.exporting import ExportSpec, export_checkpoint
from ddim.checkpoints.convert.importing import ImportSpec, import_checkpoint
from ddim.errors import UserError


def test_diffusers_files_are_written_in_this_order(model_file, tmp_path):
    out = tmp_path / "model"
    paths, unsaid = export_checkpoint(ExportSpec(model_file(), str(out)))
    assert paths == [out / name for name in FILES]
    assert set(tree(out)) == set(FILES)
    assert unsaid == []
    assert json.loads((out / "model_index.json").read_text()) == {
        "_class_name": "DDIMPipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    with safe_open(out / FILES[0], framework="pt") as file:
        assert file.metadata()["format"] == "pt"  # without which diffusers refuses it
        assert "time_embedding.linear_1.weight" in file.keys()  # noqa: SIM118


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("overwrite", [False, True])
def test_existing_files_are_kept_unless_overwrite(model_file, tmp_path, name, overwrite):
    out = tmp_path / "model"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    (out / ".gitattributes").write_text("of the hub")
    spec = ExportSpec(model_file(), str(out), overwrite=overwrite)
    if overwrite:
        export_checkpoint(spec)
        assert set(tree(out)) == {*FILES, ".gitattributes"}
        assert tree(out)[name] != b"mine"
    else:
        with pytest.raises(UserError, match=rf"{re.escape(str(out / name))} exists already; .*overwrite=true"):
            export_checkpoint(spec)
        assert tree(out) == {name: b"mine", ".gitattributes": b"of the hub"}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_in_place_of_a_file_is_refused_first(model_file, tmp_path, name, overwrite):
    out = tmp_path / "model"
    (out / name).mkdir(parents=True)
    with pytest.raises(UserError, match=re.escape(str(out / name))):
        export_checkpoint(ExportSpec(model_file(), str(out), overwrite=overwrite))
    assert tree(out) == {}


@pytest.mark.parametrize("name", FILES)
def test_model_index_is_written_last(model_file, tmp_path, monkeypatch, name):
    source, out, replace_file = model_file(), tmp_path / "model", Path.replace

    def full_disk(path, target):
        if target == out / name:
            raise OSError(28, "No space left on device")
        return replace_file(path, target)

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        export_checkpoint(ExportSpec(source, str(out)))
    assert set(tree(out)) == set(FILES[: FILES.index(name)])


@pytest.mark.parametrize("layout", ["diffusers", "safetensors", "flat"])
def test_overwrite_replaces_everything(model_file, tmp_path, layout):
    once, twice = tmp_path / "once", tmp_path / "twice"
    export_checkpoint(ExportSpec(model_file(seed=1), str(twice), layout=layout))
    source = model_file(seed=2)
    with pytest.raises(UserError, match="exists already"):
        export_checkpoint(ExportSpec(source, str(twice), layout=layout))
    export_checkpoint(ExportSpec(source, str(twice), layout=layout, overwrite=True))
    export_checkpoint(ExportSpec(source, str(once), layout=layout))
    for imported in (once, twice):
        spec = ImportSpec(
            str(tmp_path),
            "",
            str(imported if layout == "diffusers" else imported / LAYOUT_FILES[layout][0]),
            name=f"{imported.name}.out",
            network=None if layout != "flat" else {"name": "unet", **asdict(SMALL)},
        )
        assert same(import_checkpoint(spec).model.state, weights(2))


@pytest.mark.parametrize("layout", ["safetensors", "flat"])
@pytest.mark.parametrize("option", [{"records": "records.jsonl"}, {"license": "mit"}])
def test_a_single_file_has_no_model_card(layout, option):
    with pytest.raises(ValueError, match=f"layout={layout} has no model card"):
        ExportSpec("a", "b", layout=layout, **option)


def test_only_a_model_card_requests_results(model_file, tmp_path):
    source, asked = model_file(), []

    def results(of):
        asked.append(of)
        return ()

    for layout in ("safetensors", "flat", "diffusers"):
        assert asked == []
        export_checkpoint(ExportSpec(source, str(tmp_path / f"out.{layout}"), layout=layout), results)
    assert asked == [weights_hash(weights())]


def test_a_tilde_is_the_home_folder(model_file, tmp_path, monkeypatch):
    model_file()
    monkeypatch.setenv("HOME", str(tmp_path))
    paths, _ = export_checkpoint(ExportSpec("~/model.safetensors", "~/out", layout="flat"))
    assert paths == [tmp_path / "out" / "model.pt"]
    assert paths[0].is_file()


@pytest.mark.parametrize(("label", "seed"), [("online", 1), ("ema", 2)])
def test_a_training_checkpoint_exports_the_chosen_weights(training_file, tmp_path, label, seed):
    for layout in ("safetensors", "flat", "diffusers"):
        asked = []
        spec = ExportSpec(training_file, str(tmp_path / f"out.{layout}"), layout=layout, weights=label)
        export_checkpoint(spec, lambda of, asked=asked: asked.append(of) or ())
        assert asked == ([weights_hash(weights(seed))] if layout == "diffusers" else [])
    assert same(torch.load(tmp_path / "out.flat" / "model.pt", weights_only=True), weights(seed))
    for exported in ("out.safetensors/model.safetensors", "out.diffusers"):
        found = import_checkpoint(ImportSpec(str(tmp_path / "in"), "", str(tmp_path / exported), overwrite=True))
        assert (found.model.weights, found.model.step) == (label, 7)
        assert same(found.model.state, weights(seed))
    assert ExportSpec(training_file, "out").weights == "ema"


def test_missing_weights_are_not_exported(model_file, tmp_path):
    with pytest.raises(UserError, match="holds online weights only; choose weights=online"):
        export_checkpoint(ExportSpec(model_file("online"), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
