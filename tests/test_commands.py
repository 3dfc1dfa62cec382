"""Every command that the documents, configurations and scripts show: its groups, options, keys and values exist."""

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddim.checkpoints.convert.exporting import ExportSpec
from ddim.checkpoints.convert.importing import ImportSpec
from ddim.checkpoints.posthoc import PostHocSpec
from ddim.config import build
from ddim.errors import UserError
from ddim.evaluation.encoding import EncodeSpec
from ddim.evaluation.fidelity import EvaluateSpec
from ddim.evaluation.image_sets import MetricsSpec
from ddim.evaluation.likelihood import LikelihoodSpec
from ddim.evaluation.reconstruction import ReconstructSpec
from ddim.evaluation.trajectory_error import TrajectoryErrorSpec
from ddim.evaluation.variance import EstimateVarianceSpec
from ddim.figures.paper_figures import FigureSpec
from ddim.inference.sample_files import SampleSpec
from ddim.inference.search_tau import SearchTauSpec
from ddim.results.compare import CompareSpec
from ddim.training.spec import TrainSpec

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml"))
SHOWING = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "outputs/README.md", "docs/results/README.md")),
    *(path for path in sorted((ROOT / "scripts").rglob("*")) if path.suffix in (".py", ".sh")),
    *(path for path in sorted((ROOT / "configs").rglob("*.yaml")) if "scripts/" in path.read_text()),
]
SPECS: dict[str, type] = {
    "train": TrainSpec,
    "sample": SampleSpec,
    "evaluate": EvaluateSpec,
    "reconstruct": ReconstructSpec,
    "likelihood": LikelihoodSpec,
    "solver_error": TrajectoryErrorSpec,
    "figures": FigureSpec,
    "search_tau": SearchTauSpec,
    "compare": CompareSpec,
    "estimate_variance": EstimateVarianceSpec,
    "encode": EncodeSpec,
    "metrics": MetricsSpec,
    "ema": PostHocSpec,
    "import_checkpoint": ImportSpec,
    "export_checkpoint": ExportSpec,
}
# Scripts that a document other than the README shows.
ELSEWHERE = {
    "estimate_variance": "samplers",
    "solver_error": "solvers",
    "compare": "sweeps",
    "search_tau": "tau_search",
}
ELSEWHERE |= {"ema": "training", "encode": "inversion", "likelihood": "likelihood"}
FLAGS = {"-m", "--multirun", "--help"}
OWN_CONFIGS = "--config-dir=my_configs"  # of plugins
# What stands for a number in a command; other words in capitals stand for text, and so are text.
NUMBERS = re.compile(r"\b(N|S|K|STEPS|SEED|STEP|COUNT)$")


def commands(text: str) -> list[tuple[str, ...]]:
    """Return the words of every `python scripts/X.py ...` in a text, from the script on, without the remark behind."""
    text = re.sub(r"\\\n\s*", "", text)
    lines = re.findall(r"(?:python3?|\$PYTHON) (scripts/[\w/]+\.py[^\n`]*)", text)
    # A remark begins with "#", or is set off by three blanks; punctuation ends the command in running text.
    return [tuple(shlex.split(re.split(r"\s#|\s{3,}|[;,.)]*(?:\s[&|>]|$)", line)[0])) for line in lines]


def without_sweeps(overrides: tuple[str, ...]) -> list[list[str]]:
    """Return overrides without sweeps, in which every value of every sweep occurs."""
    axes = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        sweep = override.is_sweep_override()
        key = override.get_key_element()
        axes.append([f"{key}={v}" for v in override.sweep_string_iterator()] if sweep else [override.input_line])
    return [[axis[i % len(axis)] for axis in axes] for i in range(max(map(len, axes), default=1))]


@cache
def composed(script: str, *overrides: str) -> Any:
    """Return the configuration, Hydra's own part included."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose(script, list(overrides), return_hydra_config=True)


@cache
def problems(words: tuple[str, ...]) -> list[str]:
    """Return what is wrong with a command: its script, a flag, group, option or key, or a value that a spec refuses."""
    path, *arguments = words
    script = Path(path).stem
    if not (ROOT / path).is_file():
        return [f"{path} does not exist"]
    if any(argument.endswith("_optuna") for argument in arguments):  # needs an extra; test_training_sweep.py runs one
        return []
    flags = [argument for argument in arguments if argument.startswith("-")]
    if script not in SPECS:
        source = (ROOT / path).read_text()
        return [f"{path} knows no {flag}" for flag in flags if f'"{flag}"' not in source and flag != "--help"]
    if OWN_CONFIGS in flags:  # which have groups and options of any name
        return []
    if unknown := set(flags) - FLAGS:
        return [f"{path} knows no {', '.join(unknown)}"]
    overrides = tuple(NUMBERS.sub("1", argument) for argument in arguments if argument not in flags)
    try:
        if {"-m", "--multirun"} & set(flags):
            params = composed(script, *without_sweeps(overrides)[0]).hydra.sweeper.get("params") or {}
            given = {override.partition("=")[0] for override in overrides}
            overrides = (*(f"{key}={value}" for key, value in params.items() if key not in given), *overrides)
        elif len(without_sweeps(overrides)) > 1:
            return [f"{' '.join(words)}: a list of values needs -m"]
        for job in without_sweeps(overrides):
            config = composed(script, *job)
            own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            if "--help" not in flags:
                values: Any = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
                if values.pop("plugins"):  # which may register any name
                    return []
                build(SPECS[script], values, "")
    except (HydraException, OmegaConfBaseException, UserError) as error:
        return [f"{' '.join(words)}: {' '.join(str(error).split())}"]
    return []


@pytest.mark.integration
@pytest.mark.parametrize("path", SHOWING, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_names_what_exists(path: Path) -> None:
    assert [problem for words in commands(path.read_text()) for problem in problems(words)] == []


def test_the_documents_show_every_script_for_users() -> None:
    for script in SPECS:
        document = ROOT / (f"docs/{ELSEWHERE[script]}.md" if script in ELSEWHERE else "README.md")
        assert f"scripts/{script}.py" in {words[0] for words in commands(document.read_text())}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_headed_by_its_command(name: str) -> None:
    text = (ROOT / "configs" / "experiment" / f"{name}.yaml").read_text()
    head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert any(f"experiment={name}" in words for words in commands(head))


@pytest.mark.parametrize(
    "command",
    [
        "python scripts/trian.py experiment=digits",
        "python scripts/train.py experiment=cifar11",
        "python scripts/train.py experiment=digits --gpu",
        "python scripts/train.py experiment=digits trainer.max_step=5",
        "python scripts/train.py experiment=digits trainer.max_steps=many",
        "python scripts/train.py experiment=digits +speed=5",
        "python scripts/train.py data=folder data.root=PATH data.size=[64,64] network=unet_celebb",
        "python scripts/sample.py n=4",
        "python scripts/sample.py checkpoint=PATH format=mp4",
        "python scripts/sample.py checkpoint=PATH sampler.eta=0.0,1.0",
        "python scripts/evaluate.py -m checkpoint=PATH sampler.S=10,20 sampler=ddim,ddmp",
        "python scripts/evaluate.py -m checkpoint=PATH sampler.S=10,twenty",
        "python scripts/evaluate.py -m experiment=table_digits sampler.steps=STEPS",
        "python scripts/tools/make_digits_classifier.py --output FILE",
    ],
)
def test_a_wrong_command_is_noticed(command: str) -> None:
    (in_block,) = commands(f"```bash\n{command}   # so\n```\n")
    (in_text,) = commands(f"Run `{command}`, or not.")
    assert in_block == in_text
    assert problems(in_block)


def test_right_commands_pass() -> None:
    text = """
    `python scripts/evaluate.py -m experiment=table_digits sampler.S=N` and `python scripts/train.py --help`.

    python scripts/train.py experiment=digits \\
        trainer.max_steps=STEPS name=NAME     a remark
    python scripts/tools/make_digits_classifier.py --out FILE && ls
    """
    assert [words[-1] for words in commands(text)] == ["sampler.S=N", "--help", "name=NAME", "FILE"]
    assert [problem for words in commands(text) for problem in problems(words)] == []
