"""Counter-based random numbers (Philox): functions of (seed, stream, step, index).

Every random number here is a pure function of (seed, stream, step, index, position): the noise of image `i` at step `k`
never depends on the batch it was drawn in, on the number of processes, or on what was drawn before. torch's dropout and
initial weights use torch's generator, seeded from here.

The integers come from Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), written
in tensor operations so that it runs where the images are. The normals come from Box-Muller with logarithm, sine and
cosine built from + - * / and sqrt only: IEEE 754 fixes those five to the last bit, whereas library functions differ
from one processor to the next. So the noise is bitwise the same on every CPU and GPU.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# What the numbers are for; 8 is VALIDATION in ddim/training/heldout.py. Two streams with the same seed, step and index
# are independent of each other.
SAMPLING, TRAINING_NOISE, TRAINING_TIME, SHUFFLE, FLIP, DROPOUT, WEIGHTS, VARIANCE = range(8)
CORRECTOR, LABEL_DROP = 9, 10

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_CHUNK = 1 << 16  # counters handled at once on a CPU, so that the ten rounds stay in its cache


def check_seed(seed: int) -> None:
    """Raise ValueError unless a seed is a 64-bit key, 0 .. 2**64 - 1."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed={seed} must lie in 0 .. 2**64 - 1.")


def check_image_numbers(first: int, count: int) -> None:
    """Raise ValueError unless the `count` images from number `first` on have 32-bit numbers, 0 .. 2**32 - 1."""
    if not 0 <= first <= (1 << 32) - count:
        raise ValueError(f"first={first} is out of range: image numbers lie in 0 .. 2**32 - 1.")


def philox(counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], seed: int) -> tuple[Tensor, ...]:
    """Return the four 32-bit words (int64 tensors, 0 .. 2**32 - 1) of Philox-4x32-10 at `counter` under the key `seed`.

    Args:
        counter: four 32-bit words, int64 tensors that broadcast together (Python ints are taken too).
        seed: the 64-bit key, 0 .. 2**64 - 1.
    """
    check_seed(seed)
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, seed >> 32
    for _ in range(10):
        # The 64-bit products wrap around as int64; shift and mask give back their unsigned halves.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = k0 + _KEY_STEPS[0] & _WORD, k1 + _KEY_STEPS[1] & _WORD
    return c0, c1, c2, c3  # type: ignore[return-value]


def random_words(seed: int, stream: int, step: int, indices: Sequence[int] | Tensor, count: int = 1) -> Tensor:
    """Return `count` uniform 32-bit words for each index.

    Args:
        seed: 0 .. 2**64 - 1.
        stream: one of the constants above.
        step: sampling step, optimiser step or epoch, 0 .. 2**32 - 1.
        indices: (B,) image indices or sample positions, 0 .. 2**32 - 1; a tensor decides the device of the result.
        count: words for each index; the first words do not depend on it.

    Returns:
        int64 tensor (B, count) with values 0 .. 2**32 - 1.

    Raises:
        ValueError: an argument out of range.
    """
    if not 0 <= step <= _WORD:
        raise ValueError(f"step={step} must lie in 0 .. 2**32 - 1.")
    indices = torch.as_tensor(indices, dtype=torch.int64)
    if indices.device.type == "cpu" and indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) <= _WORD:
        raise ValueError("every index must lie in 0 .. 2**32 - 1.")
    blocks = torch.arange(-(-count // 4), device=indices.device)
    words = torch.stack(philox((blocks, step, indices[:, None], stream), seed), dim=-1)
    return words.flatten(1)[:, :count]


def gaussian(seed: int, stream: int, step: int, indices: Sequence[int] | Tensor, shape: Sequence[int]) -> Tensor:
    """Return standard normal noise, float32 (B, *shape), for `indices` (B,); arguments as in `random_words`.

    The largest value there can be is sqrt(2 ln 2**33) = 6.76.
    """
    indices = torch.as_tensor(indices, dtype=torch.int64)
    count = math.prod(shape)
    padded = count + count % 2
    rows = len(indices) if indices.device.type != "cpu" else max(1, _CHUNK * 4 // max(padded, 1))
    noise = torch.empty(len(indices), padded, dtype=torch.float32, device=indices.device)
    for first in range(0, len(indices), rows):
        words = random_words(seed, stream, step, indices[first : first + rows], padded)
        noise[first : first + rows] = _box_muller(words)
    return noise[:, :count].reshape(len(indices), *shape)


def _box_muller(words: Tensor) -> Tensor:
    """Turn (B, 2n) 32-bit words into (B, 2n) float64 standard normals, using correctly rounded operations only."""
    radius_word, angle_word = words[:, 0::2], words[:, 1::2]
    radius = torch.sqrt(_log((radius_word.double() + 0.5) * 2.0**-32) * -2.0)
    # The circle in four quarters around the axes: the low 30 bits give the angle -pi/4 .. pi/4 about an axis, one bit
    # swaps the axes and one bit reverses both.
    angle = ((angle_word & 0x3FFFFFFF).double() + 0.5) * (math.pi / 2 * 2.0**-30) - math.pi / 4
    square = angle * angle
    sine = angle * _polynomial(square, [(-1) ** k / math.factorial(2 * k + 1) for k in range(7)])
    cosine = _polynomial(square, [(-1) ** k / math.factorial(2 * k) for k in range(8)])
    swap = (angle_word >> 30 & 1).bool()
    radius = torch.where((angle_word >> 31).bool(), -radius, radius)
    normals = torch.stack((torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)), dim=-1)
    return (normals * radius[..., None]).flatten(1)


def _log(u: Tensor) -> Tensor:
    """Natural logarithm of a positive float64 tensor: ln(m 2**e) = 2 artanh((m - 1) / (m + 1)) + e ln 2."""
    mantissa, exponent = torch.frexp(u)
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, mantissa * 2, mantissa)
    exponent = exponent.double() - small.double()
    s = (mantissa - 1) / (mantissa + 1)
    return s * _polynomial(s * s, [2 / (2 * k + 1) for k in range(8)]) + exponent * math.log(2.0)


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Horner's rule, each product and sum rounded on its own (a fused multiply-add would differ between devices)."""
    result = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        result = result * x + c
    return result
