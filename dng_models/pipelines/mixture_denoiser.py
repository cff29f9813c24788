"""An exact Gaussian mixture with the interface of diffusers' networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from dng_math import GaussianMixture, checks
from dng_models.pipelines.noise_levels import scheduler_levels
from dng_models.pipelines.transitions import SchedulerRun

# Tolerance of a timestep: float32 rounding of numbers up to 1000.
SAME_TIMESTEP = 1e-3
BLOCK = 2**18  # numbers computed at a time


class MixtureDenoiser(nn.Module):
    """An exact mixture with the call of ``UNet2DConditionModel`` and ``UNet2DModel``.

    The embedding of an image, one-hot, chooses the distribution: place 0 is the whole mixture,
    place 1 + i is concept i (:meth:`embeddings`); without an embedding, or with zeros, it is the
    whole mixture.  Predictions are computed in float64 for latents of any dtype, and are
    differentiable.

    Parameters
    ----------
    mixture : GaussianMixture
        The distribution of the flattened latents.
    concepts : sequence of sequences of int
        Indices of each unwanted concept's components.
    shape : tuple of int
        Shape (channels, height, width) of the latents; its product is the mixture's dimension.
    scheduler : SchedulerMixin
        The pipeline's scheduler, which gives the noise level of a timestep: the timestep alone does
        not tell sigmas that lie between those of training.
    dtype : torch.dtype
        Dtype of the latents that a pipeline draws for it.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        mixture: GaussianMixture,
        concepts: Sequence[Sequence[int]],
        shape: tuple[int, int, int],
        scheduler: Any,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not isinstance(mixture, GaussianMixture):
            raise TypeError(f"mixture must be a dng_math.GaussianMixture, got {mixture!r}")
        if isinstance(concepts, str) or not isinstance(concepts, Sequence):
            raise TypeError(f"concepts must be a sequence of sequences of int, got {concepts!r}")
        wanted = (
            f"(channels, height, width) of {mixture.dim} numbers in all, the mixture's dimension"
        )
        if isinstance(shape, str) or not isinstance(shape, Sequence):
            raise TypeError(f"shape must be {wanted}, got {shape!r}")
        shape = tuple(checks.integer("shape", length, 1) for length in shape)  # type: ignore[assignment]
        if len(shape) != 3 or int(np.prod(shape)) != mixture.dim:
            raise ValueError(f"shape must be {wanted}, got {shape}")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype}")
        if isinstance(scheduler, type) or not hasattr(scheduler, "set_timesteps"):
            raise TypeError(f"scheduler must be a scheduler of diffusers, got {scheduler!r}")
        groups = [np.arange(mixture.n_components)]
        groups += [mixture.component_indices("concepts", concept) for concept in concepts]
        chosen = np.full((len(groups), mixture.n_components), -np.inf)
        for row, group in zip(chosen, groups, strict=True):
            row[group] = 0.0
        with np.errstate(divide="ignore"):
            log_weights = np.log(mixture.weights)
        variances, axes = _axes(mixture)
        self.mixture = mixture
        self.shape = shape
        self.scheduler = scheduler
        self._constants = {
            "chosen": torch.from_numpy(chosen),
            "log_weights": torch.from_numpy(log_weights),
            "means": torch.tensor(mixture.means),
            "variances": torch.from_numpy(variances),
        }
        if axes is not None:
            self._constants["axes"] = torch.from_numpy(axes)
        # Pipelines read a network's dtype and device from its parameters.
        self.anchor = nn.Parameter(torch.zeros((), dtype=dtype), requires_grad=False)
        self.config = FrozenDict(
            in_channels=shape[0],
            out_channels=shape[0],
            # Stable Diffusion 3 takes only a single number.
            sample_size=shape[1] if shape[1] == shape[2] else (shape[1], shape[2]),
            patch_size=1,
            time_cond_proj_dim=None,
        )
        self._run: SchedulerRun | None = None
        self._timesteps: Any = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the latents that a pipeline draws."""
        return self.anchor.dtype

    @property
    def device(self) -> torch.device:
        """The device that the pipeline was moved to."""
        return self.anchor.device

    @property
    def n_concepts(self) -> int:
        """Number M of unwanted concepts."""
        return len(self._constants["chosen"]) - 1

    def embeddings(self, batch: int, concept: int | None = None) -> Tensor:
        """Prompt embeddings that stand for a concept, or for the whole mixture.

        Parameters
        ----------
        batch : int
            Number of images.
        concept : int, optional
            Index into ``concepts``; None: the whole mixture.

        Returns
        -------
        Tensor, shape (batch, 1, M + 1)

        Raises
        ------
        ValueError
            If there is no such concept.
        """
        embeddings = torch.zeros(batch, 1, self.n_concepts + 1, dtype=self.dtype)
        embeddings[..., self._place(concept)] = 1.0
        return embeddings.to(self.device)

    def prompts(self, batch: int) -> dict[str, Tensor]:
        """Prompts for a pipeline's call: the whole mixture, and the first concept as the negative.

        Parameters
        ----------
        batch : int
            Number of images.

        Returns
        -------
        dict of str to Tensor
        """
        return {
            "prompt_embeds": self.embeddings(batch),
            "negative_prompt_embeds": self.embeddings(batch, 0),
        }

    def noise_level(self, timestep: Tensor | float) -> tuple[float, float]:
        """(alpha, sigma) of the network's input at one of the scheduler's timesteps.

        Parameters
        ----------
        timestep : Tensor or float
            The timestep; a tensor has one element, or the same for all images.

        Returns
        -------
        tuple of float

        Raises
        ------
        ValueError
            If it is none of the scheduler's timesteps.
        """
        run = self._current()
        value = timestep.reshape(-1)[0] if isinstance(timestep, Tensor) else timestep
        at = np.flatnonzero(np.abs(run.timesteps - float(value)) < SAME_TIMESTEP)
        if len(at) == 0:
            raise ValueError(
                f"timestep must be one of scheduler.timesteps, {run.timesteps}, got {float(value)}"
            )
        # Rounded timesteps may repeat with different sigmas: take the step the scheduler is at.
        counted = getattr(self.scheduler, "step_index", None)
        step = counted if counted in at else at[0]
        c = run.coefficients
        return float(c.alpha_t[step]), float(c.sigma_t[step])

    def log_posterior(self, x: Tensor, timestep: Tensor | float, concept: int = 0) -> Tensor:
        """Exact log p(concept | x_t), which a tracker estimates.

        Parameters
        ----------
        x : Tensor, shape (B, channels, height, width)
            The network's input.
        timestep : Tensor or float
            One of the scheduler's timesteps.
        concept : int
            Index into ``concepts``.

        Returns
        -------
        Tensor, shape (B,), float64
        """
        log_joint = self._log_joint(x.flatten(1).double(), *self.noise_level(timestep))
        chosen = self._on(x.device)["chosen"][self._place(concept)]
        return torch.logsumexp(log_joint + chosen, -1) - torch.logsumexp(log_joint, -1)

    def predict(self, x: Tensor, timestep: Tensor | float, places: Tensor) -> Tensor:
        """The exact prediction, of the scheduler's prediction type.

        Parameters
        ----------
        x : Tensor, shape (B, channels, height, width)
            The network's input.
        timestep : Tensor or float
            One of the scheduler's timesteps.
        places : Tensor, shape (B,), int64
            Distribution of each image: 0 for the whole mixture, 1 + i for concept i.

        Returns
        -------
        Tensor, shape and dtype of x
        """
        alpha, sigma = self.noise_level(timestep)
        of_eps, of_x0 = {
            "epsilon": (1.0, 0.0),
            "v_prediction": (alpha, -sigma),
            "sample": (0.0, 1.0),
            "flow_prediction": (1.0, -1.0),
        }[self._current().prediction_type]
        constants = self._on(x.device)
        flat = x.flatten(1).double()
        log_joint = self._log_joint(flat, alpha, sigma)
        shares = torch.softmax(log_joint + constants["chosen"][places], -1)
        means, variances = constants["means"], constants["variances"]
        factors = (of_eps * sigma + of_x0 * alpha * variances) / (alpha**2 * variances + sigma**2)
        if "axes" in constants:
            axes = constants["axes"]
            apart = torch.einsum("bkd,kde->bke", flat[:, None] - alpha * means, axes)
            prediction = torch.einsum("bk,bke,kde->bd", shares, apart * factors, axes)
        else:
            # sum_k r_k f_k (x - alpha m_k), as two products of matrices.
            prediction = (shares @ factors) * flat - alpha * (shares @ (factors * means))
        prediction = prediction + of_x0 * (shares @ means)
        return prediction.reshape(x.shape).to(x.dtype)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        timestep_cond: None = None,
        cross_attention_kwargs: None = None,
        added_cond_kwargs: None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """The prediction for every row of a batch.

        Parameters
        ----------
        sample : Tensor, shape (B, channels, height, width)
            The network's input.
        timestep : Tensor or float
            One of the scheduler's timesteps, the same for all rows.
        encoder_hidden_states : Tensor, shape (B, L, M + 1), optional
            Embeddings as from :meth:`embeddings`; only the first token is read.
        timestep_cond, cross_attention_kwargs, added_cond_kwargs : None
            Not used; pipelines pass them.
        return_dict : bool
            Whether to return an output object or a tuple.

        Returns
        -------
        UNet2DConditionOutput or tuple of Tensor
            The prediction, shape and dtype of ``sample``.

        Raises
        ------
        ValueError
            If the timestep is none of the scheduler's, or the embeddings have another shape.
        """
        prediction = self.predict(sample, timestep, self._places(sample, encoder_hidden_states))
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)

    # ------------------------------------------------------------------ inside

    def _current(self) -> SchedulerRun:
        """The scheduler's run, read again when set_timesteps has made a new tensor."""
        if self._run is None or self._timesteps is not self.scheduler.timesteps:
            self._run, self._timesteps = scheduler_levels(self.scheduler), self.scheduler.timesteps
        return self._run

    def _place(self, concept: int | None) -> int:
        if concept is None:
            return 0
        if not 0 <= concept < self.n_concepts:
            raise ValueError(
                f"concept must be None or from 0 to {self.n_concepts - 1}, got {concept}"
            )
        return concept + 1

    def _places(self, x: Tensor, embeddings: Tensor | None) -> Tensor:
        if embeddings is None:
            return torch.zeros(len(x), dtype=torch.int64, device=x.device)
        if embeddings.ndim != 3 or embeddings.shape[::2] != (len(x), self.n_concepts + 1):
            raise ValueError(
                f"encoder_hidden_states must have shape ({len(x)}, L, {self.n_concepts + 1}), got "
                f"{tuple(embeddings.shape)}"
            )
        return embeddings[:, 0].argmax(-1)

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        if self._constants["means"].device != device:
            self._constants = {name: value.to(device) for name, value in self._constants.items()}
        return self._constants

    def _log_joint(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """log w_k p_k(x) for x (B, D), up to a constant; (B, K)."""
        constants = self._on(x.device)
        variances = alpha**2 * constants["variances"] + sigma**2
        squares = []
        # In blocks of components, because all differences at once would not fit into the cache.
        size = max(1, BLOCK // x.numel())
        for start in range(0, len(variances), size):
            some = slice(start, start + size)
            apart = x[:, None] - alpha * constants["means"][some]
            if "axes" in constants:
                apart = torch.einsum("bkd,kde->bke", apart, constants["axes"][some])
            squares.append((apart.square() / variances[some]).sum(-1))
        return constants["log_weights"] - 0.5 * (torch.cat(squares, 1) + variances.log().sum(-1))


class MixtureTransformer(MixtureDenoiser):
    """An exact mixture with the call of ``SD3Transformer2DModel``, for flow matching.

    Parameters and errors as for :class:`MixtureDenoiser`.
    """

    def prompts(self, batch: int) -> dict[str, Tensor]:
        """Prompts for a pipeline's call; see :meth:`MixtureDenoiser.prompts`."""
        pooled = torch.zeros(batch, 1, dtype=self.dtype, device=self.device)
        return {
            **super().prompts(batch),
            "pooled_prompt_embeds": pooled,
            "negative_pooled_prompt_embeds": pooled,
        }

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        timestep: Tensor | float = 0.0,
        joint_attention_kwargs: None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The prediction for every row of a batch; see :meth:`MixtureDenoiser.forward`."""
        places = self._places(hidden_states, encoder_hidden_states)
        prediction = self.predict(hidden_states, timestep, places)
        return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)


def _axes(mixture: GaussianMixture) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """Variances (K, D) of the components along their axes (K, D, D); None: coordinate axes."""
    covariances = mixture.covariances
    if covariances.ndim == 3:
        variances, axes = np.linalg.eigh(covariances)
        return variances, axes
    if covariances.ndim == 1:
        covariances = covariances[:, None]
    return np.array(np.broadcast_to(covariances, mixture.means.shape)), None
