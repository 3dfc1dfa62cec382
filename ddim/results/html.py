"""The report as one self-contained HTML page: no scripts, no other files, no network."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from ddim.results.plots import Timing
from ddim.results.protocol import distinct
from ddim.results.records import Record, revisions
from ddim.results.runs import Run
from ddim.results.table import Table, row_order
from ddim.results.templates import load_template

MAX_BYTES = 400_000  # a larger picture is reduced before it goes into the page
MAX_SIDE = 1024  # pixels of a reduced picture
MAX_GRIDS = 100  # on the page


def render_page(
    tables: Sequence[tuple[Table, Path | None]],
    timings: Sequence[tuple[Timing, Path]],
    records: Sequence[Record],
    folder: Path,
    command: str | None,
    failures: Sequence[tuple[str, str]],
    impossible: Sequence[tuple[str, str]] = (),
    runs: Sequence[Run] = (),
    training_plots: Sequence[tuple[Path, str]] = (),
    terms: Sequence[Path] = (),
) -> str:
    """Return the page.

    Args:
        tables, timings: each with its plot, a PNG file; None where there is none.
        records: whose grids and versions are shown.
        folder: that the paths of the grids are relative to.
        command: that repeats the sweep.
        failures, impossible: (evaluation, reason).
        runs: the training runs that were evaluated.
        training_plots: of their curves, or of metrics of their checkpoints; each with what it shows.
        terms: the plot of the terms of variational bounds, where there are any.
    """
    names = {str(record["config"]["name"]) for record in records if "name" in record.get("config", {})}
    return load_template("report.html.j2", autoescape=True).render(
        name=", ".join(sorted(names)) or folder.resolve().name,
        count=len(records),
        failures=failures,
        impossible=impossible,
        tables=[(table, plot and _data_uri(plot.read_bytes())) for table, plot in tables],
        timings=[(timing, _data_uri(plot.read_bytes())) for timing, plot in timings],
        runs=[(run.name, f"{run.checkpoint} ({'; '.join(run.models)})") for run in runs],
        training=[(_data_uri(plot.read_bytes()), shown) for plot, shown in training_plots],
        terms=[_data_uri(plot.read_bytes()) for plot in terms],
        grids=_grids(records, folder),
        command=command,
        versions=_versions(records),
        zip=zip,
    )


def _grids(records: Sequence[Record], folder: Path) -> list[tuple[str, str, str]]:
    """Return the grid of each record that has one, as (data URI, alternative text, caption)."""
    grids = []
    with_grid = sorted((r for r in records if r.get("grid")), key=lambda r: (row_order(r["label"]), r["S"], r["key"]))
    several_seeds = len({record.get("seed") for record in records}) > 1
    for record in with_grid[:MAX_GRIDS]:
        caption = f"{record['label']}, S={record['S']}, {record['spacing']}"
        if record.get("first"):
            caption += f", from image {record['first']:,} on"
        if several_seeds:
            caption += f", seed {record.get('seed')}"
        source, remark = _picture(folder, record["grid"])
        grids.append((source, f"samples: {caption}", caption + remark))
    if more := len(with_grid) - len(grids):
        grids.append(("", "", f"and {more:,} more in the folder grids"))
    return grids


def _picture(folder: Path, name: str) -> tuple[str, str]:
    """Return a PNG file of the folder as a data URI and a remark for its caption; "" if it cannot be shown."""
    try:
        path = (folder / name).resolve()
        if path.suffix != ".png" or not path.is_relative_to(folder.resolve()) or not path.is_file():
            return "", f" (there is no picture {name} here)"
        if path.stat().st_size <= MAX_BYTES:
            return _data_uri(path.read_bytes()), ""
        return _data_uri(_reduced(path), "jpeg"), f" (reduced; in full in {name})"
    except Exception as error:  # no name of a file, not permitted, or what a damaged file makes Pillow raise
        return "", f" (the picture {name} cannot be shown: {error})"


def _reduced(path: Path) -> bytes:
    """Return a picture as JPEG, with sides of at most MAX_SIDE pixels."""
    from PIL import Image

    out = io.BytesIO()
    with Image.open(path) as picture:
        reduced = picture.convert("RGB")
        reduced.thumbnail((MAX_SIDE, MAX_SIDE))
        reduced.save(out, "JPEG", quality=90)
    return out.getvalue()


def _data_uri(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _versions(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return code revision, versions of packages and devices, as (name, text)."""
    packages = sorted({package for record in records for package in record.get("versions", {})})
    versions = [("code revision", distinct(revision for r in records for revision in revisions(r)))]
    versions += [(name, distinct(r.get("versions", {}).get(name) for r in records)) for name in packages]
    versions.append(("device", distinct((r.get("compute") or {}).get("device") for r in records)))
    return [(name, text) for name, text in versions if text]
