"""Write a checkpoint in the layout of another code base.

python scripts/export_checkpoint.py checkpoint=PATH output_dir=FOLDER                       # a diffusers folder
python scripts/export_checkpoint.py checkpoint=PATH output_dir=FOLDER layout=safetensors    # or layout=flat
python scripts/export_checkpoint.py checkpoint=PATH output_dir=FOLDER push=USER/NAME              # also to the hub
python scripts/export_checkpoint.py --help
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _cli import entry
from _last_words import command_line, of_model

if TYPE_CHECKING:
    from ddim.checkpoints.convert.model_card import Result


def main(config: dict[str, Any]) -> None:
    """Run the export; print the files that were written, and where they were pushed."""
    from ddim.checkpoints.convert.exporting import FILES, ExportSpec, export_checkpoint
    from ddim.checkpoints.convert.hub import push_files
    from ddim.config import build

    spec = build(ExportSpec, config, "")
    paths, warnings = export_checkpoint(spec, lambda weights_hash: results(spec.records, weights_hash))
    for path in paths:
        print(path)
    for warning in warnings:
        print(f"warning: {warning}.", file=sys.stderr)
    if spec.push is not None:
        print(push_files(spec.push, Path(spec.output_dir), FILES[spec.layout], spec.private))
    if spec.layout == "safetensors":
        print(command_line("sample", f"checkpoint={paths[0]}", *of_model(spec)[1:]))
    if spec.layout == "diffusers" and not warnings:
        program = f"from diffusers import DDIMPipeline as P; P.from_pretrained({spec.output_dir!r})().images[0].show()"
        print(f"next: {shlex.join(['python', '-c', program])}")


def results(records: str | None, weights_hash: str) -> "Sequence[Result]":
    """Return the results of these weights in a records file; () without a file."""
    if records is None:
        return ()
    from ddim.checkpoints.convert.model_card import Result
    from ddim.errors import UserError
    from ddim.io import check_regular_file
    from ddim.results.report import build_tables
    from ddim.results.schema import evaluation_records

    check_regular_file(Path(records), "file of records")
    if not Path(records).is_file():
        raise UserError(f"there is no records file {records}; evaluate.py writes one, records.jsonl.")
    measured = evaluation_records(Path(records)).read()
    matching = [record for record in measured if record.get("model", {}).get("weights_hash") == weights_hash]
    if not matching:
        raise UserError(f"{records} has no record of these weights; evaluate them first, or leave records out.")
    return [
        Result(
            table.metric, table.protocol["reference"]["name"], f"{row} {table.column}={column}", value, table.title()
        )
        for table in build_tables(matching)
        for row in table.rows
        for column in table.columns
        if (value := table.value(row, column)) is not None
    ]


if __name__ == "__main__":
    entry(main, "export_checkpoint")
