import math

import numpy as np
import pytest
import torch

from ddim import random as noise
from ddim.diffusion.interpolation import slerp
from ddim.diffusion.noise import corrector_noise, initial_noise, step_noise
from ddim.diffusion.objective import TIME_SAMPLERS, training_noise
from ddim.random import gaussian, philox, random_words

# Known answers published with Random123 (Salmon et al. 2011): counter, key, result.
PHILOX_VECTORS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX_VECTORS)
def test_philox_gives_the_published_vectors(counter, key, expected):
    assert tuple(int(w) for w in philox(tuple(torch.tensor(c) for c in counter), key)) == expected


def test_words_are_philox_at_the_address():
    words = random_words(seed=2**40 + 3, stream=2, step=7, indices=[5, 11], count=6)
    for row, index in enumerate([5, 11]):
        blocks = [philox((torch.tensor(j), 7, index, 2), 2**40 + 3) for j in range(2)]
        assert words[row].tolist() == [int(w) for block in blocks for w in block][:6]


def test_normals_are_box_muller_of_the_words():
    words = random_words(0, 1, 2, range(500), 8)
    made = gaussian(0, 1, 2, range(500), (8,)).double()
    radius = np.sqrt(-2 * np.log((words[:, 0::2].numpy() + 0.5) / 2**32))
    assert np.allclose(torch.hypot(made[:, 0::2], made[:, 1::2]).numpy(), radius, rtol=3e-7)
    # the four quarters of the circle, each reached by its two bits
    quarter = torch.atan2(made[:, 1::2], made[:, 0::2]).add(math.pi / 4).div(math.pi / 2).floor().remainder(4).long()
    expected = torch.tensor([0, 1, 2, 3])[words[:, 1::2] >> 30]
    assert torch.equal(quarter, expected)


def test_log_sine_and_cosine_have_double_precision():
    u = torch.cat(
        [torch.logspace(-10, 0, 5001, dtype=torch.float64), torch.linspace(0.4, 1, 1001, dtype=torch.float64)]
    )
    assert torch.allclose(noise._log(u), u.log(), rtol=1e-11, atol=1e-14)
    words = torch.stack([torch.full((4096,), 1 << 20), (torch.arange(4096) << 20) + (1 << 19)], dim=1)
    x, y = noise._box_muller(words).T
    radius = math.sqrt(-2 * math.log((2**20 + 0.5) / 2**32))
    assert torch.allclose(x * x + y * y, torch.full_like(x, radius**2), rtol=1e-12)
    # evenly spaced angle words make evenly spaced angles
    angles = torch.sort(torch.atan2(y, x)).values.diff()
    assert torch.allclose(angles, torch.full_like(angles, 2 * math.pi / 4096), atol=1e-9)


def test_normals_have_the_normal_distribution():
    z = np.sort(initial_noise(range(400), (3, 16, 16), seed=1).flatten().double().numpy())
    cdf = 0.5 * (1 + torch.erf(torch.from_numpy(z) / math.sqrt(2))).numpy()
    empirical = (np.arange(len(z)) + 0.5) / len(z)
    assert np.abs(cdf - empirical).max() < 1.63 / math.sqrt(len(z))  # Kolmogorov-Smirnov at 1 %
    neighbours = initial_noise(range(400), (3, 16, 16), seed=1).flatten(1)
    correlation = (neighbours[:, :-1] * neighbours[:, 1:]).mean()
    assert abs(correlation) < 4 / math.sqrt(neighbours.numel())


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_noise_does_not_depend_on_the_batch(batch):
    expected = step_noise(range(130), (3, 5, 7), seed=3, step=4)
    batches = [step_noise(range(i, min(i + batch, 130)), (3, 5, 7), seed=3, step=4) for i in range(0, 130, batch)]
    assert torch.equal(expected, torch.cat(batches))


def test_noise_does_not_depend_on_the_chunk_size(monkeypatch):
    expected = step_noise(range(50), (3, 8, 8), seed=3, step=4)
    monkeypatch.setattr(noise, "_CHUNK", 1)
    assert torch.equal(expected, step_noise(range(50), (3, 8, 8), seed=3, step=4))


def test_noise_depends_on_each_part_of_its_address():
    base = gaussian(0, 0, 0, [0], (64,))
    others = [
        gaussian(1, 0, 0, [0], (64,)),
        gaussian(2**32, 0, 0, [0], (64,)),
        gaussian(0, 1, 0, [0], (64,)),
        gaussian(0, 0, 1, [0], (64,)),
        gaussian(0, 0, 0, [1], (64,)),
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.cat([base, other]))[0, 1]) < 0.5


def test_larger_images_extend_smaller_ones():
    assert torch.equal(gaussian(0, 0, 0, [9], (15,))[0], gaussian(0, 0, 0, [9], (16,))[0, :15])


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [0, 2**63 + 5, 2**64 - 1])
@pytest.mark.parametrize("shape", [(1,), (3, 7, 5), (3, 32, 32), (3, 128, 128)], ids=str)
def test_noise_is_bitwise_the_same_on_the_gpu(gpu, shape, seed):
    numbers = torch.tensor([0, 1, 499, 49_999, 2**31, 2**32 - 1])
    for step in (0, 1000, 2**32 - 1):
        on_gpu = step_noise(numbers, shape, seed, step, device=gpu)
        assert torch.equal(on_gpu.cpu(), step_noise(numbers, shape, seed, step))
        on_gpu = training_noise(seed, step, numbers.to(gpu), shape)
        assert torch.equal(on_gpu.cpu(), training_noise(seed, step, numbers, shape))


@pytest.mark.gpu
def test_noise_of_many_images_is_the_same_on_the_gpu(gpu):
    on_gpu = initial_noise(range(2000), (3, 32, 32), seed=3, device=gpu)
    assert torch.equal(on_gpu.cpu(), initial_noise(range(2000), (3, 32, 32), seed=3))


@pytest.mark.gpu
def test_words_and_times_are_the_same_on_the_gpu(gpu):
    numbers = torch.arange(2000)
    for stream in (noise.SHUFFLE, noise.FLIP, noise.DROPOUT):
        assert torch.equal(random_words(7, stream, 3, numbers.to(gpu)).cpu(), random_words(7, stream, 3, numbers))
    for draw in TIME_SAMPLERS.values():
        assert torch.equal(draw(1000, 7, 3, numbers.to(gpu)).cpu(), draw(1000, 7, 3, numbers))


@pytest.mark.parametrize(
    "bad", [{"seed": -1}, {"seed": 2**64}, {"step": -1}, {"step": 2**32}, {"indices": [-1]}, {"indices": [2**32]}]
)
def test_addresses_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="must lie in"):
        random_words(**({"seed": 0, "stream": 0, "step": 0, "indices": [0]} | bad))


def test_slerp_is_equation_67():
    x, y = initial_noise([0, 1], (3, 8, 8), 0), initial_noise([2, 3], (3, 8, 8), 0)
    assert torch.allclose(slerp(x, y, 0.0), x)
    assert torch.allclose(slerp(x, y, 1.0), y)
    for i in range(2):
        a, b = x[i].flatten().double(), y[i].flatten().double()
        theta = math.acos(float(a @ b / a.norm() / b.norm()))
        expected = (math.sin(0.7 * theta) * a + math.sin(0.3 * theta) * b) / math.sin(theta)
        assert torch.allclose(slerp(x, y, 0.3)[i].flatten().double(), expected, atol=1e-6)
    assert torch.allclose(slerp(x, x, 0.3), x)


def test_slerp_between_neighbours_stays_on_the_sphere():
    x = torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float64)
    y = torch.tensor([[[[math.cos(0.4), math.sin(0.4)]]]], dtype=torch.float64)
    expected = torch.tensor([[[[math.cos(0.1), math.sin(0.1)]]]], dtype=torch.float64)
    assert torch.allclose(slerp(x, y, 0.25), expected, atol=1e-12)


def test_slerp_between_near_points_is_on_the_arc():
    angle = 0.09
    x, y, z = (torch.tensor([[math.cos(v), math.sin(v)]], dtype=torch.float64) for v in (0.0, angle, angle / 4))
    torch.testing.assert_close(slerp(x, y, 0.25), z)


def test_corrector_noise_differs_in_all_its_steps():
    values = {
        tuple(corrector_noise([0], (2,), 0, step, number).tolist()[0]) for step in (1, 2, 3) for number in range(1024)
    }
    assert len(values) == 3 * 1024
