"""The exact diffusion model of a world: p(x_t | caption), E[x0 | x_t, caption], exact samples.

Notation: image b, cell i, scene s, class k of a cell (0 is blank), variant e, group g, channel c.
At ``x = alpha x0 + sigma eps``, with h the bandwidth in latents and ``v = alpha^2 h^2 + sigma^2``:

- Class k of a cell has density ``l[s,i,k] = log mean_e N(x_i; alpha m_ske, v I)``; what all classes
  share, the density of a blank cell, is kept apart.
- ``mass[s,i,g] = logsumexp over k in g of (log pi(k|s) + l[s,i,k])``.
- ``log p(x, event) = logsumexp over s and accepted patterns of (log pi(s) + sum_i mass[s,i,g_i])``.
- ``E[x0 | x] = m + (alpha h^2 / v) (x - alpha m)``, m the mean of the pictures weighted by their
  posterior.

A sprite over a tint is ``P_ke + (1 - a_ke) tint``.  So the products of x with the pictures of all
scenes follow from its products with ``P`` and, channel by channel, with ``a``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dng_models.text_to_image.laboratory.captions import Event, parse
from dng_models.text_to_image.laboratory.stacked_conditions import IMPOSSIBLE, Conditions, stacked
from dng_models.text_to_image.laboratory.worlds import World

Level = float | Tensor
KEPT = 64  # conditions of batches
Given = str | Event | Sequence[str | Event]


@dataclass(frozen=True, eq=False)
class Posterior:
    """What a picture shows, given x_t and its caption.

    Attributes
    ----------
    scene : Tensor, shape (B, S)
        Probability of each scene.
    cells : Tensor, shape (B, cells, 1 + K)
        Probability of each class in each cell, in rows from the top left; class 0 is blank.
    """

    scene: Tensor
    cells: Tensor


@dataclass(frozen=True, eq=False)
class Nearest:
    """The nearest picture of the world.

    Attributes
    ----------
    scene : Tensor, shape (B,), int64
        Its scene.
    cells, variants : Tensor, shape (B, cells), int64
        Its classes and variants, as of :class:`Pictures`.
    distance : Tensor, shape (B, cells)
        Root mean square difference of the pixels of each cell, in units of pixels in [-1, 1].
    """

    scene: Tensor
    cells: Tensor
    variants: Tensor
    distance: Tensor


@dataclass(frozen=True, eq=False)
class Pictures:
    """Exact samples.

    Attributes
    ----------
    latents : Tensor, shape (B, 3 cell^2, rows, columns)
        The clean pictures x0, with the noise of the bandwidth.
    scene : Tensor, shape (B,), int64
        The scene of each.
    cells, variants : Tensor, shape (B, cells), int64
        Class and variant of each cell; class 0 is blank, whose variant is 0.
    """

    latents: Tensor
    scene: Tensor
    cells: Tensor
    variants: Tensor


@dataclass(frozen=True, eq=False)
class _Noisy:
    """Checked arguments: pictures (B, I, 3, pixels), levels (B, 1, 1)."""

    x: Tensor
    alpha: Tensor
    sigma: Tensor
    variance: Tensor
    conditions: Conditions

    def part(self, rows: Tensor, conditions: Conditions) -> _Noisy:
        """Some of the pictures, with their conditions."""
        levels = (self.alpha[rows], self.sigma[rows], self.variance[rows])
        return _Noisy(self.x[rows], *levels, conditions)


@dataclass(frozen=True, eq=False)
class _Inferred:
    """What x_t says of scenes, classes and variants.

    ``log_joint`` (B, A, S') is log p(x, scene, answer) up to a term of x.  ``scenes`` (B, S'),
    ``classes`` (B, S', I, 1 + K), jointly with the scene, and ``variants`` (B, S', I, K, E), given
    scene and class, are posteriors.
    """

    log_joint: Tensor
    scenes: Tensor
    classes: Tensor
    variants: Tensor


class ExactModel:
    """The exact model of a world.

    Parameters
    ----------
    world : World
    device : torch.device or str
        Where it computes.
    dtype : torch.dtype
        float32 or float64, in which it computes.

    Raises
    ------
    TypeError
        If ``dtype`` is another one.

    Notes
    -----
    Latents of any floating-point dtype are accepted, and results have the model's.  In the
    arguments, ``alpha`` and ``sigma`` are numbers or tensors of shape (B,), and ``given`` is the
    captions or events of the images (one for all, or one for each), or their :meth:`conditions`.
    """

    def __init__(
        self,
        world: World,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        self.world = world
        self.device, self.dtype = torch.device(device), dtype
        doubled = 2.0 * world.scale
        sprites = world.sprites.astype(np.float64).reshape(-1, world.cell**2, 4)
        paint = doubled * sprites[..., :3].transpose(0, 2, 1)  # (KE, 3, pixels)
        cover = sprites[..., 3]  # (KE, pixels)
        tints = doubled * world.tints  # (S, 3)
        grounds = tints - world.scale * (1.0 + np.array(world.centre))
        # |d|^2 / 2 and ground . d of the sprites' differences d from their backgrounds.
        differences = paint - tints[:, None, :, None] * cover[:, None]  # (S, KE, 3, pixels)
        offsets = 0.5 * np.square(differences).sum(axis=(2, 3))
        offsets += np.einsum("sc,skcp->sk", grounds, differences)
        self._paint = self._tensor(paint.reshape(len(paint), -1))
        self._cover = self._tensor(cover)
        self._tints = self._tensor(tints)
        self._grounds = self._tensor(grounds)
        self._offsets = self._tensor(offsets)
        self._log_shares = self._tensor(np.log(world.shares))
        self._differences = functools.cache(
            lambda scene: self._tensor(differences[scene].reshape(len(paint), -1))
        )
        self._bandwidth = world.scale * world.bandwidth
        self._events: dict[str, Event] = {}
        self._known: dict[Any, Conditions] = {}

    # ------------------------------------------------------------------ captions

    def conditions(
        self,
        given: Given,
        batch: int | None = None,
        *,
        question: Given | None = None,
    ) -> Conditions:
        """The conditions of a batch, for repeated use.

        Parameters
        ----------
        given : str, Event or sequence of them
            One for all images, or one for each.
        batch : int, optional
            Number of images; needed where nothing has one for each.
        question : str, Event or sequence of them, optional
            A question about each image, for :meth:`log_posterior`.

        Returns
        -------
        Conditions

        Raises
        ------
        ValueError, TypeError
            If a caption cannot be read or cannot happen, or numbers of images differ.
        """
        captions: list[Event] = self._each("given", given)
        asked = [None] if question is None else self._each("question", question)
        n = max(len(captions), len(asked)) if batch is None else batch
        for name, each in (("given", captions), ("question", asked)):
            if len(each) not in (1, n):
                raise ValueError(
                    f"{name} must have one for all or each of {n} images, got {len(each)}"
                )
        captions *= n // len(captions)
        asked *= n // len(asked)
        key = tuple(zip(captions, asked, strict=True))
        if key not in self._known:
            if len(self._known) >= KEPT:
                self._known.pop(next(iter(self._known)))
            self._known[key] = stacked(self.world, key, self.device, self.dtype)
        return self._known[key]

    # ------------------------------------------------------------------ predictions

    def x0(self, x: Tensor, alpha: Level, sigma: Level, given: Given | Conditions) -> Tensor:
        """E[x0 | x_t, caption].

        Parameters
        ----------
        x : Tensor, shape (B, 3 cell^2, rows, columns)
            Noisy latents ``alpha x0 + sigma eps``.
        alpha, sigma, given
            As the class says.

        Returns
        -------
        Tensor, shape of x

        Raises
        ------
        ValueError, TypeError
            If a shape does not fit, or as for :meth:`conditions`.
        """
        return self.x0_and_noise(x, alpha, sigma, given)[0]

    def x0_and_noise(
        self, x: Tensor, alpha: Level, sigma: Level, given: Given | Conditions
    ) -> tuple[Tensor, Tensor]:
        """E[x0 | x_t, caption] and E[eps | x_t, caption]; arguments and errors as for :meth:`x0`.

        Neither is computed from the other, so that both are accurate at every noise level.
        """
        x0, noise = self._by_parts(self._means, self._noisy(x, alpha, sigma, given))
        return x0, noise

    def log_prob(self, x: Tensor, alpha: Level, sigma: Level, given: Given | Conditions) -> Tensor:
        """log p(x_t | caption), shape (B,); arguments and errors as for :meth:`x0`."""
        (found,) = self._by_parts(self._log_prob, self._noisy(x, alpha, sigma, given))
        return found

    def log_posterior(
        self,
        x: Tensor,
        alpha: Level,
        sigma: Level,
        given: Given | Conditions,
        question: Given | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log probability that what a question says holds, and that it does not.

        Their difference is the log odds, ``log p(x|c, Q) P(Q|c) - log p(x|c, not Q) P(not Q|c)``.

        Parameters
        ----------
        x, alpha, sigma
            As for :meth:`x0`.
        given : str, Event, sequence of them, or Conditions
            What is known, c; conditions must have been made with a question.
        question : str, Event or sequence of them, optional
            The question Q; needed unless ``given`` are conditions.

        Returns
        -------
        tuple of Tensor, shape (B,)
            log p(Q | x_t, c) and log p(not Q | x_t, c); -inf where it cannot be.

        Raises
        ------
        ValueError, TypeError
            As for :meth:`x0`, or without a question.
        """
        if not isinstance(given, Conditions):
            if question is None:
                raise ValueError("question must be given, as a caption or an event")
            given = self.conditions(given, len(x), question=question)
        if given.accepted.shape[1] != 2:
            raise ValueError("given must be conditions that were made with a question")
        yes, no = self._by_parts(self._answers, self._noisy(x, alpha, sigma, given))
        return yes, no

    def posterior(
        self, x: Tensor, alpha: Level, sigma: Level, given: Given | Conditions = ""
    ) -> Posterior:
        """What each picture shows, cell by cell; arguments and errors as for :meth:`x0`."""
        scene, cells = self._by_parts(self._shown, self._noisy(x, alpha, sigma, given))
        return Posterior(scene, cells)

    # ------------------------------------------------------------------ samples

    def sample(
        self,
        given: Given | Conditions,
        batch: int | None = None,
        *,
        generator: torch.Generator | int = 0,
    ) -> Pictures:
        """Draw pictures from p(x0 | caption), exactly.

        Parameters
        ----------
        given : str, Event, sequence of them, or Conditions
            One caption for all pictures, or one for each.
        batch : int, optional
            Number of pictures; needed where ``given`` is one caption.
        generator : torch.Generator on the CPU, or int
            Source of randomness, or its seed; the pictures do not depend on the model's device.

        Returns
        -------
        Pictures

        Raises
        ------
        ValueError, TypeError
            As for :meth:`conditions`.
        """
        if isinstance(generator, int):
            generator = torch.Generator().manual_seed(generator)
        if not isinstance(given, Conditions):
            given = self.conditions(given, batch)
        n, cells, number = len(given), self.world.cells, given.n_groups
        groups = given.groups.cpu()
        belongs = groups[:, None] == torch.arange(number)[:, None]  # (B, G, 1 + K)
        shares = torch.from_numpy(self.world.shares)[given.scenes]  # (S', 1 + K)
        classes = belongs[:, None] * shares[:, None]  # (B, S', G, 1 + K)
        each = classes.sum(-1)
        patterns = _patterns(each[:, :, None].expand(-1, -1, cells, -1), torch.mul)
        patterns = patterns * (given.accepted.cpu() == 0.0).any(1)
        drawn = torch.multinomial(patterns.flatten(1), 1, generator=generator)[:, 0]
        scene, pattern = drawn // patterns.shape[-1], drawn % patterns.shape[-1]
        places = number ** torch.arange(cells - 1, -1, -1)
        group = (pattern[:, None] // places) % number  # (B, I)
        rows = classes[torch.arange(n)[:, None], scene[:, None], group]
        shown = torch.multinomial(rows.flatten(0, 1), 1, generator=generator).reshape(n, cells)
        variants = torch.randint(self.world.variants, (n, cells), generator=generator)
        variants = torch.where(shown == 0, 0, variants)
        shape = (n, *self.world.latent_shape)
        noise = torch.randn(shape, generator=generator).to(self.device, self.dtype)
        scene = torch.tensor(given.scenes)[scene].to(self.device)
        shown, variants = shown.to(self.device), variants.to(self.device)
        clean = self.pictures(scene, shown, variants)
        return Pictures(clean + self._bandwidth * noise, scene, shown, variants)

    def pictures(self, scene: Tensor, cells: Tensor, variants: Tensor) -> Tensor:
        """Latents of pictures without noise.

        Parameters
        ----------
        scene : Tensor, shape (B,), int64
            Scene of each picture.
        cells, variants : Tensor, shape (B, cells), int64
            Class and variant of each cell; class 0 is blank.

        Returns
        -------
        Tensor, shape (B, 3 cell^2, rows, columns)
        """
        sprite = (cells - 1).clamp(min=0) * self.world.variants + variants
        covers = self._cover[sprite][:, :, None]  # (B, I, 1, pixels)
        painted = self._paint[sprite].reshape(*sprite.shape, 3, -1)
        painted = painted - self._tints[scene][:, None, :, None] * covers
        shown = torch.where((cells > 0)[..., None, None], painted, 0.0)
        return self._picture(self._grounds[scene][:, None, :, None] + shown)

    def nearest(self, x: Tensor) -> Nearest:
        """The picture without noise that is nearest to each of clean latents.

        Parameters
        ----------
        x : Tensor, shape (B, 3 cell^2, rows, columns)
            The latents.

        Returns
        -------
        Nearest

        Raises
        ------
        ValueError
            If the shape does not fit.
        """
        at = self._noisy(x, 1.0, 1.0, "")
        gains = 2.0 * self._products(at.x, at.alpha, at.conditions.scenes)  # (B, S, I, K E)
        best, sprite = gains.max(-1)
        grounds = self._grounds[:, None, :, None]
        blank = (at.x[:, None] - grounds).square().sum((3, 4))  # (B, S, I)
        squares = blank - best.clamp(min=0.0)
        scene = squares.sum(2).argmin(1)
        rows = torch.arange(len(x), device=x.device)
        squares, best, sprite = squares[rows, scene], best[rows, scene], sprite[rows, scene]
        classes, variants = sprite // self.world.variants + 1, sprite % self.world.variants
        size = self.world.scale * (3 * self.world.cell**2) ** 0.5
        return Nearest(
            scene,
            torch.where(best > 0.0, classes, 0),
            torch.where(best > 0.0, variants, 0),
            squares.clamp(min=0.0).sqrt() / size,
        )

    # ------------------------------------------------------------------ inside

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, self.dtype)

    def _event(self, given: str | Event) -> Event:
        if isinstance(given, Event):
            return given
        if not isinstance(given, str) or given not in self._events:
            self._events[given] = parse(given, self.world)
        return self._events[given]

    def _each(self, name: str, given: Any) -> list[Any]:
        if isinstance(given, str | Event):
            return [self._event(given)]
        if not isinstance(given, Sequence) or not given:
            raise TypeError(
                f"{name} must be a caption, an event, or a sequence of them, got {given!r}"
            )
        return [self._event(each) for each in given]

    def _noisy(self, x: Tensor, alpha: Level, sigma: Level, given: Given | Conditions) -> _Noisy:
        """Check the arguments, and lay out the pictures cell by cell."""
        shape = self.world.latent_shape
        if not isinstance(x, Tensor) or x.ndim != 4 or tuple(x.shape[1:]) != shape:
            got = tuple(x.shape) if isinstance(x, Tensor) else x
            raise ValueError(f"x must be latents of shape (B, {str(shape)[1:]}, got {got}")
        if not isinstance(given, Conditions):
            given = self.conditions(given, len(x))
        if len(given) != len(x):
            raise ValueError(f"given must be conditions of {len(x)} images, got {len(given)}")
        alpha, sigma = (
            self._level(name, level, len(x)) for name, level in (("alpha", alpha), ("sigma", sigma))
        )
        cells = x.to(self.dtype).reshape(len(x), 3, -1, self.world.cells).permute(0, 3, 1, 2)
        # In this order in memory, too: matrix products of a view are fifteen times slower.
        cells = cells.contiguous()
        variance = alpha.square() * self._bandwidth**2 + sigma.square()
        return _Noisy(cells, alpha, sigma, variance, given)

    def _level(self, name: str, level: Level, n: int) -> Tensor:
        """The level of each image, (B, 1, 1)."""
        values = torch.as_tensor(level, device=self.device, dtype=self.dtype)
        if values.ndim and values.shape != (n,):
            raise ValueError(
                f"{name} must be a number or a tensor of shape ({n},), got shape "
                f"{tuple(values.shape)}"
            )
        return values.expand(n)[:, None, None]

    def _picture(self, cells: Tensor) -> Tensor:
        """Latents (B, 3 cell^2, rows, columns) of cells (B, cells, 3, cell^2)."""
        return cells.permute(0, 2, 3, 1).reshape(len(cells), *self.world.latent_shape)

    def _by_parts(self, work: Callable[[_Noisy], tuple[Tensor, ...]], at: _Noisy) -> list[Tensor]:
        """The work's results for all rows, in their order."""
        parts = at.conditions.parts
        if not parts:
            return [*work(at)]
        order = torch.argsort(torch.cat([rows for rows, _ in parts]))
        found = [work(at.part(rows, conditions)) for rows, conditions in parts]
        return [torch.cat(each)[order] for each in zip(*found, strict=True)]

    def _means(self, at: _Noisy) -> tuple[Tensor, Tensor]:
        """Posterior means of x0 and of the noise."""
        found = self._inferred(at)
        weights = (found.classes[..., 1:, None] * found.variants).flatten(3)  # (B, S', I, K E)
        scenes = at.conditions.scenes
        mean = torch.einsum("bs,sc->bc", found.scenes, self._grounds[scenes])[:, None, :, None]
        if len(scenes) == 1:
            painted = (weights[:, 0] @ self._differences(scenes[0])).reshape(at.x.shape)
        else:
            painted = (weights.sum(1) @ self._paint).reshape(at.x.shape)
            tinted = (self._tints[scenes].T @ weights.flatten(2)).reshape(
                len(at.x), 3, *weights.shape[2:]
            )
            painted = painted - (tinted @ self._cover).transpose(1, 2)
        mean = mean + painted
        apart = (at.x - at.alpha[..., None] * mean) / at.variance[..., None]
        x0 = mean + (at.alpha * self._bandwidth**2)[..., None] * apart
        return self._picture(x0), self._picture(at.sigma[..., None] * apart)

    def _log_prob(self, at: _Noisy) -> tuple[Tensor]:
        """log p(x_t | caption)."""
        variance = at.variance[:, 0, 0]
        shared = at.x.square().sum((1, 2, 3)) / variance
        shared = shared + at.x[0].numel() * torch.log(2.0 * torch.pi * variance)
        joint = torch.logsumexp(self._inferred(at).log_joint, -1)
        # The first answer alone, or both together.
        prior = torch.logsumexp(at.conditions.log_prior, -1)
        return (torch.logsumexp(joint, -1) - prior - 0.5 * shared,)

    def _answers(self, at: _Noisy) -> tuple[Tensor, Tensor]:
        """Log probabilities of yes and no."""
        logs = torch.log_softmax(torch.logsumexp(self._inferred(at).log_joint, -1), -1)
        logs = torch.where(torch.isinf(at.conditions.log_prior), -torch.inf, logs)
        return logs[:, 1], logs[:, 0]

    def _shown(self, at: _Noisy) -> tuple[Tensor, Tensor]:
        """Posterior of the scene, and of each cell's class."""
        found = self._inferred(at)
        scenes = found.scenes.new_zeros(len(at.x), len(self.world.scenes))
        scenes[:, at.conditions.scenes] = found.scenes
        return scenes, found.classes.sum(1)

    def _products(self, x: Tensor, alpha: Tensor, scenes: list[int]) -> Tensor:
        """(x - alpha ground) . d - alpha |d|^2 / 2 for the sprites' differences d, (B, S', I, K E).

        That is half of what a sprite takes off the squared distance of x from a blank cell, over
        alpha.
        """
        if len(scenes) == 1:
            products = (x.flatten(2) @ self._differences(scenes[0]).T)[:, None]
        else:
            covered = (x @ self._cover.T).transpose(1, 2)  # (B, 3, I, K E)
            tinted = self._tints[scenes] @ covered.flatten(2)
            products = (x.flatten(2) @ self._paint.T)[:, None]
            products = products - tinted.reshape(len(x), len(scenes), *covered.shape[2:])
        return products - alpha[..., None] * self._offsets[scenes][:, None]

    def _inferred(self, at: _Noisy) -> _Inferred:
        """The posterior of scenes, patterns, classes and variants, as the module says."""
        scenes, world = at.conditions.scenes, self.world
        gain = at.alpha / at.variance
        logs = gain[..., None] * self._products(at.x, at.alpha, scenes)
        logs = logs.reshape(*logs.shape[:-1], -1, world.variants)  # (B, S', I, K, E)
        most = logs.amax(-1, keepdim=True)
        odds = torch.exp(logs - most)
        total = odds.sum(-1, keepdim=True)
        of_class = (most + torch.log(total / world.variants))[..., 0]
        of_class = torch.cat([torch.zeros_like(of_class[..., :1]), of_class], -1)
        of_class = of_class + self._log_shares[scenes][:, None]
        groups, number = at.conditions.groups, at.conditions.n_groups
        belongs = groups[:, None] == torch.arange(number, device=groups.device)[:, None]
        among = torch.where(belongs[:, None, None], of_class[..., None, :], IMPOSSIBLE)
        mass = torch.logsumexp(among, -1)  # (B, S', I, G)
        # A blank picture's density, without what all scenes share.
        grounds = self._grounds[scenes]
        pixels = at.x[0, :, 0].numel()
        blank = at.x.sum((1, 3)) @ grounds.T
        blank = blank - 0.5 * pixels * at.alpha[..., 0] * grounds.square().sum(-1)
        scene = gain[..., 0] * blank - np.log(len(world.scenes))
        joint = at.conditions.accepted + _patterns(mass, torch.add)[:, None]
        joint = joint + scene[:, None, :, None]  # (B, A, S', P)
        log_joint = torch.logsumexp(joint, -1)
        shares = torch.softmax(joint.flatten(1), -1).reshape(joint.shape).sum(1)
        spread = shares.reshape(*shares.shape[:-1], *[number] * world.cells)
        of_group = torch.stack(
            [_marginal(spread, 2 + cell) for cell in range(world.cells)],
            2,
        )
        place = groups.clamp(min=0)[:, None, None].expand(of_class.shape)
        within = of_class - mass.gather(-1, place)
        within = torch.where((groups < 0)[:, None, None], IMPOSSIBLE, within)
        classes = of_group.gather(-1, place) * torch.exp(within)
        return _Inferred(log_joint, shares.sum(-1), classes, odds / total)


def _patterns(each: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine numbers of groups (B, S, I, G) to those of all patterns, (B, S, G^I)."""
    total = each[:, :, 0]
    for cell in range(1, each.shape[2]):
        total = combine(total[..., None], each[:, :, None, cell]).flatten(2)
    return total


def _marginal(joint: Tensor, axis: int) -> Tensor:
    """Sum over all axes from the third on but one."""
    others = [each for each in range(2, joint.ndim) if each != axis]
    return joint.sum(others) if others else joint
