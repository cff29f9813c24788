"""The gate of trained pipelines, on the exact one, on ones that are wrong, and by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from dng_models.text_to_image.laboratory.gate import (
    FORBIDDEN,
    NAMED,
    UNNAMED,
    Form,
    Share,
    Verdict,
    forms_of,
    judge_pipeline,
)
from dng_models.text_to_image.laboratory.pipelines import laboratory_pipeline
from dng_models.text_to_image.laboratory.prompts import LABORATORY
from dng_models.text_to_image.laboratory.standard import laboratory_world
from tests.helpers.statistical import FALSE_ALARM, assert_proportion

WORLD = laboratory_world()
BREAKFAST = next(each for each in LABORATORY if each.name == "english breakfast")
GOOD = Form("with a", 1000, 1.0, 0.99, 0.0, 0.98, 0.05, 0.0)
SHARE = Share("related", 0.70, 0.70)


def test_the_captions_of_a_prompt():
    assert forms_of(BREAKFAST, WORLD) == {
        "scene": "an english breakfast",
        "with a": "an english breakfast with an egg",
        "with a and b": "an english breakfast with an egg and a sausage",
        "with a, b": "an english breakfast with egg, sausage",
        "with unrelated": "an english breakfast with a skyline",
        "without a, b": "an english breakfast without egg, sausage",
    }


@pytest.mark.slow
def test_the_exact_pipeline_is_judged_as_it_is():
    n = 60
    verdict = judge_pipeline(
        laboratory_pipeline(),
        WORLD,
        prompts=[BREAKFAST],
        images=n,
        steps=30,
        batch_size=25,
        progress=False,
    )
    forms = {form.name: form for form in verdict.forms}
    assert all(form.images == n for form in verdict.forms)
    # By the world's statistics no image errs; a coarse sampler's may, rarely.
    for form in verdict.forms:
        assert form.scene > NAMED and form.named > NAMED and form.forbidden <= FORBIDDEN
        assert form.ghosts <= 0.02 and form.distance < 1.5 * WORLD.bandwidth
    assert forms["with a"].worst == forms["with a"].named
    assert forms["without a, b"].worst == forms["without a, b"].forbidden
    shares = {share.name: share for share in verdict.shares}
    related = WORLD.share("an english breakfast", "egg", "sausage")
    assert shares["related"].world == pytest.approx(related)
    assert_proportion(round(n * shares["related"].found), n, related, FALSE_ALARM)
    assert shares["blank cells"].world == pytest.approx(WORLD.shares[4, 0])


def test_a_pipeline_that_draws_something_else_does_not_pass():
    pipe: Any = laboratory_pipeline()

    def always_the_same(captions, **options):
        return pipe(["a holiday with a bicycle"] * len(captions), **options)

    verdict = judge_pipeline(
        always_the_same, WORLD, prompts=[BREAKFAST], images=8, steps=20, progress=False
    )
    assert all(form.scene == 0.0 for form in verdict.forms)
    named = {form.name: form.named for form in verdict.forms}
    assert named["with a"] == 0.0 and named["scene"] == 1.0
    assert not verdict.passed and "with a: named in 0.000" in verdict.table()


@pytest.mark.slow
def test_images_are_of_the_seed_alone():
    def drawn(**options):
        return judge_pipeline(
            laboratory_pipeline(),
            WORLD,
            prompts=[BREAKFAST],
            images=6,
            steps=10,
            progress=False,
            **options,
        )

    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)


@pytest.mark.parametrize(
    "what, passes, fails",
    [
        ("scene", NAMED, NAMED - 1e-3),
        ("named", NAMED, NAMED - 1e-3),
        ("forbidden", FORBIDDEN, FORBIDDEN + 1e-3),
    ],
)
def test_the_bounds_of_a_form(what, passes, fails):
    good, bad = (dataclasses.replace(GOOD, **{what: value}) for value in (passes, fails))
    assert Verdict((good,), (SHARE,)).passed
    verdict = Verdict((good, bad), (SHARE,))
    assert len(verdict.failures) == 1 and verdict.failures[0].startswith("with a: ")
    assert json.loads(json.dumps(verdict.as_json()))["passed"] is False


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_bound_of_a_share(sign):
    within, beyond = (Share("related", 0.5 + sign * (UNNAMED + off), 0.5) for off in (-1e-6, 1e-6))
    assert Verdict((GOOD,), (within,)).passed
    assert not Verdict((GOOD,), (within, beyond)).passed
    assert "passed" in Verdict((GOOD,), (within,)).table().splitlines()[-1]


@pytest.mark.parametrize("images", [0, 4, 5.5, math.nan])
def test_too_few_images_are_refused(images):
    with pytest.raises((TypeError, ValueError), match="images must be"):
        judge_pipeline(laboratory_pipeline(), WORLD, images=images)


def test_the_generator_does_not_touch_the_global_one():
    state = torch.get_rng_state()
    judge_pipeline(
        laboratory_pipeline(), WORLD, prompts=[BREAKFAST], images=1, steps=2, progress=False
    )
    assert torch.equal(torch.get_rng_state(), state)
