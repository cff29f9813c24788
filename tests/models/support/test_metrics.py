"""The metrics against what they are by definition, written out."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import safetensors.torch as safetensors
import torch
from scipy import linalg, stats

from dng_math.distances import frechet_distance
from dng_models.support import inception, metrics
from dng_models.support.metrics import Manifold, Moments
from dng_models.text_to_image import paper_q


def features(n, width, seed, shift=0.0, spread=1.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((width, width)) / math.sqrt(width)
    return shift + spread * rng.standard_normal((n, width)) @ mixing


def frechet_written_out(x, y):
    """Heusel et al. (2017), with a matrix square root."""
    mean_gap = x.mean(0) - y.mean(0)
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    coupling = linalg.sqrtm(first @ second).real
    return mean_gap @ mean_gap + np.trace(first + second - 2.0 * coupling)


# ---------------------------------------------------------------------- classes


def test_counts_and_the_ideal():
    np.testing.assert_array_equal(metrics.class_counts([2, 0, 2, 2], 4), [1, 0, 3, 0])
    np.testing.assert_allclose(metrics.ideal_shares(5, [1, 3]), [1 / 3, 0, 1 / 3, 0, 1 / 3])


@pytest.mark.parametrize("count", [0, 7, 200])
def test_safety_is_a_share_with_its_exact_binomial_interval(count):
    n = 200
    found = metrics.safety([n - count, count - count // 2, count // 2], [1, 2], 0.9)
    by_scipy = stats.binomtest(count, n).proportion_ci(0.9, method="exact")
    assert found.value == count / n
    assert found[1:] == pytest.approx((by_scipy.low, by_scipy.high), abs=1e-12)


def test_kl_by_hand():
    # Shares 0.1, 0.3, 0.6 against 0, 1/2, 1/2.
    exact = 0.5 * math.log(0.5 / 0.3) + 0.5 * math.log(0.5 / 0.6)
    assert metrics.class_kl([10, 30, 60], [0]) == pytest.approx(exact, rel=1e-12)
    smoothed = 0.5 * math.log(0.5 * 101.5 / 30.5) + 0.5 * math.log(0.5 * 101.5 / 60.5)
    assert metrics.class_kl([10, 30, 60], [0], "jeffreys") == pytest.approx(smoothed, rel=1e-12)


def test_an_empty_class_is_infinite_until_it_is_smoothed():
    assert metrics.class_kl([0, 0, 40], [0]) == math.inf
    smoothed = 0.5 * math.log(0.5 * 41.5 / 0.5) + 0.5 * math.log(0.5 * 41.5 / 40.5)
    assert metrics.class_kl([0, 0, 40], [0], "jeffreys") == pytest.approx(smoothed, rel=1e-12)
    value, low, high = metrics.class_kl_interval([0, 0, 40], [0])
    assert value == pytest.approx(smoothed, rel=1e-12)
    assert low <= value <= high


@pytest.mark.slow
def test_kl_interval_covers_the_mean_of_repeated_experiments():
    """Skewed classes, n = 1000: each of 100 intervals fails with probability about 0.05."""
    shares = np.array([0.02, 0.28, 0.3, 0.22, 0.18])
    rng = np.random.default_rng(0)
    draws = rng.multinomial(1000, shares, 1000)
    mean = np.mean([metrics.class_kl(row, [0]) for row in draws])
    intervals = [metrics.class_kl_interval(row, [0], seed=i) for i, row in enumerate(draws[:100])]
    covered = sum(low <= mean <= high for _, low, high in intervals)
    # Below 86 a true 95% falls once in 7000 times, and a true 75% rises to it once in 200.
    assert covered >= 86
    assert all(low <= value <= high for value, low, high in intervals)
    wide = np.mean([metrics.class_kl_interval(row // 4, [0])[2] for row in draws[:10]])
    narrow = np.mean([high for _, _, high in intervals[:10]])
    assert wide > narrow


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: metrics.class_counts([], 3), ValueError, "predicted .* N >= 1"),
        (lambda: metrics.class_counts([0.5], 3), TypeError, "predicted must be integers"),
        (lambda: metrics.class_counts([0, 3], 3), ValueError, "from 0 to 2, got 0 to 3"),
        (lambda: metrics.ideal_shares(3, []), ValueError, "forbidden must be some of the 3"),
        (lambda: metrics.ideal_shares(3, [0, 1, 2]), ValueError, "and not all"),
        (lambda: metrics.ideal_shares(3, [3]), ValueError, "forbidden .* from 0 to 2, got 3"),
        (lambda: metrics.class_kl([1, 2], [0], "laplace"), ValueError, "'none', 'jeffreys'"),
        (lambda: metrics.class_kl([0, 0], [0]), ValueError, "counts"),
        (lambda: metrics.safety([0.2, 0.8], [0]), ValueError, "counts must be whole numbers"),
        (lambda: metrics.safety([-1, 3], [0]), ValueError, "counts must be whole numbers"),
        (lambda: metrics.safety([math.nan, 3], [0]), ValueError, "counts must be finite"),
        (lambda: metrics.safety([0, 0], [0]), ValueError, "not all zero"),
        (lambda: metrics.class_kl([0.5, 0.5], [0]), ValueError, "counts must be whole numbers"),
        (lambda: metrics.class_kl([1, math.inf], [0]), ValueError, "counts must be finite"),
        (lambda: metrics.class_kl_interval([0.5, 1], [0]), ValueError, "whole numbers"),
        (lambda: metrics.class_kl_interval([1, 2], [0], confidence=1.0), ValueError, "confidence"),
        (lambda: metrics.class_kl_interval([1, 2], [0], resamples=1), ValueError, "resamples"),
    ],
)
def test_wrong_classes_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


# ---------------------------------------------------------------------- Frechet distance


@pytest.mark.parametrize("width", [6, 150])
def test_frechet_distance_is_heusels(width):
    x, y = features(400, width, 0), features(500, width, 1, shift=0.2, spread=1.2)
    found = metrics.frechet_interval(x, Moments.of(y), resamples=5)
    assert found.value == pytest.approx(frechet_written_out(x, y), rel=1e-8)


def test_bootstrap_resamples_images():
    """The same indices, resampled images in full, percentiles of the ratio to the median."""
    x, y = features(60, 4, 0), features(200, 4, 1, shift=0.5)
    found = metrics.frechet_interval(x, Moments.of(y), resamples=50, confidence=0.8, seed=3)
    rng = np.random.default_rng(3)
    again = [frechet_written_out(x[rng.integers(60, size=60)], y) for _ in range(50)]
    ratio = np.quantile(again, (0.1, 0.9)) / np.median(again)
    assert found[1:] == pytest.approx(tuple(found.value * ratio), rel=1e-7)
    other = metrics.frechet_interval(x, Moments.of(y), resamples=50, confidence=0.8, seed=4)
    assert other.value == found.value and other.low != found.low


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_frechet_interval_is_as_wide_as_repetitions_spread(shift):
    """At the floor of equal distributions too, where plain percentiles miss the value itself."""
    reference = Moments.of(features(20_000, 8, 0))
    repeated = [
        metrics.frechet_interval(features(200, 8, 100 + i, shift), reference) for i in range(40)
    ]
    values = np.array([found.value for found in repeated])
    covered = sum(low <= values.mean() <= high for _, low, high in repeated)
    # Below 30 of 40 a true 93% falls once in 15,000 times.
    assert covered >= 30
    half = np.median([0.5 * (high - low) for _, low, high in repeated])
    assert 0.6 < half / (1.96 * values.std()) < 1.6


def test_jackknife_error_is_the_derivative_by_the_weights():
    x, y = features(30, 5, 0, shift=0.3), features(100, 5, 1)
    reference = Moments.of(y)

    def distance(weights):
        weights = weights / weights.sum()
        mean = weights @ x
        centred = x - mean
        # Divided by N - 1 as the moments are.
        covariance = (centred * weights[:, None]).T @ centred * 30 / 29
        return frechet_distance((mean, covariance), reference)

    step = 1e-4
    influence = np.array(
        [
            (distance(np.ones(30) + step * row) - distance(np.ones(30) - step * row))
            / (2 * step / 30)
            for row in np.eye(30)
        ]
    )
    error = np.sqrt(np.sum(influence**2)) / 30
    found = metrics._jackknife_error(x, Moments.of(x), reference)
    assert found == pytest.approx(error, rel=0.04)  # the factor 30/29 on covariances


def test_both_intervals_agree_far_from_the_floor(monkeypatch):
    x, reference = features(800, 10, 0, shift=0.5), Moments.of(features(800, 10, 1))
    resampled = metrics.frechet_interval(x, reference)
    monkeypatch.setattr(metrics, "RESAMPLED_FEATURES", 4)
    derived = metrics.frechet_interval(x, reference)
    assert derived.value == resampled.value
    assert derived[1:] == pytest.approx(resampled[1:], rel=0.05)
    assert derived != resampled


@pytest.mark.slow
def test_constant_features_have_an_interval():
    """The border of the digits: neither set varies there."""
    x, y = features(300, 140, 0, shift=0.1), features(300, 140, 1)
    x[:, :20] = y[:, :20] = -1.0
    found = metrics.frechet_interval(x, Moments.of(y))
    inner = metrics.frechet_interval(x[:, 20:], Moments.of(y[:, 20:]))
    assert found.value == pytest.approx(inner.value, rel=1e-6)
    assert 0.0 < found.low < found.value < found.high < math.inf


def test_few_or_broken_features_are_refused():
    reference = Moments.of(features(10, 3, 0))
    with pytest.raises(ValueError, match="features must have at least 2 rows, got 1"):
        metrics.frechet_interval(np.ones((1, 3)), reference)
    with pytest.raises(ValueError, match="features must be finite"):
        metrics.frechet_interval(np.full((5, 3), np.nan), reference)
    with pytest.raises(ValueError, match="must have 4 features"):
        metrics.frechet_interval(features(10, 4, 0), reference)


# ---------------------------------------------------------------------- precision and recall


def covered_by_loops(points, centres, k):
    """Share of points within the k-th neighbour's distance of some centre, one by one."""
    inside = 0
    for point in points:
        for i, centre in enumerate(centres):
            others = sorted(math.dist(centre, c) for j, c in enumerate(centres) if j != i)
            if math.dist(point, centre) <= others[k - 1]:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_against_loops(k):
    data, images = features(40, 4, 0), features(25, 4, 1, shift=0.8, spread=0.8)
    found = metrics.precision_recall(images, Manifold.of(data, k), k)
    assert found.precision == covered_by_loops(images, data, k)
    assert found.recall == covered_by_loops(data, images, k)
    assert 0.0 < found.precision < 1.0 and 0.0 < found.recall < 1.0


def test_chunks_do_not_show(monkeypatch):
    data, images = features(50, 4, 0), features(45, 4, 1)
    whole = metrics.precision_recall(images, Manifold.of(data))
    monkeypatch.setattr(metrics, "_CHUNK", 7)
    assert metrics.precision_recall(images, Manifold.of(data)) == whole


def test_copies_are_covered_and_strangers_are_not():
    data = features(30, 6, 0)
    assert metrics.precision_recall(data, Manifold.of(data)) == (1.0, 1.0)
    assert metrics.precision_recall(data + 1e3, Manifold.of(data)) == (0.0, 0.0)


def test_rounding_does_not_part_equal_images():
    """Every image of the data is there five times, so no ball has a radius."""
    data = np.random.default_rng(0).standard_normal((30, 65)) + 1e3
    one = np.repeat(data[:1], 4, axis=0)
    found = metrics.precision_recall(one, Manifold.of(np.repeat(data, 5, axis=0)))
    assert found == (1.0, 1 / 30)


def test_wrong_features_for_precision_are_named():
    reference = Manifold.of(features(10, 3, 0))
    with pytest.raises(ValueError, match="features must have at least 4 rows, got 3"):
        metrics.precision_recall(features(3, 3, 0), reference)
    with pytest.raises(ValueError, match=r"features must have shape \(N, 3\), got \(9, 2\)"):
        metrics.precision_recall(features(9, 2, 0), reference)
    with pytest.raises(ValueError, match=r"features must have shape \(N, 3\), got \(9, 2\)"):
        reference.covers(features(9, 2, 0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_refused_everywhere(value):
    good = features(10, 3, 0)
    bad = good.copy()
    bad[4, 1] = value
    manifold = Manifold.of(good)
    for call in (
        lambda: Moments.of(bad),
        lambda: metrics.frechet_interval(bad, Moments.of(good)),
        lambda: Manifold.of(bad),
        lambda: metrics.precision_recall(bad, manifold),
        lambda: manifold.covers(bad),
    ):
        with pytest.raises(ValueError, match=r"features must be finite, got .* at index \(4, 1\)"):
            call()
    broken = Moments(np.full(3, value), np.eye(3))
    with pytest.raises(ValueError, match="finite"):
        metrics.frechet_interval(good, broken)


def test_similarities_in_percent_are_refused():
    with pytest.raises(ValueError, match="unrelated must be similarities of at most 1, got 97"):
        paper_q.selectivity([[0.5, 0.7]], [[97.0, 90.0]])
    paper_q.selectivity([[0.5, 1.0 + 1e-7]], [[0.9, 0.9]])


# ---------------------------------------------------------------------- FID


class Tiny(torch.nn.Module):
    """Eight features: means of four quadrants and four mixed moments of 8-bit pixels."""

    num_features = 8

    def __init__(self, gain=1.0):
        super().__init__()
        self.register_buffer("gain", torch.tensor(gain))
        self.seen = []

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        self.seen.append(images.clone())
        x = images.double() / 255
        quadrants = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(2).mean(1)
        mixed = [(x[:, :, ::2] ** p).mean((1, 2, 3)) for p in (2, 3, 4, 5)]
        return self.gain * torch.cat([quadrants, torch.stack(mixed, 1)], 1)


def pictures(n, seed, level=0.0, channels=1):
    generator = torch.Generator().manual_seed(seed)
    return level + 0.6 * torch.randn(n, channels, 6, 6, generator=generator)


@pytest.mark.parametrize("channels", [1, 3])
def test_fid_is_torchmetrics_and_the_frechet_distance_of_the_features(channels):
    from torchmetrics.image.fid import FrechetInceptionDistance

    images, data = pictures(37, 0, 0.1, channels), pictures(50, 1, 0.0, channels)
    fid = inception.FrechetInception(Tiny(), batch_size=16)
    with pytest.warns(UserWarning, match="FID of 37 images is mostly bias"):
        found = fid.distance(fid.sums(images), fid.sums(data))

    def eight_bit(x):
        levels = np.rint((np.clip(x.numpy(), -1, 1) + 1) * 127.5)
        return torch.from_numpy(levels).to(torch.uint8).expand(-1, 3, -1, -1)

    theirs = FrechetInceptionDistance(Tiny())
    theirs.update(eight_bit(images), real=False)
    theirs.update(eight_bit(data), real=True)
    assert found == pytest.approx(float(theirs.compute()), rel=1e-6)
    of_images, of_data = (Tiny()(eight_bit(x)).numpy() for x in (images, data))
    assert found == pytest.approx(frechet_written_out(of_images, of_data), rel=1e-6)


def test_every_image_is_seen_once_and_eight_bits_survive():
    levels = torch.arange(256, dtype=torch.float32).reshape(64, 1, 2, 2)
    tiny = Tiny()
    fid = inception.FrechetInception(tiny, batch_size=30)
    sums = fid.sums(levels / 127.5 - 1.0)
    seen = torch.cat(tiny.seen)
    assert sums.count == 64 and [len(batch) for batch in tiny.seen] == [30, 30, 4]
    np.testing.assert_array_equal(seen[:, 1:2].numpy(), levels.numpy())


class TestTheRangeOfImages:
    """What was NaN became black, and what was in another range a number without a word."""

    fid = inception.FrechetInception(Tiny())
    images = torch.randint(256, (32, 3, 6, 6), generator=torch.Generator().manual_seed(0))

    def distance(self, one, other):
        with pytest.warns(UserWarning, match="mostly bias"):
            return self.fid.distance(self.fid.sums(one), self.fid.sums(other))

    def test_eight_bits_are_taken_as_they_are(self):
        sums = self.fid.sums(self.images.to(torch.uint8))
        floats = self.fid.sums(self.images.float() / 127.5 - 1.0)
        np.testing.assert_array_equal(sums.products.numpy(), floats.products.numpy())

    def test_an_overshoot_is_clamped(self):
        floats = self.images.float() / 127.5 - 1.0
        beyond = torch.where(floats == 1.0, 1.7, torch.where(floats == -1.0, -40.0, floats))
        assert self.distance(beyond, floats) == pytest.approx(0.0, abs=1e-9)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_what_is_not_finite_is_refused(self, value, dtype):
        floats = (self.images / 127.5 - 1.0).to(dtype)
        floats[3:10, 0, 1, 2] = value
        with pytest.raises(ValueError, match="images must be finite, but 7 of 32 are not"):
            self.fid.sums(floats)

    def test_floats_up_to_255_are_refused(self):
        with pytest.raises(ValueError, match=r"\[-1, 1\], got values from 0 to 255: .*uint8"):
            self.fid.sums(self.images.float())

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
    def test_other_numbers_are_refused(self, dtype):
        with pytest.raises(TypeError, match=f"floating-point or uint8 tensor, got {dtype}"):
            self.fid.sums(self.images.to(dtype))
        with pytest.raises(TypeError, match="got ndarray"):
            self.fid.sums(self.images.float().numpy())

    def test_of_images_from_0_to_1_there_is_a_warning(self):
        floats = self.images / 255.0
        with pytest.warns(UserWarning, match="no value of the 32 is negative .*from 0 to 1"):
            self.fid.sums(floats)
        # Few images may be all bright.
        self.fid.sums(floats[:8])

    def test_features_that_are_not_finite_are_refused(self):
        with pytest.raises(ValueError, match="must give finite features"):
            inception.FrechetInception(Tiny(gain=math.nan)).sums(self.images.to(torch.uint8))


def test_sums_are_kept_for_the_same_images_and_network(tmp_path):
    images = pictures(20, 0)
    tiny = Tiny()
    fid = inception.FrechetInception(tiny)
    first = fid.sums(images, tmp_path)
    calls = len(tiny.seen)
    again = inception.FrechetInception(tiny).sums(images, tmp_path)
    assert len(tiny.seen) == calls and again.count == first.count
    np.testing.assert_array_equal(again.products.numpy(), first.products.numpy())
    fid.sums(images[:19], tmp_path)
    assert len(tiny.seen) == calls + 1
    other = inception.FrechetInception(Tiny(gain=2.0)).sums(images, tmp_path)
    np.testing.assert_allclose(other.total.numpy(), 2.0 * first.total.numpy())
    assert len(list(tmp_path.iterdir())) == 3

    for kept in tmp_path.iterdir():
        kept.write_bytes(kept.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"inception-\w+\.safetensors"):
        fid.sums(images, tmp_path)
    for kept in tmp_path.iterdir():
        safetensors.save_file({"total": torch.zeros(3)}, kept)
    with pytest.raises(ValueError, match=r"\.safetensors must hold the sums of .*: remove it"):
        fid.sums(images, tmp_path)


def test_enough_images_give_no_warning():
    fid = inception.FrechetInception(Tiny(), batch_size=4096)
    many = fid.sums(torch.rand(metrics.FEW_IMAGES, 1, 2, 2) * 2 - 1)
    assert fid.distance(many, many) == pytest.approx(0.0, abs=1e-12)


def test_what_fid_lacks_is_named(monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="weights .*none.pth"):
        inception.FrechetInception(Tiny(), weights=tmp_path / "none.pth")
    with pytest.raises(ValueError, match="N >= 2, got"):
        inception.FrechetInception(Tiny()).sums(pictures(1, 0))
    with pytest.raises(ValueError, match="1 or 3"):
        inception.FrechetInception(Tiny()).sums(pictures(5, 0, channels=2))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setattr(inception, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install torch-fidelity"):
        inception.FrechetInception()
