"""Training checkpoints that are truncated, damaged, foreign or hostile: refused in one sentence, never executed."""

import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch

from ddim import linear_schedule
from ddim.checkpoints import ModelSpec, load_model
from ddim.checkpoints.model import read_checkpoint
from ddim.errors import UserError
from ddim.networks import UNet, UNetSpec


@pytest.fixture(scope="module")
def checkpoint():
    """A whole checkpoint of a very small network, with EMA weights and Adam's state."""
    spec = UNetSpec((4, 4), channels=1, ch=4, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_groups=2)
    network = UNet(spec)
    adam = torch.optim.Adam(network.parameters())
    network(torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.int64)).sum().backward()
    adam.step()
    shadow = {k: v.detach() for k, v in network.named_parameters()}
    return {
        "ddim": ModelSpec("unet", spec, linear_schedule(10)).to_dict(),
        "state_dict": {f"network.{k}": v for k, v in network.state_dict().items()},
        "callbacks": {"EMA": {"decay": 0.9, "updates": 1, "shadow": shadow}},
        "optimizer_states": [adam.state_dict()],
        "global_step": 1,
    }


@pytest.fixture(scope="module")
def content(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "model.ckpt"
    torch.save(checkpoint, path)
    assert load_model(path).step == 1
    return path.read_bytes()


def refusal(path, read=read_checkpoint):
    """Return the one sentence with which a file is refused."""
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_no_truncated_file_loads(content, tmp_path):
    path = tmp_path / "cut.ckpt"
    middle = range(100, len(content), len(content) // 40)
    for size in (*range(0, 100, 7), *middle, *range(len(content) - 150, len(content), 11), len(content) - 1):
        path.write_bytes(content[:size])
        assert "cannot be read as a checkpoint: it is cut short, damaged" in refusal(path)


def test_a_flipped_bit_is_refused_or_harmless(content, tmp_path):
    """Most of a file is weights, in which a flip makes another number; names and structure are at both ends."""
    path, generator, messages = tmp_path / "flipped.ckpt", random.Random(0), []
    ends = [*range(20_000), *range(len(content) - 10_000, len(content))]
    for k in range(120):
        damaged = bytearray(content)
        damaged[generator.choice(ends) if k % 4 else generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            load_model(path)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 25
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize("missing", ["ddim", "state_dict", "global_step"])
def test_a_file_without_a_required_entry_is_foreign(checkpoint, tmp_path, missing):
    path = tmp_path / "foreign.ckpt"
    torch.save({k: v for k, v in checkpoint.items() if k != missing}, path)
    assert "is not a checkpoint of this project" in refusal(path)
    torch.save(checkpoint | {missing: "text"}, path)
    assert "is not a checkpoint of this project" in refusal(path)


@pytest.mark.parametrize("kind", ["text", "zip", "tensor", "list", "state dict", "pickle", "nothing"])
def test_a_foreign_file_is_refused(tmp_path, kind):
    path = tmp_path / "foreign.ckpt"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/b", "c")
    elif kind in ("text", "nothing", "pickle"):
        path.write_bytes({"text": b"format: 1\n", "nothing": b"", "pickle": pickle.dumps({"ddim": {}}, 2)}[kind])
    else:
        thing = {"tensor": torch.zeros(3), "list": [1, 2], "state dict": torch.nn.Linear(2, 2).state_dict()}[kind]
        torch.save(thing, path)
    for read in (read_checkpoint, load_model):
        assert "cannot be read as a checkpoint" in (message := refusal(path, read)) or "not a checkpoint" in message


def test_a_path_that_is_no_file_is_no_checkpoint(tmp_path):
    for path in (tmp_path, tmp_path / "none.ckpt"):
        assert "there is no checkpoint" in refusal(path)
        assert "scripts/train.py" in refusal(path)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("where", ["alone", "in the description", "beside it", "in the average"])
@pytest.mark.parametrize("save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing, 2))])
def test_code_in_a_file_is_not_run(checkpoint, tmp_path, where, save):
    path, victim = tmp_path / "evil.ckpt", tmp_path / "executed"
    evil = Malicious(victim)
    thing = {
        "alone": evil,
        "in the description": checkpoint | {"ddim": checkpoint["ddim"] | {"data": evil}},
        "beside it": checkpoint | {"hyper_parameters": evil},
        "in the average": checkpoint | {"callbacks": {"EMA": {"shadow": {"a": evil}}}},
    }[where]
    save(thing, path)
    for read in (read_checkpoint, load_model):
        assert "cannot be read as a checkpoint" in refusal(path, read)
    assert not victim.exists()
    pickle.loads(pickle.dumps(evil))
    assert victim.exists()  # the trap itself works
