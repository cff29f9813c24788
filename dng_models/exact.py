"""A network that is never wrong: an exact Gaussian mixture behind the interface of diffusers.

Whatever a trained network adds to the error of a tracked posterior, a scheduler adds its own: its
steps are finite, of some order, and with more or less noise.  To see that error alone the network
must be exact.  A diffused mixture has its scores and posteriors in closed form, so
:class:`MixtureDenoiser` can stand in the place of ``pipe.unet`` in a real pipeline with any
scheduler, and knows the posterior that guidance has to track.

With ``V_k = alpha^2 C_k + sigma^2 I`` and ``y_k = V_k^-1 (x - alpha m_k)`` component k predicts
``eps_k = sigma y_k`` and ``x0_k = m_k + alpha C_k y_k``, and a set of components the mean of those
over its responsibilities (theory: Tweedie's formula, exact for Gaussians, finite at alpha = 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from dng_math import GaussianMixture, _checks
from dng_math.guidance import Rule
from dng_models.hook import apply_guidance
from dng_models.threads import torch_threads
from dng_models.transition import SchedulerRun, scheduler_run

# How far a timestep may lie from one of the scheduler's: float32 of numbers up to 1000.
SAME_TIMESTEP = 1e-3
BLOCK = 2**18  # numbers at a time


class MixtureDenoiser(nn.Module):
    """An exact mixture with the call of ``UNet2DConditionModel`` and ``UNet2DModel``.

    The conditioning embedding of an image chooses what is predicted: one-hot, place 0 the whole
    mixture and place 1 + i the concept i (:meth:`embeddings`); no embedding, or zeros, is the whole
    mixture.  Computed in float64 and differentiable, whatever the dtype of the latents.

    Parameters
    ----------
    mixture : GaussianMixture
        The distribution of the flattened latents.
    concepts : sequence of sequences of int
        Components of each unwanted concept.
    shape : tuple of int
        Of the latents, (channels, height, width), whose product is the mixture's dimension.
    scheduler : SchedulerMixin
        That of the pipeline.  A timestep means the noise level that this scheduler gives it, which
        for sigmas between those of training no network could know.
    dtype : torch.dtype
        Of latents that a pipeline draws for it.

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
        shape = tuple(_checks.integer("shape", length, 1) for length in shape)  # type: ignore[assignment]
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
        # A pipeline reads a network's dtype and device, which are those of its parameters.
        self.anchor = nn.Parameter(torch.zeros((), dtype=dtype), requires_grad=False)
        self.config = FrozenDict(
            in_channels=shape[0],
            out_channels=shape[0],
            # Stable Diffusion 3 takes a number only.
            sample_size=shape[1] if shape[1] == shape[2] else (shape[1], shape[2]),
            patch_size=1,
            time_cond_proj_dim=None,
        )
        self._run: SchedulerRun | None = None
        self._timesteps: Any = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the latents that a pipeline draws."""
        return self.anchor.dtype

    @property
    def device(self) -> torch.device:
        """Where the pipeline was moved."""
        return self.anchor.device

    @property
    def n_concepts(self) -> int:
        """Number M of unwanted concepts."""
        return len(self._constants["chosen"]) - 1

    def embeddings(self, batch: int, concept: int | None = None) -> Tensor:
        """The prompt that stands for a concept, or for the whole mixture.

        Parameters
        ----------
        batch : int
            Number of images.
        concept : int, optional
            Index into ``concepts``; None: the whole mixture.

        Returns
        -------
        Tensor, shape (batch, 1, M + 1)
        """
        embeddings = torch.zeros(batch, 1, self.n_concepts + 1, dtype=self.dtype)
        embeddings[..., self._place(concept)] = 1.0
        return embeddings.to(self.device)

    def prompts(self, batch: int) -> dict[str, Tensor]:
        """Arguments of a pipeline's call: the whole mixture, avoiding the first concept."""
        return {
            "prompt_embeds": self.embeddings(batch),
            "negative_prompt_embeds": self.embeddings(batch, 0),
        }

    def noise_level(self, timestep: Tensor | float) -> tuple[float, float]:
        """(alpha, sigma) of the network's input at one of the scheduler's timesteps.

        Parameters
        ----------
        timestep : Tensor or float
            Of one element, or the same for all images.

        Returns
        -------
        tuple of float

        Raises
        ------
        ValueError
            If it is none of the scheduler's.
        """
        run = self._current()
        value = timestep.reshape(-1)[0] if isinstance(timestep, Tensor) else timestep
        at = np.flatnonzero(np.abs(run.timesteps - float(value)) < SAME_TIMESTEP)
        if len(at) == 0:
            raise ValueError(
                f"timestep must be one of scheduler.timesteps, {run.timesteps}, got {float(value)}"
            )
        # Rounded timesteps may repeat, with different sigmas: the scheduler counts its steps.
        counted = getattr(self.scheduler, "step_index", None)
        step = counted if counted in at else at[0]
        c = run.coefficients
        return float(c.alpha_t[step]), float(c.sigma_t[step])

    def log_posterior(self, x: Tensor, timestep: Tensor | float, concept: int = 0) -> Tensor:
        """Exact log p(concept | x_t), what a tracker estimates.

        Parameters
        ----------
        x : Tensor, shape (B, channels, height, width)
            The network's input.
        timestep : Tensor or float
            One of the scheduler's.
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
        """What the scheduler's prediction type asks for.

        Parameters
        ----------
        x : Tensor, shape (B, channels, height, width)
            The network's input.
        timestep : Tensor or float
            One of the scheduler's.
        places : Tensor, shape (B,), int64
            0 for the whole mixture, 1 + i for concept i.

        Returns
        -------
        Tensor, shape and dtype of x
        """
        alpha, sigma = self.noise_level(timestep)
        of_eps, of_x0 = {
            "epsilon": (1.0, 0.0),
            "v_prediction": (alpha, -sigma),
            "sample": (0.0, 1.0),
            "flow": (1.0, -1.0),
        }[self._current().prediction]
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
            One of the scheduler's, the same for all rows.
        encoder_hidden_states : Tensor, shape (B, L, M + 1), optional
            :meth:`embeddings`; the first token counts.
        timestep_cond, cross_attention_kwargs, added_cond_kwargs : None
            Passed by the pipeline.
        return_dict : bool
            Whether to return an output object or a tuple.
        """
        prediction = self.predict(sample, timestep, self._places(sample, encoder_hidden_states))
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)

    # ------------------------------------------------------------------ inside

    def _current(self) -> SchedulerRun:
        """The scheduler's run: every set_timesteps makes another tensor."""
        if self._run is None or self._timesteps is not self.scheduler.timesteps:
            self._run, self._timesteps = scheduler_run(self.scheduler), self.scheduler.timesteps
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
        """log w_k p_k(x) up to a constant, (B, K), of x (B, D)."""
        constants = self._on(x.device)
        variances = alpha**2 * constants["variances"] + sigma**2
        squares = []
        # Some components at a time: all differences of a data set would not fit into the cache.
        size = max(1, BLOCK // x.numel())
        for start in range(0, len(variances), size):
            some = slice(start, start + size)
            apart = x[:, None] - alpha * constants["means"][some]
            if "axes" in constants:
                apart = torch.einsum("bkd,kde->bke", apart, constants["axes"][some])
            squares.append((apart.square() / variances[some]).sum(-1))
        return constants["log_weights"] - 0.5 * (torch.cat(squares, 1) + variances.log().sum(-1))


class MixtureTransformer(MixtureDenoiser):
    """An exact mixture with the call of ``SD3Transformer2DModel``, for flow matching."""

    def prompts(self, batch: int) -> dict[str, Tensor]:
        """Arguments of a pipeline's call: the whole mixture, avoiding the first concept."""
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


def mixture_pipeline(
    mixture: GaussianMixture,
    concepts: Sequence[Sequence[int]],
    shape: tuple[int, int, int],
    scheduler: Any,
    *,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A real pipeline whose network is an exact mixture, without text encoder and VAE.

    Parameters
    ----------
    mixture, concepts, shape, scheduler, dtype
        As for :class:`MixtureDenoiser`.

    Returns
    -------
    StableDiffusionPipeline, or StableDiffusion3Pipeline for flow-matching Euler schedulers
        Call it with :meth:`MixtureDenoiser.prompts` and ``output_type="latent"``.

    Examples
    --------
    >>> pipe = mixture_pipeline(mixture, [[0]], (2, 2, 2), DDPMScheduler(clip_sample=False))
    >>> pipe(**pipe.unet.prompts(16), guidance_scale=2.0, output_type="latent").images.shape
    torch.Size([16, 2, 2, 2])
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        pipe = StableDiffusion3Pipeline(
            transformer=MixtureTransformer(mixture, concepts, shape, scheduler, dtype=dtype),
            scheduler=scheduler,
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    else:
        pipe = StableDiffusionPipeline(
            unet=MixtureDenoiser(mixture, concepts, shape, scheduler, dtype=dtype),
            scheduler=scheduler,
            vae=None,
            text_encoder=None,
            tokenizer=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass(frozen=True, eq=False)
class MixtureRun:
    """A guided run over an exact mixture; S steps, B images.

    Attributes
    ----------
    latents : Tensor, shape (B, channels, height, width)
        What the pipeline returned.
    tracked, exact : Tensor, shape (S, B), float64
        p(c | x_t) at the beginning of every step: as guidance believed, and as it is.
    scale : Tensor, shape (S, B)
        The guidance scale of every step.
    evaluations, evaluations_saved : int
        Unwanted predictions that were made and that were skipped.
    """

    latents: Tensor
    tracked: Tensor
    exact: Tensor
    scale: Tensor
    evaluations: int
    evaluations_saved: int

    @property
    def error(self) -> float:
        """Mean |tracked - exact| before the last step, the last that a tracker has seen."""
        return float((self.tracked[-1] - self.exact[-1]).abs().mean())

    @property
    def correlation(self) -> float:
        """Of tracked and exact posterior over the images, before the last step."""
        return float(torch.corrcoef(torch.stack([self.tracked[-1], self.exact[-1]]))[0, 1])


def run_mixture(
    pipe: Any,
    rule: Rule,
    *,
    images: int,
    steps: int,
    seed: int = 0,
    eta: float = 0.0,
    divergence_probes: int = 0,
    skip_below: float | None = None,
) -> MixtureRun:
    """Run a pipeline of :func:`mixture_pipeline` under guidance away from its first concept.

    Parameters
    ----------
    pipe : StableDiffusionPipeline or StableDiffusion3Pipeline
        From :func:`mixture_pipeline`.
    rule : Rule
        One that tracks a posterior, such as :meth:`dng_math.DynamicNegativeGuidance.tracked`.
    images, steps, seed : int
        Batch size, number of inference steps, and seed of the pipeline's generator.
    eta : float
        For a DDIM scheduler, as users give it to the pipeline's call.
    divergence_probes, skip_below
        As for :func:`dng_models.apply_guidance`.

    Returns
    -------
    MixtureRun
    """
    if not isinstance(getattr(pipe, "unet", getattr(pipe, "transformer", None)), MixtureDenoiser):
        raise TypeError(f"pipe must be a pipeline of mixture_pipeline, got {pipe!r}")
    _checks.integer("images", images, 1)
    _checks.integer("steps", steps, 1)
    _checks.integer("seed", seed, 0)
    _checks.real("eta", eta, "in [0, 1]", 0.0, 1.0, closed="[]")
    flow = isinstance(pipe, StableDiffusion3Pipeline)
    network = pipe.transformer if flow else pipe.unet
    exact: list[Tensor] = []

    def look(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        x, t = (named["hidden_states"], named["timestep"]) if flow else given
        exact.append(network.log_posterior(x[:images], t).exp())

    watching = network.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with (
            torch_threads(work=images * network.mixture.means.size),
            apply_guidance(
                pipe, rule, divergence_probes=divergence_probes, skip_below=skip_below
            ) as trace,
        ):
            latents = pipe(
                **network.prompts(images),
                **({} if flow else {"eta": eta}),
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(seed),
                output_type="latent",
            ).images
    finally:
        watching.remove()
    if trace.log_posterior is None:
        raise ValueError(f"rule must track a posterior, got {rule!r}")
    return MixtureRun(
        latents=latents,
        tracked=trace.log_posterior.double().exp(),
        exact=torch.stack(exact).cpu(),
        scale=trace.scale,
        evaluations=trace.evaluations,
        evaluations_saved=trace.evaluations_saved,
    )


def _axes(mixture: GaussianMixture) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """Variances (K, D) of every component along its axes (K, D, D); None: the coordinate axes."""
    covariances = mixture.covariances
    if covariances.ndim == 3:
        variances, axes = np.linalg.eigh(covariances)
        return variances, axes
    if covariances.ndim == 1:
        covariances = covariances[:, None]
    return np.array(np.broadcast_to(covariances, mixture.means.shape)), None
