"""One HTML page for a sweep, complete in itself: no scripts, no other files, no network."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from ddim.results.plots import Timing
from ddim.results.records import Record
from ddim.results.table import Line, Table, row_order

STYLE = Path(__file__).parent / "assets" / "report.css"
MARKS = {"better": "▼", "worse": "▲", "same": "="}
LARGEST = 400_000  # bytes of a picture that is put into the page as it is
LARGEST_SIDE = 1024  # pixels of what a larger one is reduced to
LEGEND = "".join(
    f'<span class="{verdict}">{MARKS[verdict]} {words}</span> '
    for verdict, words in (
        ("better", "ours is lower: better than the paper"),
        ("worse", "ours is higher: worse than the paper"),
        ("same", "the same to the paper's last digit"),
    )
)


def page(
    tables: Sequence[Table],
    timings: Sequence[Timing],
    plots: Sequence[Path],
    records: Sequence[Record],
    folder: Path,
    command: str | None,
    failures: Sequence[tuple[str, str]],
) -> str:
    """Return the page.

    Args:
        tables, timings: what to show.
        plots: a picture for each table, then one for each timing.
        records: whose grids and versions to show.
        folder: that the grids lie in.
        command: that repeats the sweep.
        failures: (cell, reason).
    """
    names = {str(record["config"]["name"]) for record in records if "name" in record.get("config", {})}
    name = ", ".join(sorted(names)) or folder.resolve().name
    body = [
        f"<h1>Evaluation: {escape(name)}</h1>",
        f"<p>{_count(len(records), 'cell')} computed, {len(failures)} failed.</p>",
        _failures(failures),
        *map(_table, tables, plots),
        *map(_timing, timings, plots[len(tables) :]),
        _grids(records, folder),
        _section("Repeat", f"<pre>{escape(command)}</pre>") if command else "",
        _versions(records),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>Evaluation: {escape(name)}</title>\n<style>\n{STYLE.read_text()}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


def _failures(failures: Sequence[tuple[str, str]]) -> str:
    items = [(cell, escape(reason)) for cell, reason in failures]
    return _section("Failed cells", _list(items, "failures")) if failures else ""


def _table(table: Table, plot: Path) -> str:
    head = "".join(f'<th scope="col">{S}</th>' for S in ("S", *table.columns))
    head = f"<thead><tr>{head}</tr></thead>"
    body, lines = [], table.lines()
    starts = [i for i, line in enumerate(lines) if i == 0 or line.kind == "ours" or line.name == "paper"]
    for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
        body.append(f"<tbody>{''.join(_line(table, line) for line in lines[start:stop])}</tbody>")
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    legend = f'<p class="legend">{LEGEND}</p>' if table.paper is not None else ""
    facts = _list([(name, escape(text).replace("; ", "<br>")) for name, text in table.facts(full=True)])
    content = (
        f"<p>{escape(table.title())}</p>\n"
        f'<div class="scroll"><table>{head}{"".join(body)}</table></div>\n'
        f"{legend}{note}\n{_figure(_data(plot.read_bytes()), f'{table.metric} against S', '', 'plot')}\n"
        f"<h3>Protocol</h3>\n{facts}"
    )
    return _section(table.heading or table.metric, content)


def _line(table: Table, line: Line) -> str:
    """Return a row; a difference says in colour, by a mark and in words how ours stands."""
    verdicts = line.verdicts or [""] * len(line.texts)
    cells = []
    for text, verdict in zip(line.texts, verdicts, strict=True):
        mark = f' <span aria-label="{verdict}">{MARKS[verdict]}</span>' if verdict else ""
        cells.append(f'<td class="{verdict}">{escape(text)}{mark}</td>')
    return f'<tr class="{line.kind}"><th scope="row">{escape(line.short_name)}</th>{"".join(cells)}</tr>'


def _timing(timing: Timing, plot: Path) -> str:
    return _section(
        "Time against S", _figure(_data(plot.read_bytes()), "time to sample against S", timing.caption(), "plot")
    )


def _grids(records: Sequence[Record], folder: Path) -> str:
    shown = [r for r in records if "grid" in r]
    pictures = []
    for record in sorted(shown, key=lambda r: (row_order(r["label"]), r["S"], r["key"])):
        caption = f"{record['label']}, S={record['S']}, {record['spacing']}"
        if record.get("first"):
            caption += f", from image {record['first']:,} on"
        source, how = _picture(folder, record["grid"])
        pictures.append(_figure(source, f"samples: {caption}", caption + how, "grid"))
    return _section("Samples", f'<div class="grids">{"".join(pictures)}</div>') if pictures else ""


def _picture(folder: Path, name: str) -> tuple[str, str]:
    """Return a picture of the folder as a data URI, and what is to be said of it; "" if it cannot be shown."""
    from PIL import Image

    path = (folder / name).resolve()
    if path.suffix != ".png" or not path.is_relative_to(folder.resolve()) or not path.is_file():
        return "", f" (there is no picture {name} here)"
    content = path.read_bytes()
    if len(content) <= LARGEST:
        return _data(content), ""
    small = io.BytesIO()
    with Image.open(path) as picture:
        reduced = picture.convert("RGB")
        reduced.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        reduced.save(small, "JPEG", quality=90)
    return _data(small.getvalue(), "jpeg"), f" (reduced; in full in {name})"


def _figure(source: str, alt: str, caption: str, kind: str) -> str:
    image = f'<img src="{source}" alt="{escape(alt)}">' if source else ""
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="{kind}">{image}{text}</figure>'


def _data(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _versions(records: Sequence[Record]) -> str:
    versions: dict[str, set[str]] = {}
    for record in records:
        for package, version in record.get("versions", {}).items():
            versions.setdefault(package, set()).add(version)
    found = [("code revision", _different(r["revision"] for r in records if "revision" in r))]
    found += [(package, _different(versions[package])) for package in sorted(versions)]
    computes = [r["compute"] for r in records if r.get("compute")]
    found.append(("device", _different(str(compute["device"]) for compute in computes)))
    found = [(name, escape(text)) for name, text in found if text]
    return _section("Versions", _list(found)) if found else ""


def _list(items: Sequence[tuple[str, str]], kind: str = "protocol") -> str:
    """Return a description list of names and pieces of HTML."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{html}</dd>" for name, html in items)
    return f'<dl class="{kind}">{rows}</dl>'


def _different(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))
