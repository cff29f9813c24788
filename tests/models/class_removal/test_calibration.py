"""Calibration: exact networks need none, and known distortions are found again."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import special

from dng_kernels import standard_normal
from dng_math import (
    GaussianMixture,
    LogOddsTracker,
    NoiseSchedule,
    PaperTracker,
    PathTracker,
    TimeProfile,
    path_ends,
)
from dng_math.trackers import at_steps
from dng_models.class_removal import calibration
from dng_models.class_removal.calibration import Calibration, fit, tracked
from dng_models.class_removal.evidence import Evidence, PathEvidence, collect, collect_along_paths
from tests.helpers import textbook
from tests.helpers.tolerances import CHAIN, error

LINEAR = NoiseSchedule.linear()
MIXTURE = GaussianMixture([0.2, 0.3, 0.5], [[-1.0, 0.0], [1.0, 0.5], [0.0, -1.0]], [0.1, 0.2, 0.3])


def denoiser(components):
    part = MIXTURE if components is None else MIXTURE.restrict(components)

    def predict(x, t):
        alpha, sigma = LINEAR.alpha[int(t[0]) + 1], LINEAR.sigma[int(t[0]) + 1]
        now = x.double().numpy()
        return torch.from_numpy((now - alpha * part.posterior_mean(now, alpha, sigma)) / sigma)

    return predict


def draw(n: int, seed: int):
    """Points of the mixture, and whether they are of its first component."""
    rng = np.random.default_rng(seed)
    component = rng.choice(3, size=n, p=MIXTURE.weights)
    scale = np.sqrt(MIXTURE.covariances[component])[:, None]
    points = MIXTURE.means[component] + scale * rng.normal(size=(n, 2))
    return torch.from_numpy(points).float(), component == 0


def evidence_of(n: int = 500, steps: int = 100, **options) -> Evidence:
    points, forbidden = draw(n, 3)
    options = {"steps": steps, "paths": 2, "batch_size": 2 * n, **options}
    return collect(denoiser(None), denoiser([0]), points, forbidden, **options)


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return evidence_of()


LINE = GaussianMixture([0.2, 0.5, 0.3], [[-1.0], [0.0], [1.5]], [0.09, 0.2, 0.09])


def on_a_line(components):
    """As :func:`denoiser`, for one dimension, where a random sign gives the derivative itself."""
    part = LINE if components is None else LINE.restrict(components)
    live = part.weights > 0
    weights, means, variances = (
        torch.tensor(np.asarray(v)[live])
        for v in (part.weights, part.means[:, 0], part.covariances)
    )

    def predict(x, t):
        alpha, sigma = (float(v[int(t[0]) + 1]) for v in (LINEAR.alpha, LINEAR.sigma))
        spread = alpha**2 * variances + sigma**2
        now = x.double()
        share = torch.softmax(
            weights.log() - 0.5 * spread.log() - (now - alpha * means) ** 2 / (2 * spread), dim=1
        )
        eps = (share * sigma * (now - alpha * means) / spread).sum(1, keepdim=True)
        return eps.to(x.dtype)

    return predict


def on_line(n: int):
    """Points of the mixture, and whether they are of its first component."""
    rng = np.random.default_rng(3)
    component = rng.choice(3, size=n, p=LINE.weights)
    spread = np.sqrt(LINE.covariances[component])[:, None]
    points = LINE.means[component] + spread * rng.normal(size=(n, 1))
    return torch.from_numpy(points).float(), component == 0


def along_paths(n: int = 400, steps: int = 50, **options) -> PathEvidence:
    points, forbidden = on_line(n)
    options = {"steps": steps, "paths": 2, "batch_size": 2 * n, **options}
    return collect_along_paths(on_a_line(None), on_a_line([0]), points, forbidden, **options)


@pytest.fixture(scope="module")
def path_evidence() -> PathEvidence:
    return along_paths()


# ---------------------------------------------------------------- evidence


def test_tracked_along_a_noising_path_is_the_papers_update(evidence):
    """Paths made again here, and Eq. 12 written out by the textbook, in float64."""
    points, _ = draw(500, 3)
    c = evidence.coefficients
    x = points.repeat_interleave(2, dim=0)
    states = [x]
    for step in reversed(range(100)):
        z = standard_normal(0, x.shape, step=step)
        x = float(c.alpha_ts[step]) * x + float(np.sqrt(c.beta_ts[step])) * z
        states.append(x)
    states = states[::-1]
    log_p = np.full(1000, np.log(0.3))
    timesteps = np.arange(999, -1, -10)
    for step in range(99):
        now, following = (states[step + i].double().numpy() for i in (0, 1))
        means = []
        for predict in (denoiser(None), denoiser([0])):
            eps = predict(states[step], torch.full((1000,), int(timesteps[step]))).numpy()
            mean = (now - c.beta_ts[step] / c.sigma_t[step] * eps) / c.alpha_ts[step]
            means.append(mean)
        variance = c.beta_ts[step] * c.sigma_s[step] ** 2 / c.sigma_t[step] ** 2
        log_p = textbook.paper_update(
            log_p, following, *means, variance, 0.7, 0.0, p_min=1e-6, p_max=0.99
        )
    got = tracked(evidence, PaperTracker(prior=0.3, temperature=0.7))[-1]
    assert error(got, special.logit(np.exp(log_p))) < 1e-6  # x is float32 in both


def test_a_path_does_not_depend_on_the_batch():
    evidence, other = (evidence_of(n=40, steps=20, batch_size=size) for size in (80, 17))
    assert error(other.gap_sq, evidence.gap_sq) < 1e-12
    assert error(other.residual_gap, evidence.residual_gap) < 1e-12


def test_evidence_along_a_path_is_the_exact_trackers():
    """Points made again here, and dng_math's own ends and updates; a drift and a profile too."""
    n, steps = 30, 20
    evidence = along_paths(n, steps, paths=1, batch_size=12)
    c = evidence.coefficients
    clean = on_line(n)[0]
    eps = standard_normal(0, clean.shape)
    for compare in ("rest", "base"):
        tracker = PathTracker(
            0.3, TimeProfile((0.1, 0.6), (0.5, 0.9)), 0.4, p_max=0.95, compare=compare
        )
        state, previous, rows = tracker.init(np.full((1, n), 0.3)), None, []
        for step, own in enumerate([at_steps(tracker, c)[0], *at_steps(tracker, c)[:-1]]):
            alpha, sigma = float(c.alpha_t[step]), float(c.sigma_t[step])
            x = (alpha * clean + sigma * eps).double().numpy()
            ends = path_ends(LINE, x, alpha, sigma, forbidden=[0], previous=previous)
            assert isinstance(own, PathTracker)
            state = own.update(state, *ends, steps)
            rows.append(special.logit(np.exp(tracker.log_posterior(state)))[0])
            previous = x, alpha, sigma
        got = tracked(evidence, tracker)
        assert error(got[:-1], rows) < 1e-4  # x is float32
        assert error(got[-1], got[-2]) == 0.0
    exact = LINE.diffuse(alpha, sigma).log_posterior(x, [0]) - np.log(0.2)
    assert error(evidence.gain()[-1], exact) < 0.1


def test_clipping_and_kinds_of_prediction_are_the_same_step():
    points, forbidden = draw(20, 1)
    alpha, sigma = LINEAR.alpha[1:], LINEAR.sigma[1:]

    def as_x0(components):
        def predict(x, t):
            a, s = alpha[int(t[0])], sigma[int(t[0])]
            return (x.double() - s * denoiser(components)(x, t)) / a

        return predict

    options = {"steps": 20, "paths": 1}
    eps = collect(denoiser(None), denoiser([0]), points, forbidden, **options)
    x0 = collect(as_x0(None), as_x0([0]), points, forbidden, prediction_type="sample", **options)
    assert error(eps.gap_sq, x0.gap_sq) < CHAIN
    loose = collect(denoiser(None), denoiser([0]), points, forbidden, clip=10.0, **options)
    tight = collect(denoiser(None), denoiser([0]), points, forbidden, clip=0.5, **options)
    assert error(eps.gap_sq, loose.gap_sq) < CHAIN
    assert tight.gap_sq.sum() < eps.gap_sq.sum()


# ---------------------------------------------------------------- the fit


@pytest.mark.slow
def test_exact_networks_want_temperature_one_and_no_offset():
    """At 500 steps; the interval is widened to five standard errors, a false alarm of 6e-7.

    What 500 steps still bias the temperature by is below 0.1 (with 50 steps it is 0.3: the
    transition over a long step is no Gaussian about the mean that the networks predict).
    """
    evidence = evidence_of(n=600, steps=500, paths=3)
    fitted = fit(evidence, "paper", prior=0.2, times=(0.0,))
    spread = np.log(fitted.temperature_high[0] / fitted.temperature_low[0]) / 2 * 5 / 1.96
    assert abs(np.log(fitted.temperature[0])) < spread + 0.1
    assert spread < 0.8  # or nothing would have been shown
    assert abs(fitted.offset_nats) < (fitted.offset_high - fitted.offset_low) / 2 * 5 / 1.96


def test_exact_networks_want_temperature_one_along_paths(path_evidence):
    """At 50 steps, where the tracker of transitions wants 0.7: no step is assumed to be short."""
    fitted = fit(path_evidence, "path", prior=0.2, times=(0.0,))
    spread = np.log(fitted.temperature_high[0] / fitted.temperature_low[0]) / 2 * 5 / 1.96
    assert abs(np.log(fitted.temperature[0])) < spread + 0.05
    assert spread < 0.8
    assert abs(fitted.offset_nats) < (fitted.offset_high - fitted.offset_low) / 2 * 5 / 1.96
    doubled = {
        name: 2.0 * getattr(path_evidence, name)
        for name in ("pull", "pull_before", "rate", "spread")
    }
    wrong = fit(replace(path_evidence, **doubled), "path", prior=0.2, times=(0.0,))
    assert 2.0 * wrong.temperature[0] == pytest.approx(fitted.temperature[0], rel=0.05)


@pytest.mark.parametrize("times", [(0.0,), (0.05, 0.5)])
def test_overconfident_networks_get_a_lower_temperature(evidence, times):
    """Log ratios four times too large are worth a quarter: the rest of the fit is unmoved."""
    fourfold = replace(evidence, gap_sq=4 * evidence.gap_sq, residual_gap=4 * evidence.residual_gap)
    right, wrong = (fit(each, "paper", prior=0.2, times=times) for each in (evidence, fourfold))
    assert error(4 * np.array(wrong.temperature), right.temperature) < 0.02
    assert abs(wrong.offset_nats - right.offset_nats) < 0.02


def test_a_drift_of_the_networks_becomes_the_offset(evidence):
    """Two nats a run too many, spread evenly: the fitted offset takes them back."""
    c = evidence.coefficients
    drift = 2.0 / len(c) * 2.0 * c.tracker_variance()[:, None]
    drifting = replace(evidence, gap_sq=evidence.gap_sq - drift)
    right, wrong = (fit(each, "paper", prior=0.2, times=(0.0,)) for each in (evidence, drifting))
    # The last step is not tracked, so 99 of 100 parts of the drift count.
    moved = right.offset_nats - wrong.offset_nats
    assert moved == pytest.approx(2.0 * wrong.temperature[0] * 0.99, abs=0.03)


@pytest.mark.slow
def test_a_time_at_which_the_networks_are_noise_is_left_out(evidence):
    """Ratios that say nothing below t = 0.15 get a weight near 0 there, and only there."""
    rng = np.random.default_rng(0)
    late = evidence.coefficients.time < 0.15
    variance = evidence.coefficients.tracker_variance()[:, None]
    nonsense = replace(evidence, residual_gap=evidence.residual_gap.copy())
    nonsense.residual_gap[late] += variance[late] * rng.normal(
        0.0, 3.0, nonsense.residual_gap[late].shape
    )
    fitted = fit(nonsense, "paper", prior=0.2, times=(0.05, 0.12, 0.25, 0.6))
    assert max(fitted.temperature[:1]) < 0.15
    assert min(fitted.temperature[2:]) > 0.3
    constant = fit(nonsense, "paper", prior=0.2, times=(0.0,))
    losses = [
        calibration.log_losses(tracked(nonsense, each.make()), nonsense.forbidden).mean()
        for each in (fitted, constant)
    ]
    assert losses[0] < losses[1] - 0.005


@pytest.mark.parametrize("kind", [*calibration.OF_STEPS, *calibration.OF_POINTS])
def test_what_is_minimised_is_the_loss_of_the_tracker_itself(request, kind):
    path = kind in calibration.OF_POINTS
    evidence = request.getfixturevalue("path_evidence" if path else "evidence")
    times = (0.05, 0.2, 0.6)
    problem = calibration._Problem(evidence, kind, 0.2, times)
    thetas = np.array([[-1.0, -0.5, 0.0, 0.7], [-2.0, -1.0, -1.5, -1.0]])
    for theta, got in zip(thetas, problem.per_image(thetas), strict=True):
        profile = TimeProfile(times, tuple(np.exp(theta[:-1])))
        tracker = replace(
            calibration._unfitted(kind, 0.2, calibration.P_MAX[kind]),
            temperature=profile,
            offset_nats=theta[-1],
        )
        # A path tracker's state is that of a point, and not after the step from there.
        rows = tracked(evidence, tracker)[:-1] if path else tracked(evidence, tracker)[1:]
        losses = calibration.log_losses(rows[problem.judged], evidence.forbidden).mean(axis=0)
        assert error(got, losses.reshape(-1, 2).mean(axis=1)) < 1e-11


def test_log_losses_are_the_definition_and_stay_finite():
    log_odds = np.array([-3.0, 0.0, 2.0, 800.0, -800.0, 800.0])
    forbidden = np.array([True, True, False, False, True, True])
    p = special.expit(log_odds[:3])
    expected = [-np.log(p[0]), np.log(2.0), -np.log(1 - p[2]), 800.0, 800.0, 0.0]
    assert error(calibration.log_losses(log_odds, forbidden), expected) < 1e-14


@pytest.mark.slow
def test_intervals_are_those_of_a_bootstrap_of_images():
    evidence = evidence_of(n=300, steps=60)
    fitted = fit(evidence, "paper", prior=0.2, times=(0.0,))
    rng = np.random.default_rng(1)
    images = np.unique(evidence.image)
    drawn = []
    for _ in range(120):
        rows = [np.flatnonzero(evidence.image == i) for i in rng.choice(images, len(images))]
        paths = np.concatenate(rows)
        again = replace(
            evidence,
            forbidden=evidence.forbidden[paths],
            image=np.repeat(np.arange(len(rows)), 2),
            gap_sq=evidence.gap_sq[:, paths],
            residual_gap=evidence.residual_gap[:, paths],
        )
        refitted = fit(again, "paper", prior=0.2, times=(0.0,))
        drawn.append((np.log(refitted.temperature[0]), refitted.offset_nats))
    spread = np.std(drawn, axis=0) * 1.96
    assert np.log(fitted.temperature_high[0] / fitted.temperature[0]) == pytest.approx(
        spread[0], rel=0.5
    )
    assert fitted.offset_high - fitted.offset_nats == pytest.approx(spread[1], rel=0.5)


# ---------------------------------------------------------------- the judgement


def test_halves_share_no_image_and_split_the_forbidden(evidence):
    half = calibration._halves(evidence, 0)
    assert not set(evidence.image[half]) & set(evidence.image[~half])
    inside, outside = (
        len(set(evidence.image[side & evidence.forbidden])) for side in (half, ~half)
    )
    assert abs(inside - outside) <= 1 and inside > 10


def test_curves_are_means_with_intervals_around_them(evidence):
    log_odds = tracked(evidence, PaperTracker(prior=0.2))
    told = calibration.curves(evidence, log_odds)
    losses = -np.log(
        np.where(evidence.forbidden, special.expit(log_odds), special.expit(-log_odds))
    )
    assert error(told["log_loss"], losses.mean(axis=1)) < 1e-12
    squares = (special.expit(log_odds) - evidence.forbidden) ** 2
    assert error(told["brier"], squares.mean(axis=1)) < 1e-12
    for name in ("log_loss", "brier"):
        low, high = np.array(told[f"{name}_low"]), np.array(told[f"{name}_high"])
        assert np.all(low <= told[name]) and np.all(told[name] <= high)
        # A bootstrap of 500 images, against the textbook's standard error of a mean.
        by_image = (losses if name == "log_loss" else squares)[-1].reshape(500, 2).mean(axis=1)
        width = 2 * 1.96 * by_image.std() / np.sqrt(500)
        assert high[-1] - low[-1] == pytest.approx(width, rel=0.25)
    assert told["log_loss"][-1] < told["log_loss"][0]


def test_reliability_of_the_exact_posterior_is_the_diagonal(evidence):
    told = calibration.reliability(evidence, tracked(evidence, PaperTracker(prior=0.2)))
    confidence, frequency = np.array(told["confidence"]), np.array(told["frequency"])
    assert len(confidence) >= 6
    assert np.all(np.diff(confidence) > 0)
    far = np.abs(frequency - confidence) > 3 * (np.array(told["high"]) - told["low"]) / 2 + 0.05
    assert not far.any()


def test_a_calibration_is_saved_whole_and_read_back(tmp_path):
    few = evidence_of(n=120, steps=30)
    before = {"paper's settings": PaperTracker(prior=0.25, temperature=0.25)}
    made = calibration.calibrate(few, prior=0.2, before=before, about={"forget": ["0"]})
    assert set(made.fits) == {f"{k}{v}" for k in ("paper", "log-odds") for v in ("", ", constant")}
    path = tmp_path / "calibration" / "0.json"
    made.save(path)
    again = Calibration.load(path)
    assert again.fits == made.fits and again.about == made.about
    assert error(again.report["paper"]["brier"], made.report["paper"]["brier"]) < 1e-5
    assert again.report.keys() == made.report.keys()
    tracker = again.tracker("paper")
    assert isinstance(tracker, PaperTracker) and isinstance(tracker.temperature, TimeProfile)
    assert tracker.prior == 0.2
    constant = again.tracker("log-odds", varying=False)
    assert isinstance(constant, LogOddsTracker) and isinstance(constant.temperature, float)
    head, _, row = calibration.report_table({"0": again}).splitlines()
    cells = dict(zip(head.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    for title, name in (
        ("share alone", "prior alone"),
        ("paper's settings", "paper's settings"),
        ("one temperature", "paper, constant"),
        ("varying", "paper"),
        ("log-odds, varying", "log-odds"),
    ):
        assert float(cells[title]) == pytest.approx(again.report[name]["mean_log_loss"][0], 5e-3)
    gain = np.array(again.about["gain_forbidden"])
    assert cells["exact evidence"] == f"{np.log(5.0):.1f}"
    assert cells["most, at t/T"] == f"{gain.max():.1f}, {again.report['time'][gain.argmax()]:.2f}"
    assert cells["at the end"] == f"{gain[-1]:.1f}"

    report = made.report
    assert report["prior alone"]["mean_log_loss"][0] > report["paper"]["mean_log_loss"][0]
    assert len(report["time"]) == len(report["paper"]["log_loss"]) == 31

    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"version": 0}))
    with pytest.raises(ValueError, match=r"0\.json is a calibration of version 0"):
        Calibration.load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"0\.json has no .version"):
        Calibration.load(path)
    with pytest.raises(FileNotFoundError, match="run the calibrate command first"):
        Calibration.load(tmp_path / "1.json")


@pytest.mark.slow
def test_a_calibration_of_the_path_tracker_has_its_own_fits(tmp_path):
    few = along_paths(120, 20)
    before = {"path, uncalibrated": PathTracker(0.2)}
    made = calibration.calibrate(few, prior=0.2, before=before, about={"forget": ["0"]})
    assert set(made.fits) == {"path", "path, constant"} and made.kinds == ("path",)
    made.save(tmp_path / "0-path.json")
    again = Calibration.load(tmp_path / "0-path.json")
    assert again.fits == made.fits
    tracker = again.tracker("path")
    assert isinstance(tracker, PathTracker) and tracker.compare == "base" and tracker.p_max == 0.9
    assert (
        again.report["prior alone"]["mean_log_loss"][0] > again.report["path"]["mean_log_loss"][0]
    )
    assert len(again.report["time"]) == len(again.report["path"]["log_loss"]) == 21
    head, _, row = calibration.report_table({"0": again}).splitlines()
    cells = dict(zip(head.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    for title, name in (("one temperature", "path, constant"), ("varying", "path")):
        assert float(cells[title]) == pytest.approx(again.report[name]["mean_log_loss"][0], 5e-3)
    with pytest.raises(ValueError, match="kind must be one of 'path'"):
        again.tracker("paper")


def test_bad_input(evidence, path_evidence):
    points, _ = draw(10, 0)
    with pytest.raises(ValueError, match="forbidden must say of every image.*0 of 10"):
        collect(denoiser(None), denoiser([0]), points, np.zeros(10, dtype=bool))
    with pytest.raises(ValueError, match="for 10 images"):
        collect(denoiser(None), denoiser([0]), points, np.array([True, False]))
    with pytest.raises(ValueError, match="kind must be one of"):
        fit(evidence, "both", prior=0.2)
    with pytest.raises(ValueError, match="kind must be one of 'paper', 'log-odds'"):
        fit(evidence, "path", prior=0.2)
    with pytest.raises(ValueError, match="kind must be one of 'path'"):
        fit(path_evidence, "paper", prior=0.2)
    with pytest.raises(ValueError, match="probes"):
        collect_along_paths(denoiser(None), denoiser([0]), points, np.arange(10) < 3, probes=0)
    with pytest.raises(ValueError, match=r"prior must be in \(0, 1\), got 1.0"):
        fit(evidence, "paper", prior=1.0)
