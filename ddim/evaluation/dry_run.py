"""What evaluations will cost, from a short timing and from the number of operations."""

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

from ddim.evaluation.job import Job, JobSpec
from ddim.evaluation.session import Session
from ddim.evaluation.sweep import Timings, for_each_job, forecast, remaining
from ddim.inference.auto import flops
from ddim.networks import build_network, without_memory

RATE = 40e12  # operations per second of one GPU, as in the README's hours


class Cost(NamedTuple):
    """Of a job: operations of its network, bytes of its features, and bytes of the images that it keeps."""

    operations: int
    features: int
    images: int


def dry_run(specs: Sequence[JobSpec], session: Session) -> list[str]:
    """Return what evaluations will cost, as human-readable lines; no image is generated, and nothing is written.

    Those that cannot be computed are named; there are no lines if none can.
    """
    timings: Timings = {}
    measured, refused = for_each_job(specs, session, lambda spec, job: (remaining(job, timings), _cost(spec, job)))
    if not measured:
        return []
    lines = forecast([work for work, _ in measured], refused, session.processes.world_size)
    costs = [cost for _, cost in measured]
    hours = timedelta(seconds=round(sum(cost.operations for cost in costs) / RATE))
    images = sum(cost.images for cost in costs)
    return [
        *lines,
        f"operations: {sum(cost.operations for cost in costs):.2g} of the network, {hours} on one GPU at 40 TFLOP/s",
        f"disk: {_size(max(cost.features for cost in costs))} while an evaluation runs"
        + (f", {_size(images)} of images at most" if images else ""),
        "not counted: metrics; features of a reference set and exact trajectories that were not computed before",
        "nothing was recorded; leave dry_run out to evaluate.",
    ]


def _cost(spec: JobSpec, job: Job) -> Cost:
    assert job.model is not None  # only images that exist already have none, and they have no dry run
    n, shape = len(job.indices), job.model.spec.image_shape
    with without_memory(job.model.spec.network):  # nor the loops of compute.winograd, which the counter does not see
        network = build_network(job.model.spec.network, job.model.spec.network_spec).eval()
    features = 0 if job.extractor is None else 4 * n * job.extractor.dimension(shape)  # float32
    images = n * math.prod(shape) if getattr(spec, "save_images", False) else 0
    return Cost(n * job.steps * flops(network, shape, job.model.spec.num_classes), features, images)


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
