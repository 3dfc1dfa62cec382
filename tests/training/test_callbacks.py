"""Sample grids and the progress report."""

import logging
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from ddim import DDIM, initial_noise, linear_tau, sample
from ddim.checkpoints import load_model
from ddim.training import callbacks
from ddim.training.callbacks import GridSpec, Progress

N, STEPS = 3, 4
pytestmark = pytest.mark.integration
GRID = {"every": 2, "n": N, "seed": 7, "sampler": {"S": STEPS, "eta": 1.0}}


def tiles(path):
    """Cut a grid of three 8x8 images, enlarged four times and two pixels apart, into uint8 (3, 1, 8, 8)."""
    image = pil_to_tensor(Image.open(path))
    assert image.shape == (1, 66, 66)
    return torch.stack([image[:, r : r + 32 : 4, c : c + 32 : 4] for r, c in ((0, 0), (0, 34), (34, 0))])


def sampled(path, weights, prediction="eps"):
    """Return the images of the grid, uint8, sampled from a checkpoint."""
    model = load_model(path, weights)
    x_T = initial_noise(range(N), (1, 8, 8), seed=7)
    x_0 = sample(model, model.spec.schedule, x_T, linear_tau(20, STEPS), DDIM(eta=1.0), prediction=prediction, seed=7)
    return ((x_0 + 1) * 127.5).clamp(0, 255).add(0.5).to(torch.uint8)


@pytest.mark.parametrize(("accumulate", "prediction"), [(1, "eps"), (2, "v")])
def test_grids_show_the_average_at_their_steps(run, tmp_path, accumulate, prediction):
    trainer = {"max_steps": 5, "accumulate": accumulate, "checkpoint_every": 4}
    objective = {"prediction": prediction}
    run(grid=GRID, trainer=trainer, network={"dropout": 0.5}, optim={"lr": 0.01}, objective=objective)
    files = sorted((tmp_path / "run" / "samples").iterdir())
    assert [p.name for p in files] == ["step_00000002.png", "step_00000004.png"]
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000004.ckpt"
    assert torch.equal(tiles(files[1]), sampled(checkpoint, "ema", prediction))
    assert not torch.equal(tiles(files[1]), sampled(checkpoint, "online", prediction))


def test_without_ema_the_grid_shows_the_online_weights(run, tmp_path):
    last = run(grid=GRID, trainer={"max_steps": 2}, ema=None, optim={"lr": 0.01})
    assert torch.equal(tiles(tmp_path / "run" / "samples" / "step_00000002.png"), sampled(last, "online"))


def test_each_grid_starts_from_the_same_noise(run, tmp_path):
    run(grid=GRID | {"every": 1}, trainer={"max_steps": 3}, optim={"lr": 1e-30})
    one, two, three = [tiles(p) for p in sorted((tmp_path / "run" / "samples").iterdir())]
    assert torch.equal(one, two)
    assert torch.equal(one, three)
    assert not torch.equal(one[0], one[1])


def test_grids_do_not_change_the_training(run, same):
    """Mode, online weights, average and random numbers."""
    options = {"network": {"dropout": 0.5}, "trainer": {"max_steps": 4}}
    assert same(run("with grids", **options, grid=GRID | {"every": 1}), run("without", **options))


def test_resumed_run_does_not_repeat_a_grid(run, tmp_path):
    options = {"grid": GRID}
    run(**options, trainer={"max_steps": 4, "accumulate": 2})
    for file in (tmp_path / "run" / "samples").iterdir():
        file.unlink()
    run(**options, trainer={"max_steps": 7, "accumulate": 2}, checkpoint="last")
    assert [p.name for p in (tmp_path / "run" / "samples").iterdir()] == ["step_00000006.png"]


def test_every_0_samples_no_grids(run, tmp_path):
    run(grid={"every": 0})
    assert not (tmp_path / "run" / "samples").exists()


@pytest.mark.parametrize("change", [{"every": -1}, {"n": 0}, {"seed": -1}, {"seed": 1 << 64}])
def test_wrong_grid_settings_are_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}="):
        GridSpec(**change)


def test_throughput_and_time_left_follow_the_clock(monkeypatch, caplog):
    """Ten steps of 8 images in 5 seconds, from step 100 on; 880 steps to go; loss in two micro-batches of one half."""
    clock = iter([1000.0, 1005.0, 1007.5])
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: next(clock))
    logged = []
    module = SimpleNamespace(log_dict=logged.append)
    trainer = SimpleNamespace(global_step=100, max_steps=990, is_global_zero=True, accumulate_grad_batches=2)
    progress = Progress(batch_size=8, every=10)
    progress.on_train_start(trainer, module)
    with caplog.at_level(logging.INFO, logger="ddim"):
        for batch_idx in range(200, 240):
            trainer.global_step = (batch_idx + 1) // 2
            progress.on_train_batch_end(trainer, module, {"loss": torch.tensor(0.125)}, None, batch_idx)
    assert logged == [
        {"train/images_per_second": pytest.approx(16.0), "train/hours_left": pytest.approx(440 / 3600)},
        {"train/images_per_second": pytest.approx(32.0), "train/hours_left": pytest.approx(870 / 4 / 3600)},
    ]
    assert [r.getMessage() for r in caplog.records] == [
        "step 110 of 990, loss 0.2500, 2.0 steps/s, 16 images/s, 0:07:20 left",
        "step 120 of 990, loss 0.2500, 4.0 steps/s, 32 images/s, 0:03:38 left",
    ]


def test_run_reports_throughput_in_log_and_metrics(run, logged, caplog):
    with caplog.at_level(logging.INFO, logger="ddim"):
        run(trainer={"max_steps": 6, "log_every": 2})
    lines = [m for r in caplog.records if (m := r.getMessage()).startswith("step ")]
    form = re.compile(r"step (\d) of 6, loss \d\.\d{4}, .* images/s, 0:00:\d\d left")
    assert [form.fullmatch(m)[1] for m in lines] == ["2", "4", "6"]
    throughput, hours = (logged("run", f"train/{name}") for name in ("images_per_second", "hours_left"))
    assert list(throughput) == [1, 3, 5]
    assert min(throughput.values()) > 1
    assert hours[1] > hours[5] == 0
