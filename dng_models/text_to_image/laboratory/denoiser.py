"""The exact model of a world with the interface of diffusers' UNet."""

from __future__ import annotations

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from dng_math import checks
from dng_models.text_to_image.laboratory.captions import Event
from dng_models.text_to_image.laboratory.exact_model import ExactModel
from dng_models.text_to_image.laboratory.reader import EmbeddingReader

PREDICTIONS = ("epsilon", "v_prediction", "sample")


class ExactDenoiser(nn.Module):
    """The exact model of a world with the call of ``UNet2DConditionModel``.

    Like a trained network it knows the noise level by the timestep, from the schedule of training,
    whichever scheduler takes the steps.  Predictions are computed in float32, or in float64 for
    latents of that dtype, and are differentiable.

    Parameters
    ----------
    reader : EmbeddingReader
        Reads the captions of its world from their embeddings.
    alphas_cumprod : Tensor, shape (T,)
        Squares of alpha at the timesteps of training.
    prediction_type : {"epsilon", "v_prediction", "sample"}
        What it returns.
    dtype : torch.dtype
        Dtype of the latents that a pipeline draws for it.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        reader: EmbeddingReader,
        alphas_cumprod: Tensor,
        *,
        prediction_type: str = "epsilon",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        checks.choice("prediction_type", prediction_type, PREDICTIONS)
        squares = np.asarray(alphas_cumprod, dtype=np.float64)
        if squares.ndim != 1 or len(squares) < 2 or squares.min() < 0.0 or squares.max() > 1.0:
            raise ValueError(
                f"alphas_cumprod must be two or more numbers in [0, 1], got shape {squares.shape}"
            )
        self.world = world = reader.world
        self._read = reader
        self.prediction_type = prediction_type
        self._squares = squares
        self._models: dict[tuple[torch.device, torch.dtype], ExactModel] = {}
        # Pipelines read a network's dtype and device from its parameters.
        self.anchor = nn.Parameter(torch.zeros((), dtype=dtype), requires_grad=False)
        channels, rows, columns = world.latent_shape
        self.config = FrozenDict(
            in_channels=channels,
            out_channels=channels,
            sample_size=rows if rows == columns else (rows, columns),
            cross_attention_dim=2,
            time_cond_proj_dim=None,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the latents that a pipeline draws."""
        return self.anchor.dtype

    @property
    def device(self) -> torch.device:
        """The device that the pipeline was moved to."""
        return self.anchor.device

    def exact(self, x: Tensor) -> ExactModel:
        """The exact model for latents on a device: in float64 for those, in float32 for others."""
        key = (x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)
        if key not in self._models:
            self._models[key] = ExactModel(self.world, device=key[0], dtype=key[1])
        return self._models[key]

    def noise_level(self, timestep: Tensor | float) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at a timestep; between those of training, log(alpha/sigma) is linear.

        Parameters
        ----------
        timestep : Tensor or float
            One timestep, or one for each image.

        Returns
        -------
        tuple of Tensor, float64, shape of timestep

        Raises
        ------
        ValueError
            If it is not within the schedule of training.
        """
        # As a list: within a forward derivative the results of tensors' methods have no data.
        told = timestep.tolist() if isinstance(timestep, Tensor) else timestep
        t = np.asarray(told, dtype=np.float64)
        last = len(self._squares) - 1
        if not np.all((t >= 0) & (t <= last)):
            raise ValueError(f"timestep must be from 0 to {last}, got {t.tolist()}")
        below = np.floor(t).astype(np.int64)
        above = np.minimum(below + 1, last)
        share = t - below
        squares = self._squares[below]
        if np.any(share > 0.0):
            with np.errstate(divide="ignore"):
                odds = np.log(self._squares) - np.log1p(-self._squares)
            between = (1.0 - share) * odds[below] + share * odds[above]
            squares = np.where(share > 0.0, 1.0 / (1.0 + np.exp(-between)), squares)
        return torch.as_tensor(np.sqrt(squares)), torch.as_tensor(np.sqrt(1.0 - squares))

    def events(self, x: Tensor, embeddings: Tensor | None) -> list[Event]:
        """What the embedding of each image says; nothing without embeddings.

        Parameters
        ----------
        x : Tensor, shape (B, ...)
        embeddings : Tensor, shape (B, L, W), optional
            Of :class:`.reader.CaptionEncoder`.

        Raises
        ------
        ValueError
            If they have another shape, or a caption cannot be read.
        """
        if embeddings is None:
            return [Event()] * len(x)
        if len(embeddings) != len(x):
            raise ValueError(
                f"encoder_hidden_states must have a row for each of {len(x)} images, got "
                f"{len(embeddings)}"
            )
        return self._read(embeddings)

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
        sample : Tensor, shape (B, 3 cell^2, rows, columns)
            The network's input.
        timestep : Tensor or float
            One timestep, or one for each row.
        encoder_hidden_states : Tensor, shape (B, L, W), optional
            Embeddings of captions.
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
            As for :meth:`noise_level`, :meth:`events` and :meth:`.ExactModel.conditions`.
        """
        model = self.exact(sample)
        alpha, sigma = self.noise_level(timestep)
        events = self.events(sample, encoder_hidden_states)
        x0, noise = model.x0_and_noise(sample, alpha, sigma, events)
        if self.prediction_type == "epsilon":
            prediction = noise
        elif self.prediction_type == "sample":
            prediction = x0
        else:
            shape = (-1, 1, 1, 1)
            a, s = (level.to(x0).reshape(shape) for level in (alpha, sigma))
            prediction = a * noise - s * x0
        prediction = prediction.to(sample.dtype)
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)
