"""The exported network and pipeline against diffusers itself: the same noise, the same images."""

import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from layouts import NETWORK, NETWORKS, randomised
from tensors import gaussian32

from ddim import DDIM, linear_schedule, sample
from ddim.checkpoints import ModelSpec, StoredModel
from ddim.checkpoints.convert.diffusers import scheduler_config
from ddim.checkpoints.convert.exporting import write_diffusers
from ddim.checkpoints.convert.model_zoo import PRESETS
from ddim.diffusion.noise import step_noise
from ddim.diffusion.schedule import cosine_schedule, from_betas, scaled_linear_schedule
from ddim.diffusion.timesteps import linear_tau, reference_uniform_tau
from ddim.networks import zero_based

pytestmark = pytest.mark.integration


@pytest.fixture
def folder(tmp_path):
    """A folder that does not stay behind: the large networks fill a disk."""
    yield tmp_path / "model"
    shutil.rmtree(tmp_path)


def write(network, spec, folder, schedule=None, prediction="eps"):
    model = ModelSpec("unet", spec, schedule or linear_schedule(), prediction)
    write_diffusers(StoredModel(model, network.state_dict(), "ema", None), folder, [], None)


FIVE = (1, 2, 500, 999, 1000)
CASES = [pytest.param(spec, FIVE, 3, id=name) for name, spec in NETWORKS.items()]
# LSUN's weights on images of a quarter of the size, which they do not depend on: attention stays on its level.
PUBLISHED = PRESETS | {"lsun": replace(PRESETS["lsun"], image_size=(64, 64), attn_resolutions=(4,))}
CASES += [pytest.param(spec, FIVE, 1, id=name, marks=pytest.mark.slow) for name, spec in PUBLISHED.items()]


@pytest.mark.parametrize(("spec", "times", "batch"), CASES)
def test_the_exported_network_predicts_the_same(hf, folder, spec, times, batch):
    network = randomised(spec)
    write(network, spec, folder)
    theirs, report = hf.UNet2DModel.from_pretrained(
        folder, subfolder="unet", local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
    )
    assert all(not entries for entries in report.values())
    assert not theirs.training
    x = gaussian32(batch, spec.channels, *spec.image_size, seed=1)
    ours = zero_based(network)
    outputs = []
    labels = () if spec.classes is None else (torch.tensor([2, 3, 0])[:batch],)
    for t in times:
        eps = ours(x, torch.full((batch,), t), *labels)
        with torch.no_grad():
            expected = theirs(x, t - 1, *labels).sample
        assert 0.3 < expected.std() < 3
        assert (eps - expected).abs().max() <= 1e-5
        outputs.append(eps)
    # A time that is off by one, or ignored, would show.
    assert all((b - a).abs().max() > 1e-3 for a, b in pairwise(outputs))


def steady(seed=0):
    """A network with random weights whose output is nearly 1.3 x_t.

    Of noise that has little to do with x_t, dividing by sqrt(alpha_bar) = 1/157 makes images that are all black and
    white, and nothing could be compared. So two features carry x_t and -x_t past the norm, which large constants
    keep from dividing by the size of x_t, and silu(x) - silu(-x) = x.
    """
    spec = replace(NETWORK, num_groups=2)
    network = randomised(spec, seed)
    last, size, ch = network.up[0].block[-1], 16.0, spec.ch
    for layer in (network.conv_in, last.conv2, last.nin_shortcut, network.conv_out):
        layer.weight.mul_(0.5)
    for i, sign in ((0, 1), (4, -1)):  # the first feature of each group
        network.conv_in.weight[i, 0, 1, 1] += sign
        last.nin_shortcut.weight[i, ch + i] += 1  # of [from below, skip], the skip of conv_in
        last.nin_shortcut.bias[i + 1] += size
        last.nin_shortcut.bias[i + 2] -= size
        network.norm_out.weight[i] = size / 2**0.5
        network.conv_out.weight[0, i, 1, 1] += 1.3 * sign
    network.conv_out.bias.sub_(network(torch.zeros(1, 1, 8, 8), torch.tensor([300])).mean())
    return spec, network


PIPELINES = {  # prediction, schedule, steps
    "eps": ("eps", linear_schedule(), 50),
    "x0": ("x0", linear_schedule(), 20),
    "v": ("v", linear_schedule(), 20),
    "eps, other betas": ("eps", linear_schedule(200, 0.0005, 0.1), 25),
    "x0, scaled_linear": ("x0", scaled_linear_schedule(100), 20),
    "v, cosine": ("v", cosine_schedule(), 20),
    "v, oblong": ("v", linear_schedule(), 10),
    "v, custom": ("v", from_betas([0.3, 0.01, 0.125, 0.4, 1e-5, 0.2]), 6),
}


def pixels(x):
    return (x / 2 + 0.5).clamp(0, 1)


def load(hf, folder, pipeline="DDIMPipeline"):
    loaded = getattr(hf, pipeline).from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def images_there(pipeline, steps):
    """Images from the x_T that `gaussian32` draws."""
    generator = torch.Generator().manual_seed(1)
    images = pipeline(2, generator, num_inference_steps=steps, output_type="np").images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("case", PIPELINES)
def test_the_exported_pipeline_makes_our_images(hf, folder, case):
    prediction, schedule, steps = PIPELINES[case]
    spec = NETWORKS["oblong"] if "oblong" in case else NETWORK
    spec, network = steady() if prediction == "eps" else (spec, randomised(spec))
    write(network, spec, folder, schedule, prediction)
    model, x_T = zero_based(network), gaussian32(2, spec.channels, *spec.image_size, seed=1)

    def ours(**changes):
        options = {"tau": reference_uniform_tau(schedule.T, steps), "prediction": prediction} | changes
        return pixels(sample(model, schedule, x_T, **options))

    images = ours()
    assert images.shape == x_T.shape
    for pipeline in ("DDIMPipeline", "DDPMPipeline"):
        assert (images_there(load(hf, folder, pipeline), steps) - images).abs().max() <= 1e-4
    # The comparison bites: there is something to see, and each choice that the configuration makes is seen.
    assert ((images == 0) | (images == 1)).float().mean() < 0.5
    assert images.std() > 0.05
    others = {
        "clipped": ours(clip="x0"),
        "not to the end": ours(last_time=1),
        "other prediction": ours(prediction={"eps": "v", "v": "x0", "x0": "v"}[prediction]),
    }
    if steps < schedule.T:
        others["other times"] = ours(tau=linear_tau(schedule.T, steps))
    assert [name for name, x in others.items() if (x - images).abs().max() < 5e-4] == []


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_exported_pipeline_takes_our_noise_at_any_eta(hf, folder, eta):
    spec, network = steady()
    write(network, spec, folder)
    pipeline = load(hf, folder)
    pipeline.scheduler.set_timesteps(50)
    x = x_T = gaussian32(2, 1, 8, 8, seed=1)
    for k, t in enumerate(pipeline.scheduler.timesteps, start=1):
        noise = step_noise(range(2), (1, 8, 8), 3, k)
        with torch.no_grad():
            eps = pipeline.unet(x, t).sample
        x = pipeline.scheduler.step(eps, t, x, eta=eta, variance_noise=noise).prev_sample
    ours = sample(zero_based(network), linear_schedule(), x_T, tuple(range(1, 1001, 20)), DDIM(eta), seed=3)
    assert 0.1 < ours.std() < 1
    assert (x - ours).abs().max() <= 2e-4  # on images in [-1, 1]


def test_diffusers_times_are_reference_uniform_tau(hf):
    scheduler = hf.DDIMScheduler.from_config(scheduler_config(linear_schedule(), "eps"))
    for steps in (1, 20, 50, 1000):
        scheduler.set_timesteps(steps)
        paper_times = [t + 1 for t in reversed(scheduler.timesteps.tolist())]
        assert paper_times == list(range(1, 1001, 1000 // steps))
        assert tuple(paper_times) == reference_uniform_tau(1000, steps)
