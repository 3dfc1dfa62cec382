"""Settings that a training refuses before work starts."""

import re

import pytest

from ddim.errors import UserError

BAD_SETTINGS = {
    "channels": ({"network": {"channels": 3}}, r"images of .* \(3, 8, 8\), the data has \(1, 8, 8\)"),
    "size": ({"network": {"image_size": [16, 16]}}, r"\(1, 16, 16\), the data has \(1, 8, 8\)"),
    "network key": ({"network": {"dropuot": 0.1}}, r"unknown key network.dropuot \(did you mean dropout\?\); allowed"),
    "network name": ({"network": {"name": "unett"}}, r"unknown network 'unett' \(did you mean unet\?\); allowed: unet"),
    "network value": ({"network": {"ch": 6}}, "network: .*num_groups=4"),
    "data name": ({"data": {"name": "digit"}}, r"unknown data set 'digit' \(did you mean digits\?\); allowed"),
    "steps of the grid": ({"grid": {"sampler": {"S": 21}}}, "grid.sampler: .*S=21.*20"),
    "batch": ({"trainer": {"accumulate": 3}}, "batch_size=8 .* multiple of 3"),
    "best": (
        {"logger": {"log_model": "best", "wandb": True}},
        r"log_model=best needs .*; set eval.every ",
    ),
    "seed": ({"seed": -1}, r"seed=-1 must lie in 0 \.\. 2\*\*64 - 1"),
    "large seed": ({"seed": 1 << 64}, "seed=18446744073709551616 must lie"),
    "grid seed": ({"grid": {"seed": -1}}, "grid: seed=-1 must lie"),
    "batch too large": ({"trainer": {"batch_size": 4 * 10**9}}, r"batch_size=4000000000 needs .* GiB .*accumulate"),
    "batch without addresses": ({"trainer": {"batch_size": 1 << 33}}, r"batch_size=8589934592 must be at most 2\*\*32"),
    "grid too large": ({"grid": {"n": 10**12, "every": 1}}, r"grid\.n=1000000000000 needs .* GiB"),
    "processes": ({"trainer": {"devices": 10**9}}, r"batch_size=8 must hold an image for each of 1000000000 processes"),
    "worker processes": ({"trainer": {"num_workers": 10**6}}, r"num_workers=1000000 must be at most 1024"),
    "max_steps": ({"trainer": {"max_steps": 0}}, "trainer: max_steps=0 must be at least 1"),
    "log_every": ({"trainer": {"log_every": 0}}, "trainer: log_every=0 must be at least 1"),
    "workers": ({"trainer": {"num_workers": -1}}, "num_workers=-1 must not be negative"),
    "precision": ({"trainer": {"precision": "16-mixed"}}, "trainer.precision.*16-mixed.*allowed: .*bf16-mixed"),
    "prediction": ({"objective": {"prediction": "epsilon"}}, "objective.prediction.*epsilon.*allowed: eps"),
    "validation": ({"eval": {"every": 1, "n": 0, "heldout": 0}}, "eval: n=0 and heldout=0 leave nothing to measure"),
    "steps of the validation": ({"eval": {"every": 1, "sampler": {"S": 21}}}, "eval.sampler: .*S=21.*20"),
    "weights of the validation": ({"eval": {"weights": "ema_0.5"}}, "eval.weights .*ema_0.5.*allowed: online, ema"),
    "no weights": ({"eval": {"weights": []}}, r"eval: weights=\[\] must name at least one"),
    "score": ({"eval": {"metric": {"extractor": "inception", "metrics": ["is"]}}}, "must begin with fd or kd"),
    "held-out images": ({"eval": {"heldout": -1}}, "eval: heldout=-1 must be at least 0"),
    "best checkpoints": ({"trainer": {"keep_best": -1}}, "keep_best=-1 must not be negative"),
    "decays alike": (
        {"ema": {"decay": [0.9, 0.9999991, 0.9999992]}},
        "must hold rates that differ in their first six digits",
    ),
    "decay": ({"ema": {"decay": 1.0}}, "ema: decay=1.0 must lie in"),
    "learning rate": ({"optim": {"lr": 0.0}}, "optim: lr=0.0 must be positive"),
    "devices": ({"trainer": {"devices": 0}}, "trainer: .*devices=0"),
    "no device": ({"trainer": {"devices": []}}, r"trainer: devices=\[\] must hold the numbers of different GPUs"),
    "a device twice": ({"trainer": {"devices": [1, 1]}}, r"trainer: devices=\[1, 1\] must hold the numbers of diff"),
    "a negative device": ({"trainer": {"devices": [0, -1]}}, r"trainer: devices=\[0, -1\] must hold the numbers"),
    "too many devices": ({"trainer": {"devices": [*range(9)]}}, r"batch_size=8 must hold an image for each of 9 proc"),
    "GPUs on a CPU": ({"trainer": {"devices": [0, 2]}}, "trainer: .*CPUAccelerator"),
}


@pytest.mark.parametrize("setting", BAD_SETTINGS)
def test_bad_setting_is_refused_in_one_sentence(refused, setting):
    changes, message = BAD_SETTINGS[setting]
    assert re.search(message, refused(**changes))


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_cpu_offload", "deepspeed_stage_2"])
def test_divided_parameters_are_refused(run, strategy):
    with pytest.raises(UserError, match=f"strategy={strategy} may divide the parameters .*; take strategy=ddp"):
        run(trainer={"strategy": strategy})


@pytest.mark.parametrize("key", ["accelerator", "strategy"])
def test_unknown_accelerator_or_strategy_is_refused(run, key):
    with pytest.raises(UserError, match=f"trainer: .*invalid {key} name: `{key}='nonsense'`"):
        run(trainer={key: "nonsense"})
