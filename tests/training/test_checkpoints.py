"""Atomic checkpoints with a checksum; damage is noticed; the newest intact one is used; signals save first."""

import errno
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch

from ddim.checkpoints import load_model
from ddim.checkpoints.checksum import has_checksum, write_checksum
from ddim.checkpoints.model import read_checkpoint
from ddim.errors import Interrupted, UserError
from ddim.signals import STOP_SIGNALS
from ddim.training.checkpoints import FILES, AtomicCheckpointIO, Checkpoints
from ddim.training.module import COUNTS

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """The bytes of a small file with a checksum and a known tensor."""
    path = tmp_path_factory.mktemp("checksum") / "a.ckpt"
    torch.save({"x": torch.arange(3000.0)}, path)
    write_checksum(path)
    return path.read_bytes()


def test_file_ends_in_the_sha256_of_the_rest_and_loads(content, tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    assert has_checksum(path)
    for mmap in (False, True):
        assert torch.equal(torch.load(path, weights_only=True, mmap=mmap)["x"], torch.arange(3000.0))
    (tmp_path / "rest").write_bytes(content[:-76])
    digest = subprocess.run(["sha256sum", tmp_path / "rest"], capture_output=True, text=True, check=True).stdout[:64]
    assert content[-76:].decode() == f"ddim-sha256:{digest}"


def test_every_bit_flip_before_the_checksum_is_noticed(content, tmp_path):
    path, generator = tmp_path / "a.ckpt", random.Random(0)
    for k in range(100):
        damaged = bytearray(content)
        place = generator.randrange(len(content) - 64) if k else len(content) - 64
        place = place if place < len(content) - 76 or place >= len(content) - 64 else 0
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="its checksum is wrong"):
            has_checksum(path)


def test_200_kinds_of_damage_are_all_noticed(run, tmp_path):
    """Bits flipped anywhere, ends cut off, blocks overwritten: nothing of it is loaded."""
    content = run().read_bytes()
    path, generator = tmp_path / "damaged.ckpt", random.Random(1)
    path.write_bytes(content)
    assert read_checkpoint(path)["global_step"] == 6

    def damage(kind):
        if kind == 0:
            return content[: generator.randrange(len(content))]
        changed, place = bytearray(content), generator.randrange(len(content) - 512)
        if kind == 1:
            changed[place : place + 512] = bytes(512) if any(changed[place : place + 512]) else b"1" * 512
        elif kind == 2:  # at the end, where the checksum is
            changed[-1 - generator.randrange(100)] ^= 1 << generator.randrange(8)
        else:
            changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        return bytes(changed)

    for k in range(200):
        path.write_bytes(damage(k % 5))
        for read in (read_checkpoint, load_model) if k < 20 else (read_checkpoint,):
            with pytest.raises(UserError, match="cannot be read as a checkpoint"):
                read(path)


def test_older_checkpoints_without_checksum_still_load(run, tmp_path):
    checkpoint = read_checkpoint(run())
    del checkpoint["ddim"]["sealed"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    assert load_model(tmp_path / "old.ckpt").step == 6


def steps(folder):
    return sorted(int(path.stem[5:]) for path in folder.glob("step_*.ckpt"))


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "expected"),
    [(1, 0, [9]), (2, 0, [8, 9]), (3, 0, [6, 8, 9]), (1, 4, [4, 8, 9]), (9, 3, [2, 4, 6, 8, 9])],
)
def test_keep_last_and_keep_every_choose_what_is_kept(run, keep_last, keep_every, expected):
    trainer = {"max_steps": 9, "checkpoint_every": 2, "keep_last": keep_last, "keep_every": keep_every}
    last = run(trainer=trainer)
    assert steps(last.parent) == expected
    assert [read_checkpoint(p)["global_step"] for p in sorted(last.parent.glob("step_*.ckpt"))] == expected
    assert last.samefile(last.parent / "step_00000009.ckpt")
    assert sorted(p.name for p in last.parent.iterdir() if p.name.startswith(".")) == []


def test_what_a_run_before_kept_for_good_is_kept(run):
    trainer = {"max_steps": 7, "checkpoint_every": 1, "keep_last": 2}
    folder = run(trainer=trainer | {"keep_every": 2}).parent
    assert steps(folder) == [2, 4, 6, 7]
    run(trainer=trainer | {"max_steps": 9}, checkpoint="last")
    assert steps(folder) == [2, 4, 6, 8, 9]
    run(trainer=trainer | {"max_steps": 7}, checkpoint=str(folder / "step_00000004.ckpt"))
    assert steps(folder) == [2, 4, 6, 7, 8, 9]


def test_a_kept_checkpoint_is_kept_that_is_saved_again(run):
    trainer = {"max_steps": 4, "checkpoint_every": 1, "keep_last": 2}
    folder = run(trainer=trainer | {"keep_every": 2}).parent
    run(trainer=trainer, checkpoint="last")  # has finished
    run(trainer=trainer | {"max_steps": 7}, checkpoint="last")
    assert steps(folder) == [2, 4, 6, 7]


@pytest.mark.parametrize("stated", [True, False], ids=["without keep_every", "of earlier code"])
def test_what_a_run_keeps_is_kept_though_it_was_not(run, stated):
    """The newest checkpoints when `keep_every` is given: saved without it, or by code that did not state them."""
    trainer = {"max_steps": 4, "checkpoint_every": 1, "keep_last": 2}
    last = run(trainer=trainer)
    if not stated:
        checkpoint = read_checkpoint(last)
        del checkpoint[COUNTS][FILES]
        for path in (last, last.with_name("step_00000004.ckpt")):
            AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    run(trainer=trainer | {"max_steps": 5, "keep_every": 4}, checkpoint="last")
    run(trainer=trainer | {"max_steps": 7}, checkpoint="last")  # step 4 was among the newest when the call before ended
    assert steps(last.parent) == [4, 6, 7]


def test_newest_intact_checkpoint_is_used_with_a_warning(run, same, caplog):
    options = {"trainer": {"max_steps": 9, "checkpoint_every": 3}}
    uninterrupted = run("uninterrupted", **options)
    last = run("other", trainer={"max_steps": 7, "checkpoint_every": 3})
    assert steps(last.parent) == [6, 7]
    with last.open("r+b") as file:  # by both of its names
        file.seek(5000)
        file.write(b"damage")
    resumed = run("other", **options, checkpoint="last")
    assert same(uninterrupted, resumed)
    messages = [record.message for record in caplog.records if "checksum is wrong" in record.message]
    assert [message.split()[0].split("/")[-1] for message in messages] == ["last.ckpt", "step_00000007.ckpt"]
    assert all(message.endswith("Trying the one before.") for message in messages)
    assert read_checkpoint(resumed)["global_step"] == 9


def test_files_beside_the_checkpoints_are_left_alone(run, same):
    options = {"trainer": {"max_steps": 6, "checkpoint_every": 2, "keep_last": 1}}
    uninterrupted = run("uninterrupted", **options)
    last = run("other", trainer={"max_steps": 3})
    names = ["step_best.ckpt", "step_00000158 (copy).ckpt", "step_.ckpt", "step_-1.ckpt", "step_1e3.ckpt", "notes.txt"]
    for name in names:
        shutil.copy(last, last.with_name(name))
    folders = [last.with_name(f"step_{number}.ckpt") for number in ("00000001", "00000999")]
    for folder in folders:
        folder.mkdir()
    assert same(uninterrupted, run("other", **options, checkpoint="last"))
    kept = {path.name for path in last.parent.iterdir()} - {folder.name for folder in folders}
    assert kept == {*names, "last.ckpt", "step_00000006.ckpt"}


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_run_saves_on_a_signal_and_resumes_exactly(run, same, monkeypatch, after_loss, number):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started pytest in the background
    before = {n: signal.getsignal(n) for n in STOP_SIGNALS}
    options = {"network": {"dropout": 0.3}, "trainer": {"max_steps": 9, "accumulate": 2}}
    uninterrupted = run("uninterrupted", **options)
    after_loss(lambda _, batch, *__: os.kill(os.getpid(), number) if batch == 8 else None)  # of step 4, the first
    with pytest.raises(Interrupted, match=r"stopped at step 5 of 9 and saved it; go on with checkpoint=last"):
        run("stopped", **options)
    monkeypatch.undo()
    assert {n: signal.getsignal(n) for n in before} == before
    assert same(uninterrupted, run("stopped", **options, checkpoint="last"))


def test_a_signal_to_workers_too_is_survived(run, after_loss):
    """As from torchrun, timeout and SLURM, which send it to a group of processes."""

    def stop_all(step, *_):
        if step == 2:
            pids = [str(worker.pid) for worker in multiprocessing.active_children()]
            assert len(pids) == 2
            for number in STOP_SIGNALS:  # from another process: torch's workers take one of their parent for an end
                subprocess.run(["kill", f"-{number:d}", *pids, str(os.getpid())], check=True)
            time.sleep(0.2)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    after_loss(stop_all)
    with pytest.raises(Interrupted, match=r"stopped at step 3 of 6 and saved it"):
        run(trainer={"num_workers": 2})


@pytest.mark.parametrize("hidden", [False, True], ids=["plain", "hidden by torch"])
def test_full_disk_keeps_older_checkpoints(run, same, monkeypatch, tmp_path, hidden):
    first = run(trainer={"max_steps": 4, "checkpoint_every": 2})
    shutil.copy(first, tmp_path / "before.ckpt")
    save = torch.save

    def full(thing, file, *args, **kwargs):
        try:
            save({"x": torch.zeros(100)}, file)
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            if hidden:
                raise RuntimeError("unexpected pos 4639232 vs 4639124")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        UserError, match=r"step_00000006.ckpt of step 6 cannot be written \(the disk is full\).*are intact"
    ):
        run(trainer={"max_steps": 8, "checkpoint_every": 2}, checkpoint="last")
    monkeypatch.undo()
    assert same(first, tmp_path / "before.ckpt")
    assert sorted(p.name for p in first.parent.iterdir()) == ["last.ckpt", "step_00000002.ckpt", "step_00000004.ckpt"]


def test_finished_process_is_not_interrupted_by_an_old_file(run, monkeypatch):
    """A process may finish before the first one has renamed its last checkpoint; status 75 would requeue the job."""
    read = []
    monkeypatch.setattr("ddim.training.run.read_checkpoint", lambda path: read.append(path.name) or {"global_step": 4})
    run(trainer={"max_steps": 6})
    assert read == ["last.ckpt"]


@pytest.mark.parametrize(("keep_best", "kept"), [(0, []), (1, [4]), (2, [4, 2])])
def test_checkpoints_rank_by_metric_then_step(tmp_path, keep_best, kept):
    checkpoints = Checkpoints(tmp_path, 1, 1, 0, None, keep_best)
    assert [checkpoints.rank(*pair) for pair in ((3.0, 1), (2.0, 2), (2.0, 3), (1.0, 4))] == [True, True, False, True]
    assert checkpoints.best_steps == kept
    assert checkpoints.best[0] == (1.0, 4)


def test_what_is_not_finite_is_never_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1, 1, 0, None, 1)
    values = [math.nan, 3.0, math.inf, math.nan, 2.0, math.nan]
    best = [checkpoints.rank(values[i % 6] - i // 6, 5000 * i) for i in range(60)]
    assert best == [i == 1 or i % 6 == 4 for i in range(60)]
    (tmp_path / "best.ckpt").touch()
    resumed = Checkpoints(tmp_path, 1, 1, 0, None, 1)
    stored = {"ddim_counts": {"validation": {"protocol": None, "best": [(math.nan, 10)]}}}  # by earlier code
    resumed.on_load_checkpoint(None, None, stored)
    assert (resumed.best_steps, resumed.rank(3.0, 20)) == ([], True)
