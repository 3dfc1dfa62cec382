"""Import: variants of the files of one layout."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from layouts import (
    GIVEN,
    NETWORK,
    NO_AVERAGE,
    UNLABELLED,
    WEIGHTS_FILE,
    at_root,
    bring,
    edit,
    import_refusal,
    lightning,
    official,
    same,
    save,
    weights,
)
from safetensors.torch import load_file, save_file

from ddim.checkpoints import read_model, save_model

pytestmark = pytest.mark.integration


def nested(name):
    """`torch.compile` of parts of a network leaves its prefix in the middle of a name."""
    return re.sub(r"^(mid\.\w+|down\.\d+\.block\.\d+)\.", r"\1._orig_mod.", name)


PREFIXES = {
    "module.": "module.{}".format,
    "_orig_mod.": "_orig_mod.{}".format,
    "module._orig_mod.": "module._orig_mod.{}".format,
    "_orig_mod.module.": "_orig_mod.module.{}".format,
    "nested": nested,
    "module. and nested": lambda name: f"module.{nested(name)}",
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrapper_prefixes_are_removed(tmp_path, model, folder, prefix):
    state, wrap = model.state, PREFIXES[prefix]
    renamed = {wrap(name): value for name, value in state.items()}
    assert sum(name != wrap(name) for name in state) >= 20
    save_file(renamed, tmp_path / "flat.safetensors")
    paths = [save(renamed, tmp_path / "flat.ckpt"), tmp_path / "flat.safetensors"]
    paths.append(save([renamed, {}, 0, 1, renamed], tmp_path / "official.ckpt"))
    for path in paths:
        assert same(bring(path, network=GIVEN).model.state, state)
    if "nested" in prefix:
        return
    save_file({f"{prefix}{name}": v for name, v in load_file(folder / WEIGHTS_FILE).items()}, folder / WEIGHTS_FILE)
    save_model(replace(model, state=renamed, weights="online"), tmp_path / "ours.safetensors")
    training = save(lightning(replace(model, state=renamed)), tmp_path / "last.ckpt")
    for path in (folder, tmp_path / "ours.safetensors", training):
        assert same(bring(path).model.state, state)


@pytest.mark.parametrize("layout", ["official", "lightning"])
def test_ema_is_taken_unless_online_is_chosen(tmp_path, model, layout):
    online, options = weights(NETWORK, 5), {"network": GIVEN} if layout == "official" else {}
    content = official(model, online) if layout == "official" else lightning(model, online)
    path = save(content, tmp_path / "both.ckpt")
    for asked, label in (("auto", "ema"), ("ema", "ema"), ("online", "online")):
        done = bring(path, weights=asked, overwrite=True, **options)
        assert same(done.model.state, {"ema": model.state, "online": online}[label])
        assert (done.model.weights, done.model.step, done.warnings) == (label, 790_000, [])


@pytest.mark.parametrize("layout", ["official", "lightning"])
def test_a_file_without_ema_gives_online_and_warns(tmp_path, model, layout):
    online, options = weights(NETWORK, 5), {"network": GIVEN} if layout == "official" else {}
    content = official(model, online, entries=4) if layout == "official" else lightning(model, online, average=False)
    path = save(content, tmp_path / "without.ckpt")
    done = bring(path, **options)
    assert same(done.model.state, online)
    assert (done.model.weights, done.model.step, done.warnings) == ("online", 790_000, [NO_AVERAGE])
    assert bring(path, weights="online", overwrite=True, **options).warnings == []  # was asked for
    message = import_refusal(path, weights="ema", overwrite=True, **options)
    assert message == f"{path} holds online weights only; choose weights=auto."


def test_files_of_before_torch_1_6_are_read(tmp_path, state):
    torch.save(state, tmp_path / "flat.ckpt", _use_new_zipfile_serialization=False)
    assert same(bring(tmp_path / "flat.ckpt", network=GIVEN).model.state, state)
    torch.save([{}, {}, 0, 9, state], tmp_path / "official.ckpt", _use_new_zipfile_serialization=False)
    done = bring(tmp_path / "official.ckpt", network=GIVEN)
    assert same(done.model.state, state)
    assert (done.model.weights, done.model.step) == ("ema", 9)


@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".pt", ".bin", ".tar", ".safetensors", ""])
def test_the_suffix_of_a_file_does_not_matter(tmp_path, state, suffix):
    path = tmp_path / f"flat{suffix}"
    # torch.load itself takes the name .safetensors at its word.
    for write in (save_file,) if suffix == ".safetensors" else (torch.save, save_file):
        write(state, path)
        done = bring(path, network=GIVEN, layout="flat", overwrite=True)
        assert same(done.model.state, state)
        assert (done.model.weights, done.warnings) == ("unlabelled", [UNLABELLED])


def test_a_folder_with_old_attention_names_is_read(folder, state):
    """The .bin of older versions."""
    there = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    content = load_file(folder / WEIGHTS_FILE)
    for before, now in there.items():
        assert any(now in name for name in content)
        content = {name.replace(now, before): value for name, value in content.items()}
    save(content, (folder / WEIGHTS_FILE).with_suffix(".bin"))
    (folder / WEIGHTS_FILE).unlink()
    done = bring(folder)
    assert same(done.model.state, state)
    assert done.model.origin["layout"] == "diffusers"


def test_safetensors_are_taken_where_a_folder_has_both(folder, state):
    other = {"conv_in.bias": torch.zeros(8)}
    torch.save(other, folder / "unet" / "diffusion_pytorch_model.bin")
    done = bring(folder)
    assert same(done.model.state, state)
    assert done.model.origin["file"] == "diffusion_pytorch_model.safetensors"


def test_folders_and_the_files_inside_them_are_the_same(folder, state):
    edit(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=77, prediction_type="v_prediction")
    for path in (folder, folder / "unet", folder / WEIGHTS_FILE):
        done = bring(path, layout="diffusers", overwrite=True, out=folder.parent / "out.safetensors")
        assert same(done.model.state, state)
        assert (done.model.spec.schedule.T, done.model.spec.prediction) == (77, "v")
        assert done.warnings == [UNLABELLED]
    at_root(folder)
    for path in (folder, folder / "diffusion_pytorch_model.safetensors"):
        done = bring(path, overwrite=True, out=folder.parent / "out.safetensors")
        assert same(done.model.state, state)
        assert done.model.spec.network_spec == replace(NETWORK)
        assert (done.model.spec.schedule.T, done.model.spec.prediction) == (77, "v")


def test_diffusers_weights_without_config_need_a_network(folder, state, tmp_path):
    shutil.copy(folder / WEIGHTS_FILE, tmp_path / "alone.safetensors")
    done = bring(tmp_path / "alone.safetensors", network=GIVEN, layout="diffusers")
    assert same(done.model.state, state)
    message = import_refusal(tmp_path / "alone.safetensors", overwrite=True)
    assert "do not fit the nearest, preset " in message
    assert "describe it with network=..." in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("write", [torch.save, save_file])
def test_other_precisions_become_float32_and_are_reported(tmp_path, state, dtype, write):
    name = str(dtype).removeprefix("torch.")
    small = {key: value.clamp(-9, 9) for key, value in state.items()}
    write({key: value.to(dtype) for key, value in small.items()}, tmp_path / "flat.ckpt")
    done = bring(tmp_path / "flat.ckpt", network=GIVEN)
    assert same(read_model(done.path).state, {key: value.to(dtype).to(torch.float32) for key, value in small.items()})
    assert done.lines[-1].endswith(f"(stored as {name}, written as float32)")


def test_mixed_precisions_are_reported_float32_is_not(tmp_path, state, flat):
    mixed = state | {"conv_in.bias": state["conv_in.bias"].half(), "conv_out.bias": state["conv_out.bias"].double()}
    done = bring(save(mixed, tmp_path / "mixed.ckpt"), network=GIVEN)
    assert done.lines[-1].endswith("(stored as float16, float64, written as float32)")
    assert "stored as" not in " ".join(bring(flat, network=GIVEN).lines)


MEMORY = {
    "parameters": torch.nn.Parameter,
    "strides": lambda value: value.transpose(0, -1).contiguous().transpose(0, -1),
    "views of more": lambda value: torch.stack([value, value + 1], dim=-1)[..., 0],
}


@pytest.mark.parametrize("kind", [*MEMORY, "views of one buffer", "other order", "one tensor twice"])
def test_the_memory_layout_of_tensors_does_not_matter(tmp_path, state, kind):
    expected = state
    if kind in MEMORY:
        other = {name: MEMORY[kind](value) for name, value in state.items()}
    elif kind == "views of one buffer":
        pieces = torch.cat([value.reshape(-1) for value in state.values()]).split([v.numel() for v in state.values()])
        other = {name: piece.view(state[name].shape) for name, piece in zip(state, pieces, strict=True)}
    elif kind == "other order":
        other = dict(reversed(state.items()))
    else:
        other = expected = state | {"norm_out.bias": state["norm_out.weight"]}
    done = bring(save(other, tmp_path / "flat.ckpt"), network=GIVEN)
    assert same(done.model.state, expected)
    assert same(read_model(done.path).state, expected)


# Folders of diffusers.


@pytest.fixture
def both(folder, state):
    """A checkpoint of diffusers' training example: unet/ with online weights and unet_ema/; return the online ones."""
    shutil.copytree(folder / "unet", folder / "unet_ema")
    online = {name: -value for name, value in load_file(folder / WEIGHTS_FILE).items()}
    save_file(online, folder / WEIGHTS_FILE)
    return {name: -value for name, value in state.items()}


def test_the_ema_of_a_training_folder_is_in_unet_ema(folder, both, state):
    out = folder.parent / "out.safetensors"
    note = f"{folder / 'unet_ema'} was taken; weights=online takes {folder / 'unet'}"
    for asked, label, notes in (("auto", "ema", [note]), ("ema", "ema", []), ("online", "online", [])):
        done = bring(folder, weights=asked, out=out, overwrite=True)
        assert same(done.model.state, {"ema": state, "online": both}[label])
        assert (done.model.weights, done.warnings) == (label, notes)
        assert str(folder / {"ema": "unet_ema", "online": "unet"}[label]) in done.lines[0]


def test_a_label_does_not_overrule_the_folder_of_weights(folder, both):
    for name, label, other in (("unet_ema", "ema", "online"), ("unet", "online", "ema")):
        for path in (folder / name, folder / name / "diffusion_pytorch_model.safetensors"):
            assert bring(path, overwrite=True).model.weights == label
            message = import_refusal(path, weights=other, overwrite=True)
            assert message.endswith(f"holds {label} weights only; choose weights=auto.")
    (folder / "unet").rename(folder / "elsewhere")
    assert bring(folder, overwrite=True).model.weights == "ema"
    assert "holds ema weights only" in import_refusal(folder, weights="online", overwrite=True)


@pytest.mark.parametrize("write", [save_file, torch.save])
def test_sharded_weights_are_read_through_their_index(folder, state, write):
    content = load_file(folder / WEIGHTS_FILE)
    kind = "safetensors" if write is save_file else "bin"
    names, files = list(content), {}
    for i, half in enumerate((names[::2], names[1::2])):
        file = f"diffusion_pytorch_model-0000{i + 1}-of-00002.{kind}"
        write({name: content[name] for name in half}, folder / "unet" / file)
        files |= dict.fromkeys(half, file)
    (folder / WEIGHTS_FILE).unlink()
    index = folder / "unet" / f"diffusion_pytorch_model.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    out = folder.parent / "out.safetensors"
    hashes = {bring(path, out=out, overwrite=True).model.origin["sha256"] for path in (folder, index)}
    assert same(bring(folder, out=out, overwrite=True).model.state, state)
    shard = folder / "unet" / file
    write({name: content[name] + 1 for name in half}, shard)
    assert bring(folder, out=out, overwrite=True).model.origin["sha256"] not in hashes  # it covers the shards
    shard.unlink()
    assert f"there is no checkpoint {shard}" in import_refusal(folder)
    for broken in ({}, {"weight_map": {"a": "../x"}}, {"weight_map": {"a": 1}}, {"weight_map": []}):
        index.write_text(json.dumps(broken))
        assert import_refusal(folder).startswith(f"{index} is no index of weights")


def test_half_precision_is_taken_where_there_is_no_other(folder):
    content = {name: value.clamp(-9, 9) for name, value in load_file(folder / WEIGHTS_FILE).items()}
    half = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    save_file({name: value.half() for name, value in content.items()}, half)
    assert bring(folder).model.origin["file"] == "diffusion_pytorch_model.safetensors"
    (folder / WEIGHTS_FILE).unlink()
    done = bring(folder, overwrite=True)
    assert done.model.origin["file"] == half.name
    assert done.lines[-1].endswith("(stored as float16, written as float32)")


def test_weights_that_are_called_non_ema_are_online(folder):
    path = (folder / WEIGHTS_FILE).rename(folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    assert bring(path).model.weights == "online"


def test_configurations_may_begin_with_a_byte_order_mark(folder, state):
    for path in (folder / "unet" / "config.json", folder / "scheduler" / "scheduler_config.json"):
        path.write_text(path.read_text(), encoding="utf-8-sig")
        assert path.read_bytes().startswith(b"\xef\xbb\xbf{")
    assert same(bring(folder).model.state, state)
