"""Write the result tables of the documents from records, so that no number in them is typed.

    python scripts/tools/update_results.py                                  # the tables of docs/results/*.jsonl
    python scripts/tools/update_results.py digits=outputs/evaluate/digits   # first copy the records of a sweep
    python scripts/tools/update_results.py speed=outputs/benchmark/speed.jsonl
    python scripts/tools/update_results.py training=outputs/train/NAME      # the curves of a training

The tables stand between `<!-- results: NAME -->` and `<!-- end of results -->`, with `NAME/fd` one metric's.
"""

import argparse
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

from ddim.checkpoints.model import RECIPE, read_checkpoint
from ddim.checkpoints.spec import KEY
from ddim.results.escape import escape_markdown
from ddim.results.plots import DPI, plot
from ddim.results.records import Record, RecordFile, provenance
from ddim.results.report import build_tables
from ddim.results.runs import Run, read_training
from ddim.results.table import number_text
from ddim.results.training_plots import checkpoint_curves, plot_checkpoints, plot_training

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(<!-- results: (\w+)(?:/(\w+))? -->\n).*?(<!-- end of results -->)", re.DOTALL)
BENCHMARK_TABLES = runpy.run_path(str(ROOT / "scripts" / "benchmark" / "tables.py"))["render"]


def render(name: str, metric: str | None = None) -> str:
    """Return the Markdown of the records docs/results/NAME.jsonl, of all their metrics or of one."""
    records = RecordFile(RESULTS / f"{name}.jsonl").read()
    if not records:
        sys.exit(f"error: there are no records docs/results/{name}.jsonl, which a document includes.")
    if (text := BENCHMARK_TABLES(records)) is not None:
        return str(text)
    if "curves" in records[0]:
        return f"\n{training_table(records[0])}\n\n"
    tables = [table for table in build_tables(records) if metric is None or table.metric.startswith(f"{metric}_")]
    if not tables:
        sys.exit(f"error: docs/results/{name}.jsonl has no metric {metric}, which a document includes.")
    return "".join(f"\n{table.markdown()}\n\n<sub>{escape_markdown(table.title())}</sub>\n\n" for table in tables)


def training_table(record: Record) -> str:
    """Return the losses of a training at ten of its logged steps and where one was logged, and where it was stopped."""
    curves = {name: dict(points) for name, points in record["curves"].items()}
    spread = [[*points][:: -(-len(points) // 10)] for points in curves.values()]  # at most ten of each curve
    shown = sorted({step for steps in spread for step in steps})
    lines = [["step", *(f"{step:,}" for step in shown)], ["---"] * (1 + len(shown))]
    lines += [[name, *(number_text(p[s]) if s in p else "" for s in shown)] for name, p in curves.items()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    stops = ", ".join(f"{step:,}" for step in record["stops"]) or "none"
    return f"{table}\n\n<sub>{record['training']}; steps at which it was stopped and went on later: {stops}</sub>"


def of_training(folder: Path) -> Record:
    """Return the curves of the training in a folder, and what it was."""
    curves, stops = read_training(folder)
    if not curves:
        sys.exit(f"error: {folder} holds no training that has logged a loss.")
    checkpoint = read_checkpoint(folder / "checkpoints" / "last.ckpt")
    recipe = {"recipe": checkpoint[KEY][RECIPE], "step": checkpoint["global_step"]}
    return {"training": folder.name, **recipe, "curves": curves, "stops": stops, **provenance()}


def draw(name: str) -> None:
    """Write the plot docs/results/NAME.png where a document shows it."""
    if any(f"results/{name}.png" in document.read_text(encoding="utf-8") for document in DOCUMENTS):
        records = RecordFile(RESULTS / f"{name}.jsonl").read()
        if "curves" in records[0]:
            run = Run(records[0]["training"], "", (), records[0]["curves"], tuple(records[0]["stops"]))
            plot_training([run]).savefig(RESULTS / f"{name}.png", dpi=DPI)
            return
        tables = build_tables(records)
        of_first = [table for table in tables if table.metric == tables[0].metric]
        if len(of_first) != 1:
            sys.exit(f"error: {name} has {len(of_first)} tables, and a document shows its one plot results/{name}.png.")
        (table,) = of_first
        curves = checkpoint_curves(table)
        figure = plot(table) if curves is None else plot_checkpoints(table, curves)
        figure.savefig(RESULTS / f"{name}.png", dpi=DPI)


def fill(text: str) -> str:
    """Return `text` with every block of results rendered again."""
    return BLOCK.sub(lambda block: block[1] + render(block[2], block[3]) + block[4], text)


def main() -> None:
    """Copy the given records and draw their plots, then rewrite the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sweeps", nargs="*", metavar="NAME=PATH", help="a folder with records.jsonl, such a file, or a run"
    )
    for name, _, path in (sweep.partition("=") for sweep in parser.parse_args().sweeps):
        RESULTS.mkdir(parents=True, exist_ok=True)
        records = Path(path) if path.endswith(".jsonl") else Path(path) / "records.jsonl"
        if path and (Path(path) / "csv").is_dir():
            (RESULTS / f"{name}.jsonl").write_text(json.dumps(of_training(Path(path))) + "\n", encoding="utf-8")
        elif not path or not records.is_file():
            sys.exit(f"error: there are no records {records}; give NAME=PATH with the folder of a finished sweep.")
        else:
            shutil.copyfile(records, RESULTS / f"{name}.jsonl")
        draw(name)
    for document in DOCUMENTS:
        document.write_text(fill(document.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
