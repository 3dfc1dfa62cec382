"""The model card (README.md) of an exported folder: the model, its measured results, how to sample from it."""

from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from ddim.checkpoints.model import UNLABELLED, StoredModel, weights_hash


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
    data = f" trained on {spec.data}" if spec.data else ""
    parameters = sum(value.numel() for value in model.state.values())
    noise = f"noise schedule {spec.schedule.name} with T={spec.schedule.T}"
    return f"""\
{_front_matter(name, model, results, license)}
# {name}

DDPM's U-Net{data}: {spec.network_spec.channels}x{height}x{width} images in [-1, 1],
{parameters:,} parameters, {noise}, prediction {spec.prediction}.
Weights: {label} SHA-256 `{weights_hash(model.state)[:16]}`{step}{source}.

```python
from diffusers import DDIMPipeline

pipeline = DDIMPipeline.from_pretrained("{location}")     # {"this folder" if location == "PATH" else "on the hub"}
images = pipeline(batch_size=4, num_inference_steps=50, eta=0.0).images
```

The scheduler neither clips nor thresholds, and ends at alpha_bar = 1, as in the DDIM paper. It uses every
(T // steps)-th time, starting at 0: the official implementation's `uniform` rule if the number of steps divides T.
The rule `quad`, used for the paper's CIFAR-10 numbers, does not exist in diffusers.

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


def _front_matter(name: str, model: StoredModel, results: Sequence[Result], license: str | None) -> str:
    values: dict[str, object] = {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["ddim", "ddpm", "diffusers", "unconditional-image-generation"],
    }
    if license:
        values["license"] = license
    if model.spec.data:
        values["datasets"] = [model.spec.data]
    if results:
        entries = [
            {
                "task": {"type": "unconditional-image-generation"},
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
