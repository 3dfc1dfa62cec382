"""The files of a report contain the numbers, and nothing that differs between two runs of the same evaluations."""

import copy
import csv
import io
import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from made_records import FID, RECORDS, compared, record

from ddim.diffusion.labels import LABELS, row_label
from ddim.diffusion.spec import SamplerSpec
from ddim.results import text
from ddim.results.escape import LATEX, escape_csv, escape_markdown
from ddim.results.html import render_page
from ddim.results.protocol import completed
from ddim.results.records import Record
from ddim.results.report import build_tables, sigma_hat_variants, write_report

TABLES = ("table.md", "table.csv", "table.json", "table.tex")
COMPARED = [
    *compared(("η=0.0", 10, 13.45678901), ("η=0.0", 20, 6.84), ("σ̂", 10, 300.0)),
    record("η=0.0", 10, 13.0, paper="table1_cifar10", first=50_000),
    record("σ̂", 10, 200.0, "uniform", paper="table1_cifar10"),
]
HOSTILE = r"50%_of & {set}#1$ ~^\ <b>|ü中"


def files(records: list[Record]) -> list[str]:
    tables = [*build_tables(records), *sigma_hat_variants(records)]
    return [write(tables) for write in (text.markdown, text.as_csv, text.as_json, text.latex)]


def test_csv_reads_back() -> None:
    tables = [*build_tables(COMPARED), *sigma_hat_variants(COMPARED)]
    rows = list(csv.DictReader(io.StringIO(text.as_csv(tables))))
    entries = [(number, row, S) for number, t in enumerate(tables) for row, S in t.entries]
    assert sorted((int(r["table"]), r["sampler"], int(r["S"])) for r in rows) == sorted(entries)
    first = next(r for r in rows if r["sampler"] == "η=0.0" and r["S"] == "10")
    assert first == {
        "table": "0",
        "metric": FID,
        "sampler": "η=0.0",
        "S": "10",
        "value": "13.2284",  # six digits of the mean of 13.45678901 and 13.0
        "std": "0.322999",  # their difference / √2
        "ranges": "2",
        "paper": "13.36",
        "difference": "-0.1316",
        "percent": "-0.98503",
        "n": "50000",
        "spacing": "quad",
        "distinct_evaluations": "10",
        "key": "η=0.010quad0 η=0.010quad50000",
    }
    plain = list(csv.DictReader(io.StringIO(text.as_csv(build_tables(RECORDS)))))
    assert {(r["sampler"], int(r["S"]), float(r["value"])) for r in plain} == {
        (r["label"], r["S"], r["metrics"][FID]) for r in RECORDS
    }
    assert {r["key"] for r in plain} == {r["key"] for r in RECORDS}
    assert {r["paper"] + r["std"] for r in plain} == {""}


def test_json_reads_back() -> None:
    tables = build_tables(COMPARED)
    content = json.loads(text.as_json(tables))
    assert [t["metric"] for t in content] == [FID, FID]
    quad = content[[t["protocol"]["spacing"] for t in content].index("quad")]
    table = tables[content.index(quad)]
    assert quad["protocol"] == table.protocol
    assert quad["title"] == table.title()
    assert quad["columns"] == [10, 20]
    assert quad["rows"] == {"η=0.0": [13.2284, 6.84], "σ̂": [300.0, None]}
    assert quad["std"] == {"η=0.0": [0.322999, None], "σ̂": [None, None]}
    assert quad["ranges"] == {"η=0.0": [2, 1], "σ̂": [1, 0]}
    assert quad["paper"] == {"η=0.0": [13.36, 6.84], "σ̂": [367.43, 133.37]}
    assert quad["difference"] == {"η=0.0": [-0.1316, 0.0], "σ̂": [-67.43, None]}
    assert quad["tau"] == {"quad": {"10": list(range(1, 1001, 100)), "20": list(range(1, 1001, 50))}}
    assert quad["clip"] == {"η=0.0": ["none"], "σ̂": ["none"]}
    assert quad["first"] == [0, 50_000]
    assert quad["revisions"] == ["65555dbe4f565bf0b97737c8a5ca57ab3ba9f7be"]
    [mixed] = json.loads(text.as_json(build_tables([record("η=0.0", 10, 1.0, other_revisions=["9" * 40])])))
    assert mixed["revisions"] == ["65555dbe4f565bf0b97737c8a5ca57ab3ba9f7be", "9" * 40]
    hostile = record("η=0.0", 10, 1.0, reference__name='a [1,\\n  2] "b]')
    [back] = json.loads(text.as_json(build_tables([hostile])))
    assert back["protocol"]["reference"]["name"] == hostile["reference"]["name"]


def test_rows_of_other_times_are_named_beside_them() -> None:
    made = [
        record(label, S, 1.0, "mine", sampler__tau=tau)
        for label, S, tau in (
            ("A", 2, [1, 500]),
            ("B", 2, [1, 700.25]),
            ("C", 2, [1, 500]),
            ("A", 1, [9]),
            ("B", 1, [9]),
        )
    ]
    tables = build_tables(made)
    [content] = json.loads(text.as_json(tables))
    assert content["tau"] == {"mine": {"1": [9], "2 (A, C)": [1, 500], "2 (B)": [1, 700.25]}}
    assert "- τ: mine: S=1: 9; S=2 (A, C): 1, 500; S=2 (B): 1, 700.2\n" in text.markdown(tables)


def test_markdown_has_title_comparison_and_protocol() -> None:
    tables = [*build_tables(COMPARED), *sigma_hat_variants(COMPARED)]
    shown = text.markdown(tables)
    for table in tables:
        assert f"**{table.title()}**\n\n{table.markdown()}\n\n{table.note}\n\n- metric: fid_50k (less" in shown
        for name, value in table.describe_protocol(full=False):
            assert f"- {name}: {value}\n" in shown
    assert "### σ̂: two variants against the paper\n\n**fid_50k: " in shown
    [table] = build_tables([record("a|b", 10, 1.0)])
    assert r"| a\|b | 1.00 |" in table.markdown()


def test_tables_are_reproducible_to_the_byte() -> None:
    """In any order, and for a run with other seconds, paths, devices, versions and last bits of the numbers."""
    expected = files([*RECORDS, *COMPARED])
    again: list[Record] = copy.deepcopy([*RECORDS, *COMPARED])
    random.Random(1).shuffle(again)
    for number, other in enumerate(again):
        other |= {
            "seconds_sampling": 77.7,
            "seconds_metrics": 8.8,
            "grid": f"grids/{number}.png",
            "network_evaluations": 5,
        }
        other |= {"compute": {"device": "another", "processes": 64, "batch_size": 7}, "versions": {"torch": "9"}}
        other["config"] = {"name": "other", "output_dir": "/elsewhere", "checkpoint": "/elsewhere/x"}
        other["metrics"] = {name: value * (1 + 1e-13) for name, value in other["metrics"].items()}
    assert files(again) == expected
    assert not re.search(r"somewhere|seconds|made|device|2\.15\.0", "".join(expected))


def test_seconds_have_their_own_file() -> None:
    records = [
        record("η=0.0", 10, 1.0, n=1000, compute={"device": "NVIDIA H200", "processes": 2, "batch_size": 250}),
        record("η=0.0", 20, 1.0, n=1000),
    ]
    known, older = csv.DictReader(io.StringIO(text.timing_csv([completed(r) for r in reversed(records)])))
    assert (known["seconds_sampling"], known["seconds_per_image"], known["seconds_metrics"]) == ("15", "0.015", "2")
    assert (known["device"], known["processes"], known["batch_size"]) == ("NVIDIA H200", "2", "250")
    assert (older["S"], older["seconds_per_image"], older["device"]) == ("20", "0.03", "")


def balanced(text: str) -> bool:
    """Whether braces and environments of LaTeX are balanced; escaped braces are letters."""
    depth, open_environments = 0, []
    for match in re.finditer(r"\\(begin|end)\{(\w+)\}|\\.|[{}]", text):
        if match[1] == "begin":
            open_environments.append(match[2])
        elif match[1] == "end":
            if not open_environments or open_environments.pop() != match[2]:
                return False
        elif match[0] in "{}":
            depth += 1 if match[0] == "{" else -1
            if depth < 0:
                return False
    return depth == 0 and not open_environments


def test_latex_has_every_line_and_is_balanced() -> None:
    tables = [*build_tables(COMPARED), *sigma_hat_variants(COMPARED)]
    shown = text.latex(tables)
    assert balanced(shown)
    assert not balanced(shown.replace(r"\end{table}", "", 1))
    assert shown.isascii()
    assert shown.count(r"\begin{table}") == len(tables) == 3
    body = shown[shown.index(r"\midrule") : shown.index(r"\bottomrule")]
    assert body.splitlines()[1:6] == [
        r"$\eta$=0.0 & 13.23 $\pm$ 0.32 & 6.84 (of 1) \\",
        r"\quad paper & 13.36 & 6.84 \\",
        r"\quad difference & $-$0.13 & 0.00 \\",
        r" & ($-$1.0 \%) & (same) \\",
        r"\addlinespace",
    ]


def test_a_table_body_is_the_tabular_with_the_best_bold() -> None:
    [table] = build_tables(compared(("η=0.0", 10, 13.0), ("η=1.0", 10, 41.0), ("η=0.0", 20, 8.0), ("η=1.0", 20, 7.0)))
    body, shown = text.latex_body(table), text.latex([table])
    assert body.splitlines()[0] == r"\begin{tabular}{lrr}"
    assert body.splitlines()[-1] == r"\end{tabular}"
    assert [line for line in body.splitlines() if line.startswith(r"$\eta$")] == [
        r"$\eta$=0.0 & \textbf{13.00} & 8.00 \\",
        r"$\eta$=1.0 & 41.00 & \textbf{7.00} \\",
    ]
    assert re.sub(r"\\textbf\{(.*?)\}", r"\1", body) in shown
    [alone] = build_tables([record("η=0.0", 10, 13.0)])
    assert "textbf" not in text.latex_body(alone)


def test_latex_has_every_name_of_a_sampler() -> None:
    built = ["analytic", "learned_variance", "multinomial"]  # from a file, or by a network of its own
    specs = [SamplerSpec(rule, S=9, eta=0.0 if rule == "ddim" else None) for rule in LABELS if rule not in built]
    specs.append(SamplerSpec("deis", S=9, eta=None, kwargs={"variable": "log_rho"}))
    for label in map(row_label, specs):
        assert "[U+" not in text.escape_latex(label), label
    assert text.escape_latex("Euler in σ̄² (log ρ)") == r"Euler in $\bar\sigma^2$ (log $\rho$)"


def test_latex_escapes_every_character() -> None:
    assert text.escape_latex("σ̂ η=0.5 τ -0.3 +4 v3-compat 2020-10") == (
        r"$\hat\sigma$ $\eta$=0.5 $\tau$ $-$0.3 $+$4 v3-compat 2020-10"
    )
    assert text.escape_latex(HOSTILE) == (
        r"50\%\_of \& \{set\}\#1\$ \textasciitilde{}\textasciicircum{}\textbackslash{} "
        r"\textless{}b\textgreater{}\textbar{}[U+00FC][U+4E2D]"
    )


FROM_OUTSIDE = [
    "<script>alert(1)</script>",
    "</b> <img src=x>",
    "a](javascript:x) [b](http://a.b)",
    "**x** `y` _z_ ~~w~~",
    "a | b",
    "line\n# heading\r\n\x1b[31m \ud800",
    "=cmd|' /C calc'!A0",
    "+1+cmd",
    "-2+3",
    "@SUM(A1)",
    "[2cm] x",
    r"\input{/etc/passwd} % $x$ & # {",
    "&lt;b&gt; &amp;",
]


def written(kind: str, outside: str, folder: Path) -> str:
    """Return a table of records with this text wherever text can come from outside."""
    changes: dict[str, Any] = {
        **{"reference__name": outside, "model__schedule": outside, "sampler__clip": outside, "trained_on": outside},
        **{"metric__extractor": outside, "revision": outside, "paper": outside, "config": {"name": outside}},
        **{"compute": {"device": outside}, "metrics": {outside: 1.0}, "versions": {outside: outside}},
    }
    records = [record(outside, S, 1.0, outside, **changes) for S in (10, 20)]
    tables = build_tables(records)
    if kind == "html":
        page = render_page([], [], records, folder, outside, [(outside, outside)])
        return page[page.index("</style>") :]
    if kind == "timing":
        return text.timing_csv([completed(r) for r in records])
    return {"md": text.markdown, "csv": text.as_csv, "json": text.as_json, "tex": text.latex}[kind](tables)


@pytest.mark.parametrize("outside", FROM_OUTSIDE)
@pytest.mark.parametrize("kind", ["md", "csv", "timing", "tex", "html", "json"])
def test_text_from_outside_is_only_text(kind: str, outside: str, tmp_path: Path) -> None:
    shown, plain = written(kind, outside, tmp_path), written(kind, "plain", tmp_path)
    if kind == "md":
        assert len(shown.splitlines()) == len(plain.splitlines())
        assert not re.search(
            r"<[A-Za-z/!?]|&(?=[#\w])(?!amp;|lt;)|(?<!\\)\][(\[:]|(?<!\\)`|[\x00-\x09\x0b-\x1f]", shown
        )
        assert re.findall(r"(?<!\\)\*", shown) == ["*"] * 4  # of the title
        cells = [re.split(r"(?<!\\)\|", line) for line in shown.splitlines() if line.startswith("|")]
        assert {len(line) for line in cells} == {5}
    elif kind in ("csv", "timing"):
        rows = list(csv.DictReader(io.StringIO(shown, newline="")))
        assert not [value for row in rows for value in row.values() if re.match(r"[=+@\t\r]|-(?![\d.]+$)", value)]
        assert {row["sampler"] for row in rows} == {"'" * (outside[0] in "=+-@") + outside}
    elif kind == "tex":
        assert balanced(shown)
        commands = r"\\[A-Za-z]+"
        allowed = {r"\hat", *(piece.rstrip("{}") for piece in LATEX.values())} | set(re.findall(commands, plain))
        assert set(re.findall(commands, shown)) <= allowed
        assert not re.search(r"\\\\\s*[\[*]|space\s*[\[*]|[^ -~\n]", shown)
    elif kind == "html":
        assert re.findall(r"</?\w+", shown) == re.findall(r"</?\w+", plain)
    else:
        assert json.loads(shown)[0]["protocol"]["reference"]["name"] == outside


def test_legends_and_numbers_are_not_escaped() -> None:
    """Formulas of the paper's notes, and negative numbers."""
    for plain in (
        "ends at alpha_bar[1]",
        "quadratic for S < T (section D.2)",
        "σ̂ (clip x0_and_eps)",
        "fid_50k",
        "a & b",
    ):
        assert escape_markdown(plain) == plain
    for plain in ("-0.1316", "-2e-05", "η=0.0", -3, 2.5, ""):
        assert escape_csv(plain) == plain


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no LaTeX here")
def test_latex_compiles_and_fits_a_page(tmp_path: Path) -> None:
    columns: dict[str, Any] = {"paper": "table1_cifar10"}
    records = [record("η=0.0", S, 100.0 + S, **columns) for S in (10, 20, 50, 100)]
    records += [record("η=0.0", 1000, 4.0, "full", **columns), record("η=0.0", 10, 1.0, reference__name=HOSTILE)]
    (tmp_path / "table.tex").write_text(text.latex(build_tables([*COMPARED, *records])))
    (tmp_path / "page.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\\input{table}\\end{document}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "Overfull" not in done.stdout


def test_report_without_records(tmp_path: Path) -> None:
    names = [path.name for path in write_report([], tmp_path / "new")]
    assert names == [*TABLES, "timing.csv", "report.html"]
    assert json.loads((tmp_path / "new" / "table.json").read_text()) == []
    assert (tmp_path / "new" / "table.md").read_text() == "There are no records.\n"


def test_a_report_leaves_no_plots_of_earlier_tables(tmp_path: Path) -> None:
    """And a table keeps its name where another metric joins."""
    made = record("η=0.0", 10, 1.0)
    write_report([made], tmp_path)
    own = {"plot_mine.png", "plot_fid_50k_old.pdf", "table_body.txt", "plot_fid_50k.tex", "table_body_fid_50k.pdf"}
    for name in (
        *own,
        "plot_fid_50k_7.pdf",
        "plot_time_3.png",
        "table_body_fid_50k_1.tex",
    ):  # the others of earlier reports
        (tmp_path / name).write_text("")
    before = (tmp_path / "table_body_fid_50k.tex").read_text()
    metrics = {"a_50k": 2.0, FID: 1.0}
    paths = write_report([made | {"metrics": metrics}], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == own | {path.name for path in paths}
    assert {"table_body_a_50k.tex", "table_body_fid_50k.tex", "plot_a_50k.png"} <= {path.name for path in paths}
    assert (tmp_path / "table_body_fid_50k.tex").read_text() == before


def test_paths_are_the_files_written(tmp_path: Path) -> None:
    records = [*RECORDS, record("η=0.0", 10, 5.5, "linear")]
    paths = write_report(records, tmp_path)
    plots = [f"plot_fid_50k{number}.{kind}" for number in ("", "_1") for kind in ("png", "pdf")]
    bodies = ["table_body_fid_50k.tex", "table_body_fid_50k_1.tex"]
    assert [path.name for path in paths] == [*TABLES, *bodies, "timing.csv", *plots, "report.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
