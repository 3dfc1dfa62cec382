"""Intact files with impossible entries: refused in one sentence, or, where that is allowed, read without harm."""

import json
import math
import re
import warnings
from itertools import product

import pytest
import torch
from layouts import (
    SMALLEST_GIVEN,
    WEIGHTS_FILE,
    bring,
    foreign_folder,
    import_refusal,
    lightning,
    refusal,
    save,
    survives,
)
from safetensors.torch import save_file

from ddim.checkpoints import ModelSpec, load_model
from ddim.checkpoints.model import encode_metadata

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


# The description in the header of a model file.


@pytest.fixture
def description(smallest):
    """A right description, as plain values."""
    return json.loads(encode_metadata(smallest)["ddim"])


@pytest.fixture
def write(smallest, path):
    """write(description): a model file with this description in its header."""

    def write(description):
        text = description if isinstance(description, str) else json.dumps(description)
        save_file(smallest.state, path, {"format": "pt", "ddim": text})
        return path

    return write


@pytest.mark.slow
def test_odd_header_entries_are_refused_or_harmless(write, description):
    places = product(leaves(description), ODD)
    failures = [failure(write(with_entry(description, place, odd)), place, odd) for place, odd in places]
    assert not any(failures), failures


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "pt", "DDIM": "{}"}])
def test_a_file_without_our_header_is_refused_with_advice(smallest, path, metadata):
    save_file(smallest.state, path, metadata)
    message = refusal(load_model, path)
    assert f"{path} is not a checkpoint of this project" in message
    assert "scripts/import_checkpoint.py" in message


TEXTS = ["", "{", "[", "{}", "null", "[]", "1", '"text"', "{'format': 1}", '{"format": 1', '{"schedule": NaN}', "NaN"]
TEXTS += ["\0", 5000 * "1", "[" * 100_000, '{"a":' * 100_000]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:12])
def test_a_damaged_description_is_refused(write, text):
    path = write(text)
    assert f"the description of the model in {path} is not understood (" in refusal(load_model, path)
    assert path.name in import_refusal(path)


@pytest.mark.parametrize("entry", [0, 2, "1", None, [1]])
def test_another_format_is_refused(write, description, entry):
    expected = f"has format {entry!r}; this version reads format 1."
    assert refusal(load_model, write(description | {"format": entry})).endswith(expected)


ENTRIES = ["format", "network", "schedule", "prediction", "data", "weights", "step", "origin"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_incomplete_description_names_the_missing_entry(write, description, smallest, entry):
    del description[entry]
    assert entry in refusal(load_model, write(description))
    if entry in ("network", "schedule", "prediction", "data"):
        values = {key: value for key, value in smallest.spec.to_dict().items() if key != entry}
        assert refusal(ModelSpec.from_dict, values).endswith(f"description of its model lacks '{entry}'.")


@pytest.mark.parametrize("recipe", [*ODD, {"a": math.nan}, [["a"]]])
def test_an_odd_recipe_is_harmless(write, description, recipe):
    loaded = load_model(write(description | {"recipe": recipe}))
    assert loaded.recipe == (recipe if recipe == {"a": 1} else {})


CURVES = [
    None,
    "abc",
    ["a"],
    {},
    [],
    [1],
    [[1.0, 0.5]],
    [[1], [0.5, 0.2]],
    [1, 0.5, 0.5],
    [1, 2],
    [0.9, 0.5],
    [1, 0, 0],
]
CURVES += [[1, value] for value in (-0.5, math.nan, math.inf, None, 10**400)]
NETWORKS = [{"name": "vit"}, {"name": []}, {"name": "unet", "ch": 8}, {"name": "unet", "ch": "8"}]
NETWORKS += [{"name": "unet", "image_size": [8, 8], "unknown": 1}, {"name": "unet", "image_size": "88"}]
WRONG = {
    "network": [None, [], {}, *NETWORKS],
    "schedule": [
        *(None, [], {}, {"name": "linear"}, {"alpha_bar": [1.0, 0.5]}, {"name": 3, "alpha_bar": [1.0, 0.5]}),
        *({"name": "linear", "alpha_bar": values} for values in CURVES),
    ],
    "prediction": [None, "", "epsilon", [], 3],
    "weights": [None, "", "averaged", ["ema"], 1],
    "step": ["7", 1.5, -1, True],
    "origin": [None, "published.ckpt", [1], {"file": 1}],
    "data": [3, None],
    "plugins": [3, "text", [1], None],
    "image": [{"shape": [1, 4, 4], "range": [0.0, 1.0]}, {"shape": [3, 4, 4], "range": [-1.0, 1.0]}],
}


@pytest.mark.parametrize(("entry", "value"), [(entry, value) for entry, values in WRONG.items() for value in values])
def test_a_wrong_entry_of_a_description_is_refused(write, description, entry, value):
    message = refusal(load_model, write(description | {entry: value}))
    assert "choose weights=" not in message  # no unknown label is given as advice


TENSORS = [torch.ones(3), torch.ones(3, dtype=torch.float64), [1.0, 0.5]]
CHANGES = [(entry, value) for entry in ("network", "prediction") for value in WRONG[entry]]
CHANGES += [("schedule", {"name": "linear", "alpha_bar": values}) for values in TENSORS]


@pytest.mark.parametrize(("entry", "value"), [*CHANGES, ("schedule", {"name": "linear"})])
def test_a_wrong_entry_of_a_spec_is_one_sentence(smallest, entry, value):
    sentence = r"the checkpoint's description of its model (lacks|is not understood:) [^\n]*[^.]\."
    assert re.fullmatch(sentence, refusal(ModelSpec.from_dict, smallest.spec.to_dict() | {entry: value}))


# Files of torch.save.


@pytest.mark.slow
def test_odd_entries_of_our_checkpoints_are_refused_or_harmless(tmp_path, smallest):
    path, content, failures = tmp_path / "x.ckpt", lightning(smallest, smallest.state), []
    names = {*smallest.state, *content["state_dict"]} - {"conv_in.bias", "network.conv_in.bias"}  # one stands for all
    places = [place for place in leaves(content) if place[-1] not in names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place, odd in product(places, [*ODD, torch.zeros(2), torch.ones(3, device="meta")]):
            failures += failure(save(with_entry(content, place, odd), path), place, odd)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("key", [1, None, (1, 2), b"bytes", "", "a\nb", "module", "_orig_mod.module."])
def test_odd_names_of_parameters_are_refused(tmp_path, smallest, key):
    state, training, extra = smallest.state, lightning(smallest), {key: torch.zeros(1)}
    path, options = tmp_path / "x.ckpt", {"network": SMALLEST_GIVEN}
    for content in (state | extra, [state | extra, {}, 0, 1], extra | {"epoch": 1}):
        import_refusal(save(content, path), **options)
    import_refusal(save(training | {"callbacks": {"EMA": {"shadow": extra}}}, path))
    # What is not of the network may lie next to it.
    save(training | {"state_dict": training["state_dict"] | extra, "callbacks": {}}, path)
    survives(path, weights="online")


@pytest.mark.parametrize("kind", ["sparse", "meta", "nested", "quantized", "empty", "scalar", "float8"])
def test_odd_tensors_are_refused_or_read(tmp_path, smallest, kind):
    name, path = "mid.block_1.conv1.weight", tmp_path / "x.ckpt"
    value = smallest.state[name]
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
        save(smallest.state | {name: odd}, path)
        if kind == "float8":
            done = bring(path, network=SMALLEST_GIVEN)
            assert torch.equal(done.model.state[name], odd.to(torch.float32))
        else:
            import_refusal(path, network=SMALLEST_GIVEN)


# The configurations of diffusers.


@pytest.fixture(scope="module")
def exported(smallest, tmp_path_factory):
    """A folder of diffusers, without our header."""
    return foreign_folder(smallest, tmp_path_factory.mktemp("exported"))


@pytest.fixture(params=["unet/config.json", "scheduler/scheduler_config.json"])
def config(request, exported):
    """A configuration of the folder, which is restored."""
    assert (exported / WEIGHTS_FILE).is_file()
    before = (exported / request.param).read_bytes()
    yield exported / request.param
    (exported / request.param).write_bytes(before)


@pytest.mark.slow
def test_odd_config_entries_are_refused_or_harmless(exported, config):
    values, failures = json.loads(config.read_text()), []
    for key, odd in product(values, ODD):
        config.write_text(json.dumps(values | {key: odd}))
        failures += failure(exported, (key,), odd, weights="ema")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"text", b"NaN"]
)
def test_an_invalid_configuration_is_one_sentence(exported, config, text):
    config.write_bytes(text)
    assert config.name in import_refusal(exported)
