"""Standard normals as a pure function of (seed, sample index, step, dimension).

Philox 4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3") turns
the key ``seed`` and the counter ``(sample, pair, stream)`` into 128 random bits, and Box-Muller
turns those into two normals.  Nothing is stored between calls, so sample ``i`` of a seed has the
same bits in any batch, on any number of threads, and in whatever order steps are computed.

The normals of one sample and one stream form a sequence; entry ``j`` is lane ``j mod 2`` of pair
``j // 2``.  A chain in D dimensions uses entry ``step * D + d``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dng_math import checks
from dng_math._elementary import log, sine_cosine_turn
from dng_math._jit import kernel, run_blocks, scalar

STEP_STREAM = 0  # the noise of the steps
INITIAL_STREAM = 1  # x_T
CHOICE_STREAM = 2  # which component x_T is drawn from, when it is drawn exactly

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


@scalar
def philox(seed, sample, pair, stream):  # type: ignore[no-untyped-def]
    """128 random bits, as two 64-bit words, from four 64-bit words (stream below 2^32)."""
    # Counters occupy the low half of 64-bit lanes, which SIMD multipliers multiply; leftovers in
    # the high half are masked off where they would matter.
    k0, k1 = seed & _LOW, seed >> _SHIFT
    c0, c1 = sample, sample >> _SHIFT
    # Chains need far fewer than 2^48 normals a sample, which leaves 16 bits for the stream.
    c2, c3 = pair, (pair >> _SHIFT) | (stream << np.uint64(16))
    for _ in range(10):
        p0, p1 = _M0 * (c0 & _LOW), _M1 * (c2 & _LOW)
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1, (p0 >> _SHIFT) ^ c3 ^ k1, p0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return (c0 & _LOW) | (c1 << _SHIFT), (c2 & _LOW) | (c3 << _SHIFT)


@scalar
def uniform(bits):  # type: ignore[no-untyped-def]
    """A double in (0, 1), the middle of one of 2^52 equal cells, from 64 random bits."""
    return (np.float64(np.int64(bits >> np.uint64(12))) + 0.5) * 2.220446049250313e-16


@scalar
def normal_pair(seed, sample, pair, stream):  # type: ignore[no-untyped-def]
    """Two independent standard normals (Box and Muller 1958)."""
    radius_bits, angle_bits = philox(seed, sample, pair, stream)
    radius = np.sqrt(-2.0 * log(uniform(radius_bits)))
    sine, cosine = sine_cosine_turn(angle_bits)
    return radius * cosine, radius * sine


@kernel
def fill_normals(seed, first_sample, first_entry, stream, out):  # type: ignore[no-untyped-def]
    """out[i, d] = entry ``first_entry + d`` of sample ``first_sample + i``."""
    n, dimensions = out.shape
    first_pair = first_entry >> np.uint64(1)
    pairs = ((first_entry + np.uint64(dimensions) + np.uint64(1)) >> np.uint64(1)) - first_pair
    skip = np.int64(first_entry & np.uint64(1))
    for i in range(n):
        for k in range(np.int64(pairs)):
            a, b = normal_pair(seed, first_sample + np.uint64(i), first_pair + np.uint64(k), stream)
            d = 2 * k - skip
            if d >= 0:
                out[i, d] = a
            if d + 1 < dimensions:
                out[i, d + 1] = b


def standard_normal(
    seed: int,
    n: int,
    dimensions: int,
    *,
    step: int = 0,
    first_sample: int = 0,
    stream: int = STEP_STREAM,
    threads: int | None = None,
) -> NDArray[np.float64]:
    """Standard normals z[i, d] as a function of (seed, first_sample + i, step, d) alone.

    Parameters
    ----------
    seed : int
        In [0, 2^64).
    n, dimensions : int
        Shape of the result.
    step : int
        Step of the chain, counted from the noisy end.
    first_sample : int
        Index of the first row's sample.
    stream : int
        0 for the noise of the steps, 1 for x_T; below 2^16.
    threads : int, optional
        Number of threads; default all cores.

    Returns
    -------
    ndarray, shape (n, dimensions), float64

    Raises
    ------
    ValueError
        If an argument is negative or too large.
    TypeError
        If an argument is not an integer.
    """
    limits = {"seed": 64, "n": 40, "dimensions": 31, "step": 31, "first_sample": 62, "stream": 16}
    values = (seed, n, dimensions, step, first_sample, stream)
    for (name, bits), value in zip(limits.items(), values, strict=True):
        checks.integer(name, value, 0, 2**bits - 1)
    if threads is not None:
        checks.integer("threads", threads, 1)
    out = np.empty((n, dimensions))
    rows = max(1, 65536 // max(1, dimensions))

    def fill(block: int) -> None:
        lo = block * rows
        fill_normals(
            np.uint64(seed),
            np.uint64(first_sample + lo),
            np.uint64(step * dimensions),
            np.uint64(stream),
            out[lo : lo + rows],
        )

    run_blocks(fill, -(-n // rows), threads)
    return out


@kernel
def _fill_uniforms(seed, first_sample, stream, out):  # type: ignore[no-untyped-def]
    for i in range(len(out)):
        bits, _ = philox(seed, first_sample + np.uint64(i), np.uint64(0), stream)
        out[i] = uniform(bits)


def standard_uniform(
    seed: int, n: int, *, first_sample: int = 0, stream: int = CHOICE_STREAM
) -> NDArray[np.float64]:
    """One uniform in (0, 1) per sample, a function of (seed, first_sample + i); shape (n,).

    Parameters and errors are those of :func:`standard_normal`.
    """
    limits = {"seed": 64, "n": 40, "first_sample": 62, "stream": 16}
    for (name, bits), value in zip(limits.items(), (seed, n, first_sample, stream), strict=True):
        checks.integer(name, value, 0, 2**bits - 1)
    out = np.empty(n)
    _fill_uniforms(np.uint64(seed), np.uint64(first_sample), np.uint64(stream), out)
    return out
