"""The model card (README.md) of an exported folder: the model, its measured results, how to sample from it."""

from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from ddim.checkpoints.model import UNLABELLED, StoredModel, saw_labels_only, weights_hash

FOLDER = "folder"  # images of the user's own, which are no data set of the hub


@dataclass(frozen=True)
class Result:
    """One measured number.

    Attributes:
        metric: name with the number of images, for example fid_50k.
        reference: the data set it is measured against.
        sampler: human-readable, for example "η=0.0 S=50".
        value: the number.
        protocol: one line with everything the number depends on.
    """

    metric: str
    reference: str
    sampler: str
    value: float
    protocol: str


def model_card(
    name: str, model: StoredModel, results: Sequence[Result], license: str | None, location: str = "PATH"
) -> str:
    """Return the README.md of a model: YAML front matter for the Hugging Face hub, and Markdown.

    `location` is where its example loads the model from.
    """
    spec = model.spec
    height, width = spec.network_spec.image_size
    step = "" if model.step is None else f" at step {model.step:,}"
    labels = {"ema": "EMA,", "online": "online (no EMA),", UNLABELLED: "EMA or online is not known,"}
    label = labels.get(model.weights, f"EMA ({model.weights}),")
    source = f", imported from `{model.origin['file']}`" if "file" in model.origin else ""
    category = model.recipe.get("data.category")
    on = "a folder of images" if spec.data == FOLDER else spec.data + (f" ({category})" if category else "")
    data = f" trained on {on}" if on else ""
    parameters = sum(value.numel() for value in model.state.values())
    noise = f"noise schedule {spec.schedule.name} with T={spec.schedule.T}"
    return f"""\
{_front_matter(name, model, results, license)}
# {name}

DDPM's U-Net{data}: {spec.network_spec.channels}x{height}x{width} images in [-1, 1],
{parameters:,} parameters, {noise}, prediction {spec.prediction}.
Weights: {label} SHA-256 `{weights_hash(model.state)[:16]}`{step}{source}.

```python
{"import torch" + chr(10) if model.spec.num_classes else ""}from diffusers import DDIMPipeline

pipeline = DDIMPipeline.from_pretrained("{location}")     # {"this folder" if location == "PATH" else "on the hub"}
{_example(model)}
```

The scheduler neither clips nor thresholds, and ends at alpha_bar = 1, as in the DDIM paper. It uses every
(T // steps)-th time, starting at 0: the official implementation's `uniform` rule if the number of steps divides T.
The rule `quad`, used for the paper's CIFAR-10 numbers, does not exist in diffusers.

If samples are blown out to black and white, as those of a network that was trained little, clip its prediction of x_0:
`pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, clip_sample=True)`.

## Results

{_results(results)}

## Citation

```bibtex
@inproceedings{{song2021denoising,
  title     = {{Denoising Diffusion Implicit Models}},
  author    = {{Song, Jiaming and Meng, Chenlin and Ermon, Stefano}},
  booktitle = {{International Conference on Learning Representations}},
  year      = {{2021}}
}}
```
"""


def _example(model: StoredModel) -> str:
    """Return the lines that sample; the pipeline gives the network no labels, so a conditional one takes a loop."""
    K = model.spec.num_classes
    if K is None:
        return "images = pipeline(batch_size=4, num_inference_steps=50, eta=0.0).images"
    names = f"; {', '.join(model.spec.classes[:10])}{', ...' * (K > 10)}" if model.spec.classes else ""
    w, guidance = "1.0", "classifier-free guidance, 0 for none"
    if saw_labels_only(model):
        w, guidance = "0.0", "no guidance: in training there was no image without its label"
    return f"""\
unet, scheduler, w = pipeline.unet, pipeline.scheduler, {w}    # w: {guidance}
y, none = torch.arange(4) % {K}, torch.full((4,), {K})    # labels 0..{K - 1}{names}; {K} is no label
x = torch.randn(4, {", ".join(map(str, model.spec.image_shape))})
scheduler.set_timesteps(50)
for t in scheduler.timesteps:
    with torch.no_grad():
        output = (1 + w) * unet(x, t, y).sample - w * unet(x, t, none).sample
    x = scheduler.step(output, t, x, eta=0.0).prev_sample
images = (x / 2 + 0.5).clamp(0, 1)"""


def _front_matter(name: str, model: StoredModel, results: Sequence[Result], license: str | None) -> str:
    task = "unconditional-image-generation"
    values: dict[str, object] = {"library_name": "diffusers", "pipeline_tag": task}
    if model.spec.num_classes is not None:  # for which the hub has no task
        task = "class-conditional-image-generation"
        del values["pipeline_tag"]
    values["tags"] = ["ddim", "ddpm", "diffusers", task]
    if license:
        values["license"] = license
    if model.spec.data not in ("", FOLDER):
        values["datasets"] = [model.spec.data]
    if results:
        entries = [
            {
                "task": {"type": task},
                "dataset": {"name": result.reference, "type": result.reference},
                "metrics": [
                    {"type": result.metric, "name": f"{result.metric}, {result.sampler}", "value": result.value}
                ],
            }
            for result in results
        ]
        values["model-index"] = [{"name": name, "results": entries}]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _results(results: Sequence[Result]) -> str:
    if not results:
        return "No results were recorded for these weights."
    lines = ["| metric | sampler | value | protocol |", "|---|---|---|---|"]
    lines += [f"| {r.metric} | {r.sampler} | {r.value:.4g} | {r.protocol} |" for r in results]
    return "\n".join(lines)
