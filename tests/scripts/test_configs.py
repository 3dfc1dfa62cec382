"""Every file of configs/ composes into a spec, and the experiments say what the paper's tables need."""

import dataclasses
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import hydra
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from ddim.config import build
from ddim.data.datasets import DataSpec
from ddim.diffusion.labels import row_label
from ddim.diffusion.objective import REDUCTIONS, TIME_SAMPLERS
from ddim.diffusion.prediction import CLIP_POLICIES, PREDICTIONS
from ddim.diffusion.schedule import ScheduleSpec
from ddim.diffusion.spec import RULES, SamplerSpec
from ddim.diffusion.timesteps import SPACINGS, reference_quad_tau
from ddim.errors import UserError
from ddim.evaluation.fidelity import EvaluateSpec
from ddim.evaluation.metrics import MetricSpec
from ddim.evaluation.reconstruction import ReconstructSpec
from ddim.figures.paper_figures import FigureSpec
from ddim.inference.compute import ComputeSpec
from ddim.inference.sample_files import SampleSpec
from ddim.networks import UNetSpec, build_network
from ddim.training.callbacks import GridSpec
from ddim.training.ema import EMASpec
from ddim.training.loggers import LoggerSpec
from ddim.training.module import ObjectiveSpec, OptimSpec
from ddim.training.spec import TrainerSpec, TrainSpec

CONFIGS = Path(__file__).parents[2] / "configs"
SPECS: dict[str, Any] = {
    "train": TrainSpec,
    "evaluate": EvaluateSpec,
    "sample": SampleSpec,
    "reconstruct": ReconstructSpec,
    "figures": FigureSpec,
}
NEEDED = {main: [] if main == "train" else ["checkpoint=a.ckpt"] for main in SPECS}
NEEDED["figures"].append("figure=all")
# What else must be said where an option leaves something to the user, or where the networks have other levels.
WITH = {
    "data=folder": ["data.root=cats", "data.size=[32,32]"],
    "data=digits": ["network=unet_digits"],
    "data=celeba": ["network=unet_celeba"],
    "data=lsun_bedroom": ["network=unet_lsun"],
    "data=lsun_church": ["network=unet_lsun"],
    "network=unet_digits": ["data=digits"],
    "network=unet_celeba": ["data=celeba"],
    "network=unet_lsun": ["data=lsun_church"],
    "schedule=custom": ["schedule.betas=[0.1,0.2]", "grid.sampler.S=2"],
}


@pytest.fixture(scope="module", autouse=True)
def search_path() -> Iterator[None]:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def compose(main: str, *overrides: str, with_hydra: bool = False) -> DictConfig:
    return hydra.compose(main, [*NEEDED[main], *overrides], return_hydra_config=with_hydra)


@cache
def spec_of(main: str, *overrides: str) -> Any:
    values = OmegaConf.to_container(compose(main, *overrides), resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    if "compute" in values:
        values["compute"]["device"] = "cpu"
    return build(SPECS[main], values, "")


def group_of(main: str) -> list[str]:
    """The groups in the defaults list of a main config, except the experiments."""
    defaults = OmegaConf.load(CONFIGS / f"{main}.yaml").defaults
    names = [next(iter(entry)) for entry in defaults if OmegaConf.is_dict(entry)]
    return [name for name in names if "@" not in name and name not in ("experiment", "debug")]


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


# Encoding is deterministic, and TensorBoard is for training.
REFUSED = {("reconstruct", f"sampler={option}") for option in options("sampler") if option != "ddim"}
REFUSED |= {(main, "logger=tensorboard") for main in ("evaluate", "reconstruct")}
CHOICES = [
    choice
    for main in SPECS
    for group in group_of(main)
    for option in options(group)
    if (choice := (main, f"{group}={option}")) not in REFUSED
]
# The script that an experiment belongs to is named by the command at its head.
EXPERIMENTS = {
    name: re.findall(rf"scripts/(\w+)\.py.* experiment={name}\b", (CONFIGS / "experiment" / f"{name}.yaml").read_text())
    for name in options("experiment")
}


def test_every_group_has_options() -> None:
    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir()} - {"experiment", "debug", "hydra"}
    assert {choice.partition("=")[0] for _, choice in CHOICES} == groups


@pytest.mark.parametrize(("main", "choice"), CHOICES, ids=map(":".join, CHOICES))
def test_every_option_of_every_group_makes_a_spec(main: str, choice: str) -> None:
    others = [extra for extra in WITH.get(choice, []) if main == "train" or not extra.startswith("network")]
    spec = spec_of(main, choice, *others)
    if main == "train":
        model = spec.model_spec()
        assert model.image_shape == (spec.data.channels, *spec.data.size)
        spec.grid.sampler.tau(model.schedule.T)


@pytest.mark.parametrize(("main", "choice"), sorted(REFUSED))
def test_options_that_do_not_apply_are_refused(main: str, choice: str) -> None:
    with pytest.raises(UserError):
        spec_of(main, choice)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_makes_a_spec(name: str) -> None:
    assert EXPERIMENTS[name], "an experiment is headed by its command"
    [main] = set(EXPERIMENTS[name]) - ({"evaluate"} if "train" in EXPERIMENTS[name] else set())
    spec = spec_of(main, f"experiment={name}")
    shared = {"table_digits": "digits", "table1_cifar10_sigma_hat": "table1_cifar10"}
    assert spec.name == shared.get(name, name)
    assert spec.output_dir == f"outputs/{main}/{spec.name}"
    if main == "train":
        spec.model_spec()
    header = (CONFIGS / "experiment" / f"{name}.yaml").read_text().partition("\ndefaults")[0]
    assert header.startswith("# @package _global_\n")
    assert re.search(r"Cost|minute", header)
    assert re.search(r"Expected|FID", header) or name == "digits"


def keys(path: str) -> set[str]:
    return set(OmegaConf.load(CONFIGS / f"{path}.yaml")) - {"defaults", "hydra"}


def group_values(group: str, option: str) -> dict[str, Any]:
    """The values of an option, those of the options that it starts from included."""
    own = OmegaConf.to_container(OmegaConf.load(CONFIGS / group / f"{option}.yaml"))
    assert isinstance(own, dict)
    values: dict[str, Any] = {}
    for base in own.pop("defaults", []):
        values |= group_values(group, base)
    return values | own


def fields(spec_type: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(spec_type)}


DEFAULTS = {
    "compute": ("default", ComputeSpec("auto")),
    "logger": ("csv", LoggerSpec()),
    "metric": ("inception", MetricSpec("inception")),
    "network": ("unet_cifar10", UNetSpec((32, 32))),
    "objective": ("ddpm", ObjectiveSpec()),
    "optim": ("ddpm", OptimSpec()),
    "sampler": ("ddim", SamplerSpec()),
    "trainer": ("default", TrainerSpec()),
}


@pytest.mark.parametrize("group", DEFAULTS)
def test_defaults_of_yaml_equal_those_of_the_spec(group: str) -> None:
    option, spec = DEFAULTS[group]
    values = group_values(group, option)
    if group == "network":
        values |= {"image_size": [32, 32], "channels": 3}
        values.pop("name")
    assert build(type(spec), values, group) == spec
    for other in options(group):  # --help shows every key
        assert set(group_values(group, other)) - {"name"} == fields(type(spec)), other


@pytest.mark.parametrize("group", DEFAULTS)
def test_a_preset_states_only_what_differs(group: str) -> None:
    for path in (CONFIGS / group).glob("*.yaml"):
        own = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(own, dict)
        bases = own.pop("defaults", [])
        assert bool(bases) == (path.stem != DEFAULTS[group][0]), path
        for base in bases:
            inherited = group_values(group, base)
            assert [key for key, value in own.items() if inherited[key] == value] == [], path


@pytest.mark.parametrize("main", SPECS)
def test_top_level_defaults_equal_those_of_the_spec(main: str) -> None:
    spec = spec_of(main)
    required = {
        f.name: getattr(spec, f.name)
        for f in dataclasses.fields(spec)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if main == "train":
        required |= {"trainer": TrainerSpec(), "schedule": spec.schedule}
        assert torch.equal(spec.schedule.build().alpha_bar, ScheduleSpec().build().alpha_bar)
    assert SPECS[main](**required) == spec


ALLOWED: dict[tuple[str, str], Any] = {
    ("figures", "figure"): FigureSpec,
    ("metric/inception", "extractor"): MetricSpec,
    ("metric/inception", "metrics"): MetricSpec,
    ("metric/inception", "reference_split"): MetricSpec,
    ("network/unet_cifar10", "init"): UNetSpec,
    ("objective/ddpm", "prediction"): PREDICTIONS,
    ("objective/ddpm", "reduction"): REDUCTIONS,
    ("objective/ddpm", "times"): TIME_SAMPLERS,
    ("reconstruct", "split"): ReconstructSpec,
    ("sample", "format"): SampleSpec,
    ("sampler/ddim", "clip"): CLIP_POLICIES,
    ("sampler/ddim", "rule"): RULES,
    ("sampler/ddim", "spacing"): (*SPACINGS, "explicit"),
    ("trainer/default", "precision"): TrainerSpec,
}


def literals(hint: Any) -> tuple[str, ...]:
    """The strings that a type hint such as tuple[Literal["a", "b"], ...] allows."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(value for inner in get_args(hint) for value in literals(inner))


def listed_values() -> dict[tuple[str, str], list[str]]:
    """The values that the comments of configs/ list, by file and key."""
    pattern = re.compile(r"^ *(\w+):.*# (?:one|any) of: ([\w, -]+)", re.MULTILINE)
    return {
        (str(path.relative_to(CONFIGS).with_suffix("")), key): values.rstrip().split(", ")
        for path in CONFIGS.rglob("*.yaml")
        for key, values in pattern.findall(path.read_text())
        if path.stem not in ("import_checkpoint", "export_checkpoint")
    }


def test_comments_list_the_allowed_values() -> None:
    listed = listed_values()
    assert set(listed) == set(ALLOWED)
    for (path, key), allowed in ALLOWED.items():
        values = literals(get_type_hints(allowed)[key]) if dataclasses.is_dataclass(allowed) else allowed
        assert listed[path, key] == list(values), (path, key)


def test_experiments_named_table_are_measured_and_others_trained() -> None:
    for name, scripts in EXPERIMENTS.items():
        expected = "reconstruct" if name.startswith("table2_") else "evaluate" if name.startswith("table") else "train"
        assert scripts[0] == expected, name


@pytest.mark.parametrize("option", options("debug"))
def test_debug_options_shorten_every_training(option: str) -> None:
    for name, (script, *_) in EXPERIMENTS.items():
        if script == "train":
            spec = spec_of("train", f"experiment={name}", f"debug={option}")
            spec.model_spec()
            assert spec.trainer.max_steps <= {"overfit": 500}.get(option, 100)
            assert spec.output_dir.startswith(f"outputs/debug/{name}/")


@pytest.mark.parametrize("main", SPECS)
def test_help_shows_every_key_at_the_top(main: str) -> None:
    assert keys(main) | set(group_of(main)) == fields(SPECS[main])


def test_help_shows_every_key_below_the_top_of_training() -> None:
    config = compose("train")
    assert set(config.ema) == fields(EMASpec)
    assert set(config.grid) == fields(GridSpec)
    assert set(config.grid.sampler) == fields(SamplerSpec)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("cifar10", 35_746_307),
        ("cifar10_official", 35_746_307),
        ("celeba", 78_700_803),
        ("bedroom", 113_673_219),
        ("church", 113_673_219),
        ("cifar10_small", 2_245_763),
    ],
)
def test_networks_have_the_stated_number_of_parameters(name: str, parameters: int) -> None:
    model = spec_of("train", f"experiment={name}").model_spec()
    with torch.device("meta"):
        network = build_network(model.network, model.network_spec)
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "steps", "batch", "lr", "dropout", "flip", "init", "reduction", "times", "warmup"),
    [
        ("cifar10", 800_000, 128, 2e-4, 0.1, True, "ddpm", "mean", "uniform", 5000),
        ("cifar10_official", 800_000, 128, 2e-4, 0.1, True, "torch", "sum", "antithetic", 0),
        ("celeba", 500_000, 128, 2e-4, 0.1, True, "ddpm", "mean", "uniform", 5000),
        ("bedroom", 2_400_000, 64, 2e-5, 0.0, True, "ddpm", "mean", "uniform", 5000),
        ("church", 1_200_000, 64, 2e-5, 0.0, True, "ddpm", "mean", "uniform", 5000),
    ],
)
def test_the_training_recipes_are_the_published_ones(
    name: str,
    steps: int,
    batch: int,
    lr: float,
    dropout: float,
    flip: bool,
    init: str,
    reduction: str,
    times: str,
    warmup: int,
) -> None:
    spec = spec_of("train", f"experiment={name}")
    assert (spec.trainer.max_steps, spec.trainer.batch_size) == (steps, batch)
    assert (spec.optim.lr, spec.optim.warmup, spec.optim.grad_clip) == (lr, warmup, 1.0)
    assert (spec.network["dropout"], spec.network["init"], spec.data.flip) == (dropout, init, flip)
    assert (spec.objective.prediction, spec.objective.reduction, spec.objective.times) == ("eps", reduction, times)
    assert (spec.schedule.name, spec.schedule.T) == ("linear", 1000)
    assert (spec.schedule.beta_start, spec.schedule.beta_end) == (1e-4, 0.02)
    assert spec.ema == EMASpec(0.9999)


def sweep(name: str) -> tuple[EvaluateSpec, dict[str, SamplerSpec], list[int]]:
    """Return an evaluation experiment: its spec, the sampler of each option that it sweeps over, and its S."""
    params = compose("evaluate", f"experiment={name}", with_hydra=True).hydra.sweeper.params
    assert set(params) - {"sampler.spacing"} == {"sampler", "sampler.S"}
    chosen = {s: spec_of("evaluate", f"experiment={name}", f"sampler={s}").sampler for s in params.sampler.split(",")}
    return spec_of("evaluate", f"experiment={name}"), chosen, [int(S) for S in str(params["sampler.S"]).split(",")]


TABLE1 = ["η=0.0", "η=0.2", "η=0.5", "η=1.0", "σ̂"]


@pytest.mark.parametrize(
    ("name", "data", "spacing", "steps", "rows"),
    [
        ("table1_cifar10", "cifar10", "quad_or_full", [10, 20, 50, 100, 1000], TABLE1),
        ("table3_bedroom", "lsun", "linear", [10, 20, 50, 100], ["η=0.0", "η=1.0"]),
        ("table3_church", "lsun", "linear", [10, 20, 50, 100], ["η=0.0", "η=1.0"]),
        ("table1_celeba", "celeba", "linear", [10, 20, 50, 100, 1000], TABLE1),
        ("table_digits", "digits", "uniform", [5, 10, 20, 50], ["η=0.0", "η=0.5", "η=1.0", "σ̂"]),
    ],
)
def test_the_sweeps_cover_their_tables(name: str, data: str, spacing: str, steps: list[int], rows: list[str]) -> None:
    spec, samplers, S = sweep(name)
    assert spec.data.name == data
    assert steps == S
    assert [row_label(sampler) for sampler in samplers.values()] == rows
    for sampler in samplers.values():
        assert (sampler.spacing, sampler.clip, sampler.last_time) == (spacing, "none", 0)
        for count in S:
            assert len(dataclasses.replace(sampler, S=count).tau(1000)) == count
    assert (spec.weights, spec.seed, spec.compute.bf16) == ("ema", 0, False)
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
    params = compose("evaluate", "experiment=table1_cifar10_sigma_hat", with_hydra=True).hydra.sweeper.params
    assert params["sampler.spacing"] == "quad,uniform"


def test_table2_encodes_the_test_set_up_to_time_T() -> None:
    name = "experiment=table2_reconstruction"
    spec = spec_of("reconstruct", name)
    assert (spec.data.name, spec.split, spec.n, spec.weights) == ("cifar10", "test", None, "ema")
    assert spec.paper == "table2_reconstruction"
    params = compose("reconstruct", name, with_hydra=True).hydra.sweeper.params
    steps = [int(S) for S in params["sampler.S"].split(",")]
    assert steps == [10, 20, 50, 100, 200, 500, 1000]
    assert all(dataclasses.replace(spec.sampler, S=S).tau(1000)[-1] == 1000 for S in steps)


def test_the_digits_experiments_fit_together() -> None:
    training, (sweeping, _, _) = spec_of("train", "experiment=digits"), sweep("table_digits")
    named = OmegaConf.load(CONFIGS / "experiment" / "table_digits.yaml").checkpoint
    assert named == f"{training.output_dir}/checkpoints/last.ckpt"
    assert sweeping.data == training.data
    assert sweeping.metric.extractor == "digits_classifier"


def test_the_defaults_are_those_of_cifar10() -> None:
    assert spec_of("train") == spec_of("train", "experiment=cifar10")
    assert spec_of("train").data == DataSpec("cifar10", (32, 32), 3)
    assert spec_of("evaluate").sampler == spec_of("sample").sampler == SamplerSpec()
