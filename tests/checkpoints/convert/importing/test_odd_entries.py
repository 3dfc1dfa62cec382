"""Intact files with impossible entries: refused in one sentence, or imported without harm."""

import json
import struct
import warnings
from itertools import product
from pathlib import Path

import pytest
import torch
from foreign import SMALLEST_GIVEN, bring, raw_safetensors, refusal, survives
from safetensors.torch import save_file

from ddim.checkpoints import save_model
from ddim.checkpoints.convert.exporting import ExportSpec, export_checkpoint

ODD = [None, True, -1, 1.5, float("nan"), 10**30, 10**400, "x", [], [1], [None], {"a": 1}]


def failure(path, place, odd, **options):
    """Return how an import with an odd entry at a place goes wrong; [] when it does not."""
    try:
        survives(path, **options)
    except Exception as error:
        return [f"{'.'.join(place)}={odd!r:.12}: {type(error).__name__} {str(error)[:80]}"]
    return []


def leaves(values, path=()):
    """Return the paths of all entries of nested dicts."""
    found = []
    for key, value in values.items():
        found.append((*path, key))
        if isinstance(value, dict):
            found += leaves(value, (*path, key))
    return found


def with_entry(values, path, value):
    """Return nested dicts with one entry replaced."""
    key, *rest = path
    return values | {key: with_entry(values[key], rest, value) if rest else value}


@pytest.fixture(scope="module")
def description(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("description") / "x.safetensors"
    save_model(model, path)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    return json.loads(header["__metadata__"]["ddim"])


def test_odd_header_entries_are_refused_or_harmless(tmp_path, state, description):
    path, failures = tmp_path / "x.safetensors", []
    for place, odd in product(leaves(description), ODD):
        save_file(state, path, {"ddim": json.dumps(with_entry(description, place, odd))})
        failures += failure(path, place, odd)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("text", ["", "[", "1", "null", "[]", '"ddim"', "[" * 100_000, '{"a":' * 100_000, "NaN"])
def test_an_invalid_description_is_one_sentence(tmp_path, state, text):
    save_file(state, tmp_path / "x.safetensors", {"ddim": text})
    assert "x.safetensors" in refusal(tmp_path / "x.safetensors")


def lightning(model):
    return {
        "ddim": model.spec.to_dict(),
        "state_dict": {f"network.{name}": value for name, value in list(model.state.items())},
        "callbacks": {"EMA": {"decay": 0.9, "updates": 3, "shadow": dict(model.state)}},
        "global_step": 3,
    }


@pytest.mark.slow
def test_odd_entries_of_our_checkpoints_are_refused_or_harmless(tmp_path, model):
    path, content, failures = tmp_path / "x.ckpt", lightning(model), []
    names = {*model.state, *content["state_dict"]} - {"conv_in.bias", "network.conv_in.bias"}  # one stands for all
    places = [place for place in leaves(content) if place[-1] not in names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place, odd in product(places, [*ODD, torch.zeros(2), torch.ones(3, device="meta")]):
            torch.save(with_entry(content, place, odd), path)
            failures += failure(path, place, odd)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("key", [1, None, (1, 2), b"bytes", "", "a\nb", "module", "_orig_mod.module."])
def test_odd_names_of_parameters_are_refused(tmp_path, state, model, key):
    extra = {key: torch.zeros(1)}
    training = lightning(model)
    for content in (
        state | extra,
        [state | extra, {}, 0, 1],
        training | {"state_dict": training["state_dict"] | extra, "callbacks": {}},
        training | {"callbacks": {"EMA": {"shadow": extra}}},
        extra | {"epoch": 1},
    ):
        torch.save(content, tmp_path / "x.ckpt")
        options = {} if "ddim" in content else {"network": SMALLEST_GIVEN}
        if isinstance(content, dict) and "state_dict" in content and content["callbacks"] == {}:
            survives(tmp_path / "x.ckpt", **options, weights="online")  # what is not of the network may lie beside it
        else:
            refusal(tmp_path / "x.ckpt", **options)


@pytest.mark.parametrize("kind", ["sparse", "meta", "nested", "quantized", "empty", "scalar", "float8"])
def test_odd_tensors_are_refused_or_read(tmp_path, state, kind):
    name = "mid.block_1.conv1.weight"
    value = state[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        odd = {
            "sparse": lambda: value.to_sparse(),
            "meta": lambda: value.to("meta"),
            "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
            "quantized": lambda: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
            "empty": lambda: torch.zeros(0),
            "scalar": lambda: torch.tensor(1.0),
            "float8": lambda: value.to(torch.float8_e4m3fn),
        }[kind]()
        torch.save(state | {name: odd}, tmp_path / "x.ckpt")
        if kind == "float8":
            done = bring(tmp_path / "x.ckpt", network=SMALLEST_GIVEN)
            assert torch.equal(done.model.state[name], odd.to(torch.float32))
        else:
            refusal(tmp_path / "x.ckpt", network=SMALLEST_GIVEN)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """A folder of diffusers without our header, and its two configurations."""
    folder = tmp_path_factory.mktemp("exported")
    save_model(model, folder / "x.safetensors")
    export_checkpoint(ExportSpec(str(folder / "x.safetensors"), str(folder / "folder")))
    weights = folder / "folder" / "unet" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    del header["__metadata__"]
    weights.write_bytes(raw_safetensors(header, content[8 + length :]))
    return folder / "folder"


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_odd_config_entries_are_refused_or_harmless(exported, file):
    before = (exported / file).read_text()
    values, failures = json.loads(before), []
    try:
        for key, odd in product(values, ODD):
            (exported / file).write_text(json.dumps(values | {key: odd}))
            failures += failure(exported, (key,), odd, weights="ema")
    finally:
        (exported / file).write_text(before)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"text", b"NaN"]
)
@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_an_invalid_configuration_is_one_sentence(exported, file, text):
    before = (exported / file).read_bytes()
    try:
        (exported / file).write_bytes(text)
        assert Path(file).name in refusal(exported)
    finally:
        (exported / file).write_bytes(before)
