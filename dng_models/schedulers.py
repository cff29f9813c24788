"""Two schedulers with the noise that a posterior can be tracked with, where diffusers has none.

Tracking compares how likely the step that was taken is under two predictions.  That needs a step
whose noise is the reverse process's own (eta = 1).  diffusers has it for flow matching nowhere, and
for DDIM only as an argument of ``step`` that pipelines set to 0.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

# A saved pipeline names this module, and is loaded by the base class that diffusers finds in it.
from diffusers import SchedulerMixin as SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dng_kernels import standard_normal
from dng_math import _checks
from dng_models.transition import transition


class EtaDDIMScheduler(DDIMScheduler):  # type: ignore[misc]
    """DDIM whose eta is part of its configuration and no argument of its step.

    Pipelines pass ``eta=0`` to every scheduler whose ``step`` takes one; this one keeps its own.
    Beyond that it differs from diffusers' in two ways: the noise direction of a step belongs to the
    clipped x0 (``use_clipped_model_output=True`` there), so that eta = 1 is DDPM with or without
    clipping, and a run of zero terminal signal-to-noise ratio gives numbers where that, on some
    CPUs, gives NaN.

    Parameters
    ----------
    eta : float
        In [0, 1]: 1, the default, is the DDPM posterior; 0 is deterministic.
    num_train_timesteps, beta_start, ... :
        As for ``diffusers.DDIMScheduler``.
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
        _checks.real("eta", eta, "in [0, 1]", 0.0, 1.0, closed="[]")
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
        """x at the next timestep; DDIM Eq. 12 with the configuration's eta.

        Parameters
        ----------
        model_output : Tensor, shape (B, ...)
            The network's prediction.
        timestep : int or Tensor
            One of ``timesteps``.
        sample : Tensor, shape (B, ...)
            x at that timestep.
        generator : torch.Generator or list of them, optional
            Of the noise; a list has one for each sample.
        variance_noise : Tensor, shape (B, ...), optional
            The noise itself, instead.
        return_dict : bool
            Whether to return an output object or a tuple.

        Returns
        -------
        DDIMSchedulerOutput or tuple of Tensor
            x at the next timestep, and the predicted x0.
        """
        if generator is not None and variance_noise is not None:
            raise ValueError("give generator or variance_noise, not both")
        found = (self.timesteps == int(timestep)).nonzero()
        if len(found) == 0:
            raise ValueError(f"timestep must be one of scheduler.timesteps, got {timestep}")
        taken = transition(self, int(found[0]))
        # Drawn in every step of a run with eta > 0, as diffusers does: the last one's is unused.
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


class PosteriorFlowScheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """Flow matching with the noisy step that its own process has in reverse.

    A flow-matching network knows x_t = (1 - sigma) x0 + sigma eps at every sigma, and so the
    posterior p(x_s | x_t, x0) of the process that adds noise to x_s to get x_t.  A step draws x_s
    from it, with the network's x0: ``x_s = A x_t + B x0 + sqrt(V) z`` with the DDPM posterior's A,
    B and V for alpha = 1 - sigma.  The marginals at every sigma are those of the deterministic
    step.  (``stochastic_sampling=True`` of diffusers draws all of eps anew, which is another
    process.)

    Noise.  Pipelines give the step of a flow scheduler no generator.  Without one, the noise of a
    sample is a function of the noise that its run began with: of the bits of the ``noise`` given to
    ``scale_noise`` (image to image, inpainting), or of its first latents, together with the step.
    Since those come from the pipeline's ``generator``, the seed of an image decides it whatever
    else is in the batch, and the same latents always give the same image.  With a generator, or one
    for each sample, noise is drawn from it as everywhere in diffusers.

    Parameters
    ----------
    eta : float
        In [0, 1]: 1, the default, is the posterior; 0 is ``FlowMatchEulerDiscreteScheduler``.
    num_train_timesteps, shift, ... :
        As for ``diffusers.FlowMatchEulerDiscreteScheduler``; ``stochastic_sampling`` must be False.
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
        _checks.real("eta", eta, "in [0, 1]", 0.0, 1.0, closed="[]")
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

    # Pipelines look for "sigmas" and "timesteps" in the signature before they pass them.
    @functools.wraps(FlowMatchEulerDiscreteScheduler.set_timesteps, assigned=())
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """As of FlowMatchEulerDiscreteScheduler; a new run begins."""
        super().set_timesteps(*args, **kwargs)
        self.noise_keys = None

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself: pipelines ask every scheduler but diffusers' own flow-matching one."""
        return sample

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """As of FlowMatchEulerDiscreteScheduler; the first noise of a run is its samples' key."""
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
        """x at the next sigma.

        Parameters
        ----------
        model_output : Tensor, shape (B, ...)
            The network's velocity, eps - x0.
        timestep : float or Tensor
            One of ``timesteps``.
        sample : Tensor, shape (B, ...)
            x at that timestep.
        generator : torch.Generator or list of them, optional
            Of the noise; None draws it as the class says.
        return_dict : bool
            Whether to return an output object or a tuple.

        Returns
        -------
        FlowMatchEulerDiscreteSchedulerOutput or tuple of Tensor
        """
        # Also counts the step, and finds out which one the first is.
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
    """A key of each sample for :func:`dng_kernels.standard_normal`, of its bits alone.

    Parameters
    ----------
    x : Tensor, shape (B, ...)

    Returns
    -------
    Tensor, shape (B, 2), int64, on the CPU
    """
    rows = x.detach().to("cpu").flatten(1).contiguous().view(torch.uint8).numpy()
    digests = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int64).reshape(-1, 2)
