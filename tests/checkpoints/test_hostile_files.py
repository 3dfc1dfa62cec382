"""Files that need code to load: one sentence that names the code; nothing is executed."""

import copyreg
import os
import pickle
import struct
import subprocess
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from layouts import SMALLEST, SMALLEST_GIVEN, WEIGHTS_FILE, at_root, export, import_refusal, lightning, refusal

from ddim.checkpoints import load_model
from ddim.checkpoints.model import read_checkpoint
from ddim.networks import UNet


class Calls:
    """Calls something when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class SetsState:
    """Runs its own code in `__setstate__`, by the BUILD instruction."""

    def __init__(self, path):
        self.path = str(path)

    def __setstate__(self, values):
        Path(values["path"]).touch()


class Registered:
    """Is pickled by a function that `copyreg` knows."""

    def __init__(self, path):
        self.path = str(path)


def touch(path):
    Path(path).touch()


copyreg.pickle(Registered, lambda registered: (touch, (registered.path,)))

HERE = __name__
# Payload -> (what does its deed when it is unpickled, what the file needs for it: names that a reader may give).
PAYLOADS = {
    "os.system": (lambda victim: Calls(os.system, f"touch {victim}"), {f"{os.name}.system"}),
    "eval": (lambda victim: Calls(eval, f"open({str(victim)!r}, 'w').close()"), {"eval"}),
    "exec": (lambda victim: Calls(exec, f"open({str(victim)!r}, 'w').close()"), {"exec"}),
    "makedirs": (lambda victim: Calls(os.makedirs, str(victim)), {"os.makedirs"}),
    "subprocess": (lambda victim: Calls(subprocess.call, ["touch", str(victim)]), {"subprocess.call", "commands.call"}),
    "pathlib": (lambda victim: Calls(Path.touch, victim), {"getattr", "pathlib.Path.touch"}),
    "__setstate__": (SetsState, {f"{HERE}.SetsState", "copy_reg._reconstructor"}),
    "copyreg": (Registered, {f"{HERE}.touch"}),
}
SAVERS = {
    "zip": torch.save,
    "legacy": lambda thing, path: torch.save(thing, path, _use_new_zipfile_serialization=False),
    "pickle": lambda thing, path: path.write_bytes(pickle.dumps(thing, 2)),
    "newest pickle": lambda thing, path: path.write_bytes(pickle.dumps(thing)),
}
# In a plain pickle, a tensor itself needs code, and it may come first.
TENSORS = {"torch.storage._load_from_bytes", "torch._utils._rebuild_tensor_v2"}


@pytest.fixture(autouse=True)
def no_warnings():
    """torch warns of protocols it does not know, before it refuses them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def positions(evil, model):
    """Return every place of every layout: name -> content of a file."""
    state, training = model.state, lightning(model)
    return {
        "alone": evil,
        "flat, next to the weights": state | {"extra": evil},
        "flat, first": {"extra": evil} | state,
        "flat, a name": OrderedDict([*state.items(), ((1, evil), torch.zeros(1))]),
        "official, the model": [evil, {}, 0, 1, state],
        "official, in the model": [state | {"x": evil}, {}, 0, 1, state],
        "official, in Adam's state": [state, {"state": {0: {"exp_avg": [1, (2, evil)]}}}, 0, 1, state],
        "official, the epoch": [state, {}, evil, 1],
        "official, the step": [state, {}, 0, evil],
        "official, the average": [state, {}, 0, 1, evil],
        "lightning, in the description": training | {"ddim": training["ddim"] | {"data": evil}},
        "lightning, in the weights": training | {"state_dict": {"network.a": evil}},
        "lightning, in the average": training | {"callbacks": {"EMA": {"shadow": {"a": evil}}}},
        "lightning, next to it": training | {"hyper_parameters": {"a": [{"b": evil}]}},
    }


@pytest.mark.slow
@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_code_in_a_file_is_named_and_not_run(tmp_path, smallest, payload, saver):
    victim = tmp_path / "executed"
    make, needs = PAYLOADS[payload]
    evil = make(victim)
    suffixes, other = (".ckpt", ".pth", ".pt", ".bin", ".tar", ""), tmp_path / "x.safetensors"
    for i, (place, content) in enumerate(positions(evil, smallest).items()):
        path = tmp_path / f"{i}{suffixes[i % 6]}"
        SAVERS[saver](content, path)
        for read in (read_checkpoint, load_model):
            assert f"{path} cannot be read as a checkpoint: " in refusal(read, path), place
        SAVERS[saver](content, other)
        assert import_refusal(other, network=SMALLEST_GIVEN).startswith(f"{other} cannot be read as a checkpoint: ")
        message = import_refusal(path, network=SMALLEST_GIVEN)
        assert not victim.exists(), place
        assert message.startswith(f"{path} cannot be read as a checkpoint: "), place
        if saver == "newest pickle":  # whose reader stops before it knows any name
            continue
        named = message.partition("it needs code to load (")[2].partition(")")[0]
        assert named in needs | (TENSORS if saver == "pickle" else set()), place
        assert message.endswith(
            "code in a file can do anything; nothing was run. Ask for a file of tensors only, such as safetensors."
        )
    pickle.loads(pickle.dumps(evil))
    assert victim.exists()  # the trap itself works


@pytest.mark.parametrize("saver", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("file", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("at", ["unet", "."])
def test_code_in_a_folder_of_diffusers_is_refused(tmp_path, smallest, at, file, saver):
    victim, folder = tmp_path / "executed", export(smallest, tmp_path, "diffusers")
    if at == ".":
        at_root(folder)
    (folder / at / Path(WEIGHTS_FILE).name).unlink()
    path = folder / at / file
    SAVERS[saver]({"conv_in.bias": torch.zeros(4), "x": Calls(os.system, f"touch {victim}")}, path)
    for source in (folder, path):
        message = import_refusal(source)
        if file.endswith(".bin") and saver != "pickle":
            assert f"it needs code to load ({os.name}.system)" in message
    assert not victim.exists()


@pytest.mark.parametrize("saver", SAVERS)
def test_a_pickled_network_is_code(tmp_path, saver):
    for content in (UNet(SMALLEST), {"model": UNet(SMALLEST)}, [UNet(SMALLEST), {}, 0, 1]):
        SAVERS[saver](content, tmp_path / "x.ckpt")
        message = import_refusal(tmp_path / "x.ckpt", network=SMALLEST_GIVEN)
        if saver != "newest pickle":
            assert "it needs code to load (ddim.networks.unet.UNet), and code in a file can do anything" in message


def assembled(victim):
    """Return pickles by hand, instruction by instruction: name -> bytes, each of which runs `touch`."""
    command = f"touch {victim}".encode()
    system = f"c{os.name}\nsystem\n".encode()
    text = b"X" + struct.pack("<I", len(command)) + command
    short = b"\x8c" + bytes([len(command)]) + command
    module, function = os.name.encode(), b"system"
    stack_global = b"\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(function)]) + function + b"\x93"
    return {
        "REDUCE, protocol 0": system + b"(S'" + command + b"'\ntR.",
        "REDUCE": b"\x80\x02" + system + text + b"\x85R.",
        "REDUCE, protocol 4": b"\x80\x04" + system + short + b"\x85R.",
        "STACK_GLOBAL": b"\x80\x04" + stack_global + short + b"\x85R.",
        "STACK_GLOBAL, without a protocol": stack_global + short + b"\x85R.",
        "INST": b"(S'" + command + b"'\ni" + module + b"\n" + function + b"\n.",
        "OBJ": b"(" + system + text + b"o.",
        "twice": b"\x80\x02" + system + b"q\x00" + text + b"\x85R0h\x00" + text + b"\x85R.",
        "under an ordered dict": b"\x80\x02ccollections\nOrderedDict\n(" + system + text + b"\x85RtR.",
        "then tensors": b"\x80\x02}(" + text + system + text + b"\x85Ru.",
    }


@pytest.mark.parametrize("name", assembled(""))
def test_handwritten_pickles_are_not_run(tmp_path, name):
    victim = tmp_path / "executed"
    content = assembled(victim)[name]
    path = tmp_path / "x.ckpt"
    for as_zip in (False, True):
        if as_zip:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", content)
                archive.writestr("archive/version", b"3\n")
                archive.writestr("archive/byteorder", b"little")
        else:
            path.write_bytes(content)
        message = import_refusal(path, network=SMALLEST_GIVEN)
        assert message.startswith(f"{path} cannot be read as a checkpoint: ")
        assert not victim.exists()
        if as_zip and name in ("REDUCE", "twice", "under an ordered dict", "then tensors"):
            assert f"it needs code to load ({os.name}.system)" in message
    if name not in ("under an ordered dict", "then tensors"):
        pickle.loads(content)
        assert victim.exists()


def test_an_archive_of_torchscript_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"x/{name}", pickle.dumps({}, 2))
        archive.writestr("x/version", b"3\n")
    assert "x.pt cannot be read as a checkpoint" in import_refusal(tmp_path / "x.pt")
