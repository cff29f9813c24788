"""Elementary functions against 50 digits; the generator against its published vectors."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dng_math import _elementary, noise
from dng_math._jit import bits_float, float_bits, kernel, scalar
from tests.helpers.statistical import FALSE_ALARM, assert_distribution_1d, assert_mean_close

# Double needs 1.1e-16; the last bit may go to the rounding of the polynomial.
ULP = 2.3e-16


@kernel
def exp_all(x, out):
    for i in range(x.size):
        out[i] = _elementary.exp(x[i])


@kernel
def log_all(x, out):
    for i in range(x.size):
        out[i] = _elementary.log(x[i])


@kernel
def turn_all(bits, sine, cosine):
    for i in range(bits.size):
        sine[i], cosine[i] = _elementary.sine_cosine_turn(bits[i])


@kernel
def philox_all(seed, sample, pair, stream, out):
    for i in range(len(seed)):
        out[i, 0], out[i, 1] = noise.philox(seed[i], sample[i], pair[i], stream[i])


@scalar
def _round_trip(x):
    return bits_float(float_bits(x))


@kernel
def round_trip_all(x, out):
    for i in range(x.size):
        out[i] = _round_trip(x[i])


def apply(function, x):
    out = np.empty_like(x)
    function(x, out)
    return out


def reference(function, x):
    with mpmath.workdps(50):
        return np.array([float(function(mpmath.mpf(float(v)))) for v in x])


def test_exp_is_within_an_ulp():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-708, 709, 3000), rng.normal(size=2000), [0.0, -708.0, 709.0]])
    expected = reference(mpmath.exp, x)
    assert np.max(np.abs(apply(exp_all, x) / expected - 1)) < ULP


def test_exp_outside_its_range_is_zero_below_and_capped_above():
    x = np.array([-708.1, -1e300, -np.inf, 710.0, 1e300])
    cap = apply(exp_all, np.array([709.0]))[0]
    assert apply(exp_all, x).tolist() == [0.0, 0.0, 0.0, cap, cap]


def test_log_is_within_an_ulp():
    rng = np.random.default_rng(1)
    x = np.concatenate(
        [np.exp(rng.uniform(-700, 700, 3000)), 1 + rng.normal(size=2000) * 1e-3, [1.0, 2.0**-53]]
    )
    expected = reference(mpmath.log, x)
    got = apply(log_all, x)
    assert np.max(np.abs(got - expected) / np.maximum(np.abs(expected), 1e-300)) < ULP


def test_sine_and_cosine_of_a_turn():
    rng = np.random.default_rng(2)
    edges = np.arange(16, dtype=np.uint64) << np.uint64(60)
    bits = np.concatenate([rng.integers(0, 2**64, 3000, dtype=np.uint64), edges, edges - 1])
    sine, cosine = np.empty(len(bits)), np.empty(len(bits))
    turn_all(bits, sine, cosine)
    with mpmath.workdps(50):
        angle = [2 * mpmath.pi * int(b) / mpmath.mpf(2) ** 64 for b in bits]
        exact_sine = np.array([float(mpmath.sin(a)) for a in angle])
        exact_cosine = np.array([float(mpmath.cos(a)) for a in angle])
    # Absolute: near a zero of the sine the quadrant's own t carries the digits.
    assert np.max(np.abs(sine - exact_sine)) < ULP
    assert np.max(np.abs(cosine - exact_cosine)) < ULP


@given(st.floats(allow_nan=False))
def test_bits_round_trip(x):
    assert apply(round_trip_all, np.array([x]))[0] == x


def test_philox_gives_the_published_vectors():
    """Known-answer vectors of philox4x32-10 (Random123, kat_vectors)."""
    ones = 0xFFFFFFFFFFFFFFFF
    # counter words 0-1 are the sample, 2 and half of 3 the pair, the rest of 3 the stream.
    pair = 0x13198A2E | (0x7344 << 32)
    rows = [
        (0, 0, 0, 0, 0xE169C58D6627E8D5, 0x9B00DBD8BC57AC4C),
        (ones, ones, ones >> 16, 0xFFFF, 0x41C83B0E408F276D, 0x6D5451FDA20BC7C6),
        (
            0x299F31D0A4093822,
            0x85A308D3243F6A88,
            pair,
            0x0370,
            0x94FDCCEBD16CFE09,
            0x24126EA15001E420,
        ),
    ]
    columns = [np.array(column, dtype=np.uint64) for column in zip(*rows, strict=True)]
    out = np.empty((3, 2), dtype=np.uint64)
    philox_all(*columns[:4], out)
    assert out.tolist() == np.stack(columns[4:], axis=1).tolist()


def test_normals_are_standard_normal():
    """10^6 draws; KS sees a distance of 0.003 with certainty, at a false-alarm rate of 1e-6."""
    z = noise.standard_normal(7, 250_000, 4)
    assert_distribution_1d(z.ravel(), stats.norm.cdf)
    # Fourth moment: 3, and kurtosis of z^4 known, so that the bound is the normal one.
    assert_mean_close(z.ravel() ** 4, 3.0, std=np.sqrt(96.0))


def test_normals_of_different_steps_samples_dimensions_and_streams_are_independent():
    """Products of 2x10^5 pairs: mean 0 +- 4.9 sigma at 1e-6; a correlation of 0.015 would show."""
    n = 200_000
    z = noise.standard_normal(3, n, 3, step=0)
    later = noise.standard_normal(3, n, 3, step=1)
    other = noise.standard_normal(3, n, 3, stream=noise.INITIAL_STREAM)
    reseeded = noise.standard_normal(4, n, 3)
    pairs = [
        z[:, 0] * z[:, 1],
        z[:, 1] * z[:, 2],
        z[:-1, 0] * z[1:, 0],
        z[:, 2] * later[:, 0],
        z[:, 0] * later[:, 0],
        z[:, 0] * other[:, 0],
        z[:, 0] * reseeded[:, 0],
    ]
    for product in pairs:
        assert_mean_close(product, 0.0, std=1.0, alpha=FALSE_ALARM / len(pairs))
        # Box-Muller pairs share a radius: squares would show it where products do not.
    assert_mean_close(z[:, 0] ** 2 * z[:, 1] ** 2, 1.0, std=np.sqrt(8.0))


@given(
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**40),
    n=st.integers(0, 9),
    dimensions=st.integers(1, 5),
    step=st.integers(0, 1000),
    threads=st.integers(1, 3),
)
def test_a_normal_depends_on_seed_sample_step_and_dimension_alone(
    seed, first, n, dimensions, step, threads
):
    whole = noise.standard_normal(
        seed, n, dimensions, step=step, first_sample=first, threads=threads
    )
    for i in range(n):
        one = noise.standard_normal(seed, 1, dimensions, step=step, first_sample=first + i)
        assert one.tobytes() == whole[i].tobytes()


def test_uniforms_are_uniform():
    """10^5 draws, KS at a false-alarm rate of 1e-6."""
    u = noise.standard_uniform(11, 100_000)
    assert 0 < u.min() and u.max() < 1
    assert_distribution_1d(u, stats.uniform.cdf)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("seed", -1), ("seed", 2**64), ("n", -1), ("dimensions", -1), ("step", -1), ("stream", 2**16)],
)
def test_out_of_range(argument, value):
    arguments = {"seed": 0, "n": 1, "dimensions": 1, argument: value}
    with pytest.raises(ValueError, match=argument):
        noise.standard_normal(**arguments)
    with pytest.raises(TypeError):
        noise.standard_normal(**{**arguments, argument: 0.5})
