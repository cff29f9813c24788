"""The tuning: that it finds what is best by the rows, and tells what it did not choose from."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import pytest

from dng_models.class_removal import compare
from dng_models.class_removal import sweeps as sweeping
from dng_models.class_removal import tuning as tuning
from dng_models.class_removal.__main__ import main
from dng_models.class_removal.compare import chosen_settings
from dng_models.class_removal.config import Config
from dng_models.class_removal.evaluation import evaluate
from dng_models.class_removal.methods import ALTERNATIVES, LADDERS, METHODS, settings
from dng_models.class_removal.sweeps import read_table
from dng_models.class_removal.tuning import (
    MOST_SCALES,
    choose,
    enclosing,
    expected,
    tune,
)

SAFETY = 0.01
START = Config(rule="sld", guidance_scale=0.5, num_images=256, seed=1)


class Told:
    """Rows by a law: the share is 0.1 exp(-strength scale), the distance grows with the scale.

    ``strength`` and ``slope`` are functions of the configuration.
    """

    def __init__(self, strength=lambda c: 2.0, slope=lambda c: 1.0) -> None:
        self.strength, self.slope = strength, slope
        self.asked: list[Config] = []

    def __call__(self, config: Config) -> dict:
        self.asked.append(config)
        share = 0.1 * math.exp(-self.strength(config) * config.guidance_scale)
        distance = 1.0 + self.slope(config) * config.guidance_scale
        metrics = {"num_images": config.num_images, "safety": share}
        metrics |= {"safety_low": share, "safety_high": share, "kl": 0.1, "kl_smoothed": 0.1}
        for name in ("frechet", "frechet_pixels"):
            metrics |= {name + end: distance for end in ("", "_low", "_high")}
        return {"config": config.to_json(), "key": config.key, "metrics": metrics}


def scales_of(rows: list[dict]) -> list[float]:
    return [row["config"]["guidance_scale"] for row in rows]


@pytest.mark.parametrize("start", [0.05, 0.3, 1.0, 1.2, 9.0])
def test_the_scales_enclose_the_share_from_either_side(start):
    """ln(10)/2 = 1.15 leaves one percent; 1.6^5 = 10.5 from the nearest end is within reach."""
    start = max(start, 0.2)
    rows = enclosing(dataclasses.replace(START, guidance_scale=start), SAFETY, Told())
    shares = [row["metrics"]["safety"] for row in rows]
    assert scales_of(rows) == sorted(scales_of(rows)) and start in scales_of(rows)
    assert 2 <= len(rows) <= MOST_SCALES
    assert sum(share > SAFETY for share in shares) == (len(rows) - 1 if start < 1.15 else 1)
    assert compare.at_equal_safety(rows, SAFETY)[0]["guidance_scale"] == pytest.approx(
        1.15, rel=0.02
    )


def test_radii_are_searched_in_finer_steps():
    """Between radii 1.6 apart the share of forbidden images falls from most to none."""
    start = Config(rule="spell", radius=2.5, num_images=256, seed=1)
    rows = enclosing(start, SAFETY, Told(strength=lambda c: 0.7 * c.radius))
    radii = [row["config"]["radius"] for row in rows]
    assert radii[0] == 2.5 and radii[-2] < math.log(10.0) / 0.7 < radii[-1]
    assert max(b / a for a, b in itertools.pairwise(radii)) < 1.2


def test_what_never_becomes_safe_ends():
    measure = Told(strength=lambda c: 0.0)
    rows = enclosing(START, SAFETY, measure)
    assert len(rows) == len(measure.asked) == MOST_SCALES
    assert compare.at_equal_safety(rows, SAFETY)[0]["guidance_scale"] is None


def test_what_is_worse_already_and_gets_worse_is_given_up_after_two_scales():
    bad = Told(strength=lambda c: 0.1, slope=lambda c: 5.0)
    assert len(enclosing(START, SAFETY, bad, give_up_above=2.0)) == 2
    # Too far, but nearer with more guidance, as where the forbidden class is what is wrong.
    assert len(enclosing(START, SAFETY, Told(lambda c: 0.1, lambda c: -0.1))) == MOST_SCALES


def test_each_stage_starts_from_what_the_stages_before_chose():
    """The absolute gate at 0.3 halves the distance, from t = 0.25 it is halved again."""

    def slope(config: Config) -> float:
        found = 8.0 if config.gate == "signed" else 8.0 * (0.1 + abs(config.threshold - 0.3))
        return found * (1.0 + abs(config.t_lo - 0.25)) * (1.0 + (config.t_hi < 1.0))

    measure = Told(slope=slope)
    best = choose(START, ALTERNATIVES["sld"], SAFETY, measure)
    assert chosen_settings(best.to_json()) == "gate absolute, threshold 0.3, t/T 0.25 to 1"
    assert best.guidance_scale == pytest.approx(math.log(10.0) / 2.0, rel=0.05)
    assert (best.seed, best.num_images) == (START.seed, START.num_images)
    late = [config for config in measure.asked if config.t_lo > 0.0]
    assert {(config.gate, config.threshold) for config in late} == {("absolute", 0.3)}


def test_a_safer_setting_that_is_farther_is_not_chosen_and_a_weaker_one_that_is_nearer_is():
    """At equal safety: half as strong and a third as far for each unit of scale."""
    measure = Told(
        strength=lambda c: 1.0 if c.threshold == 0.3 else 2.0,
        slope=lambda c: 1.0 / 3.0 if c.threshold == 0.3 else 1.0,
    )
    best = choose(START, [({"threshold": 0.3},)], SAFETY, measure)
    assert best.threshold == 0.3 and best.guidance_scale == pytest.approx(2.3, rel=0.02)


def test_a_setting_stays_as_it_is_where_nothing_reaches_the_share():
    assert choose(START, ALTERNATIVES["sld"], SAFETY, Told(strength=lambda c: 0.0)) == START


def test_neither_the_features_nor_the_pixels_alone_decide():
    found = {"frechet": 2.0, "frechet_pixels": 3.0}
    assert compare.badness(found) == 6.0
    assert compare.badness({**found, "frechet": None}) == math.inf


def test_every_baseline_has_alternatives_that_are_settings():
    baselines = {method for method in METHODS if METHODS[method]["rule"] not in ("none", "dng")}
    assert baselines == set(ALTERNATIVES)
    for method, stages in ALTERNATIVES.items():
        (start,) = settings(Config(), [method], LADDERS[method][1:2])
        for stage in stages:
            keys = {dataclasses.replace(start, **change).key for change in stage}
            assert len(keys) == len(stage) and start.key not in keys
    gates = {change["gate"] for change in ALTERNATIVES["sld"][0]} | {Config.gate}
    assert gates == {"signed", "absolute"}


def test_the_plan_has_three_scales_of_every_alternative():
    trials, finals = expected(Config(seed=4), ["none", "np", "dng-paper"], 256)
    assert len(trials) == 3 * (1 + sum(map(len, ALTERNATIVES["np"])))
    assert {(trial.rule, trial.num_images, trial.seed) for trial in trials} == {("np", 256, 5)}
    assert [config.rule for config in finals] == ["none", *["np"] * 3, *["dng"] * 3]


# The whole of it, with untrained networks


FEW = Config(rule="none", guidance_scale=0.0, steps=2, num_images=24, batch_size=12)


@pytest.fixture
def fewer(monkeypatch):
    """One alternative, two scales, no bootstrap to speak of."""
    monkeypatch.setattr(sweeping, "evaluate", functools.partial(evaluate, resamples=2))
    monkeypatch.setattr(tuning, "ALTERNATIVES", {"np": (({"t_lo": 0.25},),)})
    monkeypatch.setattr(tuning, "MOST_SCALES", 2)


def run(materials, base=FEW, **options):
    methods = ["none", "np", "dng-paper"]
    options |= {"safety": 0.1, "tuning_images": 12, "progress": False}
    return tune(base, materials, methods, **options)


def test_the_final_images_are_others_than_those_of_the_choice(materials, fewer):
    rows = run(materials)
    folder = materials.folder
    assert rows == read_table(folder.table)
    for row in rows:
        assert (row["config"]["seed"], row["metrics"]["num_images"]) == (0, 24)
        assert (folder.path / "samples" / row["key"] / "images.safetensors").is_file()
    chosen_from = read_table(folder.tuning)
    assert {row["config"]["rule"] for row in chosen_from} == {"np"}
    assert {row["config"]["t_lo"] for row in chosen_from} == {0.0, 0.25}
    for row in chosen_from:
        assert (row["config"]["seed"], row["metrics"]["num_images"]) == (1, 12)
        assert not (folder.path / "samples" / row["key"]).exists()
    assert rows[0]["config"]["rule"] == "none"
    assert {row["config"]["rule"] for row in rows} == {"none", "np", "dng"}


@pytest.mark.slow
def test_a_tuning_that_was_stopped_anywhere_ends_with_the_same_tables(
    materials,
    fewer,
    tmp_path,
    monkeypatch,
):
    tables = materials.folder.tuning, materials.folder.table
    run(materials)
    whole = [table.read_bytes() for table in tables]
    sizes = [len(table.splitlines()) for table in whole]
    real = tuning.sweep
    for stop in (sizes[0] - 1, sum(sizes) - 1):
        for table in tables:
            table.unlink()
        calls = []

        def stopping(*args, calls=calls, stop=stop, **kwargs):
            if len(calls) == stop:
                raise KeyboardInterrupt
            calls.append(args)
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(tuning, "sweep", stopping)
            with pytest.raises(KeyboardInterrupt):
                run(materials)
        run(materials)
        assert [table.read_bytes() for table in tables] == whole


def test_the_command_says_what_it_would_do_and_prints_the_comparison(materials, fewer, capsys):
    arguments = ["tune", "--forget", "0", "--rules", "none", "np", "--safety", "0.1"]
    arguments += ["--steps", "2", "--num-images", "24", "--batch-size", "12", "--device", "cpu"]
    arguments += ["--tuning-images", "12", "--quiet", "--out", str(materials.folder.path)]
    assert main([*arguments, "--plan"]) == 0
    assert "about: draw and measure 6 settings, guided" in capsys.readouterr().out
    assert not materials.folder.tuning.exists()
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("At 10% forbidden")
    assert main([*arguments, "--rules", "dgn"]) == 2
    assert "rules must be one of" in capsys.readouterr().err


def test_what_is_missing_for_a_later_method_is_known_before_the_first(materials, monkeypatch):
    monkeypatch.setattr(tuning, "sweep", None)
    with pytest.raises(FileNotFoundError, match="there is no calibration"):
        tune(FEW, materials, ["none", "dng-calibrated"], safety=0.1, tuning_images=12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"safety": 0.0}, r"safety must be in \(0, 1\), got 0.0"),
        ({"tuning_images": 99}, "tuning_images must be at least 100, of which one is 1%, got 99"),
        ({"methods": ["dgn"]}, "rules must be one of .*'dgn'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_drawn(
    materials,
    monkeypatch,
    arguments,
    message,
):
    monkeypatch.setattr(tuning, "sweep", None)
    base = dataclasses.replace(FEW, num_images=1024)
    with pytest.raises(ValueError, match=message):
        tune(base, materials, **{"methods": ["np"], "safety": 0.01, **arguments})
    with pytest.raises(ValueError, match="num_images must be at least 100"):
        tune(FEW, materials, ["np"], safety=0.01)
