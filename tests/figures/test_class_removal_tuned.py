"""The figure that compares methods at equal safety: its search, its choice, and what it shows."""

from __future__ import annotations

import math
from dataclasses import replace

import matplotlib
import numpy as np
import pytest

from dng_math import (
    ContrastiveCFG,
    LimitedInterval,
    NegativePrompting,
    SafeLatentDiffusion,
)
from dng_models.support.style import RC
from figures import class_removal_tuned as tuned
from figures import style
from figures.digits import Forgetting
from tests.helpers.tolerances import error


class Task:
    """Images are two numbers: what the classifier sees, and the Frechet distance."""

    digit = 3

    def classifier(self, images):
        return images[:, 0].astype(np.int64)

    def frechet(self, images):
        return float(np.exp(np.log(images[:, 1]).mean()))

    def kl(self, judged):
        return float(np.mean(judged == self.digit)) + 0.5


def images(share, frechet, n=400):
    judged = np.where(np.arange(n) < round(share * n), Task.digit, 7)
    return np.stack([judged, np.full(n, frechet)], axis=1)


def runs(*points):
    """Of (scale, share, frechet)."""
    drawn = {scale: images(share, frechet) for scale, share, frechet in points}
    judged = {scale: Task().classifier(x) for scale, x in drawn.items()}
    return tuned.Runs(Task(), drawn, judged)


def test_values_at_equal_safety_are_interpolated_in_logarithms():
    """0.01 is half-way between 0.04 and 0.0025, and so is all the rest."""
    point = runs((1.0, 0.04, 2.0), (4.0, 0.0025, 8.0)).at_safety()
    assert error(point["guidance_scale"], 2.0) < 1e-12
    assert error(point["frechet"], 4.0) < 1e-12
    assert error(point["kl"], math.sqrt(0.54 * 0.5025)) < 1e-12


def test_the_weakest_scales_that_enclose_the_share_are_taken():
    found = runs((1.0, 0.05, 1.0), (2.0, 0.0, 2.0), (3.0, 0.05, 3.0), (4.0, 0.0, 4.0))
    assert found.enclosing() == (1.0, 2.0)
    assert found.share(2.0) == 0.5 / 400  # none counts as half an image
    assert runs((1.0, 0.05, 1.0), (2.0, 0.02, 2.0)).at_safety() is None
    assert runs((1.0, 0.005, 1.0), (2.0, 0.0, 2.0)).at_safety() is None


def test_a_resample_is_of_its_images_alone():
    found = runs((1.0, 0.04, 2.0), (4.0, 0.0, 8.0))
    drawn = np.arange(8, 400)  # half of the sixteen, of 392
    assert error(found.share(1.0, drawn), 8 / 392) < 1e-12
    assert found.at_safety(drawn)["guidance_scale"] < found.at_safety()["guidance_scale"]


class Chains(tuned.Chains):
    """The forbidden share is 0.02/scale."""

    def images(self, rule):
        return images(0.02 / rule.guidance_scale, rule.guidance_scale)


@pytest.mark.parametrize("start", [0.3, 2.0, 17.0])
def test_the_search_ends_where_two_scales_enclose_the_share(start):
    ran = []
    chains = Chains(Task(), 400, 1, 0)
    found = chains.search(NegativePrompting(), [start], lambda: ran.append(1))
    low, high = found.enclosing()
    assert low < 2.0 <= high and error(high / low, tuned.FACTOR) < 1e-9
    assert abs(math.log(found.at_safety()["guidance_scale"] / 2.0)) < math.log(tuned.FACTOR)
    # No further than needed.
    assert len(ran) == len(found.images) <= 2 + abs(math.log(start / 2.0)) / math.log(tuned.FACTOR)


def test_the_search_gives_up_at_the_limits(monkeypatch):
    monkeypatch.setattr(Chains, "images", lambda self, rule: images(0.5, 1.0))
    found = Chains(Task(), 400, 1, 0).search(NegativePrompting(), [1.0], lambda: None)
    assert found.at_safety() is None
    assert tuned.SCALES[1] <= max(found.images) < tuned.SCALES[1] * tuned.FACTOR
    assert min(found.images) == 1.0


def test_every_distance_has_the_candidate_that_is_best_in_it(monkeypatch):
    """Of three candidates one is never safe, one has the better distance, one the better KL."""

    def chain(self, rule):
        if rule.temperature == 3.0:
            return images(0.5, 0.1)
        drawn = images(0.04 / rule.guidance_scale, 2.0 + rule.temperature)
        return drawn

    kl = {1.0: 0.4, 2.0: 0.2}
    monkeypatch.setattr(tuned.Chains, "images", chain)
    monkeypatch.setattr(
        tuned.Runs,
        "at_safety",
        lambda self, drawn=slice(None): (
            None
            if self.enclosing() is None
            else {
                "guidance_scale": 4.0,
                "frechet": (f := self.task.frechet(self.images[max(self.images)])),
                "kl": kl[round(f) - 2.0],
            }
        ),
    )
    rules = tuple(ContrastiveCFG(temperature=tau) for tau in (1.0, 2.0, 3.0))
    family = tuned.Family(style.CCFG, rules)
    monkeypatch.setitem(tuned.FAMILIES, "test", family)
    monkeypatch.setitem(tuned.FAMILIES, "never", replace(family, candidates=rules[2:]))
    task = Task()
    task.seed = 0
    chosen = tuned.best(task, 400, 1, "test")
    assert chosen["frechet"].rule == rules[0] and chosen["kl"].rule == rules[1]
    assert chosen["kl"].guidance_scale == 4.0
    assert tuned.best(task, 400, 1, "never") == {}


def test_scales_and_names_of_rules():
    inside = LimitedInterval(SafeLatentDiffusion(threshold=0.3, gate="absolute"), 0.2, 0.6)
    assert tuned.scaled(inside, 7.0).rule == replace(inside.rule, guidance_scale=7.0)
    assert tuned.scaled(inside, 7.0).t_hi == 0.6
    assert tuned.settings(inside) == "absolute gate 0.3, slope 100, t/T in [0.2, 0.6]"
    assert tuned.settings(ContrastiveCFG(temperature=0.3)) == "tau 0.3"
    assert tuned.settings(NegativePrompting()) == ""


def test_the_candidates_are_both_gates_slopes_temperatures_and_intervals():
    gates = tuned.FAMILIES["sld"].candidates
    assert {rule.gate for rule in gates} == {"signed", "absolute"}
    assert len({rule.slope for rule in gates}) > 1
    assert len({rule.temperature for rule in tuned.FAMILIES["ccfg"].candidates}) > 3
    assert all(t_hi > t_lo for t_lo, t_hi in tuned.INTERVALS)
    for name in ("np", "sld", "ccfg"):
        assert any(family.inside == name for family in tuned.FAMILIES.values())
    assert tuned.FAMILIES["sld-published"].candidates == (SafeLatentDiffusion(),)


# ---------------------------------------------------------------------- the figure


def point(value, resampled):
    return tuned.Point(NegativePrompting(), 0.5, value, np.log(resampled))


@pytest.fixture
def data():
    """Families 1, 2, 3 ... times as far as perfect samples, the last nearest; one not reached."""
    rng = np.random.default_rng(0)
    common = np.exp(0.1 * rng.standard_normal(100))
    values = {name: float(10 - i) for i, name in enumerate(tuned.FAMILIES)}
    points = {
        name: point(value, value * common * np.exp(0.02 * rng.standard_normal(100)))
        for name, value in values.items()
    }
    without = {name: p for name, p in points.items() if name != "sld"}
    distances = {"frechet": points, "kl": without}
    each = {"frechet": 0.9, "kl": 0.8, "share": 0.1}
    numbers = (0, 1, 8)
    return tuned.Data(
        tuned.FULL,
        dict.fromkeys(numbers, distances),
        dict.fromkeys(numbers, each),
        dict.fromkeys(numbers, each),
        dict.fromkeys(numbers, 0.01),
    )


def test_the_lead_is_over_the_best_baseline_and_what_is_common_cancels(data):
    assert data.best_baseline(0, "frechet") == tuned.BASELINES[-1]
    ratio, low, high = data.lead(0, "frechet", "dng-exact", "ccfg-interval")
    assert ratio == 4.0
    # 1.96 times sqrt(2) 0.02, at a relative error of sqrt(1/200), five of them.
    assert error(math.log(high / ratio), 1.96 * math.sqrt(2) * 0.02) < 5 / math.sqrt(200)
    assert error(ratio / low, high / ratio) < 1e-9
    low, high = data.points[0]["frechet"]["np"].interval
    assert math.log(high / low) > 0.3  # alone it is not


def test_samples_in_which_no_scales_enclose_the_share_are_left_out(data):
    resampled = np.ones(100)
    resampled[::2] = np.nan
    resampled[1::4] = 1.2
    assert np.isfinite(tuned.Point(NegativePrompting(), 0.5, 1.0, np.log(resampled)).interval).all()


def test_the_figure_is_legible(data):
    (figure,) = tuned.draw(data).values()
    with matplotlib.rc_context(RC):
        figure.draw_without_rendering()
    assert len(figure.axes) == 6
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts == ["does not reach 1%"] * 3
    for axes in figure.axes:
        assert "DNG 1.3 [1." in axes._left_title.get_text()  # its paper's tracker: 4 over 3
        for artist in (axes._left_title, axes.xaxis.label, *axes.texts):
            box = artist.get_window_extent()
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 + 1
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [family.look.label for family in tuned.FAMILIES.values()]


def test_the_summary_has_every_number(data):
    text = tuned.summary(data)
    assert text.count("forgotten: unguided 10.0% forbidden") == 3
    assert text.count("KL: 1% not reached") == 3
    assert text.count("is nearer than the best baseline: ") == 9
    assert text.count("DNG, paper's tracker is nearer than negative prompting: ") == 3
    assert "3.00 [" not in text.split("DNG, exact posterior is nearer")[0].split("\n")[-1]
    assert "negative prompting in its best interval" in text


@pytest.mark.slow
def test_exact_dng_is_nearer_than_negative_prompting_at_equal_safety(monkeypatch):
    """Over seeds the distances differ by a factor of 20 to 30, the bar is 5."""
    families = {name: tuned.FAMILIES[name] for name in ("np", "dng-paper", "dng-exact")}
    monkeypatch.setattr(tuned, "FAMILIES", families)
    form = tuned.Form(digits=(0,), tuning=(128, 20), measuring=(256, 25), resamples=10)
    monkeypatch.setattr(tuned, "QUICK", form)
    found = tuned.compute(quick=True, seed=0)
    ratio, low, high = found.lead(0, "frechet", "dng-exact", "np")
    assert 5.0 < low < ratio < high
    assert found.perfect[0]["frechet"] < 1.2 * found.points[0]["frechet"]["dng-exact"].value
    # Tuned on other images than those that are measured.
    chosen = tuned.best(Forgetting(0, 0), *form.tuning, "np")["kl"]
    assert chosen.guidance_scale != found.points[0]["kl"]["np"].guidance_scale
