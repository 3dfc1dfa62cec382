"""What an export writes, when it refuses to, what its model card says, and that what comes back in is the same."""

import json
import re
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from ddim.checkpoints import ModelSpec, StoredModel, load_model, read_model, save_model, weights_hash
from ddim.checkpoints.card import Result
from ddim.checkpoints.exporting import ExportSpec, export_checkpoint
from ddim.checkpoints.importing import ImportSpec, import_checkpoint
from ddim.checkpoints.published import PRESETS
from ddim.diffusion.schedule import ScheduleSpec, cosine_schedule, from_betas, linear_schedule
from ddim.errors import UserError
from ddim.networks import UNet, UNetSpec

SMALL = UNetSpec((8, 8), channels=1, ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), num_groups=4)
MODEL = ModelSpec("unet", SMALL, linear_schedule(), "eps", "digits")
FILES = (
    "unet/diffusion_pytorch_model.safetensors",
    "unet/config.json",
    "scheduler/scheduler_config.json",
    "README.md",
    "model_index.json",
)
RESULTS = (
    Result("fid_50k", "cifar10/train", "ddim eta=0 S=50", 4.6712345, "fid_50k: 50,000 images, tau quad, seed 0"),
    Result("fid_50k", "cifar10/train", "σ̂ S=1000", 3.0, "fid_50k: 50,000 images, tau full, seed 0"),
)


def weights(seed=0, spec=SMALL):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {name: torch.randn_like(value) for name, value in UNet(spec).state_dict().items()}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], value) for name, value in other.items())


@pytest.fixture
def model_file(tmp_path):
    """model_file(label, spec, ...): a model file with weights of that label."""

    def model_file(label="ema", spec=MODEL, step=790_000, origin=None, seed=0):
        model = StoredModel(spec, weights(seed, spec.network_spec), label, step, origin or {})
        save_model(model, tmp_path / "model.safetensors")
        return str(tmp_path / "model.safetensors")

    return model_file


@pytest.fixture
def training_file(tmp_path):
    """A training checkpoint with raw weights of seed 1 and averaged ones of seed 2."""
    checkpoint = {
        "ddim": MODEL.to_dict(),
        "state_dict": {f"network.{name}": value for name, value in weights(1).items()},
        "callbacks": {"EMA": {"decay": 0.9, "updates": 7, "shadow": weights(2)}},
        "global_step": 7,
    }
    torch.save(checkpoint, tmp_path / "last.ckpt")
    return str(tmp_path / "last.ckpt")


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def card_of(folder):
    """Return the front matter, read as the hub does, and the text after it."""
    empty, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front), text


# ----------------------------------------------------------------------------------------------- files that are written


def test_a_folder_of_diffusers_holds_these_files_in_this_order(model_file, tmp_path):
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
def test_a_file_that_is_there_is_kept_unless_told(model_file, tmp_path, name, overwrite):
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
def test_a_folder_in_the_way_is_refused_before_anything_is_written(model_file, tmp_path, name, overwrite):
    out = tmp_path / "model"
    (out / name).mkdir(parents=True)
    with pytest.raises(UserError, match=re.escape(str(out / name))):
        export_checkpoint(ExportSpec(model_file(), str(out), overwrite=overwrite))
    assert tree(out) == {}


@pytest.mark.parametrize("name", FILES)
def test_a_folder_becomes_a_pipeline_when_everything_else_is_there(model_file, tmp_path, monkeypatch, name):
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
def test_replacing_leaves_nothing_of_what_was_there(model_file, tmp_path, layout):
    once, twice = tmp_path / "once.ckpt", tmp_path / "twice.ckpt"
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
            str(imported),
            out=str(tmp_path / f"{imported.name}.out"),
            network=None if layout != "flat" else {"name": "unet", **asdict(SMALL)},
        )
        assert same(import_checkpoint(spec).model.state, weights(2))


@pytest.mark.parametrize("layout", ["safetensors", "flat"])
@pytest.mark.parametrize("option", [{"records": "records.jsonl"}, {"license": "mit"}])
def test_a_single_file_has_no_model_card(layout, option):
    with pytest.raises(ValueError, match=f"layout={layout} has no model card"):
        ExportSpec("a", "b", layout=layout, **option)


def test_only_a_model_card_asks_for_results(model_file, tmp_path):
    source, asked = model_file(), []

    def results(of):
        asked.append(of)
        return ()

    for layout in ("safetensors", "flat", "diffusers"):
        assert asked == []
        export_checkpoint(ExportSpec(source, str(tmp_path / f"out.{layout}"), layout=layout), results)
    assert asked == [weights_hash(weights())]


def test_the_home_folder_can_be_given_short(model_file, tmp_path, monkeypatch):
    model_file()
    monkeypatch.setenv("HOME", str(tmp_path))
    paths, _ = export_checkpoint(ExportSpec("~/model.safetensors", "~/out/flat.pt", layout="flat"))
    assert paths == [tmp_path / "out" / "flat.pt"]
    assert paths[0].is_file()


# ------------------------------------------------------------------------------------------------- which weights


@pytest.mark.parametrize(("label", "seed"), [("raw", 1), ("ema", 2)])
def test_a_training_checkpoint_gives_the_weights_that_were_asked_for(training_file, tmp_path, label, seed):
    for layout in ("safetensors", "flat", "diffusers"):
        asked = []
        spec = ExportSpec(training_file, str(tmp_path / f"out.{layout}"), layout=layout, weights=label)
        export_checkpoint(spec, lambda of, asked=asked: asked.append(of) or ())
        assert asked == ([weights_hash(weights(seed))] if layout == "diffusers" else [])
    assert same(torch.load(tmp_path / "out.flat", weights_only=True), weights(seed))
    for layout in ("safetensors", "diffusers"):
        found = import_checkpoint(ImportSpec(str(tmp_path / "in"), "", str(tmp_path / f"out.{layout}"), overwrite=True))
        assert (found.model.weights, found.model.step) == (label, 7)
        assert same(found.model.state, weights(seed))
    assert ExportSpec(training_file, "out").weights == "ema"


def test_weights_that_a_file_does_not_have_are_not_exported(model_file, tmp_path):
    with pytest.raises(UserError, match="holds raw weights only; choose weights=raw"):
        export_checkpoint(ExportSpec(model_file("raw"), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- the model card


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("ema", "Weights: averaged (EMA) SHA-256"),
        ("raw", "Weights: raw, not averaged, SHA-256"),
        ("unlabelled", "Weights: whether averaged is not known, SHA-256"),
    ],
)
def test_the_card_says_what_the_weights_are(model_file, tmp_path, label, words):
    source = model_file(label, origin={"file": "diffusion.ckpt", "layout": "flat"})
    out = tmp_path / "my digits"
    export_checkpoint(ExportSpec(source, str(out), weights="ema" if label == "ema" else "raw"))
    _, text = card_of(out)
    digest = weights_hash(weights())[:16]
    assert f"{words} `{digest}` at step 790,000, imported from `diffusion.ckpt`.\n" in text
    assert text.startswith("# my digits\n")
    assert "DDPM's U-Net trained on digits: 1x8x8 images in [-1, 1]," in text
    count = sum(value.numel() for value in weights().values())
    assert f"\n{count:,} parameters, noise schedule linear with T=1000, prediction eps.\n" in text
    averaged, raw, unknown = "averaged (EMA)" in text, "raw, not averaged" in text, "is not known" in text
    assert [averaged, raw, unknown] == [label == "ema", label == "raw", label == "unlabelled"]


def test_the_card_says_nothing_that_is_not_known(model_file, tmp_path):
    oblong = replace(SMALL, image_size=(8, 12), channels=2)
    spec = ModelSpec("unet", oblong, cosine_schedule(20), "v")
    export_checkpoint(ExportSpec(model_file(spec=spec, step=None), str(tmp_path / "out")))
    front, text = card_of(tmp_path / "out")
    assert front == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["ddim", "ddpm", "diffusers", "unconditional-image-generation"],
    }
    assert "DDPM's U-Net: 2x8x12 images" in text
    assert "noise schedule cosine with T=20, prediction v." in text
    digest = weights_hash(weights(spec=oblong))[:16]
    assert f"Weights: averaged (EMA) SHA-256 `{digest}`.\n" in text
    assert "None were recorded for these weights." in text
    assert "| metric |" not in text


def test_the_front_matter_holds_the_results_as_the_hub_reads_them(model_file, tmp_path):
    out = tmp_path / 'the "best": 1'
    export_checkpoint(ExportSpec(model_file(), str(out), license="cc-by-nc-4.0"), lambda of: RESULTS)
    front, text = card_of(out)
    task, data = {"type": "unconditional-image-generation"}, {"name": "cifar10/train", "type": "cifar10/train"}
    assert front == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["ddim", "ddpm", "diffusers", "unconditional-image-generation"],
        "license": "cc-by-nc-4.0",
        "datasets": ["digits"],
        "model-index": [
            {
                "name": 'the "best": 1',
                "results": [
                    {
                        "task": task,
                        "dataset": data,
                        "metrics": [{"type": "fid_50k", "name": "fid_50k, ddim eta=0 S=50", "value": 4.6712345}],
                    },
                    {
                        "task": task,
                        "dataset": data,
                        "metrics": [{"type": "fid_50k", "name": "fid_50k, σ̂ S=1000", "value": 3.0}],
                    },
                ],
            }
        ],
    }
    assert "| fid_50k | ddim eta=0 S=50 | 4.671 | fid_50k: 50,000 images, tau quad, seed 0 |\n" in text
    assert "| fid_50k | σ̂ S=1000 | 3 | fid_50k: 50,000 images, tau full, seed 0 |\n" in text
    assert "None were recorded" not in text


@pytest.mark.parametrize(
    "value",
    [
        0.5,
        1234567.0,
        5e-05,
    ],
)
def test_a_result_of_any_size_stays_a_number(model_file, tmp_path, value):
    out = tmp_path / "model"
    export_checkpoint(ExportSpec(model_file(), str(out)), lambda of: [replace(RESULTS[0], value=value)])
    front, _ = card_of(out)
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == value


def test_a_card_has_the_name_of_the_folder_however_it_is_given(model_file, tmp_path, monkeypatch):
    source = model_file()
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path / "digits")
    export_checkpoint(ExportSpec(source, "."), lambda of: RESULTS)
    front, text = card_of(Path())
    assert text.startswith("# digits\n")
    assert front["model-index"][0]["name"] == "digits"


def test_the_hub_reads_the_card(model_file, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    out = tmp_path / "model"
    export_checkpoint(ExportSpec(model_file(), str(out), license="mit"), lambda of: RESULTS)
    data = hub.ModelCard.load(out / "README.md").data
    assert (data.license, data.datasets, data.library_name, data.model_name) == (
        "mit",
        ["digits"],
        "diffusers",
        "model",
    )
    assert [(r.metric_type, r.metric_value, r.dataset_name) for r in data.eval_results] == [
        (r.metric, r.value, r.reference) for r in RESULTS
    ]


def test_the_example_in_the_card_runs(hf, model_file, tmp_path):
    out = tmp_path / "model"
    export_checkpoint(ExportSpec(model_file(), str(out)))
    _, text = card_of(out)
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    names = {}
    exec(example.replace("PATH", str(out)).replace("steps=50", "steps=2"), names)
    assert [image.size for image in names["images"]] == [(8, 8)] * 4
    assert type(names["pipeline"]).__name__ == "DDIMPipeline"


# ------------------------------------------------------------------------------------------------- a flat state dict


def test_a_flat_file_is_the_bare_state_dict(model_file, tmp_path):
    paths, _ = export_checkpoint(ExportSpec(model_file(), str(tmp_path / "flat.ckpt"), layout="flat"))
    assert paths == [tmp_path / "flat.ckpt"]
    content = torch.load(paths[0], weights_only=True)
    assert type(content) is dict
    network = UNet(SMALL)
    network.load_state_dict(content)
    assert same(network.state_dict(), weights())


def test_a_flat_file_needs_no_suffix(model_file, tmp_path):
    export_checkpoint(ExportSpec(model_file(), str(tmp_path / "flat"), layout="flat"))
    assert same(torch.load(tmp_path / "flat", weights_only=True), weights())


@pytest.mark.parametrize(
    ("label", "changes", "unsaid"),
    [
        ("unlabelled", {}, []),
        ("ema", {}, ["weights=ema"]),
        ("raw", {}, ["weights=raw"]),
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
def test_what_a_flat_file_cannot_say_is_said(model_file, tmp_path, monkeypatch, label, changes, unsaid):
    monkeypatch.setitem(PRESETS, "small", SMALL)  # the others are too large to write
    source = model_file(label, replace(MODEL, **changes))
    spec = ExportSpec(source, str(tmp_path / "flat.pt"), layout="flat", weights="raw" if label == "raw" else "ema")
    sentence = f"a flat state dict cannot say {', '.join(unsaid)}; give it when importing"
    assert export_checkpoint(spec)[1] == ([sentence] if unsaid else [])


@pytest.mark.parametrize("changes", [{"num_groups": 2}, {"image_size": (16, 16), "attn_resolutions": (8,)}], ids=str)
def test_a_network_that_is_a_preset_by_its_shapes_alone_is_said(model_file, tmp_path, monkeypatch, changes):
    """Importing would take the preset, whose images are others."""
    monkeypatch.setitem(PRESETS, "small", SMALL)
    source = model_file("unlabelled", replace(MODEL, network_spec=replace(SMALL, **changes)))
    _, warnings = export_checkpoint(ExportSpec(source, str(tmp_path / "flat.pt"), layout="flat"))
    assert len(warnings) == 1
    assert "network=..." in warnings[0]


def test_a_flat_file_with_what_it_cannot_say_is_the_same_model(model_file, tmp_path):
    spec = replace(MODEL, schedule=linear_schedule(20, 0.001, 0.3), prediction="v")
    export_checkpoint(ExportSpec(model_file(spec=spec), str(tmp_path / "flat.pt"), layout="flat"))
    back = import_checkpoint(
        ImportSpec(
            str(tmp_path / "in"),
            "",
            str(tmp_path / "flat.pt"),
            weights="ema",
            network={"name": "unet", **asdict(SMALL)},
            schedule=ScheduleSpec("linear", T=20, beta_start=0.001, beta_end=0.3),
            prediction="v",
        )
    )
    assert spec.differences(back.model.spec) == []
    assert back.model.weights == "ema"
    assert load_model(back.path).weights_hash == weights_hash(weights())


# ------------------------------------------------------------------------------------------------- back in

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
@pytest.mark.parametrize("label", ["ema", "raw", "unlabelled"])
@pytest.mark.parametrize("layout", ["safetensors", "diffusers"])
def test_an_export_comes_back_as_the_same_model(model_file, tmp_path, spec, label, layout):
    out = tmp_path / "out"
    option = "raw" if label == "raw" else "ema"
    export_checkpoint(ExportSpec(model_file(label, spec), str(out), layout=layout, weights=option))
    back = import_checkpoint(ImportSpec(str(tmp_path / "in"), "", str(out))).model
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
    back = read_model(tmp_path / "out")
    assert same(back.state, weights())
    assert (back.weights, back.step, back.origin) == ("ema", 790_000, origin)
    assert back.spec.to_dict() | {"schedule": None} == MODEL.to_dict() | {"schedule": None}


@pytest.fixture(scope="module")
def hf():
    """The library diffusers, without its bars and advice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("diffusers")
    logging = library.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield library
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_what_diffusers_saves_of_an_export_comes_back_as_the_same_model(hf, model_file, tmp_path, spec, safe):
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
