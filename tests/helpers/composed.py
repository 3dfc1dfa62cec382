"""Configurations as Hydra composes them, and the specs that they make."""

from functools import cache
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from ddim.checkpoints.posthoc import PostHocSpec
from ddim.config import build
from ddim.evaluation.encoding import EncodeSpec
from ddim.evaluation.fidelity import EvaluateSpec
from ddim.evaluation.image_sets import MetricsSpec
from ddim.evaluation.likelihood import LikelihoodSpec
from ddim.evaluation.reconstruction import ReconstructSpec
from ddim.evaluation.reproduce import ReproduceSpec
from ddim.evaluation.trajectory_error import TrajectoryErrorSpec
from ddim.evaluation.variance import EstimateVarianceSpec
from ddim.figures.paper_figures import FigureSpec
from ddim.inference.sample_files import SampleSpec
from ddim.inference.search_tau import SearchTauSpec
from ddim.training.spec import TrainSpec

CONFIGS = Path(__file__).parents[2] / "configs"
if not OmegaConf.has_resolver("job_number"):  # of the scripts, which also handle signals
    OmegaConf.register_new_resolver("job_number", lambda: "")
SPECS: dict[str, Any] = {
    "train": TrainSpec,
    "evaluate": EvaluateSpec,
    "sample": SampleSpec,
    "reconstruct": ReconstructSpec,
    "likelihood": LikelihoodSpec,
    "solver_error": TrajectoryErrorSpec,
    "figures": FigureSpec,
    "search_tau": SearchTauSpec,
    "estimate_variance": EstimateVarianceSpec,
    "encode": EncodeSpec,
    "metrics": MetricsSpec,
    "ema": PostHocSpec,
    "reproduce": ReproduceSpec,
}
REQUIRED = {main: [] if main == "train" else ["checkpoint=a.ckpt"] for main in SPECS}
REQUIRED["encode"].append("source=mine")
REQUIRED["ema"].append("length=0.1")
REQUIRED |= {"metrics": ["images=a"], "reproduce": ["key=0123456789abcdef"]}


def compose(main: str, *overrides: str, with_hydra: bool = False) -> DictConfig:
    """Return the configuration of a script, with what it requires and with overrides."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(main, [*REQUIRED[main], *overrides], return_hydra_config=with_hydra)


@cache
def spec_of(main: str, *overrides: str) -> Any:
    """Return the spec that a script gets, for the CPU."""
    values = OmegaConf.to_container(compose(main, *overrides), resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    assert values.pop("plugins") == []
    if "compute" in values:
        values["compute"]["device"] = "cpu"
    return build(SPECS[main], values, "")


def sweep_params(main: str, experiment: str) -> DictConfig:
    """Return what an experiment sweeps over."""
    return compose(main, f"experiment={experiment}", with_hydra=True).hydra.sweeper.params


def options(group: str) -> list[str]:
    """Return the names of the files in a group."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def group_values(group: str, option: str) -> dict[str, Any]:
    """Return the values of an option, with those of the options that it starts from, before interpolation."""
    own = OmegaConf.to_container(OmegaConf.load(CONFIGS / group / f"{option}.yaml"))
    assert isinstance(own, dict)
    values: dict[str, Any] = {}
    for base in own.pop("defaults", []):
        values |= group_values(group, base)
    return values | own
