"""Write the README's result tables from records, so that no number in it is typed.

    python scripts/update_results.py                                    # rewrite the tables from docs/results/*.jsonl
    python scripts/update_results.py digits=outputs/evaluate/digits     # first take over the records of a sweep

The tables stand between `<!-- results: NAME -->` and `<!-- end of results -->`.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def render(name: str) -> str:
    """Return the Markdown of the records docs/results/NAME.jsonl."""
    from ddim.evaluation.records import RecordFile
    from ddim.evaluation.tables import build_tables

    tables = build_tables(RecordFile(RESULTS / f"{name}.jsonl").read())
    return "".join(f"\n{table.markdown()}\n\n<sub>{table.title()}</sub>\n\n" for table in tables)


def fill(text: str) -> str:
    """Return `text` with every block of results filled anew."""
    return BLOCK.sub(lambda block: block[1] + render(block[2]) + block[3], text)


def main() -> None:
    """Take over records if asked, then rewrite the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", metavar="NAME=FOLDER")
    for name, _, folder in (sweep.partition("=") for sweep in parser.parse_args().sweeps):
        records = Path(folder) / "records.jsonl"
        if not folder or not records.is_file():
            sys.exit(f"error: there are no records {records}; give NAME=FOLDER with the folder of a finished sweep.")
        RESULTS.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(records, RESULTS / f"{name}.jsonl")
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text()))


if __name__ == "__main__":
    main()
