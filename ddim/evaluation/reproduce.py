"""Run the evaluation of a record again, and say whether its numbers come out, or what has changed."""

import dataclasses
import importlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddim.checkpoints import weights_hash
from ddim.checkpoints.model import UNLABELLED, read_model
from ddim.checkpoints.shipped import SHIPPED
from ddim.config import FilePath, build
from ddim.errors import UserError
from ddim.evaluation.session import Session
from ddim.inference.auto import SETTINGS
from ddim.results.compare import VALIDATION_LOSS
from ddim.results.protocol import completed
from ddim.results.records import RECORDS, Record
from ddim.results.schema import IMAGES, check_evaluation

log = logging.getLogger(__name__)
SEARCHED = ("outputs", "docs/results")  # for records and weights, besides the folders that are given
WEIGHTS = {".ckpt", ".safetensors", ".pt"}
MOST_DIGITS = 17  # significant digits that tell any two float64 apart
KINDS = {  # kind of a record -> module and name of its specification
    "fidelity": ("fidelity", "EvaluateSpec"),
    "reconstruction": ("reconstruction", "ReconstructSpec"),
    "trajectory": ("trajectory_error", "TrajectoryErrorSpec"),
    "likelihood": ("likelihood", "LikelihoodSpec"),
    IMAGES: ("image_sets", "MetricsSpec"),
}


@dataclass(frozen=True, kw_only=True)
class ReproduceSpec:
    """Which record to reproduce; see configs/reproduce.yaml.

    Attributes:
        key: of the record, 16 hexadecimal digits.
        output_dir: folder of the new evaluations, each in a folder of its own: KEY/1, KEY/2, ...
        folders: searched for records and weights besides SEARCHED.
        device: None takes that of the record, or the CPU where it is missing.
        root: folder of the data set; None takes that of the record.
        digits: significant digits that must agree, 1 .. 17; 17 for equal to the last bit.

    Raises:
        ValueError: a key that is none, or digits out of range.
    """

    key: str
    output_dir: FilePath
    folders: tuple[FilePath, ...] = ()
    device: str | None = None
    root: FilePath | None = None
    digits: int = 6

    def __post_init__(self) -> None:
        if len(self.key) != 16 or set(self.key) - set("0123456789abcdef"):
            raise ValueError(f"key={self.key!r} must be the 16 hexadecimal digits of a record, as in table.csv.")
        if not 1 <= self.digits <= MOST_DIGITS:
            raise ValueError(f"digits={self.digits} must lie in 1 .. {MOST_DIGITS}.")

    @property
    def searched(self) -> list[Path]:
        """The folders to search, the given ones first."""
        return [Path(folder) for folder in (*self.folders, *SEARCHED)]


class Reproduction(NamedTuple):
    """A record and the one that was computed now.

    Attributes:
        recorded, now: the records.
        records: the file that the first is in.
        checkpoint: the file with its weights; None where no model is run.
    """

    recorded: Record
    now: Record
    records: Path
    checkpoint: Path | None

    def agreement(self) -> dict[str, int]:
        """Return how many significant digits of each metric agree: MOST_DIGITS if all do, 0 if it is missing.

        The loss that a training recorded beside them is left out: no evaluation computes it.
        """
        now = self.now["metrics"]
        return {
            name: agreeing_digits(value, now[name]) if name in now else 0
            for name, value in self.recorded["metrics"].items()
            if name in now or name != VALIDATION_LOSS
        }

    def changes(self) -> list[str]:
        """Return what of settings, versions, device and code differs, a line for each: "torch: 2.1 -> 2.2"."""
        ignored = {
            "metrics",
            "intervals",
            "config",
            "network_evaluations",
            "seconds_sampling",
            "seconds_metrics",
            "grid",
        }
        before, after = (
            dict(_flat({key: value for key, value in completed(record).items() if key not in ignored}))
            for record in (self.recorded, self.now)
        )
        return [
            f"{name}: {before.get(name, 'not recorded')} -> {after.get(name, 'not recorded')}"
            for name in sorted(before.keys() | after.keys())
            if before.get(name) != after.get(name)
        ]


def reproduce(spec: ReproduceSpec, session: Session | None = None) -> Reproduction:
    """Find a record and its weights, and run its evaluation again in a folder of its own.

    Raises:
        UserError: there is no such record, no file has its weights, or the evaluation cannot be run here.
    """
    session = session or Session()
    with session.processes.barrier():
        record, records = find_record(spec)
        checkpoint = None if record.get("kind") == IMAGES else find_weights(spec, record)
        module, name = KINDS[completed(record)["kind"]]
        package = importlib.import_module(f"ddim.evaluation.{module}")
        again = build(getattr(package, name), _config(spec, record, checkpoint), "config")
    folder = session.processes.run_on_main(lambda: _unused_folder(Path(spec.output_dir) / spec.key))
    now, _ = package.evaluate(dataclasses.replace(again, output_dir=str(folder)), session)
    return Reproduction(record, now, records, checkpoint)


def find_record(spec: ReproduceSpec) -> tuple[Record, Path]:
    """Return the record with a key and the file that it is in.

    Raises:
        UserError: no .jsonl file of the searched folders has it, or it is no record of an evaluation.
    """
    own = Path(spec.output_dir).resolve()
    for folder in spec.searched:
        for path in sorted(folder.rglob("*.jsonl")):
            if own in path.resolve().parents:
                continue
            for record in _with_key(path, spec.key):
                try:
                    check_evaluation(record)
                except ValueError as error:
                    raise UserError(f"the record {spec.key} in {path} is damaged ({error}).") from error
                return record, path
    searched = ", ".join(map(str, spec.searched))
    raise UserError(f"no .jsonl file under {searched} has the record {spec.key}; add the folder that it is in.")


def find_weights(spec: ReproduceSpec, record: Record) -> Path:
    """Return the file with the weights of a record, by their hash; the models that ship are searched too.

    Raises:
        UserError: no file has them.
    """
    wanted, weights, step = record["model"]["weights_hash"], record["model"]["weights"], record["model"]["step"]
    recorded = Path(record.get("config", {}).get("checkpoint", ""))
    given = [folder for folder in spec.searched if folder.is_file()]
    listed = [path for folder in spec.searched for path in folder.rglob("*") if path.suffix in WEIGHTS]
    # Files that are likely to have them first: reading takes a while.
    listed.sort(key=lambda path: (str(step) not in path.name, path.name != recorded.name, str(path)))
    for path in dict.fromkeys([*given, recorded, *SHIPPED.values(), *listed]):
        if not path.is_file():
            continue
        try:
            stored = read_model(path, "ema" if weights == UNLABELLED else weights)
        except UserError as error:
            log.debug("%s", error)
            continue
        if weights_hash(stored.state) == wanted:
            return path
    raise UserError(
        f"no file under {', '.join(map(str, spec.searched))} and no model that ships has the {weights} weights "
        f"{wanted[:12]} of the record; add the folder that they are in (they were {recorded})."
    )


def agreeing_digits(a: float, b: float) -> int:
    """Return how many significant digits agree, by the relative difference: 5 below 10⁻⁵; MOST_DIGITS if equal."""
    if a == b:
        return MOST_DIGITS
    return max(0, min(MOST_DIGITS - 1, math.floor(-math.log10(abs(a - b) / max(abs(a), abs(b))))))


def _config(spec: ReproduceSpec, record: Record, checkpoint: Path | None) -> dict[str, Any]:
    """Return the configuration of a record, for this machine."""
    if not isinstance(config := record.get("config"), dict):
        raise UserError(f"the record {spec.key} has no configuration, so its evaluation cannot be run again.")
    config = {key: value for key, value in config.items() if key not in ("logger", "save_images")}
    if checkpoint is not None:
        config |= {"checkpoint": str(checkpoint), "compute": dict(config["compute"])}
        config["compute"]["device"] = spec.device or _available(config["compute"]["device"])
        config["compute"] |= _chosen(record, config["compute"])
    else:
        config["device"] = spec.device or _available(config["device"])
    if spec.root is not None and "data" in config:
        config["data"] = config["data"] | {"root": spec.root}
    return config


def _chosen(record: Record, compute: Mapping[str, Any]) -> dict[str, bool | int]:
    """Return what was chosen for the settings of a record that are null; for another device the precision alone.

    The batch size too, since it changes the rounding, and the search for one may end elsewhere the next time.
    """
    names = [name for name in SETTINGS if compute.get(name, False) is None]
    recorded = record.get("compute") or {}
    same = torch.device(compute["device"]).type == torch.device(record["config"]["compute"]["device"]).type
    chosen: dict[str, bool | int] = {}
    if "settings" in recorded:
        used = recorded["settings"].split("+")
        chosen = {name: name in used for name in names if same or name in ("bf16", "tf32")}
    if same and compute.get("batch_size") == 0 and recorded.get("batch_size"):
        chosen["batch_size"] = recorded["batch_size"]
    return chosen


def _available(device: str) -> str:
    """Return a device, or the CPU where this machine has none of its kind."""
    default = torch.get_default_device().type
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = torch.device(device).type
    return device if kind == default or (here is not None and here.type == kind) else default


def _unused_folder(parent: Path) -> Path:
    """Return the first of 1, 2, ... in a folder that has no record: a new one, or one that was interrupted."""
    number = 1
    while (parent / str(number) / RECORDS).exists():
        number += 1
    return parent / str(number)


def _with_key(path: Path, key: str) -> Iterator[Record]:
    """Yield the records of a file with this key; lines that are none are left out."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if key not in line:
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                log.debug("%s: %s", path, error)
                continue
            if isinstance(record, dict) and record.get("key") == key:
                yield record


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
