"""What docs/cifar10.md says of its tables holds of the records that they are rendered from."""

import itertools
import math
from pathlib import Path

from ddim.diffusion.timesteps import reference_quad_tau
from ddim.results.records import RecordFile
from ddim.results.report import build_tables
from ddim.results.training_plots import checkpoint_curves

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


def test_cifar10_shows_what_its_page_says():
    fd, kd = build_tables(RecordFile(RESULTS / "cifar10_small.jsonl").read())
    eta_0, half, eta_1, sigma_hat = (f"{row} (clip x0)" for row in ("η=0.0", "η=0.5", "η=1.0", "σ̂"))
    for table in (fd, kd):
        assert table.columns == [5, 10, 20, 50]
        for row in table.rows:
            distances = [table.value(row, S) for S in table.columns]
            assert (distances == sorted(distances, reverse=True)) == (table is fd or row != sigma_hat)
        for S in table.columns:
            values = {row: table.value(row, S) for row in table.rows}
            assert max(values, key=values.__getitem__) == sigma_hat
            assert min(values, key=values.__getitem__) == (half if S <= 20 else eta_1)
            assert (values[eta_0] < values[eta_1]) is (S < 20)
        assert sorted(table.rows, key=lambda row: table.value(row, 50), reverse=True) == [
            f"{row} (clip x0)" for row in ("σ̂", "η=0.0", "η=0.2", "η=0.5", "η=1.0")
        ]


def test_cifar10_solvers_beat_ddim():
    for table in build_tables(RecordFile(RESULTS / "cifar10_small_solvers.jsonl").read()):
        ddim, unipc, sde = (f"{row} (clip x0_and_eps)" for row in ("η=0.0", "UniPC-2 B2", "SDE-DPM-Solver++ 2M"))
        for nfe in (5, 10, 20):
            assert table.value(ddim, nfe) == max(table.value(row, nfe) for row in table.rows)
        assert table.value(unipc, 5) < 1.03 * table.value(ddim, 20)
        for nfe in (10, 20):
            assert table.value(sde, nfe) < 0.9 * min(table.value(row, nfe) for row in table.rows if row != sde)


def test_cifar10_gains_from_more_steps():
    etas = [f"η={eta} (clip x0)" for eta in ("0.0", "0.2", "0.5", "1.0")]
    for table in build_tables(RecordFile(RESULTS / "cifar10_small_more_steps.jsonl").read()):
        assert table.columns == [20, 50, 100]
        columns = {S: [table.value(row, S) for row in (*etas, "σ̂ (clip x0)")] for S in table.columns}
        for less, more in itertools.pairwise(columns.values()):
            assert all(a > b for a, b in zip(less, more, strict=True))
        assert min(columns[20]) == columns[20][2]
        if table.metric.startswith("fd_"):
            assert all(0.005 < 1 - b / a < 0.045 for a, b in zip(columns[50][:4], columns[100], strict=False))
        for S in (50, 100):  # more noise is better, but for that of σ̂
            assert columns[S][:4] == sorted(columns[S][:4], reverse=True)
            assert columns[S][4] > columns[S][0]


def by_eta(name):
    """Return the records of a file by η and S, without those of σ̂."""
    records = [(r["config"]["sampler"], r) for r in RecordFile(RESULTS / f"{name}.jsonl").read()]
    return {(sampler["eta"], r["S"]): r for sampler, r in records if sampler["rule"] != "sigma_hat"}


def half_width(record, metric):
    low, high = record["intervals"][metric]
    return (high - low) / 2


def is_below(one, other, metric):
    """Return whether a number is below another by more than the error of their difference."""
    difference = other["metrics"][metric] - one["metrics"][metric]
    return difference > math.hypot(half_width(one, metric), half_width(other, metric))


def test_with_more_steps_eta_1_is_best_beyond_the_error():
    records = by_eta("cifar10_small_more_steps")
    assert len(records) == 12
    for S in (20, 50, 100):
        assert is_below(records[1.0, S], records[0.5, S], "fd_efficientnet_1k") is (S > 20)
    records = by_eta("cifar10_small")
    assert len(records) == 16
    assert is_below(records[1.0, 50], records[0.5, 50], "fd_efficientnet_5k")


def test_from_50_steps_to_100_distances_fall_as_the_page_says():
    few, many = by_eta("cifar10_small"), by_eta("cifar10_small_100")
    fd, kd = "fd_efficientnet_5k", "kd_efficientnet_5k"
    assert len(many) == 4
    falls = {eta: 1 - record["metrics"][fd] / few[eta, 50]["metrics"][fd] for (eta, _), record in many.items()}
    assert all(0.02 <= round(fall, 2) <= 0.05 for fall in falls.values())
    assert [eta for eta in (0.0, 0.2, 0.5, 1.0) if is_below(many[eta, 100], few[eta, 50], fd)] == [0.2, 1.0]
    for less, more in itertools.pairwise((0.0, 0.2, 0.5, 1.0)):
        assert is_below(many[more, 100], many[less, 100], fd)
        assert is_below(many[more, 100], many[less, 100], kd) is (less > 0)
    assert not any(is_below(few[0.2, 50], few[0.0, 50], metric) for metric in (fd, kd))


def test_the_official_sigma_hat_is_as_bad():
    (clamped,) = [r for r in RecordFile(RESULTS / "cifar10_small_clamped.jsonl").read() if r["S"] == 20]
    row = {"rule": "sigma_hat", "clip": "x0"}
    (plain,) = [
        r
        for r in RecordFile(RESULTS / "cifar10_small_more_steps.jsonl").read()
        if r["S"] == 20 and row.items() <= r["config"]["sampler"].items()
    ]
    for metric, value in clamped["metrics"].items():
        low, high = plain["intervals"][metric]
        assert low < value < high


def test_sigma_hat_leaves_noise_on_every_list_of_times():
    records = RecordFile(RESULTS / "cifar10_small_times.jsonl").read()
    distances = {(r["spacing"], r["S"]): r["metrics"]["fd_efficientnet_1k"] for r in records if r["n"] == 1000}
    assert distances.keys() == {(times, S) for times in ("quad", "uniform", "linear") for S in (10, 20)}
    for S in (10, 20):
        of_S = [value for (_, steps), value in distances.items() if steps == S]
        assert max(of_S) < 1.1 * min(of_S)
        assert 0.94 < distances["linear", S] / distances["uniform", S] < 0.95
    linear, uniform = sorted((r for r in records if r["n"] == 500), key=lambda r: r["spacing"])
    assert (linear["spacing"], uniform["spacing"], linear["S"], uniform["S"]) == ("linear", "uniform", 100, 100)
    assert all(is_below(linear, uniform, f"{metric}_efficientnet_500") for metric in ("fd", "kd"))
    assert 0.95 < linear["metrics"]["fd_efficientnet_500"] / uniform["metrics"]["fd_efficientnet_500"] < 0.96
    eta_1 = by_eta("cifar10_small_more_steps")[1.0, 20]["metrics"]["fd_efficientnet_1k"]
    assert all(2.9 < distances[times, 20] / eta_1 < 3.2 for times in ("quad", "uniform", "linear"))


def test_a_thousand_steps_gain_nothing_over_a_hundred():
    records, metric = by_eta("cifar10_small_1000_steps"), "kd_efficientnet_100"
    assert records.keys() == {(eta, S) for eta in (0.0, 1.0) for S in (20, 100, 1000)}
    interval = {key: record["intervals"][metric] for key, record in records.items()}
    for eta in (0.0, 1.0):
        assert interval[eta, 1000][0] < interval[eta, 100][1]
        assert interval[eta, 100][0] < interval[eta, 1000][1]
    for S in (20, 100, 1000):
        assert records[1.0, S]["metrics"][metric] < records[0.0, S]["metrics"][metric]
        assert is_below(records[1.0, S], records[0.0, S], metric) is (S > 20)
    assert all(0.3 < half_width(record, metric) < 0.6 for record in records.values())
    assert len(set(reference_quad_tau(1000, 1000))) == 688


def test_cifar10_gains_from_training():
    tables = build_tables(RecordFile(RESULTS / "cifar10_small_steps.jsonl").read())
    for curve in build_tables(RecordFile(RESULTS / "cifar10_small_curve.jsonl").read()):
        curves = checkpoint_curves(curve)
        assert curves is not None
        (late,) = (table for table in tables if table.metric == curve.metric)
        of_steps = {}
        for eta in ("0.0", "1.0"):
            row = f"η={eta} (clip x0)"
            points = sorted(point for name, line in curves.lines.items() if name.startswith(row) for point in line)
            steps, distances, _ = zip(*points, strict=True)
            assert steps == (250, 500, 1000, 1500, 2000, 2500, 5440)
            fall = [*distances, late.value(row, 10)][curve.metric.startswith("kd") :]  # at first they are as far
            assert fall == sorted(fall, reverse=True)
            of_steps[eta] = dict(zip((*steps, 17500), (*distances, late.value(row, 10)), strict=True))
        better = [of_steps["0.0"][step] / of_steps["1.0"][step] for step in (1000, 1500, 2000, 2500, 17500)]
        assert better == sorted(better, reverse=True)
        assert better[0] > 1.08
        assert 1.02 > better[1] > 1 > better[2]
        if curve.metric.startswith("fd"):  # how much less the smaller distance is, as the page says
            assert [round(100 * abs(1 - min(ratio, 1 / ratio))) for ratio in better] == [10, 1, 2, 3, 10]
    floor = {table.metric: table for table in build_tables(RecordFile(RESULTS / "cifar10_floor_prc.jsonl").read())}
    assert {table.metric for table in tables} > set(floor)
    for table in (table for table in tables if table.metric in floor):
        (row,) = floor[table.metric].rows
        of_test = floor[table.metric].value(row, 2000)
        eta_0, eta_1 = (table.value(f"η={eta} (clip x0)", 10) for eta in ("0.0", "1.0"))
        assert (of_test < eta_0 < eta_1) if table.metric.startswith("precision") else (of_test > eta_0 > eta_1)


def test_cifar10_training_repeats_itself():
    """On another processor, without the stops of the first time."""
    first, again = (RecordFile(RESULTS / f"cifar10_training{name}.jsonl").read()[0] for name in ("", "_again"))
    assert first["stops"][:2] == [2201, 2421]
    assert again["stops"] == []
    before, now = (dict(record["curves"]["train/loss"]) for record in (first, again))
    assert [*now] == [*range(100, 2501, 100)]
    apart = max(abs(now[step] / before[step] - 1) for step in now)
    page = (ROOT / "docs" / "cifar10.md").read_text()
    assert f"training to {apart:.0e} of their value".replace("e-0", "e-") in page


def test_cifar10_reconstruction_errors_cross_the_papers():
    (table,) = build_tables(RecordFile(RESULTS / "cifar10_small_reconstruction.jsonl").read())
    errors = [table.value("η=0.0", S) for S in table.columns]
    assert errors == sorted(errors, reverse=True)
    paper = (0.014, 0.0065, 0.0023, 0.0009)  # Table 2
    assert [ours > theirs for ours, theirs in zip(errors, paper, strict=True)] == [True, True, False, False]
