"""Write the result tables of the documents from records, so that no number in them is typed.

    python scripts/update_results.py                                    # rewrite the tables from docs/results/*.jsonl
    python scripts/update_results.py digits=outputs/evaluate/digits     # first take over the records of a sweep
    python scripts/update_results.py training_speed=outputs/benchmark   # or those of benchmark_training.py
    python scripts/update_results.py speed=outputs/benchmark/speed.jsonl precision=outputs/benchmark/precision.jsonl

The tables stand between `<!-- results: NAME -->` and `<!-- end of results -->`.
"""

import argparse
import re
import shutil
import statistics
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))  # for the scripts that know how to show their records
RESULTS = ROOT / "docs" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "training_speed.md", ROOT / "docs" / "performance.md")
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def render(name: str) -> str:
    """Return the Markdown of the records docs/results/NAME.jsonl."""
    from ddim.results.records import RecordFile
    from ddim.results.report import build_tables

    records = RecordFile(RESULTS / f"{name}.jsonl").read()
    if not records:
        sys.exit(f"error: there are no records docs/results/{name}.jsonl, which a document asks for.")
    if all("variant" in record for record in records):
        return speed_table(records)
    if all("what" in record for record in records):
        return f"\n{import_module('_benchmark_table').markdown(records)}\n\n"
    if all("precision" in record for record in records):
        return f"{import_module('precision').table(records)}\n\n"
    return "".join(f"\n{table.markdown()}\n\n<sub>{table.title()}</sub>\n\n" for table in build_tables(records))


def speed_table(records: list[dict[str, Any]]) -> str:
    """Return the Markdown of records of benchmark_training.py: medians over the rounds, and of the rounds' ratios."""
    lines = ["", "| step | compared with | seconds | ratio | rounds | batch | clock | on | code |", "|---" * 9 + "|"]
    for r in records:
        if r["variant"] == r["base"]:
            continue
        ratio = statistics.median(a / b for a, b in zip(r["seconds"], r["base_seconds"], strict=True))
        times = f"{statistics.median(r['seconds']):.3g} | {ratio:.3f} | {len(r['seconds'])}"
        where = f"{r['device']}, {r['threads']} thread{'s' if r['threads'] > 1 else ''}"
        how = f"{r['batch']} | {r['clock']} | {where} | {r['revision'][:8]}"
        lines.append(f"| {r['variant']} | {r['base']} | {times} | {how} |")
    return "\n".join([*lines, "", ""])


def fill(text: str) -> str:
    """Return `text` with every block of results filled anew."""
    return BLOCK.sub(lambda block: block[1] + render(block[2]) + block[3], text)


def main() -> None:
    """Take over records if asked, then rewrite the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", metavar="NAME=PATH", help="a folder with records.jsonl, or such a file")
    for name, _, path in (sweep.partition("=") for sweep in parser.parse_args().sweeps):
        records = Path(path) if path.endswith(".jsonl") else Path(path) / "records.jsonl"
        if not path or not records.is_file():
            sys.exit(f"error: there are no records {records}; give NAME=PATH with the folder of a finished sweep.")
        RESULTS.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(records, RESULTS / f"{name}.jsonl")
    for document in DOCUMENTS:
        document.write_text(fill(document.read_text()))


if __name__ == "__main__":
    main()
