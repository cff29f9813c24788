"""Two schedulers whose steps have the noise that posterior tracking needs.

Tracking compares how likely the step that was taken is under two predictions.  That needs a step
with the noise of the reverse process itself (eta = 1).  diffusers has no such step for flow
matching, and for DDIM only as an argument of ``step`` that pipelines set to 0.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

# A saved pipeline names this module, and diffusers looks for the base class in it when loading.
from diffusers import SchedulerMixin as SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dng_kernels import standard_normal
from dng_math import checks
from dng_models.pipelines.scheduler_reading import has_eta
from dng_models.pipelines.transitions import transition


@has_eta("DDIMScheduler")
class EtaDDIMScheduler(DDIMScheduler):  # type: ignore[misc]
    """DDIM with eta in its configuration instead of an argument of its step.

    Pipelines pass ``eta=0`` to every scheduler whose ``step`` takes one; this one keeps its own.
    It differs from diffusers' DDIM in two more ways.  The noise direction of a step is that of the
    clipped x0 (``use_clipped_model_output=True`` there), so that eta = 1 is DDPM with or without
    clipping.  With zero terminal signal-to-noise ratio its results are finite, where diffusers'
    are NaN on some CPUs.

    Parameters
    ----------
    eta : float
        Noise of a step, in [0, 1]: 1, the default, is the DDPM posterior; 0 is deterministic.
    num_train_timesteps, beta_start, ... :
        As for ``diffusers.DDIMScheduler``.

    Raises
    ------
    ValueError, TypeError
        If eta is not a number in [0, 1].
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        eta: float = 1.0,
    ) -> None:
        checks.real("eta", eta, "in [0, 1]", 0.0, 1.0, closed="[]")
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            clip_sample=clip_sample,
            set_alpha_to_one=set_alpha_to_one,
            steps_offset=steps_offset,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            clip_sample_range=clip_sample_range,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Step to x at the next timestep: DDIM Eq. 12 with the configuration's eta.

        Parameters
        ----------
        model_output : Tensor, shape (B, ...)
            The network's prediction.
        timestep : int or Tensor
            One of ``timesteps``.
        sample : Tensor, shape (B, ...)
            x at that timestep.
        generator : torch.Generator or list of them, optional
            Generator of the noise; a list has one for each sample.
        variance_noise : Tensor, shape (B, ...), optional
            The noise itself, in place of a generator.
        return_dict : bool
            Whether to return an output object or a tuple.

        Returns
        -------
        DDIMSchedulerOutput or tuple of Tensor
            x at the next timestep, and the predicted x0.

        Raises
        ------
        ValueError
            If ``timestep`` is none of ``timesteps``, or both ``generator`` and ``variance_noise``
            are given.
        """
        if generator is not None and variance_noise is not None:
            raise ValueError("give generator or variance_noise, not both")
        found = (self.timesteps == int(timestep)).nonzero()
        if len(found) == 0:
            raise ValueError(f"timestep must be one of scheduler.timesteps, got {timestep}")
        taken = transition(self, int(found[0]))
        # Drawn in every step if eta > 0, as in diffusers, although the last step does not use it.
        if variance_noise is None and taken.eta > 0:
            variance_noise = randn_tensor(
                model_output.shape,
                generator=generator,
                device=model_output.device,
                dtype=model_output.dtype,
            )
        x_next = taken.step(sample, model_output, variance_noise)
        x0 = taken.x0(sample, model_output)
        if not return_dict:
            return x_next, x0
        return DDIMSchedulerOutput(prev_sample=x_next, pred_original_sample=x0)


@has_eta("FlowMatchEulerDiscreteScheduler")
class PosteriorFlowScheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """Flow matching with noisy steps, drawn from the posterior of its own noising process.

    In flow matching x_t = (1 - sigma) x0 + sigma eps at every sigma, which determines the posterior
    p(x_s | x_t, x0) of the process that adds noise to x_s to get x_t.  A step draws x_s from it
    with the network's x0: ``x_s = A x_t + B x0 + sqrt(V) z``, with the DDPM posterior's A, B and V
    for alpha = 1 - sigma.  The marginals at every sigma are those of the deterministic step.
    (diffusers' ``stochastic_sampling=True`` draws all of eps anew, which is another process.)

    Noise.  Pipelines give the step of a flow scheduler no generator.  Without one, the noise of a
    sample is a function of the step and of the noise that its run began with: the bits of the
    ``noise`` given to ``scale_noise`` (image to image, inpainting), or else of its first latents.
    These come from the pipeline's ``generator``, so an image depends only on its own seed, whatever
    else is in the batch, and the same latents always give the same image.  If a generator is given,
    or one for each sample, noise is drawn from it as everywhere in diffusers.

    Parameters
    ----------
    eta : float
        Noise of a step, in [0, 1]: 1, the default, is the posterior; 0 is
        ``FlowMatchEulerDiscreteScheduler``.
    num_train_timesteps, shift, ... :
        As for ``diffusers.FlowMatchEulerDiscreteScheduler``; ``stochastic_sampling`` must be False.

    Raises
    ------
    ValueError, TypeError
        If eta is not a number in [0, 1], or ``stochastic_sampling`` is True.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
        eta: float = 1.0,
    ) -> None:
        checks.real("eta", eta, "in [0, 1]", 0.0, 1.0, closed="[]")
        if stochastic_sampling:
            raise ValueError(
                "stochastic_sampling must be False, got True: set the noise by eta instead"
            )
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            invert_sigmas=invert_sigmas,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
            stochastic_sampling=stochastic_sampling,
        )
        self.noise_keys: Tensor | None = None

    # Pipelines pass "sigmas" and "timesteps" only if the signature names them.
    @functools.wraps(FlowMatchEulerDiscreteScheduler.set_timesteps, assigned=())
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Set the timesteps as FlowMatchEulerDiscreteScheduler does, and begin a new run."""
        super().set_timesteps(*args, **kwargs)
        self.noise_keys = None

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample unchanged; pipelines call this on all but diffusers' own flow class."""
        return sample

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """Noise samples as the parent class does; the first noise of a run gives the noise keys."""
        if self.noise_keys is None and noise is not None:
            self.noise_keys = sample_keys(noise)
        return super().scale_noise(sample, timestep, noise)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """Step to x at the next sigma.

        Parameters
        ----------
        model_output : Tensor, shape (B, ...)
            The network's velocity, eps - x0.
        timestep : float or Tensor
            One of ``timesteps``.
        sample : Tensor, shape (B, ...)
            x at that timestep.
        generator : torch.Generator or list of them, optional
            Generator of the noise; None: the noise is a function of the keys and the step.
        return_dict : bool
            Whether to return an output object or a tuple.

        Returns
        -------
        FlowMatchEulerDiscreteSchedulerOutput or tuple of Tensor
            x at the next sigma.
        """
        # The parent's step also counts the steps, and finds the index of the first one.
        (x_next,) = super().step(model_output, timestep, sample, return_dict=False)
        if self.config.eta > 0:
            if self.noise_keys is None or self.noise_keys.shape[0] != sample.shape[0]:
                self.noise_keys = sample_keys(sample)
            index = self.step_index - 1
            taken = transition(self, index)
            x = sample.float()
            noise = self._noise(index, x, generator) if taken.step_var > 0 else None
            x_next = taken.step(x, model_output.float(), noise).to(model_output.dtype)
        if not return_dict:
            return (x_next,)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x_next)

    def _noise(
        self, step: int, x: Tensor, generator: torch.Generator | list[torch.Generator] | None
    ) -> Tensor:
        if generator is not None:
            return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        assert self.noise_keys is not None
        return standard_normal(self.noise_keys.to(x.device), x.shape, step=step, dtype=x.dtype)


def sample_keys(x: Tensor) -> Tensor:
    """Keys for :func:`dng_kernels.standard_normal`, each a hash of one sample's bits.

    Parameters
    ----------
    x : Tensor, shape (B, ...)
        The samples.

    Returns
    -------
    Tensor, shape (B, 2), int64, on the CPU
    """
    rows = x.detach().to("cpu").flatten(1).contiguous().view(torch.uint8).numpy()
    digests = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int64).reshape(-1, 2)
