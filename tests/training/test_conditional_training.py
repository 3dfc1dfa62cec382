"""Training with labels: what the loss sees, resuming, processes, and what is measured."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from ddim import DDIM, initial_noise, linear_tau, sample
from ddim.checkpoints import load_model
from ddim.checkpoints.model import read_checkpoint
from ddim.config import build
from ddim.data.datasets import DataSpec, load_images
from ddim.data.images import MemoryImages, to_uint8
from ddim.diffusion.objective import drop_labels, per_sample_loss, training_noise, uniform_times
from ddim.diffusion.spec import SamplerSpec
from ddim.distributed import SINGLE_PROCESS, Processes
from ddim.errors import UserError
from ddim.evaluation.fidelity import EvaluateSpec, evaluate
from ddim.evaluation.metrics import MetricSpec
from ddim.inference.compute import ComputeSpec
from ddim.training.heldout import heldout_images, heldout_loss, load_heldout
from ddim.training.module import DiffusionModule
from ddim.training.run import build_data
from ddim.training.spec import TrainSpec

LABELS = {"data": {"labels": "classes"}, "objective": {"label_drop": 0.3}}
DIGITS = DataSpec("digits", (8, 8), 1, labels="classes")


def embedding(path):
    return read_checkpoint(path)["state_dict"]["network.class_emb.weight"]


def test_the_loss_sees_the_labels_that_are_not_dropped(config):
    spec = build(TrainSpec, config(**LABELS), "")
    module = DiffusionModule(spec.model_spec(), spec.objective, spec.optim, spec.seed)
    module.trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=1, global_rank=0)
    x0, positions, y = torch.linspace(-1, 1, 32 * 64).reshape(32, 1, 8, 8), torch.arange(32), torch.arange(32) % 10
    output = module.training_step({"images": x0, "labels": y, "step": 9, "positions": positions}, 0)
    dropped = drop_labels(y, 10, 0.3, 5, 9, positions)
    assert 0 < int((dropped == 10).sum()) < 32
    assert torch.equal(output["y"], dropped)
    arguments = (module.alpha_bar, x0, uniform_times(20, 5, 9, positions), training_noise(5, 9, positions, (1, 8, 8)))
    losses = {
        name: per_sample_loss(partial(module.model, y=labels), *arguments).detach()
        for name, labels in (("dropped", dropped), ("all", y))
    }
    torch.testing.assert_close(output["losses"], losses["dropped"])
    assert not torch.allclose(output["losses"], losses["all"], rtol=1e-3)


@pytest.mark.integration
def test_conditional_training_resumes_bitwise(run, same, killed_run):
    trainer = {"max_steps": 6, "accumulate": 2, "checkpoint_every": 2}
    straight = run("straight", **LABELS, trainer=trainer)
    killed_run(4, 1, "killed", **LABELS, trainer=trainer)
    resumed = run("killed", **LABELS, trainer=trainer, checkpoint="last")
    assert same(straight, resumed)
    assert torch.equal(embedding(straight), embedding(resumed))
    other = run("other", **LABELS | {"objective": {"label_drop": 0.0}}, trainer=trainer)
    assert not same(straight, other)
    model = load_model(straight)
    assert (model.spec.num_classes, model.spec.classes) == (10, tuple("0123456789"))


@pytest.mark.integration
def test_two_processes_train_a_conditional_network_as_one(run, same, two_processes, logged):
    robust = LABELS | {"optim": {"eps": 1e-3}}  # where Adam makes no step of a gradient that is rounding alone
    one, two = run("one", **robust), run("two", **robust, trainer=two_processes)
    assert same(one, two, atol=1e-6)
    for column in ("train/loss_conditional", "train/loss_unconditional"):
        assert logged("two", column) == pytest.approx(logged("one", column), rel=1e-4, nan_ok=True)


@pytest.mark.integration
def test_losses_with_and_without_a_label_are_logged_apart(run, after_loss, logged):
    """Losses of 3 with a label and 7 without; the mean and the quarters are of all samples."""
    seen = []

    def losses_are_known(step, batch_idx, output):
        seen.append(output["y"] == 10)
        output["losses"] = 3 + 4 * seen[-1].double()

    after_loss(losses_are_known)
    path = run(**LABELS, trainer={"max_steps": 4, "batch_size": 64, "log_every": 4})
    assert logged("run", "train/loss_conditional") == {3: 3.0}
    assert logged("run", "train/loss_unconditional") == {3: 7.0}
    share = float(torch.cat(seen).double().mean())
    assert logged("run", "train/loss")[3] == pytest.approx(3 + 4 * share, rel=1e-6)
    assert read_checkpoint(path)["ddim_counts"]["losses"].shape == (2, 8)


def test_held_out_images_are_balanced():
    labels = torch.tensor([2, 2, 2, 0, 1, 0, 2, 1])
    images = MemoryImages("x", torch.zeros(8, 1, 1, 1, dtype=torch.uint8), labels, ("a", "b", "c"))
    assert heldout_images(images, 6).tolist() == [0, 3, 4, 1, 5, 7]
    assert heldout_images(images, 100).tolist() == [0, 3, 4, 1, 5, 7, 2, 6]
    images.labels = None
    assert heldout_images(images, 6).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.integration
def test_held_out_loss_is_of_the_images_with_their_labels(run):
    """It depends on neither batch size nor processes; other labels give another loss."""
    model = load_model(run(**LABELS, optim={"lr": 0.01}, trainer={"max_steps": 20, "log_every": 20}), "online")
    compute = ComputeSpec("cpu")
    shares = load_heldout(DIGITS, 50, 64, SINGLE_PROCESS)
    assert torch.bincount(shares[0].labels).tolist() == [5] * 10
    images = load_images(DIGITS)
    assert torch.equal(shares[0].pixels, images.images[heldout_images(images, 50)])
    loss = heldout_loss(model, shares, "mean", 0, compute, SINGLE_PROCESS)["loss"]
    small = [batch for rank in (1, 0) for batch in load_heldout(DIGITS, 50, 7, Processes(rank, 2))]
    assert heldout_loss(model, small, "mean", 0, compute, SINGLE_PROCESS)["loss"] == pytest.approx(loss, rel=1e-5)
    wrong = [shares[0]._replace(labels=(shares[0].labels + 1) % 10)]
    assert heldout_loss(model, wrong, "mean", 0, compute, SINGLE_PROCESS)["loss"] != pytest.approx(loss, rel=1e-4)


@pytest.mark.integration
def test_the_grid_has_a_row_for_each_class(run, tmp_path):
    path = run(**LABELS, grid={"every": 2, "n": 20, "seed": 7, "sampler": {"S": 3}}, trainer={"max_steps": 2}, ema=None)
    shown = pil_to_tensor(Image.open(tmp_path / "run" / "samples" / "step_00000002.png"))
    assert shown.shape == (1, 10 * 34 - 2, 2 * 34 - 2)
    model = load_model(path, "online")
    x_T = initial_noise(range(20), (1, 8, 8), seed=7)
    labelled = partial(model, y=torch.arange(20) % 10)
    images = to_uint8(sample(labelled, model.spec.schedule, x_T, linear_tau(20, 3), DDIM()))
    for i, image in enumerate(images):
        top, left = i % 10 * 34, i // 10 * 34
        assert torch.equal(shown[:, top : top + 32 : 4, left : left + 32 : 4], image)


@pytest.mark.integration
def test_a_validation_is_the_evaluation_with_labels_in_turn(run, tmp_path):
    """The record has the key of evaluate.py's, for the same checkpoint with label=all."""
    metric = {"extractor": "digits_classifier", "metrics": ["fd"]}
    eval_ = {"every": 2, "n": 30, "heldout": 10, "metric": metric, "sampler": {"S": 2}}
    eval_["reference_dir"] = str(tmp_path / "reference")
    path = run(**LABELS, eval=eval_, trainer={"max_steps": 2})
    [record] = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert record["condition"] == {"label": "all", "w": 0.0}
    assert record["metrics"]["val_loss"] > 0
    evaluation = EvaluateSpec(
        checkpoint=str(path),
        name="run",
        output_dir=str(tmp_path / "run"),
        sampler=SamplerSpec(S=2),
        compute=ComputeSpec("cpu", 7),
        data=DIGITS,
        metric=build(MetricSpec, metric, "metric"),
        n=30,
        grid=0,
        label="all",
        reference_dir=str(tmp_path / "reference"),
    )
    assert evaluate(evaluation)[1] is False  # it is there already


def test_overfitting_keeps_the_labels_of_the_first_batch(config):
    spec = build(TrainSpec, config(**LABELS, trainer={"overfit": True}), "")
    images = build_data(spec).images
    assert images.labels.tolist() == load_images(DIGITS).labels[:8].tolist()
    assert images.classes == tuple("0123456789")


@pytest.mark.integration
def test_a_run_does_not_resume_with_other_labels(run, tmp_path):
    for i, name in enumerate(["a/0.bmp", "a/1.bmp", "a/2.bmp", "b/3.bmp"]):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 9 * i).save(tmp_path / "images" / name)
    data = {"name": "folder", "root": str(tmp_path / "images"), "labels": "folders"}
    run(data=data, trainer={"max_steps": 1})
    (tmp_path / "images/a/2.bmp").rename(tmp_path / "images/b/2.bmp")  # the order of the pixels stays
    with pytest.raises(UserError, match="was trained on other images or labels"):
        run(data=data, trainer={"max_steps": 2}, checkpoint="last")
    (tmp_path / "images/b/2.bmp").rename(tmp_path / "images/a/2.bmp")
    run(data=data, trainer={"max_steps": 2}, checkpoint="last")
    with pytest.raises(UserError, match=r"network.classes: 2 and None"):
        run(data=data | {"labels": None}, trainer={"max_steps": 3}, checkpoint="last")


REFUSED = [
    ({"objective": {"label_drop": 1.5}}, r"label_drop=1.5 must be a probability in \[0, 1\); use 0 to drop no label\."),
    ({"objective": {"label_drop": -0.1}}, r"label_drop=-0.1 must be"),
    (
        {"objective": {"label_drop": 0.3}},
        "label_drop=0.3 drops labels, and data.labels=null gives none; set data.labels",
    ),
    ({"network": {"classes": 10}}, "network.classes=10 needs labels, and data.labels=null gives none; set data.labels"),
    (
        {"network": {"classes": 7}, "data": {"labels": "classes"}},
        "network.classes=7 contradicts data.labels=classes, which gives 10 classes; leave network.classes null",
    ),
    (
        {
            "network": {"name": "categorical_unet", "categories": 3},
            "data": {"labels": "classes"},
            "objective": {"prediction": "x0", "multinomial": "kl"},
        },
        r"network: classes=10 is not for pixels of categories \(multinomial diffusion\)",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_labels_that_do_not_fit_are_refused(config, changes, message):
    with pytest.raises(UserError, match=message):
        build(TrainSpec, config(**changes), "").model_spec()


def test_the_recipe_names_labels_only_where_there_are_any(config):
    """Checkpoints from before there were labels must resume."""
    plain, labelled = (build(TrainSpec, config(**changes), "").recipe() for changes in ({}, LABELS))
    assert labelled == plain | {"data.labels": "classes", "objective.label_drop": 0.3}
    same_classes = build(TrainSpec, config(**LABELS, network={"classes": 10}), "").model_spec()
    assert same_classes.differences(build(TrainSpec, config(**LABELS), "").model_spec()) == []
