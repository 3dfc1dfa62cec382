"""The order of the training samples: a function of (seed, step) that no split of the work changes."""

import pytest
import torch

from ddim.data import LazyImages, MemoryImages
from ddim.data.batches import From, MicroBatches, finish, flips, permutation
from ddim.errors import UserError

N = 10


@pytest.fixture
def images():
    pixels = torch.arange(N * 2, dtype=torch.uint8).reshape(N, 1, 1, 2)
    return MemoryImages("numbers", pixels)


def global_batches(images, batch_size, seed, steps):
    batches = MicroBatches(images, batch_size, seed, steps)
    return [batches[k]["indices"] for k in range(steps)]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 27])
def test_every_image_appears_once_per_epoch_and_epochs_run_on(images, batch_size):
    steps = 60 // batch_size + 1
    row = torch.cat(global_batches(images, batch_size, 5, steps))
    assert len(row) == steps * batch_size
    epochs = row[:60].reshape(6, N)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(N).expand(6, N))
    assert len(set(map(tuple, epochs.tolist()))) == 6
    assert torch.equal(epochs, torch.stack([permutation(N, 5, epoch) for epoch in range(6)]))


def test_seeds_differ(images):
    rows = {tuple(torch.cat(global_batches(images, 4, seed, 5)).tolist()) for seed in range(20)}
    assert len(rows) == 20


def test_an_image_can_stand_anywhere():
    # 300 epochs of 4 images: each place has each image 75 times on average, standard deviation 7.5
    orders = torch.stack([permutation(4, 0, epoch) for epoch in range(300)])
    counts = torch.stack([(orders == i).sum(dim=0) for i in range(4)])
    assert 40 < counts.min() <= counts.max() < 110


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 3), (2, 3), (4, 3)])
def test_processes_and_accumulation_divide_the_same_batch(images, world_size, accumulate):
    whole = MicroBatches(images, 12, 7, 4)
    shares = [
        MicroBatches(images, 12, 7, 4, accumulate=accumulate, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step in range(4):
        parts = [share[step * accumulate + part] for part in range(accumulate) for share in shares]
        assert {len(part["positions"]) for part in parts} == {12 // (world_size * accumulate)}
        assert {part["step"] for part in parts} == {step}
        for key in ("positions", "indices", "images"):
            assert torch.equal(torch.cat([part[key] for part in parts]), whole[step][key])
        assert whole[step]["positions"].tolist() == list(range(12))
    assert len(shares[0]) == 4 * accumulate


def test_a_batch_does_not_depend_on_those_before(images):
    batches = MicroBatches(images, 4, 3, 30)
    in_order = [batches[k]["indices"] for k in range(30)]
    for k in (29, 0, 13, 14, 2):
        assert torch.equal(MicroBatches(images, 4, 3, 30)[k]["indices"], in_order[k])
        assert torch.equal(batches[k]["indices"], in_order[k])


def test_pixels_are_those_of_the_indices(images):
    class Lazy(LazyImages):
        name, shape, transform = "lazy", images.shape, "none"

        def __len__(self):
            return N

        def __getitem__(self, index):
            return images[index]

    for source in (images, Lazy()):
        batch = MicroBatches(source, 5, 0, 2)[1]
        assert torch.equal(batch["images"], images.images[batch["indices"]])
        assert "images" not in MicroBatches(source, 5, 0, 2, with_images=False)[1]


def test_numbers_start_in_the_middle_and_the_length_is_the_whole():
    assert list(From(3, 6)) == [[3], [4], [5]]
    assert len(From(3, 6)) == 6


def test_a_batch_that_does_not_divide_is_refused(images):
    with pytest.raises(UserError, match=r"batch_size=10 .* multiple of 6 \(2 processes x 3 accumulated"):
        MicroBatches(images, 10, 0, 1, accumulate=3, world_size=2)
    with pytest.raises(UserError, match="batch_size=0"):
        MicroBatches(images, 0, 0, 1)


def test_flips_are_fair_coins_addressed_by_seed_step_and_position():
    positions = torch.arange(1000)
    coins = torch.stack([flips(seed, step, positions) for seed in range(3) for step in range(4)])
    assert coins.dtype == torch.bool
    assert ((coins.sum(dim=1) - 500).abs() < 80).all()  # five standard deviations
    agreement = (coins[:, None] == coins[None]).double().mean(dim=2)
    assert agreement[~torch.eye(12, dtype=torch.bool)].max() < 0.6
    assert torch.equal(torch.cat([flips(0, 1, part) for part in positions.split(7)]), flips(0, 1, positions))


def test_finishing_mirrors_columns_and_scales():
    pixels = torch.arange(40 * 6, dtype=torch.int64).reshape(40, 1, 2, 3).to(torch.uint8)
    positions = torch.arange(100, 140)
    batch = finish(pixels, 3, positions, seed=1, flip=True)
    coins = flips(1, 3, positions)
    assert 0 < coins.sum() < 40
    for i in range(40):
        expected = pixels[i, 0].tolist()
        expected = [row[::-1] for row in expected] if coins[i] else expected
        shown = ((batch["images"][i, 0] + 1) * 127.5).round().int().tolist()
        assert shown == expected
    assert (batch["step"], batch["positions"].tolist()) == (3, positions.tolist())
    plain = finish(pixels, 3, positions, seed=1, flip=False)["images"]
    assert torch.equal(((plain + 1) * 127.5).round().to(torch.uint8), pixels)
