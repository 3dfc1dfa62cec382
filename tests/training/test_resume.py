"""A training is a function of its configuration: not of where it stopped, nor of how a batch was divided."""

import shutil
from pathlib import Path

import pytest
import torch
from two_processes import run_in_processes

from ddim.checkpoints.model import RECIPE, read_checkpoint, read_model, save_model
from ddim.checkpoints.spec import KEY
from ddim.config import build
from ddim.errors import UserError
from ddim.results.records import code_revision
from ddim.results.runs import read_logs, step_of
from ddim.training.ema import EMA
from ddim.training.resume import FINGERPRINT, check_images, set_aside
from ddim.training.run import train
from ddim.training.spec import TrainSpec

pytestmark = pytest.mark.integration
DROPOUT = {"dropout": 0.3}
TRAINER = {"max_steps": 9, "checkpoint_every": 4}


def disturb():
    """Change the state of the global generator."""
    torch.manual_seed(int(torch.randint(1000, ())))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_killed_run_resumes_exactly(run, killed_run, same, accumulate):
    options = {"network": DROPOUT, "trainer": TRAINER | {"accumulate": accumulate}}
    uninterrupted = run("uninterrupted", **options)
    disturb()
    killed_run(6, accumulate - 1, "killed", **options)  # two steps, and half a third, after the checkpoint
    disturb()
    resumed = run("killed", **options, checkpoint="last")
    assert same(uninterrupted, resumed)
    assert read_checkpoint(uninterrupted)["global_step"] == 9


def test_comparison_notices_other_dropout_flips_and_seeds(run, same):
    options = {"network": DROPOUT, "trainer": {"max_steps": 2}}
    base = run("base", **options)
    assert same(base, run("again", **options))
    assert not same(base, run("no dropout", **options | {"network": {"dropout": 0.0}}))
    assert not same(base, run("no flips", **options, data={"flip": False}))
    assert not same(base, run("seed", **options, seed=6))


def test_run_killed_again_in_its_first_step_resumes_exactly(run, killed_run, same):
    options = {"network": DROPOUT, "trainer": TRAINER | {"accumulate": 2}}
    uninterrupted = run("uninterrupted", **options)
    killed_run(6, 0, "killed", **options)
    killed_run(4, 1, "killed", **options, checkpoint="last")
    assert same(uninterrupted, run("killed", **options, checkpoint="last"))


def test_finished_run_is_extended_into_another_folder(run, same, tmp_path):
    options = {"network": DROPOUT}
    uninterrupted = run("uninterrupted", **options, trainer={"max_steps": 9})
    first = run("first", **options, trainer={"max_steps": 5})
    second = run("second", **options, trainer={"max_steps": 9}, checkpoint=str(first))
    assert second == tmp_path / "second" / "checkpoints" / "last.ckpt"
    assert same(uninterrupted, second)
    assert read_checkpoint(first)["global_step"] == 5


def test_resuming_a_finished_run_changes_nothing(run, same, tmp_path):
    last = run()
    shutil.copy(last, tmp_path / "copy.ckpt")
    assert run(checkpoint="last") == last
    assert same(last, tmp_path / "copy.ckpt")


def test_checkpoint_last_starts_a_new_run(run, same):
    assert same(run("one"), run("two", checkpoint="last"))


def test_moved_run_updates_its_last_checkpoint(run, killed_run, tmp_path):
    last = run("here", trainer={"max_steps": 6, "checkpoint_every": 4})
    shutil.move(tmp_path / "here", tmp_path / "there")
    killed_run(10, 0, "there", trainer={"max_steps": 20, "checkpoint_every": 4}, checkpoint="last")
    folder = tmp_path / "there" / "checkpoints"
    assert read_checkpoint(folder / last.name)["global_step"] == 8
    assert not list(folder.glob("last-*"))


# With a small eps Adam makes a full step of a gradient that is only rounding noise.
ROBUST = {"optim": {"eps": 1e-3}, "trainer": {"max_steps": 6}}


def test_accumulated_batches_equal_the_whole_batch(run, same, monkeypatch):
    updates = []
    on_train_batch_end = EMA.on_train_batch_end

    def record(self, *args):
        on_train_batch_end(self, *args)
        updates.append(self.updates)

    monkeypatch.setattr(EMA, "on_train_batch_end", record)
    uninterrupted = run("uninterrupted", **ROBUST)
    assert updates == [1, 2, 3, 4, 5, 6]
    updates.clear()
    halves = run("halves", **ROBUST | {"trainer": {"max_steps": 6, "accumulate": 2}})
    assert updates == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    assert same(uninterrupted, halves, atol=1e-6)
    assert not same(uninterrupted, run("other", **ROBUST, seed=6), atol=1e-3)


def test_accumulation_may_change_on_resuming(run, killed_run, same):
    uninterrupted = run("uninterrupted", **ROBUST)
    for first, second in ((1, 2), (4, 1)):
        name = f"{first} to {second}"
        killed_run(5, 0, name, **ROBUST | {"trainer": {"accumulate": first, "checkpoint_every": 3}})
        trainer = {"accumulate": second, "checkpoint_every": 3}
        assert same(uninterrupted, run(name, **ROBUST | {"trainer": trainer}, checkpoint="last"), atol=1e-6)


def test_two_processes_equal_one_that_accumulates(run, same, two_processes):
    """Also with dropout, and going on with one process from where two stopped."""
    options = ROBUST | {"network": DROPOUT}
    two = run("two", **options | {"trainer": two_processes})
    one = run("one", **options | {"trainer": {"accumulate": 2}})
    assert same(one, two, atol=1e-6)
    longer = options | {"trainer": {"max_steps": 8, "accumulate": 2}}
    assert same(run("one", **longer, checkpoint="last"), run("two", **longer, checkpoint="last"), atol=1e-6)


@pytest.fixture
def rows(logged):
    """rows("run", version=0): logged losses and counts by step, all columns but those of the clock."""
    names = ["loss", *(f"loss_quarter_{k}" for k in (1, 2, 3, 4)), "skipped_steps", "gradient_norm"]

    def rows(name, version=0):
        columns = [logged(name, f"train/{column}", version) for column in names]
        return {step: [column.get(step) for column in columns] for step in columns[0]}

    return rows


@pytest.mark.parametrize("saved", [4, 6])
def test_logs_resume_exactly_between_two_rows(run, killed_run, rows, scale_loss, caplog, saved):
    """A row every three steps, over the samples since the row before; the second step is not finite."""
    scale_loss({1}, float("nan"))
    trainer = {"max_steps": 9, "log_every": 3, "checkpoint_every": saved, "accumulate": 2}
    run("uninterrupted", trainer=trainer)
    killed_run(saved, 1, "killed", trainer=trainer)
    caplog.clear()
    run("killed", trainer=trainer, checkpoint="last")
    assert "no finite gradient" not in caplog.text  # was logged before
    uninterrupted = rows("uninterrupted")
    assert list(uninterrupted) == [2, 5, 8]
    assert rows("killed", 1) == {step: row for step, row in uninterrupted.items() if step >= saved}


def test_two_processes_resume_and_log_as_one(run, same, rows, two_processes):
    """The loss is that of the global batch, not that of the first process; also when two go on as one."""
    one, logs, last = {"accumulate": 1}, {}, {}
    for name, first, second in (
        ("one", one, one),
        ("two", two_processes, two_processes),
        ("mixed", two_processes, one),
    ):
        for steps, how in ((5, first), (8, second)):
            trainer = how | {"max_steps": steps, "log_every": 4}
            last[name] = run(name, **ROBUST | {"trainer": trainer}, checkpoint="last")
        logs[name] = [value for version in (0, 1) for row in rows(name, version).values() for value in row]
        assert len(logs[name]) == 14
    for name in ("two", "mixed"):
        assert logs[name] == pytest.approx(logs["one"], rel=1e-5)
        assert same(last["one"], last[name], atol=1e-6)


def test_a_requeued_job_goes_on_where_it_stopped(run, finished_run, after_loss, monkeypatch, tmp_path):
    """Its command names the checkpoint that it started from; before it has saved, it starts there again."""
    steps = []
    after_loss(lambda step, *_: steps.append(step))
    elsewhere = str(finished_run / "checkpoints" / "last.ckpt")  # at step 2
    here = str(tmp_path / "run" / "checkpoints" / "step_00000003.ckpt")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for length, checkpoint in ((3, elsewhere), (4, elsewhere), (5, here), (6, here)):
        run(trainer={"max_steps": length, "keep_last": 9}, checkpoint=checkpoint)
    assert steps == [2, 3, 4, 5]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")  # of a job that has started once
    with pytest.raises(UserError, match="already holds a run at step 6"):
        run(checkpoint=elsewhere)


def test_what_a_run_without_checkpoint_wrote_is_set_aside(run, after_loss, caplog, tmp_path):
    """It ended at once, as one that is killed; its losses are not those of the next run of its name."""
    ends = [True]

    def end(step, *_):
        if step == 2 and ends:
            raise RuntimeError("ended")

    after_loss(end)
    with pytest.raises(RuntimeError, match="ended"):
        run(optim={"lr": 0.1}, trainer={"log_every": 1, "checkpoint_every": 100, "max_steps": 4})
    (tmp_path / "run" / "checkpoints" / ".0123_step_00000002.ckpt").touch()  # killed while it saved
    (tmp_path / "run" / "wandb_id.txt").write_text("0123")
    ends.clear()
    for _ in range(2):
        run(trainer={"log_every": 1, "max_steps": 3}, checkpoint="last")
    logged = [row for rows in read_logs(tmp_path / "run") for row in rows]
    assert [step_of(row) for row in logged if row["train/loss"]] == [1, 2, 3]
    aside = tmp_path / "run" / "without_checkpoint_1"
    assert sorted(path.name for path in aside.iterdir()) == ["csv", "wandb_id.txt"]
    assert [message for message in caplog.messages if "ended before its first checkpoint" in message] == [
        f"a run in {tmp_path / 'run'} ended before its first checkpoint; what it wrote is in {aside} now."
    ]


def test_what_a_killed_call_left_is_set_aside_by_the_next(tmp_path, monkeypatch):
    checkpoints = tmp_path / "checkpoints"
    names = ["csv/metrics.csv", "samples/1.png", "wandb_id.txt", "records.jsonl", "ema/1.safetensors"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    rename, done = Path.rename, []

    def killed(path, target):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        set_aside(tmp_path, checkpoints)
    monkeypatch.undo()
    set_aside(tmp_path, checkpoints)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["without_checkpoint_1", "without_checkpoint_2"]
    moved = [path.relative_to(aside) for aside in tmp_path.iterdir() for path in aside.rglob("*.*")]
    assert sorted(path.as_posix() for path in moved) == sorted(names)


def test_the_commit_is_asked_before_the_first_step(run, after_loss, another_commit):
    after_loss(lambda *_: another_commit())
    run()
    assert code_revision() == "a" * 40


def test_what_no_training_wrote_stays(run, tmp_path):
    """Such as the pictures of scripts/sample.py in outputs/samples, where a run has output_dir=outputs."""
    picture = tmp_path / "run" / "samples" / "grid.png"
    picture.parent.mkdir(parents=True)
    picture.touch()
    run(trainer={"max_steps": 1})
    assert picture.exists()


def test_a_model_file_is_no_training_checkpoint(run, finished_run, tmp_path):
    model = tmp_path / "model.safetensors"
    save_model(read_model(finished_run / "checkpoints" / "last.ckpt"), model)
    with pytest.raises(UserError, match=r"model.safetensors is a model file, without .* a training goes on from"):
        run(checkpoint=str(model))


def test_a_fingerprint_of_earlier_code_is_that_of_the_images(tmp_path):
    checkpoint = {KEY: {RECIPE: {FINGERPRINT: "earlier"}}}
    assert check_images(tmp_path, checkpoint, "now", "earlier") == "earlier"  # as its post-hoc averages state it
    assert check_images(tmp_path, {KEY: {}}, "now", "earlier") == "now"
    with pytest.raises(UserError, match="was trained on other images or labels"):
        check_images(tmp_path, checkpoint, "now")


def start_training(processes, values):
    """Train in the folder of this process, and return why it did not."""
    try:
        train(build(TrainSpec, values[processes.rank], ""), values[processes.rank])
    except UserError as error:
        return str(error)


@pytest.mark.timeout(60)  # without the check they wait for each other
def test_processes_at_different_steps_are_refused(run, config, tmp_path):
    """As on two nodes of which each has its own outputs/; the first has a run at step 2."""
    run("first", trainer={"max_steps": 2})
    options = {"trainer": {"strategy": "ddp", "devices": 2}, "checkpoint": "last"}
    values = [config(name, **options) for name in ("first", "second")]
    for message in run_in_processes(start_training, values, to=tmp_path / "results"):
        assert message.startswith("the processes resume from different steps (by rank: 2, 0); all of them must see")
