"""Model files that are damaged, foreign or inconsistent are refused in one sentence."""

import json
import math
import random
import struct

import pytest
import torch
from safetensors.torch import save_file
from stored import refusal

from ddim.checkpoints import load_model, save_model
from ddim.checkpoints.model import encode_metadata
from ddim.errors import UserError


@pytest.fixture
def write(model, path):
    """write(description): a file of the model's weights with this description in its header."""

    def write(description, state=None):
        text = description if isinstance(description, str) else json.dumps(description)
        save_file(model.state if state is None else state, path, {"format": "pt", "ddim": text})
        return path

    return write


@pytest.fixture
def described(model):
    """A right description, as plain values."""
    return json.loads(encode_metadata(model)["ddim"])


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "pt", "DDIM": "{}"}])
def test_a_file_without_our_header_is_refused_with_advice(model, path, metadata):
    save_file(model.state, path, metadata)
    message = refusal(path)
    assert f"{path} is not a checkpoint of this project" in message
    assert "scripts/import_checkpoint.py" in message


@pytest.mark.parametrize("entry", [0, 2, "1", None, [1]])
def test_another_format_is_refused(write, described, entry):
    assert f"has format {entry!r}; this version reads format 1." in refusal(write(described | {"format": entry}))


ENTRIES = ["format", "network", "schedule", "prediction", "data", "weights", "step", "origin"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_description_that_lacks_an_entry_is_refused(write, described, entry):
    del described[entry]
    assert entry in refusal(write(described))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "{}",
        "null",
        "[]",
        "3",
        '"text"',
        "{'format': 1}",
        '{"format": 1',
        '{"schedule": NaN}',
        "\0",
        5000 * "1",
    ],
)
def test_a_damaged_description_is_refused(write, text):
    message = refusal(write(text))
    assert f"the description of the model in {write(text)} is not understood (" in message


WRONG = {
    "network": [None, [], {}, {"name": "vit"}, {"name": []}, {"name": "unet", "ch": "8"}],
    "schedule": [
        None,
        [],
        {},
        {"name": "linear"},
        {"alpha_bar": [1.0, 0.5]},
        *({"name": "linear", "alpha_bar": values} for values in (None, "abc", ["a"], {}, [], [1], [[1.0, 0.5]])),
        *({"name": "linear", "alpha_bar": values} for values in ([[1], [0.5, 0.2]], [1, 0.5, 0.5], [1, 2], [0.9, 0.5])),
        *({"name": "linear", "alpha_bar": [1, value]} for value in (0, -0.5, math.nan, math.inf, None, 10**400)),
        {"name": 3, "alpha_bar": [1.0, 0.5]},
    ],
    "prediction": [None, "", "epsilon", [], 3],
    "weights": [None, "", "averaged", ["ema"], 1],
    "step": ["7", 1.5, -1, True],
    "origin": [None, "published.ckpt", [1], {"file": 1}],
    "data": [3, None],
    "image": [{"shape": [1, 8, 8], "range": [0.0, 1.0]}, {"shape": [3, 8, 8], "range": [-1.0, 1.0]}],
}


@pytest.mark.parametrize(("entry", "value"), [(entry, value) for entry, values in WRONG.items() for value in values])
def test_a_wrong_entry_is_refused(write, described, entry, value):
    refusal(write(described | {entry: value}))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_a_deeply_nested_description_is_refused(write, text):
    refusal(write(text))


@pytest.mark.parametrize("label", ["averaged", None, ["ema"]])
def test_an_unknown_label_is_not_given_as_advice(write, described, label):
    assert f"choose weights={label}" not in refusal(write(described | {"weights": label}))


def test_weights_that_do_not_fit_their_description_are_refused(model, write, described):
    state = model.state
    name = "conv_in.bias"
    for wrong in (
        {key: value for key, value in state.items() if key != name},
        state | {"stray": torch.zeros(1)},
        state | {name: state[name][:1].clone()},
        {},
    ):
        message = refusal(write(described, wrong))
        assert f"the weights in {write(described, wrong)} do not fit the network it describes: " in message
    described["network"]["ch"] = 16
    assert "do not fit the network it describes" in refusal(write(described))


@pytest.mark.parametrize("size", [0, 1, 8, 9, 100, 5000, 20_000, -1])
def test_a_file_that_is_cut_short_is_refused(model, path, size):
    save_model(model, path)
    content = path.read_bytes()
    path.write_bytes(content[:size])
    assert f"{path} cannot be read as a checkpoint: it is cut short, damaged" in refusal(path)


def test_a_flipped_bit_in_the_header_is_refused_or_harmless(model, path):
    save_model(model, path)
    content = path.read_bytes()
    end, generator, messages = 8 + struct.unpack("<Q", content[:8])[0], random.Random(0), []
    for _ in range(150):
        damaged = bytearray(content)
        damaged[generator.randrange(end)] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            load_model(path)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)
