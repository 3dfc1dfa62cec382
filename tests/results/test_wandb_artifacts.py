"""checkpoint=wandb:ENTITY/PROJECT/ARTIFACT[:VERSION], with a stand-in for W&B's server."""

from pathlib import Path
from typing import Any

import pytest

from ddim.errors import UserError
from ddim.results.wandb_artifacts import artifact_of, download_checkpoint

wandb = pytest.importorskip("wandb")  # a GPU machine may have none


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What W&B holds, files by artifact:alias or artifact:version; "asked" lists the downloads."""
    content: dict[str, Any] = {"asked": []}

    class Artifact:
        def __init__(self, name: str) -> None:
            if name not in content:
                raise wandb.errors.CommError(f"artifact '{name}' not\nfound")
            self.name, self.version, self.files = name, *content[name]

        def download(self, root: str, skip_cache: bool) -> str:
            content["asked"].append(self.name)
            for name in self.files:
                path = Path(root) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{self.name} {name}", encoding="utf-8")
            assert skip_cache
            return root

    monkeypatch.setattr(wandb, "Api", lambda: type("Api", (), {"artifact": staticmethod(Artifact)}))
    return content


def test_an_artifact_is_downloaded_a_single_time(tmp_path: Path, server: dict[str, Any]) -> None:
    name = "team/p/model-abc"
    server[f"{name}:latest"] = server[f"{name}:v7"] = "v7", ["model.ckpt", "notes.txt"]
    paths = {download_checkpoint(f"wandb:{name}{version}", tmp_path) for version in ("", ":latest", ":v7")}
    (path,) = paths
    assert Path(path) == tmp_path / "team" / "p" / "model-abc" / "v7" / "model.ckpt"
    assert Path(path).read_text(encoding="utf-8") == f"{name}:latest model.ckpt"
    assert server["asked"] == [f"{name}:latest"]
    server.clear()  # without a network
    assert download_checkpoint(f"wandb:{name}:v7", tmp_path) == path
    assert artifact_of(path, tmp_path) == f"{name}:v7"
    assert artifact_of("outputs/train/digits/checkpoints/last.ckpt") is None


def test_a_download_that_was_cut_short_is_not_used(tmp_path: Path, server: dict[str, Any]) -> None:
    server["e/p/a:v0"] = "v0", ["model.ckpt", "/dev/full/none.ckpt"]
    with pytest.raises(UserError, match="cannot be downloaded"):
        download_checkpoint("wandb:e/p/a:v0", tmp_path)
    server["e/p/a:v0"] = "v0", ["model.ckpt"]
    assert Path(download_checkpoint("wandb:e/p/a:v0", tmp_path)).is_file()
    assert server["asked"] == ["e/p/a:v0"] * 2


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("wandb:abc", r"checkpoint=wandb:abc must be wandb:ENTITY/PROJECT/ARTIFACT or wandb:\.\.\.:VERSION"),
        ("wandb:e/p/a:", "must be wandb:ENTITY/PROJECT/ARTIFACT"),
        ("wandb:e/../a", "must be wandb:ENTITY/PROJECT/ARTIFACT"),
        ("wandb:e/p/gone", r"e/p/gone:latest cannot be downloaded \(artifact 'e/p/gone:latest' not found\); check its"),
        ("wandb:e/p/two:v1", r"e/p/two:v1 must hold one model file \(\.ckpt, .*\), it has a\.ckpt, b\.pt; give the"),
        ("wandb:e/p/text:v1", "it has none; give the path"),
    ],
)
def test_a_wrong_artifact_is_one_sentence(
    checkpoint: str, message: str, tmp_path: Path, server: dict[str, Any]
) -> None:
    server |= {"e/p/two:v1": ("v1", ["a.ckpt", "b.pt"]), "e/p/text:v1": ("v1", ["a.txt"])}
    with pytest.raises(UserError, match=message):
        download_checkpoint(checkpoint, tmp_path)
