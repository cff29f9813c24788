"""Guidance for any diffusers pipeline whose layout is known, without another pipeline class.

A guided pipeline is the same object, whose call is watched (its class is replaced by a subclass,
as ``torch.nn.utils.parametrize`` does it with modules).  During a call the network's answers pass
through :class:`dng_models.guided_call.GuidedCall`, which knows from the class's row in
:mod:`dng_models.layouts` where prompts, latents and times are, and puts the guided prediction in
their place; the scheduler's step is watched too, so that what the sampler really did is known.
Outside of the guided pipeline's own calls nothing is changed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dng_math.guidance import Rule
from dng_models import rows
from dng_models.call_begun import Concept, check_text, maskless
from dng_models.guidance import GuidedChain
from dng_models.guided_call import GuidedCalls
from dng_models.layouts import Layout, layout_of
from dng_models.sampling import Denoiser
from dng_models.trace import Trace

_GUIDED = "_dng_guided_calls"
Negative = str | Tensor | Mapping[str, Tensor]


def apply_guidance(
    pipe: Any,
    rule: Rule | Sequence[Rule],
    *,
    negative_prompts: Sequence[Negative] | None = None,
    negative_classes: Sequence[int] | None = None,
    cfg_scale: float | None = None,
    forgetful: Denoiser | Sequence[Denoiser] | None = None,
    eta: float | None = None,
    divergence_probes: int = 0,
    skip_below: float | None = None,
    mask: Tensor | None = None,
    initial_log_posterior: Tensor | None = None,
    layout: Layout | None = None,
) -> Trace:
    """Guide a diffusers pipeline by a rule, until :func:`remove_guidance`.

    Base and unwanted prediction are those of the positive and the negative prompt of the
    pipeline's call.  A ``guidance_scale`` that is given to that call (``true_cfg_scale`` of Flux
    and others) is dropped with a warning unless ``cfg_scale`` stands for it; the
    ``guidance_scale`` of a network that was distilled from guidance is an input of it, and keeps
    its effect.  Calls of other pipelines that share the network are not guided.

    Parameters
    ----------
    pipe : DiffusionPipeline
        Of a class in :data:`dng_models.layouts.LAYOUTS`, or of a subclass of one.
    rule : Rule or sequence of Rule
        :meth:`dng_math.DynamicNegativeGuidance.tracked`, or any of :mod:`dng_math.guidance`; a
        sequence of one DNG for each of the negatives, with its own prior and scale.
    negative_prompts : sequence of str, Tensor or mapping, optional
        Unwanted concepts, for every image; DNG gives each its own posterior, the other rules take
        one.  The pipeline's negative prompt is then the unconditional one.  In place of a text its
        embeddings: a tensor for the call's ``negative_prompt_embeds``, or a mapping from names of
        the call's arguments (``negative_pooled_prompt_embeds`` ...), with one row or one for each
        prompt of the call.
    negative_classes : sequence of int, optional
        Unwanted classes, for pipelines that know classes in place of prompts (DiT).
    cfg_scale : float, optional
        Classifier-free guidance beneath the rule: base = unconditional + cfg_scale (positive -
        unconditional), and the posterior compares negative with positive.  None: base = positive.
    forgetful : callable or sequence of callable
        For a pipeline without prompts: what learned only the unwanted, as for
        :func:`dng_models.sample`, called with the network's own latents and times; a sequence of
        several, each with its own posterior.
    eta : float, optional
        Of a DDIM scheduler.  It is read from the pipeline's call; where it is given here too, the
        two must agree.
    divergence_probes : int
        For samplers with less noise than DDPM's, whose tracked posterior is wrong without it:
        number of random vectors of Hutchinson's estimate of the divergence, one more evaluation
        with a forward derivative each.
    skip_below : float, optional
        Do not evaluate what is unwanted for images while an upper bound of their scale is below
        this; a tenth of g prior / (1 - prior), the first one, is a good choice.
    mask : Tensor, optional
        For inpainting with a network that was not trained for it: 1 where latents are repainted;
        broadcasts to the scheduler's latents.
    initial_log_posterior : Tensor, optional
        log p(c | x) of every image where the call begins, shape (B,), or (M, B) for M concepts, in
        place of the prior: for a pipeline that goes on with the latents of another one (a refiner),
        ``trace.final_log_posterior`` of that one's trace.
    layout : Layout, optional
        How the pipeline shows prompts to its network, for classes that are in no table.

    Returns
    -------
    Trace
        What guidance did in each call of the pipeline; as a context manager it removes the
        guidance at the end of its block.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed, or why the pipeline cannot be guided;
        during a call of the pipeline, if it has no negative prompt, if what it shows its network is
        not what the layout says, or if its batch, scheduler or network changes on the way.

    Notes
    -----
    A guided pipeline can be saved (as the pipeline it is), and cannot be copied or pickled.  Where
    further prompts or the check of a layout need it, a call is begun once more for each of them and
    stopped where it first calls its network: text encoders, and encoders of conditioning images,
    run again; the random numbers are those of the call.

    Examples
    --------
    >>> with apply_guidance(pipe, DynamicNegativeGuidance.tracked(18, 0.01, 0.3, 0.003)) as trace:
    ...     image = pipe("A British breakfast", negative_prompt="egg, sausage").images[0]
    >>> trace.plot("scale.png")
    """
    if isinstance(pipe, DiffusionPipeline) and _GUIDED in pipe.__dict__:
        raise ValueError(
            "pipe must not be guided already: call remove_guidance(pipe) first, or leave the block "
            "of the other apply_guidance"
        )
    calls = guided_calls(
        pipe,
        rule,
        negative_prompts=negative_prompts,
        negative_classes=negative_classes,
        cfg_scale=cfg_scale,
        forgetful=forgetful,
        eta=eta,
        divergence_probes=divergence_probes,
        skip_below=skip_below,
        mask=mask,
        initial_log_posterior=initial_log_posterior,
        layout=layout,
        trace=Trace(lambda: remove_guidance(pipe)),
    )
    calls.attach()
    kind: Any = type(pipe)
    pipe.__dict__[_GUIDED] = calls
    pipe.__class__ = _guided_class(kind)
    return calls.chain.trace


def remove_guidance(pipe: Any) -> None:
    """Take the guidance off a pipeline; nothing happens if there is none.

    Raises
    ------
    TypeError
        If it is no pipeline of diffusers.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"pipe must be a diffusers pipeline, got {pipe!r}")
    calls = getattr(pipe, "__dict__", {}).pop(_GUIDED, None)
    if calls is not None:
        pipe.__class__ = type(pipe).__mro__[1]
        calls.detach()


def guided_calls(
    pipe: Any,
    rule: Rule | Sequence[Rule],
    *,
    trace: Trace,
    negative_prompts: Sequence[Negative] | None = None,
    negative_classes: Sequence[int] | None = None,
    forgetful: Denoiser | Sequence[Denoiser] | None = None,
    layout: Layout | None = None,
    **options: Any,
) -> GuidedCalls:
    """Check what :func:`apply_guidance` is given, and make what guides the calls of a pipeline.

    Parameters
    ----------
    pipe, rule, negative_prompts, negative_classes, forgetful, layout
        As for :func:`apply_guidance`.
    trace : Trace
        Where to record.
    options
        The other arguments of :func:`apply_guidance`.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise ValueError(
            f"pipe must be a diffusers pipeline, got a {type(pipe).__name__}; for modular "
            "pipelines set dng_models.DynamicNegativeGuider as their guider"
        )
    if layout is not None and not isinstance(layout, Layout):
        raise TypeError(f"layout must be a dng_models.layouts.Layout, got {layout!r}")
    row = layout_of(pipe) if layout is None else layout
    if not hasattr(pipe, "scheduler"):
        raise ValueError(f"pipe must have a scheduler, got a {type(pipe).__name__} without one")
    if not any(isinstance(getattr(pipe, name, None), nn.Module) for name in row.network):
        raise ValueError(
            f"pipe must have a network pipe.{' or pipe.'.join(row.network)}, got a "
            f"{type(pipe).__name__} without one"
        )
    concepts = _concepts(pipe, row, negative_prompts, negative_classes)
    if isinstance(forgetful, Sequence) and len(forgetful) == 0:
        raise ValueError(f"forgetful must not be an empty sequence, got {forgetful!r}")
    if row.calls == "alone":
        several = len(forgetful) if isinstance(forgetful, Sequence) else None
    else:
        if forgetful is not None:
            raise ValueError(
                f"forgetful must be None: a {type(pipe).__name__} has prompts, and avoids its "
                f"negative_prompt; got {forgetful!r}"
            )
        several = None if concepts is None else len(concepts)
    chain = GuidedChain(rule, concepts=several, trace=trace, **options)
    if row.labels is not None and chain.needs_negative and concepts is None:
        raise ValueError(
            f"negative_classes must be given: a {type(pipe).__name__} has no negative prompt, only "
            "classes"
        )
    denoisers = _denoisers(chain, forgetful, pipe) if row.calls == "alone" else []
    _check_inpainting(pipe, row, chain)
    return GuidedCalls(pipe, row, chain, concepts, denoisers)


# ---------------------------------------------------------------------- the pipeline's class


@functools.cache
def _guided_class(kind: Any) -> type:
    """The class of a guided pipeline: the same under the same name, whose calls are watched."""

    class Guided(kind):  # type: ignore[misc]
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            # ``type(pipe)(**pipe.components)``: another pipeline, which nobody guides.
            return kind(*args, **kwargs)

        @functools.wraps(kind.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.__dict__[_GUIDED].run(super().__call__, args, kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:
            raise TypeError(
                f"a guided {kind.__name__} cannot be copied or pickled: the copy would share the "
                "original's guidance. Call remove_guidance(pipe) first, and guide the copy itself"
            )

    Guided.__name__, Guided.__qualname__ = kind.__name__, kind.__qualname__
    Guided.__module__, Guided.__doc__ = kind.__module__, kind.__doc__
    return Guided


# ---------------------------------------------------------------------- the border


def _concepts(
    pipe: Any,
    row: Layout,
    negative_prompts: Sequence[Negative] | None,
    negative_classes: Sequence[int] | None,
) -> list[Concept] | None:
    """What is unwanted beside the pipeline's own negative prompt; None if nothing is."""
    kind = type(pipe).__name__
    if negative_classes is not None:
        if row.labels is None:
            raise ValueError(
                f"negative_classes must be None: a {kind} does not know classes by number; got "
                f"{negative_classes!r}"
            )
        if negative_prompts is not None:
            raise ValueError("negative_prompts must be None where negative_classes are given")
        return _classes(pipe, negative_classes)
    if negative_prompts is None:
        return None
    if row.calls == "alone" or row.labels is not None:
        cure = "forgetful=" if row.labels is None else "negative_classes="
        raise ValueError(
            f"negative_prompts must be None: a {kind} has no prompts; give {cure}, got "
            f"{negative_prompts!r}"
        )
    if isinstance(negative_prompts, str | Tensor | Mapping):
        raise TypeError(
            "negative_prompts must be a sequence of str, one a concept, got "
            f"{_shown(negative_prompts)}; a single one belongs into the pipeline's negative_prompt"
        )
    if not isinstance(negative_prompts, Sequence):
        raise TypeError(
            f"negative_prompts must be a sequence of str, one a concept, got {negative_prompts!r}"
        )
    found = [_concept(pipe, each) for each in negative_prompts]
    if not found:
        raise ValueError(
            "negative_prompts must be one or more non-empty str (or their embeddings), got "
            f"{negative_prompts!r}"
        )
    return found


def _classes(pipe: Any, classes: Sequence[int]) -> list[Concept]:
    known = getattr(_config(pipe.transformer), "num_embeds_ada_norm", None)
    if isinstance(classes, str) or not isinstance(classes, Sequence) or not classes:
        raise TypeError(f"negative_classes must be a sequence of one or more int, got {classes!r}")
    for each in classes:
        right = isinstance(each, Integral) and not isinstance(each, bool) and each >= 0
        if not right or (known is not None and each >= known):
            bound = "" if known is None else f" below {known}"
            raise ValueError(f"negative_classes must be int of at least 0{bound}, got {each!r}")
    return [Concept(label=int(each)) for each in classes]


def _concept(pipe: Any, given: Any) -> Concept:
    """A text, or embeddings under the names of the call's arguments."""
    if isinstance(given, str):
        if not given.strip():
            raise ValueError(f"negative_prompts must be non-empty str, got {given!r}")
        check_text("negative_prompts", given)
        return Concept(text=given)
    parameters = rows.call_parameters(pipe.__call__)
    if isinstance(given, Tensor):
        given = {"negative_prompt_embeds": given}
    if not isinstance(given, Mapping) or not given:
        raise TypeError(
            "negative_prompts must be a sequence of str, one a concept, or of their embeddings "
            f"(a tensor, or a mapping of names to tensors), got {_shown(given)} in it"
        )
    embeddings = {}
    for name, value in given.items():
        full = name if str(name).startswith("negative_") else f"negative_{name}"
        if full not in parameters:
            known = [p for p in parameters if p.startswith("negative_") and "prompt" in p]
            raise ValueError(
                f"negative_prompts as embeddings must have names that a {type(pipe).__name__} "
                f"takes, {known}, got {name!r}"
            )
        if not isinstance(value, Tensor):
            raise TypeError(
                f"negative_prompts as embeddings must be tensors, got {_shown(value)} for {name!r}"
            )
        embeddings[full] = value
    return Concept(embeddings=embeddings)


def _shown(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _denoisers(chain: GuidedChain, forgetful: Any, pipe: Any) -> list[Denoiser]:
    if chain.needs_unconditional:
        raise ValueError(
            f"rule and cfg_scale must do without a second prompt: a {type(pipe).__name__} has "
            f"none; got {chain.rule!r} with cfg_scale={chain.cfg_scale!r}"
        )
    if not chain.needs_negative:
        return []
    given = list(forgetful) if isinstance(forgetful, Sequence) else [forgetful]
    for denoiser in given:
        if not callable(denoiser):
            raise TypeError(
                "forgetful must be a network or a callable (x, t) that learned what is unwanted: "
                f"a {type(pipe).__name__} has no negative prompt; got {denoiser!r}"
            )
    return given


def _check_inpainting(pipe: Any, row: Layout, chain: GuidedChain) -> None:
    """Latents that are overwritten between steps say nothing about the unwanted."""
    if not row.overwrites or not chain.tracks or chain.mask is not None:
        return
    if row.overwrites != "always":
        config = next(c for n in row.network if (c := _config(getattr(pipe, n, None))) is not None)
        channels = [getattr(config, name, None) for name in ("in_channels", "out_channels")]
        if channels[0] != channels[1]:
            return  # made for inpainting: it reads the mask, and everything is painted anew
    raise maskless(pipe)


def _config(network: Any) -> Any:
    return getattr(getattr(network, "_orig_mod", network), "config", None)
