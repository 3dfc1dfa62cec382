"""Tables show each record in its place, and never mix two protocols."""

import math
import random
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from made_records import FID, RECORDS, record

from ddim.results.records import Record
from ddim.results.report import Table, build_tables, sigma_hat_variants, write_report

ROWS = ["η=0.0", "η=0.0 (clip x0)", "η=0.2", "η=1.0", "σ̂"]
COLUMNS = [10, 20, 100, 1000]
VALUES = {
    "η=0.0": [13.36, None, 4.16, None],
    "η=0.0 (clip x0)": [None, 0.0123, None, None],
    "η=0.2": [None, 7.11, None, None],
    "η=1.0": [41.07, None, None, None],
    "σ̂": [367.43, None, None, 3.17],
}


def values(table: Table) -> dict[str, list[float | None]]:
    return {row: [table.value(row, S) for S in table.columns] for row in table.rows}


def test_rows_columns_and_blanks() -> None:
    [table] = build_tables(RECORDS)
    assert (table.metric, table.rows, table.columns) == (FID, ROWS, COLUMNS)
    assert values(table) == VALUES


def test_markdown_reads_back() -> None:
    [table] = build_tables(RECORDS)
    header, rule, *lines = [[text.strip() for text in line.split("|")[1:-1]] for line in table.markdown().splitlines()]
    assert header == ["S", "10", "20", "100", "1000"]
    assert rule == ["---"] * 5
    assert [line[0] for line in lines] == ROWS
    for name, *texts in lines:
        for text, value in zip(texts, VALUES[name], strict=True):
            assert (None if text == "" else float(text)) == value


def test_title_states_what_was_measured() -> None:
    [table] = build_tables(RECORDS)
    assert table.title() == (
        "fid_50k: 50,000 images against 50,000 of cifar10-train, ema weights 01234567 at step 800,000, tau quad, seed 0"
    )
    [unusual] = build_tables([record("η=0.0", 10, 1.0, bf16=True, sampler__last_time=1, first=7)])
    assert unusual.title().endswith("seed 0, from image 7 on, bfloat16, ends at alpha_bar[1]")
    [encoded] = build_tables(
        [record("η=0.0", 10, 1.0, kind="reconstruction", reference__name="cifar10-test", seed=None)]
    )
    assert "50,000 images of cifar10-test, encoded and decoded, ema" in encoded.title()
    assert "seed" not in encoded.title()


@pytest.mark.parametrize("defaults", [{"kind": "fidelity"}, {"first": 0}, {"paper": None}], ids=str)
def test_missing_fields_of_older_records_have_defaults(defaults: dict[str, Any]) -> None:
    [table] = build_tables([record("η=0.0", 10, 1.0), record("η=0.0", 20, 2.0, **defaults)])
    assert values(table) == {"η=0.0": [1.0, 2.0]}


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "reconstruction"},
        {"paper": "table1_cifar10"},
        {"first": 1},
        {"n": 1000},
        {"bf16": True},
        {"tf32": True},
        {"pixels": "float"},
        {"model__weights": "online"},
        {"model__weights_hash": "other"},
        {"model__step": 1},
        {"model__schedule": "cosine"},
        {"model__T": 500},
        {"model__prediction": "v"},
        {"model__description_hash": "other"},
        {"reference__name": "cifar10-test"},
        {"reference__images": 10_000},
        {"reference__fingerprint": "other"},
        {"metric__extractor": "pixels"},
        {"metric__weights_hash": "other"},
        {"metric__feature_layer": "768"},
        {"metric__resize": "none"},
        {"metric__reference_split": "test"},
        {"sampler__last_time": 1},
        {"spacing": "linear"},
        {"spacing": "explicit 1,500"},
    ],
    ids=str,
)
def test_protocols_are_never_mixed(change: dict[str, Any]) -> None:
    tables = build_tables([record("η=0.0", 10, 1.0), record("η=0.0", 10, 2.0, **change)])
    assert sorted(table.value("η=0.0", 10) or 0 for table in tables) == [1.0, 2.0]
    assert [len(table.entries) for table in tables] == [1, 1]


def test_full_chain_joins_every_spacing() -> None:
    full = record("η=0.0", 1000, 4.04, "full")
    tables = build_tables(
        [
            record("η=0.0", 10, 13.36),
            full,
            record("η=0.0", 10, 17.33, "linear"),
            record("η=0.0", 10, 5.0, "linear", n=10_000),
            record("σ̂", 1000, 3.17, "full"),  # has no other spacing, so it joins all
            record("η=1.0", 10, 41.07),
            record("η=1.0", 1000, 4.73, "full"),  # its sampler has no linear row
        ]
    )
    by_protocol = {(table.protocol["n"], table.protocol["spacing"]): values(table) for table in tables}
    assert by_protocol == {
        (50_000, "quad"): {"η=0.0": [13.36, 4.04], "η=1.0": [41.07, 4.73], "σ̂": [None, 3.17]},
        (50_000, "linear"): {"η=0.0": [17.33, 4.04], "σ̂": [None, 3.17]},
        (10_000, "linear"): {"η=0.0": [5.0]},
    }
    [table] = build_tables([full])
    assert (table.protocol["spacing"], values(table)) == ("full", {"η=0.0": [4.04]})


def test_choice_of_duplicates_ignores_order_and_value() -> None:
    pairs = [[record("η=0.0", 10, float(v)), record("η=0.0", 10, float(v + 1))] for v in range(20)]
    chosen = []
    for pair in pairs:
        [table], [other] = build_tables(pair), build_tables(pair[::-1])
        assert values(table) == values(other)
        assert table.ranges == 1
        chosen.append(table.value("η=0.0", 10) == pair[0]["metrics"][FID])
    assert 0 < sum(chosen) < len(chosen)


def test_samplers_of_one_label_have_a_row_each() -> None:
    """Labels leave out most `kwargs`, and of files they have the name."""

    def made(value: float, seed: int = 0, S: int = 10, **kwargs: Any) -> Record:
        return record("2M", S, value, seed=seed, sampler__kwargs=kwargs)

    records = [made(1.0), made(3.0, seed=1), made(9.0, lower_order_below=15), made(8.0, file="0123456789abcdef" * 4)]
    records += [made(4.0, S=20), made(5.0, S=20, lower_order_below=15), record("η=0.0", 10, 6.0)]
    shown: dict[str, list[float | None]] = {"2M": [2.0, 4.0], "2M (lower_order_below=15)": [9.0, 5.0]}
    shown |= {"2M (file=0123456789ab)": [8.0, None], "η=0.0": [6.0, None]}
    random.Random(0).shuffle(records)
    [table] = build_tables(records)
    assert values(table) == shown
    longer = [made(float(i), path=f"/data/stats/very/long/{i}.json") for i in range(2)]
    [table] = build_tables(longer)
    assert sorted(values(table).values()) == [[0.0], [1.0]]
    orders = [record("my 2M", 10, float(order or 2), sampler__order=order) for order in (None, 2, 3)]
    assert sorted(values(build_tables(orders)[0]).values()) == [[2.0], [2.0], [3.0]]
    assert values(build_tables(orders[:2])[0]) == {"my 2M": [2.0]}  # the default, given
    one, other = (record("η=0.0", 10, value, "mine", sampler__tau=[1, *tau]) for value, tau in ((1.0, [5]), (2.0, [6])))
    [table] = build_tables([one, other])
    assert sorted(values(table).values()) == [[1.0], [2.0]]
    assert all(re.fullmatch(r"η=0.0 \(τ [0-9a-f]{6}\)", row) for row in table.rows)


def test_each_metric_has_a_table() -> None:
    both = record("η=0.0", 10, 0.0, metrics={FID: 4.0, "kid_50k": 0.001})
    assert {table.metric: values(table) for table in build_tables([both])} == {
        FID: {"η=0.0": [4.0]},
        "kid_50k": {"η=0.0": [0.001]},
    }
    assert build_tables([]) == []


def repeated(label: str, S: int, numbers: list[float], n: int = 1000) -> list[Any]:
    return [record(label, S, number, n=n, first=n * k) for k, number in enumerate(numbers)]


def test_ranges_give_mean_and_standard_deviation() -> None:
    numbers = [7.5, 8.25, 6.9]
    records = [*repeated("η=0.0", 10, numbers), *repeated("η=1.0", 10, [3.0, 4.0])]
    random.Random(0).shuffle(records)
    [table] = build_tables(records)
    mean = sum(numbers) / 3
    std = math.sqrt(sum((number - mean) ** 2 for number in numbers) / 2)
    assert table.value("η=0.0", 10) == pytest.approx(mean, rel=1e-12)
    assert table.spread("η=0.0", 10) == pytest.approx(std, rel=1e-9)
    assert table.values("η=0.0", 10) == numbers
    assert "mean ± sample standard deviation over 3 ranges of images, or as many as an entry states" in table.title()
    assert f"| η=0.0 | {mean:.2f} ± {std:.2f} |" in table.markdown()
    assert f"| η=1.0 | 3.50 ± {math.sqrt(0.5):.2f} (of 2) |" in table.markdown()
    assert (
        dict(table.describe_protocol(full=False))["images"]
        == "n = 1,000: numbers 0 to 999; 1,000 to 1,999; 2,000 to 2,999"
    )


def test_seeds_share_a_table_with_their_spread() -> None:
    numbers = [7.5, 8.25, 6.9, 7.0, 8.0, 7.7, 7.1, 6.5]
    records = [record("η=0.0", 10, number, n=1000, seed=seed) for seed, number in enumerate(numbers)]
    records += [record("η=0.0", 20, 5.0, n=1000, seed=3), record("η=0.0", 20, 6.0, n=1000, seed=3, first=1000)]
    random.Random(0).shuffle(records)
    [table] = build_tables(records)
    assert table.values("η=0.0", 10) == numbers
    assert table.protocol["seed"] == [*range(8)]
    assert table.title().endswith(
        "8 seeds, mean ± sample standard deviation over 8 sets of images, or as many as an entry states"
    )
    assert f"| η=0.0 | {statistics.fmean(numbers):.2f} ± {statistics.stdev(numbers):.2f} | 5.50 ± 0.71 (of 2) |" in (
        table.markdown()
    )
    assert dict(table.describe_protocol(full=False))["seed"] == "8 seeds: 0, 1, 2, 3, …, 6, 7"
    assert dict(table.describe_protocol(full=True))["seed"] == "8 seeds: 0, 1, 2, 3, 4, 5, 6, 7"


def test_seeds_of_a_trajectory_error_share_a_table() -> None:
    """What samples are compared with has the x_T of the seed, and so another fingerprint."""
    changes: dict[str, Any] = {"kind": "trajectory", "reference__name": "AB3 over all 1,000 times"}
    first, second = (record("η=0.0", 10, 2.0 + i, seed=i, **changes) for i in range(2))
    second["reference"] = second["reference"] | {"fingerprint": "0"}
    [table] = build_tables([first, second])
    assert table.values("η=0.0", 10) == [2.0, 3.0]


def test_overlapping_ranges_are_not_averaged() -> None:
    tables = build_tables([record("η=0.0", 10, 1.0, n=1000, first=first) for first in (0, 500, 1000)])
    assert sorted(table.ranges for table in tables) == [1, 2]
    assert all(table.spread("η=0.0", 10) is None for table in tables if table.ranges == 1)


def test_order_of_records_does_not_matter() -> None:
    records = [*RECORDS, *repeated("η=0.0", 10, [1.0, 2.0]), record("σ̂", 10, 300.0, "uniform")]
    texts = []
    for seed in range(5):
        random.Random(seed).shuffle(records)
        tables = [*build_tables(records), *sigma_hat_variants(records)]
        texts.append([(t.title(), t.markdown(), t.describe_protocol(full=True), t.protocol) for t in tables])
    assert texts.count(texts[0]) == 5


def test_sigma_hat_variants_share_a_table() -> None:
    clipped = "σ̂ (clip x0_and_eps)"
    numbers = {("σ̂", "quad"): 150.0, ("σ̂", "uniform"): 370.0, (clipped, "quad"): 99.0, (clipped, "uniform"): 280.0}
    records = [record(label, 10, v, spacing, paper="table1_cifar10") for (label, spacing), v in numbers.items()]
    records += [
        record("σ̂", 1000, 3.2, "full", paper="table1_cifar10"),
        record("η=0.0", 10, 13.4, paper="table1_cifar10"),
    ]
    [table] = sigma_hat_variants(records)
    assert table.heading == "σ̂: four variants against the paper"
    assert values(table) == {
        "σ̂, quad": [150.0, 3.2],
        "σ̂, uniform": [370.0, 3.2],
        f"{clipped}, quad": [99.0, None],
        f"{clipped}, uniform": [280.0, None],
    }
    *_, last = table.lines()
    assert (last.name, last.texts) == ("paper", ["367.43", "3.17"])
    assert [line.kind for line in table.lines()].count("paper") == 1
    [two] = sigma_hat_variants([r | {"paper": None} for r in records if "clip" not in r["label"]])
    assert (two.heading, two.paper) == ("σ̂: two variants", None)
    assert sigma_hat_variants([r for r in records if r["label"] != clipped and r["spacing"] != "uniform"]) == []
    other = [r | {"n": 10_000} if r["spacing"] == "uniform" else r for r in records if "clip" not in r["label"]]
    assert sigma_hat_variants(other) == []  # another protocol is not another variant


def test_protocol_is_described_completely() -> None:
    records = [
        record("η=0.0", 10, 1.0),
        record("σ̂ (clip x0_and_eps)", 1000, 2.0, "full", sampler__tau=list(range(1, 1001))),
    ]
    records[1] |= {"revision": "9" * 40 + "+changes", "other_revisions": ["a" * 40]}
    [table] = build_tables(records)
    full, short = dict(table.describe_protocol(full=True)), dict(table.describe_protocol(full=False))
    assert full["τ"] == "quad: S=10: 1, 101, 201, 301, 401, 501, 601, 701, 801, 901; full S=1000: each from 1 to 1000"
    assert short["τ"] == "quad: S=10: 1, 101, 201, 301, …, 801, 901; full S=1000: each from 1 to 1000"
    assert full["reference set"] == "cifar10-train, split train, 50,000 images, fingerprint fedcba9876543210"
    published = record("η=0.0", 10, 1.0, reference__images=None)
    [table] = build_tables([published])  # the file does not state its split
    assert dict(table.describe_protocol(full=True))["reference set"] == (
        "cifar10-train, published statistics, fingerprint fedcba9876543210"
    )
    assert full["weights"] == "ema, hash 0123456789abcdef, step 800,000, trained on cifar10"
    assert full["extractor"] == "inception, layer 2048, resize TF1-style bilinear, weights aaaabbbbccccdddd"
    assert full["clip of x̂0"] == "none (η=0.0); x0_and_eps (σ̂ (clip x0_and_eps))"
    records[1]["sampler"] |= {"clip_range": 2.0}
    [table] = build_tables(records)
    assert dict(table.describe_protocol(full=True))["clip of x̂0"].endswith(
        "x0_and_eps clip_range 2.0 (σ̂ (clip x0_and_eps))"
    )
    assert short["code revision"] == "65555dbe4f56, 999999999999+changes, aaaaaaaaaaaa"
    expected = {
        "metric": "fid_50k (less is better)",
        "images": "n = 50,000: numbers 0 to 49,999",
        "schedule": "linear, T=1000, prediction eps",
        "end": "alpha_bar[0] = 1",
        "pixels": "uint8, rounded half up",
        "network in": "float32",
        "seed": "0",
    }
    assert {name: full[name] for name in expected} == expected


def test_online_weights_have_one_name() -> None:
    """Records call them raw."""
    one = record("η=0.0", 10, 1.0)
    [table] = build_tables([one | {"model": one["model"] | {"weights": "raw"}}])
    assert "online weights" in table.title()
    assert dict(table.describe_protocol(full=True))["weights"].startswith("online, hash")


def test_published_statistics_have_no_number_of_images(tmp_path: Path) -> None:
    one = record("η=0.0", 10, 1.0)
    one["reference"] = {"name": "published.npz", "images": None, "fingerprint": "f" * 64}
    [table] = build_tables([one])
    assert " images against published.npz," in table.title()
    assert "published.npz" in dict(table.describe_protocol(full=True))["reference set"]
    one["per_class"] = {"accuracy_digits_classifier_1k": {"cat": 0.5, "dog": 1.0}}
    paths = write_report([one], tmp_path)
    lines = [f"η=0.0,10,10,accuracy_digits_classifier_1k,{of},{one['key']}" for of in ("cat,0.5", "dog,1")]
    assert (tmp_path / "classes.csv").read_text().splitlines()[1:] == lines
    assert all("None" not in path.read_text() for path in paths if path.suffix in (".md", ".csv", ".tex", ".html"))
