"""The league where it is hard: its experiments, what is printed and drawn, and who fails."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from scipy import special, stats

from dng_math.distances import binomial_interval
from dng_models.league.entries import LEAGUE, MORE, Entry
from dng_models.league.experiments import HARD, LEAK, REFERENCE, experiment
from dng_models.league.measures import SAMPLERS, Case, Curve, Stage, runs
from dng_models.support.style import RC
from figures import digits, league_hard, style
from figures.__main__ import FIGURES
from figures.guidance_1d import MIXTURE
from figures.league import SHOWN_STEPS, Data, Result
from figures.league_hard import ENTRIES
from figures.path_tracker import CASES
from tests.helpers.statistical import FALSE_ALARM

NAMED = {entry.name: entry for entry in ENTRIES}
CERTAIN = 1 - FALSE_ALARM
PICTURES = [name for name in HARD if "digit" in name]
N = 1000


@functools.cache
def stage(name: str, sampler: str = "ancestral", n: int = N) -> Stage:
    return Stage(Case(name, sampler, SHOWN_STEPS), n, 0)


@functools.cache
def curve(name: str, entry: str, strength: float, sampler: str = "ancestral", n: int = N) -> Curve:
    """A rule at one strength."""
    of = stage(name, sampler, n)
    return of.curve(NAMED[entry], (strength,), every_error=False, limit=1.0)


def leak_interval(found: Curve, n: int = N) -> tuple[float, float]:
    return binomial_interval(int(found.leaked[0]), n, CERTAIN)


# ---------------------------------------------------------------------- the experiments


def test_the_mixtures_are_those_of_other_figures():
    ours = experiment("1D, inner mode").mixture
    np.testing.assert_allclose(ours.means, MIXTURE.means)
    np.testing.assert_allclose(ours.covariances, MIXTURE.covariances)
    np.testing.assert_allclose(ours.weights, MIXTURE.weights)
    six, unwanted = CASES["64D"]
    np.testing.assert_array_equal(experiment("64D, six").mixture.means, six.means)
    assert experiment("64D, six").forbidden == [unwanted]
    np.testing.assert_array_equal(experiment("64D, digit 0").mixture.means, digits.load()[0])
    task = digits.Forgetting(0, 0)
    for found, wanted in zip(experiment("64D, digit 0").moments, task.moments, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-3)  # the digits' own shares, not a ninth


def test_what_is_forbidden_has_the_share_that_its_name_says():
    for name, share in (("1 %", 0.01), ("50 %", 0.5), ("90 %", 0.9)):
        assert experiment(f"1D, {name} forbidden").share == pytest.approx(share)
    digit = digits.load()[1]
    for name, unwanted in zip(PICTURES, ([0], [0, 1, 8]), strict=True):
        np.testing.assert_array_equal(
            experiment(name).forbidden, np.flatnonzero(np.isin(digit, unwanted))
        )
        assert set(experiment(name).classes) == set(range(11 - len(unwanted)))


def test_the_limit_is_beyond_what_the_target_leaks_itself():
    """Overlapping, 1D: the exact share beyond the point where p(c|x) = 1/2, at 1e-6."""
    near = experiment("2D, overlap")
    assert np.linalg.norm(near.mixture.means[0] - near.mixture.means[1]) == pytest.approx(0.8)
    # Two equal isotropic components: beyond the middle, a deviation away, for one class of seven.
    leak = special.ndtr(-1) / 7
    low, high = stats.binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], REFERENCE, leak)
    assert low <= (near.limit - LEAK) * REFERENCE <= high
    rare = experiment("1D, 1 % forbidden")
    assert 0.001 <= rare.limit < 0.002


def test_the_posterior_is_that_of_the_mixture():
    for name in ("1D, 90 % forbidden", "2D, overlap"):
        of = experiment(name)
        x = of.mixture.sample(200, 0)
        exact = of.mixture.log_posterior(x, of.forbidden)
        np.testing.assert_allclose(np.log(of.posterior(x)[:, of.unwanted]), exact, atol=1e-9)


def test_the_divergence_of_the_targets_own_samples_is_that_of_chance():
    """2 n KL is about chi-squared with classes - 1 degrees; the reference adds n / REFERENCE."""
    for name in ("1D, 50 % forbidden", "2D, overlap"):
        degrees = len(experiment(name).shares) - 2
        scaled = 2 * N * stage(name).ideal.kl[0] / (1 + N / REFERENCE)
        assert scaled < 1.2 * stats.chi2.isf(FALSE_ALARM, degrees)


# ---------------------------------------------------------------------- the rules


def test_the_figures_rules_are_the_leagues_and_four_more():
    assert ENTRIES == (*LEAGUE, *MORE) and FIGURES["league_hard"] is league_hard
    assert [entry.name for entry in MORE] == ["DNG, weighted", "NAG", "NASA", "VSF"]
    for entry in ENTRIES:
        assert list(entry.strengths) == sorted(entry.strengths)
        assert entry.published is None or entry.published in entry.few
        assert set(entry.few) < set(entry.strengths) or entry.weights is not None


def test_the_state_is_what_a_rule_keeps():
    of = experiment("2D, overlap")
    for name in ("NP", "SLD, medium", "CRG"):
        entry = NAMED[name]
        memory = entry.make(of, 1.0).init(5, 2)
        assert entry.state(2) == (0 if memory is None else memory.size // 5)


def test_weights_need_noise_and_rules_of_attention_few_components():
    weighted, attention = NAMED["DNG, weighted"], NAMED["NAG"]
    for sampler in SAMPLERS:
        case = Case("1D, 50 % forbidden", sampler, SHOWN_STEPS)
        assert runs(weighted, case) == (sampler == "ancestral") and runs(attention, case)
    pictures = Case("64D, digit 0", "ancestral", SHOWN_STEPS)
    assert runs(weighted, pictures) and not runs(attention, pictures)


def test_what_overflows_is_far_away_and_no_error():
    """Subtracted a thousand times over, the samples leave every number behind."""
    found = curve("1D, 50 % forbidden", "NASA", 1000.0, n=50)
    assert found.left[0] == 50 and np.isfinite(found.distance).all() and found.distance[0] > 1e6


@pytest.mark.slow
def test_a_case_has_every_rule_that_runs_at_every_strength():
    case = Case("2D, overlap", "deterministic", SHOWN_STEPS)
    result = league_hard.result_of(case, 20, 0)
    assert (result.n, result.limit) == (20, experiment(case.experiment).limit)
    for entry, found in zip(ENTRIES, result.curves, strict=True):
        assert found.strengths == (entry.strengths if runs(entry, case) else ())
        assert len(found.leaked) == len(found.distance) == len(found.error) == len(found.strengths)


# ---------------------------------------------------------------------- who fails, and who does not


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_exact_dng_keeps_out_nine_tenths(sampler):
    """Clopper-Pearson at 1e-6; unguided, more than four fifths are forbidden."""
    name = "1D, 90 % forbidden"
    assert leak_interval(stage(name, sampler).unguided)[0] > 0.8
    assert leak_interval(curve(name, "DNG, exact", 1.0, sampler))[1] < 0.06


def test_the_papers_tracker_leaks_most_of_the_frequent_at_fifty_steps():
    """Clopper-Pearson at 1e-6 for each share: a failure of DNG's own."""
    name = "1D, 90 % forbidden"
    paper = leak_interval(curve(name, "DNG, paper's", 1.0))
    assert paper[0] > leak_interval(curve(name, "DNG, exact", 1.0))[1]
    assert paper[0] > 0.15


def test_weights_bring_back_the_balance_that_a_larger_scale_loses():
    """The class shares of g = 2, and of p (1 - p_c)^2 by weights: a fifth of the divergence."""
    name = "1D, 90 % forbidden"
    plain, weighted = (curve(name, entry, 2.0) for entry in ("DNG, exact", "DNG, weighted"))
    assert weighted.kl[0] < 0.2 * plain.kl[0]
    assert weighted.hurt is None and plain.hurt is not None


def test_negative_prompting_moves_the_allowed_where_the_forbidden_is_rare():
    """Of a hundredth that is forbidden, DNG hurts nearly none, NP at 1 nearly all."""
    name = "1D, 1 % forbidden"
    kept = stage(name).kept
    pushed, dng = (curve(name, entry, 1.0).hurt for entry in ("NP", "DNG, exact"))
    assert pushed is not None and dng is not None
    assert binomial_interval(int(pushed[0]), kept, CERTAIN)[0] > 0.5
    assert binomial_interval(int(dng[0]), kept, CERTAIN)[1] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_exact_dng_forgets_exact_digits(name):
    """Of 100 images; unguided ones are forbidden, and the share that remains is within chance."""
    unguided, guided = stage(name, n=100).unguided, curve(name, "DNG, exact", 1.0, n=100)
    assert unguided.leaked[0] > 0 and guided.frechet is not None and unguided.frechet is not None
    assert leak_interval(guided, 100)[0] <= experiment(name).limit
    assert guided.frechet[0] < unguided.frechet[0]


# ---------------------------------------------------------------------- printed and drawn


def made_up(case: Case, entries: tuple[Entry, ...]) -> Result:
    """Numbers of no rule, to see what is done with them; weights have no collateral."""
    rng = np.random.default_rng(len(case.experiment))
    of, n = experiment(case.experiment), N

    def numbers(strengths: tuple[float, ...], weighted: bool, measured: bool = False) -> Curve:
        size = len(strengths)
        return Curve(
            strengths,
            rng.integers(0, 60, size),
            rng.integers(0, n, size),
            None if weighted else rng.integers(0, 500, size),
            rng.uniform(0.05, 40, size),
            rng.uniform(0, 2, size),
            rng.uniform(0, 9, size) if of.pixels else None,
            dict.fromkeys(range(size), 0.01),
            rng.uniform(1, 2, size) if measured else None,
        )

    curves = [
        numbers(
            e.strengths if runs(e, case) else (),
            e.weights is not None,
            measured=e.evaluations is None,
        )
        for e in entries
    ]
    bounds = (numbers((0.0,), True) for _ in range(2))
    return Result(tuple(curves), 500, *bounds, n, 0.02)


@functools.cache
def data() -> Data:
    cases = [Case(name, sampler, SHOWN_STEPS) for name in HARD for sampler in SAMPLERS]
    return Data({case: made_up(case, ENTRIES) for case in cases}, N)


def test_the_summary_prints_every_rule_of_every_case():
    text = league_hard.summary(data())
    assert "nan" not in text and "inf" not in text
    lines = text.splitlines()
    for case, result in data().cases.items():
        start = next(
            i
            for i, line in enumerate(lines)
            if line.startswith(f"{case.experiment}, {case.sampler}")
        )
        present = [e for e, c in zip(ENTRIES, result.curves, strict=True) if c.strengths]
        for line, entry in zip(lines[start + 1 :], present, strict=False):
            assert line.startswith(f"  {entry.name}: ")
            assert ("collateral" in line) == (entry.weights is None and "leak " in line)
            assert ("Frechet" in line) == (experiment(case.experiment).pixels and "leak " in line)


def test_every_strength_is_printed():
    text = league_hard.summary(data())
    for case, result in data().cases.items():
        for entry, curve in zip(ENTRIES, result.curves, strict=True):
            head = f"{case.experiment}, {case.sampler}, {entry.name}, {entry.knob}: "
            assert (head in text) == bool(curve.strengths)
            for strength, leaked in zip(curve.strengths, curve.leaked, strict=True):
                assert f"{strength:g}: {leaked / N:.3f}, " in text.partition(head)[2].split("\n")[0]


def test_the_table_has_both_samplers_and_says_what_was_not_run():
    rows = {line.split(" | ")[0]: line for line in league_hard.table(data())}
    assert len(rows) == len(ENTRIES) + 2
    case = Case("2D, overlap", "ancestral", SHOWN_STEPS)
    shown = rows["| DNG, exact posterior"].split(" | ")[1 + list(HARD).index("2D, overlap")]
    for told, sampler in zip(shown.split(", "), SAMPLERS, strict=True):
        result = data().cases[replace(case, sampler=sampler)]
        i = result.curves[0].best(result.n, result.limit)
        expected = (
            "–" if i is None else f"{result.curves[0].distance[i] / result.ideal.distance[0]:.1f}"
        )
        assert told == expected
    weighted = rows["| DNG, exact and weighted"].strip("| ").split(" | ")[1:]
    assert all("," not in cell for cell in weighted)  # one sampler
    assert rows["| NAG"].count("not run") == 2 and "not run" not in rows["| CRG"]


def test_a_rule_stands_at_its_best_strength_in_print():
    case = Case("2D, overlap", "ancestral", SHOWN_STEPS)
    result = data().cases[case]
    i = result.curves[0].best(result.n, result.limit)
    line = league_hard.summary(data()).split("2D, overlap, ancestral")[1].splitlines()[1]
    if i is None:
        assert "leaks more at every g" in line
    else:
        assert f"g {ENTRIES[0].strengths[i]:g}: leak {result.curves[0].leaked[i] / N:.4f}" in line
        assert f"KL {result.curves[0].kl[i]:.4f}" in line


def test_it_is_drawn_at_print_quality_with_every_rule_named(tmp_path, monkeypatch):
    (figure,) = league_hard.draw(data()).values()
    monkeypatch.setattr(style, "DPI", 60)  # fewer pixels are sooner written
    style.save(figure, tmp_path / "league_hard.png")
    image = matplotlib.image.imread(tmp_path / "league_hard.png")
    assert image.shape[1] == round(style.WIDTH * 60)
    with matplotlib.rc_context(RC):
        figure.draw_without_rendering()
    labels = [text for text in figure.axes[0].get_yticklabels() if text.get_text()]
    assert len({text.get_text() for text in labels}) == len(ENTRIES)
    boxes = [text.get_window_extent() for text in labels]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(box.x0 >= -1 for box in boxes)
