"""The file that `write_tau` writes: its content, and what is refused before the network is evaluated."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ddim
from ddim.checkpoints import LoadedModel
from ddim.diffusion.noise import initial_noise
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.inference import search_tau
from ddim.inference.compute import ComputeSpec
from ddim.inference.generate import check_exact, check_sampler
from ddim.inference.search_tau import SearchTauSpec, write_tau
from ddim.inference.trajectories import SamplingContext, sample_from

pytestmark = pytest.mark.integration


@pytest.fixture
def spec(checkpoint: Path, tmp_path: Path) -> SearchTauSpec:
    sampler = SamplerSpec("dpm_solver_pp", None, S=2)
    compute = ComputeSpec("cpu", batch_size=2)
    return SearchTauSpec(
        str(checkpoint), str(tmp_path / "out"), "searched", compute, sampler, n=3, seed=2, candidates=6
    )


def test_the_commit_of_a_file_is_that_of_the_code_that_ran(
    spec: SearchTauSpec, monkeypatch: pytest.MonkeyPatch, another_commit: Callable[[], None]
) -> None:
    search = search_tau._search
    monkeypatch.setattr(search_tau, "_search", lambda *a: (another_commit(), search(*a))[1])
    assert write_tau(spec)["revision"] == "a" * 40


def test_the_file_states_times_errors_and_their_origin(spec: SearchTauSpec, model: LoadedModel) -> None:
    found = write_tau(spec)
    assert json.loads(spec.path.read_text()) == found
    assert [path.name for path in spec.path.parent.iterdir()] == ["searched.json"]
    assert (found["T"], found["S"], found["n"], found["seed"], found["first"]) == (50, 2, 3, 2, 1_000_000)
    assert found["sampler"] == {"rule": "dpm_solver_pp", "eta": None, "clip": "none", "last_time": 0}
    assert (found["weights"], found["weights_hash"]) == ("ema", model.weights_hash)
    assert {"searched", "linear", "quadratic", "cosine", "quad"} <= set(found["errors"])
    assert min(found["errors"].values(), key=lambda error: error["search"]) == found["errors"]["searched"]
    sampler = SamplerSpec("dpm_solver_pp", None, S=None, spacing=str(spec.path))
    assert sampler.tau(50) == tuple(found["tau"])
    # The error again, by the functions that figures sample with, on the images that the search has not seen.
    exact = SamplerSpec("adams_bashforth", None, order=3, S=3).at_times(range(1, 51))
    context, unseen = SamplingContext(model, spec.seed, spec.compute), range(1_000_003, 1_000_006)
    x_T = initial_noise(unseen, model.spec.image_shape, spec.seed)
    ends = [sample_from(context, chosen, x_T, unseen, lambda count: None) for chosen in (sampler, exact)]
    error = torch.dist(*ends) / ends[0].numel() ** 0.5
    assert found["errors"]["searched"]["held_out"] == pytest.approx(float(error), rel=1e-4)


def test_the_same_search_writes_the_same_file(spec: SearchTauSpec) -> None:
    spec = dataclasses.replace(spec, n=1, candidates=4)
    again = dataclasses.replace(spec, name="again")
    write_tau(spec)
    write_tau(again)
    assert again.path.read_bytes() == spec.path.read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "n=0 must be at least 1"),
        ({"first": 1 << 32}, "image numbers lie in"),
        ({"seed": -1}, "seed=-1"),
        ({"sampler": SamplerSpec(eta=1.0, S=3)}, "needs a deterministic sampler"),
        ({"sampler": SamplerSpec(S=None, spacing="explicit", times=(1, 9))}, "the search chooses the times"),
        ({"candidates": 1}, r"candidates=1 must lie in 2 \.\. 200"),
        ({"sampler": SamplerSpec(S=300)}, r"sampler.S=300 is more than 200"),
        ({"candidates": 1000}, r"candidates=1000 must lie in 2 \.\. 200"),
        ({"name": "../searched"}, "must be a file name without a folder"),
    ],
)
def test_values_out_of_range_are_refused(spec: SearchTauSpec, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(spec, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "nowhere.ckpt"}, "there is no checkpoint nowhere.ckpt"),
        ({"sampler": SamplerSpec(S=51)}, r"S=51 .*T=50"),
        ({"sampler": SamplerSpec(S=50, last_time=1)}, "S=50 is more than there are times above last_time=1"),
        ({"weights": "average"}, "weights 'average'"),
    ],
)
def test_bad_input_is_refused_before_the_search(
    spec: SearchTauSpec, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadedModel, "__call__", lambda *_: pytest.fail("the network was evaluated"))
    with pytest.raises(UserError, match=message):
        write_tau(dataclasses.replace(spec, candidates=60, **changes))
    assert not spec.path.exists()


def test_zero_terminal_snr_has_no_exact_trajectory(model: LoadedModel) -> None:
    zero = dataclasses.replace(model.spec, schedule=ddim.zero_terminal_snr(model.spec.schedule), prediction="v")
    check_sampler(dataclasses.replace(model, spec=zero), SamplerSpec(S=2))
    with pytest.raises(UserError, match="exact trajectories cannot start at alpha_bar=0"):
        check_exact(dataclasses.replace(model, spec=zero), SamplerSpec(S=2))
    exact = SamplerSpec("adams_bashforth", None, S=50, order=3, clip="x0")
    assert check_exact(model, SamplerSpec(S=2, clip="x0")) == exact


def test_an_earlier_file_is_replaced_on_demand_only(spec: SearchTauSpec) -> None:
    spec.path.parent.mkdir()
    spec.path.write_text("earlier")
    with pytest.raises(UserError, match=r"exists already; choose .* overwrite=true"):
        write_tau(spec)
    assert spec.path.read_text() == "earlier"
    write_tau(dataclasses.replace(spec, overwrite=True, n=1, candidates=3))
    assert json.loads(spec.path.read_text())["n"] == 1
