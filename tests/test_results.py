"""The numbers of the documents come from records, and the records show what the documents claim."""

import re
import runpy
import statistics
from pathlib import Path

import pytest

from ddim.results.records import RecordFile
from ddim.results.report import build_tables
from ddim.results.table import number_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "tools" / "update_results.py"))


def test_every_record_file_is_in_a_document():
    names = {block[2] for path in SCRIPT["DOCUMENTS"] for block in SCRIPT["BLOCK"].finditer(path.read_text())}
    assert names == {path.stem for path in RESULTS.glob("*.jsonl")}


def test_the_ledger_names_every_record_and_picture():
    named = set(re.findall(r"`(\w+\.(?:jsonl|png|txt))`", (RESULTS / "README.md").read_text()))
    pictures = (ROOT / "docs" / "images").glob("*.png")
    assert named == {path.name for path in [*RESULTS.glob("*.*"), *pictures]} - {"README.md"}


@pytest.mark.parametrize("path", SCRIPT["DOCUMENTS"], ids=lambda path: path.name)
def test_the_tables_are_those_of_the_records(path):
    text = path.read_text()
    assert SCRIPT["fill"](text) == text
    for block in SCRIPT["BLOCK"].finditer(text):
        row = [line for line in block[0].splitlines() if line.startswith("| ")][-1]
        typed = text.replace(row, row.replace("| ", "| 9", 2))
        assert typed != text
        assert SCRIPT["fill"](typed) == text  # a typed number does not survive


def test_a_lightning_step_costs_what_a_plain_loop_does():
    records = [r for r in RecordFile(RESULTS / "training_speed.jsonl").read() if r["variant"] == "Lightning"]
    assert records
    for record in records:
        assert record["base"] == "plain loop"
        ratio = statistics.median(a / b for a, b in zip(record["seconds"], record["base_seconds"], strict=True))
        assert ratio <= 1.03
        assert f"| {ratio:.3f} |" in SCRIPT["BENCHMARK_TABLES"]([record])


def test_the_digits_show_the_papers_pattern():
    (table,) = build_tables(RecordFile(RESULTS / "digits.jsonl").read())
    assert table.columns == [5, 10, 20, 50]
    value = {(row, S): table.value(row, S) for row in table.rows for S in table.columns}
    for row in table.rows:
        distances = [value[row, S] for S in table.columns]
        assert distances == sorted(distances, reverse=True)
    for S in (5, 10, 20):
        assert value["σ̂", S] > 2 * max(value[row, S] for row in table.rows if row != "σ̂")
    for S in (5, 10):
        assert value["η=0.0", S] < value["η=1.0", S]


def test_bfloat16_moves_a_distance_as_the_page_says():
    """The same x_T and noise, so the difference is that of the precision, beside other processors and loops."""
    page = (ROOT / "docs" / "performance.md").read_text().split("\n## Precision")[1].split("\n## ")[0]
    exact, bf16 = (build_tables(RecordFile(RESULTS / f"cifar10_small{name}.jsonl").read())[0] for name in ("", "_bf16"))
    assert len(bf16.rows) == 2
    moved = [bf16.value(row, 10) / exact.value(row, 10) - 1 for row in bf16.rows]
    assert " and\n".join(f"{exact.value(row, 10):.2f}" for row in bf16.rows) in page
    assert f"by {100 * moved[0]:.1f} and {100 * moved[1]:.1f} %, within its error of 2 %" in page
    for record in RecordFile(RESULTS / "cifar10_small_bf16.jsonl").read():
        low, high = record["intervals"]["fd_efficientnet_5k"]
        assert (high - low) / (high + low) == pytest.approx(0.02, abs=0.005)
    assert f"{100 * moved[0]:.1f} % of an FID\nof 13.36 is {13.36 * moved[0]:.1f}" in page


def test_what_is_typed_of_the_gpu_is_in_its_log():
    log = (RESULTS / "gpu_h200.txt").read_text()
    page, performance = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("cifar10", "performance"))
    section = page.split("## The paper's network, for minutes")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")]
    typed = {(row, S): value for row, *values in rows[1:] for S, value in zip(rows[0][1:], values, strict=True)}
    logged = re.findall(r"^(\S+ \(clip x0\)) S=(\d+) quad: fd_efficientnet_5k ([\d.]+) ", log, re.MULTILINE)
    assert typed == {(row, S): value for row, S, value in logged}
    assert min(typed, key=lambda key: float(typed[key])) == ("η=0.5 (clip x0)", "20")
    small = build_tables(RecordFile(RESULTS / "cifar10_small.jsonl").read())[0]
    for S in ("10", "20"):
        rows_by_distance = sorted({row for row, _ in typed}, key=lambda row: float(typed[row, S]))
        assert rows_by_distance == sorted(small.rows, key=lambda row: small.value(row, int(S)))
    assert all(float(value) < small.value(row, int(S)) for (row, S), value in typed.items())
    section = performance.split("## On an H200")[1].split("\n## ")[0]
    passed = re.findall(r"^passed  (\S+)", log, re.MULTILINE)
    assert f"{len(passed)} of the tests marked `gpu` ran, and passed" in section
    assert "failure" not in log
    for number in re.findall(r"\d\.\de-\d", section):
        assert f"{float(number):.2g}" in re.findall(r"[\d.]+(?:e-\d+)?", log)
    first, last = (re.search(rf"^(\S+) step {step} of 1000000", log, re.MULTILINE) for step in (100, 2900))
    assert first
    assert last
    (h0, m0, s0), (h1, m1, s1) = (map(int, match[1].split(":")) for match in (first, last))
    seconds = 3600 * (h1 - h0) + 60 * (m1 - m0) + s1 - s0
    assert seconds == pytest.approx(201, abs=1)
    assert f"{2800 / seconds:.1f} steps/s, {round(2800 * 256 / seconds, -1):,.0f} images/s" in section
    times = [float(x) for x in re.findall(r"S=20 quad: .* \((\d\.\d) s sampling", log)]
    median = statistics.median(times)
    assert f"S = 20 in {median} s, {round(5000 * 20 / median, -2):,.0f} network evaluations/s" in section
    on_device = float(re.search(r"Self CUDA time total: ([\d.]+)ms", log)[1])
    assert f"computed for {on_device / 10:.0f} ms" in section
    (beside,) = RecordFile(RESULTS / "evaluation_beside_gpu.jsonl").read()
    on_gpu = float(re.search(r"^\| η=1.0 .* \| (.*) \|$", log, re.MULTILINE)[1])
    on_cpu = beside["metrics"]["fd_efficientnet_2500"]
    assert f"Fréchet distance of {on_gpu} there" in section
    assert f"They are {on_cpu / on_gpu - 1:.1%} apart".replace("%", " %") in section
    copies = re.search(r"aten::copy_ \| \S+ \| ([\d.]+)%", log)[1]
    assert f"a quarter are the convolutions' gradients and {float(copies):.0f} %" in section


def test_the_least_random_multinomial_sampler_gains_from_steps():
    (table,) = build_tables(RecordFile(RESULTS / "digits_multinomial.jsonl").read())
    assert table.columns == [5, 10, 20, 50, 100]
    least, most = ([table.value(f"σ={f} σ_max", S) for S in table.columns] for f in (1.0, 0.0))
    assert least == sorted(least, reverse=True)
    assert least[-1] < most[-1]


def test_inversions_are_ordered():
    (table,) = build_tables(RecordFile(RESULTS / "inversion_digits.jsonl").read())
    *others, exact = ([table.value(row, S) for S in table.columns] for row in table.rows)
    assert len(others) == 3
    assert max(exact) < 1e-10
    for errors in others:
        assert errors == sorted(errors, reverse=True)
    paper, diffusers, fixed_point = others
    assert all(error < min(two) for error, *two in zip(fixed_point, paper, diffusers, strict=True))


def test_guidance_gains_accuracy_and_a_small_w_is_closest():
    records = RecordFile(RESULTS / "digits_guidance.jsonl").read()
    tables = {table.metric.split("_digits")[0]: table for table in build_tables(records)}
    assert tables["fd"].column == "NFE"
    weights = (-1.0, 0.0, 0.1, 0.25, 0.5, 1.0)
    for S in (5, 10, 20):
        entries = [(f"η=0.0, w={w:g}", S if w in (0, -1) else 2 * S) for w in weights]
        of = {name: [table.value(*entry) for entry in entries] for name, table in tables.items()}
        assert of["accuracy"] == sorted(of["accuracy"])
        for name in ("fd", "intra_fd"):
            assert min(of[name]) == of[name][2]


def test_records_name_no_absolute_path():
    for path in RESULTS.glob("*.jsonl"):
        for record in RecordFile(path).read():
            assert not record["revision"].endswith("+changes")
            config = record.get("config", {})
            paths = [config.get("checkpoint"), config.get("output_dir"), config.get("data", {}).get("root")]
            for name in filter(None, [*paths, record.get("checkpoint")]):
                assert not Path(name).is_absolute()


def test_a_missing_sweep_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["update_results.py", f"digits={tmp_path}"])
    with pytest.raises(SystemExit, match=r"error: there are no records .*records\.jsonl"):
        SCRIPT["main"]()


def test_a_table_without_records_is_an_error():
    with pytest.raises(SystemExit, match=r"error: there are no records docs/results/nothing\.jsonl"):
        SCRIPT["render"]("nothing")


def test_a_training_has_a_table_and_its_stops():
    curves = {"train/loss": [[s, 1 / s] for s in range(1, 101)], "val/loss": [[s, 2 / s] for s in (50, 100)]}
    text = SCRIPT["training_table"]({"training": "mine", "curves": curves, "stops": [30, 1060]})
    steps = (1, 11, 21, 31, 41, 50, 51, 61, 71, 81, 91, 100)
    assert text.splitlines()[:4] == [
        f"| step | {' | '.join(map(str, steps))} |",
        f"| --- |{' --- |' * 12}",
        f"| train/loss | {' | '.join(number_text(1 / s) for s in steps)} |",
        "| val/loss |  |  |  |  |  | 0.0400 |  |  |  |  |  | 0.0200 |",
    ]
    assert text.endswith("<sub>mine; steps at which it was stopped and went on later: 30, 1,060</sub>")
