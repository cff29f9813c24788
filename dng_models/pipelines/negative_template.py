"""Negative prompts that are composed with the positive one: "a breakfast, with egg, sausage".

The composed negative describes the images of the positive prompt that have what is unwanted.  Its
likelihood ratio against the positive prompt is bounded by 1 / P(unwanted | positive), so that
the posterior can reach 1 without an offset, with the share of such images as the prior.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from dng_math import checks

ALONE = "{negative}"
COMPOSED = "{positive}, with {negative}"
FIELDS = ("positive", "negative")
PROMPTS = ("prompt", "prompt_2", "prompt_3")


def checked_template(name: str, template: object) -> str:
    """The template, if it can be filled in.

    Parameters
    ----------
    name : str
        The argument, for messages.
    template : str
        A text with {negative}, and with {positive} where the positive prompt shall stand.

    Raises
    ------
    TypeError, ValueError
        If it is no such text.
    """
    wanted = f"{name} must be a text with {{negative}} and, for a composed one, {{positive}}"
    if not isinstance(template, str):
        raise TypeError(f"{wanted}, got {checks.shown(template)}")
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{wanted}, got {template!r} ({error})") from None
    fields = [field for _, field, _, _ in parts if field is not None]
    plain = not any(form or conversion for _, _, form, conversion in parts)
    if "negative" not in fields or not set(fields) <= set(FIELDS) or not plain:
        raise ValueError(f"{wanted}, got {template!r}")
    return template


def filled_in(template: str, positive: str, negative: str) -> str:
    """The negative prompt of a positive one; a full stop at the end of the latter is left out."""
    return template.format(positive=positive.strip().removesuffix("."), negative=negative)


def with_composed_negatives(
    template: str, given: Mapping[str, Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a pipeline's call, with its negative prompts composed with its prompts.

    Parameters
    ----------
    template : str
        From :func:`checked_template`.
    given : mapping
        All given arguments by name.
    kwargs : dict
        Those that were given by name.

    Returns
    -------
    dict
        An empty negative prompt stays empty.

    Raises
    ------
    ValueError
        If a negative prompt was given by position, has no prompt as text to be composed with, or
        their numbers differ.
    """
    composed = dict(kwargs)
    for prompt in PROMPTS:
        name = f"negative_{prompt}"
        negative = given.get(name)
        if negative is None:
            continue
        if name not in kwargs:
            raise ValueError(f"{name} must be given by name with negative_template")
        positive = given.get(prompt)
        positive = given.get("prompt") if positive is None else positive
        composed[name] = _together(name, template, positive, negative)
    return composed


def _together(name: str, template: str, positive: Any, negative: Any) -> Any:
    texts = [[each] if isinstance(each, str) else each for each in (positive, negative)]
    for each in texts:
        if not isinstance(each, Sequence) or not all(isinstance(text, str) for text in each):
            raise ValueError(
                f"prompt and {name} must be texts, or lists of texts, with negative_template, got "
                f"{checks.shown(positive)} and {checks.shown(negative)}"
            )
    count = max(map(len, texts))
    if any(len(each) not in (1, count) for each in texts):
        raise ValueError(
            f"{name} must be one for all, or one for each of {len(texts[0])} prompts, got "
            f"{len(texts[1])}"
        )
    both = zip(*(each * (count // len(each)) for each in map(list, texts)), strict=True)
    found = [filled_in(template, one, other) if other.strip() else other for one, other in both]
    return found[0] if isinstance(positive, str) and isinstance(negative, str) else found
