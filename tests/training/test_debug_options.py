"""Options for finding faults: training on one batch, and the profilers."""

import pytest
import torch

from ddim.config import build
from ddim.data.datasets import load_images
from ddim.training.run import build_data
from ddim.training.spec import TrainSpec


def test_overfit_keeps_the_first_batch_only(config):
    spec = build(TrainSpec, config(trainer={"overfit": True}), "")
    every, kept = load_images(spec.data, "train"), build_data(spec).images
    assert len(kept) == spec.trainer.batch_size < len(every)
    assert torch.equal(kept.images, every.images[: len(kept)])


@pytest.mark.parametrize(("group", "option"), [("trainer", {}), ("data", {"name": "folder"})])
def test_newer_options_are_part_of_the_recipe_only_if_on(config, group, option):
    """Checkpoints from before the option must resume."""
    name = {"trainer": "overfit", "data": "convert"}[group]
    recipes = [build(TrainSpec, config(**{group: option | {name: on}}), "").recipe() for on in (False, True)]
    assert recipes[1] == recipes[0] | {f"{group}.{name}": True}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("profiler", "steps", "content"),
    [
        ("simple", 2, "run_training_batch"),
        ("advanced", 2, "training_step"),
        ("kernels", 22, "conv"),
        ("kernels", 2, ""),
    ],
)
def test_profilers_write_into_the_folder_of_the_run(run, profiler, steps, content):
    folder = run(trainer={"profiler": profiler, "max_steps": steps}).parents[1]
    [report] = folder.glob("fit-profile*.txt")
    assert content in report.read_text()
