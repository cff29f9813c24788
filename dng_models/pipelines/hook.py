"""Guidance for any diffusers pipeline whose layout is known, without another pipeline class.

A guided pipeline stays the same object; its class is replaced by a subclass whose call is watched,
as ``torch.nn.utils.parametrize`` does with modules.  During a call the network's outputs pass
through :class:`~.guided_call.GuidedCalls`, which finds prompts, latents and times by the class's
row in :mod:`.layouts` and returns the guided prediction instead.  The scheduler's step is watched
too, to know what the sampler really did.  Nothing changes outside the guided pipeline's own calls.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dng_math.rules import Reference, Rule
from dng_models.pairs.denoisers import Denoiser
from dng_models.pipelines import rows
from dng_models.pipelines.attention_guidance import acts_on_attention, attention_calls
from dng_models.pipelines.call_begun import Concept, check_text, maskless
from dng_models.pipelines.dynamic_prompts import DynamicPrompts, asking_rule, with_decoder
from dng_models.pipelines.guided_call import GuidedCalls
from dng_models.pipelines.guided_chain import GuidedChain
from dng_models.pipelines.image_points import Images, points_of
from dng_models.pipelines.layouts import Layout, layout_of
from dng_models.pipelines.negative_template import checked_template
from dng_models.pipelines.trace import Trace

_GUIDED = "_dng_guided_calls"
Negative = str | Tensor | Mapping[str, Tensor]


def apply_guidance(
    pipe: Any,
    rule: Rule | Sequence[Rule],
    *,
    negative_prompts: Sequence[Negative] | None = None,
    negative_classes: Sequence[int] | None = None,
    negative_template: str | None = None,
    images: Images | None = None,
    cfg_scale: float | None = None,
    reference: Reference = "positive",
    unwanted: Denoiser | Sequence[Denoiser] | None = None,
    eta: float | None = None,
    divergence_probes: int = 0,
    skip_below: float | None = None,
    mask: Tensor | None = None,
    initial_log_posterior: Tensor | None = None,
    layout: Layout | None = None,
) -> Trace:
    """Guide a diffusers pipeline by a rule, until :func:`remove_guidance`.

    The base is the prediction for the positive prompt of the pipeline's call, and the unwanted
    concept is that of its negative prompt.  A ``guidance_scale`` given to that call
    (``true_cfg_scale`` for Flux and others) is ignored, with a warning unless ``cfg_scale`` is
    given in its place.  For a network distilled from guidance, ``guidance_scale`` is an input of
    the network and keeps its effect.  Calls of other pipelines that share the network are not
    guided.

    The rules that act on attention (:class:`dng_math.NormalizedAttention` and others) change the
    positive prediction itself, in the networks of Stable Diffusion 1, 2, XL and 3
    (docs/attention.md).  With them ``guidance_scale`` keeps its effect, and may be off; without
    ``negative_prompts`` the call's negative prompt is what is unwanted, and classifier-free
    guidance gets the empty one.  Of the options below they take ``negative_prompts`` and
    ``layout``, and with a gate ``mask`` and ``initial_log_posterior``.

    Parameters
    ----------
    pipe : DiffusionPipeline
        A pipeline of a class in :data:`dng_models.pipelines.layouts.LAYOUTS`, or of a subclass.
    rule : Rule or sequence of Rule
        :meth:`dng_math.DynamicNegativeGuidance.tracked`, or any of :mod:`dng_math.rules`; a
        sequence with one DNG rule for each unwanted concept, with its own prior and scale; or
        :class:`dng_models.DynamicPrompts`, whose concepts something that looks at the images
        chooses.
    negative_prompts : sequence of str, Tensor or mapping, optional
        Unwanted concepts, for every image; DNG gives each its own posterior, the other rules take
        one.  The pipeline's negative prompt is then the unconditional one.  A text can be replaced
        by its embeddings, with one row or one for each prompt of the call: a tensor for the
        call's ``negative_prompt_embeds``, or a mapping from names of the call's arguments
        (``negative_pooled_prompt_embeds`` ...) to tensors.
    negative_classes : sequence of int, optional
        Unwanted classes, for pipelines with class labels in place of prompts (DiT).
    negative_template : str, optional
        How the negative prompt of each call is composed with its prompt, as in "{positive}, with
        {negative}".  The composed negative needs no offset, and its prior is the share of unguided
        images that have what is unwanted (:func:`dng_models.estimate_prior`).  None: it is used as
        it is given.
    images : sequence of images or Tensor, optional
        The unwanted as images in place of a prompt: PIL images or arrays of the size that is made,
        which the pipeline's VAE encodes, or a tensor of latents.  Their kernel mixture makes the
        unwanted prediction (:class:`dng_models.PointsDenoiser`), so that the network is evaluated
        for the positive prompt alone; the pipeline's negative prompt is the unconditional one.
    cfg_scale : float, optional
        Classifier-free guidance beneath the rule: base = unconditional + cfg_scale (positive -
        unconditional), and the posterior compares negative with positive.  None: base = positive.
    reference : {"positive", "unconditional"}
        What trackers compare the negative with.  "unconditional" is for a negative that says
        nothing of the positive prompt: its posterior among all images needs no offset, at the cost
        of a third prediction, which ``cfg_scale`` makes anyway.  What the push is measured from is
        another matter, and the rule's own: ``rule.reference``.  "unconditional" needs ``cfg_scale``
        where there are prompts, and the rule's posterior compares with that prediction too.
    unwanted : callable or sequence of callable
        Unwanted network, for a pipeline without prompts; as for :func:`dng_models.sample`, called
        with the network's own latents and times.  A sequence has several, each with its own
        posterior.
    eta : float, optional
        The eta of a DDIM scheduler's steps.  It is read from the pipeline's call; if it is given
        here too, the two must agree.
    divergence_probes : int
        Number of random vectors for Hutchinson's estimate of the divergence, without which the
        tracked posterior is wrong for samplers with less noise than DDPM's.  Each takes one more
        evaluation with a forward derivative.  0 for a :class:`dng_math.PathTracker`, which has its
        own, and needs no noise of the sampler.
    skip_below : float, optional
        Unwanted predictions are skipped for an image while an upper bound of its scale is below
        this; a tenth of the first scale, g prior / (1 - prior), is a good choice.  Not with a path
        tracker, which needs them all.
    mask : Tensor, optional
        For inpainting with a network that was not trained for it: 1 where latents are repainted;
        broadcasts to the scheduler's latents.  A path tracker needs none: it follows the latents,
        whatever overwrites them.
    initial_log_posterior : Tensor, optional
        log p(c | x) of every image at the first step in place of the prior, shape (B,), or (M, B)
        for M concepts.  For a pipeline that continues with another one's latents (a refiner), give
        the ``final_log_posterior`` of that one's trace.
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
        Naming the argument, its value and what is allowed, or why the pipeline cannot be guided.
        During a call of the pipeline: if it has no negative prompt, if what it shows its network
        does not match the layout, or if its batch, scheduler or network changes on the way.

    Notes
    -----
    A guided pipeline can be saved (as the original class), but not copied or pickled.  To encode
    each added prompt, and to check the layout, a call is begun once more and stopped when it first
    calls its network.  Text encoders and encoders of conditioning images then run again; the call's
    random numbers stay the same.

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
        negative_template=negative_template,
        images=images,
        cfg_scale=cfg_scale,
        reference=reference,
        unwanted=unwanted,
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
    """Remove the guidance from a pipeline; nothing happens if there is none.

    Parameters
    ----------
    pipe : DiffusionPipeline
        The pipeline.

    Raises
    ------
    TypeError
        If ``pipe`` is not a diffusers pipeline.
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
    negative_template: str | None = None,
    images: Images | None = None,
    unwanted: Denoiser | Sequence[Denoiser] | None = None,
    layout: Layout | None = None,
    **options: Any,
) -> GuidedCalls:
    """Check the arguments of :func:`apply_guidance`, and make the object that guides the calls.

    Parameters
    ----------
    pipe, rule, negative_prompts, negative_classes, negative_template, images, unwanted, layout
        As for :func:`apply_guidance`.
    trace : Trace
        The trace that records the runs.
    options
        The other arguments of :func:`apply_guidance`.

    Returns
    -------
    GuidedCalls
        Without hooks on the networks: ``attach`` or ``run`` puts them on.

    Raises
    ------
    ValueError, TypeError
        As for :func:`apply_guidance`.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise ValueError(
            f"pipe must be a diffusers pipeline, got a {type(pipe).__name__}; for modular "
            "pipelines set dng_models.DynamicNegativeGuider as their guider"
        )
    if layout is not None and not isinstance(layout, Layout):
        raise TypeError(f"layout must be a dng_models.pipelines.layouts.Layout, got {layout!r}")
    row = layout_of(pipe) if layout is None else layout
    if not hasattr(pipe, "scheduler"):
        raise ValueError(f"pipe must have a scheduler, got a {type(pipe).__name__} without one")
    if not any(isinstance(getattr(pipe, name, None), nn.Module) for name in row.network):
        raise ValueError(
            f"pipe must have a network pipe.{' or pipe.'.join(row.network)}, got a "
            f"{type(pipe).__name__} without one"
        )
    if images is not None:
        for name, given in (
            ("negative_prompts", negative_prompts),
            ("negative_classes", negative_classes),
            ("negative_template", negative_template),
            ("unwanted", unwanted),
        ):
            if given is not None:
                raise ValueError(
                    f"{name} must be None with images, which are what is unwanted; got "
                    f"{_shown(given)}"
                )
        if acts_on_attention(rule):
            raise ValueError(f"images must be None for {rule!r}, which acts on a negative prompt")
        options["points"] = points_of(pipe, images)
    if acts_on_attention(rule):
        if negative_classes is None:
            found = _concepts(pipe, row, negative_prompts, None)
        else:
            found, options["negative_classes"] = None, negative_classes
        options |= {"negative_template": negative_template, "unwanted": unwanted}
        return attention_calls(pipe, row, rule, found, trace=trace, options=options)
    asking = asking_rule(rule)
    if asking is not None:
        _check_asking(pipe, row, asking, negative_prompts, negative_classes, images)
        rule = with_decoder(rule, pipe)
        negative_prompts = asking.prompts if row.labels is None else None
        negative_classes = None if row.labels is None else asking.prompts
    concepts = _concepts(pipe, row, negative_prompts, negative_classes)
    if negative_template is not None:
        checked_template("negative_template", negative_template)
        if concepts is not None or row.calls == "alone" or row.labels is not None:
            raise ValueError(
                "negative_template must be None without a negative_prompt in the pipeline's call "
                f"(write negative_prompts in full), got {negative_template!r}"
            )
    if isinstance(unwanted, Sequence) and len(unwanted) == 0:
        raise ValueError(f"unwanted must not be an empty sequence, got {unwanted!r}")
    if row.calls == "alone":
        several = len(unwanted) if isinstance(unwanted, Sequence) else None
    else:
        if unwanted is not None:
            raise ValueError(
                f"unwanted must be None: a {type(pipe).__name__} has prompts, and avoids its "
                f"negative_prompt; got {unwanted!r}"
            )
        several = None if concepts is None else len(concepts)
    chain = GuidedChain(rule, concepts=several, trace=trace, **options)
    if row.labels is not None and chain.needs_negative and concepts is None:
        raise ValueError(
            f"negative_classes must be given: a {type(pipe).__name__} has no negative prompt, only "
            "classes"
        )
    if row.calls != "alone":
        chain.check_prompted()
    denoisers = _denoisers(chain, unwanted, pipe) if row.calls == "alone" else []
    _check_inpainting(pipe, row, chain)
    return GuidedCalls(pipe, row, chain, concepts, denoisers, negative_template)


# ---------------------------------------------------------------------- the pipeline's class


@functools.cache
def _guided_class(kind: Any) -> type:
    """A subclass of a pipeline's class, under the same name, whose calls are watched."""

    class Guided(kind):  # type: ignore[misc]
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            # ``type(pipe)(**pipe.components)`` makes another pipeline, which is not guided.
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


# ---------------------------------------------------------------------- checks of arguments


def _concepts(
    pipe: Any,
    row: Layout,
    negative_prompts: Sequence[Negative] | None,
    negative_classes: Sequence[int] | None,
) -> list[Concept] | None:
    """Unwanted concepts in place of the pipeline's own negative prompt; None if not given."""
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
        cure = "unwanted=" if row.labels is None else "negative_classes="
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


def _check_asking(
    pipe: Any,
    row: Layout,
    asking: DynamicPrompts,
    negative_prompts: Any,
    negative_classes: Any,
    images: Any,
) -> None:
    """Refuse concepts beside those of the rule, and pipelines that have no place for them."""
    if row.calls == "alone":
        raise ValueError(
            f"rule must be another one for a {type(pipe).__name__}, which has no prompts that "
            f"could be unwanted, got {asking!r}"
        )
    for name, given in (
        ("negative_prompts", negative_prompts),
        ("negative_classes", negative_classes),
        ("images", images),
    ):
        if given is not None:
            raise ValueError(
                f"{name} must be None for DynamicPrompts, whose concepts are its own "
                f"({', '.join(map(repr, asking.names))}), got {_shown(given)}"
            )


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
    """Check one negative prompt: a text, or embeddings by the names of the call's arguments."""
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


def _denoisers(chain: GuidedChain, unwanted: Any, pipe: Any) -> list[Denoiser]:
    if chain.needs_unconditional:
        raise ValueError(
            f"rule and cfg_scale must do without a second prompt: a {type(pipe).__name__} has "
            f"none; got {chain.rule!r} with cfg_scale={chain.cfg_scale!r} and "
            f"reference={chain.reference!r}"
        )
    if not chain.needs_negative:
        return []
    given = list(unwanted) if isinstance(unwanted, Sequence) else [unwanted]
    for denoiser in given:
        if not callable(denoiser):
            raise TypeError(
                "unwanted must be a network or a callable (x, t) that learned what is unwanted: "
                f"a {type(pipe).__name__} has no negative prompt; got {denoiser!r}"
            )
    return given


def _check_inpainting(pipe: Any, row: Layout, chain: GuidedChain) -> None:
    """Require a mask if latents are overwritten, which carry no evidence about the unwanted."""
    if not row.overwrites or not chain.tracks or chain.follows or chain.mask is not None:
        return
    if row.overwrites != "always":
        config = next(c for n in row.network if (c := _config(getattr(pipe, n, None))) is not None)
        channels = [getattr(config, name, None) for name in ("in_channels", "out_channels")]
        if channels[0] != channels[1]:
            return  # made for inpainting: it reads the mask and repaints everything
    raise maskless(pipe)


def _config(network: Any) -> Any:
    return getattr(getattr(network, "_orig_mod", network), "config", None)
