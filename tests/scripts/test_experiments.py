"""The experiments in configs/ are those of the paper: networks, training recipes, and what the sweeps cover."""

import dataclasses
import re

import pytest
import torch
from composed import CONFIGS, options, spec_of, sweep_params
from omegaconf import OmegaConf

from ddim.data.datasets import DataSpec
from ddim.diffusion.labels import row_label
from ddim.diffusion.spec import SamplerSpec
from ddim.diffusion.timesteps import reference_quad_tau
from ddim.evaluation.fidelity import EvaluateSpec
from ddim.evaluation.metrics import MetricSpec
from ddim.networks import build_network
from ddim.training.ema import EMASpec
from ddim.training.validation import EvalSpec

pytestmark = pytest.mark.integration

# The script that an experiment belongs to is named by the command at its head.
EXPERIMENTS = {
    name: re.findall(rf"scripts/(\w+)\.py.* experiment={name}\b", (CONFIGS / "experiment" / f"{name}.yaml").read_text())
    for name in options("experiment")
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_makes_a_spec(name: str) -> None:
    assert EXPERIMENTS[name], "an experiment is headed by its command"
    [main] = set(EXPERIMENTS[name]) - ({"evaluate"} if "train" in EXPERIMENTS[name] else set())
    spec = spec_of(main, f"experiment={name}")
    shared = {
        "table_digits": "digits",
        "table_digits_multinomial": "digits_multinomial",
        "table1_cifar10_sigma_hat": "table1_cifar10",
    }
    assert spec.name == shared.get(name, name)
    assert spec.output_dir == f"outputs/{main}/{spec.name}"
    if main == "train":
        spec.model_spec()
    header = (CONFIGS / "experiment" / f"{name}.yaml").read_text().partition("\ndefaults")[0]
    assert header.startswith("# @package _global_\n")
    assert re.search(r"Cost|minute", header)
    assert re.search(r"Expected|FID", header) or name == "digits"


def test_only_table_experiments_are_measured() -> None:
    for name, scripts in EXPERIMENTS.items():
        script = {
            "table2": "reconstruct",
            "table_inversion": "reconstruct",
            "table_likelihood": "likelihood",
            "table_solver_error": "solver_error",
            "table": "evaluate",
            "": "train",
        }
        expected = next(script[start] for start in script if name.startswith(start))
        assert scripts[0] == expected, name


@pytest.mark.integration
@pytest.mark.parametrize("option", options("debug"))
def test_debug_options_shorten_every_training(option: str) -> None:
    for name, (script, *_) in EXPERIMENTS.items():
        if script == "train":
            spec = spec_of("train", f"experiment={name}", f"debug={option}")
            spec.model_spec()
            assert spec.trainer.max_steps <= {"overfit": 500}.get(option, 100)
            assert spec.output_dir.startswith(f"outputs/debug/{name}/")


# Parameters; steps, batch size; learning rate, warm-up; dropout, flips, initialisation; reduction, times.
RECIPES = {
    "cifar10": (35_746_307, 800_000, 128, 2e-4, 5000, 0.1, True, "ddpm", "mean", "uniform"),
    "cifar10_official": (35_746_307, 800_000, 128, 2e-4, 0, 0.1, True, "torch", "sum", "antithetic"),
    "celeba": (78_700_803, 500_000, 128, 2e-4, 5000, 0.1, True, "ddpm", "mean", "uniform"),
    "bedroom": (113_673_219, 2_400_000, 64, 2e-5, 5000, 0.0, True, "ddpm", "mean", "uniform"),
    "church": (113_673_219, 1_200_000, 64, 2e-5, 5000, 0.0, True, "ddpm", "mean", "uniform"),
    "celeba_official": (78_700_803, 500_000, 128, 2e-4, 0, 0.1, True, "torch", "sum", "antithetic"),
    "bedroom_official": (113_673_219, 2_400_000, 64, 2e-5, 0, 0.0, True, "torch", "sum", "antithetic"),
    "church_official": (113_673_219, 1_200_000, 64, 2e-5, 0, 0.0, True, "torch", "sum", "antithetic"),
}


def parameters(name: str) -> int:
    model = spec_of("train", f"experiment={name}").model_spec()
    with torch.device("meta"):
        return sum(p.numel() for p in build_network(model.network, model.network_spec).parameters())


def test_the_small_network_has_the_stated_parameters() -> None:
    assert parameters("cifar10_small") == 2_245_763


@pytest.mark.parametrize("name", RECIPES)
def test_the_training_recipes_are_the_published_ones(name: str) -> None:
    spec = spec_of("train", f"experiment={name}")
    trainer, optim, objective, network = spec.trainer, spec.optim, spec.objective, spec.network
    assert RECIPES[name] == (
        *(parameters(name), trainer.max_steps, trainer.batch_size, optim.lr, optim.warmup),
        *(network["dropout"], spec.data.flip, network["init"], objective.reduction, objective.times),
    )
    official_lsun = name in ("bedroom_official", "church_official")
    clip, decay = (None, 0.999) if official_lsun else (1.0, 0.9999)
    assert (optim.grad_clip, objective.prediction, spec.ema) == (clip, "eps", EMASpec(decay))
    assert (spec.schedule.name, spec.schedule.T) == ("linear", 1000)
    assert (spec.schedule.beta_start, spec.schedule.beta_end) == (1e-4, 0.02)


def sweep(name: str) -> tuple[EvaluateSpec, dict[str, SamplerSpec], list[int]]:
    """Return an evaluation experiment: its spec, the sampler of each option that it sweeps over, and its S."""
    params = sweep_params("evaluate", name)
    assert set(params) - {"sampler.spacing"} == {"sampler", "sampler.S"}
    chosen = {s: spec_of("evaluate", f"experiment={name}", f"sampler={s}").sampler for s in params.sampler.split(",")}
    return spec_of("evaluate", f"experiment={name}"), chosen, [int(S) for S in str(params["sampler.S"]).split(",")]


ETAS = ["η=0.0", "η=0.2", "η=0.5", "η=1.0"]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "data", "spacing", "steps", "rows"),
    [
        ("table1_cifar10", "cifar10", "quad_or_full", [10, 20, 50, 100, 1000], [*ETAS, "σ̂ (clip x0_and_eps)"]),
        ("table3_bedroom", "lsun", "uniform", [10, 20, 50, 100], ["η=0.0", "η=1.0"]),
        ("table3_church", "lsun", "uniform", [10, 20, 50, 100], ["η=0.0", "η=1.0"]),
        ("table1_celeba", "celeba", "uniform", [10, 20, 50, 100, 1000], [*ETAS, "σ̂ (clip x0_and_eps)"]),
        ("table_digits", "digits", "uniform", [5, 10, 20, 50], ["η=0.0", "η=0.5", "η=1.0", "σ̂"]),
    ],
)
def test_the_sweeps_cover_their_tables(name: str, data: str, spacing: str, steps: list[int], rows: list[str]) -> None:
    spec, samplers, S = sweep(name)
    assert spec.data.name == data
    assert steps == S
    assert [row_label(sampler) for sampler in samplers.values()] == rows
    for sampler in samplers.values():
        clip = "x0_and_eps" if "clip" in row_label(sampler) else "none"
        assert (sampler.spacing, sampler.clip, sampler.last_time) == (spacing, clip, 0)
        for count in S:
            assert len(dataclasses.replace(sampler, S=count).tau(1000)) == count
    assert (spec.weights, spec.seed) == ("ema", 0)
    assert spec.compute.bf16 is False  # as the paper's networks were sampled
    if name != "table_digits":
        assert spec.paper == name
        assert (spec.n, spec.metric) == (50_000, MetricSpec("inception"))
        assert spec.metric.reference_split == "train"


def test_table1_cifar10_has_quad_times_and_the_full_chain() -> None:
    _, samplers, _ = sweep("table1_cifar10")
    for sampler in samplers.values():
        at = {S: dataclasses.replace(sampler, S=S).tau(1000) for S in (10, 20, 50, 100, 1000)}
        assert at.pop(1000) == tuple(range(1, 1001))
        assert at == {S: reference_quad_tau(1000, S) for S in at}


def test_one_sweep_has_the_four_variants_of_sigma_hat() -> None:
    (table, _, _), (spec, samplers, S) = sweep("table1_cifar10"), sweep("table1_cifar10_sigma_hat")
    assert dataclasses.replace(spec, sampler=table.sampler) == table
    assert ([row_label(sampler) for sampler in samplers.values()], S) == (
        ["σ̂", "σ̂ (clip x0_and_eps)"],
        [10, 20, 50, 100],
    )
    params = sweep_params("evaluate", "table1_cifar10_sigma_hat")
    assert params["sampler.spacing"] == "quad,uniform"


def test_table2_encodes_the_test_set_up_to_time_T() -> None:
    spec = spec_of("reconstruct", "experiment=table2_reconstruction")
    assert (spec.data.name, spec.split, spec.n, spec.weights) == ("cifar10", "test", None, "ema")
    assert spec.paper == "table2_reconstruction"
    steps = [int(S) for S in sweep_params("reconstruct", "table2_reconstruction")["sampler.S"].split(",")]
    assert steps == [10, 20, 50, 100, 200, 500, 1000]
    assert all(dataclasses.replace(spec.sampler, S=S).tau(1000)[-1] == 1000 for S in steps)


def test_the_digits_experiments_fit_together() -> None:
    training, (sweeping, _, _) = spec_of("train", "experiment=digits"), sweep("table_digits")
    named = OmegaConf.load(CONFIGS / "experiment" / "table_digits.yaml").checkpoint
    assert named == f"{training.output_dir}/checkpoints/last.ckpt"
    assert sweeping.data == training.data
    assert sweeping.metric.extractor == "digits_classifier"


def test_the_defaults_are_those_of_cifar10() -> None:
    assert dataclasses.replace(spec_of("train", "experiment=cifar10"), eval=EvalSpec()) == spec_of("train")
    assert spec_of("train").data == DataSpec("cifar10", (32, 32), 3)
    assert spec_of("evaluate").sampler == spec_of("sample").sampler == SamplerSpec()
