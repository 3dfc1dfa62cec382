"""The jobs of a sweep as they are known before it starts: the configurations that Hydra composes for each."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from ddim.errors import UserError
from ddim.results.records import code_revision

pytestmark = pytest.mark.integration
SWEEPS: dict[str, dict[str, list[str]]] = {
    "values": {"checkpoint": ["a.ckpt"], "sampler.S": ["5", "10"], "sampler.eta": ["0.0", "0.5"], "n": ["7", "9"]},
    "groups": {"checkpoint": ["a.ckpt"], "sampler": ["ddim", "unipc"], "sampler.S": ["5", "null"], "data": ["digits"]},
    "new keys": {"checkpoint": ["'a=b.ckpt'"], "+sampler.kwargs.order": ["2", "3"], "sampler.S": ["5", "10"]},
    "text": {"checkpoint": ["'a b.ckpt'", "~/c.ckpt"], "name": ["x", "'1'"], "data.size": ["[8,8]", "[9,9]"]},
    "an experiment": {"experiment": ["table_digits"], "sampler": ["ddpm"], "sampler.S": ["5", "10"]},
}


@pytest.mark.parametrize("name", SWEEPS)
def test_jobs_are_those_that_hydra_composes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    from _jobs import CONFIGS, sweep_jobs, to_plain
    from hydra import compose, initialize_config_dir

    sweep = {key: [value.replace("~", str(Path.home())) for value in values] for key, values in SWEEPS[name].items()}
    words = [f"{key}={','.join(values)}" for key, values in sweep.items()]
    jobs = sweep_jobs("evaluate", ["-m", *words])
    assert jobs is not None
    assert jobs[1]
    each = [
        [f"{key}={value}" for key, value in zip(sweep, job, strict=True)] for job in itertools.product(*sweep.values())
    ]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        expected: list[dict[str, Any]] = [to_plain(compose("evaluate", job)) for job in each]
    assert jobs[0] == expected


def test_the_commit_is_asked_before_a_job(run, monkeypatch, another_commit) -> None:
    def train(spec, config):
        another_commit()
        assert code_revision() == "a" * 40
        raise UserError("asked")

    monkeypatch.setattr("ddim.training.run.train", train)
    assert run("train", "experiment=digits").err == "error: asked\n"


@pytest.mark.parametrize("word", ["n=abc", "first=null"])
def test_a_sweep_leaves_a_wrong_number_to_its_job(run, word) -> None:
    outcome = run("sample", "-m", "checkpoint=digits", "format=png", "overwrite=true", word)
    assert outcome.code == 2
    assert re.fullmatch(rf"error: {word.split('=')[0]}=\S+ must be an integer, .*", outcome.err.splitlines()[-1])
