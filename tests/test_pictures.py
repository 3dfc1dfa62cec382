"""The pictures of the documents show what the code of today makes."""

import json
import re
import runpy
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "tools" / "update_pictures.py"))
IMAGES: Path = SCRIPT["IMAGES"]


def test_pictures_are_up_to_date() -> None:
    outdated = SCRIPT["outdated"]()
    assert outdated == [], f"make them again: {SCRIPT['COMMAND']}"


def test_pictures_are_the_ones_that_documents_show() -> None:
    texts = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    shown = {Path(source).name for text in texts for source in re.findall(r'<img src="([^"]+)"', text)}
    assert shown == set(SCRIPT["PICTURES"]) == {path.name for path in IMAGES.glob("*.png")}


@pytest.mark.parametrize("name", SCRIPT["PICTURES"])
def test_pictures_are_opaque_and_wide_enough(name: str) -> None:
    """Opaque, so that labels can be read on a dark page; at least twice the 800 pixels of the page."""
    with Image.open(IMAGES / name) as image:
        assert image.mode in ("RGB", "L")
        assert image.width >= 1600
        assert image.getpixel((0, 0)) in ((255, 255, 255), 255)
    assert (IMAGES / name).stat().st_size < 300_000


@pytest.mark.parametrize("change", ["settings", "source", "file", "picture"])
def test_outdated_pictures_are_found(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in IMAGES.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    made_from = json.loads((tmp_path / "pictures.json").read_text())
    script = SCRIPT["outdated"].__globals__
    made_from["sources"] = SCRIPT["source_hashes"]()
    if change == "settings":
        made_from["pictures"]["samples.png"]["settings"]["n"] = 3
    elif change == "source":
        made_from["sources"]["ddim/random.py"] = "0" * 16
    elif change == "file":
        (tmp_path / "samples.png").write_bytes(b"another")
    else:
        (tmp_path / "samples.png").unlink()
    (tmp_path / "pictures.json").write_text(json.dumps(made_from))
    monkeypatch.setitem(script, "IMAGES", tmp_path)
    monkeypatch.setitem(script, "MADE_FROM", tmp_path / "pictures.json")
    (sentence,) = SCRIPT["outdated"]()
    assert ("ddim/random.py" if change == "source" else "samples.png") in sentence


def test_comments_and_docstrings_do_not_count() -> None:
    code = 'def f(x):\n    y = "# no comment"\n    return x + 1'
    commented = f'"""A module."""\n\n# why\n{code}  # one more\n'.replace("(x):\n", '(x):\n    """Add\n\n    one."""\n')
    assert SCRIPT["code_only"](commented) == code
    assert SCRIPT["code_only"](code.replace("+", "-")) != code
