"""Small models in every layout of a checkpoint; one call that imports them; what a refusal and equal weights are."""

import json
import re
import struct
from collections import OrderedDict
from dataclasses import asdict, replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddim.checkpoints import ModelSpec, read_model, save_model
from ddim.checkpoints.convert.exporting import ExportSpec, export_checkpoint
from ddim.checkpoints.convert.importing import ImportSpec, import_checkpoint
from ddim.diffusion.schedule import ScheduleSpec, linear_schedule
from ddim.errors import UserError
from ddim.networks import UNet, UNetSpec

NETWORK = UNetSpec(
    (8, 8), channels=1, ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), dropout=0.3, num_groups=4
)
# A file of which every byte can be tried.
SMALLEST = UNetSpec((4, 4), channels=1, ch=4, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_groups=2)
# What diffusers can build: with and without attention and dropout, square, wide and high, of one to three levels.
NETWORKS = {
    "small": NETWORK,
    "oblong": UNetSpec((8, 12), 2, ch=8, ch_mult=(1, 2, 2), attn_resolutions=(8, 2), dropout=0.0, num_groups=2),
    "upright": UNetSpec((16, 8), 3, ch=4, ch_mult=(1, 1, 3), num_res_blocks=3, attn_resolutions=(4,), num_groups=2),
    "flat": UNetSpec((4, 6), 4, ch=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(4,), dropout=0.5, num_groups=4),
    "conditional": replace(NETWORK, classes=3),
}


def given(network):
    """What a user types for a network."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(network).items()}
    return {"name": "unet", **values}


GIVEN, SMALLEST_GIVEN = given(NETWORK), given(SMALLEST)
PLAIN = ModelSpec("unet", NETWORK, linear_schedule(), data="digits")
BETAS = (0.3, 0.01, 0.125, 0.4, 1e-5, 0.2)


def described(schedule, network, *prediction_and_data):
    """Return the description of a model, and the options that state it where a file cannot."""
    spec = ModelSpec("unet", network, schedule.build(), *prediction_and_data)
    options = {"prediction": spec.prediction, "trained_on": spec.data or None}
    return spec, {"network": given(network), "schedule": schedule, **options}


MODELS = {
    "plain": (PLAIN, {"network": GIVEN, "trained_on": "digits"}),
    "oblong": described(
        ScheduleSpec("linear", 200, 0.0005, 0.1), UNetSpec((8, 16), 3, 8, (1, 3, 2), 2, (2, 8), 0.0, 2, "torch"), "v"
    ),
    "custom": described(ScheduleSpec("custom", betas=BETAS), replace(NETWORK, dropout=0.0), "x0", "cats"),
    "cosine": described(ScheduleSpec("cosine", T=50), replace(NETWORK, attn_resolutions=()), "v", "cats"),
    "conditional": (
        ModelSpec("unet", replace(NETWORK, classes=3), linear_schedule(), classes=("cat", "dog", "none")),
        {"network": given(replace(NETWORK, classes=3)), "classes": ("cat", "dog", "none")},
    ),
    # For which diffusers has no word.
    "wide first": described(ScheduleSpec("linear", 7, 0.1, 0.2), replace(NETWORK, ch_mult=(2, 1))),
}
LAYOUTS = ("flat", "official", "diffusers", "lightning", "safetensors")
WEIGHTS_FILE = "unet/diffusion_pytorch_model.safetensors"

UNLABELLED = (
    "the file does not state whether its weights are EMA or online, so every result will be labelled unlabelled; "
    "state it with weights=ema or weights=online"
)
NO_AVERAGE = "it holds no EMA weights: the online ones were taken, whose samples are worse"


@cache
def shapes(network):
    with torch.device("meta"):
        return {name: value.shape for name, value in UNet(network).state_dict().items()}


def gaussian_weights(network, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes(network).items()}


def weights(network=NETWORK, seed=0):
    """Return random weights, among them numbers that a detour over another type would lose."""
    state = gaussian_weights(network, seed)
    state["conv_in.weight"].view(-1)[:5] = torch.tensor([-0.0, 1e-45, 3.4028234e38, 1 + 2**-23, -1e-38])
    return state


def randomised(spec, seed=0):
    """A network in which no weight is 0 or 1, norms and biases included, with outputs of order 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet(replace(spec, init="torch")).eval().requires_grad_(False)
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    network.conv_out.weight.mul_(1.5)
    return network


def _bits(tensor):
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def same(mine, theirs):
    """Whether two state dicts hold the same bits under the same names."""
    return mine.keys() == theirs.keys() and all(
        (mine[name].dtype, mine[name].shape) == (theirs[name].dtype, theirs[name].shape)
        and torch.equal(_bits(mine[name]), _bits(theirs[name]))
        for name in mine
    )


def refusal(call, *arguments, **options):
    """Return the one sentence with which a call is refused."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert re.fullmatch(r"[^\n]*([^.\s]\.|=\.\.\.)", message), message
    return message


# Import.


def bring(source, **options):
    """Import next to the source, or as the model file `out`."""
    out = options.pop("out", source.parent / "imported" / f"{source.name[:99]}.safetensors")
    spec = ImportSpec(str(out.parent), "never used", checkpoint=str(source), name=out.stem, **options)
    return import_checkpoint(spec)


def import_refusal(source, **options):
    """Return the one sentence with which an import is refused; it leaves no files."""
    before = set(source.parent.rglob("*"))
    message = refusal(bring, source, **options)
    assert {path.name for path in set(source.parent.rglob("*")) - before} <= {"imported"}
    return message


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


# Layouts.


def lightning(model, online=None, average=True):
    """Return the content of a training checkpoint, as Lightning writes it."""
    online = model.state if online is None else online
    ema = {"EMA": {"shadow": model.state, "decay": 0.9, "updates": 7}, "ModelCheckpoint{}": {"best": None}}
    return {
        "pytorch-lightning_version": "2.6.0",
        "ddim": model.spec.to_dict(),
        "state_dict": {f"network.{name}": value for name, value in online.items()},
        "callbacks": ema if average else {},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}],
        "global_step": model.step,
        "epoch": 1,
    }


def official(model, online, entries=5):
    """Return the list of the official implementation's training: [model, optimiser, epoch, step, average]."""
    adam = {"state": {0: {"step": 7, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 2e-4, "params": [0]}]}
    wrapped = OrderedDict((f"module.{name}", value) for name, value in online.items())
    return [wrapped, adam, 3, model.step, dict(model.state)][:entries]


def save(content, path):
    """Write with torch.save; return the path."""
    torch.save(content, path)
    return path


def export(model, folder, layout, name="folder"):
    """Export a model with the command's own function; return the path of the folder or file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder / "x.safetensors")
    label = "online" if model.weights == "online" else "ema"
    paths, _ = export_checkpoint(ExportSpec(str(folder / "x.safetensors"), str(folder / name), layout, label))
    (folder / "x.safetensors").unlink()
    return folder / name if layout == "diffusers" else paths[0]


def put(model, folder, layout, options):
    """Write `model` in a layout; return its path, and the options that state what this layout does not."""
    if layout == "flat":
        return export(model, folder, "flat"), options | {"weights": "ema"}
    if layout == "official":
        return save(official(model, weights(model.spec.network_spec, 99)), folder / "model.pth"), options
    if layout == "lightning":
        return save(lightning(model, weights(model.spec.network_spec, 99)), folder / "last.ckpt"), {}
    return export(model, folder, layout), {}


def foreign_folder(model, place):
    """Write a folder of diffusers as another project writes it: nothing of ours in the header."""
    path = export(model, place, "diffusers")
    save_file(load_file(path / WEIGHTS_FILE), path / WEIGHTS_FILE, {"format": "pt"})
    return path


def at_root(folder):
    """Lay out a folder as the oldest uploads are: configuration, weights and scheduler next to each other."""
    for path in (*(folder / "unet").iterdir(), folder / "scheduler" / "scheduler_config.json"):
        path.rename(folder / path.name)
    for name in ("unet", "scheduler"):
        (folder / name).rmdir()
    (folder / "model_index.json").unlink()


def edit(path, **changes):
    """Change entries of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None or k not in changes}))


def raw_safetensors(header, data=b"", length=None):
    """Assemble a file from a header (bytes, or what JSON holds) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
