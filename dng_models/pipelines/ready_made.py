"""Diffusers' pipelines with guidance as an argument of their call.

No code of diffusers is copied: a call with ``rule=`` is the parent class's, guided as by
:func:`dng_models.apply_guidance`.  ``from_pretrained`` loads what the parent class loads, and
``from_pipe`` takes over its components.
"""

# No `from __future__ import annotations`: diffusers reads the components' classes from the
# annotations of a pipeline's __init__, which would then be text.

from collections.abc import Callable, Sequence
from typing import Any

from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
)

from dng_math.rules import Reference, Rule
from dng_models.pairs.denoisers import Denoiser
from dng_models.pipelines.hook import guided_calls
from dng_models.pipelines.trace import Trace


class _Prompted:
    """Mixin of the pipelines with prompts; it must come before diffusers' class."""

    trace: Trace | None = None
    """What guidance did in the last call; None if it was not guided."""

    def __call__(
        self,
        *args: Any,
        rule: Rule | None = None,
        negative_prompts: Sequence[str] | None = None,
        negative_template: str | None = None,
        cfg_scale: float | None = None,
        reference: Reference = "positive",
        divergence_probes: int = 0,
        skip_below: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make images, guided by a rule; ``trace`` then holds what guidance did.

        Parameters
        ----------
        *args, **kwargs
            The parent class's arguments: ``prompt``, ``negative_prompt``, ``num_inference_steps``
            ...  With ``rule``, its ``guidance_scale`` must be above 1, as it is by default; a given
            one is ignored, with a warning unless ``cfg_scale`` is given in its place.
        rule : Rule, optional
            The rule, such as :meth:`dng_math.DynamicNegativeGuidance.tracked`; None: the parent's
            own guidance.
        negative_prompts, negative_template, cfg_scale, reference, divergence_probes, skip_below
            As for :func:`dng_models.apply_guidance`; only with ``rule``.

        Returns
        -------
        StableDiffusionPipelineOutput, StableDiffusionXLPipelineOutput or tuple
            What the parent class returns.

        Raises
        ------
        ValueError, TypeError
            Naming the argument, its value and what is allowed.
        """
        parent: Any = super()
        options = {
            "negative_prompts": negative_prompts,
            "negative_template": negative_template,
            "cfg_scale": cfg_scale,
            "reference": None if reference == "positive" else reference,
            "divergence_probes": divergence_probes or None,
            "skip_below": skip_below,
        }
        if rule is None:
            _refuse_options(options)
            self.trace = None
            return parent.__call__(*args, **kwargs)
        options |= {"divergence_probes": divergence_probes, "reference": reference}
        return _guided(self, rule, options, parent.__call__, args, kwargs)


class DNGStableDiffusionPipeline(_Prompted, StableDiffusionPipeline):  # type: ignore[misc]
    """Stable Diffusion 1 and 2 whose call takes ``rule``; see :meth:`__call__`.

    Examples
    --------
    >>> pipe = DNGStableDiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-2")
    >>> rule = DynamicNegativeGuidance.tracked(18, prior=0.01, temperature=0.3, offset=0.003)
    >>> pipe("A British breakfast", negative_prompt="egg, sausage", rule=rule)
    >>> pipe.trace.plot("scale.png")
    """


class DNGStableDiffusionXLPipeline(_Prompted, StableDiffusionXLPipeline):  # type: ignore[misc]
    """Stable Diffusion XL whose call takes ``rule``; see :meth:`__call__`."""


class DNGDDPMPipeline(DDPMPipeline):  # type: ignore[misc]
    """DDPM with a second, unwanted network, whose images it avoids (DNG section 4).

    Parameters
    ----------
    unet : UNet2DModel
        Network that learned all images.
    scheduler : SchedulerMixin
        As for DDPMPipeline.
    unwanted_unet : UNet2DModel
        Unwanted network, which learned only the images to avoid.  A pipeline that was saved by
        DDPMPipeline has none: ``DNGDDPMPipeline.from_pretrained(path, unwanted_unet=network)``.

    Raises
    ------
    ValueError, TypeError
        If the unwanted network is missing, or is not for images of the same shape.
    """

    model_cpu_offload_seq = "unet->unwanted_unet"
    _optional_components = ["unwanted_unet"]  # noqa: RUF012
    trace: Trace | None = None
    """What guidance did in the last call; None if it was not guided."""

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: DDPMScheduler,
        unwanted_unet: UNet2DModel = None,
    ) -> None:
        # Optional for diffusers, so that the error for a missing one is ours.
        if unwanted_unet is None:
            raise ValueError(
                "unwanted_unet must be given, the network that learned what is to be avoided: "
                "DNGDDPMPipeline.from_pretrained(path, unwanted_unet=network) or "
                ".from_pipe(pipe, unwanted_unet=network); got None"
            )
        if not isinstance(unwanted_unet, UNet2DModel):
            raise TypeError(
                f"unwanted_unet must be a UNet2DModel, got a {type(unwanted_unet).__name__}"
            )
        super().__init__(unet=unet, scheduler=scheduler)
        for name in ("in_channels", "out_channels", "sample_size"):
            own, other = (getattr(net.config, name) for net in (unet, unwanted_unet))
            if own != other:
                raise ValueError(
                    f"unwanted_unet must be for the images of unet, with {name} = {own}, got "
                    f"{other}"
                )
        self.register_modules(unwanted_unet=unwanted_unet)

    def __call__(
        self,
        *args: Any,
        rule: Rule | None = None,
        unwanted: Denoiser | Sequence[Denoiser] | None = None,
        divergence_probes: int = 0,
        skip_below: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make images, guided by a rule; ``trace`` then holds what guidance did.

        Parameters
        ----------
        *args, **kwargs
            DDPMPipeline's arguments: ``batch_size``, ``num_inference_steps``, ``generator`` ...
        rule : Rule, optional
            The rule, such as :meth:`dng_math.DynamicNegativeGuidance.tracked`; None: no guidance.
        unwanted : callable or sequence of callable, optional
            Unwanted network in place of ``unwanted_unet``, only with ``rule``; a sequence has
            several, each with its own posterior.
        divergence_probes, skip_below
            As for :func:`dng_models.apply_guidance`; only with ``rule``.

        Returns
        -------
        ImagePipelineOutput or tuple
            What DDPMPipeline returns.

        Raises
        ------
        ValueError, TypeError
            Naming the argument, its value and what is allowed.
        """
        options = {
            "unwanted": unwanted,
            "divergence_probes": divergence_probes or None,
            "skip_below": skip_below,
        }
        if rule is None:
            _refuse_options(options)
            self.trace = None
            return super().__call__(*args, **kwargs)
        options["unwanted"] = self.unwanted_unet if unwanted is None else unwanted
        options["divergence_probes"] = divergence_probes
        return _guided(self, rule, options, super().__call__, args, kwargs)


def _guided(
    pipe: Any,
    rule: Rule,
    options: dict[str, Any],
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a pipeline under guidance, and record in its ``trace`` what guidance did."""
    pipe.trace = Trace()
    calls = guided_calls(pipe, rule, trace=pipe.trace, **options)
    calls.attach()
    try:
        return calls.run(call, args, kwargs)
    finally:
        calls.detach()


def _refuse_options(options: dict[str, Any]) -> None:
    """Refuse options of guidance that are given without a rule."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} must be left out without rule=<rule>, got {value!r}")
