"""A cell of a table: computed once, by any number of processes, however often it was interrupted."""

import dataclasses
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ddim.checkpoints import LoadedModel, load_model
from ddim.data.datasets import DataSpec, load_images
from ddim.data.images import Images
from ddim.diffusion.labels import row_label, spacing_name
from ddim.diffusion.spec import SamplerSpec
from ddim.diffusion.timesteps import distinct_evaluations
from ddim.distributed import SINGLE_PROCESS, Processes
from ddim.errors import UserError
from ddim.evaluation.shards import Parts
from ddim.inference.compute import ComputeSpec, prepare_model, with_batch_size
from ddim.results.records import RECORDS, Record, RecordFile, provenance, record_key

UNFINISHED = "unfinished"  # sub-folder with the parts of cells that have no record yet


@dataclass(frozen=True, eq=False)
class Cell:
    """A cell that was checked and can be computed.

    Attributes:
        title: in a few words.
        output_dir: with the records.
        identity: everything that decides the numbers, and nothing else: not the batch size, not the device.
        facts: what else goes into the record.
        indices: numbers of its images.
        steps: network evaluations of one image.
        model, compute: the network and how it is run.
        measure: fills the parts, each process its share, and returns the entries of the record that came out of them,
            in the first process. What can fail in it stands in `Processes.barrier`, and no process reads the parts
            after the last of these blocks.
        look: what is done with uint8 images (B, C, H, W) once they are there; only for timing.
    """

    title: str
    output_dir: Path
    identity: dict[str, Any]
    facts: dict[str, Any]
    indices: range
    steps: int
    model: LoadedModel
    compute: ComputeSpec
    measure: Callable[[Parts, Processes], dict[str, Any]]
    look: Callable[[Tensor], Any] | None = None

    @property
    def key(self) -> str:
        """16 hexadecimal digits that stand for the identity."""
        return record_key(self.identity)

    @property
    def parts(self) -> Parts:
        """Where the unfinished cell is."""
        return Parts(self.output_dir / UNFINISHED / self.key, self.indices)

    def find(self) -> Record | None:
        """Return its record if there is one."""
        return RecordFile(self.output_dir / RECORDS).find(self.key)


def once(prepare: Callable[[Processes], Cell], processes: Processes = SINGLE_PROCESS) -> tuple[Record, bool]:
    """Return the record of a cell, and whether it was computed now rather than found among the records.

    Raises:
        UserError: bad input; another run is at it; or it cannot be computed. What was done stays and the next call goes
            on.
    """
    with processes.barrier():
        cell = prepare(processes)
    if (found := processes.run_on_main(cell.find)) is not None:
        return found, False
    parts = cell.parts
    with parts.alone(processes):
        if (found := processes.run_on_main(cell.find)) is not None:  # of another run, which ended meanwhile
            if processes.is_main:
                parts.delete()
            return found, False
        record = {
            "key": cell.key,
            **cell.identity,
            **cell.facts,
            **cell.measure(parts, processes),
            "network_evaluations": len(cell.indices) * cell.steps,
            "compute": {
                "device": device_name(cell.compute.device),
                "processes": processes.world_size,
                "batch_size": cell.compute.batch_size,
            },
            **provenance(),
        }
        with processes.barrier():
            if processes.is_main:
                RecordFile(cell.output_dir / RECORDS).append(record)
                parts.delete()
    return processes.broadcast(record), True


def cached_model(checkpoint: str, weights: str, compute: ComputeSpec) -> tuple[LoadedModel, ComputeSpec]:
    """Return the model on its device and how it is run, the same as before unless the file was written to meanwhile."""
    path = Path(checkpoint)
    return _model(checkpoint, path.stat().st_mtime_ns if path.exists() else 0, weights, compute)


@lru_cache(maxsize=1)
def _model(checkpoint: str, modified: int, weights: str, compute: ComputeSpec) -> tuple[LoadedModel, ComputeSpec]:
    model = prepare_model(load_model(checkpoint, weights), compute)
    return model, with_batch_size(model, compute)


def on_local_device(compute: ComputeSpec, processes: Processes) -> ComputeSpec:
    """Return how this process computes: of several on one machine, each on a device of its own."""
    return dataclasses.replace(compute, device=processes.local_device(compute.device))


@lru_cache(maxsize=1)
def cached_images(data: DataSpec, split: Literal["train", "test"]) -> Images:
    """Return a data set, the same as before."""
    return load_images(data, split)


@lru_cache(maxsize=1)
def cached_fingerprint(data: DataSpec, split: Literal["train", "test"]) -> str:
    """Return the fingerprint of a data set."""
    return cached_images(data, split).fingerprint()


def check_shape(model: LoadedModel, images: Images) -> None:
    """Refuse a data set whose images are not like those that the model makes.

    Raises:
        UserError: they have another shape.
    """
    if model.spec.image_shape != images.shape:
        raise UserError(
            f"the checkpoint makes images of (channels, height, width) {model.spec.image_shape}, {images.name} has "
            f"{images.shape}; choose the data the model was trained on."
        )


def model_facts(model: LoadedModel) -> dict[str, Any]:
    """Return what a record says of the model."""
    # The same weights give other numbers behind another schedule, or with other groups in a normalisation.
    description = model.spec.to_dict() | {"schedule": model.spec.schedule.alpha_bar.tolist()}
    return {
        # Records call the online weights raw, as they always did: the cache key of an evaluation must not change.
        "weights": "raw" if model.weights == "online" else model.weights,
        "weights_hash": model.weights_hash,
        "step": model.step,
        "schedule": model.spec.schedule.name,
        "T": model.spec.schedule.T,
        "prediction": model.spec.prediction,
        "description_hash": record_key(description),
    }


def sampler_facts(sampler: SamplerSpec, tau: tuple[int, ...]) -> dict[str, Any]:
    """Return what a record says of the sampler: what decides the numbers, not how it was asked for."""
    chosen = {name: getattr(sampler, name) for name in ("rule", "eta", "clip", "last_time")}
    return {**chosen, "tau": list(tau)}


def common_facts(model: LoadedModel, sampler: SamplerSpec, tau: tuple[int, ...]) -> dict[str, Any]:
    """Return what a record says besides what decided its numbers: where it stands in a table."""
    return {
        "trained_on": model.spec.data,
        "S": len(tau),
        "label": row_label(sampler),
        "spacing": spacing_name(sampler, tau, model.spec.schedule.T),
        "distinct_evaluations": distinct_evaluations(tau),
    }


def device_name(device: str) -> str:
    """Return the name of a device's model, by which times can be compared."""
    named = torch.device(device)
    if named.type == "cpu":
        return f"{platform.machine()} processor, {torch.get_num_threads()} threads"
    return torch.get_device_module(named.type).get_device_name(named)
