"""A sweep as a command: its plan, its manifest, failures, kills at any moment, several processes, other launchers.

DDIM_KILLS=10 kills more often.
"""

import csv
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddim.distributed import Processes
from ddim.io import write_safetensors

Run = Callable[..., Any]
SCRIPTS = Path(__file__).parents[2] / "scripts"
KILLS = int(os.environ.get("DDIM_KILLS", "2"))
TABLES = ("table.md", "table.csv", "table.json", "table.tex")
OPTIONS = ("data=digits", "metric=digits_classifier", "compute.device=cpu", "n=120", "compute.batch_size=7", "grid=9")
NOT_POSSIBLE = "sampler: S=2000 steps cannot be chosen from T=1000 times; S must lie in 1..1000."

pytestmark = pytest.mark.integration


@pytest.fixture
def start(sweep_arguments: tuple[str, ...], tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """start(option, ..., processes=1): begin or resume the sweep in the folder tmp_path/sweep, in other processes."""

    def start(*more: str, processes: int = 1) -> subprocess.Popen[str]:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
        script = (str(SCRIPTS / "evaluate.py"), *sweep_arguments, "output_dir=sweep", *more)
        return subprocess.Popen(
            [sys.executable, *(launcher if processes > 1 else ()), *script],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    return start


def written(folder: Path, pictures: bool = True) -> dict[str, bytes]:
    """Return the content of the tables and the grids."""
    paths = [folder / name for name in TABLES] + sorted((folder / "grids").iterdir()) * pictures
    return {path.name: path.read_bytes() for path in paths}


def shards(folder: Path) -> set[Path]:
    return set(folder.glob("unfinished/*/*.safetensors"))


def jobs(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "manifest.json").read_text())["cells"].values())


def test_the_plan_lists_the_work(sweep: tuple[Any, Path]) -> None:
    (code, out, err), folder = sweep
    assert (code, err) == (0, "")
    lines = [line for line in out.splitlines() if line.startswith("plan: ")]
    assert out.splitlines()[: len(lines)] == lines
    assert lines[0] == f"plan: 4 jobs, {120 * (4 + 10) * 2:,} network evaluations of one image"
    assert re.fullmatch(r"plan: expected: 0:0\d:\d\d on 1 x .* evaluations/s each.*", lines[-1])
    titles = sorted(job["title"] for job in jobs(folder))
    assert titles == sorted(f"η={e} S={S} linear" for e in (0.0, 1.0) for S in (4, 10))
    assert {job["state"] for job in jobs(folder)} == {"done"}
    assert shards(folder) == set()


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    sweep: tuple[Any, Path], start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    folder, generator, ends = tmp_path / "sweep", random.Random(KILLS), []
    for k in range(KILLS):
        before, process = shards(folder), start()
        if k % 2 == 0:  # in the middle of an evaluation
            end = time.monotonic() + 120
            while len(shards(folder) - before) < 2 and process.poll() is None and time.monotonic() < end:
                time.sleep(0.001)
            time.sleep(generator.uniform(0, 0.2))
        else:  # at any time from its start on
            time.sleep(generator.uniform(0.5, 6))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        ends.append(process.returncode)
    assert set(ends) == {-signal.SIGKILL}  # none had ended by itself
    process = start()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert written(folder) == written(sweep[1])
    assert shards(folder) == set()


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(
    sweep: tuple[Any, Path], start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start(processes=2)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert len(re.findall(r"fd_digits_classifier_120 \d", out)) == 4  # not by each process
    assert written(tmp_path / "sweep") == written(sweep[1])


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 64])
def test_tables_do_not_depend_on_the_batch_size(
    sweep: tuple[Any, Path], run: Run, sweep_arguments: tuple[str, ...], tmp_path: Path, size: int
) -> None:
    outcome = run("evaluate", *sweep_arguments, f"compute.batch_size={size}", "output_dir=sweep")
    assert (outcome.code, outcome.err) == (0, "")
    # Another batch size rounds differently inside the network, and a pixel may fall on the other side of a half.
    table, expected = ((folder / "table.md").read_text() for folder in (tmp_path / "sweep", sweep[1]))
    assert table == expected
    values, expected_values = (
        [float(row["value"]) for row in csv.DictReader((folder / "table.csv").read_text().splitlines())]
        for folder in (tmp_path / "sweep", sweep[1])
    )
    assert values == pytest.approx(expected_values, rel=1e-4)


@pytest.mark.slow
def test_jobs_of_another_launcher_end_in_one_table(
    sweep: tuple[Any, Path], start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    records = (sweep[1] / "records.jsonl").read_text().splitlines()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "records.jsonl").write_text(
        "".join(f"{line}\n" for line in records if json.loads(line)["S"] == 4)
    )
    process = start("sampler.S=10,2000", "hydra/launcher=submitit_local")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2, out + err
    for eta in (0.0, 1.0):
        assert f"failed: η={eta} S=2000 linear: {NOT_POSSIBLE}" in out
    assert "error: " in err
    assert f"plan: 4 jobs, {120 * (10 + 2000) * 2:,} network evaluations" in out
    assert written(tmp_path / "sweep", pictures=False) == written(sweep[1], pictures=False)


def test_impossible_evaluations_are_named_first_and_last(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("-m", *OPTIONS, f"checkpoint={checkpoint}", "sampler.S=2000,2", "output_dir=out")
    outcome = run("evaluate", *arguments)
    assert outcome.code == 2
    assert f"plan: not possible: η=0.0 S=2000 linear: {NOT_POSSIBLE}" in outcome.out
    assert outcome.out.splitlines()[-1] == f"failed: η=0.0 S=2000 linear: {NOT_POSSIBLE}"
    again = run("evaluate", *arguments[:4], "n=60", *arguments[5:-2], "sampler.S=2", "output_dir=out")
    assert again.code == 0
    assert "failed" not in again.out  # what could not start was no result
    assert [job["state"] for job in jobs(tmp_path / "out")] == ["done", "done"]


def test_an_nfe_that_a_rule_cannot_do_stays_empty(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    nfe = ("sampler=ddim,heun", "sampler.S=null", "sampler.nfe=3,4", "output_dir=out")
    outcome = run("evaluate", "-m", *OPTIONS, f"checkpoint={checkpoint}", *nfe)
    assert (outcome.code, outcome.err) == (0, "")
    why = "sampler: nfe=4 is not possible with rule=heun and spacing=linear, whose 2 steps take 3 evaluations;"
    assert f"plan: not possible: Heun NFE=4 linear: {why}" in outcome.out
    table = (tmp_path / "out" / "table.md").read_text()
    assert re.search(r"\| NFE \| 3 \| 4 \|\n.*\n\| η=0.0 \| \S+ \| \*\*\S+ \|\n\| Heun \| \S+ \|  \|\n", table)
    assert f"\n**Not possible**\n\n- Heun NFE=4 linear: {why}" in table
    assert sorted(job["state"] for job in jobs(tmp_path / "out")) == ["done", "done", "done", "impossible"]
    assert all(text in (tmp_path / "out" / "report.html").read_text() for text in ("Not possible", why, "0 failed"))
    single = run("evaluate", *OPTIONS, f"checkpoint={checkpoint}", "sampler=heun", *nfe[1:2], "sampler.nfe=4", nfe[-1])
    assert (single.code, single.err) == (2, f"error: {why} choose another nfe, rule or spacing.\n")


def test_a_sweep_runs_without_a_plan_if_hydra_changes(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("evaluate", "--help")  # imports what the script needs before it plans, whichever test comes first
    monkeypatch.setitem(sys.modules, "hydra.core.override_parser.overrides_parser", None)
    outcome = run("evaluate", "-m", *OPTIONS, f"checkpoint={checkpoint}", "sampler.S=2", "output_dir=out")
    assert (outcome.code, outcome.err) == (0, "")
    assert "plan: " not in outcome.out
    assert (tmp_path / "out" / "table.md").exists()


def test_presets_can_be_swept_by_a_pattern(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("-m", *OPTIONS, f"checkpoint={checkpoint}", "sampler=glob(ddim_eta*)", "sampler.S=2", "output_dir=out")
    outcome = run("evaluate", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    assert "plan: 2 jobs, 480 network evaluations" in outcome.out
    assert sorted(job["title"] for job in jobs(tmp_path / "out")) == ["η=0.2 S=2 linear", "η=0.5 S=2 linear"]


def test_failures_are_listed_also_without_a_plan(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    arguments = (
        "-m",
        *OPTIONS,
        f"checkpoint={checkpoint}",
        "sampler.S=2,2000",
        "output_dir=out",
        "name=j${hydra:job.num}",
    )
    outcome = run("evaluate", *arguments)
    assert outcome.code == 2
    assert "plan: " not in outcome.out
    assert outcome.out.splitlines()[-1] == f"failed: η=0.0 S=2000 linear: {NOT_POSSIBLE}"


def test_a_single_mistake_leaves_the_report_of_a_folder(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    options = (*OPTIONS, "sampler.S=2", "output_dir=out")
    assert run("evaluate", *options, f"checkpoint={checkpoint}").code == 0
    outcome = run("evaluate", *options, "checkpoint=nowhere.ckpt")
    assert outcome.code == 2
    assert "failed: " not in outcome.out
    assert "0 failed" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("flags", [(), ("-m",)])
@pytest.mark.parametrize("typo", ["checkpoint=nowhere.ckpt", "checkpoint=."])
def test_a_mistyped_path_changes_nothing_in_a_folder(
    run: Run, sweep: tuple[Any, Path], tmp_path: Path, typo: str, flags: tuple[str, ...]
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(sweep[1], folder, ignore=shutil.ignore_patterns("hydra", "*.lock"))

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".html", ".json", ".md")}

    before = content()
    outcome = run("evaluate", *flags, *OPTIONS, "sampler.S=4", "output_dir=out", typo)
    assert outcome.code == 2
    assert content() == before
    assert outcome.out.count("failed: η=0.0 S=4 linear: ") == len(flags)  # a single evaluation only ends with the error


@pytest.mark.parametrize("name", ["manifest.json", "records.jsonl"])
@pytest.mark.parametrize("damage", [b"5\n", b"{}\n", None], ids=["5", "{}", "fifo"])
def test_a_damaged_file_of_a_sweep_is_one_sentence(
    run: Run, checkpoint: Path, tmp_path: Path, name: str, damage: bytes | None
) -> None:
    (tmp_path / "out").mkdir()
    if damage is None:
        os.mkfifo(tmp_path / "out" / name)
    else:
        (tmp_path / "out" / name).write_bytes(damage)
    for flags in ((), ("-m",)):
        outcome = run("evaluate", *flags, *OPTIONS, f"checkpoint={checkpoint}", "sampler.S=2", "output_dir=out")
        assert outcome.code == 2
        assert re.fullmatch(r"error: [^\n]*(is damaged|is a fifo)[^\n]*\n", outcome.err)


def test_the_session_is_that_of_the_processes_of_a_job(
    run: Run, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    """A launcher copies the sweep to processes that were started together, as by submitit with several tasks."""
    import _sweep

    before = _sweep.current_session()
    assert _sweep.current_session() is before
    monkeypatch.setattr("ddim.distributed.join_process_group", lambda: Processes(1, 2, 1))
    assert _sweep.current_session().processes == Processes(1, 2, 1)
    monkeypatch.undo()
    assert _sweep.current_session().processes == before.processes


def test_a_sweep_that_only_its_jobs_can_resolve_has_no_plan(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    names = ("sampler.S=2,3", "name=job${hydra:job.num}")
    outcome = run("evaluate", "-m", *OPTIONS, f"checkpoint={checkpoint}", *names, "output_dir=o")
    assert (outcome.code, outcome.err) == (0, "")
    assert "plan: " not in outcome.out
    lines = (tmp_path / "o" / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["config"]["name"] for line in lines] == ["job0", "job1"]


def test_a_full_disk_is_one_line_and_keeps_finished_shards(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(range(3))

    def write(path: Path, *rest: Any) -> None:
        if "unfinished" in path.parts and next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_safetensors(path, *rest)

    arguments = ("-m", *OPTIONS, f"checkpoint={checkpoint}", "sampler.S=2", "output_dir=out")
    with monkeypatch.context() as patch:
        patch.setattr("ddim.evaluation.shards.write_safetensors", write)
        outcome = run("evaluate", *arguments)
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert re.fullmatch(r"error: cannot write to \S+safetensors \(No space left on device\); make room.\n", outcome.err)
    assert outcome.out.splitlines()[-1].startswith("failed: η=0.0 S=2 linear: cannot write to")
    assert len(shards(tmp_path / "out")) == 3
    again = run("evaluate", *arguments)
    assert again.code == 0, again.err
    assert "plan: done: 0 jobs, and 1 in part; 198 network evaluations are left" in again.out  # 120 - 3 x 7 images
    assert "failed" not in again.out


def test_ctrl_c_prints_one_word_and_the_command_resumes(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: Path, *rest: Any) -> None:
        write_safetensors(path, *rest)
        if "unfinished" in path.parts:
            raise KeyboardInterrupt

    arguments = ("-m", *OPTIONS, f"checkpoint={checkpoint}", "sampler.S=2,3", "output_dir=out")
    with monkeypatch.context() as patch:
        patch.setattr("ddim.evaluation.shards.write_safetensors", interrupt)
        outcome = run("evaluate", *arguments)
    assert (outcome.code, outcome.err) == (130, "stopped.\n")
    assert len(shards(tmp_path / "out")) == 1  # and the second evaluation was not begun
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


@pytest.mark.parametrize("words", [("sampler.S=2",), ("-m", "sampler.S=2,2000")])
def test_a_dry_run_reports_the_cost_and_records_nothing(run: Run, checkpoint: Path, tmp_path: Path, words: Any) -> None:
    options = ("data=digits", "metric=digits_classifier", "n=20", "compute.device=cpu", "output_dir=out")
    outcome = run("evaluate", *words, f"checkpoint={checkpoint}", *options, "dry_run=true")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == "plan: 1 job, 40 network evaluations of one image"
    assert [line.split()[1] for line in lines[len(words) :]] == ["expected:", "operations:", "disk:", "not", "nothing"]
    assert [path.name for path in (tmp_path / "out").glob("*")] == ["hydra"] * (
        len(words) == 1
    )  # of a sweep not even that
    if len(words) == 1:
        outcome = run("evaluate", f"checkpoint={checkpoint}", *options, "sampler.S=2000", "dry_run=true")
        assert (outcome.code, outcome.out) == (2, "")
