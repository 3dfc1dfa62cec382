"""The order of the training samples: a function of (seed, step) that no division of the batch changes."""

import pytest
import torch

from ddim.data.batches import MicroBatches, ResumableSampler, flips, permutation, random_flip
from ddim.errors import UserError

N = 10


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 27])
def test_every_epoch_holds_every_image_once(batch_size):
    steps = 60 // batch_size + 1
    batches = MicroBatches(N, batch_size, 5, steps)
    sequence = torch.cat([batches[step]["indices"] for step in range(steps)])
    assert len(sequence) == steps * batch_size
    epochs = sequence[:60].reshape(6, N)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(N).expand(6, N))
    assert len(set(map(tuple, epochs.tolist()))) == 6
    assert torch.equal(epochs, torch.stack([permutation(N, 5, epoch) for epoch in range(6)]))


def test_seeds_give_different_orders():
    assert len({tuple(permutation(N, seed, 0).tolist()) for seed in range(20)}) == 20


def test_every_image_can_be_at_every_position():
    # 300 epochs of 4 images: each image is 75 times at each position on average, standard deviation 7.5
    orders = torch.stack([permutation(4, 0, epoch) for epoch in range(300)])
    counts = torch.stack([(orders == i).sum(dim=0) for i in range(4)])
    assert 40 < counts.min() <= counts.max() < 110


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 3), (2, 3), (4, 3)])
def test_processes_and_accumulation_divide_the_same_batch(world_size, accumulate):
    expected = MicroBatches(N, 12, 7, 4)
    processes = [
        MicroBatches(N, 12, 7, 4, accumulate=accumulate, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for step in range(4):
        slices = [batches[step * accumulate + i] for i in range(accumulate) for batches in processes]
        assert {len(batch["positions"]) for batch in slices} == {12 // (world_size * accumulate)}
        assert {batch["step"] for batch in slices} == {step}
        for key in ("positions", "indices"):
            assert torch.equal(torch.cat([batch[key] for batch in slices]), expected[step][key])
        assert expected[step]["positions"].tolist() == list(range(12))
    assert len(processes[0]) == 4 * accumulate


def test_a_batch_does_not_depend_on_those_before():
    batches = MicroBatches(N, 4, 3, 30)
    in_order = [batches[k]["indices"] for k in range(30)]
    for k in (29, 0, 13, 14, 2):
        assert torch.equal(MicroBatches(N, 4, 3, 30)[k]["indices"], in_order[k])
        assert torch.equal(batches[k]["indices"], in_order[k])


def test_sampler_starts_in_the_middle_and_counts_from_zero():
    assert list(ResumableSampler(3, 6)) == [3, 4, 5]
    assert len(ResumableSampler(3, 6)) == 6


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"batch_size=10 .* multiple of 6 \(2 processes x 3 accumulated"):
        MicroBatches(N, 10, 0, 1, accumulate=3, world_size=2)
    with pytest.raises(UserError, match="batch_size=0"):
        MicroBatches(N, 0, 0, 1)


def test_flips_are_fair_coins_addressed_by_seed_step_position():
    n = 100_000
    positions = torch.arange(n)
    coins = torch.stack([flips(seed, step, positions) for seed in range(3) for step in range(2)])
    assert coins.dtype == torch.bool
    error = 0.5 / n**0.5  # the standard error of a rate of 1/2
    assert (coins.double().mean(dim=1) - 0.5).abs().max() < 4 * error
    agreement = (coins[:, None] == coins[None]).double().mean(dim=2)[~torch.eye(6, dtype=torch.bool)]
    assert (agreement - 0.5).abs().max() < 4 * error
    few = positions[:1000]
    assert torch.equal(torch.cat([flips(0, 1, chunk) for chunk in few.split(7)]), flips(0, 1, few))


def test_random_flip_mirrors_columns_where_coins_are_true():
    images = torch.arange(40 * 6).reshape(40, 1, 2, 3).to(torch.uint8)
    positions = torch.arange(100, 140)
    coins, flipped = flips(1, 3, positions), random_flip(images, 1, 3, positions)
    assert 0 < coins.sum() < 40
    for before, after, coin in zip(images.tolist(), flipped.tolist(), coins, strict=True):
        assert after == ([[row[::-1] for row in before[0]]] if coin else before)
