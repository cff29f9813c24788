"""The trained pipeline that ships: what it is, that it passed, and what it draws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy.stats import binom

from dng_models.text_to_image import pipelines
from dng_models.text_to_image.config import TRAINED, Config, Point
from dng_models.text_to_image.dry_run import report
from dng_models.text_to_image.generation import Materials
from dng_models.text_to_image.laboratory import train
from dng_models.text_to_image.laboratory.gate import GATE, NAMED, judge_pipeline
from dng_models.text_to_image.laboratory.judge import Judge
from dng_models.text_to_image.laboratory.prompts import LABORATORY
from dng_models.text_to_image.laboratory.standard import laboratory_world
from dng_models.text_to_image.laboratory.trained import SHIPPED, load_trained
from dng_models.text_to_image.laboratory.training_config import LaboratoryTraining
from dng_models.text_to_image.store import RunFolder
from tests.helpers.statistical import FALSE_ALARM

PAGE = Path(__file__).resolve().parents[3] / "docs" / "laboratory.md"
BREAKFAST = next(each for each in LABORATORY if each.name == "english breakfast")


@pytest.fixture(scope="module")
def shipped():
    return load_trained()


def test_it_is_what_the_defaults_train_and_it_passed_the_gate():
    told = json.loads((SHIPPED / train.METADATA).read_text())
    assert told["configuration"] == train._identity(LaboratoryTraining(), laboratory_world())
    verdict = json.loads((SHIPPED / GATE).read_text())
    assert verdict["passed"] and not verdict["failures"]
    assert {form["images"] for form in verdict["forms"]} == {1000}
    assert min(form["named"] for form in verdict["forms"]) >= NAMED


def test_the_page_says_what_the_gate_found():
    page = PAGE.read_text(encoding="utf-8")
    for form in json.loads((SHIPPED / GATE).read_text())["forms"]:
        numbers = [form[name] for name in ("scene", "named", "forbidden", "worst", "distance")]
        told = " | ".join(f"{value:.3f}" for value in (*numbers, form["ghosts"]))
        assert f"| {form['name']} | {form['images']} | {told} |" in page


def test_it_is_small_and_holds_no_code():
    paths = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in paths) < 20 * 2**20
    assert {path.suffix for path in paths} <= {".json", ".jsonl", ".safetensors", ".txt", ".md"}


def test_it_draws_what_a_caption_names(shipped):
    """Of 24 images fewer show it than a share of .95 leaves out with chance 1e-6."""
    n = 24
    config = Config(model=TRAINED, num_images=n, steps=25)
    pipelines.set_scheduler(shipped, "auto")
    caption = "an english breakfast with an egg"
    found = shipped([caption] * n, num_inference_steps=25, guidance_scale=1.0, output_type="np")
    judged = Judge(laboratory_world()).look(found.images)
    assert judged.has("egg").sum() >= binom.ppf(FALSE_ALARM, n, NAMED)
    point = Point(BREAKFAST, "nag", "related", 1.5)
    drawn = pipelines.draw(shipped, config, point, range(4))
    assert all(each.finite for each in drawn)


def test_its_name_is_that_of_a_model(tmp_path):
    config = Config(model=TRAINED, rules=("np", "nag"))
    assert config.clip == "judge" and config.prompts == LABORATORY
    assert "minutes on one core" in report(config, Materials(RunFolder(tmp_path), device="cpu"))


@pytest.mark.slow
def test_another_seed_passes_about_as_well(shipped):
    """Each share of 300 images is above what .95 leaves out with chance 1e-6."""
    n = 300
    verdict = judge_pipeline(shipped, laboratory_world(), images=n, seed=7, progress=False)
    for form in verdict.forms:
        assert form.named * n >= binom.ppf(FALSE_ALARM, n, NAMED), form
        assert form.forbidden * n <= binom.isf(FALSE_ALARM, n, 0.03), form
