"""Checkpoints as other code bases write them; one call that imports them."""

import json
import struct
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddim.checkpoints import ModelSpec, StoredModel, read_model, save_model
from ddim.checkpoints.convert.exporting import ExportSpec, export_checkpoint
from ddim.checkpoints.convert.importing import ImportSpec, import_checkpoint
from ddim.diffusion.schedule import ScheduleSpec, cosine_schedule, from_betas, linear_schedule
from ddim.errors import UserError
from ddim.networks import UNet, UNetSpec

NETWORK = UNetSpec(
    (8, 8), channels=1, ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), dropout=0.3, num_groups=4
)
# What a user types for it.
GIVEN = {
    "name": "unet",
    "image_size": [8, 8],
    "channels": 1,
    "ch": 8,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.3,
    "num_groups": 4,
}
# A file of which every byte can be tried.
SMALLEST = UNetSpec((4, 4), channels=1, ch=4, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_groups=2)
SMALLEST_GIVEN = {
    "image_size": [4, 4],
    "channels": 1,
    "ch": 4,
    "ch_mult": [1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "num_groups": 2,
}
BETAS = (0.1, 0.02, 0.3)
# The description of a model, and the options that say so where a file cannot.
MODELS = {
    "plain": (ModelSpec("unet", NETWORK, linear_schedule()), {"network": GIVEN}),
    "all else": (
        ModelSpec(
            "unet",
            UNetSpec((8, 16), 3, 8, (1, 3, 2), 2, (8, 2), 0.0, 2, "torch"),
            from_betas(BETAS, "custom"),
            "v",
            "digits",
        ),
        {
            "network": {
                "name": "unet",
                "image_size": [8, 16],
                "channels": 3,
                "ch": 8,
                "ch_mult": [1, 3, 2],
                "num_res_blocks": 2,
                "attn_resolutions": [8, 2],
                "dropout": 0.0,
                "num_groups": 2,
                "init": "torch",
            },
            "schedule": ScheduleSpec("custom", betas=BETAS),
            "prediction": "v",
            "trained_on": "digits",
        },
    ),
    "cosine": (
        ModelSpec("unet", replace(NETWORK, attn_resolutions=()), cosine_schedule(50), "x0", "cats"),
        {
            "network": GIVEN | {"attn_resolutions": []},
            "schedule": ScheduleSpec("cosine", T=50),
            "prediction": "x0",
            "trained_on": "cats",
        },
    ),
    "wide first": (  # which diffusers has no word for
        ModelSpec("unet", replace(NETWORK, ch_mult=(2, 1)), linear_schedule(7, 0.1, 0.2)),
        {"network": GIVEN | {"ch_mult": [2, 1]}, "schedule": ScheduleSpec("linear", 7, 0.1, 0.2)},
    ),
}
UNLABELLED = (
    "the file does not state whether its weights are EMA or online, so every result will be labelled unlabelled; "
    "state it with weights=ema or weights=online"
)
NO_AVERAGE = "it holds no EMA weights: the online ones were taken, whose samples are worse"


def weights(network, seed=0):
    """Return random weights, among them numbers that a detour over another type would lose."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in UNet(network).state_dict().items()}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    state["conv_in.weight"].view(-1)[:5] = torch.tensor([-0.0, 1e-45, 3.4028234e38, 1 + 2**-23, -1e-38])
    return state


def bring(source, **options):
    """Import next to the source, or as the model file `out`."""
    out = options.pop("out", source.parent / "imported" / f"{source.name[:99]}.safetensors")
    spec = ImportSpec(str(out.parent), "never used", checkpoint=str(source), name=out.stem, **options)
    return import_checkpoint(spec)


def tree(folder):
    return sorted(folder.rglob("*"))


def refusal(source, **options):
    """Return the one sentence with which an import is refused; it leaves no files."""
    before = tree(source.parent)
    with pytest.raises(UserError) as caught:
        bring(source, **options)
    assert [path for path in tree(source.parent) if path not in before and path.name != "imported"] == []
    message = str(caught.value)
    assert "\n" not in message, message
    assert message.endswith("."), message
    return message


def write_official(model, path, online=None, entries=5):
    """Write the list of the official implementation's training: [model, optimiser, epoch, step, average]."""
    adam = {"state": {0: {"step": 7, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 2e-4, "params": [0]}]}
    online = online or weights(model.spec.network_spec, 99)
    wrapped = OrderedDict((f"module.{name}", value) for name, value in online.items())
    torch.save([wrapped, adam, 3, model.step, dict(model.state)][:entries], path)
    return path


def write_lightning(model, path, online=None):
    """Write a training checkpoint as Lightning does, with an average unless `online` is the model itself."""
    online = online or weights(model.spec.network_spec, 99)
    shadow = {"shadow": dict(model.state), "decay": 0.9, "updates": 7}
    content = {
        "pytorch-lightning_version": "2.6.0",
        "ddim": model.spec.to_dict(),
        "state_dict": {f"network.{name}": value for name, value in online.items()},
        "callbacks": {} if online is model.state else {"EMA": shadow, "ModelCheckpoint{}": {"best": None}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}],
        "global_step": model.step,
        "epoch": 1,
    }
    torch.save(content, path)
    return path


def export(model, folder, layout, name):
    """Export a model with the command's own function; return the path of the folder or file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder / "x.safetensors")
    label = "online" if model.weights == "online" else "ema"
    paths, _ = export_checkpoint(ExportSpec(str(folder / "x.safetensors"), str(folder / name), layout, label))
    (folder / "x.safetensors").unlink()
    return folder / name if layout == "diffusers" else paths[0]


def put(model, folder, layout, options):
    """Write `model` in a layout; return its path, and the options that say what this layout does not."""
    if layout == "flat":
        return export(model, folder, "flat", "exported"), options | {"weights": "ema"}
    if layout == "official":
        return write_official(model, folder / "model.pth"), options
    if layout == "lightning":
        return write_lightning(model, folder / "last.ckpt"), {}
    return export(model, folder, layout, "folder"), {}


def foreign_folder(state, place):
    """Write a folder of diffusers as another project writes it: nothing of ours in the header."""
    path = export(StoredModel(MODELS["plain"][0], state, "ema", None), place, "diffusers", "folder")
    file = path / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})
    return path


def edit(path, **changes):
    """Change entries of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None or k not in changes}))


def at_root(folder):
    """Lay out a folder as the oldest uploads are: configuration, weights and scheduler side by side."""
    for path in (*(folder / "unet").iterdir(), folder / "scheduler" / "scheduler_config.json"):
        path.rename(folder / path.name)
    for name in ("unet", "scheduler"):
        (folder / name).rmdir()
    (folder / "model_index.json").unlink()


def attempt(path, **options):
    """Import a damaged file; return the result, or None and the reason. Any other exception fails the test."""
    try:
        return bring(path, **options), ""
    except UserError as error:
        return None, str(error)


def survives(path, **options):
    """Import a damaged file; return whether it was refused, in one sentence; a model file that was written loads."""
    made = path.parent / "imported" / "x.safetensors"
    try:
        done, reason = attempt(path, out=made, **options)
        assert "\n" not in reason, reason
        assert made.exists() == (done is not None), reason
        if done is not None:
            read_model(made, "online" if done.model.weights == "online" else "ema")
        return done is None
    finally:
        made.unlink(missing_ok=True)


def raw_safetensors(header, data=b"", length=None):
    """Assemble a file from a header (bytes, or what JSON holds) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data
