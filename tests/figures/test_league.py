"""The league: its measures are what they say, its printed numbers its data, and who wins."""

from __future__ import annotations

import functools
import re

import matplotlib.image
import numpy as np
import pytest
from scipy import stats

from dng_math import DDIM, AskedNegative, GaussianMixture, GeoGuide, NoiseSchedule, sample
from dng_math.distances import binomial_interval
from dng_math.rules import ASKED_AT
from dng_models.league import experiments, measures
from dng_models.league.entries import LEAGUE
from dng_models.league.experiments import EASY, LEAK, experiment
from dng_models.league.looking import gate
from dng_models.league.measures import SAMPLERS, Case
from figures import league, style
from figures.__main__ import FIGURES
from figures.league import LOOKS, SHOWN_STEPS
from tests.figures.test_figures import assert_logarithmic_axes_are_readable
from tests.helpers.statistical import FALSE_ALARM

NAMED = {entry.name: k for k, entry in enumerate(LEAGUE)}
BLIND = ("NP", "SLD, medium", "CCFG", "GeoGuide", "CRG")  # without a posterior or the examples
CERTAIN = 1 - FALSE_ALARM


@functools.cache
def data() -> league.Data:
    return league.compute(quick=True, seed=0)


def case(experiment: str, sampler: str) -> Case:
    return Case(experiment, sampler, SHOWN_STEPS)


def at(name: str, strength: float) -> tuple[int, int]:
    """Indices of a rule and of its strength."""
    return NAMED[name], LEAGUE[NAMED[name]].strengths.index(strength)


# ---------------------------------------------------------------------- what is measured


def test_what_an_experiment_forbids():
    assert FIGURES["league"] is league
    for name in EASY:
        of, weights = experiment(name), experiment(name).mixture.weights
        assert sorted(of.forbidden + of.allowed) == list(range(len(weights)))
        assert int(name[: name.index("D")]) == of.mixture.dim
        shares = [weights[of.classes == c].sum() for c in set(of.classes)]
        np.testing.assert_allclose(shares, 1 / len(shares), rtol=1e-12)
        assert of.gap > 0
    board = experiment("2D, checkerboard")
    assert len(board.forbidden) == 9 and (np.abs(board.references) <= 1 + 1e-12).all()


@pytest.mark.parametrize("name", EASY)
def test_the_data_are_not_called_outside_of_themselves(name):
    """No more than FAR of them, a binomial bound at 1e-6; a point twice as far away is outside."""
    of, n = experiment(name), 20_000
    outside = int(of.outside(of.mixture.sample(n, 0)).sum())
    assert outside <= stats.binom.isf(FALSE_ALARM, n, experiments.FAR)
    assert of.outside(100 * np.ones((1, of.mixture.dim))).all()
    np.testing.assert_allclose(of.posterior(of.mixture.means).sum(axis=1), 1.0)


def test_the_jackknife_is_the_error_of_a_mean_where_the_distance_is_one():
    """Far away W1 is a difference of means; ten groups make a chi-squared of nine degrees: 1e-6."""
    judge = measures.Judge(experiment("1D, inner mode"), 100, 0)
    x = 100 + np.random.default_rng(0).standard_normal((5000, 1))
    ratio = (measures.GROUPS - 1) * (judge.error(x) / np.sqrt(1 / len(x))) ** 2
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], measures.GROUPS - 1)
    assert low < ratio < high


def test_the_best_strength_is_the_nearest_of_the_safe_ones():
    leak, distance = np.array([0.2, 0.01, 0.0, 0.0]), np.array([0.1, 0.5, 0.3, 0.4])
    assert measures.nearest(leak, distance, LEAK) == 2
    assert measures.nearest(leak + 0.1, distance, LEAK) is None


# ---------------------------------------------------------------------- the oracle that looks


def test_the_oracles_cost_is_what_its_samples_took():
    """Where nothing is held no negative is evaluated: counted by the judge's own answers."""
    entry, of = LEAGUE[NAMED["VL-DNP, 50 questions"]], experiment("1D, outer mode")
    where, n, g = case("1D, outer mode", "ancestral"), 40, 4.0
    found = measures.Stage(where, n, 3).curve(entry, (g,), every_error=False, limit=1.0)
    seen: list[int] = []

    def ask(x0: np.ndarray, step: int) -> np.ndarray:
        shown = of.posterior(x0)[:, of.unwanted] > 0.5
        seen.append(int(shown.sum()))
        return shown

    rule = AskedNegative(ask, g, at=range(SHOWN_STEPS), of=None)
    schedule = NoiseSchedule.linear(1000).respace(SHOWN_STEPS)
    x = sample(
        of.mixture, schedule, rule, n=n, forbidden=of.forbidden, sampler=DDIM(1.0), seed=3,
        engine="reference",
    ).x  # fmt: skip
    assert len(seen) == SHOWN_STEPS and 0 < sum(seen) < 0.5 * n * SHOWN_STEPS
    cost = measures.evaluations(entry, found, 0)
    assert cost == pytest.approx(1 + sum(seen) / (n * SHOWN_STEPS), rel=1e-12)
    assert found.leaked[0] == of.leaks(of.posterior(x)).sum()
    assert measures.evaluations(LEAGUE[NAMED["NP"]], found, 0) == 2


def test_when_the_oracle_sees_is_what_its_judge_says_of_unguided_chains():
    """An outer mode of four: never at the start, always at the end; DNG knows its share at once."""
    where, n = case("1D, outer mode", "ancestral"), 300
    found = gate(where, n, 0)
    assert found.steps == (0, *ASKED_AT, SHOWN_STEPS - 1)
    assert (found.found[0], found.found[-1], found.agrees[-1]) == (0.0, 1.0, 1.0)
    assert found.seen[0] == 0.0 and found.error[0] == pytest.approx(0.25, abs=0.02)
    assert found.error[-1] < 0.01 < found.tracked[-1] and found.tracked[0] < 0.01
    of, step = experiment("1D, outer mode"), 27
    schedule = NoiseSchedule.linear(1000).respace(SHOWN_STEPS)
    x = sample(of.mixture, schedule, n=n, sampler=DDIM(1.0), record=["trajectory"]).trajectory[step]
    level = float(schedule.alpha[-1 - step]), float(schedule.sigma[-1 - step])
    exact = of.mixture.diffuse(*level).posterior(x, of.forbidden)
    seen = of.mixture.posterior(of.mixture.posterior_mean(x, *level), of.forbidden) > 0.5
    at = found.steps.index(step)
    assert found.agrees[at] == (seen == (exact > 0.5)).mean() and found.seen[at] == seen.mean()
    np.testing.assert_allclose(found.posterior[at], exact.mean(), rtol=1e-9)


# ---------------------------------------------------------------------- what is printed and drawn


@pytest.mark.slow
def test_it_is_drawn_at_print_quality_and_can_be_read(tmp_path):
    (figure,) = league.draw(data()).values()
    style.save(figure, tmp_path / "league.png")
    image = matplotlib.image.imread(tmp_path / "league.png")
    assert image.shape[1] == round(style.WIDTH * style.DPI)
    assert_logarithmic_axes_are_readable(figure)
    assert len([axes for axes in figure.axes if axes.lines]) == len(EASY) * len(SAMPLERS)
    assert len({look.color for look in LOOKS.values()}) == len(LEAGUE)
    assert len({look.marker for look in LOOKS.values()}) == len(LEAGUE)


CELL = (
    r"(\S+) ([\d.]+): leak ([\d.]+) \[([\d.]+), ([\d.]+)\], distance ([\d.]+) \+- [\d.]+, "
    r"collateral ([\d.]+), outside ([\d.]+), KL ([\d.]+)"
)


@pytest.mark.slow
def test_the_summary_prints_the_data():
    """Every number of every case, to the digits that are shown."""
    text = league.summary(data())
    assert "nan" not in text and "inf" not in text
    cells = 0
    for where, result in data().cases.items():
        head = f"{where.experiment}, {where.sampler}, {where.steps} steps: "
        block = text.split(head)[1].split("\n")[1 : 1 + len(LEAGUE)]
        for line, entry, curve in zip(block, LEAGUE, result.curves, strict=True):
            assert line.startswith(f"  {entry.name}: ")
            for knob, strength, leak, low, high, distance, hurt, left, kl in re.findall(CELL, line):
                i = entry.strengths.index(float(strength))
                interval = binomial_interval(int(curve.leaked[i]), data().n)
                shown = [float(v) for v in (leak, low, high, distance, hurt, left, kl)]
                held = [
                    curve.leaked[i] / data().n,
                    *interval,
                    curve.distance[i],
                    curve.hurt[i] / result.kept,
                    curve.left[i] / data().n,
                    curve.kl[i],
                ]
                np.testing.assert_allclose(shown, held, rtol=0, atol=0.00051)
                assert knob == entry.knob
                cells += 1
            safe = (curve.leaked / data().n <= LEAK).any()
            assert ("leaks more" in line) == (not safe)
    assert cells > 0.8 * len(data().cases) * len(LEAGUE)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers():
    again = league._result(case("1D, inner mode", "ancestral"), data().n, 0)
    held = data().cases[case("1D, inner mode", "ancestral")]
    for one, other in zip(again.curves, held.curves, strict=True):
        np.testing.assert_array_equal(one.leaked, other.leaked)
        np.testing.assert_array_equal(one.hurt, other.hurt)


# ---------------------------------------------------------------------- who wins


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", EASY)
def test_exact_dng_at_one_is_nearer_than_all_that_read_no_posterior(name, sampler):
    """At 1 % or less; Student's t with the jackknife's nine degrees, at 1e-6 for each pair."""
    result = data().cases[case(name, sampler)]
    k, i = at("DNG, exact", 1.0)
    dng = result.curves[k]
    assert dng.leaked[i] <= LEAK * data().n
    for other in BLIND:
        curve, best = (
            result.curves[NAMED[other]],
            league.best(data(), case(name, sampler), NAMED[other]),
        )
        if best is None:
            continue
        spread = np.hypot(dng.error[i], curve.error[best])
        apart = stats.t.isf(FALSE_ALARM, measures.GROUPS - 1) * spread
        if name == "64D, six":  # the classes are far apart: no worse is all that a thousand show
            assert dng.distance[i] < curve.distance[best] + apart
        else:
            assert dng.distance[i] + apart < curve.distance[best], other


@pytest.mark.slow
def test_without_noise_the_trackers_of_transitions_leak_and_the_path_tracker_does_not():
    """Clopper-Pearson at 1e-6 for each share."""
    result = data().cases[case("1D, inner mode", "deterministic")]
    for name in ("DNG, paper's", "DNG, log-odds"):
        k, i = at(name, 1.0)
        assert binomial_interval(int(result.curves[k].leaked[i]), data().n, CERTAIN)[0] > 0.05
    k, i = at("DNG, path", 1.0)
    assert binomial_interval(int(result.curves[k].leaked[i]), data().n, CERTAIN)[1] < 0.05


@pytest.mark.slow
def test_negative_prompting_as_published_leaves_the_data_and_exact_dng_does_not():
    """Clopper-Pearson at 1e-6 for each share."""
    for sampler in SAMPLERS:
        result = data().cases[case("1D, inner mode", sampler)]
        k, i = at("NP", 1.0)
        assert binomial_interval(int(result.curves[k].left[i]), data().n, CERTAIN)[0] > 0.5
        k, i = at("DNG, exact", 1.0)
        assert binomial_interval(int(result.curves[k].left[i]), data().n, CERTAIN)[1] < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_geoguide_touches_more_of_the_allowed_than_exact_dng_where_both_are_safe(sampler):
    """Counts of samples with the same random numbers; Clopper-Pearson at 1e-6 for each."""
    for name in ("1D, inner mode", "2D, ring of 8", "2D, checkerboard"):
        result = data().cases[case(name, sampler)]
        k, i = at("DNG, exact", 1.0)
        best = league.best(data(), case(name, sampler), NAMED["GeoGuide"])
        assert best is not None
        hurt = result.curves[k].hurt[i], result.curves[NAMED["GeoGuide"]].hurt[best]
        dng, geoguide = (binomial_interval(int(h), result.kept, CERTAIN) for h in hurt)
        assert dng[1] < geoguide[0]


def test_geoguide_pushes_where_nothing_is_forbidden():
    """The forbidden has a billionth: what changes is collateral; Clopper-Pearson at 1e-6."""
    mixture = GaussianMixture(
        [1e-9, *[(1 - 1e-9) / 3] * 3], [[-1.0], [-3.0], [1.0], [3.0]], [0.04] * 4
    )
    few = experiments.separate(mixture, 0)
    n, ends = 1000, []
    for rule in (None, GeoGuide(2.0), LEAGUE[NAMED["DNG, exact"]].make(few, 1.0)):
        forbidden = None if rule is None else [0]
        schedule = NoiseSchedule.linear(1000).respace(50)
        ends.append(sample(mixture, schedule, rule, n=n, forbidden=forbidden).x)
    unguided, pushed, dng = (few.posterior(x).argmax(axis=1) for x in ends)
    hurt = (pushed != unguided) | few.outside(ends[1])
    assert binomial_interval(int(hurt.sum()), n, CERTAIN)[0] > 0.05
    np.testing.assert_array_equal(dng, unguided)
    np.testing.assert_allclose(ends[2], ends[0], rtol=0, atol=1e-3)
