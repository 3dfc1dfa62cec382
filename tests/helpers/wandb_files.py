"""W&B without a network or an account, and what is in the files of its offline runs."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest


def isolate_wandb(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Keep all of W&B's files in the folder `home`, and the user's settings and account away."""
    home.mkdir()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "NETRC", "TMPDIR"):
        monkeypatch.setenv(name, str(home / name.lower()))
    (home / "tmpdir").mkdir()
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_MODE", "online")  # Lightning sets it when offline; monkeypatch restores it


def offline_runs(folder: Path) -> list["OfflineRun"]:
    """Return the offline runs below wandb/ in a folder, the oldest first, when W&B's process has written them."""
    import wandb

    wandb.teardown()
    runs = [OfflineRun(path) for path in folder.glob("wandb/offline-run-*")]  # whose names have the second only
    return sorted(runs, key=lambda run: run.run.start_time.ToNanoseconds())


class OfflineRun:
    """What a run that was logged offline holds.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (self.path,) = folder.glob("*.wandb")
        self.records = list(_records(self.path))
        self.run = next(record.run for record in self.records if record.HasField("run"))

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, with its later changes."""
        updates = [self.run.config, *(record.config for record in self.records if record.HasField("config"))]
        return _nested(item for update in updates for item in update.update)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What was logged, by call."""
        histories = [record.history for record in self.records if record.HasField("history")]
        return [_nested(history.item) for history in histories]

    @property
    def summary(self) -> dict[str, Any]:
        """The summary when the run ended."""
        updates = [record.summary for record in self.records if record.HasField("summary")]
        return _nested(item for update in updates for item in update.update)

    @property
    def artifacts(self) -> list[tuple[str, str, list[str]]]:
        """Name, type and sorted aliases of each artifact version that was logged, besides those of tables."""
        logged = [record.artifact for record in self.records if record.HasField("artifact")]
        return [(a.name, a.type, sorted(a.aliases)) for a in logged if a.type != "run_table"]

    @property
    def best(self) -> dict[str, str]:
        """The metrics of which the summary keeps the best value: min or max, by name."""
        metrics = [record.metric for record in self.records if record.HasField("metric")]
        return {m.name: "min" if m.summary.min else "max" for m in metrics if m.summary.min or m.summary.max}

    def column(self, name: str) -> dict[int, Any]:
        """Return a metric by the step of Lightning's trainer."""
        return {row["trainer/global_step"]: row[name] for row in self.rows if name in row}

    def table(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of the table that was logged last under this name."""
        logged = [row[name] for row in self.rows if name in row][-1]
        content = json.loads((self.folder / "files" / logged["path"]).read_text(encoding="utf-8"))
        return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]

    def table_images(self, name: str) -> set[str]:
        """Return the MD5 of each image in a table, which W&B stores as an artifact with its images; in base 64."""
        artifacts = [record.artifact for record in self.records if record.HasField("artifact")]
        (files,) = [a.manifest.contents for a in artifacts if a.name == f"run-{self.run.run_id}-{name}"]
        return {file.digest for file in files if file.path.endswith(".png")}

    @property
    def charts(self) -> dict[str, dict[str, str]]:
        """Which column of its table is what in an interactive chart: x, y and stroke, by the chart's name."""
        charts = self.config["_wandb"]["visualize"]
        return {name: chart["panel_config"]["fieldSettings"] for name, chart in charts.items()}

    def media(self, suffix: str) -> list[Path]:
        """Return the media files with this suffix."""
        return sorted((self.folder / "files" / "media").rglob(f"*{suffix}"))


def _nested(items: Iterable[Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        inner = values
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(item.value_json)
    return values


def _records(path: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file: a log in LevelDB's format after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, fragments = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits: the rest of the block is padding
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        fragments += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a complete record, or its last fragment
            yield Record.FromString(fragments)
            fragments = b""
