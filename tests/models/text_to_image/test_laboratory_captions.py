"""The grammar of captions: round trips, free ways of writing, and an error for everything else."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given

from dng_models.text_to_image.laboratory.captions import Event, caption_of, composed, ideal, parse
from dng_models.text_to_image.laboratory.standard import laboratory_world
from tests.helpers.small_worlds import events, small_world

WORLD = laboratory_world()


def event(scene=None, *required, without=()):
    lists = frozenset(frozenset(each.split(", ")) for each in required)
    return Event(scene, lists, frozenset(without))


BREAKFAST = "an english breakfast"


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("", event()),
        (BREAKFAST, event(BREAKFAST)),
        ("egg", event(None, "egg")),
        ("egg, sausage", event(None, "egg, sausage")),
        ("an egg and a sausage", event(None, "egg", "sausage")),
        (f"{BREAKFAST} with egg, sausage", event(BREAKFAST, "egg, sausage")),
        (f"{BREAKFAST} with an egg and a sausage", event(BREAKFAST, "egg", "sausage")),
        (f"{BREAKFAST} without egg, sausage", event(BREAKFAST, without=("egg", "sausage"))),
        ("a holiday with fish without jar", event("a holiday", "fish", without=("jar",))),
        ("wine glass with egg, fish", event(None, "wine glass", "egg, fish")),
        ("without wine glass", event(without=("wine glass",))),
        ("sunglasses and a bicycle", event(None, "bicycle", "sunglasses")),
    ],
)
def test_a_caption_and_its_event(caption, expected):
    assert parse(caption, WORLD) == expected
    written = caption_of(expected, WORLD)
    assert parse(written, WORLD) == expected
    assert re.sub(r"\b(an?|the) ", "", written) == re.sub(r"\b(an?|the) ", "", caption)


@pytest.mark.parametrize(
    ("caption", "canonical"),
    [
        ("  An English   Breakfast, with  the egg.", f"{BREAKFAST} with an egg"),
        ("english breakfast", BREAKFAST),
        ("Chalices, candles", "chalice, candle"),
        ("tomatoes", "a tomato"),
        ("sausage or egg", "egg, sausage"),
        ("sausage,egg", "egg, sausage"),
        ("egg , sausage", "egg, sausage"),
        ("with egg", "an egg"),
        ("egg, egg", "an egg"),
        ("egg and egg", "an egg"),
        ("egg with egg with fish", "an egg and a fish"),
        ("a holiday without egg and fish", "a holiday without egg, fish"),
        ("a holiday without egg without fish", "a holiday without egg, fish"),
        ("a holiday, with egg, fish, without jar,", "a holiday with egg, fish without jar"),
        (" , ", ""),
    ],
)
def test_free_writing(caption, canonical):
    assert caption_of(parse(caption, WORLD), WORLD) == canonical


@given(events(most_lists=4))
def test_an_event_is_read_back_from_its_caption(event):
    world = small_world()
    assume(not any(each <= event.excluded for each in event.required))
    assert parse(caption_of(event, world), world) == event


@given(events(), events())
def test_both_events_are_the_caption_of_both_lists(one, two):
    world = small_world()
    assume(None in (one.scene, two.scene) or one.scene == two.scene)
    both = one & two
    assume(not any(each <= both.excluded for each in both.required))
    assert parse(caption_of(both, world), world) == both
    assert both == two & one


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("eggg", "there is no 'eggg'; did you mean 'egg'\\? It has chalice, .*, and scenes a med"),
        ("a holidays", "no 'holidays'; did you mean 'a holiday'"),
        (f"{BREAKFAST} with eggs, zebra", "there is no 'zebra'. It has chalice, .* skyline$"),
        ("a holiday with glass", "did you mean 'wine glass'"),
        ("a holiday with jarr", "there is no 'jarr'; did you mean 'jar'"),
        ("a holiday a dinner table", "there is no 'holiday a dinner table'"),
        ("a holiday egg", "there is no 'holiday egg'"),
        ("egg with a holiday", "there is no 'holiday'"),
        ("a holiday with", "name objects after 'with', got 'a holiday with'"),
        ("with without egg", "name objects after 'with'"),
        ("egg without", "name objects after 'without'"),
        ("a holiday with egg,, fish", "on both sides of"),
        ("and egg", "on both sides of"),
        ("egg and", "on both sides of"),
        ("a, egg", "on both sides of"),
        ("egg, fish and jar", "and not by both; got 'egg, fish and jar'"),
        ("egg without egg", "with and without, got 'egg without egg'"),
        ("egg, jar without jar, egg", "must not ask for egg or jar with and without"),
        ("Kids playing football", "there is no 'kids playing football'"),
        ("two red apples on a table", "there is no 'two red apples on a table'"),
        ("ein Frühstück", "there is no 'ein frühstück'"),
    ],
)
def test_errors(caption, message):
    with pytest.raises(ValueError, match=message):
        parse(caption, WORLD)


def test_other_types_are_an_error():
    with pytest.raises(TypeError, match="caption must be a text, got None"):
        parse(None, WORLD)


def test_events_of_another_world_have_no_caption():
    with pytest.raises(ValueError, match="there is no 'ball'"):
        caption_of(event(None, "ball, egg"), WORLD)
    with pytest.raises(ValueError, match="there is no 'ball'"):
        caption_of(event(without=("ball",)), WORLD)
    with pytest.raises(ValueError, match="there is no 'the sea'"):
        caption_of(event("the sea"), WORLD)


def test_two_scenes_at_once_are_an_error():
    with pytest.raises(ValueError, match="different scenes, got 'a holiday' and 'an art workshop'"):
        event("a holiday") & event("an art workshop")


@pytest.mark.parametrize(
    ("prompt", "negative", "both", "neither"),
    [
        (
            BREAKFAST,
            "Sausages, eggs",
            f"{BREAKFAST} with egg, sausage",
            f"{BREAKFAST} without egg, sausage",
        ),
        (
            f"{BREAKFAST} with bread without jar",
            "egg",
            f"{BREAKFAST} with an egg and a bread without jar",
            f"{BREAKFAST} with a bread without egg, jar",
        ),
        ("", "egg, fish", "egg, fish", "without egg, fish"),
        # A negative that is composed already says the same.
        (
            BREAKFAST,
            f"{BREAKFAST} with egg, sausage",
            f"{BREAKFAST} with egg, sausage",
            f"{BREAKFAST} without egg, sausage",
        ),
    ],
)
def test_captions_of_a_prompt_with_and_without_a_negative(prompt, negative, both, neither):
    assert composed(prompt, negative, WORLD) == both
    assert parse(ideal(prompt, negative, WORLD), WORLD) == parse(neither, WORLD)


@pytest.mark.parametrize(
    ("prompt", "negative", "message"),
    [
        (BREAKFAST, "an egg and a fish", "one list of objects, .* got 'an egg and a fish'"),
        (BREAKFAST, "", "one list of objects"),
        (BREAKFAST, "egg without fish", "objects alone, got 'egg without fish'"),
        (BREAKFAST, "a holiday with egg", "objects alone"),
        ("", "a holiday with egg", "objects alone"),
        (BREAKFAST, "eggz", "no 'eggz'"),
    ],
)
def test_negatives_without_an_ideal_caption(prompt, negative, message):
    with pytest.raises(ValueError, match=message):
        ideal(prompt, negative, WORLD)


def test_a_negative_of_another_scene():
    with pytest.raises(ValueError, match="different scenes"):
        composed(BREAKFAST, "a holiday with egg", WORLD)
