"""Sample grids."""

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from ddim import DDIM, initial_noise, linear_tau, sample
from ddim.checkpoints import load_model
from ddim.training.callbacks import GridSpec

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


def test_a_grid_larger_than_a_batch_has_noise_by_image(run, tmp_path):
    last = run(grid=GRID | {"every": 1}, trainer={"max_steps": 1, "batch_size": 2}, ema=None)
    shown = tiles(tmp_path / "run" / "samples" / "step_00000001.png").int()
    assert (shown - sampled(last, "online").int()).abs().max() <= 1


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
