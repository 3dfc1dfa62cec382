"""Images of the user encoded to x_T, in a file that sampling and figures start from (section 5.4)."""

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddim.checkpoints import LoadedModel, load_model
from ddim.config import FilePath, changed_words, check_name, config_context
from ddim.data.image_folder import checkpoint_images
from ddim.data.images import normalize
from ddim.diffusion.guidance import GuidanceSpec
from ddim.diffusion.inversion import Inversion
from ddim.diffusion.labels import asked_steps
from ddim.diffusion.rules import DDIM
from ddim.diffusion.sampling import Model, State
from ddim.diffusion.spec import SamplerSpec
from ddim.distributed import SINGLE_PROCESS, Processes
from ddim.evaluation.job import UNFINISHED, model_settings
from ddim.evaluation.shards import Shards
from ddim.inference.batching import map_batches
from ddim.inference.compute import ComputeSpec, autocast, prepare_model, with_batch_size
from ddim.inference.conditioning import condition_settings, conditioned, guided_states, one_label
from ddim.inference.encoded_files import SECOND, X_T, EncodedImages
from ddim.inference.generate import Numbers, check_numbers, check_sampler, progress
from ddim.io import Tensors, check_can_write, explain_write_errors
from ddim.results.records import provenance, record_key

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodeSpec:
    """See configs/encode.yaml.

    Attributes:
        checkpoint: path of the model.
        source: the folder of images, sub-folders included.
        output_dir, name: of the file, without .safetensors.
        compute: how to compute.
        sampler: the times; deterministic, eta=0.
        inversion, iterations: how to encode, see `ddim.diffusion.inversion.Inversion`.
        resize: resize the shorter side and centre-crop images of another size, instead of refusing them.
        convert: convert grey and colour images to those of the checkpoint, instead of refusing them.
        weights: ema, online, or ema_RATE for an additional EMA.
        label, guidance: of a conditional model, see `ddim.inference.conditioning.conditioned`; one label for
            all images.
        overwrite: replace an earlier file.

    Raises:
        ValueError: a sampler that is not deterministic or does not end at t = 0, a name that is none, or what
            `Inversion` refuses.
    """

    checkpoint: FilePath
    source: FilePath
    output_dir: FilePath
    name: str
    compute: ComputeSpec
    sampler: SamplerSpec = field(default_factory=SamplerSpec)
    inversion: str = "paper"
    iterations: int | None = None
    resize: bool = False
    convert: bool = False
    weights: str = "ema"
    label: int | str | None = None
    guidance: GuidanceSpec = field(default_factory=GuidanceSpec)
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_name(self.name)
        check_encoding(self.sampler, self.how)

    @property
    def how(self) -> Inversion:
        """How images are encoded."""
        return Inversion(self.inversion, self.iterations)

    @property
    def path(self) -> Path:
        """Where the file is written."""
        return Path(self.output_dir) / f"{self.name}.safetensors"


def check_encoding(sampler: SamplerSpec, how: Inversion) -> None:
    """Check that images can be encoded over the times of a sampler, and decoded again.

    Raises:
        ValueError: they cannot.
    """
    if sampler.build_rule() != DDIM(0.0) or sampler.last_time or sampler.corrector_steps:
        raise ValueError(
            "encoding is deterministic and starts at the image: "
            "take sampler=ddim, sampler.eta=0, last_time=0 and no corrector."
        )
    how.check(asked_steps(sampler), sampler.build_clip())


def write_encoded(spec: EncodeSpec, processes: Processes = SINGLE_PROCESS) -> None:
    """Encode the images of a folder, each process its share, and write the file (`spec.path`).

    What an interrupted call has encoded is kept, and the next one goes on from there.

    Raises:
        UserError: bad input, or a file that would be overwritten; before any network evaluation.
    """
    with processes.barrier():
        check_can_write(spec.path, spec.overwrite)
        compute = dataclasses.replace(spec.compute, device=processes.local_device(spec.compute.device))
        model = conditioned(load_model(spec.checkpoint, spec.weights), spec.label, spec.guidance)
        check_numbers(model)
        one_label(model, "encoding")
        tau = check_sampler(model, spec.sampler)
        with config_context("inversion"):
            spec.how.check_levels(model.spec.schedule, spec.sampler.tau(model.spec.schedule.T), model.spec.prediction)
        images = checkpoint_images(Path(spec.source), model.spec.image_shape, spec.resize, spec.convert)
        steps = inversion_evaluations(model, spec.how, spec.sampler)[0]
        compute = prepare_model(model, compute, len(images) * steps, len(images), processes.world_size == 1)
    metadata: dict[str, Any] = {
        **model_settings(model),
        **condition_settings(model),
        "weights": model.weights,
        "sampler": spec.sampler.settings(),
        "tau": list(tau),
        "inversion": spec.how.settings(),
        "nfe": steps,
        "bf16": compute.bf16,
        "tf32": compute.uses_tf32,
        "fingerprint": processes.run_on_main(images.fingerprint),  # every image is read: a wrong one is named here
    }
    processes.check_same(key := record_key(metadata))
    shards = Shards(Path(spec.output_dir) / UNFINISHED / key, range(len(images)))

    def encode(batch: range) -> Tensors:
        x_0 = normalize(images.batch(torch.tensor(batch)).to(compute.state_device))
        x_T, second = encode_batch(model, spec.how, spec.sampler, x_0, compute, bar)
        return {X_T: x_T.cpu(), **({SECOND: second.cpu()} if spec.inversion == "bdia" else {})}

    with shards.lock(processes):
        if processes.is_main:
            shards.warn_of_other_code("encoding")
        compute = with_batch_size(model, compute, len(images), processes)
        batches = shards.missing(compute.batch_size, processes)
        with progress(steps * sum(map(len, batches)), "encoding", processes) as bar, shards.writer(processes) as write:
            for batch, tensors in map_batches(batches, encode):
                write(batch, tensors)
        metadata |= {
            "data": model.spec.data,
            "source": spec.source,
            "files": [file.relative_to(spec.source).as_posix() for file in images.files],
            "decode_with": " ".join(decode_with(spec)),
            **provenance(),
        }
        with processes.barrier(), explain_write_errors(spec.path):
            if processes.is_main:
                save_shards(spec, shards, metadata)


def save_shards(spec: EncodeSpec, shards: Shards, metadata: dict[str, Any]) -> None:
    """Write the file of what was stored batch by batch, and delete the batches."""
    if others := shards.other_revisions():
        metadata |= {"other_revisions": others}  # that computed some of its images
    second = shards.read_all(SECOND) if spec.inversion == "bdia" else None
    x_T = shards.read_all(X_T)
    EncodedImages(x_T, second, metadata).save(spec.path)
    log.info("the standard deviation of x_T is %.3g; that of noise is 1.", x_T.std().item())
    shards.delete()


def decode_with(spec: EncodeSpec) -> list[str]:
    """Return the sampler that encoding inverts, with label and guidance, as words of a command."""
    words = changed_words("sampler", spec.sampler)
    if spec.sampler.S == SamplerSpec().S:  # stated in any case
        words.insert(0, f"sampler.S={spec.sampler.S}")
    if spec.label is not None:
        words += [f"label={spec.label}", f"guidance.w={spec.guidance.w:g}"]
    if spec.guidance.interval is not None:
        words.append(f"guidance.interval=[{','.join(map(str, spec.guidance.interval))}]")
    return ["sampler=bdia" if spec.inversion == "bdia" else "sampler=ddim", *words]


def inversion_evaluations(model: LoadedModel, how: Inversion, sampler: SamplerSpec) -> tuple[int, int]:
    """Return how often an image evaluates the network (NFE), encoded and decoded, with those of guidance."""
    schedule, prediction, clip = model.spec.schedule, model.spec.prediction, sampler.build_clip()
    tau = sampler.tau(schedule.T)
    counts = how.evaluations(len(tau))
    if model.condition is None:
        return counts

    def up(network: Model, x: Tensor) -> Iterator[State]:
        return how.encode(network, schedule, x, tau, prediction=prediction, clip=clip)

    def down(network: Model, x: Tensor) -> Iterator[State]:
        return how.decode(network, schedule, x, tau, second=x, prediction=prediction, clip=clip)

    return model.condition.evaluations(up, counts[0]), model.condition.evaluations(down, counts[1])


@torch.inference_mode()
def encode_batch(
    model: LoadedModel,
    how: Inversion,
    sampler: SamplerSpec,
    x_0: Tensor,
    compute: ComputeSpec,
    bar: tqdm | None = None,
    indices: Numbers | None = None,
) -> tuple[Tensor, Tensor]:
    """Return x_T, and the state before it, of images x_0, (B, C, H, W) in [-1, 1] on the device.

    Args:
        model: on its device (`prepare_model`).
        how: the convention.
        sampler: its times and clip policy.
        x_0: the images.
        compute: device and precision.
        bar: counts network evaluations of single images.
        indices: numbers of the images, (B,), where their labels depend on them.
    """
    spec, tau, x, before = model.spec, sampler.tau(model.spec.schedule.T), x_0, x_0

    def walk(network: Model) -> Iterator[State]:
        return how.encode(network, spec.schedule, x_0, tau, prediction=spec.prediction, clip=sampler.build_clip())

    with autocast(compute):
        states = guided_states(model, range(len(x_0)) if indices is None else indices, x_0.device, walk)
        for state in counted(states, inversion_evaluations(model, how, sampler)[0], bar):
            before, x = x, state.x
    return x, before


def counted(states: Iterator[State], evaluations: int, bar: tqdm | None) -> Iterator[State]:
    """Yield the states, show their network evaluations, and check that they were as many as records state."""
    seen = 0
    for state in states:
        if bar is not None:
            bar.update(len(state.x) * (state.evaluations - seen))
        seen = state.evaluations
        yield state
    assert seen == evaluations, (seen, evaluations)
