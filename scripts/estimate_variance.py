"""Estimate what the optimal variance of the reverse step needs (Analytic-DPM): E||ε̂||² at each time, in a file.

python scripts/estimate_variance.py checkpoint=PATH data=cifar10
python scripts/estimate_variance.py --help

The file is for sampler=analytic of the same checkpoint, in any script: sampler.kwargs.file=FILE
"""

import dataclasses
from typing import Any

from _cli import entry, pick_device
from _last_words import command_line, of_model


def main(config: dict[str, Any]) -> None:
    """Estimate as `config` says; print the file and how to use it."""
    from ddim.config import build, changed_words
    from ddim.evaluation.variance import EstimateVarianceSpec, write_variance

    pick_device(config.get("compute"), "device", without_float64=True)
    spec = build(EstimateVarianceSpec, config, "")
    content = write_variance(spec)
    pairs = zip(content["standard_error"], content["mean_square"], strict=True)
    relative = max((error / mean for error, mean in pairs if mean), default=0.0)
    print(f"largest standard error: {relative:.2g} of the estimate, from {spec.n:,} images")
    print(spec.path)
    fields = ("S", "spacing", "times", "steps_offset", "last_time")  # which decide the times
    times = []
    if (sampler := spec.sampler) is not None:  # the rule of `analytic` makes other steps of nfe evaluations
        times = changed_words("sampler", dataclasses.replace(sampler, S=sampler.steps, nfe=None), fields)
    print(command_line("sample", *of_model(spec), "sampler=analytic", *times, f"sampler.kwargs.file={spec.path}"))


if __name__ == "__main__":
    entry(main, "estimate_variance")
