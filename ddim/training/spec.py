"""The settings of a training run, validated."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ddim.checkpoints import ModelSpec
from ddim.config import FilePath, build, check_name, choose, config_context
from ddim.data.datasets import DataSpec, class_names
from ddim.diffusion.guidance import ALL
from ddim.diffusion.learned_variance import VARIANCES
from ddim.diffusion.prediction import check_level
from ddim.diffusion.schedule import ScheduleSpec
from ddim.errors import UserError
from ddim.evaluation.fidelity import EvaluateSpec
from ddim.inference.compute import ComputeSpec
from ddim.networks import NETWORKS
from ddim.plugins import imported_plugins
from ddim.random import check_seed
from ddim.results.wandb import LoggerSpec
from ddim.training.callbacks import GridSpec
from ddim.training.ema import EMASpec
from ddim.training.module import ObjectiveSpec, OptimSpec
from ddim.training.validation import EvalSpec


@dataclass(frozen=True)
class TrainerSpec:
    """How and how long to train.

    A precision, or a setting below it, that is None is chosen by the device and the amount of work.

    Attributes:
        max_steps: optimiser steps, including those before resuming.
        batch_size: the global batch of one optimiser step, over all processes and accumulated batches.
        accumulate: micro-batches per optimiser step on each process.
        accelerator, num_nodes, strategy: Lightning's.
        devices: how many on each node, auto for all, or the numbers of GPUs, such as [0,2].
        precision: 32-true or bf16-mixed; the weights stay float32.
        tf32: let GPUs multiply float32 numbers of 10 bits instead of 23.
        channels_last, compile, winograd: see `ddim.networks.accelerate`.
        graphs: also replay the compiled network and its gradients as CUDA graphs; never chosen. On one GPU only, which
            must not accumulate: the next replay overwrites the gradients of the last one.
        num_workers: processes that read images ahead; useful when those are not in memory.
        log_every, checkpoint_every: optimiser steps.
        keep_last: how many of the newest checkpoints are kept.
        keep_every: checkpoints whose step is a multiple of it are kept for good; 0 for none.
        keep_best: how many of the best by `eval` are kept, the best also as best.ckpt; 0 for none.
        max_skipped: steps in a row that may be skipped because their gradient is not finite.
        overfit: train on the first `batch_size` images only, which a working training learns by heart.
        profiler: Lightning's simple (by hook) or advanced (by function) profiler, or torch's of ten steps (kernels: by
            operation on the device), which writes into the folder of the run; null for none.

    Raises:
        ValueError: a number that must be positive is not, or is larger than addresses of random numbers; fewer images
            than processes; no GPU, or one twice; bf16 with winograd, which is for float32; or graphs with several
            processes or accumulated batches.
    """

    max_steps: int = 800_000
    batch_size: int = 128
    accumulate: int = 1
    accelerator: str = "auto"
    devices: int | str | tuple[int, ...] = 1
    num_nodes: int = 1
    strategy: str = "auto"
    precision: Literal["32-true", "bf16-mixed"] | None = "32-true"
    tf32: bool | None = False
    channels_last: bool | None = False
    compile: bool | None = False
    winograd: bool | None = False
    graphs: bool = False
    num_workers: int = 0
    log_every: int = 100
    checkpoint_every: int = 5000
    keep_last: int = 2
    keep_every: int = 0
    keep_best: int = 1
    max_skipped: int = 100
    overfit: bool = False
    profiler: Literal["simple", "advanced", "kernels"] | None = None

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "batch_size",
            "accumulate",
            "num_nodes",
            "log_every",
            "checkpoint_every",
            "keep_last",
            "max_skipped",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("max_steps", "batch_size"):  # see `random_words`
            if getattr(self, name) > 1 << 32:
                raise ValueError(f"{name}={getattr(self, name)} must be at most 2**32.")
        if isinstance(self.devices, tuple) and (
            not self.devices or min(self.devices) < 0 or len(set(self.devices)) < len(self.devices)
        ):
            raise ValueError(f"devices={list(self.devices)} must hold the numbers of different GPUs, such as [0,2].")
        devices = self._devices()  # None: as many as there are
        processes = (devices or 1) * self.num_nodes
        if processes * self.accumulate > self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} must hold an image for each of {processes} processes x "
                f"{self.accumulate} accumulated batches."
            )
        if self.strategy.startswith(("fsdp", "deepspeed")):
            raise ValueError(
                f"strategy={self.strategy} may divide the parameters among the processes, and the averages need all of "
                "them in each; take strategy=ddp, or trainer.accumulate if the training does not fit into memory."
            )
        if self.num_workers > 1024:
            raise ValueError(f"num_workers={self.num_workers} must be at most 1024; about the number of CPUs is best.")
        if self.winograd and self.precision == "bf16-mixed":
            raise ValueError("winograd=true needs precision=32-true: Winograd's algorithm is for float32.")
        if self.graphs and (devices, self.num_nodes, self.accumulate) != (1, 1, 1):
            raise ValueError(
                "graphs=true needs devices=1 (or the number of one GPU), num_nodes=1 and accumulate=1: each replay of "
                "a CUDA graph overwrites the gradients of the last one, and with several processes it was not tried."
            )
        for name in ("keep_every", "keep_best"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative; 0 keeps none for good.")

    def _devices(self) -> int | None:
        if isinstance(self.devices, tuple):
            return len(self.devices)
        return int(self.devices) if str(self.devices).isdecimal() else None


@dataclass(frozen=True)
class TrainSpec:
    """All settings of a training run; see configs/train.yaml.

    Attributes:
        name: of the run.
        output_dir: its folder.
        network: `name`, a key of NETWORKS, and the fields of that network's spec.
        checkpoint: null for a new run, "last" to resume from the newest checkpoint of this run if there is one, or the
            path of one.
        ema: null to train without an average.
        seed: of everything random, 0 .. 2**64 - 1.
        dry_run: report what the run would cost, after a few steps of it, instead of training.

    Raises:
        ValueError: the seed is out of range, or the name is none.
        UserError: weights of `eval` that there are not, or the best checkpoints are asked for and nothing is measured.
    """

    name: str
    output_dir: FilePath
    data: DataSpec
    network: dict[str, Any]
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    objective: ObjectiveSpec = field(default_factory=ObjectiveSpec)
    optim: OptimSpec = field(default_factory=OptimSpec)
    ema: EMASpec | None = field(default_factory=EMASpec)
    trainer: TrainerSpec = field(default_factory=TrainerSpec)
    logger: LoggerSpec = field(default_factory=LoggerSpec)
    grid: GridSpec = field(default_factory=GridSpec)
    eval: EvalSpec = field(default_factory=EvalSpec)
    seed: int = 0
    checkpoint: FilePath | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_name(self.name)
        averages = {} if self.ema is None else self.ema.labels
        for label in self.eval.labels(self.ema is not None):
            choose("eval.weights", label, {"online": None, **averages})
        if self.logger.log_model == "best" and not (self.eval.every and self.trainer.keep_best):
            raise UserError(
                "logger.log_model=best needs a measure of what is best; set eval.every and trainer.keep_best=1, or "
                "choose all."
            )

    @property
    def folder(self) -> Path:
        """Folder of everything that the run writes."""
        return Path(self.output_dir)

    @property
    def checkpoint_dir(self) -> Path:
        """Folder of its checkpoints."""
        return self.folder / "checkpoints"

    def recipe(self) -> dict[str, Any]:
        """Return what else determines the weights after a number of steps, besides the model: plain values by key."""
        data = {key: getattr(self.data, key) for key in ("name", "category", "flip", "resize")}
        if self.data.convert:
            data["convert"] = True  # only then: checkpoints of before this option can be resumed
        if self.data.labels is not None:
            data["labels"] = self.data.labels
        groups = {"objective": self.objective.recipe(), "optim": asdict(self.optim), "data": data}
        groups["ema"] = asdict(self.ema) if self.ema else {"decay": None}
        groups["ema"].pop("posthoc", None)  # which changes no other weights, and may be turned on later
        groups["trainer"] = {"batch_size": self.trainer.batch_size}
        if self.trainer.overfit:
            groups["trainer"]["overfit"] = True
        values = {f"{group}.{key}": value for group, fields in groups.items() for key, value in fields.items()}
        return {"seed": self.seed} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def model_spec(self) -> ModelSpec:
        """Return the description of the model that this run trains.

        Raises:
            UserError: the network's fields are wrong or do not fit the data or its labels, the network is to learn ε
                where nothing but ε is left (zero terminal SNR), or a sampler, of the grid or of `eval`, does not fit T.
        """
        fields = dict(self.network)
        name = fields.pop("name", "unet")
        o, schedule = self.objective, self.schedule.build()
        out_channels = VARIANCES[o.variance] * self.data.channels
        if fields.get("out_channels") not in (None, out_channels):
            raise UserError("network.out_channels follows from objective.variance; leave it null.")
        if o.variance != "fixed":
            fields["out_channels"] = out_channels
        classes = self._classes(fields)
        network_spec = build(choose("network", name, NETWORKS)[0], fields, "network")
        if o.weight in ("vlb", "hybrid") and schedule.T < 2:
            raise UserError(f"objective.weight={o.weight} needs at least two times; set schedule.T above 1.")
        plugins = tuple(imported_plugins())
        model = ModelSpec(name, network_spec, schedule, o.prediction, self.data.name, plugins, o.variance, classes)
        if model.image_shape != (self.data.channels, *self.data.size):
            raise UserError(
                f"the network takes images of (channels, height, width) {model.image_shape}, the data has "
                f"{(self.data.channels, *self.data.size)}; leave network.channels and network.image_size to the data."
            )
        if (model.categories is None) != (self.objective.multinomial is None):
            raise UserError(
                f"network.name={name} and objective.multinomial={self.objective.multinomial} do not fit: pixels that "
                "are one of K categories take categorical_unet with objective=multinomial, and numbers take neither."
            )
        with config_context("objective"):
            check_level(model.prediction, model.schedule[model.schedule.T])
        with config_context("grid.sampler"):
            self.grid.sampler.check(model.schedule, model.prediction, model.variance, model.categories)
        if self.eval.every and self.eval.n:
            with config_context("eval.sampler"):
                self.eval.sampler.check(model.schedule, model.prediction, model.variance, model.categories)
        return model

    def _classes(self, fields: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the classes, and set how many the network has.

        Raises:
            UserError: network.classes is another number, or labels are dropped of which there are none.
        """
        names, given = class_names(self.data), fields.get("classes")
        if given is not None and not names:
            raise UserError(f"network.classes={given} needs labels, and data.labels=null gives none; set data.labels.")
        if given not in (None, len(names)):
            raise UserError(
                f"network.classes={given} contradicts data.labels={self.data.labels}, which gives {len(names)} "
                "classes; leave network.classes null, and it follows from the labels."
            )
        if not names and self.objective.label_drop != ObjectiveSpec.label_drop:
            raise UserError(
                f"objective.label_drop={self.objective.label_drop} drops labels, and data.labels=null gives none; set "
                "data.labels, or leave it out."
            )
        if names:
            fields["classes"] = len(names)
        return names

    def evaluation(self) -> EvaluateSpec:
        """Return the evaluation of `eval`; its weights, device and batch size are those of the process that trains.

        Samples of a conditional network have labels in turn, without guidance.
        """
        e, t = self.eval, self.trainer
        with config_context("eval"):
            return EvaluateSpec(
                checkpoint="last",
                name=self.name,
                output_dir=self.output_dir,
                sampler=e.sampler,
                compute=ComputeSpec("auto", t.batch_size, compile=bool(t.compile), graphs=t.graphs),
                grid=0,
                data=self.data,
                metric=e.metric,
                n=e.n or 1,  # 0 is the held-out loss alone
                seed=e.seed,
                reference_dir=e.reference_dir,
                label=None if self.data.labels is None else ALL,
            )
