"""What pictures of a world show, by the exact posterior, and how near they are to any it has.

The posterior alone is no judge: something that is no picture of the world, such as the inverse of
an object, is given to the least unlikely one.  So the judge also measures the distance to the
nearest picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dng_models.text_to_image.laboratory.captions import Event, parse
from dng_models.text_to_image.laboratory.cells_vae import CellVAE
from dng_models.text_to_image.laboratory.exact_model import ExactModel
from dng_models.text_to_image.laboratory.worlds import World

GHOST = 3.0  # bandwidths from the nearest picture: a cell of the world is 1 away
Images = NDArray[Any] | Sequence[Any]


@dataclass(frozen=True, eq=False)
class Judged:
    """What N pictures show.

    Attributes
    ----------
    world : World
        Whose pictures they are.
    scene : ndarray, shape (N,), int64
        The likeliest scene.
    cells : ndarray, shape (N, cells), int64
        The likeliest class of each cell; class 0 is blank.
    variants : ndarray, shape (N, cells), int64
        The variant of each cell in the nearest picture of the world.
    certainty : ndarray, shape (N, cells), float64
        Probability of that class.
    distance : ndarray, shape (N, cells), float64
        Root mean square distance of the pixels of each cell from the nearest picture, in units of
        pixels in [-1, 1]; the world's own have its bandwidth.
    """

    world: World
    scene: NDArray[np.int64]
    cells: NDArray[np.int64]
    variants: NDArray[np.int64]
    certainty: NDArray[np.float64]
    distance: NDArray[np.float64]

    def __len__(self) -> int:
        """Number N of pictures."""
        return len(self.scene)

    @property
    def ghosts(self) -> NDArray[np.bool_]:
        """Cells that are no picture of the world, shape (N, cells)."""
        return self.distance > GHOST * self.world.bandwidth

    def has(self, *objects: str) -> NDArray[np.bool_]:
        """Whether at least one of the objects is in each picture, shape (N,)."""
        return np.any(self.shows(*objects), axis=1)

    def shows(self, *objects: str) -> NDArray[np.bool_]:
        """Whether each cell shows one of the objects, shape (N, cells).

        Parameters
        ----------
        objects : str
            Names of objects.

        Raises
        ------
        ValueError
            If the world has no such object.
        """
        unknown = [name for name in objects if name not in self.world.objects]
        if unknown:
            raise ValueError(
                f"objects must be of {', '.join(self.world.objects)}, got {', '.join(unknown)}"
            )
        return np.isin(self.cells, [1 + self.world.objects.index(name) for name in objects])

    def holds(self, caption: str | Event) -> NDArray[np.bool_]:
        """Whether what a caption says holds for each picture, by what its cells show, shape (N,).

        Parameters
        ----------
        caption : str or Event
            Such as a negative prompt, "egg, sausage".

        Raises
        ------
        ValueError, TypeError
            If the caption cannot be read.
        """
        event = caption if isinstance(caption, Event) else parse(caption, self.world)
        found = ~self.has(*event.excluded)
        for objects in event.required:
            found &= self.has(*objects)
        if event.scene is not None:
            found &= self.scene == [each.name for each in self.world.scenes].index(event.scene)
        return found

    def changed(self, other: Judged) -> NDArray[np.bool_]:
        """Cells that show another class or another variant than in other pictures, (N, cells).

        A cell that is a ghost in one of them alone counts as changed.

        Parameters
        ----------
        other : Judged
            As many pictures, to be compared one by one.

        Raises
        ------
        ValueError
            If the numbers differ.
        """
        if len(other) != len(self):
            raise ValueError(f"other must have {len(self)} pictures, got {len(other)}")
        same = (self.cells == other.cells) & (self.variants == other.variants)
        same &= (self.scene == other.scene)[:, None] & (self.ghosts == other.ghosts)
        return ~same


class Judge:
    """Judges pictures of a world.

    Parameters
    ----------
    world : World
    device : torch.device or str
        Where it computes, in float32.
    """

    def __init__(self, world: World, device: torch.device | str = "cpu") -> None:
        self.world = world
        self.model = ExactModel(world, device=device)
        self._vae = CellVAE(world.cell, world.centre, world.scale).to(self.model.device)

    def latents_of(self, images: Images) -> Tensor:
        """Latents of images as pipelines return them.

        Parameters
        ----------
        images : ndarray or sequence of PIL images
            Shape (N, height, width, 3): uint8, or floating-point from 0 to 1.

        Returns
        -------
        Tensor, shape (N, 3 cell^2, rows, columns), float32

        Raises
        ------
        ValueError, TypeError
            If the shape or the dtype is another one.
        """
        values = np.stack([np.asarray(image) for image in images])
        wanted = (self.world.rows * self.world.cell, self.world.columns * self.world.cell, 3)
        if values.shape[1:] != wanted:
            raise ValueError(f"images must have shape (N, {str(wanted)[1:]}, got {values.shape}")
        if values.dtype == np.uint8:
            values = values / np.float32(255.0)
        elif not np.issubdtype(values.dtype, np.floating):
            raise TypeError(f"images must be uint8 or floating-point, got {values.dtype}")
        pixels = torch.from_numpy(2.0 * values.astype(np.float32) - 1.0).permute(0, 3, 1, 2)
        mode = self._vae.encode(pixels.to(self.model.device)).latent_dist.mode()
        return self.world.scale * mode

    def look(self, pictures: Images | Tensor) -> Judged:
        """What pictures show.

        Parameters
        ----------
        pictures : Tensor, ndarray or sequence of PIL images
            Latents, or images as for :meth:`latents_of`.

        Returns
        -------
        Judged

        Raises
        ------
        ValueError, TypeError
            If the shape or the dtype does not fit.
        """
        x = self._latents(pictures)
        found, nearest = self.model.posterior(x, 1.0, 0.0), self.model.nearest(x)
        certainty, cells = found.cells.max(-1)
        return Judged(
            self.world,
            found.scene.argmax(1).cpu().numpy(),
            cells.cpu().numpy(),
            nearest.variants.cpu().numpy(),
            certainty.cpu().double().numpy(),
            nearest.distance.cpu().double().numpy(),
        )

    def probability(
        self, pictures: Images | Tensor, caption: str | Event | Sequence[str | Event]
    ) -> NDArray[np.float64]:
        """Exact probability that what a caption says holds for each picture, shape (N,).

        Parameters
        ----------
        pictures
            As for :meth:`look`.
        caption : str, Event or sequence of them
            One for all, or one for each.

        Raises
        ------
        ValueError, TypeError
            As for :meth:`look`, or if the caption cannot be read.
        """
        x = self._latents(pictures)
        yes, _ = self.model.log_posterior(x, 1.0, 0.0, "", caption)
        return np.asarray(yes.cpu().double().exp().numpy())

    def _latents(self, pictures: Images | Tensor) -> Tensor:
        if isinstance(pictures, Tensor):
            return pictures.to(self.model.device)
        return self.latents_of(pictures)
