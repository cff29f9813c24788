"""Captions of pictures: ``[scene] [with LIST] [without LIST]``, and what they say of a picture.

"an english breakfast with an egg and a sausage" has both, "with egg, sausage" (or "egg or sausage")
at least one of them, and "without egg, sausage" neither.  Clauses may be repeated and all hold.  A
list alone, "egg, sausage", is a picture of any scene that has one of them; the empty caption says
nothing.  Articles are free, a plural means its singular, and a comma may end a clause, so that
``f"{positive}, with {negative}"`` is a caption.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dng_models.text_to_image.laboratory.worlds import World

ARTICLES = frozenset({"a", "an", "the"})
CLAUSES = ("with", "without")
Sets = frozenset[frozenset[str]]


@dataclass(frozen=True)
class Event:
    """What a caption says of a picture; all of it holds.

    Attributes
    ----------
    scene : str or None
        The picture's scene; None: any.
    required : frozenset of frozenset of str
        Of each set at least one object is in the picture.
    excluded : frozenset of str
        Objects that are not in the picture.
    """

    scene: str | None = None
    required: Sets = frozenset()
    excluded: frozenset[str] = frozenset()

    def __and__(self, other: Event) -> Event:
        """Both events; a ValueError if they name different scenes."""
        if None not in (self.scene, other.scene) and self.scene != other.scene:
            raise ValueError(
                f"two events must not be in different scenes, got {self.scene!r} and "
                f"{other.scene!r}"
            )
        return Event(
            self.scene if other.scene is None else other.scene,
            self.required | other.required,
            self.excluded | other.excluded,
        )


def parse(caption: str, world: World) -> Event:
    """What a caption says of a picture.

    Parameters
    ----------
    caption : str
        The caption; "" says nothing.
    world : World
        Whose scenes and objects it may name.

    Returns
    -------
    Event

    Raises
    ------
    TypeError
        If the caption is not a text.
    ValueError
        If it names what the world does not have (the message says what it has, and what is
        similar), breaks the grammar, or contradicts itself.
    """
    if not isinstance(caption, str):
        raise TypeError(f"caption must be a text, got {caption!r}")
    words = re.findall(r"[^\s,.]+|,", caption.lower().strip().removesuffix("."))
    clauses: list[tuple[str, list[str]]] = [("", [])]
    for word in words:
        if word in CLAUSES:
            clauses.append((word, []))
        else:
            clauses[-1][1].append(word)
    scene: str | None = None
    required: set[frozenset[str]] = set()
    excluded: set[str] = set()
    for keyword, listed in clauses:
        while listed and listed[-1] == ",":
            listed.pop()
        if not listed:
            if keyword:
                raise ValueError(f"caption must name objects after {keyword!r}, got {caption!r}")
            continue
        if not keyword:
            scene = _scene(listed, world)
            if scene is not None:
                continue
        items, together = _list(listed, caption, world, scene_allowed=not keyword)
        if keyword == "without":
            excluded.update(items)
        elif together:
            required.update(frozenset({item}) for item in items)
        else:
            required.add(frozenset(items))
    event = Event(scene, frozenset(required), frozenset(excluded))
    for each in event.required:
        if each <= event.excluded:
            raise ValueError(
                f"caption must not ask for {_joined(sorted(each), 'or')} with and without, got "
                f"{caption!r}"
            )
    return event


def caption_of(event: Event, world: World) -> str:
    """The canonical caption of an event; :func:`parse` gives the event back.

    Parameters
    ----------
    event : Event
    world : World
        The order of whose objects is that of the lists.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        If the event names what the world does not have.
    """
    for name in sorted(event.excluded.union(*event.required)):
        if name not in world.objects:
            raise _unknown(name, world, scene_allowed=False)
    if event.scene is not None and event.scene not in _scenes(world):
        raise _unknown(event.scene, world, scene_allowed=True)

    def ordered(names: frozenset[str]) -> list[str]:
        return sorted(names, key=world.objects.index)

    sets = sorted(map(ordered, event.required), key=lambda each: [len(each) > 1, *each])
    alone = [each[0] for each in sets if len(each) == 1]
    alone.sort(key=world.objects.index)
    lists = [" and ".join(map(_with_article, alone))] if alone else []
    lists += [", ".join(each) for each in sets if len(each) > 1]
    parts = [] if event.scene is None else [event.scene]
    parts += [f"with {each}" for each in lists]
    if event.excluded:
        parts.append(f"without {', '.join(ordered(event.excluded))}")
    text = " ".join(parts)
    return text if event.scene is not None else text.removeprefix("with ")


def composed(prompt: str, negative: str, world: World) -> str:
    """The caption of a prompt's pictures that have what a negative names: both hold.

    Parameters
    ----------
    prompt, negative : str
        Captions, such as "an english breakfast" and "egg, sausage".
    world : World

    Raises
    ------
    ValueError, TypeError
        If one of them cannot be read, or they name different scenes.
    """
    return caption_of(parse(prompt, world) & parse(negative, world), world)


def ideal(prompt: str, negative: str, world: World) -> str:
    """The caption of a prompt's pictures that do not have what a negative names.

    Parameters
    ----------
    prompt, negative : str
        Captions; the negative names objects of which one is enough to be unwanted.
    world : World

    Raises
    ------
    ValueError, TypeError
        If one of them cannot be read, or there is no such caption: what is left without "an egg
        and a fish" may have one of them.
    """
    known, unwanted = parse(prompt, world), parse(negative, world)
    if unwanted.scene not in (None, known.scene) or unwanted.excluded:
        raise ValueError(f"negative must name objects alone, got {negative!r}")
    lists = unwanted.required - known.required
    if len(lists) != 1:
        raise ValueError(
            f"negative must be one list of objects, joined by ',' or 'or', got {negative!r} for "
            f"the prompt {prompt!r}"
        )
    (objects,) = lists
    return caption_of(Event(known.scene, known.required, known.excluded | objects), world)


# ---------------------------------------------------------------------- inside


def _scenes(world: World) -> list[str]:
    return [scene.name for scene in world.scenes]


def _bare(words: Sequence[str]) -> list[str]:
    """The words without an article in front."""
    return list(words[1:] if words and words[0] in ARTICLES else words)


def _scene(words: Sequence[str], world: World) -> str | None:
    """The scene that the words name; None if there is none."""
    for name in _scenes(world):
        if _bare(words) == _bare(name.split()):
            return name
    return None


def _list(
    words: Sequence[str], caption: str, world: World, *, scene_allowed: bool
) -> tuple[list[str], bool]:
    """The objects of a list, and whether the list means all of them."""
    items: list[list[str]] = [[]]
    between: set[str] = set()
    for word in words:
        if word in (",", "and", "or"):
            between.add("and" if word == "and" else "or")
            items.append([])
        else:
            items[-1].append(word)
    if not all(_bare(item) for item in items):
        raise ValueError(
            f"caption must have an object on both sides of ',', 'and' and 'or', got {caption!r}"
        )
    names = [_object(_bare(item), world, scene_allowed) for item in items]
    if len(between) > 1:
        raise ValueError(
            "caption must join a list by 'and', for all of it, or by ',' and 'or', for at least "
            f"one, and not by both; got {caption!r}"
        )
    return names, between == {"and"}


def _object(words: Sequence[str], world: World, scene_allowed: bool) -> str:
    text = " ".join(words)
    for name in (text, text.removesuffix("es"), text.removesuffix("s")):
        if name in world.objects:
            return name
    raise _unknown(text, world, scene_allowed)


def _unknown(text: str, world: World, scene_allowed: bool) -> ValueError:
    known = [*world.objects, *(_scenes(world) if scene_allowed else [])]
    near = difflib.get_close_matches(text, known, n=3, cutoff=0.65)
    hint = f"; did you mean {_joined([repr(each) for each in near], 'or')}?" if near else "."
    scenes = f", and scenes {', '.join(_scenes(world))}" if scene_allowed else ""
    return ValueError(
        f"caption must name what this world has: there is no {text!r}{hint} It has "
        f"{', '.join(world.objects)}{scenes}"
    )


def _joined(names: Sequence[str], word: str) -> str:
    return f" {word} ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _with_article(name: str) -> str:
    if name.endswith("s"):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
