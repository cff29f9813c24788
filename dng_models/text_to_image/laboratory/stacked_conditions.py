"""The conditions of a batch of pictures, each with a caption of its own, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dng_models.text_to_image.laboratory.captions import Event
from dng_models.text_to_image.laboratory.conditions import condition
from dng_models.text_to_image.laboratory.worlds import World

IMPOSSIBLE = -1e30  # finite, so that no derivative is NaN


@dataclass(frozen=True, eq=False)
class Conditions:
    """The conditions of a batch on a device; B images, S' scenes that occur in any of them.

    Attributes
    ----------
    scenes : list of int
        The scenes that occur.
    groups : Tensor, shape (B, 1 + K), int64
        As :attr:`.conditions.Condition.groups`.
    accepted : Tensor, shape (B, A, S', P)
        0 where a scene and pattern has the answer, IMPOSSIBLE elsewhere.
    log_prior : Tensor, shape (B, A)
        Log probability of the caption with each answer.
    n_groups : int
        Number G of groups.
    parts : tuple of (Tensor, Conditions)
        The batch's rows by the scenes that they may have, and their conditions, so that a picture
        of one known scene is compared with no other; empty if all rows may have the same.
    """

    scenes: list[int]
    groups: Tensor
    accepted: Tensor
    log_prior: Tensor
    n_groups: int
    parts: tuple[tuple[Tensor, Conditions], ...] = ()

    def __len__(self) -> int:
        """Number B of images."""
        return len(self.groups)


def stacked(
    world: World,
    pairs: Sequence[tuple[Event, Event | None]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    whole: bool = False,
) -> Conditions:
    """The conditions of a batch, padded to its largest number of groups.

    Parameters
    ----------
    world : World
    pairs : sequence of (Event, Event or None)
        What is known of each picture, and what is asked about it; all or none have a question.
    device, dtype
        Of the tensors.
    whole : bool
        Whether to leave the batch in one part, whatever scenes its pictures may have.

    Returns
    -------
    Conditions

    Raises
    ------
    ValueError
        As for :func:`.conditions.condition`.
    """
    places = {each: i for i, each in enumerate(dict.fromkeys(pairs))}
    tables = [condition(world, *each) for each in places]
    index = np.array([places[each] for each in pairs])
    number = max(table.accepted.shape[-1] for table in tables)
    occurring = np.stack(
        [table.accepted.any((0, *range(2, table.accepted.ndim))) for table in tables]
    )
    scenes = np.flatnonzero(occurring.any(0))
    shape = (len(tables), len(tables[0].accepted), len(scenes), *[number] * world.cells)
    accepted = np.full(shape, IMPOSSIBLE)
    for row, table in zip(accepted, tables, strict=True):
        own = (..., *[slice(table.accepted.shape[-1])] * world.cells)
        row[own] = np.where(table.accepted[:, scenes], 0.0, IMPOSSIBLE)
    accepted = accepted.reshape(*shape[:3], -1)[index]
    prior = np.stack([table.log_prior for table in tables])[index]
    groups = np.stack([table.groups for table in tables])[index]
    # The scene of a picture, if it is known.
    known = np.where(occurring.sum(1) == 1, occurring.argmax(1), len(world.scenes))[index]
    parts = []
    if not whole and len(kinds := np.unique(known)) > 1:
        for kind in kinds:
            rows = np.flatnonzero(known == kind)
            some = [pairs[int(row)] for row in rows]
            part = stacked(world, some, device, dtype, whole=True)
            parts.append((torch.from_numpy(rows).to(device), part))
    return Conditions(
        scenes.tolist(),
        torch.from_numpy(groups).to(device),
        torch.from_numpy(accepted).to(device, dtype),
        torch.from_numpy(prior).to(device, dtype),
        number,
        tuple(parts),
    )
