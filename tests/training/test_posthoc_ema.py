"""The averages for post-hoc EMA: exact on resuming, begun at any step, and what scripts/ema.py makes of them."""

import shutil

import pytest
import torch

from ddim.checkpoints import load_model
from ddim.checkpoints.model import read_checkpoint, weights_hash
from ddim.checkpoints.posthoc import LENGTHS, PostHocSpec, share_before, snapshot_steps, update_rate, write_averages
from ddim.config import build
from ddim.errors import UserError
from ddim.io import read_safetensors, write_safetensors
from ddim.training.posthoc_ema import PostHocEMA
from ddim.training.spec import TrainSpec

pytestmark = pytest.mark.integration
ON = {"posthoc": True}


@pytest.fixture(autouse=True)
def early(monkeypatch):
    """Snapshots from the first steps on."""
    monkeypatch.setattr("ddim.checkpoints.posthoc.FIRST", 3)
    monkeypatch.setattr("ddim.checkpoints.posthoc.RATIO", 1.3)


@pytest.fixture
def seen(monkeypatch):
    """The weights after each step: number -> name -> float64."""
    seen, on_train_batch_end = {}, PostHocEMA.on_train_batch_end

    def record(self, trainer, module, *args):
        on_train_batch_end(self, trainer, module, *args)
        seen[self.updates] = {k: v.detach().double() for k, v in module.network.named_parameters()}

    monkeypatch.setattr(PostHocEMA, "on_train_batch_end", record)
    return seen


def direct(seen, length, first):
    """Return the average at the last step, tracked in float64 from the weights `first` on."""
    average = dict(first)
    for step in sorted(seen):
        rate = update_rate(length, step)
        average = {name: value + rate * (seen[step][name] - value) for name, value in average.items()}
    return average


def apart(one, other):
    """Return the distance of two sets of weights, relative to the norm of the second."""
    distance = sum(float((one[name].double() - value).square().sum()) for name, value in other.items())
    return (distance / sum(float(value.square().sum()) for value in other.values())) ** 0.5


def files(folder):
    return {path.name: weights_hash(read_safetensors(path)[0]) for path in (folder / "ema").iterdir()}


def test_killed_run_has_the_same_averages_and_snapshots(run, killed_run, same, tmp_path):
    options = {"ema": ON, "trainer": {"max_steps": 9, "checkpoint_every": 4, "accumulate": 2}}
    uninterrupted = run("uninterrupted", **options)
    killed_run(7, 1, "killed", **options)
    expected = files(tmp_path / "uninterrupted")
    assert sorted(expected) == [f"step_{step:08d}.safetensors" for step in (3, 4, 5, 7, 9)]
    assert files(tmp_path / "killed").items() < expected.items()  # those of steps 5 and 7 are written again below
    (tmp_path / "killed" / "ema" / f".{16 * '0'}_step_00000009.safetensors").touch()  # a write that was killed
    assert same(uninterrupted, run("killed", **options, checkpoint="last"))
    assert files(tmp_path / "killed") == expected
    state = read_checkpoint(uninterrupted)["posthoc_ema"]
    assert (state["start"], [*state["averages"]]) == (0, [f"{length:g}" for length in LENGTHS])


def test_any_length_is_made_afterwards(run, seen, tmp_path):
    last = run(ema=ON, trainer={"max_steps": 24}, optim={"lr": 0.01})
    first = seen[1]  # the first update leaves nothing of the initial weights
    state = read_checkpoint(last)["posthoc_ema"]["averages"]
    for length in LENGTHS:
        assert apart(state[f"{length:g}"], direct(seen, length, first)) < 1e-6
    spec = PostHocSpec(str(last), (0.05, 0.1, 0.15), output_dir=str(tmp_path / "out"))
    written, warnings = write_averages(spec)
    assert warnings == []
    for average in written:
        model = load_model(average.path)
        weights = dict(model.network.named_parameters())
        assert apart(weights, direct(seen, average.length, first)) < (1e-6 if average.length in LENGTHS else 1e-3)
        assert (model.weights, model.step) == (f"posthoc_{average.length:g}", 24)
        assert model.recipe == load_model(last).recipe != {}
        assert load_model(average.path, model.weights).weights_hash == model.weights_hash
        assert average.path == tmp_path / "out" / f"run_step_24_length_{average.length:g}.safetensors"
        assert apart(weights, direct(seen, 0.12, first)) > 1e-3
    with pytest.raises(UserError, match=r"holds posthoc_0.1 weights only; choose weights=posthoc_0.1"):
        load_model(written[1].path, "online")


def test_averaging_may_begin_and_end_in_any_step(run, same, seen, tmp_path, caplog):
    options = {"trainer": {"max_steps": 12, "checkpoint_every": 4}}
    run(trainer={"max_steps": 4})
    (tmp_path / "run" / "ema").mkdir()
    (tmp_path / "run" / "ema" / "step_00000003.safetensors").write_text("of an earlier averaging")
    begin = dict(load_model(tmp_path / "run" / "checkpoints" / "last.ckpt", "online").network.named_parameters())
    last = run(**options, ema=ON, checkpoint="last")
    assert "averaging begins at step 4" in caplog.text
    assert "at step 12 they still count for more than 1 % in averages of a length above 0.16" in caplog.text
    state = read_checkpoint(last)["posthoc_ema"]
    assert state["start"] == 4
    first = {name: value.double() for name, value in begin.items()}
    for length in LENGTHS:
        assert apart(state["averages"][f"{length:g}"], direct(seen, length, first)) < 1e-6
    written, warnings = write_averages(PostHocSpec(str(last), (0.1, 0.25), output_dir=str(tmp_path)))
    assert apart(dict(load_model(written[0].path).network.named_parameters()), direct(seen, 0.1, first)) < 1e-3
    share = f"{share_before(0.25, 4, 12):.0%}"
    assert any(f"length 0.25: {share} of its profile lies before step 4, where averaging began" in w for w in warnings)
    assert not any("length 0.1:" in warning for warning in warnings)

    run("without", **options)
    ended = run(trainer={"max_steps": 13}, checkpoint="last")
    assert "posthoc_ema" not in read_checkpoint(ended)
    assert same(ended, run("without", trainer={"max_steps": 13}, checkpoint="last"))


def test_what_cannot_be_averaged_is_refused(run, config, tmp_path):
    last = run(ema=ON, trainer={"max_steps": 6})
    spec = {"checkpoint": str(last), "length": 0.1, "output_dir": str(tmp_path / "out")}

    def refused(match, **changes):
        with pytest.raises(UserError, match=match):
            write_averages(PostHocSpec(**spec | changes))

    refused(r"nowhere holds no snapshot of step 3 to 5; give the folder", snapshots=str(tmp_path / "nowhere"))
    copied, other = tmp_path / "copy", run("other", ema=ON, network={"ch": 8}, trainer={"max_steps": 6})
    shutil.copytree(tmp_path / "run" / "ema", copied)
    shutil.copy(other.parents[1] / "ema" / "step_00000003.safetensors", copied)
    refused("step_00000003.safetensors holds averages of another training", snapshots=str(copied))
    own = read_safetensors(tmp_path / "run" / "ema" / "step_00000003.safetensors")[0]
    for key in ("seed", "data.fingerprint"):
        write_safetensors(copied / "step_00000003.safetensors", own, {key: "6"})
        refused("step_00000003.safetensors holds averages of another training", snapshots=str(copied))
    (copied / "step_00000003.safetensors").write_bytes(b"\0")
    refused("step_00000003.safetensors cannot be read", snapshots=str(copied))
    refused("holds no averages for this; train, or resume, with ema.posthoc=true", checkpoint=str(run("without")))
    assert not (tmp_path / "out").exists()
    (copied / "step_00000003.safetensors").unlink()
    _, warnings = write_averages(PostHocSpec(**spec, snapshots=str(copied)))
    assert "copy lacks 1 of the 3 snapshots, the first of step 3" in warnings[0]
    refused(r"run_step_6_length_0.1.safetensors exists already")
    write_averages(PostHocSpec(**spec, overwrite=True))

    checkpoint = read_checkpoint(last)
    checkpoint["posthoc_ema"]["averages"]["0.05"].popitem()
    del checkpoint["ddim"]["sealed"]
    torch.save(checkpoint, tmp_path / "wrong.ckpt")
    with pytest.raises(UserError, match=r"wrong.ckpt is not understood.*post-hoc EMA 0.05: .* is missing"):
        run("resumed", ema=ON, checkpoint=str(tmp_path / "wrong.ckpt"))
    recipes = [build(TrainSpec, config(ema=ema), "").recipe() for ema in (ON, {})]
    assert recipes[0] == recipes[1]
    assert snapshot_steps(6) == [3, 4, 5]
