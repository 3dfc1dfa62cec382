"""Import: mismatches, contradictions and unwritable outputs are one sentence, and leave no files."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layouts import (
    GIVEN,
    LAYOUTS,
    MODELS,
    WEIGHTS_FILE,
    bring,
    edit,
    export,
    import_refusal,
    lightning,
    put,
    refusal,
    save,
    weights,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ddim import io
from ddim.checkpoints import read_model
from ddim.checkpoints.convert.importing import ImportSpec
from ddim.checkpoints.convert.model_zoo import PRESETS
from ddim.config import build
from ddim.diffusion.schedule import ScheduleSpec
from ddim.errors import UserError
from ddim.networks import UNet

pytestmark = pytest.mark.integration

STATE = weights()
NAME, NAMES = "mid.block_1.conv1.weight", list(STATE)


def without(*names):
    return {name: value for name, value in STATE.items() if name not in names}


def with_value(value, dtype=torch.float32):
    changed = STATE[NAME].to(dtype, copy=True)
    changed[-1, -1, -1, -1] = value
    return STATE | {NAME: changed}


MISFIT = "the weights in PATH do not fit the given network: "
INFINITE = f"PATH: {NAME} holds values that are not finite real numbers; the file is damaged, or its training diverged."
TWICE = "PATH holds parameters twice, with and without the prefix module. or _orig_mod."
NO_LIST = (
    "PATH holds a list of {} entries ({}), not the official implementation's model, optimiser, epoch, step and average."
)
STRAY = {
    "stray.weight": torch.zeros(2),
    "conv_in.weight": torch.zeros(8, 1, 3, 2),
    "conv_out.bias": STATE["conv_in.bias"],
}
DUPLICATE = [STATE | {f"{prefix}conv_in.bias": STATE["conv_in.bias"] + 1} for prefix in ("module.", "_orig_mod.")]
# Content of a file -> the sentence of its refusal.
FILES = {
    "every mismatch": (
        without("mid.attn_1.q.weight") | STRAY,
        f"{MISFIT}1 missing (mid.attn_1.q.weight); 1 unexpected (stray.weight); 2 of the wrong shape (conv_in.weight "
        "(8, 1, 3, 2) instead of (8, 1, 3, 3), conv_out.bias (8,) instead of (1,)).",
    ),
    "five missing": (without(*NAMES[:5]), f"{MISFIT}5 missing ({', '.join(NAMES[:5])})."),
    "six missing": (without(*NAMES[:6]), f"{MISFIT}6 missing ({', '.join(NAMES[:5])}, ...)."),
    "nan": (with_value(torch.nan), INFINITE),
    "inf": (with_value(torch.inf), INFINITE),
    "-inf": (with_value(-torch.inf), INFINITE),
    "1e39, finite in double precision": (with_value(1e39, torch.float64), INFINITE),
    "half inf": (STATE | {NAME: torch.full(STATE[NAME].shape, 1e9).half()}, INFINITE),
    **{
        str(dtype): (STATE | {NAME: STATE[NAME].to(dtype)}, INFINITE)
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64)
    },
    "not a tensor": (
        [STATE | {"epoch": 3}, {}, 0, 1],
        "PATH: the entry 'epoch' is not a tensor, so this is not a state dict.",
    ),
    **{f"flat, twice {i}": (twice, TWICE) for i, twice in enumerate(DUPLICATE)},
    **{f"official, twice {i}": ([twice, {}, 0, 1], TWICE) for i, twice in enumerate(DUPLICATE)},
    **{f"average, twice {i}": ([STATE, {}, 0, 1, twice], TWICE) for i, twice in enumerate(DUPLICATE)},
    **{
        f"list {kinds}": (content, NO_LIST.format(len(content), kinds))
        for content, kinds in (
            ([], ""),
            ([1], "int"),
            ([1, {}, 0, 1], "int, dict, int, int"),
            ([{}, {}, 0], "dict, dict, int"),
            ([{}, {}, 0, 1, 2], "dict, dict, int, int, int"),
            ([{}, {}, 0, 1, {}, 6], "dict, dict, int, int, dict, int"),
        )
    },
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file_is_refused_with_its_reason(tmp_path, name):
    content, expected = FILES[name]
    path = save(content, tmp_path / "x.ckpt")
    assert import_refusal(path, network=GIVEN) == expected.replace("PATH", str(path))
    if name.startswith("flat"):
        save_file(content, path)
        assert import_refusal(path, network=GIVEN) == expected.replace("PATH", str(path))


# Options -> the sentence that refuses them.
COMMANDS = [
    ({}, "give either checkpoint=PATH or download=NAME, one of ema_cifar10, cifar10, "),
    ({"checkpoint": "a", "download": "cifar10"}, "give either checkpoint=PATH or download=NAME, one of "),
    ({"download": "ema_cifar"}, "unknown download 'ema_cifar' (did you mean ema_cifar10?); allowed: ema_cifar10, "),
    *(
        ({"checkpoint": "a", "name": name}, f"name={name!r} must be a file name without a folder; choose that by ")
        for name in ("a/b", "/a", "..", "a/")
    ),
    ({"checkpoint": "a", "preset": "cifar"}, "unknown preset 'cifar' (did you mean cifar10?); allowed: cifar10, "),
    ({"checkpoint": "a", "preset": "lsun", "network": GIVEN}, "give either preset or network, not both."),
    ({"checkpoint": "a", "layout": "offical"}, "layout='offical' is not known (did you mean official?); allowed: auto"),
    ({"checkpoint": "a", "weights": "average"}, "weights='average' is not known; allowed: auto, ema, online"),
]


@pytest.mark.parametrize(("options", "expected"), COMMANDS)
def test_invalid_commands_are_refused(options, expected):
    message = refusal(build, ImportSpec, {"output_dir": "o", "download_dir": "d"} | options, "")
    assert message.startswith(expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"network": GIVEN | {"chh": 8}}, "unknown key network.chh (did you mean ch?)"),
        ({"network": GIVEN | {"name": "unt"}}, "unknown network 'unt' (did you mean unet?)"),
        ({"network": GIVEN | {"ch": "8"}}, "network.ch='8' must be an integer, not text."),
        ({"network": GIVEN | {"num_groups": 3}}, "network: num_groups=3 does not divide a width of 8 channels"),
        ({"network": GIVEN, "prediction": "epsilon"}, "unknown prediction 'epsilon'"),
    ],
)
def test_a_given_description_is_checked(flat, options, expected):
    assert import_refusal(flat, **options).startswith(expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": ScheduleSpec("linear", T=999)}, "schedule: linear with T=1000 and linear with T=999"),
        ({"schedule": ScheduleSpec("cosine")}, "schedule: linear with T=1000 and cosine with T=1000"),
        ({"prediction": "v"}, "prediction: eps and v"),
        ({"network": GIVEN | {"num_groups": 2}}, "network.num_groups: 4 and 2"),
        ({"network": GIVEN | {"attn_resolutions": []}}, "network.attn_resolutions: [4] and []"),
        ({"preset": "cifar10"}, "network.image_size: [8, 8] and [32, 32]; network.channels: 1 and 3; "),
        (
            {"prediction": "x0", "schedule": ScheduleSpec("linear", T=5)},
            "schedule: linear with T=1000 and linear with T=5; prediction: eps and x0",
        ),
    ],
)
@pytest.mark.parametrize("layout", ["diffusers", "lightning", "safetensors"])
def test_a_command_that_contradicts_the_file_is_refused(tmp_path, model, layout, options, expected):
    path, _ = put(model, tmp_path, layout, {})
    message = import_refusal(path, **options)
    assert f"describes another model than the command ({expected}" in message
    assert message.endswith("; leave these options out.")


@pytest.mark.parametrize("layout", ["diffusers", "lightning", "safetensors"])
def test_a_command_may_repeat_the_description_of_the_file(tmp_path, model, layout):
    path, _ = put(model, tmp_path, layout, {})
    # Dropout affects only training; the value in the file is kept.
    options = {"network": GIVEN | {"dropout": 0.0}, "schedule": ScheduleSpec("linear", T=1000), "prediction": "eps"}
    assert bring(path, **options).model.spec.network_spec.dropout == 0.3


def test_a_command_that_contradicts_the_scheduler_is_refused(folder):
    edit(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=10)
    message = import_refusal(folder, schedule=ScheduleSpec("linear", T=1000))
    assert "schedule: linear with T=10 and linear with T=1000" in message


@pytest.mark.parametrize("found", LAYOUTS)
def test_an_unexpected_layout_is_refused(tmp_path, model, found):
    path, options = put(model, tmp_path, found, MODELS["plain"][1])
    for expected in {*LAYOUTS} - {found}:
        message = import_refusal(path, layout=expected, **options)
        assert f"has the layout {found}, not {expected}; leave layout=auto." in message


@pytest.mark.parametrize("layout", ["official", "diffusers", "lightning", "safetensors"])
def test_every_layout_is_checked_name_by_name(tmp_path, model, layout):
    damaged, options = replace(model, state=without("conv_out.bias")), {}
    if layout == "diffusers":
        path = export(model, tmp_path, layout)
        with safe_open(path / WEIGHTS_FILE, framework="pt") as opened:
            metadata = opened.metadata()
        content = load_file(path / WEIGHTS_FILE)
        save_file({name: v for name, v in content.items() if name != "conv_out.bias"}, path / WEIGHTS_FILE, metadata)
    elif layout == "lightning":  # where the average lacks a parameter, the online one would be taken
        path = save(lightning(damaged), tmp_path / "last.ckpt")
    else:
        path, options = put(damaged, tmp_path, layout, MODELS["plain"][1])
    message = import_refusal(path, **options)
    assert re.search(r"do not fit the (given network|network that it describes): 1 missing \(conv_out\.bias\)", message)


def test_the_nearest_preset_is_named_with_advice(tmp_path, presets):
    nearly = weights(presets["celeba"])
    del nearly["conv_in.bias"]
    path = save(nearly, tmp_path / "flat.ckpt")
    assert import_refusal(path) == (
        f"the weights in {path} do not fit the nearest, preset celeba: 1 missing (conv_in.bias). "
        "If it is another network, describe it with network=..., as in configs/network."
    )
    message = import_refusal(path, preset="celeba")
    assert message == f"the weights in {path} do not fit preset celeba: 1 missing (conv_in.bias)."


@pytest.mark.parametrize(("name", "other"), [("cifar10", "celeba"), ("celeba", "lsun"), ("lsun", "cifar10")])
def test_weights_of_one_published_size_do_not_fit_another(tmp_path, name, other):
    """Tensors of one stored number each make a small file with the names and shapes of a large one."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in UNet(PRESETS[name]).state_dict().items()}
    large = {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}
    path = save(large, tmp_path / "flat.ckpt")
    message = import_refusal(path, preset=other)
    assert f"do not fit preset {other}: " in message
    assert re.search(r"\d+ (missing|unexpected) \((up|down)\.", message)
    assert f"instead of {(128, 3, 3, 3)}" not in message  # the first layer is the same in all
    save({key: value for key, value in large.items() if key != "conv_in.bias"}, path)
    assert f"do not fit the nearest, preset {name}: 1 missing (conv_in.bias)." in import_refusal(path)


def test_an_incomplete_diffusers_folder_is_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    wanted = "diffusion_pytorch_model.safetensors or diffusion_pytorch_model.bin, in unet/ or at the top"
    assert import_refusal(tmp_path / "empty").endswith(f"empty holds nothing; a diffusers folder has {wanted}.")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").touch()
    assert "other holds a.txt; a diffusers folder has" in import_refusal(tmp_path / "other")
    (folder / "unet" / "config.json").unlink()
    assert "unet has no config.json, which describes the network" in import_refusal(folder)
    (folder / "unet" / "config.json").write_text("{")
    assert "config.json cannot be read" in import_refusal(folder)
    (folder / WEIGHTS_FILE).unlink()
    assert "unet holds config.json; a diffusers folder has" in import_refusal(folder)


def test_an_export_with_a_changed_config_is_refused(tmp_path, model):
    path = export(model, tmp_path, "diffusers")
    edit(path / "unet" / "config.json", norm_num_groups=2)
    assert "is not the one that it was exported with; restore it." in import_refusal(path)
    edit(path / "unet" / "config.json", norm_num_groups=4, _diffusers_version="0.42.1")
    assert bring(path).model.weights == "ema"


def test_an_existing_file_is_refused_before_reading_the_source(tmp_path, flat):
    out = tmp_path / "here.safetensors"
    out.write_text("precious")
    for source in (flat, tmp_path / "nowhere.ckpt"):
        message = import_refusal(source, out=out, network=GIVEN)
        assert message == f"{out} exists already; choose another output_dir=..., or overwrite=true to replace it."
    assert out.read_text() == "precious"
    bring(flat, out=out, network=GIVEN, overwrite=True)
    before = out.read_bytes()
    assert read_model(out).weights == "unlabelled"
    save(with_value(torch.nan), flat)
    import_refusal(flat, out=out, network=GIVEN, overwrite=True)
    assert out.read_bytes() == before


def test_a_write_that_fails_leaves_nothing(tmp_path, flat, monkeypatch):
    def fail(tensors, path, metadata):
        Path(path).write_text("half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io, "save_file", fail)
    with pytest.raises((OSError, UserError), match="No space left"):
        bring(flat, network=GIVEN, out=tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["flat.ckpt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_unwritable_output_is_one_sentence(tmp_path, flat, overwrite):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "out.safetensors").mkdir(parents=True)
    for out in (tmp_path / "folder" / "out.safetensors", tmp_path / "file" / "out.safetensors"):
        assert str(out) in import_refusal(flat, network=GIVEN, out=out, overwrite=overwrite)
