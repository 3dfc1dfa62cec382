"""Every option in configs/ composes into a spec; defaults, comments and --help agree with the specs."""

import dataclasses
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from composed import CONFIGS, SPECS, compose, group_values, options, spec_of
from omegaconf import OmegaConf

from ddim.checkpoints.convert.diffusers import read_sampler
from ddim.config import build
from ddim.diffusion.importance import LOSS_SECOND_MOMENT
from ddim.diffusion.inversion import INVERSIONS
from ddim.diffusion.learned_variance import VARIANCES
from ddim.diffusion.multinomial import LOSSES
from ddim.diffusion.objective import LOSS_WEIGHTS, REDUCTIONS, TIME_SAMPLERS
from ddim.diffusion.prediction import CLIP_POLICIES, PREDICTIONS
from ddim.diffusion.registry import DIFFUSERS, RULES
from ddim.diffusion.schedule import ScheduleSpec
from ddim.diffusion.spec import SamplerSpec
from ddim.diffusion.timesteps import SPACINGS
from ddim.errors import UserError
from ddim.evaluation.features import EXTRACTORS
from ddim.evaluation.fidelity import EvaluateSpec
from ddim.evaluation.likelihood import LikelihoodSpec
from ddim.evaluation.metrics import METRICS, MetricSpec
from ddim.evaluation.reconstruction import ReconstructSpec
from ddim.evaluation.variance import EstimateVarianceSpec
from ddim.figures.paper_figures import PictureSpec
from ddim.inference.auto import SETTINGS
from ddim.inference.compute import ComputeSpec
from ddim.inference.sample_files import SampleSpec
from ddim.networks import NETWORKS, UNetSpec
from ddim.results.plot_spec import PlotSpec
from ddim.training.callbacks import GridSpec
from ddim.training.ema import EMASpec
from ddim.training.loggers import LoggerSpec
from ddim.training.module import ObjectiveSpec, OptimSpec
from ddim.training.spec import TrainerSpec
from ddim.training.validation import EvalSpec

pytestmark = pytest.mark.integration

# What else is needed where an option leaves something to the user, or where the networks have other levels.
WITH = {
    "data=folder": ["data.root=cats", "data.size=[32,32]"],
    "data=digits": ["network=unet_digits"],
    "data=celeba": ["network=unet_celeba"],
    "data=lsun_bedroom": ["network=unet_lsun"],
    "data=lsun_church": ["network=unet_lsun"],
    "network=unet_digits": ["data=digits"],
    "network=unet_celeba": ["data=celeba"],
    "network=unet_lsun": ["data=lsun_church"],
    "network=categorical_unet_digits": ["data=digits", "objective=multinomial", "sampler@grid.sampler=multinomial"],
    "objective=multinomial": ["data=digits", "network=categorical_unet_digits", "sampler@grid.sampler=multinomial"],
    "sampler=diffusers": ["sampler.scheduler=DDIMScheduler"],
    "schedule=custom": ["schedule.betas=[0.1,0.2]", "grid.sampler.S=2"],
}


def group_of(main: str) -> list[str]:
    """The groups in the defaults list of a main config, except the experiments."""
    defaults = OmegaConf.load(CONFIGS / f"{main}.yaml").defaults
    names = [next(iter(entry)) for entry in defaults if OmegaConf.is_dict(entry)]
    return [name for name in names if "@" not in name and name not in ("experiment", "debug", "hparams_search")]


PLOTTING = ("evaluate", "reconstruct", "solver_error", "likelihood")
# Encoding and the search for times are deterministic, TensorBoard is for training, and analytic needs a file.
NOT_DDIM = [option for option in options("sampler") if option != "ddim"]
REFUSED = {(main, f"sampler={option}") for main in ("reconstruct", "encode", "likelihood") for option in NOT_DDIM}
NOISE = ("ddim_eta", "ddim_corrector", "ddpm", "sigma_hat", "sde_", "diffusers", "learned_variance", "multinomial")
NOISY = [name for name in options("sampler") if name.startswith(NOISE)]
REFUSED |= {(main, f"sampler={option}") for main in ("search_tau", "solver_error") for option in NOISY}
REFUSED |= {(main, "sampler=analytic") for main in SPECS if main != "train" and "sampler" in group_of(main)}
REFUSED |= {
    (main, "logger=tensorboard") for main in ("evaluate", "reconstruct", "solver_error", "metrics", "likelihood")
}
CHOICES = [
    choice
    for main in SPECS
    for group in group_of(main)
    for option in options(group)
    if (choice := (main, f"{group}={option}")) not in REFUSED
]


def test_every_group_has_options() -> None:
    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir()} - {
        "experiment",
        "debug",
        "hydra",
        "hparams_search",
        "wandb_sweep",
    }
    assert {choice.partition("=")[0] for _, choice in CHOICES} == groups


@pytest.mark.integration
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


def fields(spec_type: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(spec_type)}


AUTO_TRAINER = TrainerSpec(precision=None, tf32=None, channels_last=None, compile=None, winograd=None)
DEFAULTS = {
    "compute": ("auto", ComputeSpec("cpu", 0, **dict.fromkeys(SETTINGS))),
    "figure": ("all", PictureSpec("all")),
    "logger": ("csv", LoggerSpec()),
    "metric": ("inception", MetricSpec("inception")),
    "network": ("unet_cifar10", UNetSpec((32, 32))),
    "objective": ("ddpm", ObjectiveSpec()),
    "optim": ("ddpm", OptimSpec()),
    "sampler": ("ddim", SamplerSpec()),
    "trainer": ("auto", AUTO_TRAINER),
}


@pytest.mark.parametrize("group", DEFAULTS)
def test_defaults_of_yaml_equal_those_of_the_spec(group: str) -> None:
    option, spec = DEFAULTS[group]
    values = group_values(group, option)
    if group == "network":
        values |= {"image_size": [32, 32], "channels": 3}
        values.pop("name")
    if group == "compute":  # the scripts choose a device for auto
        values["device"] = "cpu"
    assert build(type(spec), values, group) == spec
    for other in options(group):  # --help shows every key
        keys = group_values(group, other)
        spec_type = NETWORKS[keys["name"]][0] if group == "network" else type(spec)
        assert set(keys) - {"name"} == fields(spec_type) - {"name"}, other


def test_exact_is_what_the_specs_are_without_settings() -> None:
    assert build(ComputeSpec, group_values("compute", "exact") | {"device": "cpu"}, "") == ComputeSpec("cpu")
    assert build(TrainerSpec, group_values("trainer", "exact"), "") == TrainerSpec()


@pytest.mark.parametrize(
    "main", [*("encode", "reconstruct", "solver_error"), *("likelihood", "search_tau", "estimate_variance")]
)
def test_what_measures_small_errors_is_in_float32(main: str) -> None:
    compute = spec_of(main).compute
    assert compute == dataclasses.replace(DEFAULTS["compute"][1], bf16=False, tf32=False)


@pytest.mark.parametrize("group", DEFAULTS)
def test_a_preset_states_only_what_differs(group: str) -> None:
    for path in (CONFIGS / group).glob("*.yaml"):
        own = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(own, dict)
        bases = own.pop("defaults", [])
        assert bool(bases) == (path.stem != DEFAULTS[group][0]), path
        for base in bases:
            inherited = group_values(group, base)
            assert [key for key, value in own.items() if inherited.get(key, ...) == value] == [], path


@pytest.mark.parametrize("main", SPECS)
def test_top_level_defaults_equal_those_of_the_spec(main: str) -> None:
    spec = spec_of(main)
    required = {
        f.name: getattr(spec, f.name)
        for f in dataclasses.fields(spec)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if main == "train":
        required |= {"trainer": AUTO_TRAINER, "schedule": spec.schedule}
        assert torch.equal(spec.schedule.build().alpha_bar, ScheduleSpec().build().alpha_bar)
    assert SPECS[main](**required) == spec


ALLOWED: dict[tuple[str, str], Any] = {
    **{(main, "style"): EvaluateSpec for main in PLOTTING},
    **{(main, "format"): PlotSpec for main in PLOTTING},
    ("figure/all", "format"): PictureSpec,
    ("metric/inception", "extractor"): EXTRACTORS,
    ("metric/inception", "metrics"): METRICS,
    ("metric/inception", "reference_split"): MetricSpec,
    ("network/unet_cifar10", "init"): UNetSpec,
    ("objective/ddpm", "multinomial"): LOSSES,
    ("objective/ddpm", "prediction"): PREDICTIONS,
    ("objective/ddpm", "reduction"): REDUCTIONS,
    ("objective/ddpm", "times"): (*TIME_SAMPLERS, LOSS_SECOND_MOMENT),
    ("objective/ddpm", "weight"): LOSS_WEIGHTS,
    ("objective/ddpm", "variance"): VARIANCES,
    ("encode", "inversion"): INVERSIONS,
    ("estimate_variance", "split"): EstimateVarianceSpec,
    ("likelihood", "probe"): LikelihoodSpec,
    ("likelihood", "split"): LikelihoodSpec,
    ("reconstruct", "inversion"): INVERSIONS,
    ("reconstruct", "split"): ReconstructSpec,
    ("sample", "format"): SampleSpec,
    ("sampler/ddim", "clip"): CLIP_POLICIES,
    ("sampler/ddim", "rule"): (*RULES, DIFFUSERS),
    ("sampler/ddim", "spacing"): (*SPACINGS, "explicit", "scheduler", "FILE.json"),
    ("trainer/auto", "precision"): TrainerSpec,
    ("trainer/auto", "profiler"): TrainerSpec,
}


def literals(hint: Any) -> tuple[str, ...]:
    """The strings that a type hint such as tuple[Literal["a", "b"], ...] allows."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(value for inner in get_args(hint) for value in literals(inner))


def listed_values() -> dict[tuple[str, str], list[str]]:
    """The values that the comments of configs/ list, by file and key."""
    pattern = re.compile(r"^ *(\w+):.*# (?:one|any) of: ([\w, .-]+)", re.MULTILINE)
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


@pytest.mark.parametrize("main", SPECS)
def test_help_shows_every_key_at_the_top(main: str) -> None:
    keys = set(OmegaConf.load(CONFIGS / f"{main}.yaml")) - {"defaults", "hydra"}
    # like changes the sampler, plugins are imported before there is a spec
    assert keys - {"plugins"} | set(group_of(main)) - {"like"} == fields(SPECS[main])


def test_every_script_takes_plugins() -> None:
    assert [path.stem for path in CONFIGS.glob("*.yaml") if OmegaConf.load(path).get("plugins") != []] == []


@pytest.mark.parametrize("main", ["sample", "evaluate", "reconstruct", "solver_error", "figures"])
def test_like_is_one_word_for_the_other_choices_of_a_sampler(main: str) -> None:
    assert spec_of(main, "like=paper").sampler == SamplerSpec()
    assert spec_of(main, "like=official", "sampler.S=20").sampler == SamplerSpec(S=20, spacing="uniform")
    assert spec_of(main, "like=diffusers").sampler == read_sampler({}, CONFIGS)
    if main not in ("reconstruct", "solver_error"):
        clamped = spec_of(main, "sampler=sigma_hat_clamped", "like=official").sampler
        assert clamped == SamplerSpec("sigma_hat", None, spacing="uniform", clip="x0_and_eps")
    if main == "evaluate":  # more than an experiment says
        assert spec_of(main, "experiment=table1_cifar10", "like=diffusers").sampler.spacing == "leading"


def test_help_shows_every_key_below_the_top_of_training() -> None:
    config = compose("train")
    assert set(config.ema) == fields(EMASpec)
    assert set(config.grid) == fields(GridSpec)
    assert set(config.grid.sampler) == fields(SamplerSpec)
    assert set(config.eval) == fields(EvalSpec)
    assert set(config.eval.sampler) == fields(SamplerSpec)
    assert set(config.eval.metric) == fields(MetricSpec)
