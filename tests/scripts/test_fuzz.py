"""Random inputs: whatever a command is given, it ends with status 0, or with 2 and one sentence, in bounded memory.

FUZZ=200 tries so many inputs of each kind in place of a few, FUZZ_SEED=7 others.
"""

import io
import json
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.integration
Run = Callable[..., Any]
INPUTS, SEED = int(os.environ.get("FUZZ", "4")), int(os.environ.get("FUZZ_SEED", "0"))
MODEL = "checkpoint=tiny.ckpt compute.device=cpu output_dir=out"
DATA = "data=folder data.root=images data.size=[8,8] data.channels=1"
EVALUATE = f"{MODEL} {DATA} metric=pixels n=2 grid=0 sampler.S=1"

VALUES = [
    "",
    "0",
    "-1",
    "1e9",
    "4000000000",
    "null",
    "nan",
    "[1,2]",
    "{a:1}",
    "[]",
    "true",
    "~",
    "../x",
    "/",
    "a" * 300,
]
VALUES += ["é", "\x07", "1.5", "10**9", "range(1,0)", "glob(*)", "${now:%s}", "${oops}", "'", "1,2", "ddim", "no.such"]
KEYS = ["n", "seed", "name", "output_dir", "sampler", "sampler.S", "sampler.eta", "sampler.rule", "sampler.spacing"]
KEYS += ["sampler.times", "sampler.clip", "sampler.order", "sampler.kwargs", "sampler.nfe", "data", "data.root"]
KEYS += ["data.size", "data.name", "metric", "metric.reference_npz", "metric.metrics", "compute", "compute.device"]
KEYS += ["compute.batch_size", "checkpoint", "weights", "experiment", "repeats", "first", "logger", "logger.tags", "x"]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut, overwrite, insert or repeat some bytes."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, length = rng.randrange(len(data) + 1), rng.choice([1, 1, 4, 64])
        noise = rng.choice([rng.randbytes(length), b"\0" * length, b"\xff" * length, bytes(data[:length])])
        kind = rng.randrange(4)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at : at + length] = noise
        elif kind == 2:
            data[at:at] = noise
        else:
            del data[at : at + length]
    return bytes(data)


def statistics(path: Path, rng: random.Random) -> str:
    mu, sigma = np.zeros(64), np.eye(64)
    value = rng.choice([np.nan, np.inf, -np.inf, 1e308, -5.0, 0.0, 1e-310])
    target = rng.choice([mu, sigma])
    target.flat[rng.randrange(target.size)] = value
    arrays = {"mu": mu, "sigma": sigma} | rng.choice([{}, {}, {"images": np.array(rng.choice([0, -1, 5, 2.5]))}])
    arrays[rng.choice(list(arrays))] = rng.choice([mu, sigma, mu[:3], sigma[:2], np.array("x"), mu.astype(np.float16)])
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    path.write_bytes(buffer.getvalue() if rng.random() < 0.5 else damaged(buffer.getvalue(), rng))
    return f"evaluate {EVALUATE} metric.reference_npz=good.npz"


def checkpoints(path: Path, rng: random.Random) -> str:
    path.with_name("bad.ckpt").write_bytes(damaged(path.with_name("tiny.ckpt").read_bytes(), rng))
    return rng.choice(
        ["sample checkpoint=bad.ckpt n=1 sampler.S=1 compute.device=cpu", "import_checkpoint checkpoint=bad.ckpt"]
    )


def images(path: Path, rng: random.Random) -> str:
    exif = Image.Exif()
    for _ in range(3):
        exif[rng.choice([0x112, 0x11A, 0x128, 0x8769, rng.randrange(65536)])] = rng.choice(
            [6, 99, "72", b"\xff\0", 1.5]
        )
    buffer = io.BytesIO()
    try:
        mode = rng.choice(["L", "RGB", "1", "P"])
        Image.new(mode, rng.choice([(8, 8), (9, 8), (1, 1)])).save(buffer, rng.choice(["PNG", "BMP"]), exif=exif)
    except Exception:  # Pillow cannot write all of these
        Image.new("L", (8, 8)).save(buffer, "JPEG")
    content = buffer.getvalue()
    where = path.with_name("images") / rng.choice(["0.png", "café.jpg", "train/0.png", "x.bmp"])
    where.parent.mkdir(exist_ok=True)
    where.write_bytes(content if rng.random() < 0.3 else damaged(content, rng))
    lazy = rng.choice(["", " data.in_memory=false", " data.convert=true"])
    return f"evaluate {EVALUATE}{lazy}"


def records(path: Path, rng: random.Random) -> str:
    out = path.with_name("out")
    out.mkdir(exist_ok=True)
    value = rng.choice([None, 5, [], {}, "x", {"key": 1}, {"cells": {"a": {}}}, {"cells": []}, [[]] * 3, 1e400])
    text = rng.choice([json.dumps(value), '{"key": "a"', "\0", "", "NaN", "{}\n" * 3, "[" * 5000])
    (out / rng.choice(["records.jsonl", "manifest.json"])).write_bytes(
        text.encode() if rng.random() < 0.6 else damaged(text.encode() or b"{}", rng)
    )
    return f"evaluate {rng.choice(['', '-m '])}{EVALUATE}"


def overrides(path: Path, rng: random.Random) -> str:
    words = [f"{rng.choice(['', '', '', '+', '++', '~'])}{rng.choice(KEYS)}={rng.choice(VALUES)}" for _ in range(2)]
    words = [word.removesuffix("=null") if word[0] == "~" else word for word in words]
    script = rng.choice(["sample", "evaluate", "figures", "train", "reconstruct", "export_checkpoint", "solver_error"])
    base = {"sample": f"{MODEL} n=1 sampler.S=1", "evaluate": EVALUATE, "train": "data=digits dry_run=true"}
    return "\n".join([script, *rng.choice([[], ["-m"]]), *base.get(script, "checkpoint=tiny.ckpt").split(), *words])


KINDS = {kind.__name__: kind for kind in (statistics, checkpoints, images, records, overrides)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_random_inputs_end_in_one_sentence(kind: str, run: Run, tmp_path: Path, make_checkpoint: Any) -> None:
    make_checkpoint(tmp_path / "tiny.ckpt")
    before = peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(INPUTS):
        rng = random.Random(f"{SEED}/{kind}/{number}")
        (tmp_path / "images").mkdir(exist_ok=True)
        for old in [*(tmp_path / "images").rglob("*.*")]:
            old.unlink()
        for i in range(2):
            Image.new("L", (8, 8), 40 * i).save(tmp_path / "images" / f"good{i}.png")
        command = KINDS[kind](tmp_path / "good.npz", rng)
        script, *arguments = command.split("\n") if "\n" in command else command.split()
        outcome = run(script, *arguments)
        told = f"input {number}: {command!r} ended with {outcome.code}: {outcome.err!r}"
        assert outcome.code in (0, 2), told
        assert "Traceback" not in outcome.err + outcome.out, told
        lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
        assert (outcome.code == 2) == bool(lines), told
        for old in (tmp_path / "out").glob("*.json*"):
            old.unlink()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak - before < 1 << 20, f"{(peak - before) >> 10} MiB more than at the start"  # kilobytes on Linux
