"""A sweep as a command: its plan, its manifest, failures, kills at any moment, several processes, other launchers.

DDIM_KILLS=10 kills more often.
"""

import csv
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
SCRIPTS = Path(__file__).parents[2] / "scripts"
KILLS = int(os.environ.get("DDIM_KILLS", "2"))
CSV = "table.csv"
TABLES = ("table.md", CSV, "table.json", "table.tex")
OPTIONS = ("data=digits", "metric=digits_classifier", "compute.device=cpu", "n=120", "compute.batch_size=7", "grid=9")

pytestmark = pytest.mark.integration


def command(checkpoint: Path, folder: Path, *more: str, processes: int = 1) -> list[str]:
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    sweep = (f"checkpoint={checkpoint}", "sampler=ddim,ddpm", "sampler.S=4,10", f"output_dir={folder}")
    script = [str(SCRIPTS / "evaluate.py"), "-m", *OPTIONS, *sweep, f"reference_dir={folder}_reference", *more]
    return [sys.executable, *(launcher if processes > 1 else ()), *script]


def start(words: list[str], folder: Path, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, cwd=folder.parent, env=environment, text=True, **pipes, **options)


def finish(words: list[str], folder: Path) -> str:
    """Run a command to its end and return what it printed."""
    process = start(words, folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return out


def tables(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in TABLES}


def images_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "grids").iterdir())}


def parts(folder: Path) -> set[Path]:
    return set(folder.glob("unfinished/*/*.safetensors"))


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A sweep that nobody disturbed: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("whole") / "sweep"
    return folder, finish(command(checkpoint, folder), folder)


def test_the_plan_lists_the_work(whole: tuple[Path, str], checkpoint: Path) -> None:
    folder, out = whole
    lines = [line for line in out.splitlines() if line.startswith("plan: ")]
    assert out.splitlines()[: len(lines)] == lines
    assert lines[0] == f"plan: 4 cells, {120 * (4 + 10) * 2:,} network evaluations of one image"
    assert re.fullmatch(r"plan: expected: 0:0\d:\d\d on 1 x .* evaluations/s each.*", lines[-1])
    cells = json.loads((folder / "manifest.json").read_text())["cells"].values()
    assert sorted(cell["title"] for cell in cells) == sorted(f"η={e} S={S} linear" for e in (0.0, 1.0) for S in (4, 10))
    assert {cell["state"] for cell in cells} == {"done"}
    assert parts(folder) == set()


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    whole: tuple[Path, str], checkpoint: Path, tmp_path: Path
) -> None:
    folder, generator, ends = tmp_path / "sweep", random.Random(KILLS), []
    for k in range(KILLS):
        before = parts(folder)
        process = start(command(checkpoint, folder), folder, start_new_session=True)
        if k % 2 == 0:  # in the middle of a cell
            end = time.monotonic() + 120
            while len(parts(folder) - before) < 2 and process.poll() is None and time.monotonic() < end:
                time.sleep(0.001)
            time.sleep(generator.uniform(0, 0.2))
        else:  # at any time from its start on
            time.sleep(generator.uniform(0.5, 6))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        ends.append(process.returncode)
    assert set(ends) == {-signal.SIGKILL}  # none had ended by itself
    finish(command(checkpoint, folder), folder)
    assert tables(folder) == tables(whole[0])
    assert images_of(folder) == images_of(whole[0])
    assert parts(folder) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "processes"), [((), 2), (("compute.batch_size=1",), 1), (("compute.batch_size=64",), 1)]
)
def test_tables_do_not_depend_on_batches_or_processes(
    whole: tuple[Path, str], checkpoint: Path, tmp_path: Path, more: tuple[str, ...], processes: int
) -> None:
    folder = tmp_path / "sweep"
    out = finish(command(checkpoint, folder, *more, processes=processes), folder)
    assert len(re.findall(r"fd_digits_classifier_120 \d", out)) == 4  # said once, however many processes there are
    if processes > 1:  # the same batches
        assert tables(folder) == tables(whole[0])
        assert images_of(folder) == images_of(whole[0])
    # Another batch size rounds differently inside the network, and a pixel may fall on the other side of a half.
    assert tables(folder)["table.md"] == tables(whole[0])["table.md"]
    ours, theirs = (
        [float(row["value"]) for row in csv.DictReader(f.read_text().splitlines())]
        for f in (folder / CSV, whole[0] / CSV)
    )
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_jobs_of_another_launcher_end_in_one_table(whole: tuple[Path, str], checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    folder = tmp_path / "sweep"
    process = start(command(checkpoint, folder, "sampler.S=4,10,2000", "hydra/launcher=submitit_local"), folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2, out + err
    reason = "sampler: S=2000 steps cannot be chosen from T=1000 times; S must lie in 1..1000."
    for eta in (0.0, 1.0):
        assert f"failed: η={eta} S=2000 linear: {reason}" in out
    assert "error: " in err
    assert "plan: 6 cells, 483,360 network evaluations" in out
    assert tables(folder) == tables(whole[0])


def test_impossible_evaluations_are_named_first_and_last(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("-m", *OPTIONS, f"checkpoint={checkpoint}", "sampler.S=2000,2", "output_dir=out")
    outcome = run("evaluate", *arguments)
    assert outcome.code == 2
    reason = "sampler: S=2000 steps cannot be chosen from T=1000 times; S must lie in 1..1000."
    assert f"plan: not possible: η=0.0 S=2000 linear: {reason}" in outcome.out
    assert outcome.out.splitlines()[-1] == f"failed: η=0.0 S=2000 linear: {reason}"
    again = run("evaluate", *arguments[:4], "n=60", *arguments[5:-2], "sampler.S=2", "output_dir=out")
    assert again.code == 0
    cells = json.loads((tmp_path / "out" / "manifest.json").read_text())["cells"].values()
    assert [cell["state"] for cell in cells] == ["failed", "done", "done"]


def test_a_sweep_runs_without_a_plan_if_hydra_changes(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "hydra.core.override_parser.overrides_parser", None)
    outcome = run("evaluate", "-m", *OPTIONS, f"checkpoint={checkpoint}", "sampler.S=2", "output_dir=out")
    assert (outcome.code, outcome.err) == (0, "")
    assert "plan: " not in outcome.out
    assert (tmp_path / "out" / "table.md").exists()


def test_scripts_use_no_private_module_of_hydra() -> None:
    assert [path.name for path in SCRIPTS.rglob("*.py") if "hydra._internal" in path.read_text()] == []


def test_a_sweep_that_only_its_jobs_can_resolve_has_no_plan(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    arguments = (
        "-m",
        *OPTIONS,
        f"checkpoint={checkpoint}",
        "sampler.S=2,3",
        "name=job${hydra:job.num}",
        "output_dir=o",
    )
    outcome = run("evaluate", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    assert "plan: " not in outcome.out
    lines = (tmp_path / "o" / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["config"]["name"] for line in lines] == ["job0", "job1"]


def test_a_full_disk_is_one_line_and_keeps_finished_shards(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddim.evaluation import shards as module

    real, left = module.write_safetensors, iter(range(3))

    def write(path: Path, *rest: Any) -> None:
        if "unfinished" in path.parts and next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, *rest)

    monkeypatch.setattr(module, "write_safetensors", write)
    arguments = ("-m", *OPTIONS, f"checkpoint={checkpoint}", "sampler.S=2", "output_dir=out")
    outcome = run("evaluate", *arguments)
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert re.fullmatch(r"error: cannot write to \S+safetensors \(No space left on device\); make room.\n", outcome.err)
    assert outcome.out.splitlines()[-1].startswith("failed: η=0.0 S=2 linear: cannot write to")
    assert len(parts(tmp_path / "out")) == 3
    monkeypatch.setattr(module, "write_safetensors", real)
    again = run("evaluate", *arguments)
    assert again.code == 0, again.err
    assert "plan: done: 0 cells, and 1 in part; 198 network evaluations are left" in again.out  # 120 - 3 x 7 images
    assert "failed" not in again.out


def test_ctrl_c_prints_one_word_and_the_command_resumes(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddim.evaluation import shards as module

    real = module.write_safetensors

    def interrupt(path: Path, *rest: Any) -> None:
        real(path, *rest)
        if "unfinished" in path.parts:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_safetensors", interrupt)
    arguments = ("-m", *OPTIONS, f"checkpoint={checkpoint}", "sampler.S=2,3", "output_dir=out")
    outcome = run("evaluate", *arguments)
    assert (outcome.code, outcome.err) == (130, "stopped.\n")
    assert len(parts(tmp_path / "out")) == 1  # and the second cell was not begun
    monkeypatch.setattr(module, "write_safetensors", real)
    assert run("evaluate", *arguments).code == 0


def test_repeats_measure_sets_that_do_not_overlap(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("data=digits", "metric=digits_classifier", f"checkpoint={checkpoint}", "compute.device=cpu", "n=20")
    outcome = run("evaluate", *arguments, "sampler.S=2", "repeats=3", "output_dir=out", "save_images=true")
    assert (outcome.code, outcome.err) == (0, "")
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert [(record["first"], record["n"]) for record in records] == [(0, 20), (20, 20), (40, 20)]
    assert len({record["metrics"]["fd_digits_classifier_20"] for record in records}) == 3
    files = sorted((tmp_path / "out" / "images").rglob("*.png"), key=lambda path: path.name)
    assert [path.name for path in files] == [f"{i:06d}.png" for i in range(60)]
    assert len({path.read_bytes() for path in files}) == 60
