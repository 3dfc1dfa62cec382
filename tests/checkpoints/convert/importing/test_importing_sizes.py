"""Import at the published sizes."""

import re
import shutil

import pytest
import torch
from foreign import bring, put, refusal, weights
from stored import same

from ddim.checkpoints import ModelSpec, StoredModel, read_model
from ddim.checkpoints.convert.model_zoo import PRESETS
from ddim.diffusion.schedule import linear_schedule
from ddim.networks import UNet

FULL = {"cifar10": 35_746_307, "celeba": 78_700_803, "lsun": 113_673_219}


@pytest.fixture(scope="module")
def full():
    """full(preset): random weights of the published size; those of the latest preset are kept."""
    kept = {}

    def full(name):
        if name not in kept:
            kept.clear()
            kept[name] = weights(PRESETS[name])
        return kept[name]

    yield full
    kept.clear()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["flat", "official", "diffusers", "safetensors", "lightning"])
@pytest.mark.parametrize("name", FULL)
def test_a_round_trip_at_the_published_size(tmp_path, full, name, layout):
    state = full(name)
    spec = ModelSpec("unet", PRESETS[name], linear_schedule(), data=name)
    model = StoredModel(spec, state, "ema", 500_000)
    path, options = put(model, tmp_path, layout, {"trained_on": name})
    done = bring(path, **options)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert f"{FULL[name]:,} parameters" in done.lines[2]
    if layout in ("flat", "official"):
        assert f"network: preset {name}, " in done.lines[2]
    back = read_model(done.path)
    assert same(back.state, state)
    assert back.spec.differences(spec) == spec.differences(back.spec) == []
    assert torch.equal(back.spec.schedule.alpha_bar, spec.schedule.alpha_bar)
    assert (back.spec.data, back.weights, back.spec.network_spec) == (name, "ema", spec.network_spec)
    assert back.step == (None if layout == "flat" else 500_000)
    assert done.warnings == []
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(("name", "other"), [("cifar10", "celeba"), ("celeba", "lsun"), ("lsun", "cifar10")])
def test_weights_of_one_published_size_do_not_fit_another(tmp_path, name, other):
    """Tensors of one stored number each make a small file with the names and shapes of a large one."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in UNet(PRESETS[name]).state_dict().items()}
    torch.save({key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}, tmp_path / "flat.ckpt")
    message = refusal(tmp_path / "flat.ckpt", preset=other)
    assert f"do not fit preset {other}: " in message
    assert re.search(r"\d+ (missing|unexpected) \((up|down)\.", message)
    assert f"instead of {(128, 3, 3, 3)}" not in message  # the first layer is the same in all
    torch.save(
        {key: torch.zeros(1).expand(shape) for key, shape in shapes.items() if key != "conv_in.bias"},
        tmp_path / "flat.ckpt",
    )
    assert f"do not fit the nearest, preset {name}: 1 missing (conv_in.bias)." in refusal(tmp_path / "flat.ckpt")
