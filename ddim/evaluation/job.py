"""One evaluation: its specification, its cache key, and its record; computed once, however often it is interrupted."""

import logging
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ddim.checkpoints import LoadedModel
from ddim.checkpoints.model import WANDB_RUN
from ddim.config import FilePath, check_name, choose
from ddim.data.datasets import DATASETS, DataSpec
from ddim.data.images import Images
from ddim.diffusion.labels import asked_steps, row_label, spacing_name
from ddim.diffusion.spec import SamplerSpec
from ddim.diffusion.timesteps import distinct_evaluations
from ddim.distributed import Processes
from ddim.errors import UserError
from ddim.evaluation.features import FeatureExtractor
from ddim.evaluation.session import Session
from ddim.evaluation.shards import Shards
from ddim.inference.auto import SETTINGS, words
from ddim.inference.compute import ChosenCompute, ComputeSpec
from ddim.inference.conditioning import condition_suffix
from ddim.inference.generate import network_evaluations
from ddim.results.paper import PAPER_TABLES
from ddim.results.plot_spec import PlotSpec
from ddim.results.records import Record, RecordFile, provenance, record_key
from ddim.results.table import TableSpec
from ddim.results.wandb import LoggerSpec

log = logging.getLogger(__name__)
UNFINISHED = "unfinished"  # sub-folder with the shards of evaluations that have no record yet


@dataclass(frozen=True, kw_only=True)
class JobSpec(ABC):
    """What every evaluation is specified by.

    Attributes:
        checkpoint: path of the model.
        name: of the sweep.
        output_dir: its folder: records.jsonl, the tables, pictures.
        sampler, compute: how to sample, how to compute.
        weights: ema, online, or ema_RATE for an additional EMA.
        grid: images shown in the grid; 0 for none.
        paper: the table of the paper that the numbers are compared with.
        logger: W&B, if at all.
        table: what the tables show besides the numbers.
        dry_run: report what it would cost, instead of evaluating.
        style: of the plots; paper leaves their titles, with the hashes in them, to the captions of a document.
        figure: size and format of the plots.

    Raises:
        ValueError: a negative grid, a logger's option that is for training, an unknown table, or a name that is none.
    """

    checkpoint: FilePath
    name: str
    output_dir: FilePath
    sampler: SamplerSpec
    compute: ComputeSpec
    weights: str = "ema"
    grid: int = 64
    paper: str | None = None
    logger: LoggerSpec = field(default_factory=LoggerSpec)
    table: TableSpec = field(default_factory=TableSpec)
    dry_run: bool = False
    style: Literal["screen", "paper"] = "screen"
    figure: PlotSpec = field(default_factory=PlotSpec)

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.grid < 0:
            raise ValueError(f"grid={self.grid} must not be negative.")
        self.logger.check_evaluation()
        if self.paper is not None:
            choose("table of the paper", self.paper, PAPER_TABLES)

    @property
    @abstractmethod
    def title(self) -> str:
        """The evaluation in a few words."""

    @property
    @abstractmethod
    def network_evaluations(self) -> int | None:
        """Network evaluations of single images, as far as the specification alone determines them."""

    @property
    def repetitions(self) -> Sequence["JobSpec"]:
        """The same evaluation on each of its ranges of images; most have one."""
        return [self]

    @abstractmethod
    def prepare(self, session: Session) -> "Job":
        """Check everything and load what is needed, without evaluating the network.

        Raises:
            UserError: bad input.
        """


@dataclass(frozen=True, eq=False)
class Job:
    """An evaluation that was checked and can be computed.

    Attributes:
        title: in a few words.
        output_dir: its folder.
        records: the file that its record is in, or will be.
        settings: everything that decides the numbers, and nothing else: not the batch size, not the device.
        metadata: what else goes into the record.
        indices: numbers of its images.
        steps: network evaluations of one image.
        model: the network; None where none is run.
        compute: how it is run.
        extractor: of the features; None where none are extracted.
    """

    title: str
    output_dir: Path
    records: RecordFile
    settings: dict[str, Any]
    metadata: dict[str, Any]
    indices: range
    steps: int
    model: LoadedModel | None
    compute: ComputeSpec
    extractor: FeatureExtractor | None = None

    @property
    def key(self) -> str:
        """The cache key: 16 hexadecimal digits, a hash of the settings."""
        return record_key(self.settings)

    @property
    def shards(self) -> Shards:
        """The results of single batches, until there is a record."""
        return Shards(self.output_dir / UNFINISHED / self.key, self.indices)

    @property
    def shares_gpu(self) -> bool:
        """Whether a GPU samples while another thread of this process uses it; not where it captures CUDA graphs."""
        return torch.device(self.compute.device).type == "cuda" and not self.compute.graphs

    @property
    def overlaps(self) -> bool:
        """Whether features are extracted meanwhile; not of samples in TF32, a setting of the whole process."""
        return self.shares_gpu and not self.compute.uses_tf32

    def find_record(self) -> Record | None:
        """Return its record if there is one."""
        return self.records.find(self.key)

    @contextmanager
    def lock_unless_done(self, processes: Processes) -> Iterator[Record | None]:
        """Give the record if there is one, else None; then no other run can compute this job inside the block.

        Raises:
            UserError: another run is computing it, or the processes have different jobs.
        """
        processes.check_same(self.key)
        if (record := processes.run_on_main(self.find_record)) is not None:
            yield record
            return
        with self.shards.lock(processes):
            record = processes.run_on_main(self.find_record)  # another run may have finished it meanwhile
            if processes.is_main:
                if record is not None:
                    self.shards.delete()
                else:
                    self.shards.warn_of_other_code(self.title)
            yield record

    def append_record(self, results: dict[str, Any], processes: Processes) -> Record:
        """Write the record, with the results of the main process; return it in all processes."""
        return processes.run_on_main(lambda: self.write_record(results, processes))

    def write_record(self, results: dict[str, Any], processes: Processes) -> Record:
        """Add the record, delete the shards, and return the record; in the main process of those that computed it."""
        others = sorted({*self.shards.other_revisions(), *results.pop("other_revisions", ())})
        record = {
            "key": self.key,
            **self.settings,
            **self.metadata,
            **self._training(),
            "network_evaluations": len(self.indices) * self.steps,
            **results,
            "compute": {
                "device": device_name(self.compute.device),
                "processes": processes.world_size,
                "batch_size": self.compute.batch_size,
                **({} if self.model is None else self._settings()),
            },
            **provenance(),
            **({"other_revisions": others} if others else {}),  # that computed some of its images
        }
        self.records.append(record)
        self.shards.delete()
        return record

    def _settings(self) -> dict[str, str]:
        """Return how the network was run, and why so."""
        settings = {"settings": words(dict.fromkeys(SETTINGS, False) | self.compute.given)}
        return settings | ({"reason": self.compute.reason} if isinstance(self.compute, ChosenCompute) else {})

    def _training(self) -> dict[str, str]:
        """Return the names of the training and of its W&B run, as far as there are any."""
        if self.model is None:
            return {}
        run = {"run": run_name(self.metadata["config"]["checkpoint"])}
        return run | ({"training_run": self.model.origin[WANDB_RUN]} if WANDB_RUN in self.model.origin else {})


def run_job(
    spec: JobSpec, session: Session | None, compute: Callable[[Job, Session], dict[str, Any]]
) -> tuple[Record, bool]:
    """Return the record of an evaluation, and whether it was computed now rather than found among the records.

    Args:
        spec: what to evaluate.
        session: what this evaluation shares with others; None for one of its own.
        compute: what is measured; returns the results in the main process, called by all processes together.
    """
    session = session or Session()
    with session.processes.barrier():
        job = spec.prepare(session)
    with job.lock_unless_done(session.processes) as record:
        if record is not None:
            return record, False
        return job.append_record(compute(job, session), session.processes), True


def run_name(checkpoint: str) -> str:
    """Return the name of the training that wrote a checkpoint, RUN/checkpoints/FILE, or that of another model file."""
    path = Path(checkpoint).absolute()
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.stem


def count_shown(grid: int, batch: range, first: int = 0) -> int:
    """Return how many images of a batch are in a grid of the images from number `first` on."""
    return min(len(batch), max(0, first + grid - batch.start))


def check_shape(model: LoadedModel, images: Images) -> None:
    """Refuse a data set whose images have another shape than those of the model.

    Raises:
        UserError: they have.
    """
    if model.spec.image_shape != images.shape:
        raise UserError(
            f"the checkpoint makes images of (channels, height, width) {model.spec.image_shape}, {images.name} has "
            f"{images.shape}; choose the data the model was trained on."
        )


def check_data(session: Session, model: LoadedModel, data: DataSpec, images: Images) -> None:
    """Do `check_shape`, and warn where the model was trained on another data set, as far as both are known.

    Raises:
        UserError: see `check_shape`.
    """
    check_shape(model, images)
    trained_on, category = model.spec.data, model.recipe.get("data.category")
    if not {trained_on, data.name} <= DATASETS.keys() - {"folder", "npz"}:
        return
    if trained_on != data.name or (data.name == "lsun" and category not in (None, data.category)):
        trained_on += f" ({category})" if category else ""
        session.warn_once(f"the model was trained on {trained_on}, and is compared with images of {images.name}.")


def model_settings(model: LoadedModel) -> dict[str, Any]:
    """Return what a record states about the model."""
    # The same weights give other numbers with another schedule, or with other groups in a normalisation.
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


def sampler_settings(sampler: SamplerSpec, tau: Sequence[float]) -> dict[str, Any]:
    """Return what a record states about the sampler: what decides the numbers, not how it was named."""
    return {**sampler.settings(), "tau": list(tau)}


def table_position(model: LoadedModel, sampler: SamplerSpec, tau: Sequence[float]) -> dict[str, Any]:
    """Return what decides where a record stands in a table."""
    return {
        "trained_on": model.spec.data,
        "recipe": model.recipe,
        "S": len(tau) if sampler.scheduler is None else asked_steps(sampler),
        "nfe": network_evaluations(model, sampler),
        "label": row_label(sampler) + condition_suffix(model),
        "spacing": spacing_name(sampler, tau, model.spec.schedule.T),
        "distinct_evaluations": distinct_evaluations(tau),
    }


def device_name(device: str) -> str:
    """Return the model name of a device, by which times can be compared."""
    named = torch.device(device)
    if named.type == "cpu":
        return f"{platform.machine()} processor, {torch.get_num_threads()} threads"
    module = torch.get_device_module(named.type)
    return module.get_device_name(named) if hasattr(module, "get_device_name") else f"{platform.machine()} {named.type}"
