"""trainer=auto: what is chosen for a training, and where it is stored."""

import dataclasses

import pytest

from ddim.checkpoints import load_model
from ddim.checkpoints.model import read_checkpoint
from ddim.checkpoints.spec import KEY
from ddim.config import build
from ddim.errors import UserError
from ddim.inference import auto
from ddim.inference.auto import Hardware
from ddim.training import run as run_module
from ddim.training.module import COMPUTED
from ddim.training.run import build_module, choose_trainer, trainer_settings
from ddim.training.spec import TrainerSpec, TrainSpec

AUTO = dict.fromkeys(("precision", "tf32", "channels_last", "compile", "winograd"))
GPU = Hardware("cuda", "some GPU", bf16=True, compiler=True)
CPU = Hardware("cpu", "some CPU", compiler=True)


@pytest.fixture
def chosen(config, monkeypatch):
    """chosen(hardware, steps, compile=True): the trainer for so many steps on a device, with what is given."""

    def chosen(hardware, steps, **given):
        monkeypatch.setattr(auto, "this_hardware", lambda device: hardware)
        spec = build(TrainSpec, config(trainer=AUTO | {"max_steps": steps} | given), "")
        return choose_trainer(spec, spec.model_spec())[0].trainer

    return chosen


def settings(trainer):
    return {name: value for name in AUTO if (value := getattr(trainer, name)) != getattr(TrainerSpec(), name)}


def test_a_gpu_trains_in_bfloat16_and_compiles_for_long_runs(chosen):
    fast = {"precision": "bf16-mixed", "channels_last": True}
    assert settings(chosen(GPU, 10)) == fast
    assert settings(chosen(GPU, 1_000_000)) == fast | {"compile": True}
    assert settings(chosen(GPU, 1_000_000, precision="32-true", compile=False)) == {"tf32": True, "channels_last": True}


def test_graphs_are_used_where_they_are_given_and_stated(config, monkeypatch):
    passed: list[dict[str, bool]] = []
    monkeypatch.setattr(auto, "this_hardware", lambda device: GPU)
    monkeypatch.setattr(run_module, "accelerate", lambda network, device, **options: passed.append(options))
    for graphs in (False, True):
        spec = build(TrainSpec, config(trainer=AUTO | {"max_steps": 1_000_000, "graphs": graphs}), "")
        spec, reason = choose_trainer(spec, spec.model_spec())
        assert trainer_settings(spec.trainer)["graphs"] is graphs
        assert ("graphs=true as given" in reason) is graphs
        build_module(spec, spec.model_spec())
        assert spec.evaluation().compute.graphs is graphs  # validation uses the same network
        assert passed[-1] == {"channels_last": True, "compile": True, "winograd": False, "graphs": graphs}


@pytest.mark.parametrize(
    "several", [{"devices": 2}, {"devices": "auto"}, {"devices": [0, 1]}, {"num_nodes": 2}, {"accumulate": 2}]
)
def test_graphs_of_several_batches_or_processes_are_refused(config, several):
    for one in ({"devices": 1}, {"devices": "1"}, {"devices": [3]}):
        assert build(TrainSpec, config(trainer={"graphs": True} | one), "").trainer.graphs
    with pytest.raises(UserError, match="graphs=true needs devices=1"):
        build(TrainSpec, config(trainer={"graphs": True} | several), "")


def test_operations_of_an_image_are_counted_in_eval_mode(chosen, monkeypatch):
    modes = []
    count = auto.rough_flops
    monkeypatch.setattr(
        auto, "rough_flops", lambda network, *args: modes.append(network.training) or count(network, *args)
    )
    chosen(CPU, 10)
    assert modes == [False]


def test_a_cpu_trains_in_float32(chosen):
    assert settings(chosen(CPU, 1_000_000)) == {}
    loops = dataclasses.replace(CPU, cpp_loops=True)
    assert settings(chosen(loops, 1_000_000)) == {"channels_last": True, "winograd": True}
    assert settings(chosen(loops, 1, precision="bf16-mixed")) == {"precision": "bf16-mixed"}


def test_nothing_is_chosen_where_everything_is_given(config, monkeypatch):
    monkeypatch.setattr(auto, "this_hardware", lambda device: pytest.fail("asked"))
    spec = build(TrainSpec, config(), "")
    assert choose_trainer(spec, spec.model_spec()) == (spec, None)


def test_a_checkpoint_says_how_its_weights_were_computed(run, same, monkeypatch):
    monkeypatch.setattr(auto, "this_hardware", lambda device: CPU)
    exact, path = run("exact"), run("auto", trainer=AUTO)
    assert same(exact, path)  # as this CPU has no C++ loops
    stored = read_checkpoint(path)[KEY]
    assert stored[COMPUTED] == {"settings": "float32", "reason": "some CPU: no C++ loops: they need a compiler"}
    assert COMPUTED not in read_checkpoint(exact)[KEY]
    assert load_model(path).recipe == load_model(exact).recipe


def test_a_run_resumes_with_other_settings(run):
    run("run", trainer=AUTO | {"max_steps": 2, "precision": "32-true"})
    path = run("run", trainer={"max_steps": 3}, checkpoint="last")
    assert read_checkpoint(path)["global_step"] == 3
