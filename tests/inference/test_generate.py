"""Exactly the images asked for, each a function of (weights, sampler, seed, index) only."""

import copy
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ddim
from ddim.checkpoints.model import LoadedModel
from ddim.diffusion.noise import initial_noise
from ddim.diffusion.sampling import last_state
from ddim.diffusion.spec import SamplerSpec
from ddim.distributed import Processes
from ddim.errors import UserError
from ddim.inference import compute as compute_module
from ddim.inference import generate as generate_module
from ddim.inference.batching import split
from ddim.inference.compute import ComputeSpec, find_batch_size, prepare_model, with_batch_size
from ddim.inference.generate import check_sampler, generate, progress, sample_steps

CPU = ComputeSpec("cpu")
SAMPLERS = {
    "ddim": SamplerSpec(S=4),
    "ddpm": SamplerSpec(eta=1.0, S=4),
    "sigma_hat": SamplerSpec("sigma_hat", None, S=4, spacing="quadratic", clip="x0_and_eps", last_time=1),
}


@pytest.fixture(scope="module", params=SAMPLERS, ids=list(SAMPLERS))
def sampler(request: pytest.FixtureRequest) -> SamplerSpec:
    return SAMPLERS[request.param]


def by_hand(model: LoadedModel, sampler: SamplerSpec, indices: range, seed: int) -> Tensor:
    """The library's own function, and the rounding to pixels written out."""
    with torch.no_grad():
        x = ddim.sample(
            model,
            model.spec.schedule,
            ddim.initial_noise(indices, model.spec.image_shape, seed),
            ddim.SPACINGS[sampler.spacing](model.spec.schedule.T, 4),
            ddim.SigmaHat() if sampler.rule == "sigma_hat" else ddim.DDIM(float(sampler.eta or 0)),
            last_time=sampler.last_time,
            prediction=model.spec.prediction,
            clip=sampler.clip,
            seed=seed,
            indices=indices,
        )
    return ((x + 1) * 127.5 + 0.5).floor().clamp(0, 255).to(torch.uint8)


def levels_apart(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


@pytest.fixture(scope="module")
def fifty(model: LoadedModel, sampler: SamplerSpec) -> Tensor:
    return by_hand(model, sampler, range(50), seed=3)


@pytest.mark.parametrize(("n", "batch_size"), [(1, 7), (7, 1), (7, 7), (50, 7), (50, 64)])
def test_exactly_n_images_for_every_batch_size(
    model: LoadedModel, sampler: SamplerSpec, fifty: Tensor, n: int, batch_size: int
) -> None:
    images = generate(model, sampler, range(n), 3, ComputeSpec("cpu", batch_size))
    assert images.dtype == torch.uint8
    assert images.shape == (n, 1, 8, 8)
    assert levels_apart(images, fifty[:n]) <= 1


@pytest.mark.parametrize("size", [1, 7, 16])
@pytest.mark.parametrize("sampler", [SAMPLERS["ddim"], SAMPLERS["ddpm"]])  # clipping to 1 what lies near 50 amplifies
def test_samples_agree_to_1e_5_for_every_batch_size(model: LoadedModel, sampler: SamplerSpec, size: int) -> None:
    def samples(batch: range) -> Tensor:
        x_T = initial_noise(batch, model.spec.image_shape, seed=3)
        return last_state(sample_steps(model, sampler, x_T, batch, 3))

    batches = torch.cat([samples(batch) for batch in split(range(20), size)])
    expected = samples(range(20))  # of an untrained network, so beyond [-1, 1]
    torch.testing.assert_close(batches, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", [SAMPLERS["ddim"], SAMPLERS["ddpm"]], ids=["ddim", "ddpm"])
def test_samples_on_the_gpu_are_those_of_the_cpu(
    model: LoadedModel, sampler: SamplerSpec, gpu: str, record_property: Callable[[str, object], None]
) -> None:
    def samples(device: str) -> Tensor:
        x_T = initial_noise(range(20), model.spec.image_shape, seed=3, device=device)
        prepare_model(placed := copy.deepcopy(model), ComputeSpec(device))
        return last_state(sample_steps(placed, sampler, x_T, range(20), 3)).cpu()

    expected, on_gpu = samples("cpu"), samples(gpu)
    record_property("relative error", float((on_gpu - expected).norm() / expected.norm()))
    torch.testing.assert_close(on_gpu, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"channels_last": True, "compile": True}, {"graphs": True}], ids="+".join)
def test_pixels_on_the_gpu_are_those_of_the_cpu(model: LoadedModel, gpu: str, options: dict[str, bool]) -> None:
    if gpu == "cpu" and "graphs" in options:
        pytest.skip("graphs are for CUDA devices")
    expected = generate(model, SAMPLERS["ddpm"], range(50), 3, CPU)
    compute = ComputeSpec(gpu, 16, **options)
    prepare_model(placed := copy.deepcopy(model), compute)
    assert levels_apart(generate(placed, SAMPLERS["ddpm"], range(50), 3, compute), expected) <= 1


def test_out_of_memory_halves_the_batch_and_the_images_stay(
    model: LoadedModel, sampler: SamplerSpec, fifty: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = generate_module.generate_batch

    def small_device(*arguments: object) -> Tensor:
        if len(arguments[2]) > 10:  # type: ignore[arg-type]
            raise torch.OutOfMemoryError
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(generate_module, "generate_batch", small_device)
    assert levels_apart(generate(model, sampler, range(50), 3, CPU), fifty) <= 1


def test_an_image_does_not_depend_on_the_others(model: LoadedModel, sampler: SamplerSpec, fifty: Tensor) -> None:
    assert levels_apart(generate(model, sampler, range(13, 20), 3, ComputeSpec("cpu", 4)), fifty[13:20]) <= 1
    assert levels_apart(generate(model, sampler, range(0, 50, 9), 3, CPU), fifty[::9]) <= 1
    distinct = {image.numpy().tobytes() for image in fifty}
    assert len(distinct) == 50


def test_another_seed_gives_other_images(model: LoadedModel, sampler: SamplerSpec, fifty: Tensor) -> None:
    assert levels_apart(generate(model, sampler, range(50), 4, CPU), fifty) > 50


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_the_prediction_type_comes_from_the_model(model: LoadedModel, prediction: str) -> None:
    other = dataclasses.replace(model, spec=dataclasses.replace(model.spec, prediction=prediction))
    images = generate(other, SAMPLERS["ddim"], range(3), 0, CPU)
    assert levels_apart(images, by_hand(other, SAMPLERS["ddim"], range(3), 0)) <= 1
    assert levels_apart(images, generate(model, SAMPLERS["ddim"], range(3), 0, CPU)) > 10


def test_bfloat16_is_close_but_not_the_same(model: LoadedModel, fifty: Tensor, sampler: SamplerSpec) -> None:
    images = generate(model, sampler, range(50), 3, ComputeSpec("cpu", bf16=True))
    difference = (images.int() - fifty.int()).abs().float()
    assert 0 < difference.mean() < 2.0


class Diverged(torch.nn.Module):
    """Fine but at the last time."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x / t[0]


def test_samples_that_are_not_finite_are_refused(model: LoadedModel) -> None:
    diverged = dataclasses.replace(model, network=Diverged())
    assert generate(diverged, SamplerSpec(S=1), range(2), 0, CPU).shape == (2, 1, 8, 8)
    with pytest.raises(UserError, match=r"not finite.*bf16=false"):
        generate(diverged, SamplerSpec(S=50), range(2), 0, CPU)


@pytest.mark.parametrize("n", [0, -3])
def test_no_images_are_refused(model: LoadedModel, n: int) -> None:
    with pytest.raises(UserError, match="n must be at least 1"):
        generate(model, SAMPLERS["ddim"], range(n), 0, CPU)


def test_more_steps_than_times_are_refused_with_both_numbers(model: LoadedModel) -> None:
    with pytest.raises(UserError, match=r"S=51 .*T=50"):
        generate(model, SamplerSpec(S=51), range(1), 0, CPU)
    with pytest.raises(UserError, match=r"^sampler: .*51"):
        check_sampler(model, SamplerSpec(S=None, spacing="explicit", times=(1, 51)))
    assert check_sampler(model, SamplerSpec(S=50)) == tuple(range(1, 51))


def test_the_progress_bar_shows_on_terminals_only(model: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    generate(model, SAMPLERS["ddim"], range(2), 0, CPU)
    assert capsys.readouterr() == ("", "")


def test_one_process_of_several_shows_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for rank in range(3):
        with progress(10, "sampling", Processes(rank, 3)) as bar:
            bar.update(10)
        assert ("sampling: 100%" in capsys.readouterr().err) == (rank == 0)


def test_prepare_model_moves_and_lays_out_the_network(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    network = torch.nn.Conv2d(3, 4, 3)
    compiled: list[bool] = []
    network.compile = lambda **_: compiled.append(True)  # type: ignore[method-assign]  # the real one takes seconds
    monkeypatch.setattr(ComputeSpec, "__post_init__", lambda _: None)  # which refuses meta, a device of every machine
    compute = ComputeSpec("meta", channels_last=True, compile=True)
    prepare_model(dataclasses.replace(model, network=network), compute)
    assert network.weight.device.type == "meta"
    assert network.weight.is_contiguous(memory_format=torch.channels_last)
    assert compiled == [True]


@pytest.mark.parametrize("device", ["cuda:77", "hpu"])
def test_a_device_that_is_not_there_is_refused(model: LoadedModel, device: str) -> None:
    with pytest.raises(UserError, match=f"device={device} cannot be used here .*cpu always can"):
        prepare_model(dataclasses.replace(model, network=torch.nn.Linear(1, 1)), ComputeSpec(device))


@pytest.mark.parametrize("device", ["abacus", "cuda:x", "cuda:-1", "", "meta"])
def test_what_is_no_device_or_holds_no_numbers_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=f"device={device} is none that can compute; choose cpu"):
        ComputeSpec(device)


@pytest.mark.parametrize(
    ("fits", "fixed", "linear", "expected"),
    [
        (10**9, 1.0, 0.001, 1024),  # starting costs so much that more is always better, up to the most that is tried
        (10**9, 0.001, 0.001, 32),  # 31 of 32 parts of the gain are there
        (10**9, 0.0, 0.1, 1),
        (100, 1.0, 0.001, 64),  # 128 do not fit, and the half of them does
        (10**9, 0.0, 6.0, 1),
    ],
)
def test_batch_size_search_takes_the_smallest_fast_size(
    monkeypatch: pytest.MonkeyPatch, fits: int, fixed: float, linear: float, expected: int
) -> None:
    clock, tried = [0.0], []
    monkeypatch.setattr("ddim.inference.compute.time.perf_counter", lambda: clock[0])

    def evaluate(count: int) -> None:
        if count > fits:
            raise torch.OutOfMemoryError
        tried.append(count)
        clock[0] += fixed + linear * count

    assert find_batch_size(evaluate, 1024) == expected
    assert max(tried) <= 1024
    assert clock[0] < 200


def test_a_batch_size_of_zero_is_found(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr(compute_module, "evaluate_zeros", lambda model, compute, count: tried.append(count))
    tuned = with_batch_size(model, ComputeSpec("cpu", batch_size=0), most=4)
    assert tuned.batch_size in (1, 2, 4)
    assert set(tried) == {1, 2, 4}
    assert with_batch_size(model, CPU) is CPU
    with pytest.raises(UserError, match="batch_size=0 was not replaced"):
        generate(model, SamplerSpec(S=2), range(2), 0, ComputeSpec("cpu", batch_size=0))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"batch_size": -1}, "batch_size=-1 must be at least 1, or 0"),
        ({"bf16": True, "winograd": True}, "bf16 and winograd exclude"),
    ],
)
def test_ways_to_compute_that_make_no_sense_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ComputeSpec("cpu", **fields)
