"""Guidance on the network of any classic diffusers pipeline, without another pipeline class.

With classifier-free guidance a pipeline shows its network every latent twice, under the negative
and under the positive prompt, and combines the halves ``n`` and ``p`` of the output to
``n + w (p - n)``.  A hook on the network that returns the guided prediction in both halves makes
that combination the identity, whatever w is; the sampler then takes its step with the guided
prediction.  Further prompts ride in the same call of the network, as more rows of its batch.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from dng_math.guidance import Rule
from dng_models.guidance import GuidedChain
from dng_models.sampling import Denoiser, Predictor, evaluating
from dng_models.trace import Trace

P = ParamSpec("P")
R = TypeVar("R")

NAME = "dng"
# Under these names networks take what a prompt became: by token, and pooled.
TOKENS = "encoder_hidden_states"
POOLED = ("pooled_projections", "text_embeds")
LATENTS = ("sample", "hidden_states")
NEGATIVE, POSITIVE = 0, 1  # halves of a doubled batch
# How near to the empty prompt's embedding one is the empty prompt: bfloat16 rounds by 2^-8.
EMPTY_TOLERANCE = 1e-2


@dataclass(frozen=True, eq=False)
class _Prompt:
    """An encoded prompt: by token (1, L, D), and pooled (1, P) where the network takes that."""

    text: str
    tokens: Tensor
    pooled: Tensor | None


def apply_guidance(
    pipe: Any,
    rule: Rule,
    *,
    negative_prompts: Sequence[str] | None = None,
    cfg_scale: float | None = None,
    forgetful: Denoiser | Sequence[Denoiser] | None = None,
    eta: float | None = None,
    divergence_probes: int = 0,
    skip_below: float | None = None,
    mask: Tensor | None = None,
) -> Trace:
    """Guide a diffusers pipeline by a rule, until :func:`remove_guidance`.

    Base and unwanted prediction are those of the positive and the negative prompt of the
    pipeline's call, whose own ``guidance_scale`` must be above 1 and is otherwise without effect.

    Parameters
    ----------
    pipe : DiffusionPipeline
        A pipeline that calls ``pipe.unet`` or ``pipe.transformer`` on a doubled batch (Stable
        Diffusion 1, 2, XL and 3, their img2img, inpaint and ControlNet variants ...), or a
        DDPMPipeline.
    rule : Rule
        :class:`dng_models.DynamicNegative`, or any of :mod:`dng_math.guidance`.
    negative_prompts : sequence of str, optional
        Unwanted concepts, each with its own posterior, for every image.  The pipeline's negative
        prompt is then the unconditional one.
    cfg_scale : float, optional
        Classifier-free guidance beneath the rule: base = unconditional + cfg_scale (positive -
        unconditional), and the posterior compares negative with positive.  None: base = positive.
    forgetful : callable or sequence of callable
        For a pipeline without prompts: what learned only the unwanted, as for
        :func:`dng_models.sample`; a sequence of several, each with its own posterior.
    eta : float, optional
        Of a DDIM scheduler, as given to the pipeline's call; None: measured on the first step.
    divergence_probes : int
        For samplers with less noise than DDPM's, whose tracked posterior is wrong without it:
        number of random vectors of Hutchinson's estimate of the divergence, one more evaluation
        with a forward derivative each.
    skip_below : float, optional
        Do not evaluate what is unwanted for images while an upper bound of their scale is below
        this; a tenth of g prior / (1 - prior), the first one, is a good choice.
    mask : Tensor, optional
        For inpainting with a network that was not trained for it: 1 where latents are repainted;
        broadcasts to (B, C, height, width) of the latents.

    Returns
    -------
    Trace
        What guidance did in each call of the pipeline; as a context manager it removes the
        guidance at the end of its block.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed; during a call of the pipeline, if it
        has no negative prompt, or its batch or scheduler changes on the way.

    Examples
    --------
    >>> with apply_guidance(pipe, DynamicNegative(18, 0.01, 0.3, 0.003)) as trace:
    ...     image = pipe("A British breakfast", negative_prompt="egg, sausage").images[0]
    >>> trace.plot("scale.png")
    """
    name, network = _network(pipe)
    if not hasattr(pipe, "scheduler"):
        raise ValueError(f"pipe must have a scheduler, got a {type(pipe).__name__} without one")
    has_prompts = hasattr(pipe, "encode_prompt") or hasattr(pipe, "do_classifier_free_guidance")
    prompts = _listed(negative_prompts)
    if isinstance(forgetful, Sequence) and len(forgetful) == 0:
        raise ValueError("forgetful must not be an empty sequence")
    if not has_prompts:
        if prompts is not None:
            raise ValueError(
                f"negative_prompts must be None: a {type(pipe).__name__} has no prompts; give "
                f"forgetful=, got {negative_prompts!r}"
            )
        concepts = len(forgetful) if isinstance(forgetful, Sequence) else None
    else:
        if forgetful is not None:
            raise ValueError(
                f"forgetful must be None: a {type(pipe).__name__} has prompts, and avoids its "
                f"negative_prompt; got {forgetful!r}"
            )
        concepts = None if prompts is None else len(prompts)
    trace = Trace(lambda: remove_guidance(pipe))
    chain = GuidedChain(
        rule,
        concepts=concepts,
        cfg_scale=cfg_scale,
        eta=eta,
        divergence_probes=divergence_probes,
        skip_below=skip_below,
        mask=mask,
        trace=trace,
    )
    hook: ModelHook
    if not has_prompts:
        hook = _NetworksHook(pipe, chain, _denoisers(chain, forgetful, pipe))
    else:
        _check_inpainting(pipe, network, chain, mask)
        hook = _PromptsHook(pipe, chain, name, prompts)
    registry = HookRegistry.check_if_exists_or_initialize(network)
    if registry.get_hook(NAME) is not None:
        raise ValueError(
            "pipe must not be guided already: call remove_guidance(pipe) first, or leave the block "
            "of the other apply_guidance"
        )
    registry.register_hook(hook, NAME)
    controlnet = getattr(pipe, "controlnet", None)
    if isinstance(hook, _PromptsHook) and hook.added and isinstance(controlnet, nn.Module):
        other = HookRegistry.check_if_exists_or_initialize(controlnet)
        other.register_hook(_ControlHook(hook), NAME)
    return trace


def remove_guidance(pipe: Any) -> None:
    """Take the guidance off a pipeline; nothing happens if there is none."""
    for name in ("unet", "transformer", "controlnet"):
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module) and hasattr(module, "_diffusers_hook"):
            HookRegistry.check_if_exists_or_initialize(module).remove_hook(NAME, recurse=False)


# ---------------------------------------------------------------------- the border


def _network(pipe: Any) -> tuple[str, nn.Module]:
    for name in ("unet", "transformer"):
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return name, module
    raise ValueError(
        "pipe must be a diffusers pipeline with a network pipe.unet or pipe.transformer, got a "
        f"{type(pipe).__name__}; for modular pipelines set dng_models.DynamicNegativeGuidance as "
        "their guider"
    )


def _listed(negative_prompts: Sequence[str] | None) -> list[str] | None:
    if negative_prompts is None:
        return None
    if isinstance(negative_prompts, str):
        raise TypeError(
            "negative_prompts must be a sequence of str, one a concept, got the str "
            f"{negative_prompts!r}; a single one belongs into the pipeline's negative_prompt"
        )
    listed = list(negative_prompts)
    if not listed or not all(isinstance(text, str) and text.strip() for text in listed):
        raise ValueError(
            f"negative_prompts must be one or more non-empty str, got {negative_prompts!r}"
        )
    return listed


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


def _check_inpainting(
    pipe: Any, network: nn.Module, chain: GuidedChain, mask: Tensor | None
) -> None:
    """Latents that are overwritten between steps say nothing about the unwanted."""
    config = _config(network)
    own_channels = getattr(config, "in_channels", None) == getattr(config, "out_channels", None)
    inpaints = "inpaint" in type(pipe).__name__.lower()
    if inpaints and own_channels and chain.tracks and mask is None:
        raise ValueError(
            "mask must be given: this network was not trained for inpainting, so the pipeline "
            "overwrites a part of the latents after every step; give a tensor that is 1 where it "
            "repaints, of shape (1, 1, height, width) of the latents"
        )


def _config(network: nn.Module) -> Any:
    return getattr(getattr(network, "_orig_mod", network), "config", None)


# ---------------------------------------------------------------------- prompts


def _encode(pipe: Any, text: str) -> Sequence[Tensor]:
    """Whatever the pipeline makes of a prompt, beside what it takes where it is given none."""
    wanted: dict[str, Any] = {
        "prompt": text,
        "device": pipe._execution_device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": True,
    }
    parameters = inspect.signature(pipe.encode_prompt).parameters.values()
    missing = {p.name: None for p in parameters if p.default is p.empty and p.name not in wanted}
    with torch.no_grad():
        found: Sequence[Tensor] = pipe.encode_prompt(**wanted, **missing)
    return found


def _encoded(pipe: Any, text: str) -> tuple[_Prompt, _Prompt]:
    """A prompt, and what the pipeline takes where it is given none."""
    found = _encode(pipe, text)
    dimensions = [tensor.ndim for tensor in found]
    if dimensions == [3, 3]:
        return _Prompt(text, found[0], None), _Prompt("", found[1], None)
    if dimensions == [3, 3, 2, 2]:
        return _Prompt(text, found[0], found[2]), _Prompt("", found[1], found[3])
    raise ValueError(
        "negative_prompts and cfg_scale must be None for a pipeline that does not encode prompts "
        f"as Stable Diffusion 1, 2, XL and 3 do: {type(pipe).__name__}.encode_prompt gives tensors "
        f"of {dimensions} dimensions"
    )


def _has_text_encoder(pipe: Any) -> bool:
    return hasattr(pipe, "encode_prompt") and any(
        getattr(pipe, name, None) is not None
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3")
    )


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a network by their names."""
    kind: Any = type(getattr(module, "_orig_mod", module))
    names = list(inspect.signature(kind.forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs


def _first_of(named: dict[str, Any], names: Sequence[str], module: nn.Module) -> str:
    for name in names:
        if isinstance(named.get(name), Tensor):
            return name
    raise ValueError(
        f"pipe must call its {type(module).__name__} with a tensor {' or '.join(names)}, got "
        f"{sorted(named)}"
    )


def _is_doubled(x: Tensor) -> bool:
    """Whether both halves are the same; an image that broke (NaN) is the same as itself."""
    half = x.shape[0] // 2
    return x.shape[0] % 2 == 0 and bool(torch.isclose(x[:half], x[half:], 0, 0, True).all())


def _rows(value: Any, doubled: int, rows: Tensor, full: int, of_full: Tensor) -> Any:
    """Rows of every tensor in it that belongs to the doubled batch, or to the full one."""
    if isinstance(value, Tensor):
        if value.ndim and value.shape[0] == doubled:
            return value[rows.to(value.device)]
        if value.ndim and value.shape[0] == full:
            return value[of_full.to(value.device)]
        return value
    if isinstance(value, dict):
        return {k: _rows(v, doubled, rows, full, of_full) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_rows(v, doubled, rows, full, of_full) for v in value)
    return value


def _with_prompt(named: dict[str, Any], start: int, stop: int, prompt: _Prompt) -> None:
    """Put a prompt into rows of the arguments, which are ours to write into."""
    tokens = named.get(TOKENS)
    if not isinstance(tokens, Tensor) or tokens.shape[1:] != prompt.tokens.shape[1:]:
        got = tuple(tokens.shape[1:]) if isinstance(tokens, Tensor) else tokens
        raise ValueError(
            f"the pipeline's prompts must be encoded like {prompt.text!r}, to "
            f"{tuple(prompt.tokens.shape[1:])} tokens and features, got {got}: leave its options "
            "of encoding (max_sequence_length, clip_skip) as they are"
        )
    tokens[start:stop] = prompt.tokens.to(tokens)
    added = named.get("added_cond_kwargs") or {}
    places = [place[name] for place in (named, added) for name in POOLED if name in place]
    for place in places:
        assert prompt.pooled is not None
        place[start:stop] = prompt.pooled.to(place)


def _unlike_empty(tokens: Tensor, empty: Tensor) -> Tensor:
    """Which rows are not the empty prompt's, (B,), nor zeros."""
    norms = tokens.float().flatten(1).norm(dim=1)
    if tokens.shape[1:] != empty.shape[1:]:
        return norms > 0
    reference = empty.to(tokens).float()
    apart = (tokens.float() - reference).flatten(1).norm(dim=1)
    return (norms > 0) & (apart > EMPTY_TOLERANCE * reference.norm())


# ---------------------------------------------------------------------- the hooks


def _not_compiled(function: Callable[P, R]) -> Callable[P, R]:
    return torch.compiler.disable(function)  # type: ignore[no-untyped-call]


def _frame_not_compiled(function: Callable[P, R]) -> Callable[P, R]:
    return torch.compiler.disable(function, recursive=False)  # type: ignore[no-untyped-call]


class _Hook(ModelHook, ABC):  # type: ignore[misc]
    """A hook that stands between a pipeline and its network."""

    def __init__(self) -> None:
        super().__init__()
        self.compiled: Callable[..., Any] | None = None

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Remember a network compiled in place; the hook itself is not to be compiled."""
        self.compiled = module._compiled_call_impl
        module._compiled_call_impl = None
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:  # diffusers' spelling
        """Leave the network compiled, if it was."""
        if self.compiled is not None:
            module._compiled_call_impl = self.compiled
        return module

    @abstractmethod
    def prepare(
        self, module: nn.Module, named: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable[[Any], Any]]:
        """What to call the network with, and what to make of its output."""

    def _prepared(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable[[Any], Any]]:
        return self.prepare(module, _named(module, args, kwargs))

    # Only the network is anybody's to compile: not this frame, and nothing around the call.
    @_frame_not_compiled
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """In place of the network's forward."""
        inputs, finish = _not_compiled(self._prepared)(module, args, kwargs)
        output = self.call(module, inputs)
        return _not_compiled(finish)(output)

    def call(self, module: nn.Module, named: dict[str, Any]) -> Any:
        """The network itself."""
        if self.compiled is None:
            return self.fn_ref.original_forward(**named)
        # What was compiled looks its forward up: there it must find the network's own.
        hooked = module.forward
        module.forward = self.fn_ref.original_forward
        try:
            return self.compiled(**named)
        finally:
            module.forward = hooked


def _prediction(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found: Tensor = output[0]
    return found


def _replaced(output: Any, prediction: Tensor) -> Any:
    """The network's output with another prediction in its place."""
    if isinstance(output, Tensor):
        return prediction
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    return type(output)(**{**output, "sample": prediction})


class _PromptsHook(_Hook):
    """On a network that sees each latent under the negative and the positive prompt."""

    def __init__(
        self, pipe: Any, chain: GuidedChain, network: str, prompts: list[str] | None
    ) -> None:
        super().__init__()
        self.pipe, self.chain, self.network = pipe, chain, network
        self.empty: Tensor | None = None
        self.added: list[_Prompt] = []
        needs_empty = chain.needs_unconditional and not chain.leads and prompts is None
        if (prompts or needs_empty) and not _has_text_encoder(pipe):
            raise ValueError(
                "pipe must have its text encoder for negative_prompts and cfg_scale, which add "
                f"prompts to those of the call; this {type(pipe).__name__} has none"
            )
        if prompts is not None and chain.needs_negative:
            self.added = [_encoded(pipe, text)[0] for text in prompts]
            self.negatives = list(range(2, 2 + len(prompts)))
        else:
            self.negatives = [NEGATIVE] if chain.needs_negative else []
        self.unconditional: int | None = None
        if chain.needs_unconditional:
            self.unconditional = NEGATIVE
        if needs_empty:
            self.unconditional = 2 + len(self.added)
            self.added.append(_encoded(pipe, "")[1])
        if NEGATIVE in self.negatives and _has_text_encoder(pipe):
            self.empty = _encode(pipe, "")[0]
        used = {POSITIVE, *self.negatives}
        if self.unconditional is not None:
            used.add(self.unconditional)
        self.used = sorted(used)

    def prepare(
        self, module: nn.Module, named: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable[[Any], Any]]:
        """Every prompt in one batch; the guided prediction in both halves."""
        latents_name = _first_of(named, LATENTS, module)
        x = named[latents_name]
        batch = self._batch(x)
        # Networks for inpainting see more than latents; others predict a variance beside the mean.
        channels = min(x.shape[1], getattr(_config(module), "out_channels", None) or x.shape[1])
        latents = x[:batch, :channels].contiguous()
        runs = len(self.chain.trace.runs)
        self.chain.observe(self.pipe.scheduler, latents, named["timestep"])
        if len(self.chain.trace.runs) > runs:
            self._check_run(named, x, batch)
        evaluated = self.chain.to_evaluate()
        everyone = torch.arange(batch)
        some = everyone if evaluated is None else everyone[evaluated]
        members = {chunk: some if chunk in self.negatives else everyone for chunk in self.used}

        def network(at: Tensor) -> list[Tensor]:
            wanted = [POSITIVE, *self.negatives]
            inputs = self.arguments(named, batch, dict.fromkeys(sorted(wanted), everyone))
            rows = at.repeat(len(wanted), *[1] * (at.ndim - 1)).to(x.dtype)
            rest = inputs[latents_name][:, channels:]
            rows = torch.cat([rows, rest], dim=1) if rest.shape[1] else rows
            output = self.fn_ref.original_forward(**{**inputs, latents_name: rows})
            parts = _prediction(output)[:, :channels].chunk(len(wanted))
            found = dict(zip(sorted(wanted), parts, strict=True))
            return [found[chunk] for chunk in wanted]

        def finish(output: Any) -> Any:
            whole = self._split(_prediction(output), batch, members)
            predictions = {chunk: part[:, :channels] for chunk, part in whole.items()}
            guided = self.chain.guide(
                predictions[POSITIVE],
                [predictions[chunk] for chunk in self.negatives],
                None if self.unconditional is None else predictions[self.unconditional],
                network=network,
            )
            guided = torch.cat([guided, whole[POSITIVE][:, channels:]], dim=1)
            return _replaced(output, torch.cat([guided, guided]))

        return self.arguments(named, batch, members), finish

    def arguments(
        self, named: dict[str, Any], batch: int, members: dict[int, Tensor]
    ) -> dict[str, Any]:
        """The network's arguments for images of chunks: 0 negative, 1 positive, 2... added."""
        pairs = [(chunk, images) for chunk, images in members.items() if len(images)]
        full = batch * (2 + len(self.added))
        of_full = torch.cat([chunk * batch + images for chunk, images in pairs])
        if torch.equal(of_full, torch.arange(2 * batch)) and not self.added:
            return named
        # An added prompt takes the place of the negative one.
        source = torch.cat(
            [(chunk if chunk < 2 else NEGATIVE) * batch + images for chunk, images in pairs]
        )
        grown: dict[str, Any] = _rows(named, 2 * batch, source, full, of_full)
        start = 0
        for chunk, images in pairs:
            if chunk >= 2:
                _with_prompt(grown, start, start + len(images), self.added[chunk - 2])
            start += len(images)
        return grown

    def _split(
        self, prediction: Tensor, batch: int, members: dict[int, Tensor]
    ) -> dict[int, Tensor]:
        """The prediction of every chunk, one row an image."""
        parts = torch.split(prediction, [len(images) for images in members.values()])
        found = dict(zip(members, parts, strict=True))
        for chunk in self.negatives:
            if len(members[chunk]) < batch:
                # Rows that were not evaluated hold the positive prediction: no evidence, no push.
                whole = found[POSITIVE].clone()
                whole[members[chunk].to(whole.device)] = found[chunk]
                found[chunk] = whole
        return found

    def _batch(self, x: Tensor) -> int:
        """Number of images in a doubled batch."""
        doubled = getattr(self.pipe, "do_classifier_free_guidance", True)
        if not doubled:
            raise ValueError(
                "guidance_scale of the pipeline's call must be > 1, which makes it evaluate the "
                "negative prompt (its value has no other effect), got "
                f"{getattr(self.pipe, 'guidance_scale', None)}. A callback that cuts guidance off "
                "must be replaced by dng_math.LimitedInterval(rule, t_lo, t_hi)"
            )
        rescale = getattr(self.pipe, "guidance_rescale", 0.0)
        if rescale:
            raise ValueError(
                "guidance_rescale of the pipeline's call must be 0, for it would rescale to the "
                f"guided prediction itself, got {rescale}"
            )
        if x.shape[0] % 2:
            raise self._not_doubled(x)
        return x.shape[0] // 2

    def _not_doubled(self, x: Tensor) -> ValueError:
        return ValueError(
            "pipe must call its network once a step with every latent twice, but a "
            f"{type(self.pipe).__name__} called it with a batch of {x.shape[0]} that is none: for "
            "pipelines that call it once a prompt use a modular pipeline and "
            "dng_models.DynamicNegativeGuidance"
        )

    def _check_run(self, named: dict[str, Any], x: Tensor, batch: int) -> None:
        """The batch is a doubled one, and the negative prompt says something."""
        if not _is_doubled(x):
            self.chain.reset()
            raise self._not_doubled(x)
        skipped = getattr(self.pipe, "clip_skip", None)
        if self.added and skipped:
            self.chain.reset()
            raise ValueError(
                "clip_skip of the pipeline's call must be None with negative_prompts or cfg_scale, "
                f"whose prompts were encoded without it, got {skipped}"
            )
        self._check_negative(named, batch)

    def _check_negative(self, named: dict[str, Any], batch: int) -> None:
        """The negative prompt says something."""
        tokens = named.get(TOKENS)
        if NEGATIVE not in self.negatives or not isinstance(tokens, Tensor):
            return
        empty = torch.zeros_like(tokens[:1]) if self.empty is None else self.empty
        told = _unlike_empty(tokens[:batch], empty)
        if not bool(told.all()):
            self.chain.reset()
            raise ValueError(
                "negative_prompt of the pipeline's call must be given, and not be empty: it is "
                f"what {self.chain.rule!r} avoids (image {int(told.int().argmin())} has "
                "none)"
            )


class _ControlHook(_Hook):
    """On a ControlNet, so that it too sees the prompts that were added."""

    def __init__(self, prompts: _PromptsHook) -> None:
        super().__init__()
        self.prompts = prompts

    def prepare(
        self, module: nn.Module, named: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable[[Any], Any]]:
        """Every prompt in one batch."""
        x = named[_first_of(named, LATENTS, module)]
        if not _is_doubled(x):
            return named, _unchanged  # its guess mode looks at the positive prompt only
        half = x.shape[0] // 2
        everyone = dict.fromkeys(range(2 + len(self.prompts.added)), torch.arange(half))
        return self.prompts.arguments(named, half, everyone), _unchanged


def _unchanged(output: Any) -> Any:
    return output


class _NetworksHook(_Hook):
    """On a network without prompts, beside others that learned what is unwanted."""

    def __init__(self, pipe: Any, chain: GuidedChain, denoisers: list[Denoiser]) -> None:
        super().__init__()
        self.pipe, self.chain, self.denoisers = pipe, chain, denoisers

    def prepare(
        self, module: nn.Module, named: dict[str, Any]
    ) -> tuple[dict[str, Any], Callable[[Any], Any]]:
        """As the pipeline says; the guided prediction."""
        name = _first_of(named, LATENTS, module)
        x, timestep = named[name], named["timestep"]
        self.chain.observe(self.pipe.scheduler, x, timestep)
        evaluated = self.chain.to_evaluate()
        t = int(timestep.reshape(-1)[0]) if isinstance(timestep, Tensor) else int(timestep)

        def network(at: Tensor) -> list[Tensor]:
            own = _prediction(self.fn_ref.original_forward(**{**named, name: at.to(x.dtype)}))
            return [own, *Predictor(self.denoisers, at.device)(at.to(x.dtype), t)]

        def finish(output: Any) -> Any:
            positive = _prediction(output)
            others = self._others(x, t, evaluated, positive)
            return _replaced(output, self.chain.guide(positive, others, network=network))

        return named, finish

    def _others(
        self, x: Tensor, t: int, evaluated: Tensor | None, positive: Tensor
    ) -> list[Tensor]:
        if not self.denoisers:
            return []
        with evaluating(self.denoisers):
            if evaluated is None:
                return Predictor(self.denoisers, x.device)(x, t)
            found = [positive.clone() for _ in self.denoisers]
            some = evaluated.to(x.device)
            if bool(evaluated.any()):
                for whole, part in zip(
                    found, Predictor(self.denoisers, x.device)(x[some], t), strict=True
                ):
                    whole[some] = part
            return found
