"""The numbers of a seed are pinned: a silent change of an address would make old results irreproducible.

Its generator is tested in tests/diffusion/test_noise.py; the weights and dropout in tests/training/test_module.py.
"""

import itertools

import pytest
import torch

from ddim import random
from ddim.data.batches import flips, permutation
from ddim.diffusion.noise import initial_noise, step_noise
from ddim.diffusion.objective import antithetic_times, training_noise, uniform_times
from ddim.random import random_words

SEED, STEP, TWO, EIGHT, SHAPE = 5, 3, torch.tensor([0, 7]), torch.arange(8), (1, 2, 2)
STREAMS = {
    "SAMPLING": "f79688c6 8799bf8c 01a6ac76 b7bae3e7 31f45292 21c906fd d0a05f33 513d1961",
    "TRAINING_NOISE": "b2aaa3e6 af5c76c7 d5c635b1 0ceb91eb e3271c73 c0ac47e1 d620af9a 7d6b6938",
    "TRAINING_TIME": "37ea4761 6ba435d1 d86b4e7e 28d398be 63d1685a a749abbc 57f7f946 6de4c196",
    "SHUFFLE": "23ad40ea ced71eff 4c785aa8 8ca3abf5 e720e913 7c5497d8 ce79b2c9 605733e3",
    "FLIP": "767d4072 19c0b95a 4f0a074c c12d6cd3 a570a271 bd97c4ac a3cee9f7 17154a42",
    "DROPOUT": "6bbb9e71 c12e9678 f93d9210 b2f7e828 5e4a8f3f 8e30d777 18b1b3a1 81632202",
    "WEIGHTS": "3bfedc8f 97fcda30 ac4a706b 873856cb 3322eb90 0cab47f6 e70577ab 02160801",
    "VARIANCE": "e9ae2b37 2b5b59f1 9f3a7e2e 1b795b57 bdcdd96e 76cd725d a9d41d3c 8e8c0282",
    "CORRECTOR": "abcbd24c b800acc7 300b0fa9 f2b1fd1d ba366247 3a0a8e1e ad965c11 8ae333e3",
    "LABEL_DROP": "204f1fb8 0b094f1e 15d0b8c0 a6552665 5658639f 4fc94af0 c0b41a5f 81014b1b",
}
NORMALS = {  # bits of float32
    "initial": (
        initial_noise(TWO, SHAPE, SEED),
        "3f2fc363 be7e93de bdc82707 be1c1d34 bed822e6 3f691175 3c3a4c36 bf0b92fc",
    ),
    "step": (
        step_noise(TWO, SHAPE, SEED, STEP),
        "be5aa43e 3e153668 c029c1c1 bfdf9dbf 3fe72d13 3da22cb7 be682e09 3f19243a",
    ),
    "training": (
        training_noise(SEED, STEP, TWO, SHAPE),
        "bf49dec7 be9fdda2 3f092957 be8ac1b7 3eae159f beb3eeaf 3eca404a 3ee5a40f",
    ),
}
INTEGERS = {
    "uniform times": (uniform_times(1000, SEED, STEP, EIGHT), [219, 598, 628, 329, 358, 33, 130, 390]),
    "antithetic times": (antithetic_times(1000, SEED, STEP, EIGHT), [219, 782, 598, 403, 628, 373, 329, 672]),
    "order of images": (permutation(8, SEED, STEP), [4, 3, 0, 1, 5, 2, 6, 7]),
    "flips": (flips(SEED, STEP, EIGHT), [0, 1, 1, 0, 0, 1, 1, 1]),
}


def hexadecimal(words):
    return " ".join(f"{word & 0xFFFFFFFF:08x}" for word in words.flatten().tolist())


@pytest.mark.parametrize("name", STREAMS)
def test_words_of_each_stream_are_pinned(name):
    assert hexadecimal(random_words(SEED, getattr(random, name), STEP, TWO, 4)) == STREAMS[name]


@pytest.mark.parametrize("name", NORMALS)
def test_bits_of_the_noise_of_a_seed_are_pinned(name):
    noise, expected = NORMALS[name]
    assert hexadecimal(noise.view(torch.int32)) == expected


@pytest.mark.parametrize("name", INTEGERS)
def test_times_orders_and_flips_of_a_seed_are_pinned(name):
    values, expected = INTEGERS[name]
    assert values.tolist() == expected


def test_streams_differ_and_are_uncorrelated_pairwise():
    """Also those that are not used yet would be noticed: every constant in capitals is a stream."""
    streams = {name: value for name, value in vars(random).items() if name.isupper() and not name.startswith("_")}
    assert streams.keys() == STREAMS.keys()
    n = 10_000
    words = {name: random_words(SEED, value, STEP, range(n)).double().flatten() for name, value in streams.items()}
    for one, other in itertools.combinations(words, 2):
        assert (words[one] == words[other]).sum() <= 1
        correlation = torch.corrcoef(torch.stack([words[one], words[other]]))[0, 1]
        assert abs(correlation) < 4 / n**0.5, (one, other)


def test_times_are_uniform_within_four_standard_errors():
    n, T = 100_000, 10
    counts = torch.bincount(uniform_times(T, SEED, STEP, torch.arange(n)), minlength=T + 1)
    assert counts[0] == 0
    assert ((counts[1:] / n - 1 / T).abs() < 4 * (0.1 * 0.9 / n) ** 0.5).all()
