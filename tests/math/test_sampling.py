"""Chains: two engines, the textbook, reproducible bits, and what the theory promises of them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dng_math import (
    DDIM,
    DDPM,
    CFGPlusPlus,
    ClassifierFreeGuidance,
    ContrastiveCFG,
    DynamicNegativeGuidance,
    EulerMaruyama,
    FeedbackGuidance,
    GaussianMixture,
    GeoGuide,
    LimitedInterval,
    LogOddsTracker,
    NegativePrompting,
    NoiseSchedule,
    PaperTracker,
    PathTracker,
    PerpNeg,
    ProbabilityFlow,
    SafeLatentDiffusion,
    TimeProfile,
    Unguided,
    noise,
    sample,
)
from dng_math.distances import forbidden_mass, guided_density, ks_critical_value, ks_statistic
from tests.helpers import textbook
from tests.helpers.mixtures import moderate
from tests.helpers.statistical import assert_proportion
from tests.helpers.tolerances import CHAIN, error

FOUR_MODES = GaussianMixture([0.25] * 4, [[-3.0], [-1.0], [1.0], [3.0]], [0.04] * 4)
LINEAR = NoiseSchedule.linear()

RULES = {
    "unguided": Unguided(),
    "cfg": ClassifierFreeGuidance(1.5),
    "np": NegativePrompting(0.7),
    "sld": SafeLatentDiffusion(0.5),
    "sld absolute, warm-up": SafeLatentDiffusion(0.5, 0.3, "absolute", warmup_steps=3),
    "perp-neg": PerpNeg(0.5, 0.5),
    "ccfg": ContrastiveCFG(1.0, 0.5),
    "interval": LimitedInterval(NegativePrompting(0.4), 0.2, 0.7),
    "exact": DynamicNegativeGuidance(1.5),
    "paper": DynamicNegativeGuidance(1.0, PaperTracker(offset_nats=1.0, temperature=0.7)),
    "profile": DynamicNegativeGuidance(
        1.0, PaperTracker(temperature=TimeProfile((0.1, 0.5), (0.2, 1.0)))
    ),
    "published": DynamicNegativeGuidance(1.0, PaperTracker(offset=1e-4, variance="published")),
    "log-odds": DynamicNegativeGuidance(1.0, LogOddsTracker(prior=0.3)),
    "paper, divergence": DynamicNegativeGuidance(1.0, PaperTracker(divergence=True)),
    "log-odds, divergence": DynamicNegativeGuidance(1.0, LogOddsTracker(divergence=True)),
    "path": DynamicNegativeGuidance(
        1.0, PathTracker(offset_nats=0.5, temperature=TimeProfile((0.1, 0.5), (0.2, 1.0)))
    ),
    "path, base": DynamicNegativeGuidance(0.7, PathTracker(prior=0.3, compare="base")),
    "fbg": FeedbackGuidance(),
    "fbg, hybrid": FeedbackGuidance(cfg_scale=2.0, sigma_lo=0.2, sigma_hi=3.0),
    "geoguide": GeoGuide(1.0),
    "cfg++": CFGPlusPlus(0.6),
}
# Posteriors are wrong there, which `sample` says: these tests compare them with one another.
TOO_LITTLE_NOISE = pytest.mark.filterwarnings("ignore:the sampler adds:UserWarning")
SAMPLERS = [DDPM(), DDPM("large"), DDIM(0.5), DDIM(0.0), EulerMaruyama(), ProbabilityFlow()]
SCHEDULES = [
    LINEAR.respace(20),
    NoiseSchedule.flow(20),
    NoiseSchedule.variance_exploding(20, rho=7.0),
]


def assert_same(a, b, tolerance):
    for name in ("x", "time", "log_posterior", "trajectory", "scale", "tracked", "exact"):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None), name
        if left is not None:
            assert left.shape == right.shape, name
            # A scale may be the exponential of a log ratio, whose error is relative to its size.
            assert error(left, right) < tolerance * (10 if name == "scale" else 1), name


def both(mixture, schedule, rule, **options):
    record = ["trajectory", "scale", "exact"]
    inner = rule.rule if isinstance(rule, LimitedInterval) else rule
    if isinstance(getattr(inner, "posterior", None), PaperTracker | LogOddsTracker | PathTracker):
        record.append("tracked")
    options = {"n": 37, "forbidden": [1, 3], "first_sample": 300, "record": record, **options}
    fused = sample(mixture, schedule, rule, **options)
    reference = sample(mixture, schedule, rule, engine="reference", **options)
    return fused, reference


@TOO_LITTLE_NOISE
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("kind", ["spherical", "diagonal", "full"])
@pytest.mark.thinned(5)
def test_fused_engine_is_the_reference(kind, rule):
    for d, schedule in zip((1, 2, 3), SCHEDULES, strict=True):
        mixture = moderate(d, kind, 5, d)
        for sampler in SAMPLERS:
            if schedule.alpha[-1] == 0 and isinstance(sampler, EulerMaruyama | ProbabilityFlow):
                continue
            options = {"sampler": sampler, "initial": "exact", "seed": 5}
            assert_same(*both(mixture, schedule, rule, **options), CHAIN)


@pytest.mark.parametrize("positive", [[0, 1], [0, 2, 4], [0, 1, 2, 3, 4]], ids=str)
def test_perp_neg_fused_is_the_reference(positive):
    """Also where the positive prediction and the base agree to rounding, or everywhere."""
    for d, kind in enumerate(("spherical", "diagonal", "full"), 1):
        mixture = moderate(1, kind, 5, d)
        pair = both(mixture, LINEAR.respace(20), PerpNeg(0.5, 0.5), positive=positive)
        assert_same(*pair, CHAIN)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_no_samples_have_the_same_shapes_of_both_engines(rule):
    mixture = moderate(0, "diagonal", 5, 2)
    for result in both(mixture, LINEAR.respace(4), rule, n=0):
        assert result.x.shape == (0, 2)
        assert result.trajectory.shape == (5, 0, 2)
        assert result.scale.shape == (4, 1, 0) and result.exact.shape == (5, 1, 0)
    for engine in ("fused", "reference"):
        assert sample(mixture, LINEAR.respace(4), n=0, engine=engine).x.shape == (0, 2)


@TOO_LITTLE_NOISE
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_matrix_products_are_the_reference(rule):
    """A data set of 150 points in 6 dimensions takes the other way to its predictions."""
    rng = np.random.default_rng(0)
    mixture = GaussianMixture.from_points(rng.normal(size=(150, 6)) + 3.0, 0.4)
    forbidden = np.arange(40)
    for sampler in (DDPM(), DDIM(0.5)):
        pair = both(mixture, LINEAR.respace(20), rule, forbidden=forbidden, sampler=sampler)
        assert_same(*pair, CHAIN)
    pair = both(
        mixture, LINEAR.respace(20), ClassifierFreeGuidance(1.2), positive=np.arange(20, 90)
    )
    assert_same(*pair, CHAIN)


@TOO_LITTLE_NOISE
@pytest.mark.parametrize(
    "tracker", [None, PaperTracker(), LogOddsTracker(divergence=True), PathTracker()]
)
def test_several_concepts(tracker):
    mixture = moderate(3, "diagonal", 5, 2)
    rule = (
        DynamicNegativeGuidance(1.3) if tracker is None else DynamicNegativeGuidance(1.3, tracker)
    )
    options = {"forbidden": [[0], [2, 3]], "sampler": DDIM(0.7)}
    fused, reference = both(mixture, LINEAR.respace(30), rule, **options)
    assert_same(fused, reference, CHAIN)
    assert fused.scale.shape == (30, 2, 37) and fused.exact.shape == (31, 2, 37)
    if tracker is None:
        # Exactly known, two concepts are one: p_1 (eps_1 - eps) + p_2 (eps_2 - eps) add up.
        union = sample(mixture, LINEAR.respace(30), rule, n=37, forbidden=[0, 2, 3],
                       first_sample=300, sampler=DDIM(0.7))  # fmt: skip
        assert error(union.x, fused.x) < CHAIN


# ---------------------------------------------------------------- against the textbook


@pytest.mark.parametrize("which", ["paper", "published", "log-odds"])
def test_whole_chains_are_the_textbook(which):
    """Algorithms 1 and 2 with the mixture's noise predictions and the same normals, 1000 steps."""
    mixture = GaussianMixture(
        [0.4, 0.6], [[-1.0, 0.5], [1.0, 0.0]], [0.1, 0.2], covariance_type="spherical"
    )
    forgotten = mixture.restrict([0])
    schedule, book = LINEAR, textbook.ddpm_coefficients(1000)
    n, seed = 8, 4

    def network(part):
        return lambda x, t: part.noise_prediction(x, schedule.alpha[t + 1], schedule.sigma[t + 1])

    start = noise.standard_normal(seed, n, 2, stream=noise.INITIAL_STREAM) * schedule.sigma[-1]
    normals = [noise.standard_normal(seed, n, 2, step=999 - t) for t in range(1000)]
    shared = (book, network(mixture), network(forgotten), start, normals, 1.5, 0.3)
    sampler = DDPM()
    if which == "paper":
        tracker = PaperTracker(prior=0.3, temperature=0.8, offset=1e-5)
        x, log_p = textbook.paper_chain(*shared, 0.8, 1e-5)
    elif which == "published":
        tracker = PaperTracker(prior=0.3, temperature=0.8, offset=1e-5, variance="published")
        sampler = DDPM("large")
        x, p = textbook.published_chain(*shared, 0.8, 1e-5)
        log_p = np.log(p)
    else:
        tracker = LogOddsTracker(prior=0.3, temperature=0.8, offset_nats=0.5, p_min=0.0)
        x, log_odds = textbook.log_odds_chain(*shared, 0.8, 0.5 / 1000, 0.99 / 0.01)
        # The textbook spreads its offset over all steps but the last, as the tracker does.
        log_p = tracker.log_posterior(log_odds)
    rule = DynamicNegativeGuidance(1.5, tracker)
    result = sample(mixture, schedule, rule, n=n, forbidden=[0], seed=seed, sampler=sampler)
    assert error(result.x, x) < CHAIN
    assert error(result.log_posterior[0], log_p) < CHAIN


@settings(max_examples=20)
@given(
    st.floats(-2, 4),
    st.sampled_from(["spherical", "diagonal", "full"]),
    st.integers(1, 4),
    st.sampled_from(SAMPLERS),
    st.integers(0, 2**32),
)
def test_cfg_towards_the_rest_is_dng_away(g, kind, d, sampler, seed):
    """Path by path with the same noise, for any g; for g > 0 also deep in the forbidden.

    docs/theory.md, section 4.3.
    """
    mixture = moderate(seed % 1000, kind, 4, d)
    options = {"n": 40, "forbidden": [0, 1], "sampler": sampler, "seed": seed,
               "record": ["trajectory"]}  # fmt: skip
    schedule = LINEAR.respace(50)
    away = sample(mixture, schedule, DynamicNegativeGuidance(g), **options)
    toward = sample(mixture, schedule, ClassifierFreeGuidance(g), **options)
    # A chain that is pushed into the forbidden (g < 0) doubles its errors as it goes.
    assert error(away.trajectory, toward.trajectory) < (1e-9 if g >= 0 else 1e-5)


# ---------------------------------------------------------------- bits


@settings(max_examples=25)
@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2000),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from(["log-odds", "sld", "exact"]),
)
def test_a_sample_has_the_same_bits_in_any_batch(seed, first, n, threads, rule):
    mixture = moderate(1, "spherical", 3, 3)
    options = {"forbidden": [0], "seed": seed, "initial": "exact"}
    run = (mixture, LINEAR.respace(12), RULES[rule])
    whole = sample(*run, n=700, first_sample=(first // 300) * 300, **options)
    part = sample(*run, n=n, first_sample=first, threads=threads, record=["trajectory"], **options)
    offset = first - (first // 300) * 300
    assert part.x.tobytes() == whole.x[offset : offset + n].tobytes()
    assert np.array_equal(part.trajectory[-1], part.x)


def test_matrix_products_give_the_same_bits_in_any_batch():
    rng = np.random.default_rng(1)
    mixture = GaussianMixture.from_points(rng.normal(size=(200, 10)), 0.3)
    run = (mixture, LINEAR.respace(10), DynamicNegativeGuidance(1.0, LogOddsTracker()))
    whole = sample(*run, n=600, forbidden=np.arange(30), seed=9)
    for first, n, threads in ((0, 1, 1), (255, 2, 2), (256, 300, 3), (599, 1, 1)):
        part = sample(
            *run, n=n, forbidden=np.arange(30), seed=9, first_sample=first, threads=threads
        )
        assert part.x.tobytes() == whole.x[first : first + n].tobytes()
        assert np.array_equal(part.log_posterior, whole.log_posterior[:, first : first + n])


def test_seeds_and_samples_differ():
    a = sample(FOUR_MODES, LINEAR.respace(5), n=100, seed=1).x
    b = sample(FOUR_MODES, LINEAR.respace(5), n=100, seed=2).x
    assert len(np.unique(np.concatenate([a, b]))) == 200


def test_given_start_and_empty_batch():
    start = np.linspace(-2, 2, 7)[:, None]
    result = sample(FOUR_MODES, LINEAR.respace(10), n=7, initial=start, record=["trajectory"])
    assert np.array_equal(result.trajectory[0], start)
    none = sample(FOUR_MODES, LINEAR.respace(10), RULES["paper"], n=0, forbidden=[0],
                  record=["trajectory", "tracked", "exact", "scale"])  # fmt: skip
    assert none.x.shape == (0, 1) and none.tracked.shape == (11, 1, 0)


def test_nothing_is_recorded_unless_asked_for():
    result = sample(FOUR_MODES, LINEAR.respace(10), RULES["paper"], n=3, forbidden=[0])
    assert result.trajectory is result.scale is result.tracked is result.exact is None
    assert result.log_posterior.shape == (1, 3)
    np.testing.assert_allclose(result.time, np.linspace(1, 0, 11), atol=1e-15)


# ---------------------------------------------------------------- what the theory promises

N = 20_000
# 1e-6 critical distance 0.019: a share of 0.02 in the wrong place fails almost surely.
CRITICAL = ks_critical_value(N, 1e-6)


def ks(result, scale):
    return ks_statistic(result.x[:, 0], guided_density(FOUR_MODES, [1], scale).cdf)


def test_unguided_chains_sample_the_mixture():
    for sampler in (DDPM(), DDIM(0.5), DDIM(0.0), EulerMaruyama(), ProbabilityFlow()):
        assert ks(sample(FOUR_MODES, LINEAR, n=N, sampler=sampler), 0.0) < CRITICAL


def test_exact_dng_samples_what_is_left():
    """At g = 1 the target is p(x | not c); negative prompting at any scale misses it."""
    exact = sample(FOUR_MODES, LINEAR, DynamicNegativeGuidance(1.0), n=N, forbidden=[1])
    assert ks(exact, 1.0) < CRITICAL
    assert forbidden_mass(exact.x, FOUR_MODES, [1]) < 1e-4
    for g in (0.2, 0.5, 1.0, 2.0):
        wrecked = sample(FOUR_MODES, LINEAR, NegativePrompting(g), n=N, forbidden=[1])
        assert ks(wrecked, 1.0) > 2 * CRITICAL


def test_exact_start_from_a_wide_schedule():
    """x_T of a variance-exploding schedule is the diffused mixture: its parts in proportion."""
    mixture = GaussianMixture([0.3, 0.7], [[-50.0], [50.0]], [1.0, 1.0])
    schedule = NoiseSchedule.variance_exploding(50, sigma_max=1.0)
    result = sample(mixture, schedule, n=N, initial="exact", record=["trajectory"])
    assert_proportion(int(np.sum(result.trajectory[0] < 0)), N, 0.3)
    assert_proportion(int(np.sum(result.x < 0)), N, 0.3)


def tracked_error(tracker, sampler, steps):
    """Mean |tracked - exact posterior| before the last step of an unguided chain."""
    rule = DynamicNegativeGuidance(0.0, tracker)
    result = sample(FOUR_MODES, LINEAR.respace(steps), rule, n=5000, forbidden=[1],
                    sampler=sampler, record=["tracked", "exact"])  # fmt: skip
    return float(np.mean(np.abs(np.exp(result.tracked[-2]) - np.exp(result.exact[-2]))))


@pytest.mark.parametrize("tracker", [PaperTracker, LogOddsTracker])
def test_trackers_follow_the_exact_posterior(tracker):
    """On ancestral chains; the error shrinks with the step."""
    errors = [tracked_error(tracker(), DDPM(), steps) for steps in (1000, 250, 50)]
    assert errors[0] < 0.03
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("engine", ["fused", "reference"])
@pytest.mark.parametrize("sampler", [DDIM(0.0), DDIM(0.5), ProbabilityFlow()], ids=repr)
def test_a_sampler_without_the_trackers_noise_is_warned_of(sampler, engine):
    """By the name of the cure, at the caller's line, once."""
    options = {"n": 2, "forbidden": [1], "engine": engine}
    schedule = LINEAR.respace(5)
    for tracker in (PaperTracker, LogOddsTracker):
        rule = LimitedInterval(DynamicNegativeGuidance(1.0, tracker()), 0.1, 0.9)
        with pytest.warns(UserWarning, match=rf"{tracker.__name__}.*divergence=True") as caught:
            sample(FOUR_MODES, schedule, rule, sampler=sampler, **options)
        assert [record.filename for record in caught] == [__file__]
        # Warnings are errors: nothing is said where nothing is wrong.
        rule = DynamicNegativeGuidance(1.0, tracker(divergence=True))
        sample(FOUR_MODES, schedule, rule, sampler=sampler, **options)
        rule = DynamicNegativeGuidance(1.0, tracker())
        for enough in (DDIM(1.0), DDPM("large"), EulerMaruyama()):
            sample(FOUR_MODES, schedule, rule, sampler=enough, **options)
    sample(FOUR_MODES, schedule, DynamicNegativeGuidance(1.0), sampler=sampler, **options)


@TOO_LITTLE_NOISE
@pytest.mark.parametrize("tracker", [PaperTracker, LogOddsTracker])
def test_deterministic_samplers_need_the_divergence(tracker):
    """Without it no number of steps helps; with it the tracker follows.

    docs/theory.md, section 6.9.
    """
    without = [tracked_error(tracker(), DDIM(0.0), steps) for steps in (1000, 100)]
    assert min(without) > 0.05
    corrected = tracked_error(tracker(divergence=True), DDIM(0.0), 1000)
    assert corrected < 0.3 * without[0]
    half = tracked_error(tracker(), DDIM(0.5), 1000)
    assert tracked_error(tracker(divergence=True), DDIM(0.5), 1000) < 0.5 * half


def test_divergence_changes_nothing_for_ancestral_chains():
    for tracker in (PaperTracker, LogOddsTracker):
        options = {"n": 50, "forbidden": [1], "record": ["tracked"]}
        plain, corrected = (
            sample(FOUR_MODES, LINEAR.respace(40), DynamicNegativeGuidance(1.0, t), **options)
            for t in (tracker(), tracker(divergence=True))
        )
        assert error(plain.tracked, corrected.tracked) < 1e-10


def test_tracked_dng_leaves_little_of_the_forbidden():
    """A quarter unguided; what each tracker leaves at g = 1, within 1e-6 of these bounds."""
    left = {
        name: forbidden_mass(
            sample(FOUR_MODES, LINEAR, DynamicNegativeGuidance(1.0, t), n=N, forbidden=[1]).x,
            FOUR_MODES,
            [1],
        )
        for name, t in (("paper", PaperTracker()), ("log-odds", LogOddsTracker()))
    }
    assert left["log-odds"] < left["paper"] < 0.03


# ---------------------------------------------------------------- compilation


def test_later_processes_load_machine_code():
    """The second process compiles nothing."""
    code = (
        "from dng_math import *; from dng_math import _chain_kernel as c\n"
        "m = GaussianMixture([1, 1], [[0.0], [1.0]], [1, 1])\n"
        "sample(m, NoiseSchedule.linear(5), DynamicNegativeGuidance(), n=2, forbidden=[0])\n"
        "m.score([[0.0]])\n"
        "print(sum(c.chain.stats.cache_misses.values()))"
    )
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
    assert run.stdout.strip() == "0", run.stdout


def test_machine_code_is_stamped_with_all_sources():
    """An edited equation in another file must not meet old machine code."""
    from dng_math import _chain_kernel, _jit

    assert _chain_kernel.chain._cache._cache_file._source_stamp == _jit.package_stamp()


def test_the_stamp_reads_the_packages_inside(tmp_path, monkeypatch):
    """Kernels compile a number of ``rules`` in."""
    from dng_math import _jit

    source = tmp_path / "rules" / "protocol.py"
    source.parent.mkdir()
    monkeypatch.setattr(_jit, "__file__", str(tmp_path / "_jit.py"))
    stamps = set()
    for text in ("ROUNDING_SQ = 1e-24", "ROUNDING_SQ = 1e-20"):
        source.write_text(text)
        stamps.add(_jit.package_stamp.__wrapped__())
    assert len(stamps) == 2


# ---------------------------------------------------------------- bad input

SHORT = LINEAR.respace(5)
DNG = DynamicNegativeGuidance()
BAD = [
    ({"forbidden": None}, "forbidden must name the unwanted components"),
    ({"forbidden": []}, "forbidden must not be empty"),
    ({"forbidden": [4]}, "forbidden must be from 0 to 3.*4"),
    ({"forbidden": [0, 1, 2, 3]}, "all are forbidden"),
    ({"forbidden": [[0, 1], [1, 2]]}, "must not share"),
    ({"forbidden": [[0], [1]], "rule": NegativePrompting()}, "one concept"),
    ({"positive": []}, "positive must not be empty"),
    ({"n": -1}, "n must be an integer >= 0, got -1"),
    ({"seed": -1}, "seed"),
    ({"first_sample": -1}, "first_sample"),
    ({"threads": 0}, "threads"),
    ({"initial": "zero"}, "initial must be one of"),
    ({"initial": np.zeros((2, 1))}, r"initial must have shape \(3, 1\)"),
    ({"initial": np.full((3, 1), np.nan)}, "initial must be finite"),
    ({"record": ["all"]}, "record must be a collection"),
    ({"record": ["tracked"]}, "record must not hold 'tracked' without"),
    (
        {"record": ["exact"], "forbidden": None, "rule": Unguided()},
        "record must not hold 'exact' without",
    ),
    ({"engine": "gpu"}, "engine must be one of"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_values(change, message):
    options = {"n": 3, "forbidden": [0], "rule": DNG, **change}
    with pytest.raises(ValueError, match=message):
        sample(FOUR_MODES, SHORT, options.pop("rule"), **options)


def test_components_without_weight():
    mixture = GaussianMixture([0.0, 1.0, 1.0], [[0.0], [1.0], [2.0]], [1.0] * 3)
    with pytest.raises(ValueError, match="have no weight"):
        sample(mixture, SHORT, DNG, n=1, forbidden=[0])
    with pytest.raises(ValueError, match="all are forbidden"):
        sample(mixture, SHORT, DNG, n=1, forbidden=[1, 2])
    with pytest.raises(ValueError, match="positive components .* have no weight"):
        sample(mixture, SHORT, ClassifierFreeGuidance(), n=1, positive=[0])
    with_none = sample(mixture, SHORT, DNG, n=4, forbidden=[0, 1])
    without = sample(mixture.restrict([1, 2]), SHORT, DNG, n=4, forbidden=[0])
    assert error(with_none.x, without.x) < 1e-12


def test_wrong_types():
    with pytest.raises(TypeError, match="mixture must be a GaussianMixture"):
        sample("mixture", SHORT, n=1)
    with pytest.raises(TypeError, match="schedule must be a NoiseSchedule"):
        sample(FOUR_MODES, 10, n=1)
    with pytest.raises(TypeError, match="rule must be a guidance rule"):
        sample(FOUR_MODES, SHORT, "dng", n=1)
    with pytest.raises(TypeError, match="n must be an integer"):
        sample(FOUR_MODES, SHORT, n=1.5)
    with pytest.raises(TypeError, match="sampler"):
        sample(FOUR_MODES, SHORT, n=1, sampler="ddpm")

    class Other:
        needs_positive = several_concepts = False
        init = staticmethod(lambda n, d: None)
        guide = NegativePrompting(0.5).guide

    with pytest.raises(TypeError, match="engine='reference'"):
        sample(FOUR_MODES, SHORT, Other(), n=1, forbidden=[0])
    own = sample(FOUR_MODES, SHORT, Other(), n=3, forbidden=[0], engine="reference")
    assert (
        error(own.x, sample(FOUR_MODES, SHORT, NegativePrompting(0.5), n=3, forbidden=[0]).x)
        < 1e-12
    )
