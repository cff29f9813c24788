"""Batches to train a network on a world: captions, noisy latents, and their exact predictions.

The target is E[x0 | x_t, caption] and not the x0 that was drawn, which has the same mean and much
more noise.  The empty caption is drawn from the whole world: dropping the caption of a picture
that was drawn with one teaches something else.  In some pairs the picture comes from the scene
alone: there guidance evaluates its negative, on pictures that do not have what the caption names.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from dng_math import checks
from dng_models.text_to_image.laboratory.captions import Event, caption_of
from dng_models.text_to_image.laboratory.exact_model import ExactModel


@dataclass(frozen=True)
class CaptionMix:
    """Shares of the kinds of captions, in arbitrary units.

    Parameters
    ----------
    empty, scene : float
        Nothing, and a scene alone.
    bare : float
        One object, or one of two, in any scene.
    one, two : float
        A scene with an object, and with both of two.
    either : float
        A scene with at least one of two objects.
    without : float
        A scene without one object or two.
    mixed : float
        A scene with an object, and without another.

    Raises
    ------
    ValueError, TypeError
        If a share is negative, or all are 0.
    """

    empty: float = 0.10
    scene: float = 0.12
    bare: float = 0.14
    one: float = 0.18
    two: float = 0.12
    either: float = 0.14
    without: float = 0.16
    mixed: float = 0.04

    def __post_init__(self) -> None:
        for field in fields(self):
            checks.non_negative(field.name, getattr(self, field.name))
        if self.total == 0.0:
            raise ValueError("a mix of captions must have a share above 0")

    @property
    def total(self) -> float:
        """Sum of the shares."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, eq=False)
class Batch:
    """B pairs of a caption and noisy latents, with the exact prediction.

    Attributes
    ----------
    captions, scenes : list of str
        The captions, and what they say of the scene alone.
    mismatched : Tensor, shape (B,), bool
        Whether the picture was drawn from the scene alone.
    timesteps : Tensor, shape (B,), int64
    alpha, sigma : Tensor, shape (B,)
        Noise level of each.
    x : Tensor, shape (B, 3 cell^2, rows, columns)
        Noisy latents.
    x0 : Tensor, shape of x
        E[x0 | x_t, caption].
    """

    captions: list[str]
    scenes: list[str]
    mismatched: Tensor
    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    x: Tensor
    x0: Tensor


class TrainingBatches:
    """Draws batches; a batch depends on the seed and its number alone, so training can resume.

    Parameters
    ----------
    model : ExactModel
    alphas_cumprod : Tensor, shape (T,)
        Squares of alpha at the timesteps.
    size : int
        Number of pairs.
    mix : CaptionMix
        Which captions.
    mismatched : float
        Share of pairs, among those that name a scene and objects, whose picture comes from the
        scene alone; in [0, 1].
    mismatched_from : int
        At lower timesteps there are none: once it is plain that a picture does not have what the
        caption names, E[x0 | x_t, caption] has it in the cell that is the least unlikely, and that
        is far from what can be learned.
    often : tuple of two ints
        Timesteps, from the first and below the second, to be drawn more often.
    often_share : float
        Share of timesteps that are drawn from these, in [0, 1]; the others are drawn from all.
    from_all : float
        Probability that an object named with a scene is any, in [0, 1]; else the scene lists it.
    seed : int

    Attributes
    ----------
    alphas_cumprod : Tensor, shape (T,), float64
    model, size, seed
        The arguments.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        model: ExactModel,
        alphas_cumprod: Tensor,
        *,
        size: int = 128,
        mix: CaptionMix | None = None,
        mismatched: float = 0.2,
        mismatched_from: int = 400,
        often: tuple[int, int] = (350, 900),
        often_share: float = 0.7,
        from_all: float = 0.5,
        seed: int = 0,
    ) -> None:
        squares = torch.as_tensor(alphas_cumprod).cpu().double()
        if squares.ndim != 1 or len(squares) == 0 or squares.min() < 0.0 or squares.max() > 1.0:
            raise ValueError(
                f"alphas_cumprod must be numbers in [0, 1], got shape {tuple(squares.shape)}"
            )
        first = checks.integer("often", often[0], 0, len(squares) - 1)
        last = checks.integer("often", often[1], first + 1, len(squares))
        if len(model.world.objects) < 2:
            raise ValueError("model must be of a world with at least two objects")
        self.model = model
        self.size = checks.integer("size", size, 1)
        self.seed = checks.integer("seed", seed, 0, 2**32 - 1)
        self.alphas_cumprod = squares
        self._mix = CaptionMix() if mix is None else mix
        self._mismatched = checks.real("mismatched", mismatched, "in [0, 1]", 0, 1, closed="[]")
        self._mismatched_from = checks.integer("mismatched_from", mismatched_from, 0)
        self._often = (first, last)
        self._often_share = checks.real("often_share", often_share, "in [0, 1]", 0, 1, closed="[]")
        self._from_all = checks.real("from_all", from_all, "in [0, 1]", 0, 1, closed="[]")

    def draw(self, number: int) -> Batch:
        """Draw the batch of a number.

        Parameters
        ----------
        number : int
            From 0 on.

        Returns
        -------
        Batch
            On the model's device.
        """
        number = checks.integer("number", number, 0, 2**32 - 1)
        rng = np.random.default_rng([self.seed, number])
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        model, world = self.model, self.model.world
        t = rng.integers(len(self.alphas_cumprod), size=self.size)
        often = rng.random(self.size) < self._often_share
        t = np.where(often, rng.integers(*self._often, size=self.size), t)
        events = [self.event(rng) for _ in range(self.size)]
        scenes = [Event(event.scene) for event in events]
        alone = (rng.random(self.size) < self._mismatched) & (t >= self._mismatched_from)
        of = []
        for i, (event, scene) in enumerate(zip(events, scenes, strict=True)):
            alone[i] &= event.scene is not None and event != scene
            of.append(scene if alone[i] else event)
        pictures = model.sample(of, generator=generator).latents
        timesteps = torch.from_numpy(t)
        squares = self.alphas_cumprod[timesteps]
        alpha, sigma = squares.sqrt().to(pictures), (1.0 - squares).sqrt().to(pictures)
        noise = torch.randn(pictures.shape, generator=generator).to(pictures)
        over = (-1, 1, 1, 1)
        x = alpha.reshape(over) * pictures + sigma.reshape(over) * noise
        return Batch(
            [caption_of(event, world) for event in events],
            [caption_of(scene, world) for scene in scenes],
            torch.from_numpy(alone).to(model.device),
            timesteps.to(model.device),
            alpha,
            sigma,
            x,
            model.x0(x, alpha, sigma, events),
        )

    def events(self, number: int) -> list[Event]:
        """What the captions of a number say, of the same kinds as those of the batches."""
        rng = np.random.default_rng([self.seed, number, 1])
        return [self.event(rng) for _ in range(self.size)]

    def event(self, rng: np.random.Generator) -> Event:
        """What a caption of a random kind says."""
        kinds = [field.name for field in fields(CaptionMix)]
        shares = np.array([getattr(self._mix, kind) for kind in kinds]) / self._mix.total
        kind = kinds[int(rng.choice(len(kinds), p=shares))]
        world = self.model.world
        if kind == "empty":
            return Event()
        if kind == "bare":
            some = rng.permutation(len(world.objects))[: rng.integers(1, 3)]
            return Event(None, frozenset({frozenset(world.objects[i] for i in some)}))
        place = int(rng.integers(len(world.scenes)))
        scene = world.scenes[place].name
        if kind == "scene":
            return Event(scene)
        one, two = self._objects(rng, place)
        if kind == "one":
            return Event(scene, frozenset({frozenset({one})}))
        if kind == "two":
            return Event(scene, frozenset({frozenset({one}), frozenset({two})}))
        if kind == "either":
            return Event(scene, frozenset({frozenset({one, two})}))
        if kind == "without":
            both = rng.random() < 0.5
            return Event(scene, excluded=frozenset({one, two} if both else {one}))
        return Event(scene, frozenset({frozenset({one})}), frozenset({two}))

    def _objects(self, rng: np.random.Generator, place: int) -> tuple[str, str]:
        """Two different objects to be named with a scene."""
        world = self.model.world
        names: list[str] = []
        for _ in range(2):
            listed = [name for name in world.scenes[place].shares if name not in names]
            among = [name for name in world.objects if name not in names]
            if listed and rng.random() >= self._from_all:
                among = listed
            names.append(among[int(rng.integers(len(among)))])
        return names[0], names[1]
