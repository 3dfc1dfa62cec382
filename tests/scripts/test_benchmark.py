"""scripts/benchmark/speed.py: arithmetic, tables, errors, and one tiny run with diffusers."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from ddim.checkpoints.convert.model_zoo import PRESETS
from ddim.errors import UserError
from ddim.inference.compute import ComputeSpec
from ddim.networks import UNetSpec, build_network

TINY = UNetSpec((8, 8), ch=64, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,))
FOLDER = Path(__file__).parents[2] / "scripts" / "benchmark"


@pytest.fixture(autouse=True)
def scripts_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


def test_a_speed_up_is_the_median_ratio_of_the_rounds():
    from tables import speed_up

    # The second round was slow for both; a ratio of medians would be 4 / 2.5.
    assert speed_up([4.0, 40.0, 3.0], [2.0, 10.0, 2.5]) == "2.00 (1.20 to 4.00)"


def test_rounds_are_interleaved_and_failures_reported():
    from timing import interleave

    order = []

    def variant(name, seconds):
        def run():
            order.append(name)
            return seconds

        return lambda: run

    def broken():
        raise RuntimeError("no such kernel\nand a traceback")

    variants = {"a": variant("a", 1.0), "broken": broken, "b": variant("b", 2.0)}
    seconds, missing = interleave(variants, 3)
    assert order == ["a", "a", "b", "b"] + ["a", "b"] * 3
    assert seconds == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert missing == {"broken": "RuntimeError: no such kernel"}


def test_variants_are_left_out_when_the_time_is_up():
    from timing import interleave

    seconds, missing = interleave({"a": lambda: lambda: 1.0}, 3, minutes=-1.0)
    assert seconds == {}
    assert "no time left" in missing["a"]


def test_rounds_end_when_another_would_not_fit(monkeypatch):
    from timing import interleave

    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def build():
        clock[0] += 95  # compiling

        def run():
            clock[0] += 10
            return 10.0

        return run

    seconds, _ = interleave({"a": build}, 100, minutes=3.0)
    assert len(seconds["a"]) == 6  # 115 + 6 x 10 of 180 seconds


def test_the_cifar10_network_costs_12_44_gflop_an_evaluation():
    from ddim.inference.auto import flops

    with torch.device("meta"):
        network = build_network("unet", PRESETS["cifar10"]).eval()
    assert sum(p.numel() for p in network.parameters()) == 35_746_307
    assert flops(network, (3, 32, 32)) == pytest.approx(12.44e9, rel=1e-3)


def test_a_multiply_add_counts_as_two_operations():
    from ddim.inference.auto import flops

    class Layer(nn.Linear):
        def forward(self, x, t):
            return super().forward(x.flatten(1))

    assert flops(Layer(12, 5), (3, 2, 2)) == 2 * 12 * 5


def test_settings_are_resolved_for_ours_and_for_others():
    from timing import resolve, words

    best = "bf16+channels_last+compile"
    assert {resolve("best", ours, True) for ours in (True, False)} == {best}
    assert resolve("best", True, False) == "channels_last+winograd"
    assert resolve("best", False, False) == "channels_last+compile"
    for name, others in (("auto", "default"), ("compile+winograd", "compile"), ("norms+convolutions", "default")):
        assert (resolve(name, True, False), resolve(name, False, False)) == (name, others)
    assert set(words(best)) == {"bf16", "channels_last", "compile"}
    with pytest.raises(UserError, match="'bf61'"):
        words("compile+bf61")


def test_a_baseline_with_another_output_is_refused():
    from baselines import Ours, random_weights
    from speed import output_difference

    class Other(Ours):
        def network(self):
            network = super().network()
            network.mid.block_1.conv1.weight.data *= scale
            return network

    code, scale = Other(TINY, random_weights(TINY), None), 1.0
    assert output_difference("other", code, code.network().eval()) == 0.0
    scale = 1.01
    with pytest.raises(UserError, match="other has another output than ours"):
        output_difference("other", code, code.network().eval())


def line(what, **fields):
    common = {"run": "r", "device": "cpu", "processor": "P", "capability": "AVX2", "threads": 2, "revision": "abc"}
    return {**common, "versions": {"python": "3.11", "torch": "2.15"}, "what": what, **fields}


def timing(what, peer, setting, seconds, **fields):
    return line(what, peer=peer, setting=setting, seconds=seconds, **fields)


RECORDS = [
    line("peer", peer="ours", parameters=35_746_307, flops=10**10, apart=None),
    line("peer", peer="official", parameters=35_746_307, flops=10**10, apart=2e-6),
    line("peer", peer="ddpm_pytorch", parameters=36_000_000, flops=9 * 10**9, apart=None),
    timing("ceiling", "matmul", "float32", [2e-12, 1e-12]),
    timing("ceiling", "matmul", "bf16", [0.5e-12, 0.25e-12]),
    timing("sampling", "official", "default", [4.0, 4.0, 40.0], batch=5, S=10),
    timing("sampling", "official", "bf16", [2.0, 2.0, 2.0], batch=5, S=10),
    timing("sampling", "ours", "bf16", [1.0, 1.0, 1.0], batch=5, S=10),
    timing("training", "ours", "default", [0.5], batch=5),
    line("missing", peer="diffusers", reason="not here"),
]


def rows(text):
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row.startswith("| ")]


def test_the_summary_compares_the_best_settings():
    from tables import render

    text = render(RECORDS)
    # Sampling: 5 / 4, and 5 / 1 images a second; 0.5 of 4 TFLOP/s; a training of ours alone is left out.
    assert rows(text)[2][:7] == ["10 steps", "5", "1.25", "5.00", "5.00 (bf16)", "12%", "2.50 (official, bf16)"]
    assert len(rows(text)) == 3


def test_each_kind_of_loops_is_compared_with_torchs_best():
    from tables import LOOPS, render

    seconds = {"default": 6.0, "channels_last+compile": 4.0, **dict(zip(LOOPS, (2.0, 3.2, 1.6), strict=True))}
    timings = [timing("training", "ours", name, [s], batch=8, network="small") for name, s in seconds.items()]
    gains = [f"{gain} ({gain} to {gain})" for gain in ("2.00", "1.25", "2.50")]
    entries = ["small", "training step", "8", "4 (channels_last+compile)", *gains, "1"]
    assert rows(render(timings))[2] == entries


def test_the_tables_are_computed_from_the_record():
    from tables import report

    entries = [row[2:] for row in rows(report(RECORDS))]
    # 5 images x 10 evaluations x 10 GFLOP in 4 s are 0.125 TFLOP/s, an eighth of the best product of matrices.
    assert ["official", "default", "4", "1.25", "12%", "1.00 (1.00 to 1.00)", "3"] in entries
    assert ["ours", "bf16", "1", "5.00", "12%", "4.00 (4.00 to 40.00)", "3"] in entries
    # A training step is three forward passes: 5 x 3 x 10 GFLOP in 0.5 s.
    assert ["ours", "default", "0.5", "10.00", "30%", "1.00 (1.00 to 1.00)", "1"] in entries


def test_a_kind_of_loops_can_be_measured_alone():
    from baselines import Ours

    from ddim.networks.cpu.norm_silu import FusedNormSiLU
    from ddim.networks.cpu.winograd import WinogradConv2d

    for setting, kinds in (("default", set()), ("norms", {FusedNormSiLU}), ("convolutions", {WinogradConv2d})):
        options, use_loops = Ours.split(setting)
        use_loops(network := build_network("unet", TINY))
        assert {type(module) for module in network.modules()} & {FusedNormSiLU, WinogradConv2d} == kinds
        assert not options
    assert ComputeSpec("cpu", **Ours.split("auto")[0]).given == {}  # all is left to be chosen
    assert len(ComputeSpec("cpu", **Ours.split("default")[0]).given) == 6


@pytest.mark.slow
@pytest.mark.integration
def test_a_run_times_all_and_names_what_is_missing(run, tmp_path, compiler):
    pytest.importorskip("diffusers")
    out = tmp_path / "speed.jsonl"
    words = "--network tiny --rounds 1 --batch 1 --train-batch 2 --steps 2 --baselines ours diffusers official"
    settings = ("--settings", "default", "channels_last+winograd")
    done = run("benchmark/speed", *words.split(), *settings, "--out", str(out))
    assert done.code == 0, done.err
    records = [json.loads(text) for text in out.read_text().splitlines()]
    timed = {(r["what"], r["peer"], r["setting"]) for r in records if r["what"] in ("sampling", "training")}
    assert timed == {
        (what, *which)
        for what in ("sampling", "training")
        for which in (
            ("ours", "default"),
            ("ours", "channels_last+winograd"),
            ("diffusers", "default"),
            ("diffusers", "channels_last"),  # Winograd's algorithm is ours alone
        )
    }
    assert "official is left out: give --official PATH" in done.out
    again = run("benchmark/speed", "--table", str(out))
    assert again.out.strip() in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "nothing.jsonl"], "nothing.jsonl holds no records"),
        (["--network", "tiny", "--baselines", "nobody"], "nobody"),
        (["--network", "tiny", "--official", "nowhere"], "--official takes the folder of a checkout"),
    ],
)
def test_mistakes_are_one_clear_sentence(monkeypatch, tmp_path, arguments, message):
    from speed import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["speed.py", *arguments])
    with pytest.raises(SystemExit, match=r"^error: [^\n]+$") as caught:  # Python prints it, and exits with 1
        main()
    assert message in str(caught.value.code)


def test_the_plan_of_table_1_is_its_network_evaluations():
    from scale import WORKS, size
    from tables import FEATURES, METRICS, expected

    network, work = WORKS["Table 1, CIFAR-10"]
    assert work["evaluations"] == 295_000_000
    flops = size(PRESETS[network])["flops"]
    assert flops == 12_443_713_536  # as the records of speed.py state it
    record = {**work, "flops": flops, "rate": 1e13}
    hours, limit = expected(record, 1)
    assert limit == "network"
    assert 3600 * hours == pytest.approx((295e6 * flops + 25 * 50_000 * FEATURES) / 1e13 + METRICS)
    assert expected(record, 8)[0] == pytest.approx((hours - METRICS / 3600) / 8 + METRICS / 3600)
    # With so many that sampling is nothing, one process computes the metrics of one evaluation after the other.
    assert expected(record, 10**9) == (pytest.approx(26 * METRICS / 3600), "metrics")


def test_a_training_is_bound_by_launches_and_gradients():
    from tables import LAUNCHES, NODES, expected

    record = {"steps": 3600, "batch": 128, "flops": 10**10, "parameters": 10**7, "training_rate": 1e13}
    assert expected(record, 1) == (pytest.approx(3 * 128 * 1e10 / 1e13), "network")
    hours, limit = expected(record, 64)
    assert hours == pytest.approx(LAUNCHES + 2 * 63 / 64 * 4e7 / NODES)
    assert limit == "launches"
    assert expected(record | {"parameters": 10**9}, 64)[1] == "gradients"
    assert expected(record, 8)[0] < expected(record, 1)[0]


def test_the_rate_of_a_record_is_its_best_setting():
    from tables import rates

    records = [
        {"run": "1", "what": "peer", "peer": "ours", "flops": 100},
        {"run": "1", "what": "sampling", "peer": "ours", "batch": 8, "S": 10, "seconds": [4.0, 2.0, 1.0]},
        {"run": "1", "what": "sampling", "peer": "ours", "batch": 4, "S": 10, "seconds": [2.0]},
        {"run": "1", "what": "sampling", "peer": "official", "batch": 8, "S": 10, "seconds": [0.1]},
        {"run": "1", "what": "training", "peer": "ours", "batch": 8, "seconds": [3.0]},
    ]
    assert rates(records) == {"rate": 4000.0, "training_rate": 800.0}


def test_a_plan_is_written_and_refuses_what_is_no_rate(tmp_path, monkeypatch, capsys):
    import scale

    out = tmp_path / "scale.jsonl"
    monkeypatch.setattr("sys.argv", ["scale.py", "--tflops", "80", "--dollars", "2", "--out", str(out)])
    scale.main()
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == 2 + len(scale.WORKS)
    assert "80 TFLOP/s sampling" in printed
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["plan"] for record in records] == [*scale.WORKS]
    for words, message in (("--tflops=0", "must be above 0"), (str(out), "lacks sampling or training of ours")):
        monkeypatch.setattr("sys.argv", ["scale.py", words, "--out", str(out)])
        with pytest.raises(SystemExit, match=message):
            scale.main()
