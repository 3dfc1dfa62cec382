"""The model card of an exported folder."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from layouts import NETWORK, gaussian_weights

from ddim.checkpoints import ModelSpec, read_model, save_model, weights_hash
from ddim.checkpoints.convert.exporting import ExportSpec, export_checkpoint
from ddim.checkpoints.convert.model_card import Result
from ddim.diffusion.schedule import cosine_schedule

RESULTS = (
    Result("fid_50k", "cifar10/train", "ddim eta=0 S=50", 4.6712345, "fid_50k: 50,000 images, tau quad, seed 0"),
    Result("fid_50k", "cifar10/train", "σ̂ S=1000", 3.0, "fid_50k: 50,000 images, tau full, seed 0"),
)
FRONT = {
    "library_name": "diffusers",
    "pipeline_tag": "unconditional-image-generation",
    "tags": ["ddim", "ddpm", "diffusers", "unconditional-image-generation"],
}


def card_of(folder):
    """Return the front matter, read as the hub does, and the text after it."""
    empty, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front), text


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("ema", "Weights: EMA, SHA-256"),
        ("online", "Weights: online (no EMA), SHA-256"),
        ("unlabelled", "Weights: EMA or online is not known, SHA-256"),
    ],
)
def test_the_card_states_the_label_of_the_weights(model_file, tmp_path, label, words):
    source = model_file(label, origin={"file": "diffusion.ckpt", "layout": "flat"})
    out = tmp_path / "my digits"
    export_checkpoint(ExportSpec(source, str(out), weights="ema" if label == "ema" else "online"))
    _, text = card_of(out)
    digest = weights_hash(gaussian_weights(NETWORK))[:16]
    assert f"{words} `{digest}` at step 790,000, imported from `diffusion.ckpt`.\n" in text
    assert text.startswith("# my digits\n")
    assert "DDPM's U-Net trained on digits: 1x8x8 images in [-1, 1]," in text
    count = sum(value.numel() for value in gaussian_weights(NETWORK).values())
    assert f"\n{count:,} parameters, noise schedule linear with T=1000, prediction eps.\n" in text
    ema, online, unknown = "Weights: EMA, " in text, "Weights: online " in text, "is not known" in text
    assert [ema, online, unknown] == [label == "ema", label == "online", label == "unlabelled"]


def test_the_card_omits_what_is_not_known(model_file, tmp_path):
    oblong = replace(NETWORK, image_size=(8, 12), channels=2)
    spec = ModelSpec("unet", oblong, cosine_schedule(20), "v")
    export_checkpoint(ExportSpec(model_file(spec=spec, step=None), str(tmp_path / "out")))
    front, text = card_of(tmp_path / "out")
    assert front == FRONT
    assert "DDPM's U-Net: 2x8x12 images" in text
    assert "noise schedule cosine with T=20, prediction v." in text
    digest = weights_hash(gaussian_weights(oblong))[:16]
    assert f"Weights: EMA, SHA-256 `{digest}`.\n" in text
    assert "No results were recorded for these weights." in text
    assert "| metric |" not in text


def test_the_card_names_no_data_set_for_a_folder_of_images(model_file, tmp_path):
    spec = ModelSpec("unet", NETWORK, cosine_schedule(20), data="folder")
    export_checkpoint(ExportSpec(model_file(spec=spec), str(tmp_path / "out")))
    front, text = card_of(tmp_path / "out")
    assert front == FRONT
    assert "DDPM's U-Net trained on a folder of images: 1x8x8 images" in text


def test_the_card_names_the_category_of_lsun(model_file, tmp_path):
    spec = ModelSpec("unet", NETWORK, cosine_schedule(20), data="lsun")
    path = model_file(spec=spec, recipe={"data.category": "bedroom"})
    export_checkpoint(ExportSpec(path, str(tmp_path / "out")))
    assert "DDPM's U-Net trained on lsun (bedroom): 1x8x8 images" in card_of(tmp_path / "out")[1]


def test_the_front_matter_has_the_results_in_hub_format(model_file, tmp_path):
    out = tmp_path / 'the "best": 1'
    export_checkpoint(ExportSpec(model_file(), str(out), license="cc-by-nc-4.0"), lambda of: RESULTS)
    front, text = card_of(out)
    metrics = [("fid_50k, ddim eta=0 S=50", 4.6712345), ("fid_50k, σ̂ S=1000", 3.0)]
    results = [
        {
            "task": {"type": "unconditional-image-generation"},
            "dataset": {"name": "cifar10/train", "type": "cifar10/train"},
            "metrics": [{"type": "fid_50k", "name": name, "value": value}],
        }
        for name, value in metrics
    ]
    index = [{"name": 'the "best": 1', "results": results}]
    assert front == FRONT | {"license": "cc-by-nc-4.0", "datasets": ["digits"], "model-index": index}
    assert "| fid_50k | ddim eta=0 S=50 | 4.671 | fid_50k: 50,000 images, tau quad, seed 0 |\n" in text
    assert "| fid_50k | σ̂ S=1000 | 3 | fid_50k: 50,000 images, tau full, seed 0 |\n" in text
    assert "No results were recorded" not in text


@pytest.mark.parametrize("value", [0.5, 1234567.0, 5e-05])
def test_a_result_of_any_size_stays_a_number(model_file, tmp_path, value):
    out = tmp_path / "model"
    export_checkpoint(ExportSpec(model_file(), str(out)), lambda of: [replace(RESULTS[0], value=value)])
    front, _ = card_of(out)
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == value


def test_a_card_has_the_name_of_the_folder(model_file, tmp_path, monkeypatch):
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
    assert not names["pipeline"].scheduler.config.clip_sample
    (clipped,) = re.findall(r"`(pipeline\.scheduler = .*)`", text)
    exec(clipped, names)
    assert names["pipeline"].scheduler.config.clip_sample
    assert [image.size for image in names["images"]] == [(8, 8)] * 4
    assert type(names["pipeline"]).__name__ == "DDIMPipeline"


def test_the_example_of_a_conditional_network_samples(hf, model_file, tmp_path):
    """The code of the card runs, and makes images that depend on the label."""
    network = replace(NETWORK, classes=3)
    spec = ModelSpec("unet", network, cosine_schedule(20), "x0", classes=("cat", "dog", "bird"))
    source, out = model_file(spec=spec), tmp_path / "out"
    _, (warning,) = export_checkpoint(ExportSpec(source, str(out)))
    assert "README.md has an example that gives them" in warning
    front, text = card_of(out)
    assert "pipeline_tag" not in front
    assert "# w: classifier-free guidance" in text
    assert "labels 0..2; cat, dog, bird; 3 is no label" in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("PATH", str(out)).replace("(50)", "(2)")
    names = {}
    exec(code.replace("torch.randn(4, 1, 8, 8)", "torch.randn(1, 1, 8, 8).repeat(4, 1, 1, 1)"), names)
    images = names["images"]
    assert images.shape == (4, 1, 8, 8)
    assert torch.equal(images[0], images[3])  # of the same label
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize(("drop", "w"), [(None, 1.0), (0.1, 1.0), (0.0, 0.0)])
def test_the_example_guides_only_what_was_trained_for_it(model_file, tmp_path, drop, w):
    source = model_file(spec=ModelSpec("unet", replace(NETWORK, classes=3), cosine_schedule(20)))
    recipe = {} if drop is None else {"objective.label_drop": drop}
    save_model(replace(read_model(source), recipe=recipe), Path(source))
    export_checkpoint(ExportSpec(source, str(tmp_path / "out")))
    _, text = card_of(tmp_path / "out")
    assert f"unet, scheduler, w = pipeline.unet, pipeline.scheduler, {w}  " in text
    assert ("# w: no guidance: in training" in text) == (drop == 0)
