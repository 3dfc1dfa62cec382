"""Flat state dicts, and that an export comes back in as the same model."""

from dataclasses import asdict, replace

import pytest
import torch
from exported import FILES, MODEL, SMALL, weights
from safetensors import safe_open
from stored import same

from ddim.checkpoints import ModelSpec, load_model, read_model, weights_hash
from ddim.checkpoints.convert.exporting import ExportSpec, export_checkpoint
from ddim.checkpoints.convert.importing import ImportSpec, import_checkpoint
from ddim.checkpoints.convert.model_zoo import PRESETS
from ddim.diffusion.schedule import ScheduleSpec, cosine_schedule, from_betas, linear_schedule
from ddim.networks import UNet, UNetSpec


def test_a_flat_file_is_the_bare_state_dict(model_file, tmp_path):
    paths, _ = export_checkpoint(ExportSpec(model_file(), str(tmp_path / "flat"), layout="flat"))
    assert paths == [tmp_path / "flat" / "model.pt"]
    content = torch.load(paths[0], weights_only=True)
    assert type(content) is dict
    network = UNet(SMALL)
    network.load_state_dict(content)
    assert same(network.state_dict(), weights())


@pytest.mark.parametrize(
    ("label", "changes", "unsaid"),
    [
        ("unlabelled", {}, []),
        ("ema", {}, ["weights=ema"]),
        ("online", {}, ["weights=online"]),
        ("unlabelled", {"schedule": linear_schedule(20)}, ["the schedule, linear with T=20 (schedule=...)"]),
        ("unlabelled", {"schedule": cosine_schedule()}, ["the schedule, cosine with T=1000 (schedule=...)"]),
        ("unlabelled", {"prediction": "v"}, ["prediction=v"]),
        ("unlabelled", {"network_spec": replace(SMALL, dropout=0.5, init="torch")}, []),
        (
            "unlabelled",
            {"network_spec": replace(SMALL, num_res_blocks=2)},
            ["the network, which is none of the presets (network=...)"],
        ),
        (
            "ema",
            {"network_spec": replace(SMALL, ch=16), "schedule": from_betas([0.1, 0.2]), "prediction": "x0"},
            [
                "weights=ema",
                "the network, which is none of the presets (network=...)",
                "the schedule, custom with T=2 (schedule=...)",
                "prediction=x0",
            ],
        ),
    ],
)
def test_a_flat_export_warns_about_what_it_does_not_store(model_file, tmp_path, monkeypatch, label, changes, unsaid):
    monkeypatch.setitem(PRESETS, "small", SMALL)  # the others are too large to write
    source = model_file(label, replace(MODEL, **changes))
    spec = ExportSpec(source, str(tmp_path / "flat"), layout="flat", weights="online" if label == "online" else "ema")
    sentence = f"a flat state dict does not store {', '.join(unsaid)}; state it when importing"
    assert export_checkpoint(spec)[1] == ([sentence] if unsaid else [])


@pytest.mark.parametrize("changes", [{"num_groups": 2}, {"image_size": (16, 16), "attn_resolutions": (8,)}], ids=str)
def test_a_network_with_the_shapes_of_a_preset_is_no_preset(model_file, tmp_path, monkeypatch, changes):
    """Importing would take the preset, whose images are others."""
    monkeypatch.setitem(PRESETS, "small", SMALL)
    source = model_file("unlabelled", replace(MODEL, network_spec=replace(SMALL, **changes)))
    _, warnings = export_checkpoint(ExportSpec(source, str(tmp_path / "flat"), layout="flat"))
    assert len(warnings) == 1
    assert "network=..." in warnings[0]


def test_a_flat_file_with_its_options_is_the_same_model(model_file, tmp_path):
    spec = replace(MODEL, schedule=linear_schedule(20, 0.001, 0.3), prediction="v")
    export_checkpoint(ExportSpec(model_file(spec=spec), str(tmp_path / "flat"), layout="flat"))
    back = import_checkpoint(
        ImportSpec(
            str(tmp_path / "in"),
            "",
            str(tmp_path / "flat" / "model.pt"),
            weights="ema",
            network={"name": "unet", **asdict(SMALL)},
            schedule=ScheduleSpec("linear", T=20, beta_start=0.001, beta_end=0.3),
            prediction="v",
        )
    )
    assert spec.differences(back.model.spec) == []
    assert back.model.weights == "ema"
    assert load_model(back.path).weights_hash == weights_hash(weights())


SPECS = {
    "linear": MODEL,
    "cosine, v": ModelSpec("unet", replace(SMALL, dropout=0.0), cosine_schedule(50), "v", "digits"),
    "custom, x0": ModelSpec("unet", SMALL, from_betas([0.3, 0.01, 0.125, 0.4, 1e-5, 0.2]), "x0"),
    "oblong": ModelSpec(
        "unet",
        UNetSpec((8, 12), 2, ch=8, ch_mult=(1, 2, 2), attn_resolutions=(2, 8), num_groups=2, init="torch"),
        linear_schedule(200, 0.0005, 0.1),
    ),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("label", ["ema", "online", "unlabelled"])
@pytest.mark.parametrize("layout", ["safetensors", "diffusers"])
def test_an_export_imports_as_the_same_model(model_file, tmp_path, spec, label, layout):
    out = tmp_path / "out"
    option = "online" if label == "online" else "ema"
    paths, _ = export_checkpoint(ExportSpec(model_file(label, spec), str(out), layout=layout, weights=option))
    exported = out if layout == "diffusers" else paths[0]
    back = import_checkpoint(ImportSpec(str(tmp_path / "in"), "", str(exported))).model
    assert same(back.state, weights(spec=spec.network_spec))
    assert (back.weights, back.step) == (label, 790_000)
    assert back.spec.network_spec == spec.network_spec
    assert torch.equal(back.spec.schedule.alpha_bar, spec.schedule.alpha_bar)
    assert (back.spec.schedule.name, back.spec.prediction, back.spec.data) == (
        spec.schedule.name,
        spec.prediction,
        spec.data,
    )


def test_a_model_file_is_exported_as_it_is(model_file, tmp_path):
    origin = {"file": "diffusion.ckpt", "layout": "flat"}
    export_checkpoint(ExportSpec(model_file(origin=origin), str(tmp_path / "out"), layout="safetensors"))
    back = read_model(tmp_path / "out" / "model.safetensors")
    assert same(back.state, weights())
    assert (back.weights, back.step, back.origin) == ("ema", 790_000, origin)
    assert back.spec.to_dict() | {"schedule": None} == MODEL.to_dict() | {"schedule": None}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_export_resaved_by_diffusers_imports_as_the_same_model(hf, model_file, tmp_path, spec, safe):
    export_checkpoint(ExportSpec(model_file(spec=spec), str(tmp_path / "ours")))
    pipeline = hf.DDIMPipeline.from_pretrained(tmp_path / "ours", local_files_only=True, low_cpu_mem_usage=False)
    theirs = tmp_path / "theirs"
    pipeline.save_pretrained(theirs, safe_serialization=safe)
    if safe:
        with safe_open(theirs / FILES[0], framework="pt") as file:
            assert "ddim" not in file.metadata()  # what follows is read from the configurations alone
    else:
        assert (theirs / "unet" / "diffusion_pytorch_model.bin").is_file()
    back = import_checkpoint(ImportSpec(str(tmp_path / "in"), "", str(theirs), weights="ema"))
    assert same(back.model.state, weights(spec=spec.network_spec))
    assert spec.differences(back.model.spec) in ([], ["network.attn_resolutions: [2, 8] and [8, 2]"])
    assert torch.equal(back.model.spec.schedule.alpha_bar, spec.schedule.alpha_bar)
    assert back.model.spec.network_spec.dropout == spec.network_spec.dropout
    assert (back.model.weights, back.model.step) == ("ema", None)
    assert back.warnings == []
