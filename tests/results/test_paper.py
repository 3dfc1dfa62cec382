"""The paper's numbers are right, and are compared only with measured ones of the same kind."""

import re
from pathlib import Path

import pytest
from made_records import FID, compared, record

from ddim.results.paper import PAPER_TABLES, comparison, times_warning
from ddim.results.protocol import is_distance
from ddim.results.report import build_tables
from ddim.results.table import Table

EXPERIMENTS = Path(__file__).parents[2] / "configs" / "experiment"
ROWS = {"eta 0.0": "η=0.0", "eta 0.2": "η=0.2", "eta 0.5": "η=0.5", "eta 1.0": "η=1.0", "sigma": "σ̂"}


@pytest.mark.parametrize("name", ["table1_cifar10", "table1_celeba"])
def test_numbers_equal_experiment_headers(name: str) -> None:
    """The headers were typed independently of the data, so each checks the other."""
    header = (EXPERIMENTS / f"{name}.yaml").read_text()
    match = re.search(r"^#   S +(.*)$", header, re.MULTILINE)
    assert match is not None
    columns = [int(S) for S in match[1].split()]
    typed = {
        row: dict(zip(columns, map(float, numbers[1].split()), strict=True))
        for text, row in ROWS.items()
        if (numbers := re.search(rf"^#   {text} +([\d. ]+)$", header, re.MULTILINE))
    }
    assert typed == PAPER_TABLES[name].values


def test_numbers_equal_headers_of_other_experiments() -> None:
    variants = (EXPERIMENTS / "table1_cifar10_sigma_hat.yaml").read_text()
    [line] = re.findall(r"for S = 10, 20, 50, 100: ([\d., ]+)\.", variants)
    row = PAPER_TABLES["table1_cifar10"].values["σ̂"]
    assert list(map(float, line.split(","))) == [row[S] for S in (10, 20, 50, 100)]
    table2 = (EXPERIMENTS / "table2_reconstruction.yaml").read_text()
    steps, errors = (re.search(rf"^#   {word} +([\d. ]+)$", table2, re.MULTILINE)[1].split() for word in ("S", "error"))
    assert (
        dict(zip(map(int, steps), map(float, errors), strict=True))
        in PAPER_TABLES["table2_reconstruction"].values.values()
    )
    for name in ("bedroom", "church"):
        match = re.search(r"at eta=0 is ([\d., ]+) for S = ([\d, ]+)\.", (EXPERIMENTS / f"{name}.yaml").read_text())
        assert match is not None
        numbers = dict(zip(map(int, match[2].split(",")), map(float, match[1].split(",")), strict=True))
        assert numbers == PAPER_TABLES[f"table3_{name}"].values["η=0.0"]


def test_numbers_agree_with_the_papers_text() -> None:
    """Statements of section 5 and of the captions; they catch a mistyped digit."""
    for name in ("table1_cifar10", "table1_celeba"):
        values = PAPER_TABLES[name].values
        for S in (10, 20, 50, 100):  # "DDIM achieves the best sample quality when dim(τ) is small"; η orders the rest
            numbers = [row[S] for row in values.values()]
            assert numbers == sorted(numbers)
        assert min(row[1000] for row in values.values()) == values["σ̂"][1000]
    for table in PAPER_TABLES.values():
        for row in table.values.values():
            assert list(row) == sorted(row)
            assert list(row.values()) == sorted(row.values(), reverse=True)  # falls with S, everywhere
            assert all(round(number, table.decimals) == number for number in row.values())
    celeba = PAPER_TABLES["table1_celeba"].values  # "100-step DDPM is similar to 20-step DDIM" on CelebA
    assert celeba["η=1.0"][100] == pytest.approx(celeba["η=0.0"][20], rel=0.02)
    church = PAPER_TABLES["table3_church"].values
    assert church["η=1.0"][100] < church["η=0.0"][100]
    bedroom = PAPER_TABLES["table3_bedroom"].values
    assert [bedroom["η=1.0"][S] for S in (10, 20, 50, 100)] == [42.78, 22.77, 10.81, 6.81]
    assert [church["η=1.0"][S] for S in (10, 20, 50, 100)] == [51.56, 23.37, 11.16, 8.27]
    errors = PAPER_TABLES["table2_reconstruction"].values["η=0.0"]
    assert errors == {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}


def test_numbers_of_solvers_are_the_quoted_ones() -> None:
    header = (EXPERIMENTS / "table_solvers_cifar10.yaml").read_text()
    [columns] = re.findall(r"^#   NFE .*$", header, re.MULTILINE)
    ends = {int(column[0]): column.end() for column in re.finditer(r"\d+", columns)}
    for row, values in PAPER_TABLES["solvers_cifar10"].values.items():
        name = next(name for name, label in (ROWS | {"tAB3": "tAB3-DEIS"}).items() if label == row)
        [line] = re.findall(rf"^#   {name} .*$", header, re.MULTILINE)
        assert {nfe: float(text) for nfe, end in ends.items() if (text := line[end - 7 : end].strip())} == values
    ours = PAPER_TABLES["table1_cifar10"].values
    for row in ("η=0.0", "η=1.0", "σ̂"):
        values = PAPER_TABLES["solvers_cifar10"].values[row]
        assert {S: values[S] for S in (10, 20, 50)} == {S: ours[row][S] for S in (10, 20, 50)}
    note = build_tables([record("tAB3-DEIS", 10, 7.0, paper="solvers_cifar10")])[0].note
    assert "[V2]" in note
    assert "arXiv" not in note


def table_of(*numbers: tuple[str, int, float]) -> Table:
    [table] = build_tables(compared(*numbers))
    return table


def test_lines_show_ours_paper_and_difference() -> None:
    table = table_of(("η=0.0", 10, 13.76), ("η=0.0", 30, 5.0), ("σ̂", 10, 330.687), ("η=0.3", 10, 14.5))
    assert (table.value("η=0.0", 10), table.paper_value("η=0.0", 10)) == (13.76, 13.36)
    assert table.difference("η=0.0", 10) == pytest.approx(0.4, rel=1e-6)
    assert table.percent("η=0.0", 10) == pytest.approx(100 * 0.4 / 13.36, rel=1e-5)
    assert table.percent("σ̂", 10) == pytest.approx(-10.0, rel=1e-5)
    lines = {line.name: line.texts for line in table.lines()}
    assert lines == {
        "η=0.0": ["13.76", "5.00"],
        "η=0.0, paper": ["13.36", ""],
        "η=0.0, difference": ["+0.40 (+3.0 %)", ""],
        "η=0.3": ["14.50", ""],  # the paper has no such row, and no S = 30
        "σ̂": ["330.69", ""],
        "σ̂, paper": ["367.43", ""],
        "σ̂, difference": ["-36.74 (-10.0 %)", ""],
    }
    assert "Table 1, CIFAR-10" in table.note


@pytest.mark.parametrize(
    ("measured", "verdict", "text"),
    [
        (13.36, "same", "0.00 (same)"),
        (13.3649, "same", "0.00 (same)"),
        (13.3551, "same", "0.00 (same)"),
        (13.366, "worse", "+0.01 (+0.0 %)"),
        (13.354, "better", "-0.01 (-0.0 %)"),
        (12.0, "better", "-1.36 (-10.2 %)"),
    ],
)
def test_verdict_uses_the_papers_last_digit(measured: float, verdict: str, text: str) -> None:
    table = table_of(("η=0.0", 10, measured))
    [_, _, difference] = table.lines()
    assert (difference.verdicts, difference.texts) == ([verdict], [text])


def test_the_mean_over_ranges_is_compared() -> None:
    records = [record("η=0.0", 10, v, paper="table1_cifar10", first=50_000 * k) for k, v in enumerate((13.0, 14.0))]
    [table] = build_tables(records)
    assert table.difference("η=0.0", 10) == pytest.approx(0.14, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"metrics": {"fd_digits_classifier_1k": 1.0}}, "fd_digits_classifier_1k is not fid_50k"),
        ({"metrics": {"fid_10k": 13.0}, "n": 10_000}, "fid_10k is not fid_50k"),
        ({"metrics": {"kid_50k": 0.1}}, "kid_50k is not fid_50k"),
        ({"n": 10_000}, "10000 images are not 50000"),
        ({"reference__name": "cifar10-test"}, "the reference set cifar10-test is not cifar10-train"),
        ({"sampler__last_time": 1}, "it ends at alpha_bar[1], the paper at alpha_bar[0] = 1"),
        ({"paper": "table9"}, "it has no table table9"),
        ({"paper": "table2_reconstruction"}, "fid_50k is not reconstruction_mse_10k"),
    ],
    ids=str,
)
def test_different_protocols_are_not_compared(changes: dict, reason: str) -> None:
    [table] = build_tables([record("η=0.0", 10, 13.0, **{"paper": "table1_cifar10"} | changes)])
    assert table.note == f"not compared with the paper: {reason}"
    assert (table.paper, table.paper_value("η=0.0", 10), table.difference("η=0.0", 10)) == (None, None, None)
    assert [line.kind for line in table.lines()] == ["ours"]


def test_samples_with_labels_are_not_compared() -> None:
    changes = {"paper": "table1_cifar10"}
    made = [record("η=0.0, no label", 10, 13.0, condition={"label": None, "w": 0.0}, **changes)]
    [plain] = build_tables(made)
    made += [record(f"{row}, w=2", 10, 12.0, condition={"label": "all", "w": 2}, **changes) for row in ("η=0.0", "σ̂")]
    [table] = build_tables(made)
    assert [line.name for line in table.lines() if line.kind == "paper"] == ["η=0.0, no label, paper"]
    assert table.note == f"{plain.note}; samples with labels are not compared"
    [of_sigma_hat] = build_tables([made[2], record("σ̂", 10, 300.0, **changes)])
    assert [(line.name, line.texts) for line in of_sigma_hat.lines()[1:3]] == [
        ("σ̂, difference", ["-67.43 (-18.4 %)"]),
        ("σ̂, w=2", ["12.00"]),
    ]
    assert of_sigma_hat.lines()[-1].texts == ["367.43"]


def test_no_comparison_unless_asked_for() -> None:
    [table] = build_tables([record("η=0.0", 10, 13.0)])
    assert (table.paper, table.note) == (None, "")


def test_npz_statistics_count_as_the_reference_set() -> None:
    paper, note = comparison("table1_celeba", FID, 50_000, "fid_stats_celeba64_train_50000_ddim.npz")
    assert paper is PAPER_TABLES["table1_celeba"]
    assert note.endswith("; fid_stats_celeba64_train_50000_ddim.npz is taken to be of celeba-train")
    assert "taken to be" not in comparison("table1_celeba", FID, 50_000, "celeba-train")[1]


@pytest.mark.parametrize(("weights", "noted"), [("ema", False), ("raw", True)])
def test_online_weights_are_noted_beside_the_paper(weights: str, noted: bool) -> None:
    made = record("η=0.0", 10, 13.0, paper="table1_cifar10")
    made["model"] = made["model"] | {"weights": weights}
    [table] = build_tables([made])
    assert table.paper is not None
    assert ("the paper's weights are an average" in table.note) == noted


def test_reconstruction_errors_compare_with_table_2() -> None:
    made = record(
        "η=0.0",
        20,
        0.0,
        "linear",
        kind="reconstruction",
        paper="table2_reconstruction",
        n=10_000,
        metrics={"reconstruction_mse_10k": 0.0071},
        reference={"name": "cifar10-test", "images": 10_000, "fingerprint": "f"},
        metric={"name": "reconstruction"},
    )
    del made["seed"], made["pixels"], made["bf16"]  # a record of an encoding has none
    [table] = build_tables([made])
    assert [line.texts for line in table.lines()] == [["0.00710"], ["0.0065"], ["+0.0006 (+9.2 %)"]]
    assert table.percent("η=0.0", 20) == pytest.approx(100 * 0.0006 / 0.0065, rel=1e-5)
    # Another inversion, with other evaluations, has no number in the paper.
    other = {"label": "η=0.0, diffusers' inversion (NFE 2 S)", "inversion": {"method": "diffusers"}, "key": "other"}
    [table] = build_tables([made, made | other])
    assert [table.paper_value(row, 20) for row in table.rows] == [0.0065, None]


@pytest.mark.parametrize("spacing", ["linear", "uniform", "quad", "quad_or_full", "quadratic"])
@pytest.mark.parametrize("data", ["cifar10", "celeba"])
@pytest.mark.parametrize("extractor", ["inception", "efficientnet"])
def test_linear_times_are_warned_of_where_the_paper_has_quad(data: str, extractor: str, spacing: str) -> None:
    warned = times_warning(data, extractor, spacing) is not None
    assert warned is ((data, extractor) == ("cifar10", "inception") and spacing in ("linear", "uniform"))


def test_half_of_the_papers_last_digit_is_no_difference() -> None:
    [table] = build_tables([record("η=0.0", 10, 13.365, paper="table1_cifar10")])
    assert table.verdict("η=0.0", 10) == "same"


def test_numbers_of_celebas_solvers_are_the_quoted_ones() -> None:
    assert PAPER_TABLES["solvers_celeba"].values == {
        "η=0.0": {10: 10.85, 12: 9.99, 15: 7.78, 20: 6.64, 50: 5.23},
        "tAB3-DEIS": {10: 6.95, 20: 3.41, 50: 2.95},
    }


@pytest.mark.parametrize(
    ("metric", "less_is_better"),
    [
        ("fd", True),
        ("kd", True),
        ("intra_fd", True),
        *((name, False) for name in ("is", "precision", "recall", "accuracy")),
    ],
)
def test_of_distances_less_is_better(metric: str, less_is_better: bool) -> None:
    assert is_distance(f"{metric}_digits_classifier_1k") == less_is_better
