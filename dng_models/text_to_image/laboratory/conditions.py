"""What an event asks of the cells of a picture, as tables of numbers.

Objects that a caption does not tell apart form a group, and an assignment of groups to cells is a
pattern.  An event is a set of scenes and patterns, so its probability is a sum of positive terms:
nothing cancels, as it would by inclusion and exclusion.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dng_models.text_to_image.laboratory.captions import Event, caption_of
from dng_models.text_to_image.laboratory.worlds import World

EXCLUDED = -1
MOST_PATTERNS = 10_000


@dataclass(frozen=True, eq=False)
class Condition:
    """An event, or an event with and without another one; G groups, I cells.

    Attributes
    ----------
    groups : ndarray, shape (1 + K,), int64
        Group of each class of a cell, from 0, the rest with the blank; EXCLUDED where it may not
        be in the picture.
    accepted : ndarray, shape (A, S, G, ..., G), bool
        For each scene and the groups of cells 1 to I, whether the event holds.  A is 1; with a
        question, A is 2: the event with the answer no, and with the answer yes.
    log_prior : ndarray, shape (A,), float64
        Log probability of each.
    """

    groups: NDArray[np.int64]
    accepted: NDArray[np.bool_]
    log_prior: NDArray[np.float64]


@functools.lru_cache(maxsize=4096)
def condition(world: World, event: Event, question: Event | None = None) -> Condition:
    """Tables of an event, and of a question that is asked about it.

    Parameters
    ----------
    world : World
    event : Event
    question : Event, optional
        Splits the event into where it does not hold and where it does.

    Returns
    -------
    Condition

    Raises
    ------
    ValueError
        If the event cannot happen in this world, or has too many different lists.
    """
    asked = question if question is not None else Event()
    wanted = [each - event.excluded for each in _in_order(world, event)]
    wanted = [each for each in wanted if not any(other < each for other in wanted)]
    also = [each - event.excluded for each in _in_order(world, asked)]
    # One bit for each list; the last says that something is there that the question excludes.
    lists = [*wanted, *also, asked.excluded - event.excluded]
    signatures = np.zeros(1 + len(world.objects), dtype=np.int64)
    for bit, names in enumerate(lists):
        for name in names:
            signatures[1 + world.objects.index(name)] |= 1 << bit
    out = np.array([False, *(name in event.excluded for name in world.objects)])
    kinds = np.unique(signatures[~out])  # sorted: the blank's, which is 0, comes first
    groups = np.where(out, EXCLUDED, np.searchsorted(kinds, signatures))
    if len(kinds) ** world.cells > MOST_PATTERNS:
        raise ValueError(
            f"a caption must have fewer different lists: {caption_of(event, world)!r} "
            f"tells {len(kinds)} groups of objects apart in {world.cells} cells"
        )
    seen = np.bitwise_or.reduce(kinds[np.indices((len(kinds),) * world.cells)], axis=0)
    first, both = (1 << len(wanted)) - 1, (1 << len(wanted) + len(also)) - 1
    holds = seen & first == first
    here = np.array([event.scene in (None, scene.name) for scene in world.scenes])
    there = np.array([asked.scene in (None, scene.name) for scene in world.scenes])
    over = (slice(None), *[None] * world.cells)
    happens = here[over] & holds
    yes = happens & there[over] & (seen == both)
    accepted = happens[None] if question is None else np.stack([happens & ~yes, yes])
    prior = (accepted * _prior(world, groups, len(kinds))).sum(axis=tuple(range(1, accepted.ndim)))
    if prior.sum() == 0.0:
        raise ValueError(
            f"caption must say what can happen in {world.cells} cells, got "
            f"{caption_of(event, world)!r}"
        )
    with np.errstate(divide="ignore"):
        return Condition(groups, accepted, np.log(prior))


def _in_order(world: World, event: Event) -> list[frozenset[str]]:
    """The required lists in the world's order, because that of a set differs between processes."""
    return sorted(event.required, key=lambda names: sorted(map(world.objects.index, names)))


def _prior(world: World, groups: NDArray[np.int64], number: int) -> NDArray[np.float64]:
    """Probability of each scene and pattern, shape (S, G, ..., G)."""
    each = world.shares @ (groups[:, None] == np.arange(number))  # (S, G)
    total = np.full(len(world.scenes), 1.0 / len(world.scenes))
    for _ in range(world.cells):
        total = total[..., None] * each.reshape(len(each), *[1] * (total.ndim - 1), number)
    return total
