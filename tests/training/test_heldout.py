"""The held-out loss: fixed times and noise, by image number."""

import pytest
import torch

from ddim.checkpoints import load_model
from ddim.data.datasets import DataSpec
from ddim.data.images import normalize
from ddim.diffusion.objective import q_sample
from ddim.distributed import SINGLE_PROCESS, Processes
from ddim.inference.compute import ComputeSpec
from ddim.training.heldout import heldout_loss, load_heldout

pytestmark = pytest.mark.integration
DIGITS = DataSpec("digits", (8, 8), 1)
CPU = ComputeSpec("cpu")


@pytest.fixture(scope="module")
def model(finished_run):
    return load_model(finished_run / "checkpoints" / "last.ckpt", "online")


def test_held_out_loss_is_a_function_of_the_image_number(model):
    """It depends on neither the batch size nor the number of processes, but on the seed."""
    one = load_heldout(DIGITS, 50, 64, SINGLE_PROCESS)
    expected = heldout_loss(model, one, "mean", 0, CPU, SINGLE_PROCESS)
    assert list(expected) == ["loss", "loss_quarter_1", "loss_quarter_2", "loss_quarter_3", "loss_quarter_4"]
    assert heldout_loss(model, one, "mean", 1, CPU, SINGLE_PROCESS)["loss"] != pytest.approx(expected["loss"], rel=1e-3)
    for batch_size in (1, 7):
        shares = [load_heldout(DIGITS, 50, batch_size, Processes(rank, 2)) for rank in (1, 0)]
        gathered = []

        class Last(Processes):
            """The last of the processes to call `gather`, which so gets what all of them have."""

            def gather(self, value, gathered=gathered):
                if not isinstance(value, torch.Tensor):
                    return [value]
                gathered.append(value)
                return gathered

        losses = [heldout_loss(model, share, "mean", 0, CPU, Last()) for share in shares]
        assert losses[1] == pytest.approx(expected, rel=1e-5)
        assert losses[0]["loss"] != pytest.approx(expected["loss"], rel=1e-3)  # of half of them


def test_held_out_loss_is_the_objective_at_one_noise(model, monkeypatch):
    """With noise (i + 1) / 10 and time i + 1 of image i, computed image by image from Eq. 4."""
    monkeypatch.setattr(
        "ddim.training.heldout.gaussian", lambda *a: (a[3].reshape(-1, 1, 1, 1) + 1).expand(-1, *a[4]) / 10
    )
    monkeypatch.setattr("ddim.training.heldout.random_words", lambda *a: (a[3][:, None] * 2**32 + 19) // 20)
    share = load_heldout(DIGITS, 20, 20, SINGLE_PROCESS)
    result = heldout_loss(model, share, "sum", 0, CPU, SINGLE_PROCESS)
    losses = []
    with torch.no_grad():
        for i in range(20):
            x_0, a_t = normalize(share[0][1][i : i + 1]), model.spec.schedule.alpha_bar[i + 1]
            eps = torch.full_like(x_0, (i + 1) / 10)
            losses.append(float(((model(q_sample(x_0, eps, a_t), torch.tensor([i + 1])) - eps) ** 2).sum()))
    quarters = {f"loss_quarter_{k + 1}": sum(losses[5 * k : 5 * k + 5]) / 5 for k in range(4)}
    assert result == pytest.approx({"loss": sum(losses) / 20, **quarters}, rel=1e-4)
