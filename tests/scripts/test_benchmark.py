"""The speed benchmark: its arithmetic, its table, its refusals; and one run of it, tiny, against diffusers."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from ddim.checkpoints.convert.model_zoo import PRESETS
from ddim.errors import UserError
from ddim.networks import UNetSpec, build_network

TINY = UNetSpec((8, 8), ch=64, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,))
CPU = torch.device("cpu")
SCRIPTS = str(Path(__file__).parents[2] / "scripts")


@pytest.fixture(autouse=True)
def scripts_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)


def test_a_speed_up_is_the_median_of_the_ratios_of_each_round():
    from _benchmark import speed_up

    # The second round was slow for both; a ratio of medians would say 4 / 2.5.
    ratio = speed_up([4.0, 40.0, 3.0], [2.0, 10.0, 2.5])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 1.2, 4.0)
    assert str(ratio) == "2.00 (1.20 to 4.00)"


def test_rounds_are_interleaved_and_what_fails_is_told():
    from _benchmark import interleave

    order = []

    def variant(name, seconds):
        def run():
            order.append(name)
            return seconds

        return lambda: run

    def broken():
        raise RuntimeError("no such kernel\nand a traceback")

    variants = {"a": variant("a", 1.0), "broken": broken, "b": variant("b", 2.0)}
    timings, missing = interleave(variants, 3, CPU, say=lambda text: None)
    assert order == ["a", "a", "b", "b"] + ["a", "b"] * 3
    assert {name: timing.seconds for name, timing in timings.items()} == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert missing == {"broken": "RuntimeError: no such kernel"}


def test_time_that_is_up_leaves_variants_out():
    from _benchmark import interleave

    timings, missing = interleave({"a": lambda: lambda: 1.0}, 3, CPU, minutes=-1.0, say=lambda text: None)
    assert timings == {}
    assert "no time left" in missing["a"]


def test_rounds_are_done_while_one_more_fits_into_the_time(monkeypatch):
    from _benchmark import interleave

    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr("_benchmark.peak_memory", lambda call, device: None)

    def build():
        clock[0] += 95  # compiling

        def run():
            clock[0] += 10
            return 10.0

        return run

    timings, _ = interleave({"a": build}, 100, CPU, minutes=3.0, say=lambda text: None)
    assert len(timings["a"].seconds) == 7  # 105 + 7 x 10 of 180 seconds


def test_the_cifar10_network_costs_12_44_gflop_an_evaluation():
    from _benchmark import flops

    with torch.device("meta"):
        network = build_network("unet", PRESETS["cifar10"]).eval()
    assert sum(p.numel() for p in network.parameters()) == 35_746_307
    assert flops(network, (3, 32, 32)) == pytest.approx(12.44e9, rel=1e-3)


def test_the_work_of_a_linear_layer_is_two_operations_a_multiplication():
    from _benchmark import flops

    class Layer(nn.Linear):
        def forward(self, x, t):
            return super().forward(x.flatten(1))

    assert flops(Layer(12, 5), (3, 2, 2)) == 2 * 12 * 5


def test_settings_are_read_and_written():
    from _benchmark import Setting
    from _benchmark_parts import resolve

    for text in ("default", "bf16", "bf16+channels_last+compile", "compile+winograd"):
        assert str(Setting.parse(text)) == text
    slow, fast = {"float32": 1.0, "bf16": 2.0}, {"float32": 2.0, "bf16": 1.0}
    best = "bf16+channels_last+compile"
    assert [tuple(map(str, pair)) for pair in resolve(["default", "best"], fast)] == [("default",) * 2, (best,) * 2]
    assert tuple(map(str, resolve(["best"], slow)[0])) == ("channels_last+winograd", "channels_last+compile")
    assert tuple(map(str, resolve(["compile+winograd"], slow)[0])) == ("compile+winograd", "compile")
    with pytest.raises(UserError, match="'bf61' is not known"):
        Setting.parse("compile+bf61")


def test_a_peer_with_another_network_is_refused():
    from _peers import Ours, check_same_work, random_weights

    state = random_weights(TINY)
    peers = {"ours": Ours(TINY, state), "other": Ours(TINY, state)}
    assert check_same_work(peers, (3, 8, 8)) == {"other": 0.0}
    name = "mid.block_1.conv1.weight"
    peers["other"] = Ours(TINY, {**state, name: 1.01 * state[name]})
    with pytest.raises(UserError, match="other gives another output than ours"):
        check_same_work(peers, (3, 8, 8))


def line(what, **fields):
    common = {"run": "r", "device": "cpu", "processor": "P", "capability": "AVX2", "threads": 2, "revision": "abc"}
    return {**common, "versions": {"python": "3.11", "torch": "2.15"}, "what": what, **fields}


def timing(what, peer, setting, seconds, **fields):
    return line(what, peer=peer, setting=setting, seconds=seconds, first=9.0, peak=3 << 20, **fields)


RECORDS = [
    line("peer", peer="ours", about="", parameters=35_746_307, flops=10**10, apart=None),
    line("peer", peer="official", about="", parameters=35_746_307, flops=10**10, apart=2e-6),
    line("peer", peer="ddpm_pytorch", about="", parameters=36_000_000, flops=9 * 10**9, apart=None),
    timing("ceiling", "matmul", "float32", [2e-12, 1e-12], size=8),
    timing("ceiling", "matmul", "bf16", [0.5e-12, 0.25e-12], size=8),
    timing("sampling", "official", "default", [4.0, 4.0, 40.0], batch=5, S=10),
    timing("sampling", "official", "bf16", [2.0, 2.0, 2.0], batch=5, S=10),
    timing("sampling", "ours", "bf16", [1.0, 1.0, 1.0], batch=5, S=10),
    timing("training", "ours", "default", [0.5], batch=5),
    line("missing", peer="diffusers", reason="not here"),
]


def rows(text):
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row.startswith("| ")]


def test_the_tables_are_computed_from_the_record():
    from _benchmark_table import markdown

    text = markdown(RECORDS)
    found = rows(text)
    # 5 images x 10 evaluations x 10 GFLOP in 4 s are 0.125 TFLOP/s, an eighth of the best product of matrices.
    assert ["official", "default", "4,000.0", "1.25", "1.00 (1.00 to 1.00)", "0.125", "12%", "3", "9"] in found
    assert ["ours", "bf16", "1,000.0", "5.00", "4.00 (4.00 to 40.00)", "0.5", "12%", "3", "9"] in found
    # A training step is three forward passes: 5 x 3 x 10 GFLOP in 0.5 s.
    assert ["ours", "default", "500.0", "10.00", "1.00 (1.00 to 1.00)", "0.3", "30%", "3", "9"] in found
    assert "against the fastest peer at its best, official (bf16): 2.00 (2.00 to 2.00) times" in text
    assert "float32 1 TFLOP/s, bf16 4 TFLOP/s" in text
    # 295 million evaluations at 50 a second
    assert f"50 evaluations/s; sampling for the paper's CIFAR-10 table: {295e6 / 50 / 3600:,.1f} h" in text
    assert "Missing: diffusers (not here)" in text
    assert "another network" in next(row for row in found if row[0] == "denoising-diffusion-pytorch")


def test_a_line_is_laid_through_the_times():
    from _benchmark_table import markdown

    times = {(8, 1): 1.5, (8, 2): 2.5, (8, 4): 4.5, (16, 2): 5.0, (24, 2): 8.0, (32, 2): 10.0}
    points = [timing("scaling", f"n={n},S={S}", "default", [t], batch=8) for (n, S), t in times.items()]
    text = markdown([*RECORDS, *points])
    assert "Time over the number of steps S, 8 images, default: 500 ms + 1,000 ms each, off by 0.0% at most:" in text
    # 0 + 319 n tells 2.55, 5.1, 7.65, 10.2 s of 2.5, 5, 8, 10
    assert "Time over the number of images n, 2 steps, default: 0 ms + 319 ms each, off by 4.4% at most:" in text
    assert ["4", "4,500", "4,500"] in rows(text)
    assert "Time over" not in markdown(RECORDS)


@pytest.mark.slow
def test_a_run_measures_diffusers_beside_ours_and_says_who_is_missing(run, tmp_path, compiler):
    pytest.importorskip("diffusers")
    out = tmp_path / "speed.jsonl"
    words = "--network tiny --rounds 1 --batch 1 --train-batch 2 --steps 2"
    settings = ("--settings", "default", "channels_last+winograd", "--threads", str(torch.get_num_threads()))
    done = run("benchmark", *words.split(), *settings, "--peers", "ours", "diffusers", "official", "--out", str(out))
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
    assert sum(r["what"] == "scaling" for r in records) == 7
    steps = {r["peer"] for r in records if r["what"] == "step"}
    assert steps >= {"network", "arithmetic", "noise", "copy"}
    assert all(len(r["rows"]) == 10 for r in records if r["what"] == "profile")
    assert "official is left out: give --official PATH" in done.out
    assert re.search(r"against the fastest peer at its best, diffusers", done.out)
    again = run("benchmark", "--table", str(out))
    assert again.out.strip() in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "nothing.jsonl"], "nothing.jsonl holds no records"),
        (["--network", "tiny", "--peers", "nobody"], "nobody"),
        (["--network", "tiny", "--official", "nowhere"], "--official takes the folder of a checkout"),
    ],
)
def test_mistakes_are_one_sentence(process, tmp_path, arguments, message):
    done = process("benchmark", *arguments, cwd=tmp_path)
    assert done.code == 1
    assert done.err.count("\n") == 1
    assert message in done.err
