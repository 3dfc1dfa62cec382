"""The notebook of the documents runs to its last line, on a small model, and is stored without outputs."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ddim.checkpoints.shipped import SHIPPED

ROOT = Path(__file__).resolve().parent.parent
PARTS = json.loads((ROOT / "docs" / "ddim.ipynb").read_text())["cells"]
CODE = ["".join(part["source"]) for part in PARTS if part["cell_type"] == "code"]
CHECKPOINT = '"digits"'


def run(checkpoint: Path) -> list[Any]:
    """Run the parts one after the other; return the value of the last line of each, which a notebook shows."""
    names: dict[str, Any] = {}
    shown = []
    for code in CODE:
        *lines, last = code.replace(CHECKPOINT, repr(str(checkpoint))).splitlines()
        exec("\n".join(lines), names)
        shown.append(eval(last, names))
    return shown


@pytest.mark.integration
def test_the_notebook_runs_and_shows_pictures(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert CHECKPOINT in CODE[0]
    assert CHECKPOINT.strip('"') in SHIPPED  # so the notebook needs nothing first
    none, *pictures = run(checkpoint)
    assert none is None
    assert all(isinstance(picture, Image.Image) for picture in pictures)
    # 8x8 pixels are shown as 32x32, with two between images: 4x4, 1x2, four rows of four, nine and 20 images
    assert [picture.size for picture in pictures] == [(134, 134), (66, 32), (134, 134), (304, 32), (338, 66)]
    assert "torch.Size([16, 1, 8, 8]) torch.uint8" in capsys.readouterr().out


def test_the_notebook_is_stored_without_outputs() -> None:
    assert [part["outputs"] for part in PARTS if part["cell_type"] == "code"] == [[]] * len(CODE)
    assert {part["execution_count"] for part in PARTS if part["cell_type"] == "code"} == {None}
