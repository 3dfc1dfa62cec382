"""Import: variants of the files of one layout."""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from foreign import (
    GIVEN,
    MODELS,
    NETWORK,
    NO_AVERAGE,
    UNLABELLED,
    at_root,
    bring,
    edit,
    refusal,
    weights,
    write_lightning,
    write_official,
)
from safetensors.torch import load_file, save_file
from stored import same

from ddim.checkpoints import StoredModel, read_model, save_model
from ddim.diffusion.schedule import ScheduleSpec, cosine_schedule, scaled_linear_schedule


@pytest.fixture(scope="module")
def state():
    return weights(NETWORK)


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
def test_wrapper_prefixes_are_removed(tmp_path, state, folder, prefix):
    wrap = PREFIXES[prefix]
    renamed = {wrap(name): value for name, value in state.items()}
    assert sum(name != wrap(name) for name in state) >= 20
    torch.save(renamed, tmp_path / "flat.ckpt")
    save_file(renamed, tmp_path / "flat.safetensors")
    torch.save([renamed, {}, 0, 1, renamed], tmp_path / "official.ckpt")
    for name in ("flat.ckpt", "flat.safetensors", "official.ckpt"):
        assert same(bring(tmp_path / name, network=GIVEN).model.state, state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapper_prefixes_are_removed_in_other_layouts(tmp_path, state, folder, prefix):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({f"{prefix}{name}": value for name, value in load_file(file).items()}, file)
    assert same(bring(folder).model.state, state)
    model = StoredModel(MODELS["plain"][0], state, "online", 3)
    wrapped = {f"{prefix}{name}": value for name, value in state.items()}
    save_model(replace(model, state=wrapped), tmp_path / "ours.safetensors")
    assert same(bring(tmp_path / "ours.safetensors").model.state, state)
    path = write_lightning(replace(model, state=wrapped), tmp_path / "last.ckpt", online=wrapped)
    assert same(bring(path).model.state, state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
@pytest.mark.parametrize("layout", ["flat", "safetensors without a header", "official", "average"])
def test_a_duplicate_parameter_is_refused(tmp_path, state, layout, prefix):
    twice = state | {f"{prefix}conv_in.bias": state["conv_in.bias"] + 1}
    path = tmp_path / "twice.ckpt"
    if layout == "safetensors without a header":
        save_file(twice, path)
    else:
        torch.save({"flat": twice, "official": [twice, {}, 0, 1], "average": [state, {}, 0, 1, twice]}[layout], path)
    assert refusal(path, network=GIVEN) == (
        f"{path} holds parameters twice, with and without the prefix module. or _orig_mod."
    )


def test_official_ema_is_taken_unless_online_is_chosen(tmp_path, state):
    online = weights(NETWORK, 5)
    model = StoredModel(MODELS["plain"][0], state, "ema", 790_000)
    path = write_official(model, tmp_path / "official.pth", online)
    for options, label, expected in (({}, "ema", state), ({"weights": "ema"}, "ema", state), ({}, "online", online)):
        asked = {"weights": "online"} if label == "online" else options
        done = bring(path, network=GIVEN, overwrite=True, **asked)
        assert same(done.model.state, expected)
        assert (done.model.weights, done.model.step, done.warnings) == (label, 790_000, [])


def test_official_list_without_ema_gives_online_and_warns(tmp_path, state):
    online = weights(NETWORK, 5)
    path = write_official(StoredModel(MODELS["plain"][0], state, "ema", 11), tmp_path / "four.pth", online, entries=4)
    done = bring(path, network=GIVEN)
    assert same(done.model.state, online)
    assert (done.model.weights, done.model.step, done.warnings) == ("online", 11, [NO_AVERAGE])
    assert bring(path, network=GIVEN, weights="online", overwrite=True).warnings == []  # was asked for
    message = refusal(path, network=GIVEN, weights="ema", overwrite=True)
    assert message == f"{path} holds online weights only; choose weights=auto."


@pytest.mark.parametrize("content", [(), (1,), (1, {}, 0, 1), ({}, {}, 0), ({}, {}, 0, 1, 2), ({}, {}, 0, 1, {}, 6)])
def test_other_lists_than_the_official_one_are_refused(tmp_path, content):
    torch.save(list(content), tmp_path / "list.pth")
    message = refusal(tmp_path / "list.pth", network=GIVEN)
    kinds = ", ".join(type(part).__name__ for part in content)
    assert (
        f"holds a list of {len(content)} entries ({kinds}), not the official implementation's model, optimiser"
        in message
    )


def test_our_ema_is_taken_unless_online_is_chosen(tmp_path, state):
    online = weights(NETWORK, 5)
    model = StoredModel(MODELS["plain"][0], state, "ema", 44)
    path = write_lightning(model, tmp_path / "last.ckpt", online)
    assert same(bring(path).model.state, state)
    done = bring(path, weights="online", overwrite=True)
    assert same(done.model.state, online)
    assert (done.model.weights, done.model.step, done.warnings) == ("online", 44, [])
    path = write_lightning(model, tmp_path / "no_ema.ckpt", online=state)
    without = StoredModel(model.spec, state, "online", 44)
    path = write_lightning(without, tmp_path / "no_ema.ckpt", online=without.state)
    done = bring(path)
    assert (done.model.weights, done.warnings) == ("online", [NO_AVERAGE])
    assert refusal(path, weights="ema", overwrite=True) == f"{path} holds online weights only; choose weights=auto."


def test_files_of_before_torch_1_6_are_read(tmp_path, state):
    torch.save(state, tmp_path / "flat.ckpt", _use_new_zipfile_serialization=False)
    assert same(bring(tmp_path / "flat.ckpt", network=GIVEN).model.state, state)
    torch.save([{}, {}, 0, 9, state], tmp_path / "official.ckpt", _use_new_zipfile_serialization=False)
    done = bring(tmp_path / "official.ckpt", network=GIVEN)
    assert same(done.model.state, state)
    assert (done.model.weights, done.model.step) == ("ema", 9)


def test_safetensors_with_flat_names_are_flat(tmp_path, state):
    save_file(state, tmp_path / "flat.safetensors", {"format": "pt"})
    done = bring(tmp_path / "flat.safetensors", network=GIVEN, layout="flat")
    assert same(done.model.state, state)
    assert (done.model.weights, done.warnings) == ("unlabelled", [UNLABELLED])


@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".pt", ".bin", ".tar", ""])
def test_the_suffix_of_a_file_does_not_matter(tmp_path, state, suffix):
    path = tmp_path / f"flat{suffix}"
    torch.save(state, path)
    assert same(bring(path, network=GIVEN).model.state, state)
    save_file(state, path)
    assert same(bring(path, network=GIVEN, overwrite=True).model.state, state)


def as_bin(folder, rename=lambda name: name):
    """Turn the weights of a folder into the .bin of older versions."""
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({rename(name): value for name, value in load_file(file).items()}, file.with_suffix(".bin"))
    file.unlink()


def test_a_folder_with_old_attention_names_is_read(folder, state):
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = set()

    def rename(name):
        for there, before in old.items():
            if there in name:
                renamed.add(before)
                return name.replace(there, before)
        return name

    as_bin(folder, rename)
    assert renamed == set(old.values())
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
    for path in (folder, folder / "unet", folder / "unet" / "diffusion_pytorch_model.safetensors"):
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


def test_the_schedule_of_a_folder_is_that_of_its_scheduler(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    edit(path, beta_schedule="scaled_linear", beta_start=0.001, beta_end=0.01, num_train_timesteps=30)
    done = bring(folder)
    assert torch.equal(done.model.spec.schedule.alpha_bar, scaled_linear_schedule(30, 0.001, 0.01).alpha_bar)


def test_diffusers_weights_without_config_need_a_network(folder, state, tmp_path):
    shutil.copy(folder / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "alone.safetensors")
    done = bring(tmp_path / "alone.safetensors", network=GIVEN, layout="diffusers")
    assert same(done.model.state, state)
    message = refusal(tmp_path / "alone.safetensors", overwrite=True)
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
    torch.save(mixed, tmp_path / "mixed.ckpt")
    done = bring(tmp_path / "mixed.ckpt", network=GIVEN)
    assert done.lines[-1].endswith("(stored as float16, float64, written as float32)")
    assert "stored as" not in " ".join(bring(flat, network=GIVEN).lines)


@pytest.mark.parametrize("kind", ["parameters", "strides", "views of one buffer", "views of more", "other order"])
def test_the_memory_layout_of_tensors_does_not_matter(tmp_path, state, kind):
    def changed(value):
        if kind == "parameters":
            return torch.nn.Parameter(value)
        if kind == "strides":
            return value.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == "views of more":
            return torch.stack([value, value + 1], dim=-1)[..., 0]
        return value

    other = {name: changed(value) for name, value in state.items()}
    if kind == "views of one buffer":
        pieces = torch.cat([value.reshape(-1) for value in state.values()]).split([v.numel() for v in state.values()])
        other = {name: piece.view(state[name].shape) for name, piece in zip(state, pieces, strict=True)}
    if kind == "other order":
        other = dict(reversed(state.items()))
    torch.save(other, tmp_path / "flat.ckpt")
    assert same(bring(tmp_path / "flat.ckpt", network=GIVEN).model.state, state)


def test_one_tensor_under_two_names_is_two_parameters(tmp_path, state):
    shared = state | {"norm_out.bias": state["norm_out.weight"]}
    torch.save(shared, tmp_path / "flat.ckpt")
    assert same(read_model(bring(tmp_path / "flat.ckpt", network=GIVEN).path).state, shared)


@pytest.mark.parametrize("clip", [True, None, False])
def test_a_clipping_scheduler_is_noted(folder, clip):
    edit(folder / "scheduler" / "scheduler_config.json", clip_sample=clip)  # without the entry it does, too
    note = "its scheduler clips the predicted x0, which the paper does not; sampler.clip=x0 does the same"
    assert bring(folder, weights="ema").warnings == ([] if clip is False else [note])


def test_a_missing_scheduler_is_noted(folder):
    shutil.rmtree(folder / "scheduler")
    done = bring(folder, weights="ema")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert done.warnings == [
        f"no scheduler_config.json belongs to {file}: a linear schedule and noise prediction are assumed"
    ]
    assert (done.model.spec.schedule.name, done.model.spec.schedule.T, done.model.spec.prediction) == (
        "linear",
        1000,
        "eps",
    )


def test_the_command_replaces_a_missing_scheduler(folder):
    shutil.rmtree(folder / "scheduler")
    done = bring(folder, schedule=ScheduleSpec("cosine", T=20), prediction="x0")
    assert torch.equal(done.model.spec.schedule.alpha_bar, cosine_schedule(20).alpha_bar)
    assert done.model.spec.prediction == "x0"
