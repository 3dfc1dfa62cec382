"""scripts/gpu: stages under limits, commands that exist, and what a machine without a network is given."""

import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from composed import spec_of
from PIL import Image

FOLDER = Path(__file__).parents[2] / "scripts" / "gpu"
SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("ready", flush=True)
time.sleep(60)
"""
LEAVES_A_CHILD = """
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid)
"""


@pytest.fixture(autouse=True)
def scripts_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


@pytest.fixture
def stages(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.SHORTEST", 0.1)
    from stages import Stages

    return Stages(tmp_path, 60, dict(os.environ))


def records(folder):
    return [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]


@pytest.mark.integration
def test_a_stage_ends_ok_failed_late_or_left_out(stages, tmp_path):
    def python(name, limit, code, **options):
        return stages.run(name, limit, sys.executable, "-c", code, **options)

    assert python("good", 30, "print('first'); print('last words')")
    assert not python("bad", 30, "raise SystemExit(3)")
    assert not python("slow", 0.5, "import time; time.sleep(60)")
    assert python("endless", 2, SAVES, endless=True)  # told to stop, a training saves and exits with 75
    assert not python("unfinished", 2, SAVES)
    assert not stages.run("absent", 30, "no_such_program")
    stages.end = 0.0
    assert not python("more", 30, "print('never')")
    assert {r["stage"]: r["verdict"] for r in records(tmp_path)} == {
        "good": "ok",
        "bad": "FAILED 3",
        "slow": "late",
        "endless": "ok, stopped",
        "unfinished": "late",
        "absent": "FAILED",
        "more": "left out",
    }
    assert stages.failed == ["bad", "slow", "unfinished", "absent", "more"]
    summary, log = ((tmp_path / name).read_text() for name in ("summary.txt", "log.txt"))
    assert "last words" in summary
    assert "first" not in summary
    assert "first\nlast words" in log
    assert "never" not in log


@pytest.mark.integration
def test_what_a_running_stage_has_done_is_kept(stages, tmp_path, monkeypatch):
    """The machine may be gone before the stage ends."""
    monkeypatch.setattr("stages.KEEP_EVERY", 0.2)
    kept = []
    stages.keep = lambda: kept.append((tmp_path / "log.txt").read_text())
    code = "import time; print('begun', flush=True); time.sleep(3); print('done')"
    assert stages.run("long", 30, sys.executable, "-c", code)
    assert any("begun" in text and "done" not in text for text in kept)
    assert re.search(r"begun\ndone\n\n==> long: ok, \d+ s <==\n\n$", kept[-1])
    assert not stages.run("late", 1, sys.executable, "-c", "import time; time.sleep(60)")  # has a limit all the same


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.integration
def test_what_a_stage_started_ends_with_it(stages, tmp_path):
    assert stages.run("parent", 30, sys.executable, "-c", LEAVES_A_CHILD)
    child = int((tmp_path / "log.txt").read_text().split("\n")[1])
    end = time.monotonic() + 30
    while is_alive(child) and time.monotonic() < end:
        time.sleep(0.05)  # a signal takes a moment
    assert not is_alive(child)


@pytest.fixture
def acceptance(tmp_path, monkeypatch):
    """acceptance(rehearsal): a run whose commands are collected, not run; (name, script, words) of each."""
    from acceptance import Acceptance

    def acceptance(rehearsal, parts=("checks", "speed", "training")):
        options = Namespace(parts=parts, official=tmp_path, images=tmp_path, minutes=20.0)
        options.out, options.kit, options.rehearsal, options.train = tmp_path / "out", None, rehearsal, ["optim.lr=0.1"]
        run, commands = Acceptance(options), []
        assert run.stages.keep == run.keep  # called while stages run, and after each

        def collect(name, limit, script, *words, endless=False):
            commands.append((name, script, [str(word) for word in words]))
            return True

        monkeypatch.setattr(run, "python", collect)
        (run.work / "cifar10" / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run.work / "cifar10" / "checkpoints" / "last.ckpt").touch()
        for part in options.parts:
            getattr(run, part)()
        return commands

    return acceptance


def listed(word):
    key, _, values = word.partition("=")
    return [f"{key}={value}" for value in values.split(",")]


@pytest.mark.parametrize("rehearsal", [False, True])
def test_every_command_of_the_run_makes_a_spec(acceptance, rehearsal):
    commands = acceptance(rehearsal)
    specs = {}
    for name, script, words in commands:
        if Path(script).stem in ("train", "evaluate", "sample", "figures"):
            words = [word for word in words if word != "-m"]
            choices = [[word] if "[" in word else listed(word) for word in words]
            for entry in itertools.product(*choices):  # every one of a sweep
                specs[name] = spec_of(Path(script).stem, *entry)
    assert len(specs) == (8 if rehearsal else 11)
    assert specs["train"].optim.lr == 0.1
    assert specs["train"].trainer.precision == ("32-true" if rehearsal else "bf16-mixed")
    assert specs["sweep-table"].compute.bf16 is not rehearsal
    assert specs["sweep-table"].n == (20 if rehearsal else 5000)
    words = {name: words for name, _, words in commands}
    assert words["sweep-table"][-2].startswith("sampler.S=")  # before the samplers: Hydra varies the last fastest
    assert specs["profile"].trainer.profiler == "kernels"
    assert rehearsal or specs["profile-graphs"].trainer.graphs
    alone = [name for name, *_ in acceptance(rehearsal, ("checks",))]  # without a training, which has these commands
    assert {"train-digits", "evaluate-digits", "sample-digits"} < {*alone}
    assert not {"profile", "profile-graphs"} & {*alone}
    order = [name for name, *_ in commands if name in ("gpu-tests", "profile", "compile-tests", "profile-graphs")]
    assert order == ["gpu-tests", "profile"] + ["compile-tests", "profile-graphs"] * (not rehearsal)


def test_all_that_is_done_leaves_a_lent_machine_but_weights(tmp_path, monkeypatch):
    from acceptance import Acceptance

    run = object.__new__(Acceptance)
    run.options, run.work, run.out = Namespace(kit=tmp_path), tmp_path / "work", tmp_path / "out"
    table = run.work / "cifar10" / "table"
    for folder in (run.out, table / "unfinished"):
        folder.mkdir(parents=True)
    for name in ("records.jsonl", "last.ckpt", "model.safetensors", "unfinished/features.npy"):
        (table / name).write_text(name)

    def parts():
        return sorted(run.out.iterdir(), key=lambda path: int(path.suffix[1:]))

    def joined():
        return b"".join(path.read_bytes() for path in parts())

    monkeypatch.setattr("acceptance.PART", 100)  # bytes
    (run.out / "results.tar.gz.99").touch()  # of a larger archive
    run.keep()
    assert [path.name for path in parts()] == [f"results.tar.gz.{i}" for i in range(len(parts()))]
    assert len(parts()) > 1
    with tarfile.open(fileobj=io.BytesIO(joined())) as archive:
        assert [name for name in archive.getnames() if "." in name] == ["cifar10/table/records.jsonl"]
    before = joined()
    monkeypatch.setattr("tarfile.TarFile.add", lambda *args, **options: (table / "gone").read_text())
    run.keep()  # a command removes files while it runs: that ends nothing
    assert joined() == before


def test_measured_numbers_of_tests_are_in_the_record(tmp_path):
    from acceptance import Acceptance
    from stages import Stages

    (tmp_path / "junit.xml").write_text(
        '<testsuites><testsuite><testcase classname="a" name="good"><properties>'
        '<property name="relative error" value="0.25"/></properties></testcase>'
        '<testcase classname="b" name="bad"><failure message="no">no</failure></testcase></testsuite></testsuites>'
    )
    run = object.__new__(Acceptance)
    run.stages = Stages(tmp_path, 60, {})
    run.read_checks(tmp_path / "junit.xml")
    assert [(r["test"], r["outcome"], r["numbers"]) for r in records(tmp_path)] == [
        ("good", "passed", {"relative error": 0.25}),
        ("bad", "failure", {}),
    ]
    assert (tmp_path / "summary.txt").read_text() == "     2.5e-01  relative error: good\n    failure: b.bad\n"


def test_packed_images_are_evenly_spaced_and_exact(tmp_path):
    from pack import pack_images

    pixels = np.random.default_rng(0).integers(256, size=(12, 32, 32, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        path = tmp_path / "images" / "train" / f"class{i // 4}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    pack_images(tmp_path / "images", 6, tmp_path / "images.zip")
    with zipfile.ZipFile(tmp_path / "images.zip") as archive:
        names = archive.namelist()
        assert names == [f"train/class{i // 4}/{i:02}.webp" for i in range(0, 12, 2)]
        for i, name in enumerate(names):
            with archive.open(name) as file, Image.open(file) as image:
                assert np.array_equal(np.asarray(image), pixels[2 * i])


@pytest.mark.integration
def test_a_packed_commit_names_itself_and_what_changed(tmp_path, monkeypatch):
    import pack

    def git(*words, folder=tmp_path / "home", **options):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(["git", *identity, "-C", str(folder), *words], capture_output=True, text=True, **options)
        assert not done.returncode, done.stderr
        return done.stdout

    home, there, kit = tmp_path / "home", tmp_path / "there", tmp_path / "kit"
    home.mkdir()
    git("init", "--quiet")
    for name in ("code.py", "model.bin"):
        (home / name).write_text(name * 1000)
        git("add", name)
        git("commit", "--quiet", "-m", name)
    monkeypatch.setattr(pack, "ROOT", home)
    pack.pack_commit(kit / "git")
    there.mkdir()
    shutil.copy(home / "code.py", there)  # the other file is left behind
    from acceptance import Acceptance
    from stages import Stages

    monkeypatch.setattr("acceptance.ROOT", there)
    monkeypatch.setattr("stages.ROOT", there)
    run = object.__new__(Acceptance)
    run.stages, run.work, run.images, run.official = Stages(tmp_path, 60, dict(os.environ)), tmp_path, None, None
    monkeypatch.setattr(run, "python", lambda *words: False)
    run.stages.environment["PYTHONPATH"] = ""
    run.unpack(kit)
    environment = {"env": run.stages.environment, "folder": there}
    assert git("rev-parse", "HEAD", **environment) == git("rev-parse", "HEAD")
    assert git("status", "--porcelain", "--untracked-files=no", **environment) == ""
    (there / "code.py").write_text("another")
    assert git("status", "--porcelain", "--untracked-files=no", **environment) == " M code.py\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--official", "nowhere"], "--official nowhere is no folder"),
        (["--official", "."], "--official . is no checkout of ermongroup/ddim"),
        (["--minutes", "-1"], "--minutes -1 must be above 0"),
        (["--out", "."], "--out . is not empty; name a new folder"),
        (["--parts", "speeed"], "invalid choice: 'speeed'"),
    ],
)
def test_bad_options_are_refused_before_work(run, words, message, tmp_path):
    (tmp_path / "file").touch()
    done = run("gpu/acceptance", *words)
    assert done.code == 2
    assert message in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
