"""W&B on the command line: the agent of a sweep starts a training in its run; checkpoints that are artifacts."""

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from composed import spec_of
from wandb_files import isolate_wandb, offline_runs

wandb = pytest.importorskip("wandb")  # a GPU machine may have none
Agent = pytest.importorskip("wandb.wandb_agent").Agent
ROOT = Path(__file__).parents[2]
SWEEPS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "configs" / "wandb_sweep").glob("*.yaml")}
SMALL = ("network.ch=16", "network.num_groups=4", "trainer.max_steps=1", "trainer.log_every=1", "logger.offline=true")


@pytest.fixture
def agent_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """agent_words(sweep): the command that W&B's agent starts for a run of a sweep, in the environment that it sets."""
    isolate_wandb(monkeypatch, tmp_path / "home")
    for name, value in {"WANDB_DIR": str(tmp_path), "WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "")
    monkeypatch.setattr("wandb.wandb_agent.AgentProcess", SimpleNamespace)

    def words(sweep: dict[str, Any], values: dict[str, Any]) -> list[str]:
        agent = Agent(api=None, queue=None, sweep_id="sweep1")
        agent._sweep_command = list(sweep["command"])
        args = {key: {"value": value} for key, value in values.items()}
        agent._command_run({"type": "run", "run_id": "run1", "program": sweep["program"], "args": args})
        return list(agent._run_processes["run1"].command)

    return words


def some_values(sweep: dict[str, Any]) -> dict[str, Any]:
    """Return a value for each parameter of a sweep."""
    return {key: choices.get("values", [choices.get("max")])[-1] for key, choices in sweep["parameters"].items()}


@pytest.mark.parametrize("name", SWEEPS)
def test_every_wandb_sweep_is_a_valid_command(name: str, agent_words: Any) -> None:
    pytest.importorskip("ddim.training.validation")
    sweep, values = SWEEPS[name], some_values(SWEEPS[name])
    interpreter, program, *words = agent_words(sweep, values)
    assert (interpreter, program) == ("python", "scripts/train.py")
    spec = spec_of("train", *words)
    assert (spec.optim.lr, spec.ema.decay) == (values["optim.lr"], values["ema.decay"])
    assert spec.logger.wandb
    assert spec.name.endswith("-run1")
    assert (spec.eval.every > 0, f"val/{spec.eval.decisive}") == (True, sweep["metric"]["name"])


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:.*config-run1.yaml:pytest.PytestUnraisableExceptionWarning")  # W&B leaves it open
def test_the_run_of_an_agent_belongs_to_its_sweep(agent_words: Any, run: Any, tmp_path: Path) -> None:
    sweep, values = SWEEPS["digits"], some_values(SWEEPS["digits"])
    words = agent_words(sweep, values)[2:]
    wandb.teardown()  # settings of the session before
    for _ in range(2):  # the second time it resumes, as after a preemption
        outcome = run("train", *words, *SMALL)
        assert outcome.code == 0, outcome.err
    folder = tmp_path / "outputs" / "train" / "digits-run1"
    assert (folder / "wandb_id.txt").read_text(encoding="utf-8") == "run1"
    one, two = offline_runs(folder)
    assert {(part.run.run_id, part.run.sweep_id) for part in (one, two)} == {("run1", "sweep1")}
    assert {key: one.config[key] for key in values} == values
    assert one.config["optim"]["lr"] == values["optim.lr"]


def test_a_checkpoint_on_wandb_is_downloaded_before_any_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    jobs = importlib.import_module("_jobs")
    asked: list[str] = []
    monkeypatch.setattr(
        "ddim.results.wandb_artifacts.download_checkpoint", lambda name: asked.append(name) or "model.ckpt"
    )
    configs, _ = jobs.sweep_jobs("sample", ["-m", "checkpoint=wandb:team/p/model-a:v3", "sampler.S=5,10"])
    assert [config["checkpoint"] for config in configs] == ["model.ckpt"] * 2
    assert asked == ["wandb:team/p/model-a:v3"]
