from typing import Any

import pytest

from ddim import SamplerSpec
from ddim.evaluation.job import sampler_settings
from ddim.results.records import record_key

CHOSEN = {"rule": "ddim", "eta": 0.0, "clip": "x0", "last_time": 0, "tau": [1, 2]}  # what records always stated


@pytest.mark.parametrize(
    ("fields", "added"),
    [
        ({}, {}),
        ({"S": None, "spacing": "2"}, {}),  # the times decide, not their name
        ({"clip_range": 2.0}, {"clip_range": 2.0}),
        ({"threshold_ratio": 0.9}, {"threshold_ratio": 0.9}),
        ({"threshold_ratio": 0.9, "threshold_max": 1.5}, {"threshold_ratio": 0.9, "threshold_max": 1.5}),
    ],
)
def test_later_fields_enter_the_key_where_they_are_set(fields: dict[str, Any], added: dict[str, Any]) -> None:
    settings = sampler_settings(SamplerSpec(**{"S": 2, "clip": "x0"} | fields), (1, 2))
    assert settings == CHOSEN | added
    assert record_key(settings) == record_key(CHOSEN | added)
