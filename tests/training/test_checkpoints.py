"""Checkpoints are whole or not there; damage is noticed; the newest whole one is used; signals save first."""

import errno
import os
import random
import shutil
import signal
import subprocess

import pytest
import torch

from ddim.checkpoints import load_model
from ddim.checkpoints.checksum import has_checksum, write_checksum
from ddim.checkpoints.model import read_checkpoint
from ddim.errors import Interrupted, UserError
from ddim.training.module import DiffusionModule


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A small sealed file with a known tensor in it."""
    path = tmp_path_factory.mktemp("sealed") / "a.ckpt"
    torch.save({"x": torch.arange(3000.0)}, path)
    write_checksum(path)
    return path.read_bytes()


def test_a_sealed_file_loads_and_ends_in_the_sha256_of_the_rest(content, tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    assert has_checksum(path)
    for mmap in (False, True):
        assert torch.equal(torch.load(path, weights_only=True, mmap=mmap)["x"], torch.arange(3000.0))
    (tmp_path / "rest").write_bytes(content[:-76])
    digest = subprocess.run(["sha256sum", tmp_path / "rest"], capture_output=True, text=True, check=True).stdout[:64]
    assert content[-76:].decode() == f"ddim-sha256:{digest}"


def test_every_bit_flip_before_the_seal_is_noticed(content, tmp_path):
    path, generator = tmp_path / "a.ckpt", random.Random(0)
    for k in range(100):
        damaged = bytearray(content)
        place = generator.randrange(len(content) - 64) if k else len(content) - 64
        place = place if place < len(content) - 76 or place >= len(content) - 64 else 0
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="its checksum is wrong"):
            has_checksum(path)


def test_two_hundred_damages_of_a_checkpoint_are_all_noticed(run, tmp_path):
    """Bits flipped anywhere, ends cut off, blocks zeroed or swapped: nothing of it is loaded."""
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
        elif kind == 2:  # at the end, where the seal is
            changed[-1 - generator.randrange(100)] ^= 1 << generator.randrange(8)
        else:
            changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        return bytes(changed)

    for k in range(200):
        path.write_bytes(damage(k % 5))
        for read in (read_checkpoint, load_model) if k < 20 else (read_checkpoint,):
            with pytest.raises(UserError, match="cannot be read as a checkpoint"):
                read(path)


def test_a_checkpoint_of_before_there_were_seals_still_loads(run, tmp_path):
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
def test_the_newest_few_and_every_so_many_stay(run, keep_last, keep_every, expected):
    trainer = {"max_steps": 9, "checkpoint_every": 2, "keep_last": keep_last, "keep_every": keep_every}
    last = run(trainer=trainer)
    assert steps(last.parent) == expected
    assert [read_checkpoint(p)["global_step"] for p in sorted(last.parent.glob("step_*.ckpt"))] == expected
    assert last.samefile(last.parent / "step_00000009.ckpt")
    assert sorted(p.name for p in last.parent.iterdir() if p.name.startswith(".")) == []


def test_the_newest_whole_checkpoint_is_used_and_it_says_so(run, same, caplog):
    options = {"trainer": {"max_steps": 9, "checkpoint_every": 3}}
    whole = run("whole", **options)
    last = run("other", trainer={"max_steps": 7, "checkpoint_every": 3})
    assert steps(last.parent) == [6, 7]
    with last.open("r+b") as file:  # by both of its names
        file.seek(5000)
        file.write(b"damage")
    resumed = run("other", **options, ckpt_path="last")
    assert same(whole, resumed)
    messages = [record.message for record in caplog.records if "checksum is wrong" in record.message]
    assert [message.split()[0].split("/")[-1] for message in messages] == ["last.ckpt", "step_00000007.ckpt"]
    assert all(message.endswith("Trying the one before.") for message in messages)
    assert read_checkpoint(resumed)["global_step"] == 9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_told_to_stop_saves_and_goes_on_as_if_nothing_had_happened(run, same, monkeypatch, number):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    whole = run("whole", network={"dropout": 0.3}, trainer={"max_steps": 9, "accumulate": 2})
    training_step = DiffusionModule.training_step

    def told(self, batch, batch_idx):
        if batch["step"] == 4:
            os.kill(os.getpid(), number)
        return training_step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionModule, "training_step", told)
        with pytest.raises(Interrupted, match=r"stopped at step 5 of 9 and saved it; go on with ckpt_path=last"):
            run("told", network={"dropout": 0.3}, trainer={"max_steps": 9, "accumulate": 2})
    assert {n: signal.getsignal(n) for n in before} == before
    assert same(
        whole, run("told", network={"dropout": 0.3}, trainer={"max_steps": 9, "accumulate": 2}, ckpt_path="last")
    )


@pytest.mark.parametrize("hidden", [False, True], ids=["as it is", "as torch reports it"])
def test_a_full_disk_leaves_the_checkpoint_before_it(run, same, monkeypatch, tmp_path, hidden):
    first = run(trainer={"max_steps": 4, "checkpoint_every": 2})
    shutil.copy(first, tmp_path / "before.ckpt")
    save = torch.save

    def full(thing, file, *args, **kwargs):
        try:
            save({"part": torch.zeros(100)}, file)
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            if hidden:
                raise RuntimeError("unexpected pos 4639232 vs 4639124")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        UserError, match=r"step_00000006.ckpt of step 6 cannot be written \(the disk is full\).*are intact"
    ):
        run(trainer={"max_steps": 8, "checkpoint_every": 2}, ckpt_path="last")
    monkeypatch.undo()
    assert same(first, tmp_path / "before.ckpt")
    assert sorted(p.name for p in first.parent.iterdir()) == ["last.ckpt", "step_00000002.ckpt", "step_00000004.ckpt"]


def test_a_process_that_ends_before_the_first_has_named_the_last_checkpoint_has_finished(run, monkeypatch):
    """It sees the checkpoint that the run went on from; a run that was told to stop would go back into the queue."""
    read = []

    def older(path):
        read.append(path.name)
        return {"global_step": 4}

    monkeypatch.setattr("ddim.training.run.read_checkpoint", older)
    run(trainer={"max_steps": 6})
    assert read == ["last.ckpt"]
