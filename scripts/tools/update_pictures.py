"""Make the pictures of the documents, docs/images/*.png, from the models that ship with the package.

    python scripts/tools/update_pictures.py

docs/images/pictures.json holds what each picture was made from: the settings of the figure, the weights, and hashes of
the code that decides its pixels. tests/test_pictures.py compares it with the code of today.
"""

import argparse
import ast
import hashlib
import io
import json
import tempfile
import tokenize
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
MADE_FROM = IMAGES / "pictures.json"
COMMAND = f"python {Path(__file__).resolve().relative_to(ROOT).as_posix()}"

# The file in docs/images -> keys of FigureSpec. The first stands in the README and shows the samplers of its table.
CIFAR10 = {"checkpoint": "cifar10_small"}
CLIPPED = {"spacing": "quad", "clip": "x0"}
PICTURES: dict[str, dict[str, Any]] = {
    "samples.png": CIFAR10
    | {"figure": "samples", "sampler": CLIPPED, "S": [5, 10, 20, 50], "etas": [0.0, 0.5, 1.0], "n": 4},
    "consistency.png": CIFAR10 | {"figure": "consistency", "sampler": CLIPPED, "S": [5, 10, 20, 50, 100], "n": 8},
    "interpolation.png": CIFAR10 | {"figure": "interpolation", "sampler": CLIPPED | {"S": 50}, "n": 8},
    "x0_strip.png": CIFAR10 | {"figure": "x0_strip", "sampler": CLIPPED | {"S": 50}, "n": 2, "columns": 11},
    "digits.png": {
        "checkpoint": "digits",
        "figure": "samples",
        "sampler": {"spacing": "uniform"},
        "S": [5, 10, 20, 50],
        "etas": [0.0, 0.5, 1.0],
        "n": 4,
    },
}
# The code that decides the pixels, given the settings and the weights.
SOURCES = (
    "ddim/random.py",
    "ddim/diffusion/interpolation.py",
    "ddim/diffusion/noise.py",
    "ddim/diffusion/prediction.py",
    "ddim/diffusion/rules.py",
    "ddim/diffusion/sampling.py",
    "ddim/diffusion/timesteps.py",
    "ddim/figures/layout.py",
    "ddim/figures/panels.py",
)


def source_hashes() -> dict[str, str]:
    """Return a hash of each file of SOURCES that comments, docstrings and blank lines do not change."""
    return {
        name: hashlib.sha256(code_only((ROOT / name).read_text(encoding="utf-8")).encode()).hexdigest()[:16]
        for name in SOURCES
    }


def code_only(source: str) -> str:
    """Return Python source without comments, docstrings and blank lines."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            for number in range(docstring.lineno - 1, docstring.end_lineno or docstring.lineno):
                lines[number] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def file_hash(path: Path) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def outdated() -> list[str]:
    """Return what is wrong with the pictures in docs/images, in sentences; [] when they show what the code makes."""
    if not MADE_FROM.is_file():
        return [f"there is no {MADE_FROM.name}"]
    made_from = json.loads(MADE_FROM.read_text(encoding="utf-8"))
    wrong = [f"{name} does not belong to a picture" for name in made_from["pictures"].keys() - PICTURES.keys()]
    for name, settings in PICTURES.items():
        made = made_from["pictures"].get(name)
        if made is None or not (IMAGES / name).is_file():
            wrong.append(f"{name} was not made")
        elif made["settings"] != settings:
            wrong.append(f"{name} was made with other settings")
        elif made["file"] != file_hash(IMAGES / name):
            wrong.append(f"{name} is not the file that the command wrote")
    now = source_hashes()
    changed = [name for name in SOURCES if made_from["sources"].get(name) != now[name]]
    return wrong + [f"{name} changed since the pictures were made" for name in changed]


def make(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Write docs/images/`name` and return what it was made from."""
    from PIL import Image

    from ddim.config import build
    from ddim.figures.paper_figures import FigureSpec, write_figures
    from ddim.io import read_safetensors

    with tempfile.TemporaryDirectory() as folder:
        figure = {"name": settings["figure"]}
        fixed = {"name": "docs", "output_dir": folder, "compute": {"device": "cpu"}}
        paths = write_figures(build(FigureSpec, settings | fixed | {"figure": figure}, ""))
        (picture,) = (path for path in paths if path.suffix == ".png")
        (tensors,) = (path for path in paths if path.suffix == ".safetensors")
        metadata = read_safetensors(tensors)[1]
        with Image.open(picture) as image:
            image.convert("RGB").save(IMAGES / name, optimize=True)
    described = {key: json.loads(metadata[key]) for key in ("data", "step", "weights", "weights_hash")}
    return {"settings": settings, **described, "file": file_hash(IMAGES / name)}


def main() -> None:
    """Make all pictures."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    IMAGES.mkdir(parents=True, exist_ok=True)
    pictures = {name: make(name, settings) for name, settings in PICTURES.items()}
    content = {"command": COMMAND, "pictures": pictures, "sources": source_hashes()}
    MADE_FROM.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, made in pictures.items():
        print(f"docs/images/{name}: {made['settings']['figure']}, {made['weights']} weights {made['weights_hash'][:8]}")


if __name__ == "__main__":
    main()
