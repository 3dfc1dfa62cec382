"""Markdown from the record of the speed benchmark; every number is computed here from the lines, none is typed."""

import re
import statistics
from collections.abc import Iterable
from typing import Any

from _benchmark import speed_up

Record = dict[str, Any]
TABLE1_EVALUATIONS = 50_000 * 5 * (10 + 20 + 50 + 100 + 1000)  # of the paper's CIFAR-10 table: five rows, five columns
NAMES = {"ddpm_pytorch": "denoising-diffusion-pytorch"}


def markdown(records: list[Record]) -> str:
    """Return the tables of all runs in a record, oldest first."""
    runs = dict.fromkeys(record["run"] for record in records)
    return "\n\n".join(_run([record for record in records if record["run"] == run]) for run in runs)


def _run(records: list[Record]) -> str:
    first = records[0]
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("python", "torch"))
    blocks = [
        f"Run {first['run']}: {first['device']}, {first['processor']} ({first['capability']}), {first['threads']} "
        f"threads, {versions}, code {first['revision']}"
    ]
    blocks += [_peers(records), _ceiling(records)]
    for what, batch in sorted({(r["what"], r["batch"]) for r in records if r["what"] in ("sampling", "training")}):
        chosen = [r for r in records if (r["what"], r.get("batch")) == (what, batch)]
        blocks.append(_comparison(what, batch, chosen, records))
    blocks += [_scaling(records), _steps(records), _profile(records), _missing(records)]
    return "\n\n".join(block for block in blocks if block)


def _table(header: Iterable[str], rows: list[list[Any]]) -> str:
    lines = [list(header), ["---"] * len(list(header)), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _peers(records: list[Record]) -> str:
    rows = [
        [
            NAMES.get(r["peer"], r["peer"]),
            f"{r['parameters'] / 1e6:.1f} M",
            f"{r['flops'] / 1e9:.2f}",
            "another network" if r["apart"] is None and r["peer"] != "ours" else f"{r['apart'] or 0:.0e}",
            r["about"],
        ]
        for r in records
        if r["what"] == "peer"
    ]
    return _table(["code", "parameters", "GFLOP an evaluation", "output apart from ours", "as measured"], rows)


def ceiling(records: list[Record]) -> dict[str, float]:
    """Return FLOP/s by dtype: the best round, since a ceiling is what can be had."""
    return {r["setting"]: 1 / min(r["seconds"]) for r in records if r["what"] == "ceiling"}


def _ceiling(records: list[Record]) -> str:
    values = ceiling(records)
    return "Matrix products, the best round: " + ", ".join(f"{k} {v / 1e12:.3g} TFLOP/s" for k, v in values.items())


def operations(what: str, record: Record, flops: int) -> int:
    """Return the operations of S evaluations of each image, or of a training step (backward costs twice forward)."""
    return record["batch"] * flops * (record["S"] if what == "sampling" else 3)


def _comparison(what: str, batch: int, chosen: list[Record], records: list[Record]) -> str:
    flops = {r["peer"]: r["flops"] for r in records if r["what"] == "peer"}
    most = ceiling(records)
    base = next((r for r in chosen if r["peer"] == "official"), chosen[0])
    rows = []
    for r in chosen:
        seconds = statistics.median(r["seconds"])
        rate = operations(what, r, flops[r["peer"]]) / seconds
        dtype = "bf16" if "bf16" in r["setting"] else "float32"
        rows.append(
            [
                NAMES.get(r["peer"], r["peer"]),
                r["setting"],
                f"{seconds * 1e3:,.1f}",
                f"{batch / seconds:,.2f}",
                speed_up(base["seconds"], r["seconds"]),
                f"{rate / 1e12:.3g}",
                f"{rate / most[dtype]:.0%}",
                "" if r["peak"] is None else f"{r['peak'] / 2**20:,.0f}",
                f"{r['first']:.0f}",
            ]
        )
    name = f"{NAMES.get(base['peer'], base['peer'])} {base['setting']}"
    header = ["code", "setting", "ms", "images/s", f"times {name}", "TFLOP/s", "of ceiling", "peak MiB", "first call s"]
    unit = f"{chosen[0]['S']} steps of sampling" if what == "sampling" else "A training step"
    title = f"{unit}, {batch} images, medians over {len(base['seconds'])} interleaved rounds (least to greatest ratio):"
    return "\n\n".join([title, _table(header, rows), *_verdict(what, chosen)])


def _verdict(what: str, chosen: list[Record]) -> list[str]:
    """Ours at its best against the others at theirs, and what that makes of the paper's table."""
    best: dict[str, Record] = {}
    for r in sorted(chosen, key=lambda r: statistics.median(r["seconds"]), reverse=True):
        best[r["peer"]] = r
    ours = best.pop("ours", None)
    if ours is None:
        return []
    lines = []
    if best:
        peer = min(best.values(), key=lambda r: statistics.median(r["seconds"]))
        ratio = speed_up(peer["seconds"], ours["seconds"])
        name = f"{NAMES.get(peer['peer'], peer['peer'])} ({peer['setting']})"
        lines.append(
            f"Ours at its best ({ours['setting']}) against the fastest peer at its best, {name}: {ratio} times."
        )
    if what == "sampling":
        evaluations = ours["batch"] * ours["S"] / statistics.median(ours["seconds"])
        hours = TABLE1_EVALUATIONS / evaluations / 3600
        lines.append(f"{evaluations:,.0f} evaluations/s; sampling for the paper's CIFAR-10 table: {hours:,.1f} h.")
    return lines


def _scaling(records: list[Record]) -> str:
    """How well a straight line tells the time, over S and over n."""
    lines = [r for r in records if r["what"] == "scaling"]
    if not lines:
        return ""
    # The part's name of a point is n=...,S=...
    found = {tuple(map(int, re.findall(r"\d+", r["peer"]))): statistics.median(r["seconds"]) for r in lines}
    setting, n = lines[0]["setting"], lines[0]["batch"]
    over_S = {point[1]: seconds for point, seconds in found.items() if point[0] == n}
    over_n = {point[0]: seconds for point, seconds in found.items() if point[1] == 2}
    blocks = [_line("steps S", f"{n} images, {setting}", over_S), _line("images n", f"2 steps, {setting}", over_n)]
    return "\n\n".join(blocks)


def _line(name: str, how: str, seconds: dict[int, float]) -> str:
    slope, intercept = statistics.linear_regression(list(seconds), list(seconds.values()))
    fit = {x: intercept + slope * x for x in seconds}
    off = max(abs(fit[x] / seconds[x] - 1) for x in seconds)
    terms = f"{round(intercept * 1e3):,} ms + {round(slope * 1e3):,} ms each"
    rows = [[x, f"{seconds[x] * 1e3:,.0f}", f"{fit[x] * 1e3:,.0f}"] for x in sorted(seconds)]
    title = f"Time over the number of {name}, {how}: {terms}, off by {off:.1%} at most:"
    return f"{title}\n\n" + _table([name, "ms", "line"], rows)


def _steps(records: list[Record]) -> str:
    lines = [r for r in records if r["what"] == "step"]
    if not lines:
        return ""
    of_a_step = ("network", "arithmetic", "noise")
    step = sum(statistics.median(r["seconds"]) for r in lines if r["peer"] in of_a_step)
    rows = []
    for r in lines:
        seconds = statistics.median(r["seconds"])
        share = f"{seconds / step:.1%}" if r["peer"] in of_a_step else f"{seconds / step:.1%}, once"
        rows.append([r["peer"], f"{seconds * 1e3:.3f}", f"{seconds / r['batch'] * 1e6:.1f}", share])
    title = f"One step at η = 1 by part, {lines[0]['batch']} images, {lines[0]['setting']}:"
    return f"{title}\n\n" + _table(["part", "ms", "µs an image", "of a step"], rows)


def _profile(records: list[Record]) -> str:
    blocks = []
    for r in records:
        if r["what"] == "profile":
            rows = [[f"`{name[:60]}`", count, f"{share:.1%}"] for name, count, share in r["rows"]]
            title = f"Top ten operations of an evaluation of {r['batch']} images, {r['setting']}:"
            blocks.append(f"{title}\n\n" + _table(["operation", "calls", "time"], rows))
    return "\n\n".join(blocks)


def _missing(records: list[Record]) -> str:
    return "\n".join(f"Missing: {r['peer']} ({r['reason']})" for r in records if r["what"] == "missing")
