from typing import Any

import pytest

from ddim import SamplerSpec
from ddim.diffusion.labels import asked_steps, row_label, spacing_name
from ddim.evaluation.job import sampler_settings
from ddim.results.records import record_key

CHOSEN = {"rule": "ddim", "eta": 0.0, "clip": "x0", "last_time": 0, "tau": [1, 2]}  # what records always stated


@pytest.mark.parametrize(
    ("fields", "added"),
    [
        ({}, {}),
        ({"S": None, "spacing": "2"}, {}),  # the times decide, not their name
        ({"S": None, "nfe": 2}, {}),
        ({"clip_range": 2.0}, {"clip_range": 2.0}),
        ({"threshold_ratio": 0.9}, {"threshold_ratio": 0.9}),
        ({"threshold_ratio": 0.9, "threshold_max": 1.5}, {"threshold_ratio": 0.9, "threshold_max": 1.5}),
    ],
)
def test_later_fields_enter_the_key_where_they_are_set(fields: dict[str, Any], added: dict[str, Any]) -> None:
    settings = sampler_settings(SamplerSpec(**{"S": 2, "clip": "x0"} | fields), (1, 2))
    assert settings == CHOSEN | added
    assert record_key(settings) == record_key(CHOSEN | added)


@pytest.mark.parametrize(
    ("fields", "label", "spacing", "steps"),
    [
        ({}, "η=0.0 (clip x0)", "linear", 50),
        ({"clip_range": 2.0}, "η=0.0 (clip x0 to ±2.0)", "linear", 50),
        ({"threshold_ratio": 0.9}, "η=0.0 (clip x0, threshold 0.9)", "linear", 50),
        ({"threshold_ratio": 0.9, "threshold_max": 2.0}, "η=0.0 (clip x0, threshold 0.9 up to 2.0)", "linear", 50),
        ({"spacing": "leading", "S": 5}, "η=0.0 (clip x0)", "leading", 5),
        ({"spacing": "leading", "S": 5, "steps_offset": 1}, "η=0.0 (clip x0)", "leading+1", 5),
        ({"spacing": "10,20", "S": None}, "η=0.0 (clip x0)", "10,20", 30),
        ({"nfe": 7, "S": None}, "η=0.0 (clip x0)", "linear", 7),
        ({"nfe": 7, "S": None, "rule": "heun", "eta": None}, "Heun (clip x0)", "linear", 4),
    ],
)
def test_what_differs_has_another_name(fields: dict[str, Any], label: str, spacing: str, steps: int) -> None:
    sampler = SamplerSpec(**{"clip": "x0"} | fields)
    names = (row_label(sampler), spacing_name(sampler, sampler.tau(1000), 1000), asked_steps(sampler))
    assert names == (label, spacing, steps)
    assert len(sampler.tau(1000)) == steps
