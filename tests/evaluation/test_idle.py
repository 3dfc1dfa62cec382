"""A sweep on several processes keeps all of them busy: metrics are computed while the next evaluations are sampled.

DDIM_IDLE=150 simulates 25 evaluations on 8 GPUs in about so many seconds; processes that sample sleep.
"""

import dataclasses
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from two_processes import run_in_processes

from ddim.diffusion.spec import SamplerSpec
from ddim.distributed import Processes
from ddim.errors import UserError
from ddim.evaluation import fidelity
from ddim.evaluation.fidelity import EvaluateSpec, evaluate
from ddim.results.records import RECORDS, RecordFile

pytestmark = pytest.mark.integration
SCRIPTS = Path(__file__).parents[2] / "scripts"
IDLE = float(os.environ.get("DDIM_IDLE", "0"))
STEPS, ETAS = (1, 2, 5, 10, 50), (0.0, 0.2, 0.5, 0.7, 1.0)  # as Table 1, with a twentieth of its steps
MEASURING = 0.006  # seconds of the metrics of an evaluation, of all seconds: 7 s of 20 minutes


def run_sweep(specs: list[EvaluateSpec]) -> list[str]:
    """Compute the jobs of a sweep as the script does, without its report; return the errors."""
    sys.path.insert(0, str(SCRIPTS))
    import _sweep

    sweep, errors = _sweep.Sweep("ddim.evaluation.fidelity", "EvaluateSpec"), []
    sweep.build = lambda spec: spec  # type: ignore[method-assign]
    sweep.write_reports = lambda: None  # type: ignore[method-assign]
    sweep.here = True
    for call in [*(lambda spec=spec: sweep.run(spec) for spec in specs), sweep.report]:
        try:
            call()
        except UserError as error:
            errors.append(str(error))
    assert not sweep.pending
    return errors


def sweep_whose_metrics_are_late(processes: Processes, specs: list[EvaluateSpec]) -> list[str]:
    """Those of the first evaluation wait for the sampling of the second; those of the last fail."""
    sampling, compute, generate = threading.Event(), fidelity.compute_metrics, fidelity.generate_batches

    def late(generated: Any, reference: Any, *more: Any) -> Any:
        assert sampling.wait(30)
        if late.calls == len(specs) - 2:  # one of them is another by another name
            raise UserError("no numbers.")
        late.calls += 1
        return compute(generated, reference, *more)

    def note(model: Any, sampler: SamplerSpec, *more: Any) -> Any:
        if sampler == specs[1].sampler:
            sampling.set()
        return generate(model, sampler, *more)

    late.calls = 0
    fidelity.compute_metrics, fidelity.generate_batches = late, note
    return run_sweep(specs)


def test_a_sweep_samples_while_metrics_are_computed(spec: EvaluateSpec, tmp_path: Path) -> None:
    """With the numbers of single evaluations; a job that is another by another name, and one that fails, too."""
    samplers = [SamplerSpec(S=3), SamplerSpec(S=5), SamplerSpec(S=3, eta=0.0), SamplerSpec(S=4)]
    samplers[2] = SamplerSpec(S=None, spacing="explicit", times=samplers[0].tau(50))
    specs = [dataclasses.replace(spec, sampler=sampler) for sampler in samplers]
    errors = run_in_processes(sweep_whose_metrics_are_late, specs, to=tmp_path / "results")
    assert errors == [["no numbers."], ["process 0 of 2 failed (UserError: no numbers.)."]]  # of the last
    records = RecordFile(Path(spec.output_dir) / RECORDS).read()
    assert len(records) == 2
    for record, single in zip(records, specs, strict=False):
        expected, _ = evaluate(dataclasses.replace(single, output_dir=str(tmp_path / "single")))
        assert record["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)
        assert (record["key"], record["compute"]["processes"]) == (expected["key"], 2)


def simulate(processes: Processes, specs: list[EvaluateSpec], unit: float, measuring: float) -> tuple[float, float]:
    """Return the seconds that this process samples, and all.

    An image takes `unit` seconds a step, the metrics of an evaluation `measuring`.
    """
    busy = 0.0
    compute = fidelity.compute_metrics

    def sleep(model: Any, sampler: SamplerSpec, batches: list[range], *_: Any) -> Any:
        nonlocal busy
        for batch in batches:
            start = time.monotonic()
            time.sleep(len(batch) * sampler.S * unit)
            busy += time.monotonic() - start
            generator = torch.Generator().manual_seed(batch.start)
            yield batch, torch.randint(256, (len(batch), 1, 8, 8), dtype=torch.uint8, generator=generator)

    def slow(*arguments: Any) -> Any:
        time.sleep(measuring)
        return compute(*arguments)

    fidelity.generate_batches, fidelity.compute_metrics = sleep, slow
    with processes.barrier():
        start = time.monotonic()
    run_sweep(specs)
    with processes.barrier():
        return busy, time.monotonic() - start


@pytest.mark.skipif(not IDLE, reason="DDIM_IDLE is not set")
def test_eight_processes_wait_for_less_than_5_percent(spec: EvaluateSpec, tmp_path: Path) -> None:
    """Without what 8 processes need on this machine to agree with each other, which does not grow with the work."""
    evaluate(spec)  # imports for all processes, and measures the reference
    run_sweep([spec])
    spec = dataclasses.replace(spec, n=64, compute=dataclasses.replace(spec.compute, batch_size=4))
    times = {}
    for seconds in (0.0, IDLE):
        folder = str(tmp_path / f"{seconds}")
        specs = [
            dataclasses.replace(spec, sampler=SamplerSpec(S=S, eta=eta), output_dir=folder)
            for eta in ETAS
            for S in STEPS
        ]
        unit = seconds * 8 / (spec.n * len(ETAS) * sum(STEPS))
        results = run_in_processes(simulate, specs, unit, MEASURING * seconds, to=tmp_path / f"t{seconds}", count=8)
        times[seconds] = [sum(values) / 8 for values in zip(*results, strict=True)]
    (_, agreeing), (busy, elapsed) = times.values()
    print(f"{busy=:.1f} {elapsed=:.1f} {agreeing=:.1f}", file=sys.stderr)
    assert 1 - busy / (elapsed - agreeing) < 0.05
