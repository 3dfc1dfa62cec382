"""The HTML report: self-contained, with every number, and with all input escaped."""

import base64
import io
import itertools
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_records import RECORDS, compared, record
from PIL import Image

from ddim.results import plots, training_plots
from ddim.results.report import build_tables, write_report

VOID = {"meta", "img", "br"}
COMPARED = compared(("η=0.0", 10, 13.0), ("η=0.0", 20, 7.5), ("η=1.0", 10, 41.07), ("σ̂", 10, 300.0))
HOSTILE = "<script>alert('x')</script> \"' onerror=x & </dd></table> <img src=http://a.b/c>"


@pytest.fixture(autouse=True)
def empty_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty pictures in place of drawn plots, which take a second."""

    def save(_: object, path: Path, *options: object) -> Path:
        for target in (path, path.with_suffix(".pdf")):
            Image.new("L", (8, 8)).save(target)
        return path

    for module, name in ((plots, "save_plot"), (plots, "save_time_plot"), (training_plots, "save_training_plot")):
        monkeypatch.setattr(module, name, save)


class Page(HTMLParser):
    """Elements of a page with their attributes, and text by element; fails if one is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())


def written(records: list[Any], folder: Path, **options: Any) -> Page:
    path = write_report(records, folder, **options)[-1]
    assert path == folder / "report.html"
    return Page(path.read_text())


def test_page_shows_every_number(tmp_path: Path) -> None:
    page = written(COMPARED, tmp_path)
    [table] = build_tables(COMPARED)
    for line in table.lines():
        assert {text for text in line.texts if text} <= set(page.texts["td"])
    text = "\n".join(itertools.chain(*page.texts.values()))
    assert table.title() in text
    assert table.note in text
    for name, value in table.describe_protocol(full=True):
        assert name in page.texts["dt"]
        assert all(phrase in text for phrase in value.split("; "))
    assert "0123456789abcdef" in text  # the complete hash
    assert "2.15.0" in page.texts["dd"]


def test_comparison_uses_colour_mark_and_word(tmp_path: Path) -> None:
    page = written(COMPARED, tmp_path)
    classes = [a["class"] for tag, a in page.elements if tag == "td" and a["class"]]
    assert classes == ["best", "best", "better", "worse", "same", "better"]  # η=0.0 is the best of both columns
    marks = [a["aria-label"] for tag, a in page.elements if "aria-label" in a]
    assert marks == classes
    assert page.texts["span"][:6] == ["★", "★", "▼", "▲", "=", "▼"]
    assert [text[0] for text in page.texts["span"][6:]] == ["▼", "▲", "="]  # the legend
    plain = written([r | {"paper": None} for r in COMPARED], tmp_path)
    assert not any(a.get("class") in ("better", "worse", "same") for _, a in plain.elements)


def test_page_is_self_contained(tmp_path: Path) -> None:
    grids = tmp_path / "grids"
    grids.mkdir()
    Image.new("L", (8, 8), 77).save(grids / "a.png")
    records = [record("η=0.0", 10, 1.0, grid="grids/a.png"), record("η=0.0", 20, 1.0, grid="grids/gone.png")]
    page = written(records, tmp_path, command="python scripts/evaluate.py -m x=y")
    references = [
        a[name] for _, a in page.elements for name in ("src", "href", "srcset", "data", "action") if name in a
    ]
    assert len(references) == 2  # the plot and the grid
    assert all(reference.startswith("data:image/") for reference in references)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.elements}
    style = " ".join(page.texts["style"])
    assert "url(" not in style
    assert "@import" not in style
    for needed in ("prefers-color-scheme: dark", "@media print", "max-width: 40rem"):
        assert needed in style
    with Image.open(io.BytesIO(base64.b64decode(references[1].partition("base64,")[2]))) as grid:
        assert (grid.size, grid.getpixel((0, 0))) == ((8, 8), 77)
    assert page.texts["figcaption"] == [
        "η=0.0, S=10, quad",
        "η=0.0, S=20, quad (there is no picture grids/gone.png here)",
    ]
    assert page.texts["pre"] == ["python scripts/evaluate.py -m x=y"]


def test_large_grids_are_reduced(tmp_path: Path) -> None:
    noise = Image.effect_noise((1500, 1000), 100)
    noise.save(tmp_path / "large.png")
    page = written([record("η=0.0", 10, 1.0, grid="large.png")], tmp_path)
    [source] = [a["src"] for tag, a in page.elements if tag == "img" and "jpeg" in a["src"]]
    with Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))) as picture:
        assert max(picture.size) == 1024
    assert page.texts["figcaption"] == ["η=0.0, S=10, quad (reduced; in full in large.png)"]


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "note.txt"])
def test_files_outside_the_folder_are_not_embedded(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "secret.png")
    (folder / "note.txt").write_text("secret")
    page = written([record("η=0.0", 10, 1.0, grid=name)], folder)
    assert len([tag for tag, _ in page.elements if tag == "img"]) == 1  # the plot


def test_input_is_escaped(tmp_path: Path) -> None:
    hostile = record(HOSTILE, 10, 1.0, HOSTILE, reference__name=HOSTILE, revision=HOSTILE, grid=HOSTILE, paper=HOSTILE)
    hostile["config"]["name"] = HOSTILE
    hostile["versions"] = {HOSTILE: HOSTILE}
    hostile["compute"] = {"device": HOSTILE}
    page = written([hostile, hostile | {"S": 20}], tmp_path, command=HOSTILE, failures=[(HOSTILE, HOSTILE)])
    plain = written([record("η=0.0", 10, 1.0, "linear", compute={"device": "d"}, paper="x", grid="g"),
                     record("η=0.0", 20, 1.0, "linear", compute={"device": "d"}, paper="x", grid="g")],
                    tmp_path / "plain", command="c", failures=[("a", "b")])  # fmt: skip
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in plain.elements}
    attributes = {(tag, name) for tag, a in page.elements for name in a}
    assert attributes == {(tag, name) for tag, a in plain.elements for name in a}
    shown = "".join(itertools.chain(*page.texts.values()))
    assert shown.count(HOSTILE) >= 8


def test_failures_are_listed_with_reasons(tmp_path: Path) -> None:
    failures = [("η=0.0 S=2000 linear", "S=2000 steps cannot be chosen."), ("σ̂ S=10 quad", "out of memory")]
    for records in ([], RECORDS):
        page = written(records, tmp_path, failures=failures, command="again")
        for title, reason in failures:
            assert page.texts["dd"][page.texts["dt"].index(title)] == reason
        assert page.texts["p"][0] == f"{len(records)} evaluations computed, 2 failed."
        assert page.texts["pre"] == ["again"]
    assert page.texts["h1"] == ["Evaluation: made"]
    assert written([], tmp_path / "name").texts["h1"] == ["Evaluation: name"]
