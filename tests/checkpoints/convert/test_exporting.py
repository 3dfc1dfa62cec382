"""Which files an export writes, when it refuses to, and that an export comes back in as the same model."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layouts import GIVEN, MODELS, NETWORK, PLAIN, WEIGHTS_FILE, bring, gaussian_weights, refusal, same, tree, weights
from safetensors import safe_open

from ddim.checkpoints import read_model, weights_hash
from ddim.checkpoints.convert.exporting import FILES as LAYOUT_FILES
from ddim.checkpoints.convert.exporting import ExportSpec, export_checkpoint, rounded
from ddim.checkpoints.convert.model_zoo import PRESETS
from ddim.diffusion.schedule import cosine_schedule, from_betas, linear_schedule
from ddim.errors import UserError
from ddim.networks import UNet

pytestmark = pytest.mark.integration

FILES = (WEIGHTS_FILE, "unet/config.json", "scheduler/scheduler_config.json", "README.md", "model_index.json")


def test_diffusers_files_are_written_in_this_order(model_file, tmp_path):
    out = tmp_path / "model"
    paths, warnings = export_checkpoint(ExportSpec(model_file(), str(out)))
    assert paths == [out / name for name in FILES]
    assert set(tree(out)) == set(FILES)
    assert warnings == []
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
def test_existing_files_are_kept_unless_overwrite(model_file, tmp_path, name):
    out, source = tmp_path / "model", model_file()
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    (out / ".gitattributes").write_text("of the hub")
    message = refusal(export_checkpoint, ExportSpec(source, str(out)))
    assert re.fullmatch(rf"{re.escape(str(out / name))} exists already; .*overwrite=true.*", message)
    assert tree(out) == {name: b"mine", ".gitattributes": b"of the hub"}
    export_checkpoint(ExportSpec(source, str(out), overwrite=True))
    assert set(tree(out)) == {*FILES, ".gitattributes"}
    assert tree(out)[name] != b"mine"


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_place_of_a_file_is_refused_first(model_file, tmp_path, name):
    out, source = tmp_path / "model", model_file()
    (out / name).mkdir(parents=True)
    for overwrite in (False, True):
        assert str(out / name) in refusal(export_checkpoint, ExportSpec(source, str(out), overwrite=overwrite))
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
    export_checkpoint(ExportSpec(model_file(seed=1), str(twice), layout))
    source = model_file(seed=2)
    assert "exists already" in refusal(export_checkpoint, ExportSpec(source, str(twice), layout))
    export_checkpoint(ExportSpec(source, str(twice), layout, overwrite=True))
    export_checkpoint(ExportSpec(source, str(once), layout))
    for folder in (once, twice):
        exported = folder if layout == "diffusers" else folder / LAYOUT_FILES[layout][0]
        imported = bring(exported, network=GIVEN if layout == "flat" else None, overwrite=True)
        assert same(imported.model.state, gaussian_weights(NETWORK, 2))


@pytest.mark.parametrize("layout", ["safetensors", "flat"])
@pytest.mark.parametrize("option", [{"records": "records.jsonl"}, {"license": "mit"}])
def test_a_single_file_has_no_model_card(layout, option):
    with pytest.raises(ValueError, match=f"layout={layout} has no model card"):
        ExportSpec("a", "b", layout=layout, **option)


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
        assert asked == ([weights_hash(weights(seed=seed))] if layout == "diffusers" else [])
    assert same(torch.load(tmp_path / "out.flat" / "model.pt", weights_only=True), weights(seed=seed))
    for exported in ("out.safetensors/model.safetensors", "out.diffusers"):
        found = bring(tmp_path / exported, overwrite=True)
        assert (found.model.weights, found.model.step) == (label, 7)
        assert same(found.model.state, weights(seed=seed))
    assert ExportSpec(training_file, "out").weights == "ema"


def test_missing_weights_are_not_exported(model_file, tmp_path):
    message = refusal(export_checkpoint, ExportSpec(model_file("online"), str(tmp_path / "out")))
    assert "holds online weights only; choose weights=online" in message
    assert not (tmp_path / "out").exists()


def test_a_flat_file_is_the_bare_state_dict(model_file, tmp_path):
    paths, _ = export_checkpoint(ExportSpec(model_file(), str(tmp_path / "flat"), layout="flat"))
    assert paths == [tmp_path / "flat" / "model.pt"]
    content = torch.load(paths[0], weights_only=True)
    assert type(content) is dict
    network = UNet(NETWORK)
    network.load_state_dict(content)
    assert same(network.state_dict(), gaussian_weights(NETWORK))


NO_PRESET = "the network, which is none of the presets (network=...)"
LOST = [  # label, changes of the model, what a flat export does not store
    ("unlabelled", {}, []),
    ("ema", {}, ["weights=ema"]),
    ("online", {}, ["weights=online"]),
    ("unlabelled", {"schedule": linear_schedule(20)}, ["the schedule, linear with T=20 (schedule=...)"]),
    ("unlabelled", {"schedule": cosine_schedule()}, ["the schedule, cosine with T=1000 (schedule=...)"]),
    ("unlabelled", {"prediction": "v"}, ["prediction=v"]),
    ("unlabelled", {"network_spec": replace(NETWORK, dropout=0.5, init="torch")}, []),
    ("unlabelled", {"network_spec": replace(NETWORK, num_res_blocks=2)}, [NO_PRESET]),
    # The shapes of a preset, whose images are others.
    ("unlabelled", {"network_spec": replace(NETWORK, num_groups=2)}, [NO_PRESET]),
    ("unlabelled", {"network_spec": replace(NETWORK, image_size=(16, 16), attn_resolutions=(8,))}, [NO_PRESET]),
    (
        "ema",
        {"network_spec": replace(NETWORK, ch=16), "schedule": from_betas([0.1, 0.2]), "prediction": "x0"},
        ["weights=ema", NO_PRESET, "the schedule, custom with T=2 (schedule=...)", "prediction=x0"],
    ),
]


@pytest.mark.parametrize(("label", "changes", "lost"), LOST)
def test_a_flat_export_warns_about_what_it_does_not_store(model_file, tmp_path, monkeypatch, label, changes, lost):
    monkeypatch.setitem(PRESETS, "small", NETWORK)  # the others are too large to write
    source = model_file(label, replace(PLAIN, **changes))
    spec = ExportSpec(source, str(tmp_path / "flat"), layout="flat", weights="online" if label == "online" else "ema")
    sentence = f"a flat state dict does not store {', '.join(lost)}; state it when importing"
    assert export_checkpoint(spec)[1] == ([sentence] if lost else [])


def test_a_model_file_is_exported_as_it_is(model_file, tmp_path):
    origin = {"file": "diffusion.ckpt", "layout": "flat"}
    export_checkpoint(ExportSpec(model_file(origin=origin), str(tmp_path / "out"), layout="safetensors"))
    back = read_model(tmp_path / "out" / "model.safetensors")
    assert same(back.state, gaussian_weights(NETWORK))
    assert (back.weights, back.step, back.origin) == ("ema", 790_000, origin)
    assert back.spec.to_dict() | {"schedule": None} == PLAIN.to_dict() | {"schedule": None}


def test_float16_halves_the_file_and_rounds_the_weights(model_file, tmp_path):
    source = model_file(origin={"file": "diffusion.ckpt"})
    (whole,), _ = export_checkpoint(ExportSpec(source, str(tmp_path / "whole"), "safetensors"))
    (half,), _ = export_checkpoint(ExportSpec(source, str(tmp_path / "half"), "safetensors", dtype="float16"))
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    back = read_model(half)
    assert back.origin == {"file": "diffusion.ckpt", "rounded": "to float16"}
    assert same(back.state, {name: value.half().float() for name, value in gaussian_weights(NETWORK).items()})
    assert {value.dtype for value in back.state.values()} == {torch.float32}
    (again,), _ = export_checkpoint(ExportSpec(str(half), str(tmp_path / "again"), "safetensors"))
    assert same(read_model(again).state, back.state)  # in float32, and nothing more is lost


def test_float16_is_refused_where_it_cannot_hold(model_file, tmp_path):
    with pytest.raises(ValueError, match=r"layout=flat holds float32 only; dtype=float16 is for layout=safetensors"):
        ExportSpec("a", "b", layout="flat", dtype="float16")
    model = read_model(model_file())
    next(iter(model.state.values())).view(-1)[0] = 70_000.0
    with pytest.raises(UserError, match=r"some of which are above 65,504; take dtype=float32"):
        rounded(model)


@pytest.mark.integration
@pytest.mark.parametrize("which", [which for which in MODELS if which != "wide first"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_export_resaved_by_diffusers_imports_as_the_same_model(hf, model_file, tmp_path, which, safe):
    spec = MODELS[which][0]
    export_checkpoint(ExportSpec(model_file(spec=spec), str(tmp_path / "ours")))
    pipeline = hf.DDIMPipeline.from_pretrained(tmp_path / "ours", local_files_only=True, low_cpu_mem_usage=False)
    theirs = tmp_path / "theirs"
    pipeline.save_pretrained(theirs, safe_serialization=safe)
    if safe:
        with safe_open(theirs / FILES[0], framework="pt") as file:
            assert "ddim" not in file.metadata()  # what follows is read from the configurations alone
    else:
        assert (theirs / "unet" / "diffusion_pytorch_model.bin").is_file()
    back = bring(theirs, weights="ema", classes=spec.classes or None)  # diffusers has no names of classes
    assert same(back.model.state, gaussian_weights(spec.network_spec))
    assert spec.differences(back.model.spec) in ([], ["network.attn_resolutions: [2, 8] and [8, 2]"])
    assert torch.equal(back.model.spec.schedule.alpha_bar, spec.schedule.alpha_bar)
    assert back.model.spec.network_spec.dropout == spec.network_spec.dropout
    assert (back.model.weights, back.model.step) == ("ema", None)
    assert len(back.warnings) == (which == "conditional")  # which embedding is taken as that of no label


def test_learned_variance_survives_as_safetensors_alone(model_file, tmp_path):
    spec = replace(PLAIN, network_spec=replace(PLAIN.network_spec, out_channels=2), variance="learned_range")
    assert spec.network_spec.channels == 1
    source = model_file(spec=spec)
    for layout in ("diffusers", "flat"):
        assert "take layout=safetensors" in refusal(export_checkpoint, ExportSpec(source, str(tmp_path), layout))
    (path,), _ = export_checkpoint(ExportSpec(source, str(tmp_path / "out"), "safetensors"))
    bring(path)
    back = read_model(tmp_path / "out" / "imported" / "model.safetensors.safetensors")
    assert (back.spec.variance, back.spec.network_spec) == ("learned_range", spec.network_spec)
    assert weights_hash(back.state) == weights_hash(read_model(source).state)
