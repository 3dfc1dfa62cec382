"""Markdown tables of benchmark records, and the plan at scale; every number is computed here. Standard library only.

Records store a code base under the key `peer`, older ones of training options under `variant`.
"""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]
# Of the plan, on any number of GPUs. Two evaluations of the CIFAR-10 network, as measured, for Inception's features.
FEATURES = 2.5e10  # operations for an image
METRICS = 15.0  # seconds of one process for the metrics of an evaluation, which runs beside the sampling of others
LAUNCHES = 0.070  # seconds of a training step that no GPU shortens: measured on an H100 (ch=64) and an H200 (ch=128)
NODE, NODES = 2e11, 4e10  # bytes/s between GPUs of a machine (up to 8) and of several (assumed)
GPUS = (1, 8, 64)
LOOPS = ("channels_last+convolutions", "channels_last+norms", "channels_last+winograd")  # settings with C++ loops


def speed_up(base: Sequence[float], seconds: Sequence[float]) -> str:
    """Return how many times faster than `base`: median, least and greatest ratio of the same round."""
    ratios = [b / s for b, s in zip(base, seconds, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def render(records: list[Record]) -> str | None:
    """Return the tables of records of a benchmark for a document, None for other records."""
    has_loops = any(record.get("setting") in LOOPS[:2] for record in records)
    what = loops if has_loops else summary
    kinds = {"variant": training_options, "what": what, "precision": precision_tables, "plan": plan}
    for key, tables in kinds.items():
        if all(key in record for record in records):
            return f"\n{tables(records)}\n\n"
    return None


def table(header: str, rows: Iterable[Iterable[Any]]) -> str:
    """Return a Markdown table; the names of the columns are separated by |."""
    names = header.split("|")
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(str(entry).strip() for entry in line) + " |" for line in lines)


def runs(records: list[Record]) -> list[list[Record]]:
    """Return the records of each run, oldest first."""
    return [[r for r in records if r["run"] == run] for run in dict.fromkeys(r["run"] for r in records)]


def groups(run: list[Record]) -> list[list[Record]]:
    """Return what was timed in the same rounds: the sampling of each batch size, and the training."""
    kinds = sorted({(r["what"], r["batch"]) for r in run if r["what"] in ("sampling", "training")})
    return [[r for r in run if (r["what"], r.get("batch")) == kind] for kind in kinds]


def summary(records: list[Record]) -> str:
    """Return one table over all runs: a row for each measurement of ours, of the official code and of others."""
    rows = []
    for run in runs(records):
        for group in groups(run):
            best = {r["peer"]: r for r in sorted(group, key=_median, reverse=True)}
            official = next((r for r in group if r["peer"] == "official"), None)
            if official is None or "ours" not in best:
                continue
            ours, default = best.pop("ours"), next(r for r in group if r["peer"] == "ours")
            other = min(best.values(), key=_median)
            images, share = _throughput(ours, run)
            row = [_throughput(r, run)[0] for r in (official, default)] + [f"{images} ({ours['setting']})", share]
            row.append(f"{_throughput(other, run)[0]} ({_name(other)}, {other['setting']})")
            row += [speed_up(r["seconds"], ours["seconds"]) for r in (official, other)]
            rows.append([_work(ours), ours["batch"], *row, len(ours["seconds"])])
    header = (
        "work|batch|official|ours|ours, best setting|of ceiling|fastest other at its best|best to official|"
        "best to fastest other|rounds"
    )
    return f"Images/s; {_machine(records[0])}:\n\n{table(header, rows)}"


def loops(records: list[Record]) -> str:
    """Return the table of the C++ loops, each kind alone and both, compared with the fastest of torch's own options."""
    rows = []
    for run in runs(records):
        for group in groups(run):
            ours = {r["setting"]: r for r in group if r["peer"] == "ours"}
            torchs = min((r for setting, r in ours.items() if setting not in LOOPS), key=_median)
            gains = [speed_up(torchs["seconds"], ours[name]["seconds"]) if name in ours else "" for name in LOOPS]
            base = f"{_median(torchs):.3g} ({torchs['setting']})"
            rows.append([torchs["network"], _work(torchs), torchs["batch"], base, *gains, len(torchs["seconds"])])
    header = "network|work|batch|seconds, best of torch|convolutions|norms|both|rounds"
    return f"Times as fast; {_machine(records[0])}:\n\n{table(header, rows)}"


def report(records: list[Record]) -> str:
    """Return the summary, and for each run a table of all that was timed; the base is official, or the first."""
    header, blocks = "work|batch|code|setting|seconds|images/s|of ceiling|times the base|rounds", [summary(records)]
    for run in runs(records):
        rows = []
        for group in groups(run):
            base = next((r for r in group if r["peer"] == "official"), group[0])["seconds"]
            for r in group:
                speed = [f"{_median(r):.4g}", *_throughput(r, run), speed_up(base, r["seconds"]), len(r["seconds"])]
                rows.append([_work(r), r["batch"], _name(r), r["setting"], *speed])
        blocks.append(f"Run {run[0]['run']}: {_machine(run[0])}:\n\n{table(header, rows)}")
    return "\n\n".join(blocks)


def training_options(records: list[Record]) -> str:
    """Return the table of options of a training step: medians, and those of the rounds' ratios to the base."""
    rows = []
    for r in records:
        if r["variant"] != r["base"]:
            ratio = statistics.median(a / b for a, b in zip(r["seconds"], r["base_seconds"], strict=True))
            where = f"{r['device']}, {r['threads']} thread{'s' if r['threads'] > 1 else ''}"
            times = [f"{_median(r):.3g}", f"{ratio:.3f}", len(r["seconds"]), r["batch"], r["clock"]]
            rows.append([r["variant"], r["base"], *times, where, r["revision"][:8]])
    return table("step|compared with|seconds|ratio|rounds|batch|clock|on|code", rows)


def precision_tables(records: list[Record]) -> str:
    """Return a table for each run: pixel differences in 0..255, and the effect on the distance."""
    header = "precision|seconds|largest difference|mean difference|distance to float32|to other seeds|moved by, of it"
    blocks = []
    for run in runs(records):
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
        blocks.append(f"{title}\n\n{table(header, rows)}")
    return "\n\n".join(blocks)


def plan(records: list[Record]) -> str:
    """Return the table of hours and dollars of a work on some numbers of GPUs, from a rate and a price."""
    rows = []
    for r in records:
        times = [expected(r, gpus) for gpus in GPUS]
        costs = [f"{h:,.1f} h, ${h * gpus * r['dollars']:,.0f}" for gpus, (h, _) in zip(GPUS, times, strict=True)]
        rows.append([r["plan"], *costs, ", ".join(limit for _, limit in times)])
    r = records[0]
    header = "work|" + "|".join(f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS) + "|what limits each"
    rates = f"{r['rate'] / 1e12:,.3g} TFLOP/s sampling and {r['training_rate'] / 1e12:,.3g} training on each GPU"
    return f"{rates} ({r['rate_from']}), ${r['dollars']:g} for an hour of one:\n\n{table(header, rows)}"


def expected(r: Record, gpus: int) -> tuple[float, str]:
    """Return the hours of a work on so many GPUs, and what takes most of them.

    A table is `evaluations` of the network, with features and metrics of `jobs` of `images` each. A training is `steps`
    of a `batch`, of which each GPU has a share; an evaluation and its gradients are three evaluations.
    """
    if "steps" in r:
        parts = {"network": 3 * r["batch"] * r["flops"] / r["training_rate"] / gpus, "launches": LAUNCHES}
        # All-reduce in a ring, float32, after the last gradient.
        bandwidth = NODE if gpus <= 8 else NODES
        gradients = 2 * (gpus - 1) / gpus * 4 * r["parameters"] / bandwidth
        seconds = r["steps"] * (max(parts.values()) + gradients)
        parts["gradients"] = gradients
    else:
        parts = {"network": r["evaluations"] * r["flops"] / r["rate"] / gpus}
        parts["features"] = r["jobs"] * r["images"] * FEATURES / r["rate"] / gpus
        metrics = METRICS if r["jobs"] else 0.0
        seconds = max(sum(parts.values()), r["jobs"] * metrics) + metrics
        parts["metrics"] = r["jobs"] * metrics
    return seconds / 3600, max(parts, key=lambda name: parts[name])


def rates(records: list[Record]) -> dict[str, Any]:
    """Return the best rates of ours in records of speed.py, operations/s: of sampling, and of training."""
    best: dict[str, float] = {}
    for run in runs(records):
        flops = {r["peer"]: r["flops"] for r in run if r["what"] == "peer"}
        for r in run:
            if r["what"] in ("sampling", "training") and r["peer"] == "ours":
                rate = r["batch"] * r.get("S", 3) * flops["ours"] / _median(r)
                best[r["what"]] = max(rate, best.get(r["what"], 0.0))
    return {"rate": best["sampling"], "training_rate": best["training"]}


def _throughput(r: Record, run: list[Record]) -> tuple[str, str]:
    """Images/s; share of the best round of the ceiling, where a training step takes three evaluations."""
    (flops,) = (line["flops"] for line in run if line["what"] == "peer" and line["peer"] == r["peer"])
    dtype = "bf16" if "bf16" in r["setting"] else "float32"
    (ceiling,) = (1 / min(line["seconds"]) for line in run if (line["what"], line.get("setting")) == ("ceiling", dtype))
    rate = r["batch"] * flops * r.get("S", 3) / _median(r)
    return f"{r['batch'] / _median(r):,.2f}", f"{rate / ceiling:.0%}"


def _work(r: Record) -> str:
    return f"{r['S']} steps" if "S" in r else "training step"


def _machine(r: Record) -> str:
    versions = f"python {r['versions']['python']}, torch {r['versions']['torch']}, code {r['revision']}"
    clock = ", processor time" if r.get("clock") == "processor" else ""
    return f"{r['device']}, {r['processor']} ({r['capability']}), {r['threads']} threads{clock}, {versions}"


def _name(r: Record) -> str:
    return "denoising-diffusion-pytorch" if r["peer"] == "ddpm_pytorch" else str(r["peer"])


def _median(r: Record) -> float:
    return statistics.median(r["seconds"])
