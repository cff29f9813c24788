"""The ways in which captions are written, so that a text encoder is trained on all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dng_models.text_to_image.laboratory.captions import ARTICLES, Event
from dng_models.text_to_image.laboratory.worlds import World


def phrased(event: Event, world: World, rng: np.random.Generator) -> str:
    """A caption of an event in random words; :func:`.captions.parse` gives the event back.

    Articles, the order of a list, "," or "or" between its objects, and a comma in front of a clause
    are random.

    Parameters
    ----------
    event : Event
    world : World
        Which has what the event names.
    rng : numpy.random.Generator
    """
    lists = [sorted(each, key=world.objects.index) for each in event.required]
    lists.sort(key=lambda names: [len(names) > 1, *map(world.objects.index, names)])
    alone = [names[0] for names in lists if len(names) == 1]
    clauses = [_list(alone, "and", rng)] if alone else []
    clauses += [_list(names, "or", rng) for names in lists if len(names) > 1]
    text = "" if event.scene is None else _scene(event.scene, rng)
    for clause in clauses:
        text = f"{text}{_joint(rng)}with {clause}" if text else clause
    if event.excluded:
        excluded = sorted(event.excluded, key=world.objects.index)
        text += f"{_joint(rng) if text else ''}without {_list(excluded, 'or', rng)}"
    return text


def _joint(rng: np.random.Generator) -> str:
    return ", " if rng.random() < 0.5 else " "


def _scene(name: str, rng: np.random.Generator) -> str:
    first, *others = name.split()
    return " ".join(others) if first in ARTICLES and rng.random() < 0.1 else name


def _list(names: Sequence[str], word: str, rng: np.random.Generator) -> str:
    """Objects in a random order, with articles or without, joined by the word or by commas."""
    articles = rng.random() < (0.5 if word == "and" else 0.2)
    items = [
        f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
        if articles and not name.endswith("s")
        else name
        for name in (names[i] for i in rng.permutation(len(names)))
    ]
    comma = word == "or" and rng.random() < 0.7
    return (", " if comma else f" {word} ").join(items)
