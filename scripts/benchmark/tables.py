"""Markdown from the records of the benchmarks; every number is computed here. Standard library only.

Records store a code base under the key `peer`, older ones of training options under `variant`.
"""

import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Record = dict[str, Any]
TABLE1_EVALUATIONS = 50_000 * 5 * (10 + 20 + 50 + 100 + 1000)  # of the paper's CIFAR-10 table: five rows, five columns
NAMES = {"ddpm_pytorch": "denoising-diffusion-pytorch"}


class Ratio(NamedTuple):
    """The median over rounds, the least and the greatest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def speed_up(base: Sequence[float], seconds: Sequence[float]) -> Ratio:
    """Return how many times faster than `base`: one ratio per round, in which both were measured."""
    ratios = [b / s for b, s in zip(base, seconds, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def render(records: list[Record]) -> str | None:
    """Return the tables of records of a benchmark for a document, None for other records."""
    for key, tables in (("variant", options_table), ("what", summary), ("precision", precision_tables)):
        if all(key in record for record in records):
            return tables(records)
    return None


def table(header: str, rows: Iterable[Iterable[Any]]) -> str:
    """Return a Markdown table; the header's names are separated by |."""
    names = header.split("|")
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(str(entry).strip() for entry in line) + " |" for line in lines)


def runs(records: list[Record]) -> dict[str, list[Record]]:
    """Return the records of each run, oldest first."""
    return {run: [r for r in records if r["run"] == run] for run in dict.fromkeys(r["run"] for r in records)}


def markdown(records: list[Record]) -> str:
    """Return all tables of all runs."""
    return "\n\n".join(_run(records) for records in runs(records).values())


def summary(records: list[Record]) -> str:
    """Return one table over all runs: a row for each measurement of several code bases."""
    rows = []
    for run in runs(records).values():
        for what, batch, chosen in _comparisons(run):
            best = _fastest_settings(chosen)
            ours = best.pop("ours", None)
            base = next((r for r in chosen if r["peer"] == "official"), None)
            if ours is None or base is None:
                continue
            other = min(best.values(), key=_median)
            default = next(r for r in chosen if r["peer"] == "ours")
            work = f"{base['S']} steps" if what == "sampling" else "training step"
            share = _rate(what, ours, run) / ceiling(run)["bf16" if "bf16" in ours["setting"] else "float32"]
            images = [f"{batch / _median(r):,.2f}" for r in (base, default, ours)]
            setting = f"{images.pop()} ({ours['setting']})"
            fastest = f"{batch / _median(other):,.2f} ({_name(other)}, {other['setting']})"
            ratios = [speed_up(r["seconds"], ours["seconds"]) for r in (base, other)]
            rows.append([work, batch, *images, setting, f"{share:.0%}", fastest, *ratios, len(ours["seconds"])])
    header = (
        "work|batch|official|ours|ours, best setting|of ceiling|fastest other at its best|best to official|"
        "best to fastest other|rounds"
    )
    first = next(iter(runs(records).values()))
    return f"\nImages/s; {_machine(first[0])}:\n\n{table(header, rows)}\n\n"


def options_table(records: list[Record]) -> str:
    """Return the table of training options: medians over the rounds, and of the rounds' ratios to the base."""
    rows = []
    for r in records:
        if r["variant"] != r["base"]:
            ratio = _ratio(r)
            where = f"{r['device']}, {r['threads']} thread{'s' if r['threads'] > 1 else ''}"
            times = [f"{_median(r):.3g}", f"{ratio:.3f}", len(r["seconds"]), r["batch"], r["clock"]]
            rows.append([r["variant"], r["base"], *times, where, r["revision"][:8]])
    return f"\n{table('step|compared with|seconds|ratio|rounds|batch|clock|on|code', rows)}\n\n"


def _ratio(r: Record) -> float:
    return statistics.median(a / b for a, b in zip(r["seconds"], r["base_seconds"], strict=True))


def precision_tables(records: list[Record]) -> str:
    """Return a table for each run: pixel differences in 0..255, and the effect on the distance."""
    header = "precision|seconds|largest difference|mean difference|distance to float32|to other seeds|moved by, of it"
    blocks = []
    for run in runs(records).values():
        base = next(r for r in run if r["precision"] == "float32")
        title = (
            f"{base['n']:,} images, S={base['S']}, η={base['eta']}, {base['extractor']}, weights "
            f"{base['weights_hash'][:8]}, {base['device']}, code {base['revision']}:"
        )
        rows = []
        for r in run:
            moved = abs(r["to_fresh"] - base["to_fresh"]) / base["to_fresh"]
            pixels = [f"{r['seconds']:.1f}", r["largest"], f"{r['mean']:.4f}"]
            rows.append([r["precision"], *pixels, f"{r['to_float32']:.2e}", f"{r['to_fresh']:.4f}", f"{moved:.2%}"])
        blocks.append(f"\n{title}\n\n{table(header, rows)}")
    return "\n".join(blocks) + "\n\n"


def ceiling(records: list[Record]) -> dict[str, float]:
    """Return FLOP/s by dtype: the best round, since a ceiling is the most that is possible."""
    return {r["setting"]: 1 / min(r["seconds"]) for r in records if r["what"] == "ceiling"}


def _run(records: list[Record]) -> str:
    matmul = ", ".join(f"{name} {value / 1e12:.3g} TFLOP/s" for name, value in ceiling(records).items())
    blocks = [f"Run {records[0]['run']}: {_machine(records[0])}", _baselines(records)]
    blocks.append(f"Matrix products, the best round: {matmul}")
    blocks += [_comparison(what, batch, chosen, records) for what, batch, chosen in _comparisons(records)]
    blocks += [_options(records), _scaling(records), _steps(records), _profile(records)]
    blocks += [f"Missing: {r['peer']} ({r['reason']})" for r in records if r["what"] == "missing"]
    return "\n\n".join(block for block in blocks if block)


def _machine(r: Record) -> str:
    versions = ", ".join(f"{name} {r['versions'][name]}" for name in ("python", "torch"))
    return (
        f"{r['device']}, {r['processor']} ({r['capability']}), {r['threads']} threads, {versions}, code {r['revision']}"
    )


def _name(r: Record) -> str:
    return NAMES.get(r["peer"]) or str(r["peer"])


def _median(r: Record) -> float:
    return statistics.median(r["seconds"])


def _baselines(records: list[Record]) -> str:
    rows = []
    for r in records:
        if r["what"] == "peer":
            difference = "another network" if r["apart"] is None and r["peer"] != "ours" else f"{r['apart'] or 0:.0e}"
            rows.append([_name(r), f"{r['parameters'] / 1e6:.1f} M", f"{r['flops'] / 1e9:.2f}", difference, r["about"]])
    return table("code|parameters|GFLOP per evaluation|difference to ours|measured", rows)


def _comparisons(records: list[Record]) -> list[tuple[str, int, list[Record]]]:
    keys = sorted({(r["what"], r["batch"]) for r in records if r["what"] in ("sampling", "training")})
    return [(*key, [r for r in records if (r["what"], r.get("batch")) == key]) for key in keys]


def _rate(what: str, r: Record, records: list[Record]) -> float:
    """FLOP/s of S evaluations of each image, or of a training step: forward, and backward at twice its cost."""
    (flops,) = (peer["flops"] for peer in records if peer["what"] == "peer" and peer["peer"] == r["peer"])
    return float(r["batch"] * flops * (r["S"] if what == "sampling" else 3) / _median(r))


def _comparison(what: str, batch: int, chosen: list[Record], records: list[Record]) -> str:
    base = next((r for r in chosen if r["peer"] == "official"), chosen[0])
    rows = []
    for r in chosen:
        seconds, rate = _median(r), _rate(what, r, records)
        share = rate / ceiling(records)["bf16" if "bf16" in r["setting"] else "float32"]
        peak = "" if r["peak"] is None else f"{r['peak'] / 2**20:,.0f}"
        speed = [f"{seconds * 1e3:,.1f}", f"{batch / seconds:,.2f}", speed_up(base["seconds"], r["seconds"])]
        rows.append([_name(r), r["setting"], *speed, f"{rate / 1e12:.3g}", f"{share:.0%}", peak, f"{r['first']:.0f}"])
    header = f"code|setting|ms|images/s|times {_name(base)} {base['setting']}|TFLOP/s|of ceiling|peak MiB|first call s"
    work = f"{chosen[0]['S']} steps of sampling" if what == "sampling" else "A training step"
    title = f"{work}, {batch} images, medians over {len(base['seconds'])} interleaved rounds (least to greatest ratio):"
    return "\n\n".join([title, table(header, rows), *_verdict(what, chosen)])


def _fastest_settings(chosen: list[Record]) -> dict[str, Record]:
    return {r["peer"]: r for r in sorted(chosen, key=_median, reverse=True)}


def _verdict(what: str, chosen: list[Record]) -> list[str]:
    """Ours at its best against the fastest other, and the time of the paper's table."""
    best = _fastest_settings(chosen)
    ours = best.pop("ours", None)
    lines = []
    if ours and best:
        other = min(best.values(), key=_median)
        ratio = speed_up(other["seconds"], ours["seconds"])
        name = f"{_name(other)} ({other['setting']})"
        lines.append(f"Ours at its best ({ours['setting']}) against the fastest baseline, {name}: {ratio} times.")
    if ours and what == "sampling":
        per_second = ours["batch"] * ours["S"] / _median(ours)
        hours = TABLE1_EVALUATIONS / per_second / 3600
        lines.append(f"{per_second:,.0f} evaluations/s; sampling for the paper's CIFAR-10 table: {hours:,.1f} h.")
    return lines


def _options(records: list[Record]) -> str:
    lines = [r for r in records if r["what"] == "training_options"]
    if not lines:
        return ""
    base = lines[0]
    rows = [[r["peer"], r["setting"], f"{_median(r):.3g}", speed_up(base["seconds"], r["seconds"])] for r in lines]
    title = f"Options of a training step, {base['batch']} images:"
    return f"{title}\n\n" + table(f"step|setting|seconds|times {base['peer']}", rows)


def _scaling(records: list[Record]) -> str:
    """How well a straight line fits the time, over S and over n; the `peer` of a point is n=...,S=..."""
    lines = [r for r in records if r["what"] == "scaling"]
    if not lines:
        return ""
    points = {tuple(map(int, re.findall(r"\d+", r["peer"]))): _median(r) for r in lines}
    setting, n = lines[0]["setting"], lines[0]["batch"]
    over_S = {point[1]: seconds for point, seconds in points.items() if point[0] == n}
    over_n = {point[0]: seconds for point, seconds in points.items() if point[1] == 2}
    blocks = [_line("steps S", f"{n} images, {setting}", over_S), _line("images n", f"2 steps, {setting}", over_n)]
    return "\n\n".join(block for block in blocks if block)


def _line(name: str, setup: str, seconds: dict[int, float]) -> str:
    if len(seconds) < 2:  # the time was up
        return ""
    slope, intercept = statistics.linear_regression(list(seconds), list(seconds.values()))
    fit = {x: intercept + slope * x for x in seconds}
    error = max(abs(fit[x] / seconds[x] - 1) for x in seconds)
    terms = f"{round(intercept * 1e3):,} ms + {round(slope * 1e3):,} ms each"
    rows = [[x, f"{seconds[x] * 1e3:,.0f}", f"{fit[x] * 1e3:,.0f}"] for x in sorted(seconds)]
    title = f"Time over the number of {name}, {setup}: {terms}, off by {error:.1%} at most:"
    return f"{title}\n\n" + table(f"{name}|ms|line", rows)


def _steps(records: list[Record]) -> str:
    lines = [r for r in records if r["what"] == "step"]
    if not lines:
        return ""
    every_step = ("network", "arithmetic", "noise")
    total = sum(_median(r) for r in lines if r["peer"] in every_step)
    rows = []
    for r in lines:
        share = f"{_median(r) / total:.1%}{'' if r['peer'] in every_step else ', once'}"
        rows.append([r["peer"], f"{_median(r) * 1e3:.3f}", f"{_median(r) / r['batch'] * 1e6:.1f}", share])
    title = f"Parts of one step at η = 1, {lines[0]['batch']} images, {lines[0]['setting']}:"
    return f"{title}\n\n" + table("part|ms|µs per image|of a step", rows)


def _profile(records: list[Record]) -> str:
    blocks = []
    for r in records:
        if r["what"] == "profile":
            rows = [[f"`{name[:60]}`", count, f"{share:.1%}"] for name, count, share in r["rows"]]
            title = f"Top ten operations of an evaluation of {r['batch']} images, {r['setting']}:"
            blocks.append(f"{title}\n\n" + table("operation|calls|time", rows))
    return "\n\n".join(blocks)
