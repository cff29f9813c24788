"""The laboratory's judge in place of CLIP and of a detector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dng_models.text_to_image.config import JUDGE
from dng_models.text_to_image.laboratory.judge import Judge, Judged
from dng_models.text_to_image.laboratory.standard import laboratory_world

Array = NDArray[np.float64]
Images = Sequence[Image.Image]
BLANK = "blank"


class JudgeScores:
    """Similarity and presence by what the judge sees, with the interface of CLIP and a detector.

    The similarity of two pictures is the share of cells in which nothing changed
    (:meth:`.judge.Judged.changed`): the cosine of embeddings that have, for every cell, a 1 where
    it shows a certain scene, class, variant and ghost or none, over the root of the number of
    cells.

    Parameters
    ----------
    device : torch.device or str
        Where the judge computes.
    """

    name = JUDGE

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.judge = Judge(laboratory_world(), device)
        self.device = torch.device(device)

    def images(self, images: Images) -> Array:
        """Embeddings of N pictures, shape (N, F), float64, of unit length."""
        return self.embeddings(self.judge.look(images))

    def embeddings(self, judged: Judged) -> Array:
        """Embeddings of judged pictures, as :meth:`images`."""
        world = judged.world
        sizes = (len(world.scenes), 1 + len(world.objects), world.variants, 2)
        scene = np.broadcast_to(judged.scene[:, None], judged.cells.shape)
        what = (scene, judged.cells, judged.variants, judged.ghosts.astype(np.int64))
        codes = np.ravel_multi_index(what, sizes)
        found = np.zeros((len(judged), world.cells, int(np.prod(sizes))))
        np.put_along_axis(found, codes[..., None], world.cells**-0.5, axis=2)
        return found.reshape(len(judged), -1)

    def __call__(self, images: Images, concepts: Sequence[str]) -> Array:
        """Exact probability of each of K captions, such as "egg", shape (N, K)."""
        latents = self.judge.latents_of(images)
        return np.stack([self.judge.probability(latents, each) for each in concepts], axis=1)

    def seen(self, images: Images, unguided: Images) -> list[dict[str, Any]]:
        """What each picture shows, and which cells differ from those of the unguided one.

        Returns
        -------
        list of dict, ready for JSON
            ``scene``; and cell by cell ``cells``, the object or "blank", and ``before``, that of
            the unguided picture; ``ghosts``, whether it is no picture of the world; ``changed``.
        """
        judged, before = self.judge.look(images), self.judge.look(unguided)
        names = (BLANK, *judged.world.objects)
        changed = judged.changed(before)
        return [
            {
                "scene": judged.world.scenes[judged.scene[i]].name,
                "cells": [names[place] for place in judged.cells[i]],
                "before": [names[place] for place in before.cells[i]],
                "ghosts": judged.ghosts[i].tolist(),
                "changed": changed[i].tolist(),
            }
            for i in range(len(judged))
        ]
