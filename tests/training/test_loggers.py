"""CSV, TensorBoard and W&B, without a network or an account."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from wandb_files import isolate_wandb, offline_runs

from ddim.checkpoints import load_model, read_model
from ddim.errors import UserError
from ddim.evaluation.fidelity import evaluate
from ddim.evaluation.session import Session
from ddim.results.wandb import LoggerSpec
from ddim.training.checkpoints import Checkpoints
from ddim.training.loggers import build_loggers
from ddim.training.module import DiffusionModule

pytestmark = pytest.mark.integration
GRID = {"every": 4, "n": 4, "sampler": {"S": 2}}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_csv_is_always_written_and_never_overwritten(run, killed_run, logged, tmp_path, accumulate):
    first = tmp_path / "run" / "csv" / "version_0" / "metrics.csv"
    trainer = {"max_steps": 7, "checkpoint_every": 4, "accumulate": accumulate}
    killed_run(6, 0, trainer=trainer)
    content = first.read_bytes()
    killed_run(4, accumulate - 1, trainer=trainer, checkpoint="last")
    run(trainer=trainer, checkpoint="last")
    assert first.read_bytes() == content
    one, three = (logged("run", "train/loss", version) for version in (0, 2))
    assert (list(one), list(three)) == ([0, 1, 2, 3, 4, 5], [4, 5, 6])
    run("uninterrupted", trainer=trainer)
    assert one | three == three | one == logged("uninterrupted", "train/loss")


def test_no_row_is_lost_by_a_kill_after_a_checkpoint(run, logged, monkeypatch):
    """Each row is in the file before the checkpoint of its step, from which the next run goes on with the next row."""
    trainer = {"max_steps": 9, "checkpoint_every": 3, "log_every": 3}
    run("uninterrupted", trainer=trainer)
    save = Checkpoints.save
    rows = {}

    def save_and_die(self, trainer):
        save(self, trainer)
        rows.update(logged("run", "train/loss", len(rows)))
        raise KeyError("killed")

    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    for saved in (3, 6, 9):
        with pytest.raises(KeyError, match="killed"):
            run(trainer=trainer, checkpoint="last")
        assert list(rows) == [2, 5, 8][: saved // 3]
    assert rows == logged("uninterrupted", "train/loss")


def test_tensorboard_holds_losses_and_grids(run, logged, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(logger={"tensorboard": True}, grid=GRID)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    scalars = {e.step: e.value for e in events.Scalars("train/loss")}
    assert scalars == pytest.approx(logged("run", "train/loss"), rel=1e-6)
    (image,) = events.Images("samples")
    assert image.step == 4
    (tmp_path / "logged.png").write_bytes(image.encoded_image_string)
    image_logged, image_saved = (
        Image.open(p) for p in (tmp_path / "logged.png", tmp_path / "run/samples/step_00000004.png")
    )
    assert torch.equal(pil_to_tensor(image_logged.convert("L")), pil_to_tensor(image_saved))


@pytest.fixture
def wandb_at(tmp_path, monkeypatch):
    """W&B with all its files below tmp_path, and without an account."""
    isolate_wandb(monkeypatch, tmp_path / "home")
    yield tmp_path
    offline_runs(tmp_path)  # ends W&B's process


OFFLINE = {"wandb": True, "offline": True, "project": "p", "tags": ["a", "b"], "group": "sweep", "notes": "why"}


def test_wandb_offline_resumes_the_same_run(run, logged, wandb_at):
    """With its configuration, losses, grids and checkpoints; another training in this process is another run."""
    folder = wandb_at / "run"
    before = set(Path.cwd().iterdir())
    logger = OFFLINE | {"log_model": "all"}
    run(logger=logger, grid=GRID, trainer={"max_steps": 4})
    run(logger=logger, grid=GRID, trainer={"max_steps": 7}, checkpoint="last")
    run("other", logger=OFFLINE, trainer={"max_steps": 2})
    one, two = offline_runs(folder)
    name = (folder / "wandb_id.txt").read_text()
    for number, part in enumerate((one, two)):
        assert part.run.run_id == name
        for key in ("train/loss", "train/learning_rate", "train/gradient_norm"):
            assert part.column(key) == pytest.approx(logged("run", key, number), rel=1e-6)
        assert part.artifacts == [(f"model-{name}", "model", ["latest", f"step-{(4, 7)[number]}"])]
    (image,) = one.media(".png")
    assert image.read_bytes() == (folder / "samples" / "step_00000004.png").read_bytes()
    (caption,) = [row["samples"]["captions"] for row in one.rows if "samples" in row]
    assert caption == ["step 4, EMA 0.9, η=0.0 S=2 linear, seed 0"]
    assert (one.run.project, one.run.display_name, list(one.run.tags)) == ("p", "run", ["a", "b"])
    assert (one.run.run_group, one.run.job_type, one.run.notes) == ("sweep", "train", "why")
    assert one.config["network"]["num_groups"] == 4
    assert one.config["seed"] == 5
    network = load_model(folder / "checkpoints" / "last.ckpt").network
    assert one.config["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    (other,) = offline_runs(wandb_at / "other")
    assert other.run.run_id == (wandb_at / "other" / "wandb_id.txt").read_text() != name
    assert (list(other.column("train/loss")), other.artifacts) == ([0, 1], [])
    assert set(Path.cwd().iterdir()) == before


def wandb_logger(folder, config=None, **options):
    """A logger of W&B without a training."""
    return build_loggers(LoggerSpec(wandb=True, offline=True, **options), "run", folder, config or {})[1]


def test_wandb_summary_has_the_best_and_the_last_value(wandb_at):
    logger = wandb_logger(wandb_at)
    best = {"train/loss": min, "val/fd_x_1k": min, "val/fd_x_1k_ema_0.9": min, "val/is_1k": max, "val/recall_1k": max}
    for step, value in enumerate((2.0, 1.0, 4.0, 3.0)):
        logger.log_metrics(dict.fromkeys([*best, "train/images_per_second"], value), step)
    logger.experiment.finish()
    (done,) = offline_runs(wandb_at)
    for name, rule in best.items():
        value = done.summary[name]
        value = value if isinstance(value, dict) else done.summary["val/fd_x_1k_ema_0"]["9"]
        assert value == {rule.__name__: rule(1.0, 4.0), "last": 3.0}, name
    assert done.summary["train/images_per_second"] == 3.0


@pytest.mark.parametrize(("log_model", "aliases"), [("best", [2, 4]), ("all", [2, 3, 4]), (False, [])])
def test_asked_for_checkpoints_are_artifacts(wandb_at, log_model, aliases):
    logger = wandb_logger(wandb_at, {"eval": {"every": 1}}, log_model=log_model)
    for step, best in ((2, 2), (3, 2), (4, 4)):
        (wandb_at / "last.ckpt").write_text(str(step), encoding="utf-8")
        logger.after_save_checkpoint(SimpleNamespace(folder=wandb_at, saved=step, best_steps=[best]))
    logger.experiment.finish()
    (done,) = offline_runs(wandb_at)
    expected = [["best"] * (step != 3) + ["latest", f"step-{step}"] for step in aliases]
    assert done.artifacts == [(f"model-{done.run.run_id}", "model", names) for names in expected]
    contents = [entry for r in done.records if r.HasField("artifact") for entry in r.artifact.manifest.contents]
    assert all(entry.skip_cache for entry in contents)
    assert len(contents) == len(aliases)


def test_a_record_names_the_wandb_run_but_its_key_does_not(run, wandb_at, spec):
    """The checkpoint of a training knows its W&B run; the same weights without one are the same evaluation."""
    paths = [run(name, logger=logger, trainer={"max_steps": 1}) for name, logger in (("run", OFFLINE), ("other", {}))]
    path = f"p/{(wandb_at / 'run' / 'wandb_id.txt').read_text()}"
    assert read_model(paths[0]).origin == load_model(paths[0]).origin == {"wandb_run": path}
    one, two = (
        evaluate(replace(spec, checkpoint=str(path), output_dir=str(path.parent)), Session())[0] for path in paths
    )
    assert (one["training_run"], "training_run" in two) == (path, False)
    assert one["key"] == two["key"]


def test_failed_training_ends_its_wandb_run(killed_run, run, wandb_at):
    killed_run(2, 0, logger=OFFLINE)
    run("other", logger=OFFLINE, trainer={"max_steps": 2})
    for name, exit_code in (("run", 1), ("other", 0)):
        (done,) = offline_runs(wandb_at / name)
        assert list(done.column("train/loss")) == [0, 1]
        assert [r.exit.exit_code for r in done.records if r.HasField("exit")] == [exit_code]


def test_wandb_without_an_account_is_refused_before_training(run, wandb_at, monkeypatch):
    monkeypatch.setattr(DiffusionModule, "training_step", lambda *args: pytest.fail("trained"))
    with pytest.raises(UserError, match=r"W&B refused to start .*run `wandb login`, or choose logger=wandb_offline"):
        run(logger={"wandb": True})
