"""The text-to-image experiment without a network: prompts, settings, the folder, Q and tables."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dng_math.rules import (
    CRG,
    ContrastiveCFG,
    GeoGuide,
    LimitedInterval,
    NegativePrompting,
    PerpNeg,
    SafeLatentDiffusion,
    Unguided,
)
from dng_math.trackers import LogOddsTracker, PaperTracker
from dng_models.text_to_image import compare, prompts, store
from dng_models.text_to_image.config import (
    METHODS,
    PAPER_MODEL,
    RULES,
    SHARED,
    Config,
    Point,
    check_same,
)
from dng_models.text_to_image.paper_q import selectivity
from dng_models.text_to_image.prompts import PAPER, Prompt
from dng_models.text_to_image.store import RunFolder

paper_config = functools.partial(Config, model=PAPER_MODEL)
CAT = Prompt("A cat!", "a cat on a mat", "mat, fur", "a car", np_scale=2.0, dng_scale=10.0)


# ---------------------------------------------------------------------- prompts


def test_the_papers_prompts_are_those_of_its_table():
    table = {p.name: (p.prior, p.temperature, p.offset, p.np_scale, p.dng_scale) for p in PAPER}
    assert table == {
        "medieval feast": (0.01, 0.2, 0.004, 3.4, 27.0),
        "dinner table": (0.01, 0.3, 0.003, 1.7, 12.0),
        "art workshop": (0.01, 0.2, 0.002, 1.7, 27.0),
        "antique store": (0.01, 0.2, 0.004, 2.55, 21.0),
        "English breakfast": (0.01, 0.3, 0.003, 3.4, 18.0),
    }
    negatives = {p.name: (p.related, p.unrelated) for p in PAPER}
    assert negatives["English breakfast"] == ("Egg, sausage", "The view of a skyline")
    assert negatives["antique store"] == ("Lamps, old books", "An electric toothbrush")
    assert prompts.load("paper") == PAPER


def test_a_file_of_prompts_is_read(tmp_path):
    path = tmp_path / "mine.json"
    entries = [{"name": "a", "prompt": "b", "related": "c", "unrelated": "d", "prior": 0.1}]
    path.write_text(json.dumps(entries))
    (read,) = prompts.load(str(path))
    assert read == Prompt("a", "b", "c", "d", prior=0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"mine.json is not JSON \("),
        ("[]", "must hold a list of at least one prompt, .* got an empty list"),
        ('{"a": 1}', "must hold a list .* got dict"),
        ("[3]", "mine.json, prompt 1: must be an object, got 3"),
        ('[{"name": "a", "prompt": "b"}]', "prompt 1: related, unrelated must be given"),
        ("SOME | scale", "prompt 2: there is no field 'scale'; fields are name, prompt, related"),
        ("SOME | prior", r"prompt 2: prior must be in \(0, 1\), got 7"),
        ("SOME | temperature", "prompt 2: temperature must be finite and >= 0, got -1"),
        ("SOME | np_scale", "prompt 2: np_scale must be finite and > 0, got 0"),
        ("SOME | offset", "prompt 2: offset must be a real number .*got 'none'"),
        ("SOME | related", "prompt 2: related must name at least one concept, got ' , '"),
        ("SOME | prompt", "prompt 2: prompt must be a text that is not empty, got ''"),
        ("SOME | unrelated", "prompt 2: unrelated must be a text, got 5"),
        ("SOME | name", "name must be another for each prompt, got 'One' and 'one!'"),
    ],
)
def test_a_bad_file_of_prompts_names_the_entry_and_the_field(tmp_path, text, message):
    bad = {
        **{"scale": 1, "prior": 7, "temperature": -1, "np_scale": 0, "offset": "none"},
        **{"related": " , ", "prompt": "", "unrelated": 5, "name": "one!"},
    }
    if text.startswith("SOME"):
        field = text.split(" | ")[1]
        good = {"name": "One", "prompt": "b", "related": "c", "unrelated": "d"}
        text = json.dumps([good, {**good, "name": "two", field: bad[field]}])
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises((ValueError, TypeError), match=message):
        prompts.load(str(path))


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="'paper' or a JSON file.*no file nowhere.json"):
        prompts.load("nowhere.json")
    with pytest.raises(FileNotFoundError, match="'paper', 'mine' or a JSON file.*no file no"):
        prompts.load("nowhere.json", {"mine": (CAT,)})
    assert prompts.load("mine", {"mine": (CAT,)}) == (CAT,)


def test_concepts_are_what_commas_separate():
    assert prompts.split(" Egg,  bacon and ham ,, ") == ("Egg", "bacon and ham")


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", "", "model must be a name or a folder, got ''"),
        ("prompts", (), "prompts must hold at least one prompt"),
        ("rules", (), r"rules must name at least one rule, each once; got \(\)"),
        ("rules", ("np", "np"), "each once"),
        ("rules", ("dgn",), "rules must be one of 'np', 'dng', .*got 'dgn'"),
        ("guidance_scales", (0.0,), "guidance_scales must hold at least one that is not 0"),
        ("guidance_scales", ("x",), "guidance_scales must be a real number"),
        ("fractions", (math.inf,), "fractions must be finite and >= 0, got inf"),
        ("guidance_scales", (-1.0,), "guidance_scales must be finite and >= 0, got -1.0"),
        ("num_images", 0, "num_images must be an integer >= 1, got 0"),
        ("seed", -1, "seed must be an integer"),
        ("steps", 1001, "steps must be an integer from 1 to 1000, got 1001"),
        ("scheduler", "pndm", "scheduler must be one of 'auto', .*got 'pndm'"),
        ("cfg_scale", math.nan, "cfg_scale must be finite, got nan"),
        ("t_lo", 2.0, r"t_lo must be in \[0, t_hi\], got 2.0"),
        ("height", 4, "height must be an integer >= 8, got 4"),
        ("dtype", "int8", "dtype must be one of 'float32'.*got 'int8'"),
        ("contrast", -1.0, "contrast must be finite and >= 0, got -1.0"),
        ("split_negatives", True, "rules must be of dng, dng-empty, .* where split_negatives"),
    ],
)
def test_a_bad_setting_is_refused_by_name(field, value, message):
    with pytest.raises((ValueError, TypeError), match=message):
        paper_config(**{field: value})


def test_points_are_the_unguided_images_and_every_rule_negative_and_scale():
    config = paper_config(prompts=(CAT,), rules=("np", "dng"), fractions=(0.0, 0.5, 1.0))
    assert [point.key for point in config.points()] == [
        "a-cat/unguided",
        *("a-cat/np-related-1", "a-cat/np-related-2"),
        *("a-cat/np-unrelated-1", "a-cat/np-unrelated-2"),
        *("a-cat/dng-related-5", "a-cat/dng-related-10"),
        *("a-cat/dng-unrelated-5", "a-cat/dng-unrelated-10"),
    ]
    related = config.points()[1]
    assert (related.negative, related.unguided.key) == ("mat, fur", "a-cat/unguided")
    assert config.points()[0].negative is None


def test_scales_are_absolute_or_relative_and_have_short_names():
    absolute = paper_config(prompts=(CAT,), rules=("dng",), guidance_scales=(3, 1.5, 3))
    assert absolute.scales_of("dng", CAT) == (1.5, 3.0)
    feast = PAPER[0]
    assert paper_config().scales_of("np", feast) == (0.85, 1.7, 2.55, 3.4)
    assert paper_config().scales_of("dng-log-odds", feast) == (6.75, 13.5, 20.25, 27.0)
    assert paper_config().scales_of("sld", feast) == paper_config().scales_of("np", feast)


def test_every_rule_is_built_with_the_prompts_hyperparameters():
    feast = PAPER[0]
    without = [*("dng-empty", "dng-path", "ideal"), *(r for r in RULES if METHODS[r].from_empty)]
    rules = tuple(rule for rule in RULES if rule not in without)
    config = paper_config(rules=rules, contrast=0.5, cfg_scale=4.0)

    def built(rule, **fields):
        point = Point(feast, rule, "related", 2.0)
        return dataclasses.replace(config, **fields).rule(point)

    assert paper_config().rule(Point(feast, "none", "none", 0.0)) == Unguided()
    assert built("np") == NegativePrompting(2.0)
    assert built("sld") == SafeLatentDiffusion(2.0, 0.04, "signed", 100.0, 0.1, 0.2, 0)
    assert built("perp-neg") == PerpNeg(2.0, 4.0)
    assert built("perp-neg", cfg_scale=None) == PerpNeg(2.0, 1.0)
    assert built("ccfg") == ContrastiveCFG(2.0, 0.5)
    for level in ("weak", "medium", "strong", "max"):
        assert built(f"sld-{level}") == SafeLatentDiffusion.preset(level, 2.0)
    assert built("ccfg-published") == ContrastiveCFG.published(2.0, 0.5)
    assert (built("geoguide"), built("crg")) == (GeoGuide(2.0), CRG(2.0))
    assert built("np", t_lo=0.2) == LimitedInterval(NegativePrompting(2.0), 0.2, 1.0)
    kinds = {"dng": PaperTracker, "dng-bare": PaperTracker, "dng-log-odds": LogOddsTracker}
    for rule, kind in kinds.items():
        assert built(rule).guidance_scale == 2.0
        assert built(rule).posterior == kind(prior=0.01, temperature=0.2, offset=0.004)
    assert METHODS.keys() == set(RULES)


def test_a_push_is_measured_from_what_is_told():
    rules = tuple(rule for rule in RULES if rule not in ("dng-empty", "dng-path", "ideal"))
    config = paper_config(rules=rules, cfg_scale=4.0, reference="unconditional")
    for rule, method in METHODS.items():
        if rule not in rules or method.attends:
            continue
        built = config.rule(Point(PAPER[0], rule, "related", 2.0), ask=lambda images, step: [()])
        measured_from = getattr(built, "reference", None)
        assert (measured_from == "unconditional") == (method.measured or method.from_empty), rule
    with pytest.raises(ValueError, match="cfg_scale must be given with reference='unconditional'"):
        paper_config(reference="unconditional")
    for rule in ("sld-weak", "ccfg-published", "crg"):
        with pytest.raises(ValueError, match=f"cfg_scale must be given for the rule '{rule}'"):
            paper_config(rules=(rule,))


def test_split_negatives_are_several_concepts():
    point = Point(CAT, "dng", "related", 1.0)
    assert paper_config().concepts(point) == ("mat, fur",)
    config = paper_config(rules=("dng",), split_negatives=True)
    assert config.concepts(point) == ("mat", "fur") and config.concepts(point.unguided) == ()


def test_settings_that_decide_images_must_be_the_same():
    config = paper_config(prompts=(CAT,))
    before = json.loads(json.dumps(config.to_json()))
    check_same(config, before, Path("run"))
    assert set(before["settings"]) == set(SHARED)
    other = Prompt("other", "a", "b", "c")
    for harmless in (
        {"num_images": 5},
        {"rules": ("sld",)},
        {"guidance_scales": (1.0,)},
        {"clip": "another"},
        {"detector": "none"},
        {"prompts": (other,)},
        {"prompts": (CAT, other)},
    ):
        check_same(dataclasses.replace(config, **harmless), before, Path("run"))
    changed = {"steps": 20, "seed": 3, "prompts": (dataclasses.replace(CAT, prior=0.5),)}
    with pytest.raises(ValueError) as error:
        check_same(dataclasses.replace(config, **changed), before, Path("run"))
    for part in (
        "steps was 50 and is 20",
        "seed was 0 and is 3",
        "of prompt 'A cat!', prior was 0.01 and is 0.5",
    ):
        assert part in str(error.value)


# ---------------------------------------------------------------------- the folder


def line(folder: RunFolder, point: Point, image: int, **fields) -> dict:
    """The line of an image that is there."""
    path = folder.image(point, image)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (image, 0, int(point.guidance_scale))).save(path)
    return {
        "prompt": point.prompt.name,
        "kind": point.kind,
        "rule": point.rule,
        "negative": point.negative,
        "guidance_scale": point.guidance_scale,
        "image": image,
        "file": store.image_name(point, image),
        "unguided": store.image_name(point.unguided, image),
        "sha256": store.digest(path),
        **fields,
    }


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


POINTS = paper_config(prompts=(CAT,), rules=("np",), fractions=(1.0,)).points()


def test_lines_of_processes_become_a_sorted_table(folder):
    lines = [line(folder, point, image) for point in POINTS for image in (0, 1)]
    for place, each in enumerate(reversed(lines)):
        store.append(folder.lines_of(place % 2), each)
    store.repair(folder)
    found = [json.loads(each) for each in folder.table.read_text().splitlines()]
    assert found == lines and not folder.work.exists()
    store.write_table(folder, store.read_records(folder).values())
    assert [json.loads(each) for each in folder.table.read_text().splitlines()] == lines


@pytest.mark.parametrize("cut", [1, 30])
def test_a_torn_line_is_no_image(folder, cut):
    whole, torn = (line(folder, POINTS[0], image) for image in (0, 1))
    for each in (whole, torn):
        store.append(folder.lines_of(0), each)
    path = folder.lines_of(0)
    path.write_bytes(path.read_bytes()[:-cut])
    assert list(store.read_records(folder).values()) == [whole]
    store.repair(folder)
    assert list(store.read_records(folder).values()) == [whole]


def test_an_image_that_is_gone_or_damaged_has_no_line_when_it_is_drawn_next(folder):
    kept, gone, damaged = (line(folder, POINTS[0], image) for image in range(3))
    store.write_table(folder, [kept, gone, damaged])
    folder.image(POINTS[0], 1).unlink()
    path = folder.image(POINTS[0], 2)
    path.write_bytes(path.read_bytes()[:-5])
    store.repair(folder)  # by whoever draws something else: what is lost stays known
    assert list(store.read_records(folder).values()) == [kept, gone, damaged]
    store.repair(folder, [record["file"] for record in (kept, gone, damaged)])
    assert list(store.read_records(folder).values()) == [kept]


def test_a_damaged_line_before_the_last_is_an_error_that_names_it(folder):
    store.append(folder.lines_of(3), line(folder, POINTS[0], 0))
    with folder.lines_of(3).open("a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match=r"0003.jsonl, line 2 is no line of an image"):
        store.read_records(folder)


def test_measurements_count_for_the_images_that_they_were_made_of(folder):
    unguided, guided = line(folder, POINTS[0], 0), line(folder, POINTS[1], 0)
    of = [guided["sha256"], unguided["sha256"]]
    scores = {"clip_cosine": 0.5, "presence": None, "measured_by": {"clip": "c", "of": of}}
    store.write_table(folder, [unguided, guided | scores])
    assert store.read_records(folder)[guided["file"]]["clip_cosine"] == 0.5
    store.append(folder.lines_of(0), {"file": guided["file"], **scores, "clip_cosine": 0.25})
    assert store.read_records(folder)[guided["file"]]["clip_cosine"] == 0.25
    Image.new("RGB", (4, 4), (9, 9, 9)).save(folder.image(POINTS[0], 0))
    again = unguided | {"sha256": store.digest(folder.image(POINTS[0], 0))}
    store.append(folder.lines_of(0), again)
    assert "clip_cosine" not in store.read_records(folder)[guided["file"]]


def test_a_full_disk_leaves_the_lines_as_they_were(folder, monkeypatch):
    path = folder.lines_of(0)
    store.append(path, {"file": "a"})
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no line was added to .*0000.jsonl: No space left"):
        store.append(path, {"file": "b"})
    assert path.read_bytes() == before


def test_run_settings_are_written_once_and_added_to(folder):
    config, versions = paper_config(prompts=(CAT,)), {"torch": "1"}
    store.open_run(folder, dataclasses.replace(config, steps=9), versions)
    store.open_run(folder, config, versions)  # there are no images that were made otherwise
    before = folder.settings.read_bytes()
    store.write_table(folder, [line(folder, POINTS[0], 0)])
    store.open_run(folder, config, versions)
    assert folder.settings.read_bytes() == before
    store.open_run(folder, dataclasses.replace(config, prompts=PAPER[:1]), {"torch": "2"})
    found = store.read_settings(folder)
    assert list(found["prompts"]) == ["A cat!", "medieval feast"]
    assert found["versions"] == [{"torch": "1"}, {"torch": "2"}]
    with pytest.raises(ValueError, match="steps was 50 and is 9"):
        store.open_run(folder, dataclasses.replace(config, steps=9), versions)


def test_images_without_settings_are_refused(folder):
    store.write_table(folder, [line(folder, POINTS[0], 0)])
    with pytest.raises(ValueError, match=r"run.json, which says how they were made, is gone"):
        store.open_run(folder, paper_config(), {})
    folder.settings.write_text("{}")
    with pytest.raises(ValueError, match="does not hold the settings of a run"):
        store.open_run(folder, paper_config(), {})


def test_a_folder_without_images_says_what_draws_them(folder):
    with pytest.raises(FileNotFoundError, match="there are no images in .* generate"):
        store.read_table(folder)


# ---------------------------------------------------------------------- Q


def test_q_is_the_lines_height_over_the_diagonal_at_the_middle_of_the_range():
    """By hand, of the means (.9, 1), (.8, .9), (.4, .8): a = .05/.14, b = .9 - .7 a, middle .65."""
    related = np.array([[1.0, 0.8], [0.9, 0.7], [0.3, 0.5]])
    unrelated = np.array([[1.0, 1.0], [0.95, 0.85], [0.7, 0.9]])
    found = selectivity(related, unrelated)
    np.testing.assert_allclose(found.related, [0.9, 0.8, 0.4])
    np.testing.assert_allclose(found.unrelated, [1.0, 0.9, 0.8])
    assert found.slope == pytest.approx(5 / 14) and found.intercept == pytest.approx(0.65)
    assert found.q.value == pytest.approx(0.65 * 5 / 14)  # (a - 1) .65 + .65
    assert found.gap.value == pytest.approx(0.2)  # (.1 + .1 + .4)/3, another number
    # Through (1, 1): sum of changes .1 x 0 + .2 x .1 + .6 x .2 over .1^2 + .2^2 + .6^2.
    assert found.ratio.value == pytest.approx(0.14 / 0.41)


def test_of_two_scales_q_is_the_mean_gap():
    found = selectivity([[0.9, 0.7], [0.6, 0.4]], [[1.0, 0.9], [0.9, 0.7]])
    assert found.q.value == pytest.approx(0.225) and found.gap.value == pytest.approx(0.225)
    assert found.slope == pytest.approx(0.5) and found.intercept == pytest.approx(0.55)
    np.testing.assert_allclose(found.q, found.gap)


def test_the_line_is_that_of_least_squares_and_q_follows_from_it():
    rng = np.random.default_rng(0)
    related, unrelated = rng.uniform(0.5, 1.0, (2, 5, 7))
    found = selectivity(related, unrelated)
    slope, intercept = np.polyfit(found.related, found.unrelated, 1)
    assert found.slope == pytest.approx(slope) and found.intercept == pytest.approx(intercept)
    ends = found.related.max() + found.related.min()
    assert found.q.value == pytest.approx((slope - 1.0) * ends / 2.0 + intercept)
    # The interval is that of the same number over resampled images, paired across the scales.
    draws = np.random.default_rng(1).integers(7, size=(4000, 7))
    resampled = []
    for chosen in draws:
        x, y = related[:, chosen].mean(1), unrelated[:, chosen].mean(1)
        a, b = np.polyfit(x, y, 1)
        resampled.append((a - 1.0) * (x.max() + x.min()) / 2.0 + b)
    low, high = np.quantile(resampled, (0.025, 0.975))
    # Quantiles of 2000 and 4000 resamples: a standard error of 4% of the width each.
    np.testing.assert_allclose(found.q[1:], (low, high), atol=0.2 * (high - low))


def test_the_ratio_does_not_depend_on_how_far_the_scales_go():
    change = np.array([[0.1, 0.2], [0.3, 0.4]])
    for push in (0.5, 1.0):
        found = selectivity(1.0 - push * change, 1.0 - 0.3 * push * change)
        assert found.ratio.value == pytest.approx(0.3)
        np.testing.assert_allclose(found.ratio[1:], 0.3)
        assert found.gap.value == pytest.approx(0.7 * push * 0.25)


def test_the_interval_of_the_mean_gap_is_that_of_a_mean():
    """Of 400 images it is 1.96 standard errors to each side, to 12% (2000 resamples: 3%)."""
    rng = np.random.default_rng(1)
    gaps = rng.normal(0.1, 0.05, 400)
    related = np.full((3, 400), 0.5)
    found = selectivity(related, related + gaps)
    wide = 1.96 * gaps.std() / math.sqrt(400)
    assert found.gap.low == pytest.approx(found.gap.value - wide, abs=0.12 * wide)
    assert found.gap.high == pytest.approx(found.gap.value + wide, abs=0.12 * wide)
    assert selectivity(related, related + gaps).gap == found.gap
    assert np.isnan(found.q).all()  # three scales of one related similarity


def test_scales_that_give_no_line_give_no_q():
    for related in ([[0.5, 0.7]], [[0.5, 0.7], [0.7, 0.5]], [[0.5, 0.7], [0.5 + 1e-9, 0.7]]):
        found = selectivity(related, [[0.9, 0.9]] * len(related))
        assert np.isnan(found.q).all() and math.isnan(found.slope) and math.isnan(found.intercept)
        assert found.gap.value == pytest.approx(0.3, abs=1e-6)
        assert found.ratio.value == pytest.approx(0.25, abs=1e-6)


def test_images_that_nothing_changed_have_no_ratio():
    found = selectivity([[1.0, 1.0]], [[1.0, 1.0]])
    assert found.gap == (0.0, 0.0, 0.0)
    assert math.isnan(found.ratio.value) and math.isnan(found.q.value)


def test_bad_similarities_are_refused_by_name():
    with pytest.raises(ValueError, match=r"unrelated must have shape \(2, 3\), got \(3, 2\)"):
        selectivity(np.ones((2, 3)), np.ones((3, 2)))
    with pytest.raises(ValueError, match="related must not be empty"):
        selectivity(np.ones((0, 3)), np.ones((0, 3)))
    with pytest.raises(ValueError, match="related must be finite, got nan"):
        selectivity([[math.nan]], [[1.0]])


# ---------------------------------------------------------------------- tables


def records(rules=("np", "dng"), names=("cat", "dog"), images=4, detect=True) -> list[dict]:
    """Measured records: related similarity 1 - s, unrelated 1 - s / 2 for NP and 1 for others."""
    found = []
    for name in names:
        prompt = dataclasses.replace(CAT, name=name)
        config = paper_config(prompts=(prompt,), rules=rules, fractions=(0.5, 1.0))
        for point in config.points():
            fraction = 0.0
            if point.rule != "none":
                fraction = point.guidance_scale / config.scales_of(point.rule, prompt)[-1]
            fade = {"none": 0.0, "related": 1.0, "unrelated": 0.5 * (point.rule == "np")}
            for image in range(images):
                there = 0.9 if image < images * (1.0 - fade[point.kind] * fraction) else 0.1
                record = {
                    "prompt": name,
                    "kind": point.kind,
                    "rule": point.rule,
                    "negative": point.negative,
                    "guidance_scale": point.guidance_scale,
                    "image": image,
                    "seed": 7 + image,
                    "file": store.image_name(point, image),
                    "unguided": store.image_name(point.unguided, image),
                    "finite": True,
                    "time": [1.0, 0.5],
                    "scale": [point.guidance_scale, 0.5 * point.guidance_scale],
                    "log_posterior": [-4.0, -1.0] if point.rule.startswith("dng") else None,
                    "clip_cosine": 1.0 - 0.2 * fade[point.kind] * fraction,
                    "presence": {"mat": there, "fur": 0.2, "a car": 0.3} if detect else None,
                }
                found.append(record)
    return found


def test_the_table_has_q_of_every_prompt_and_rule_beside_the_papers():
    text = compare.table(records())
    lines = text.splitlines()
    assert lines[0] == "| prompt | NP: Q | mean gap | ratio | DNG: Q | mean gap | ratio |"
    np_, dng = "0.075 [0.075, 0.075]", "0.150 [0.150, 0.150]"
    row = f"{np_} | {np_} | 0.50 [0.50, 0.50] | {dng} | {dng} | 0.00 [0.00, 0.00] |"
    assert lines[2] == f"| cat | {row}"
    assert lines[3] == f"| dog | {row}"
    average = "0.075 ± 0.000 | 0.075 ± 0.000 | 0.50 ± 0.00"
    average += " | 0.150 ± 0.000 | 0.150 ± 0.000 | 0.00 ± 0.00"
    assert lines[4] == f"| average | {average} |"
    printed = "| the paper, Stable Diffusion 2 | 0.007 ± 0.014 |  |  | 0.052 ± 0.022 |  |  |"
    assert lines[5] == printed
    assert "mean over 2 scales. Both of 4 images a point" in text


def uneven() -> list[dict]:
    """Of one prompt and NP: related .9, .8, .4 and unrelated 1, .9, .8 at scales 1, 2, 3."""
    (first,) = [r for r in records(("np",), ("cat",), 1) if r["kind"] == "none"]
    found = [first]
    for kind, cosines in (("related", (0.9, 0.8, 0.4)), ("unrelated", (1.0, 0.9, 0.8))):
        for scale, cosine in enumerate(cosines, 1):
            of = {"rule": "np", "kind": kind, "guidance_scale": float(scale), "negative": "a"}
            found.append(first | of | {"clip_cosine": cosine, "file": f"{kind}{scale}"})
    return found


def test_q_is_the_papers_in_the_table_and_in_the_csv():
    """.65 x 5/14 = .232 by hand, as above; the mean gap is .2."""
    text = compare.table(uneven())
    row = "| cat | 0.232 [0.232, 0.232] | 0.200 [0.200, 0.200] | 0.34 [0.34, 0.34] |"
    assert row in text.splitlines()
    header, line = compare.q_table(uneven()).splitlines()
    found = dict(zip(header.split(","), line.split(","), strict=True))
    assert found == {
        **{"prompt": "cat", "rule": "np", "scales": "1 2 3", "images": "1"},
        **dict.fromkeys(("q", "q_low", "q_high"), "0.232143"),
        **dict.fromkeys(("mean_gap", "mean_gap_low", "mean_gap_high"), "0.2"),
        **dict.fromkeys(("ratio", "ratio_low", "ratio_high"), "0.341463"),
        **{"slope": "0.357143", "intercept": "0.65", "q_of_the_paper": "0.007"},
    }


def test_one_scale_has_no_q_and_the_table_says_why():
    one = [r for r in uneven() if r["guidance_scale"] in (0.0, 3.0)]
    text = compare.table(one)
    assert "| cat | – | 0.400 [0.400, 0.400] |" in text
    assert "– where the scales (one, or all of one similarity) define no line" in text
    header, line = compare.q_table(one).splitlines()
    found = dict(zip(header.split(","), line.split(","), strict=True))
    assert found["q"] == found["q_low"] == found["slope"] == "" and found["mean_gap"] == "0.4"


def test_the_prompts_are_a_table_as_the_papers():
    lines = compare.prompt_table(PAPER).splitlines()
    assert len(lines) == 2 + 5
    ends = (
        "| Chalices, candles | Kids playing football | 0.01 | 0.2 | 0.004 | 3.4 | 27 |",
        "| Flowers, wine glasses | A person wearing sunglasses | 0.01 | 0.3 | 0.003 | 1.7 | 12 |",
        "| Paintbrush, canvases | A bicycle in the rain | 0.01 | 0.2 | 0.002 | 1.7 | 27 |",
        "| Lamps, old books | An electric toothbrush | 0.01 | 0.2 | 0.004 | 2.55 | 21 |",
        "| Egg, sausage | The view of a skyline | 0.01 | 0.3 | 0.003 | 3.4 | 18 |",
    )
    for line, end in zip(lines[2:], ends, strict=True):
        assert line.endswith(end)
    odd = dataclasses.replace(CAT, name="a|b\nc")
    assert compare.prompt_table([odd]).splitlines()[2].startswith("| a\\|b c | ")


def test_detections_are_of_the_negatives_concepts_without_and_with_guidance():
    text = compare.detection_table(records(names=("cat",)))
    # At the largest scale: none of four for the related negative; a car is never found.
    assert "| cat | NP | 2 | 100% → 0% [0, 60] | 0.800 | 0% → 0% [0, 60] | 0.900 |" in text
    assert "| cat | DNG | 10 | 100% → 0% [0, 60] | 0.800 | 0% → 0% [0, 60] | 1.000 |" in text
    assert compare.detection_table(records(detect=False)) == ""
    assert "found" not in compare.table(records(detect=False))


def test_a_line_of_the_csv_for_every_point():
    lines = compare.csv_table(records(names=("cat",))).splitlines()
    assert len(lines) == 1 + 2 * 2 * 2
    row = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
    assert (row["rule"], row["negative"], row["guidance_scale"]) == ("np", "related", "1")
    assert (row["clip_cosine"], row["mean_scale"], row["images"]) == ("0.9", "0.75", "4")
    assert (row["present"], row["present_unguided"]) == ("0.5", "1")
    # Mean of mat and fur: two images of 0.9 and 0.2, two of 0.1 and 0.2.
    assert (row["probability"], row["probability_unguided"]) == ("0.35", "0.55")


def test_what_would_be_forbidden_is_found_in_unguided_images():
    found = records(names=("cat",))
    assert compare.would_be_forbidden(found, "cat", ("mat", "fur")) == (0, 1, 2, 3)
    assert compare.would_be_forbidden(found, "cat", ("a car",)) == ()
    assert compare.would_be_forbidden(found, "dog", ("mat",)) == ()
    assert compare.would_be_forbidden(records(detect=False), "cat", ("mat",)) == ()
    for record in found:
        if record["kind"] == "none" and record["image"] in (0, 2):
            record["presence"] = {"mat": 0.2, "fur": 0.4}
    assert compare.would_be_forbidden(found, "cat", ("mat", "fur")) == (1, 3)


def test_only_images_that_all_points_have_count():
    found = records(names=("cat",))
    odd = [r for r in found if not (r["kind"] == "related" and r["image"] == 3)]
    summary = compare.summaries(odd)[0]
    assert summary.images == 3 and summary.scales == (1.0, 2.0)


def test_images_that_were_not_measured_are_named():
    found = records()
    del found[3]["clip_cosine"]
    with pytest.raises(ValueError, match="images/cat/unguided/000003.png was not measured: run"):
        compare.table(found)
    with pytest.raises(ValueError, match="no prompt has images with its related and its unrel"):
        compare.summaries([record for record in records() if record["kind"] != "related"])


def test_numbers_that_round_to_nothing_have_no_sign():
    assert compare.fixed(-0.0004, 3) == "0.000" and compare.fixed(-0.0006, 3) == "-0.001"
