"""Standard normals in float32, as a pure function of (seed, sample index, step, element).

Philox 4x32-10 (Salmon et al., SC 2011) turns the key ``seed`` and the counter
``(sample, element // 4, step, stream)`` into four random words, and Box-Muller turns those into
four normals, the elements 4 j to 4 j + 3 of a sample in C order.  They depend neither on the batch
nor on how it is cut.  The words have the same bits on every device; the normals have on every CPU,
and elsewhere differ by rounding at most, because logarithm, sine and cosine are polynomials that
are written here once.

:mod:`dng_math.noise` makes a double of two words; it uses the streams 0 to 2 and this module 3 and
4, so that no number is drawn twice from one seed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STEP_STREAM = 3
INITIAL_STREAM = 4
LARGEST_SAMPLE = 2**34  # elements that the counter tells apart in a sample
BLOCK = 2**15  # counters at a time on a CPU: their words stay in its cache

TO_UNIT = 2.0**-32
HALF_UNIT = 2.0**-33
TO_ANGLE = math.pi * 2.0**-33  # a signed word in units of 2^-34 turns, to radians
HALF_ROOT = 0x3F3504F3  # bits of sqrt(1/2) in float32

# ------------------------------------------------ written once, for torch and for Triton


def minus_two_log(power, f):  # type: ignore[no-untyped-def]
    """-2 log(2^e (1 + f)) for 1 + f in [sqrt(1/2), sqrt(2)]; ``power`` is 2^23 e.

    Cephes logf (error 2^-24 relative) with every coefficient times -2, and those of e times 2^-23:
    powers of two change no rounding.
    """
    p = -0.140753672584 * f + 0.2302922062
    p = p * f - 0.2335399748
    p = p * f + 0.24840281692
    p = p * f - 0.28498645574
    p = p * f + 0.3333611533
    p = p * f - 0.4000142953
    p = p * f + 0.49999987986
    p = p * f - 0.66666662348
    tail = f * f * (p * f + 1.0)
    # log 2 in two parts: the product of e with the larger one is exact.
    return (power * 5.059109687805176e-11 + tail) - 2.0 * f - power * 1.6530975699424744e-07


def sine(a):  # type: ignore[no-untyped-def]
    """sin a for |a| <= pi/4 (Cephes sinf)."""
    z = a * a
    return a + a * z * ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1)


def cosine(a):  # type: ignore[no-untyped-def]
    """cos a for |a| <= pi/4 (Cephes cosf)."""
    z = a * a
    p = (2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2
    return 1.0 - 0.5 * z + z * z * p


# ------------------------------------------------ in torch


def philox(
    seed: Tensor, sample: Tensor, group: Tensor, step_and_stream: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter, int64 in [0, 2^32); the arguments broadcast."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = sample & low, (sample >> 32) & low, group, step_and_stream
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((p1 >> 32) & low) ^ c1 ^ k0, p1 & low
        c2, c3 = ((p0 >> 32) & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def normal_pair(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals, float32 (Box and Muller 1958)."""
    u = radius_word.to(torch.float32) * TO_UNIT + HALF_UNIT
    # u = 2^e (1 + f), and 2^23 e is what a float32 has in the place of its exponent.
    bits = u.view(torch.int32)
    power = (bits - HALF_ROOT) & -0x800000
    f = (bits - power).view(torch.float32) - 1.0
    squared = minus_two_log(power.to(torch.float32), f)
    if squared.device.type == "cpu":
        # torch's root in float32 is not rounded correctly there: it depends on the CPU's maker.
        radius = torch.sqrt(squared.double()).float()
    else:
        radius = torch.sqrt(squared)
    # The nearest quarter turn, and the rest of the angle.
    quarter = (angle_word + 0x20000000) >> 30
    rest = (angle_word - (quarter << 30) << 2).to(torch.float32) * TO_ANGLE
    quarter = quarter & 3
    s, c = sine(rest), cosine(rest)
    odd = (quarter & 1) == 1
    sin, cos = torch.where(odd, c, s), torch.where(odd, s, c)
    sin = torch.where(quarter >= 2, -sin, sin)
    cos = torch.where((quarter == 1) | (quarter == 2), -cos, cos)
    return radius * cos, radius * sin


def normals(
    keys: Tensor, elements: int, step: Tensor | int, stream: int = STEP_STREAM, first: int = 0
) -> Tensor:
    """Standard normals for the elements first ... first + elements - 1 of every sample.

    Parameters
    ----------
    keys : Tensor, shape (B, 2), int64
        Seed and sample index of every row.
    elements : int
        Length of a row.
    step : int or 0-dim int64 Tensor
        Below 2^16.
    stream : int
        3 for the noise of the steps, 4 for x_T.
    first : int
        A multiple of 4.

    Returns
    -------
    Tensor, shape (B, elements), float32
    """
    batch, groups = keys.shape[0], -(-elements // 4)
    tag = torch.as_tensor(step, device=keys.device) | (stream << 16)
    group = torch.arange(first // 4, first // 4 + groups, device=keys.device)

    def quadruples(rows: slice, columns: slice) -> list[Tensor]:
        c0, c1, c2, c3 = philox(keys[rows, :1], keys[rows, 1:], group[columns], tag)
        return [*normal_pair(c0, c1), *normal_pair(c2, c3)]

    if torch.compiler.is_compiling():
        # A compiler fuses all of it into one loop, and would unroll the blocks.
        out = torch.stack(quadruples(slice(None), slice(None)), dim=-1)
    else:
        out = torch.empty(batch, groups, 4, device=keys.device)
        many = max(1, BLOCK // max(1, groups))
        for i in range(0, batch, many):
            for j in range(0, groups, BLOCK):
                rows, columns = slice(i, i + many), slice(j, j + BLOCK)
                for lane, z in enumerate(quadruples(rows, columns)):
                    out[rows, columns, lane] = z
    return out.view(batch, 4 * groups)[:, :elements]


def keys_of(seed: int, batch: int, first_sample: int, device: torch.device) -> Tensor:
    """Seed (as an int64) and sample index of consecutive samples, (batch, 2)."""
    samples = torch.arange(first_sample, first_sample + batch, device=device)
    return torch.stack([torch.full_like(samples, seed), samples], dim=1)
