"""Pipelines with guidance as an argument of their call: diffusers' own, guided for its length.

Nothing of diffusers is copied: a call with ``guidance=`` is the parent class's, guided as by
:func:`dng_models.apply_guidance`.  ``from_pretrained`` loads what
the parent class loads, ``from_pipe`` takes over its parts.
"""

# No `from __future__ import annotations`: diffusers reads the classes of a pipeline's components
# from the annotations of its __init__, and text is none.

from collections.abc import Callable, Sequence
from typing import Any

from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
)

from dng_math.guidance import Rule
from dng_models.hook import guided_calls
from dng_models.sampling import Denoiser
from dng_models.trace import Trace


class _Prompted:
    """What the pipelines with prompts share; comes before diffusers' class."""

    trace: Trace | None = None
    """What guidance did in the last call; None if it was not guided."""

    def __call__(
        self,
        *args: Any,
        guidance: Rule | None = None,
        negative_prompts: Sequence[str] | None = None,
        cfg_scale: float | None = None,
        divergence_probes: int = 0,
        skip_below: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make images, guided by a rule; what it did is then in ``trace``.

        Parameters
        ----------
        *args, **kwargs
            Of the parent class: ``prompt``, ``negative_prompt``, ``num_inference_steps`` ...  With
            ``guidance`` its ``guidance_scale`` must be above 1, as it is by default, and is dropped
            with a warning where it is given; ``cfg_scale`` stands for it.
        guidance : Rule, optional
            Such as :meth:`dng_math.DynamicNegativeGuidance.tracked`; None: the parent's own
            guidance.
        negative_prompts, cfg_scale, divergence_probes, skip_below
            As for :func:`dng_models.apply_guidance`; only with ``guidance``.

        Returns
        -------
        StableDiffusionPipelineOutput, StableDiffusionXLPipelineOutput or tuple
            As from the parent class.

        Raises
        ------
        ValueError, TypeError
            Naming the argument, its value and what is allowed.
        """
        parent: Any = super()
        options = {
            "negative_prompts": negative_prompts,
            "cfg_scale": cfg_scale,
            "divergence_probes": divergence_probes or None,
            "skip_below": skip_below,
        }
        if guidance is None:
            _refuse_options(options)
            self.trace = None
            return parent.__call__(*args, **kwargs)
        options["divergence_probes"] = divergence_probes
        return _guided(self, guidance, options, parent.__call__, args, kwargs)


class DNGStableDiffusionPipeline(_Prompted, StableDiffusionPipeline):  # type: ignore[misc]
    """Stable Diffusion 1 and 2 whose call takes ``guidance``; see :meth:`__call__`.

    Examples
    --------
    >>> pipe = DNGStableDiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-2")
    >>> rule = DynamicNegativeGuidance.tracked(18, prior=0.01, temperature=0.3, offset=0.003)
    >>> pipe("A British breakfast", negative_prompt="egg, sausage", guidance=rule)
    >>> pipe.trace.plot("scale.png")
    """


class DNGStableDiffusionXLPipeline(_Prompted, StableDiffusionXLPipeline):  # type: ignore[misc]
    """Stable Diffusion XL whose call takes ``guidance``; see :meth:`__call__`."""


class DNGDDPMPipeline(DDPMPipeline):  # type: ignore[misc]
    """DDPM with a second network, which learned only what is unwanted (DNG section 4).

    Parameters
    ----------
    unet : UNet2DModel
        Network that learned everything.
    scheduler : SchedulerMixin
        As for DDPMPipeline.
    forgetful_unet : UNet2DModel
        Network that learned what is to be avoided.  A pipeline that was saved by DDPMPipeline has
        none: ``DNGDDPMPipeline.from_pretrained(path, forgetful_unet=network)``.

    Raises
    ------
    ValueError, TypeError
        If the second network is missing, or is not for the same images.
    """

    model_cpu_offload_seq = "unet->forgetful_unet"
    _optional_components = ["forgetful_unet"]  # noqa: RUF012
    trace: Trace | None = None
    """What guidance did in the last call; None if it was not guided."""

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: DDPMScheduler,
        forgetful_unet: UNet2DModel = None,
    ) -> None:
        # Optional to diffusers, so that what is said of a missing one is said here.
        if forgetful_unet is None:
            raise ValueError(
                "forgetful_unet must be given, the network that learned what is to be avoided: "
                "DNGDDPMPipeline.from_pretrained(path, forgetful_unet=network) or "
                ".from_pipe(pipe, forgetful_unet=network); got None"
            )
        if not isinstance(forgetful_unet, UNet2DModel):
            raise TypeError(
                f"forgetful_unet must be a UNet2DModel, got a {type(forgetful_unet).__name__}"
            )
        super().__init__(unet=unet, scheduler=scheduler)
        for name in ("in_channels", "out_channels", "sample_size"):
            own, other = (getattr(net.config, name) for net in (unet, forgetful_unet))
            if own != other:
                raise ValueError(
                    f"forgetful_unet must be for the images of unet, with {name} = {own}, got "
                    f"{other}"
                )
        self.register_modules(forgetful_unet=forgetful_unet)

    def __call__(
        self,
        *args: Any,
        guidance: Rule | None = None,
        forgetful: Denoiser | Sequence[Denoiser] | None = None,
        divergence_probes: int = 0,
        skip_below: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make images, guided by a rule; what it did is then in ``trace``.

        Parameters
        ----------
        *args, **kwargs
            Of DDPMPipeline: ``batch_size``, ``num_inference_steps``, ``generator`` ...
        guidance : Rule, optional
            Such as :meth:`dng_math.DynamicNegativeGuidance.tracked`; None: none.
        forgetful : callable or sequence of callable, optional
            Instead of ``forgetful_unet``; a sequence of several, each with its own posterior.
        divergence_probes, skip_below
            As for :func:`dng_models.apply_guidance`; only with ``guidance``.

        Returns
        -------
        ImagePipelineOutput or tuple
            As from DDPMPipeline.

        Raises
        ------
        ValueError, TypeError
            Naming the argument, its value and what is allowed.
        """
        options = {
            "forgetful": forgetful,
            "divergence_probes": divergence_probes or None,
            "skip_below": skip_below,
        }
        if guidance is None:
            _refuse_options(options)
            self.trace = None
            return super().__call__(*args, **kwargs)
        options["forgetful"] = self.forgetful_unet if forgetful is None else forgetful
        options["divergence_probes"] = divergence_probes
        return _guided(self, guidance, options, super().__call__, args, kwargs)


def _guided(
    pipe: Any,
    rule: Rule,
    options: dict[str, Any],
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a pipeline under guidance, and leave what it did in its ``trace``."""
    pipe.trace = Trace()
    calls = guided_calls(pipe, rule, trace=pipe.trace, **options)
    calls.attach()
    try:
        return calls.run(call, args, kwargs)
    finally:
        calls.detach()


def _refuse_options(options: dict[str, Any]) -> None:
    """Options of guidance without guidance."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} must be left out without guidance=<rule>, got {value!r}")
