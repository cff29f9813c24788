"""The configuration of a setting: checked, written and read back, named; and its rule."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dng_math import (
    DDIM,
    DDPM,
    CFGPlusPlus,
    ClassifierFreeGuidance,
    DynamicNegativeGuidance,
    FeedbackGuidance,
    GeoGuide,
    LimitedInterval,
    LogOddsTracker,
    NegativePrompting,
    PaperTracker,
    PathTracker,
    PerpNeg,
    SafeLatentDiffusion,
    TimeProfile,
    Unguided,
)
from dng_models.class_removal.config import PAPER, RULES, Config, rule
from dng_models.class_removal.methods import METHODS, settings
from dng_models.class_removal.run_folder import RunFolder

SHARE = 0.1


# ---------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("forget", (), r"forget must name at least one class, each once; got \(\)"),
        ("forget", ("0", "0"), r"each once; got \('0', '0'\)"),
        ("forget", "0", "forget must be a sequence of names, got '0'"),
        ("forget", (0,), r"forget must be a sequence of names, got \(0,\)"),
        ("rule", "dong", "rule must be one of 'none', 'np', .*; got 'dong'"),
        ("rule", "crg", "rule must not be 'crg', which compares .* it does nothing"),
        (
            "rule",
            "images",
            "rule must not be 'images', which needs the density .*negative='images'",
        ),
        ("rule", "signed", "rule must not be 'signed', which is 'np'"),
        ("rule", "nag", "rule must not be 'nag', which acts on a network's attention"),
        ("rule", "spell", "radius must be given for rule 'spell', .*; got None"),
        ("radius", 0.0, "radius must be finite and > 0, got 0.0"),
        ("bandwidth", 0.1, "bandwidth must be None with negative='network', .* got 0.1"),
        ("negative", "points", "negative must be one of 'network', 'images'; got 'points'"),
        ("networks", "three", "networks must be one of 'pair', 'conditional'; got 'three'"),
        ("tracker", "exact", "tracker must be one of 'paper', 'log-odds', 'path'; got 'exact'"),
        ("hyperparameters", "best", "hyperparameters must be one of .*; got 'best'"),
        ("held_out", 1.0, r"held_out must be in \(0, 1\), got 1.0"),
        ("steps", 1001, "steps must be an integer from 1 to 1000, got 1001"),
        ("steps", 10.0, "steps must be an integer from 1 to 1000, got 10.0"),
        ("num_images", 0, "num_images must be an integer >= 1, got 0"),
        ("batch_size", 0, "batch_size must be an integer >= 1, got 0"),
        ("seed", -1, "seed must be an integer .*, got -1"),
        ("guidance_scale", float("nan"), "guidance_scale must be finite, got nan"),
        ("guidance_scale", "1", "guidance_scale must be a real number"),
        ("prior", 0.5, "prior must be None with hyperparameters='paper', .* got 0.5"),
        ("p_max", 1.5, r"p_max must be in \(0, 1\), got 1.5"),
        ("slope", -1.0, "slope must be finite and >= 0, got -1.0"),
        ("contrast", -1.0, "contrast must be finite and >= 0, got -1.0"),
        ("clip", 0.0, "clip must be finite and > 0, got 0.0"),
        ("t_lo", 1.5, r"t_lo must be in \[0, t_hi\], got 1.5"),
        ("autocast", "float8", "autocast must be one of 'float16', 'bfloat16'; got 'float8'"),
        ("like", "imagenet", "like must be one of 'digits', 'mnist', 'cifar10'; got 'imagenet'"),
        ("toward", "0", "toward must not be a forgotten class, got '0'"),
        ("unwanted", ("a", "b"), "unwanted must be one network, or one for each"),
    ],
)
def test_a_bad_field_is_refused_by_name(field, value, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Config(**{field: value})


def test_a_bad_hyperparameter_of_ones_own_is_refused():
    with pytest.raises(ValueError, match=r"prior must be in \(0, 1\), got 1.0"):
        Config(hyperparameters="own", prior=1.0)
    with pytest.raises(ValueError, match="temperature must be finite and >= 0, got -0.1"):
        Config(hyperparameters="own", temperature=-0.1)


@pytest.mark.parametrize("name", ["np", "sld", "ccfg"])
def test_only_dng_forgets_several_classes_with_a_network_each(name):
    with pytest.raises(ValueError, match=f"forget must be one class with rule '{name}'"):
        Config(rule=name, forget=("0", "1"))
    assert Config(rule=name, forget=("0", "1"), unwanted=("both",)).forget == ("0", "1")
    assert Config(rule="dng", forget=("0", "1")).forget == ("0", "1")


@pytest.mark.parametrize("name", ["cfg", "cg", "fbg", "perp-neg", "cfg++"])
def test_rules_that_lead_somewhere_need_to_know_where(name):
    with pytest.raises(ValueError, match=r"toward \(a class\) or positive \(a network\)"):
        Config(rule=name)
    assert Config(rule=name, toward="3").toward == "3"


def test_images_of_the_forbidden_take_the_place_of_its_network():
    assert Config(negative="images", bandwidth=0.2).reads_images
    assert Config(rule="spell", radius=1.0, forget=("0", "1")).reads_images
    assert not Config().reads_images and not Config(rule="none", negative="images").reads_images
    with pytest.raises(ValueError, match="unwanted must not be given with negative='images'"):
        Config(negative="images", unwanted=("a",))
    with pytest.raises(ValueError, match="hyperparameters must be 'paper' or 'own' with negative"):
        Config(negative="images", hyperparameters="calibrated")


def test_the_strength_of_spell_is_its_radius():
    spell = Config(rule="spell", radius=2.0, guidance_scale=1.6)
    assert spell.strength == 2.0 and spell.at(3.0) == dataclasses.replace(spell, radius=3.0)
    assert Config().at(3.0) == Config(guidance_scale=3.0)
    of_sweep = settings(Config(rule="none"), ["spell"], [1.0, 2.0])
    assert [(c.radius, c.guidance_scale) for c in of_sweep] == [(1.0, 1.6), (2.0, 1.6)]
    with pytest.raises(ValueError, match="rules must not have 'crg', which compares"):
        settings(Config(), ["np", "crg"])


def test_a_conditional_network_makes_every_prediction():
    with pytest.raises(ValueError, match="must not be given with networks='conditional'"):
        Config(networks="conditional", unwanted=("somewhere",))


# ---------------------------------------------------------------------- JSON


def test_a_configuration_survives_json():
    config = Config(forget=("3", "5"), p_max=0.9, clip=1, unwanted=["a"], guidance_scale=2)
    read = Config.from_json(json.loads(json.dumps(config.to_json())))
    assert read == config and read.key == config.key
    assert read.unwanted == ("a",)


def test_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match="no field 'guidance', 'sclae'"):
        Config.from_json({"sclae": 1.0, "guidance": 2, "rule": "np"})


def test_the_key_names_the_setting_and_nothing_else():
    """Written out, so that the names of files do not change from version to version unnoticed."""
    assert Config().key == Config().key and len(Config().key) == 12
    assert Config(guidance_scale=1).key == Config(guidance_scale=1.0).key
    keys = {
        dataclasses.replace(Config(), **{name: value}).key
        for name, value in (
            *(
                ("rule", "np"),
                ("guidance_scale", 2.0),
                ("seed", 1),
                ("steps", 10),
                ("num_images", 7),
            ),
            *(("forget", ("1",)), ("tracker", "log-odds"), ("p_min", 0.1)),
            *(("batch_size", 8), ("variance", "large"), ("base", "a"), ("held_out", 0.3)),
        )
    }
    assert len(keys) == 12 and Config().key not in keys


def test_fields_that_came_later_leave_the_keys_of_before():
    """The files of a run that was made before are found, and the shipped table is read."""
    assert Config().key == "e5d46c222d59"
    path = Config(tracker="path", hyperparameters="own")
    others = [dataclasses.replace(path, **{n: v}) for n, v in
              (("eta", 0.0), ("probes", 2), ("track_lo", 0.2), ("negative", "images"),
               ("radius", 1.0))]  # fmt: skip
    others.append(dataclasses.replace(others[0], solver="dpm++2m"))
    others.append(dataclasses.replace(others[3], bandwidth=0.1))
    assert len({path.key, *(other.key for other in others)}) == 8


def test_images_are_the_same_however_many_and_whoever_judges_them():
    config = Config()
    for other in ({"num_images": 5}, {"classifier": "somebody"}):
        changed = dataclasses.replace(config, **other)
        assert changed.images_key == config.images_key and changed.key != config.key
    assert dataclasses.replace(config, seed=1).images_key != config.images_key


# ---------------------------------------------------------------------- rules


def test_every_rule_is_built():
    built = {
        name: rule(Config(rule=name, guidance_scale=2.5, toward="3", radius=1.5), share=SHARE)
        for name in RULES
    }
    assert built["none"] == Unguided()
    assert built["np"] == NegativePrompting(2.5)
    assert built["sld"] == SafeLatentDiffusion(2.5)
    assert built["cfg"] == ClassifierFreeGuidance(2.5)
    assert built["fbg"] == FeedbackGuidance()
    assert built["perp-neg"] == PerpNeg(2.5)
    assert built["geoguide"] == GeoGuide(2.5)
    assert built["cfg++"] == CFGPlusPlus(2.5)
    assert (built["spell"].radius, built["spell"].guidance_scale) == (1.5, 2.5)
    points = np.ones((2, 4))
    spell = Config(rule="spell", radius=1.5, t_lo=0.2).guidance_rule(PaperTracker(0.1), points)
    np.testing.assert_array_equal(spell.rule.points, points)
    assert isinstance(built["dng"], DynamicNegativeGuidance)


def test_sld_has_the_hyperparameters_that_were_given():
    config = Config(
        rule="sld", threshold=0.1, gate="absolute", slope=5.0, momentum=0.3, momentum_decay=0.4,
        warmup_steps=3,
    )  # fmt: skip
    assert rule(config, share=SHARE) == SafeLatentDiffusion(1.0, 0.1, "absolute", 5.0, 0.3, 0.4, 3)


def test_the_path_tracker_has_what_is_its_own():
    config = Config(
        tracker="path", hyperparameters="own", eta=0.0, probes=3, track_lo=0.2, temperature=0.5,
        prior=0.3, offset_nats=1.0,
    )  # fmt: skip
    made = rule(config, share=SHARE).posterior
    assert isinstance(made, PathTracker)
    assert (made.prior, made.offset_nats, made.probes) == (0.3, 1.0, 3)
    assert made.temperature.values == (0.0, 0.5) and made.temperature.times[1] == 0.2
    assert config.sampler == DDIM(0.0) and Config(variance="large").sampler == DDPM("large")
    paper = Config(hyperparameters="own", track_lo=0.3)
    assert rule(paper, share=SHARE).posterior.temperature.times[1] == 0.3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tracker": "path"}, "hyperparameters must be 'calibrated'.*or 'own' with tracker='path'"),
        ({"tracker": "path", "hyperparameters": "own", "offset": 1e-4}, "offset and tracker_var"),
        (
            {"tracker": "path", "hyperparameters": "own", "tracker_variance": "small"},
            "offset and tracker_variance must not",
        ),
        ({"eta": 0.0}, "tracker must be 'path' with eta < 1, got 'paper'"),
        ({"eta": 0.5, "variance": "large", "rule": "np"}, "variance must be 'small' with eta < 1"),
        ({"eta": 1.5}, "eta must be in"),
        ({"solver": "dpm++2m", "rule": "np"}, "eta must be 0.0 with solver='dpm.*, got 1.0"),
        ({"solver": "dpm++2m", "rule": "np", "eta": 0.0, "clip": 1.0}, "clip must be None"),
        ({"solver": "dpm++2m", "eta": 0.0}, "tracker must be 'path'"),
        (
            {"solver": "dpm++2m", "rule": "cfg", "toward": "1", "eta": 0.0},
            "rule must lead away.*got 'cfg'",
        ),
        ({"probes": 0}, "probes"),
        ({"track_lo": 1.0}, "track_lo"),
    ],
)
def test_a_path_and_its_sampler_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


def test_evidence_from_a_time_on_excludes_a_temperature_that_varies():
    fitted = PaperTracker(0.1, TimeProfile((0.1,), (0.5,)))
    with pytest.raises(ValueError, match="track_lo must be 0 with a temperature that varies"):
        Config(track_lo=0.2).with_own(fitted)


def test_an_interval_is_around_the_rule():
    config = Config(rule="np", t_lo=0.2, t_hi=0.8)
    assert rule(config, share=SHARE) == LimitedInterval(NegativePrompting(1.0), 0.2, 0.8)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"dataset": "digits"}, {"prior": 0.25, "temperature": 0.25}),
        ({"dataset": "mnist"}, {"prior": 0.25, "temperature": 0.25}),
        ({"dataset": "ylecun/mnist"}, {"prior": 0.25, "temperature": 0.25}),
        ({"dataset": "cifar10"}, {"prior": 0.01, "temperature": 0.2, "offset": 2e-4}),
        ({"dataset": "a/b.parquet"}, {"prior": SHARE, "temperature": 0.25}),
        (
            {"dataset": "a/b.parquet", "like": "cifar10"},
            {"prior": 0.01, "temperature": 0.2, "offset": 2e-4},
        ),
        ({"hyperparameters": "own"}, {"prior": SHARE}),
        (
            {"hyperparameters": "own", "temperature": 0.5, "offset_nats": -2.0, "p_max": 0.9},
            {"prior": SHARE, "temperature": 0.5, "offset_nats": -2.0, "p_max": 0.9},
        ),
        ({"p_max": 0.9}, {"prior": 0.25, "temperature": 0.25, "p_max": 0.9}),
    ],
)
def test_hyperparameters_are_the_papers_or_ones_own(fields, expected):
    built = rule(Config(**fields), share=SHARE)
    assert built == DynamicNegativeGuidance(1.0, PaperTracker(**expected))


def test_calibrated_hyperparameters_come_from_the_calibration():
    trackers = {
        ("paper", True): PaperTracker(temperature=TimeProfile((0.1, 0.5), (0.1, 0.6))),
        ("paper", False): PaperTracker(temperature=0.3, offset_nats=-1.0),
        ("log-odds", True): LogOddsTracker(temperature=0.05),
        ("log-odds", False): LogOddsTracker(temperature=0.1),
    }
    calibration = SimpleNamespace(tracker=lambda kind, varying: trackers[kind, varying])
    for (kind, varying), tracker in trackers.items():
        hyperparameters = "calibrated" if varying else "calibrated-constant"
        config = Config(tracker=kind, hyperparameters=hyperparameters, guidance_scale=2.0)
        built = rule(config, share=SHARE, calibration=calibration)
        expected = dataclasses.replace(tracker, prior=SHARE)
        assert built == DynamicNegativeGuidance(2.0, expected)
    with pytest.raises(ValueError, match="calibration must be given"):
        rule(config, share=SHARE)


# ---------------------------------------------------------------------- sweeps and folders


def test_settings_are_methods_over_scales_in_their_order():
    configs = settings(Config(), ["none", "dng-log-odds", "np"], [0.5, 2.0])
    assert [(c.rule, c.guidance_scale) for c in configs] == [
        ("none", 0.0),
        ("dng", 0.5),
        ("dng", 2.0),
        ("np", 0.5),
        ("np", 2.0),
    ]
    assert {c.tracker for c in configs if c.rule == "dng"} == {"log-odds"}
    assert len(set(settings(Config(), list(METHODS)))) == len(settings(Config(), list(METHODS)))
    base = Config(tracker="log-odds", hyperparameters="own", temperature=0.1)
    own = settings(base, ["dng"], [1.0])
    assert (own[0].tracker, own[0].temperature) == ("log-odds", 0.1)
    with pytest.raises(ValueError, match="temperature must be None with hyperparameters='paper'"):
        settings(base, ["dng-paper"])


def test_an_unknown_method_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="rules must be one of 'none', .*'dng-paper'.*got 'dgn'"):
        settings(Config(), ["np", "dgn"])


def test_no_class_name_leaves_the_folder():
    folder = RunFolder(Path("run"))
    for name in ("a/b", "..", "../x", "great white shark"):
        assert folder.class_network(name).parent == folder.networks
        assert folder.calibration(name, "pair").parent == Path("run", "calibration")
    assert folder.calibration("0", "pair") != folder.calibration("0", "conditional")


def test_a_calibration_that_comes_with_the_package_is_read_and_never_written_over(tmp_path):
    folder = RunFolder(tmp_path / "run", shipped=tmp_path / "shipped")
    own = tmp_path / "run" / "calibration" / "0-path.json"
    assert folder.calibration("0", "pair", "path") == own
    shipped = tmp_path / "shipped" / "calibration" / "0-path.json"
    for written in (shipped, own):
        written.parent.mkdir(parents=True)
        written.touch()
        assert folder.calibration("0", "pair", "path") == written
        assert folder.own_calibration("0", "pair", "path") == own


def test_the_papers_settings_are_those_of_the_paper():
    """Section 5 of arXiv 2410.14398."""
    assert PAPER["mnist"] == {"prior": 0.25, "temperature": 0.25, "offset": 0.0}
    assert PAPER["cifar10"] == {"prior": 0.01, "temperature": 0.2, "offset": 2e-4}
