"""Pictures that a network draws while it is trained, with the exact predictions on their way.

Forward-noised pictures of the world are not what a network sees when it draws: its errors add up
along a chain, and a caption that it missed at one step must be mended at the next ones.  The exact
prediction is known at any x_t, so the network is asked about its own ones too (Ross et al. 2011,
DAgger).  Its prediction, which the update needs anyway, moves the chain on, so that a chain costs
no evaluation of the network.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dng_math import checks
from dng_math.schedules import step_factors
from dng_models.text_to_image.laboratory.captions import Event, caption_of
from dng_models.text_to_image.laboratory.training_batches import Batch, TrainingBatches

_PER_SAMPLE = (-1, 1, 1, 1)


class TrainingChains:
    """Two groups of chains, which take turns: one moves while the other's targets are computed.

    A chain starts from a forward-noised picture of its caption, and takes ancestral steps.  Where
    it ends another one begins.

    Parameters
    ----------
    batches : TrainingBatches
        Whose model, captions and seed the chains have.
    size : int
        Number of chains in a group.
    stride : int
        Length of a step, in timesteps.
    first : tuple of two ints
        A chain starts at a timestep from the first and below the second.
    last : int
        It ends below this timestep, at least ``stride``.

    Attributes
    ----------
    x : Tensor, shape (2, size, 3 cell^2, rows, columns)
        Latents of both groups.
    timesteps, numbers : Tensor, shape (2, size), int64
        Their timesteps, and the number of each chain, on which caption and start depend.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        batches: TrainingBatches,
        size: int,
        *,
        stride: int = 20,
        first: tuple[int, int] = (800, 950),
        last: int = 240,
    ) -> None:
        self._batches = batches
        count = len(batches.alphas_cumprod)
        self.size = checks.integer("size", size, 1)
        self._stride = checks.integer("stride", stride, 1)
        self._last = checks.integer("last", last, stride, count - 1)
        low = checks.integer("first", first[0], self._last, count - 1)
        self._first = (low, checks.integer("first", first[1], low + 1, count))
        shape = (2, size, *batches.model.world.latent_shape)
        self.x = torch.empty(shape, device=batches.model.device)
        self.timesteps = torch.empty(2, size, dtype=torch.int64)
        self.numbers = torch.arange(2 * size).reshape(2, size)
        for group in range(2):
            # In lockstep, all chains of a batch would have the same noise level.
            self._begin(group, np.arange(size), (self._last, self._first[1]))

    def draw(self, step: int) -> Batch:
        """The chains whose turn it is in a step, with the exact predictions.

        Parameters
        ----------
        step : int

        Returns
        -------
        Batch
            On the model's device; no picture is mismatched.
        """
        group = step % 2
        model = self._batches.model
        events = [self._event(int(number))[0] for number in self.numbers[group]]
        captions = [caption_of(event, model.world) for event in events]
        scenes = [caption_of(Event(event.scene), model.world) for event in events]
        x, timesteps = self.x[group].clone(), self.timesteps[group].clone()
        alpha, sigma = self._levels(timesteps)
        return Batch(
            captions,
            scenes,
            torch.zeros(self.size, dtype=torch.bool, device=model.device),
            timesteps.to(model.device),
            alpha.to(x),
            sigma.to(x),
            x,
            model.x0(x, alpha.to(x), sigma.to(x), events),
        )

    def advance(self, step: int, x0: Tensor) -> None:
        """Move the chains whose turn it is by a DDPM step.

        Parameters
        ----------
        step : int
            The one that :meth:`draw` was called with.
        x0 : Tensor, shape (size, 3 cell^2, rows, columns)
            The network's predictions for them.
        """
        group = step % 2
        t = self.timesteps[group]
        alpha_t, sigma_t = (each.numpy() for each in self._levels(t))
        alpha_s, sigma_s = (each.numpy() for each in self._levels(t - self._stride))
        x_factor, x0_factor, variance = (
            torch.from_numpy(each).to(self.x).reshape(_PER_SAMPLE)
            for each in step_factors(alpha_t, sigma_t, alpha_s, sigma_s, 1.0)
        )
        rng = np.random.default_rng([self._batches.seed, step, 3])
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        noise = torch.randn(x0.shape, generator=generator).to(self.x)
        self.x[group] = x_factor * self.x[group] + x0_factor * x0 + variance.sqrt() * noise
        self.timesteps[group] -= self._stride
        ended = np.flatnonzero((self.timesteps[group] < self._last).numpy())
        following = int(self.numbers.max()) + 1
        self.numbers[group, ended] = torch.arange(following, following + len(ended))
        self._begin(group, ended, self._first)

    def state(self) -> dict[str, Tensor]:
        """The tensors on which everything that follows depends, by their names."""
        return {"x": self.x, "timesteps": self.timesteps, "numbers": self.numbers}

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from the tensors of :meth:`state`.

        Parameters
        ----------
        state : dict
            Of chains with the same arguments.

        Raises
        ------
        ValueError
            If a tensor has another shape or dtype.
        """
        for name, mine in self.state().items():
            if state[name].shape != mine.shape or state[name].dtype != mine.dtype:
                raise ValueError(
                    f"{name} must have shape {tuple(mine.shape)} and dtype {mine.dtype}, got "
                    f"{tuple(state[name].shape)} and {state[name].dtype}"
                )
            mine.copy_(state[name])

    def _event(self, number: int) -> tuple[Event, np.random.Generator]:
        """The caption of a chain, and the generator of its other random numbers."""
        rng = np.random.default_rng([self._batches.seed, number, 4])
        return self._batches.event(rng), rng

    def _levels(self, timesteps: Tensor) -> tuple[Any, Any]:
        squares = self._batches.alphas_cumprod[timesteps]
        return squares.sqrt(), (1.0 - squares).sqrt()

    def _begin(self, group: int, places: Any, first: tuple[int, int]) -> None:
        """Start the chains at some places of a group, from forward-noised pictures."""
        if len(places) == 0:
            return
        events, noise = [], []
        generator = torch.Generator()
        for place in places.tolist():
            event, rng = self._event(int(self.numbers[group, place]))
            events.append(event)
            self.timesteps[group, place] = int(rng.integers(*first))
            generator.manual_seed(int(rng.integers(2**63)))
            noise.append(torch.randn(self.x.shape[2:], generator=generator))
        # The last chain's generator goes on: it depends on the chains that begin here alone.
        pictures = self._batches.model.sample(events, generator=generator).latents
        alpha, sigma = (
            each.to(pictures).reshape(_PER_SAMPLE)
            for each in self._levels(self.timesteps[group, places])
        )
        self.x[group, places] = alpha * pictures + sigma * torch.stack(noise).to(pictures)
