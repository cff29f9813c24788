"""Negative prompts that are composed with the positive one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dng_math import DynamicNegativeGuidance
from dng_math.rules import NegativePrompting
from dng_models.pipelines import tiny
from dng_models.pipelines.hook import apply_guidance
from dng_models.pipelines.negative_template import (
    COMPOSED,
    checked_template,
    filled_in,
    with_composed_negatives,
)

RULE = NegativePrompting(2.0)


def call(pipe: Any, prompt: Any, negative: Any, template: str | None, **given: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    with apply_guidance(pipe, RULE, negative_template=template):
        return pipe(
            prompt,
            negative_prompt=negative,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
            **given,
        ).images


@pytest.mark.parametrize("build", [tiny.tiny_stable_diffusion, tiny.tiny_stable_diffusion_xl])
def test_a_template_writes_the_negative_prompt(build):
    pipe = build()
    composed = call(pipe, "a cat", "egg", COMPOSED)
    np.testing.assert_array_equal(composed, call(pipe, "a cat", "a cat, with egg", None))
    assert not np.array_equal(composed, call(pipe, "a cat", "egg", None))
    several = call(pipe, ["a cat", "a dog."], ["egg", "ham"], COMPOSED)
    written = ["a cat, with egg", "a dog, with ham"]
    np.testing.assert_array_equal(several, call(pipe, ["a cat", "a dog."], written, None))


def test_one_negative_is_for_all_prompts():
    told = {"prompt": ["a cat", "a dog"], "negative_prompt": "egg"}
    found = with_composed_negatives(COMPOSED, told, told)
    assert found["negative_prompt"] == ["a cat, with egg", "a dog, with egg"]
    one = {"prompt": "a cat", "negative_prompt": ["egg", "ham"]}
    assert with_composed_negatives(COMPOSED, one, one)["negative_prompt"] == [
        "a cat, with egg",
        "a cat, with ham",
    ]


def test_second_prompts_are_composed_with_their_own():
    told = {
        **{"prompt": "a cat", "prompt_2": "an animal", "negative_prompt": "egg"},
        **{"negative_prompt_2": "food", "negative_prompt_3": "x"},
    }
    found = with_composed_negatives("{positive} and {negative}", told, told)
    assert found == told | {
        "negative_prompt": "a cat and egg",
        "negative_prompt_2": "an animal and food",
        "negative_prompt_3": "a cat and x",
    }


def test_an_empty_negative_stays_empty():
    """It must be refused as ever, and must not become "a cat, with "."""
    told = {"prompt": "a cat", "negative_prompt": " "}
    assert with_composed_negatives(COMPOSED, told, told) == told
    with pytest.raises(ValueError, match="negative_prompt of the pipeline's call must be given"):
        call(tiny.tiny_stable_diffusion(), "a cat", "", COMPOSED)


def test_braces_in_a_prompt_are_only_text():
    assert filled_in(COMPOSED, "a {cat}.", "{egg}") == "a {cat}, with {egg}"


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{positive}", ValueError),
        ("{negative} {other}", ValueError),
        ("{negative!r}", ValueError),
        ("{negative:>9}", ValueError),
        ("{negative", ValueError),
        ("{0} {negative}", ValueError),
        (5, TypeError),
    ],
)
def test_templates_that_cannot_be_filled_in_are_refused(template, error):
    with pytest.raises(error, match="negative_template must be a text with {negative}"):
        checked_template("negative_template", template)
    with pytest.raises(error, match="negative_template must be a text with {negative}"):
        apply_guidance(tiny.tiny_stable_diffusion(), RULE, negative_template=template)


def test_calls_without_a_text_to_compose_with_are_refused():
    embeddings = torch.zeros(1, 77, 32)
    told = {"prompt_embeds": embeddings, "negative_prompt": "egg"}
    with pytest.raises(ValueError, match="prompt and negative_prompt must be texts"):
        with_composed_negatives(COMPOSED, told, told)
    with pytest.raises(ValueError, match="negative_prompt must be given by name"):
        with_composed_negatives(COMPOSED, {"prompt": "a", "negative_prompt": "b"}, {})
    three = {"prompt": ["a", "b", "c"], "negative_prompt": ["d", "e"]}
    with pytest.raises(ValueError, match="one for each of 3 prompts, got 2"):
        with_composed_negatives(COMPOSED, three, three)


def test_where_there_is_no_negative_prompt_there_is_no_template():
    dng = DynamicNegativeGuidance.tracked(1.0, 0.1)
    with pytest.raises(ValueError, match="negative_template must be None without"):
        apply_guidance(
            tiny.tiny_stable_diffusion(), dng, negative_prompts=["egg"], negative_template=COMPOSED
        )
    pipe = tiny.tiny_ddpm()
    with pytest.raises(ValueError, match="negative_template must be None without"):
        apply_guidance(pipe, dng, unwanted=pipe.unet, negative_template=COMPOSED)
