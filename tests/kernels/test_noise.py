"""The normals of the kernels: their words bit for bit, their numbers, and that they are random."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dng_kernels import noise_keys, normal, standard_normal
from dng_kernels._border import HAS_TRITON
from dng_math import noise
from dng_math._jit import kernel
from tests.helpers.statistical import (
    FALSE_ALARM,
    assert_distribution_1d,
    assert_mean_close,
)

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
LOW = 0xFFFFFFFF
# Counter, key and words of philox4x32-10 (Random123, kat_vectors).
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((LOW,) * 4, (LOW,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def signed(*words):
    """Words of 32 bits, lowest first, as one int64."""
    value = sum(word << (32 * i) for i, word in enumerate(words))
    return value - 2**64 if value >= 2**63 else value


def published_counters():
    """Seed, sample, group, tag and words as columns."""
    rows = [
        (signed(*key), signed(counter[0], counter[1]), counter[2], counter[3], *words)
        for counter, key, words in PUBLISHED
    ]
    return [torch.tensor(column) for column in zip(*rows, strict=True)]


# ---------------------------------------------------------------- in Triton

if HAS_TRITON:
    import triton
    import triton.language as tl

    from dng_kernels import fused

    @triton.jit
    def philox_all(seed, sample, group, tag, out, N: tl.constexpr):
        i = tl.arange(0, N)
        c0, c1, c2, c3 = fused.philox(
            tl.load(seed + i), tl.load(sample + i), tl.load(group + i), tl.load(tag + i)
        )
        tl.store(out + 4 * i, c0.to(tl.int64))
        tl.store(out + 4 * i + 1, c1.to(tl.int64))
        tl.store(out + 4 * i + 2, c2.to(tl.int64))
        tl.store(out + 4 * i + 3, c3.to(tl.int64))

    @triton.jit
    def normals_all(keys, step, stream, out, TOGETHER: tl.constexpr, N: tl.constexpr):
        z = fused.normals(
            tl.load(keys),
            tl.load(keys + 1),
            step.to(tl.int64) | (stream.to(tl.int64) << 16),
            0,
            N,
            1,
            False,
            TOGETHER,
            N,
        )
        tl.store(out + tl.arange(0, N), z)


def triton_words(columns, device):
    count = 4  # a power of two
    padded = [torch.nn.functional.pad(column, (0, count - len(column))) for column in columns]
    out = torch.empty(count, 4, dtype=torch.int64, device=device)
    philox_all[(1,)](*(column.to(device) for column in padded), out, N=count)
    return out.cpu()[: len(columns[0])]


# ---------------------------------------------------------------- words


def test_torch_makes_the_published_words():
    *counters, w0, w1, w2, w3 = published_counters()
    assert [word.tolist() for word in normal.philox(*counters)] == [
        word.tolist() for word in (w0, w1, w2, w3)
    ]


@needs_triton
def test_the_kernel_makes_the_published_words(kernel_device):
    *counters, w0, w1, w2, w3 = published_counters()
    words = triton_words(counters, kernel_device)
    assert words.tolist() == torch.stack([w0, w1, w2, w3], dim=1).tolist()


@kernel
def exact_words(seed, sample, pair, stream, out):
    for i in range(len(seed)):
        out[i, 0], out[i, 1] = noise.philox(seed[i], sample[i], pair[i], stream[i])


words64 = st.integers(0, 2**64 - 1)


@given(words64, words64, st.integers(0, LOW), st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1))
def test_the_generator_is_that_of_the_exact_chains_with_other_streams(
    seed, sample, group, step, stream
):
    """Both put the stream into the upper half of the last word of the counter.

    So two different streams never have a counter in common, whatever the rest of it is, and the
    generator maps different counters to different words.
    """
    ours = normal.philox(
        *(torch.tensor(v) for v in (signed(seed), signed(sample), group, step | (stream << 16)))
    )
    theirs = np.empty((1, 2), dtype=np.uint64)
    pair = group | (step << 32)
    columns = [np.array([value], dtype=np.uint64) for value in (seed, sample, pair, stream)]
    exact_words(*columns, theirs)
    w0, w1, w2, w3 = (int(word) for word in ours)
    assert [w0 | (w1 << 32), w2 | (w3 << 32)] == theirs[0].tolist()


def test_no_stream_of_the_kernels_is_one_of_the_exact_chains():
    exact = {noise.STEP_STREAM, noise.INITIAL_STREAM, noise.CHOICE_STREAM}
    ours = {normal.STEP_STREAM, normal.INITIAL_STREAM}
    assert len(ours) == 2 and not ours & exact
    assert max(ours | exact) < 2**16


# ---------------------------------------------------------------- numbers


def uniform32(words):
    """(word + 1/2) / 2^32 as float32 holds it."""
    return words.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)


def box_muller(u, angle_words):
    """In float64, from what is uniform in (0, 1] and from words of an angle."""
    radius = np.sqrt(-2.0 * np.log(u.astype(np.float64)))
    angle = angle_words.astype(np.float64) * (2.0 * math.pi * 2.0**-32)
    return radius * np.cos(angle), radius * np.sin(angle)


def some_words(n=400_000):
    rng = np.random.default_rng(0)
    ends = np.array([0, 1, 2, 3, LOW, LOW - 1, LOW - 127, LOW - 128, LOW - 129, 2**31, 2**31 - 1])
    quarters = (np.arange(8, dtype=np.int64)[:, None] * 2**29 + np.arange(-2, 3)).ravel() & LOW
    special = np.concatenate([ends, quarters])
    radius, angle = np.meshgrid(special, special)
    drawn = rng.integers(0, 2**32, (2, n))
    small = (2.0 ** rng.uniform(0, 32, n)).astype(np.int64) & LOW
    return (
        np.concatenate([radius.ravel(), drawn[0], small, LOW - small]),
        np.concatenate([angle.ravel(), drawn[1], drawn[1], drawn[0]]),
    )


def test_normals_are_box_muller_of_their_words():
    """Four roundings of 2^-24 of the radius, which is at most 6.8.

    The logarithm has one and a half, of which a root leaves the half; the root and the product have
    half of one each; and sine and cosine, with their angle, two.
    """
    radius_words, angle_words = some_words()
    z = normal.normal_pair(torch.from_numpy(radius_words), torch.from_numpy(angle_words))
    u = uniform32(radius_words)
    radius = np.sqrt(-2.0 * np.log(u.astype(np.float64)))
    for actual, exact in zip(z, box_muller(u, angle_words), strict=True):
        assert actual.dtype == torch.float32
        error = np.abs(actual.numpy().astype(np.float64) - exact)
        assert (error <= 4 * 2.0**-24 * radius).all()


def test_a_seed_makes_the_same_numbers_on_every_cpu():
    """Bit for bit: pictures and tables that are shipped were made from seeds."""
    z = normal.normals(noise_keys(7, 1, first_sample=5), 8, 3)[0].numpy()
    bits = [0x3FD3488D, 0xBEBEC0F8, 0xBE9CE31A, 0x3E52CE09]
    bits += [0x3F63F83F, 0x3E1CC66F, 0xBFB9F78B, 0x3F4649D7]
    assert z.view(np.uint32).tolist() == bits
    # And sums, rounded once, over all quarters of a turn and radii near and far.
    words = (np.arange(2**19, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
    pair = normal.normal_pair(*torch.from_numpy(words.astype(np.int64)).view(2, -1))
    sums = [math.fsum(each.double().tolist()).hex() for each in pair]
    assert sums == ["0x1.cb575da563a80p+15", "0x1.c0e923d60acb0p+15"]


def test_a_uniform_in_float32_moves_a_normal_little():
    """Against float64 from the words themselves: u has a relative error of two times 2^-24.

    That moves log u by 1.2e-7 and so the radius r by 1.2e-7 / r: much where r is almost 0, which
    is where a normal is almost 0 however it is turned; half of all radii are above 1.
    """
    radius_words, angle_words = some_words()
    z = normal.normal_pair(torch.from_numpy(radius_words), torch.from_numpy(angle_words))
    exact_u = (radius_words.astype(np.float64) + 0.5) * 2.0**-32
    radius = np.sqrt(-2.0 * np.log(exact_u))
    for actual, exact in zip(z, box_muller(exact_u, angle_words), strict=True):
        error = np.abs(actual.numpy() - exact)
        assert (error <= 2.4e-7 * radius + np.minimum(1.3e-7 / radius, 5e-4)).all()


def test_the_ends_of_the_uniform_give_finite_normals():
    ends = torch.tensor([0, LOW])
    for z in normal.normal_pair(ends, torch.tensor([2**28, 2**28])):
        assert torch.isfinite(z).all()
        # The largest radius there is, sqrt(2 log 2^33), at an angle of 1/16 turn; and 0.
        assert 2.5 < z[0].item() < 6.8 and abs(z[1].item()) < 1e-3


@needs_triton
@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize(("step", "stream"), [(0, 3), (2**16 - 1, 3), (0, 4), (5, 2**16 - 1)])
@pytest.mark.parametrize("together", [4, 8])
def test_the_kernel_makes_the_numbers_of_torch(seed, step, stream, together, kernel_device):
    """The same operations on the same words; on a GPU a product and a sum are one rounding."""
    n = 512
    keys = noise_keys(seed, 1, first_sample=2**40 + 3)
    expected = normal.normals(keys, n, step, stream)[0]
    out = torch.empty(n, device=kernel_device)
    normals_all[(1,)](keys.to(kernel_device), step, stream, out, TOGETHER=together, N=n)
    # The bound of each against float64, at radius 6.8 at most.
    torch.testing.assert_close(out.cpu(), expected, rtol=8e-7, atol=8e-7)


def test_rows_are_those_of_their_keys_and_elements_those_of_their_places():
    """Cut anywhere: fewer elements, other rows, a part that starts later."""
    keys = torch.cat([noise_keys(3, 3), noise_keys(2**64 - 3, 2, first_sample=2**40)])
    whole = normal.normals(keys, 1001, 4)
    assert torch.equal(normal.normals(keys, 17, 4), whole[:, :17])
    assert torch.equal(normal.normals(keys[[4, 0, 0]], 1001, 4), whole[[4, 0, 0]])
    assert torch.equal(normal.normals(keys, 101, 4, first=900), whole[:, 900:])
    # Of 24 bits, so that two may be equal by chance, but not rows or columns.
    assert len(whole.unique()) > whole.numel() - 10


@pytest.mark.parametrize("block", [8, 64])
def test_blocks_of_the_generator_do_not_show(block, monkeypatch):
    keys = noise_keys(3, 5)
    whole = normal.normals(keys, 1001, 4)
    monkeypatch.setattr(normal, "BLOCK", block)
    assert torch.equal(normal.normals(keys, 1001, 4), whole)


# ---------------------------------------------------------------- randomness


def test_normals_are_standard_normal():
    """10^6 draws; KS sees a distance of 0.003 with certainty, at a false-alarm rate of 1e-6."""
    z = standard_normal(7, (2500, 400)).double().numpy().ravel()
    assert_distribution_1d(z, stats.norm.cdf)
    # The moments to the fourth, each with the deviation of its power.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert_mean_close(z**power, mean, std=math.sqrt(variance), alpha=FALSE_ALARM / 4)


def test_every_lane_is_standard_normal():
    """Four numbers come of one counter: each alone, 2x10^5 draws."""
    z = standard_normal(9, (500, 1600), step=3).double().numpy().reshape(-1, 4)
    for lane in z.T:
        assert_distribution_1d(lane, stats.norm.cdf, alpha=FALSE_ALARM / 4)


def test_normals_of_other_elements_samples_steps_streams_and_seeds_are_independent():
    """Products of 2x10^5 pairs: mean 0 +- 5.5 sigma; a correlation of 0.02 would show."""

    def draw(seed, **options):
        return standard_normal(seed, (20_000, 12), **options).double().numpy()

    z = draw(3, step=0)
    pairs = {
        "within a pair": (z[:, 0::2], z[:, 1::2]),
        "across the pairs of a counter": (z[:, 0::4], z[:, 2::4]),
        "across counters": (z[:, :8], z[:, 4:]),
        "across samples": (z[:-1], z[1:]),
        "across steps": (z, draw(3, step=1)),
        "across steps and counters": (z[:, :8], draw(3, step=1)[:, 4:]),
        "across streams": (z, draw(3)),
        "across seeds": (z, draw(4, step=0)),
        "across the halves of seeds": (z, draw(3 << 32, step=0)),
        "across seeds and samples": (z[:-1], draw(4, step=0)[1:]),
        "across the halves of samples": (z, draw(3, step=0, first_sample=2**32)),
    }
    for a, b in pairs.values():
        a, b = a.ravel(), b.ravel()
        assert_mean_close(a * b, 0.0, std=1.0, alpha=FALSE_ALARM / (2 * len(pairs)))
        # Box-Muller pairs share a radius: squares would show it where products do not.
        squares = a**2 * b**2
        assert_mean_close(squares, 1.0, std=math.sqrt(8.0), alpha=FALSE_ALARM / (2 * len(pairs)))


# ---------------------------------------------------------------- the public function


@given(
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**62 - 5),
    step=st.none() | st.integers(0, 2**16 - 1),
    batch=st.integers(0, 4),
    shape=st.lists(st.integers(0, 5), max_size=3),
)
def test_a_seed_is_short_for_its_keys(seed, first, step, batch, shape):
    shape = (batch, *shape)
    keys = noise_keys(seed, batch, first_sample=first)
    assert keys.shape == (batch, 2) and keys.dtype == torch.int64
    assert [row % 2**64 for row in keys[:, 0].tolist()] == [seed] * batch
    assert keys[:, 1].tolist() == list(range(first, first + batch))
    z = standard_normal(seed, shape, step=step, first_sample=first)
    assert z.shape == shape and z.is_contiguous() and z.dtype == torch.float32
    assert torch.equal(z, standard_normal(keys, shape, step=step))
    elements = math.prod(shape[1:])
    stream = normal.INITIAL_STREAM if step is None else normal.STEP_STREAM
    assert torch.equal(z.view(batch, elements), normal.normals(keys, elements, step or 0, stream))


def test_the_noise_of_the_beginning_is_that_of_no_step():
    start = standard_normal(3, (2, 5))
    assert all(not torch.equal(start, standard_normal(3, (2, 5), step=i)) for i in (0, 1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_roundings_of_float32(dtype):
    z = standard_normal(3, (2, 5), step=1, dtype=dtype)
    assert z.dtype == dtype and torch.equal(z, standard_normal(3, (2, 5), step=1).to(dtype))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"seed": -1}, ValueError, ("seed", "from 0 to 18446744073709551615", "-1")),
        ({"seed": 2**64}, ValueError, ("seed", "18446744073709551616")),
        ({"seed": 0.5}, TypeError, ("seed", "0.5")),
        ({"seed": True}, TypeError, ("seed", "True")),
        ({"seed": None}, TypeError, ("seed", "None")),
        ({"shape": ()}, ValueError, ("shape", "(batch, ...)")),
        ({"shape": (2, -1)}, ValueError, ("shape", "-1")),
        ({"shape": (2, 1.5)}, TypeError, ("shape", "1.5")),
        ({"shape": (0, 2**34 + 1)}, ValueError, ("shape", "2**34")),
        ({"step": -1}, ValueError, ("step", "from 0 to 65535", "-1")),
        ({"step": 2**16}, ValueError, ("step", "65536")),
        ({"step": 0.5}, TypeError, ("step", "0.5")),
        ({"first_sample": -1}, ValueError, ("first_sample", "-1")),
        ({"first_sample": 2**62}, ValueError, ("first_sample", str(2**62))),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_by_name(changes, error, words):
    arguments = {"seed": 1, "shape": (2, 3), **changes}
    with pytest.raises(error) as caught:
        standard_normal(**arguments)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "keys",
    [
        torch.zeros(3, 2, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, 2),
        torch.zeros(2, 3, dtype=torch.int64),
    ],
    ids=["another batch", "one row", "float", "three columns"],
)
def test_bad_keys_are_refused_by_name(keys):
    with pytest.raises((ValueError, TypeError), match="seed must be"):
        standard_normal(keys, (2, 3))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"seed": -1}, ValueError),
        ({"seed": 0.5}, TypeError),
        ({"batch": -1}, ValueError),
        ({"batch": 1.5}, TypeError),
        ({"first_sample": 2**62}, ValueError),
    ],
    ids=str,
)
def test_keys_are_made_of_good_arguments_alone(changes, error):
    with pytest.raises(error, match=f"{next(iter(changes))} must be an integer"):
        noise_keys(**{"seed": 1, "batch": 2, **changes})
