"""One call of a pipeline under guidance, from its beginning to its end.

What a run is comes from the pipeline that calls and from its scheduler, not from the contents of
tensors: a run begins with a call, a step with the network's call and ends with the scheduler's, and
what the scheduler is given is compared with what guidance made.  A prompt that is added is encoded
by the pipeline itself: its call is begun once more with that as its negative prompt, and stopped
where it first calls its network, so that all options of the call hold for it too.
"""

from __future__ import annotations

import functools
import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from dng_models import rows
from dng_models.guidance import GuidedChain, position
from dng_models.layouts import Control, Layout
from dng_models.sampling import Denoiser, Predictor, evaluating

NAME = "dng"
# Parts of a batch; 2, 3 ... are what is added.
PERTURBED, NEGATIVE, POSITIVE = -1, 0, 1
# Whatever a negative prompt says, this is another one: longer, so that masks differ too.
ANOTHER_PROMPT = "two red apples on a wooden table beside a window in the morning"
# How near to the empty prompt's embedding one is the empty prompt: bfloat16 rounds by 2^-8.
EMPTY_TOLERANCE = 1e-2
# How far what a scheduler is given may be from what guidance made, relative to its size.
SAME_32, SAME_16 = 1e-4, 2e-2
# 16-bit networks are told times of three digits.
SAME_TIME = 1e-2

Run = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Concept:
    """Something unwanted: a text, embeddings by the names of the call's arguments, or a class."""

    text: str | None = None
    embeddings: Mapping[str, Tensor] | None = None
    label: int | None = None


class _Stop(BaseException):
    """Ends a call that was only begun.  Not an Exception, which pipelines may catch."""


@dataclass(eq=False)
class _Beginning:
    """What a pipeline showed its networks in the first step of a call that was stopped there."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    control: dict[str, dict[str, Any]] = field(default_factory=dict)
    shape: torch.Size | None = None  # of the scheduler's latents, where that was asked for


@dataclass(eq=False)
class _Pending:
    """A guided prediction on its way to the scheduler."""

    guided: Tensor  # as the scheduler is to be given it
    x: Tensor | None  # what the network was shown, where that is the scheduler's latents
    perturbed: Tensor | None = None  # what PAG adds its scale times
    calls: int = 1  # of the network in this step


class GuidedCalls:
    """Guides the calls of a pipeline; made by :func:`dng_models.hook.guided_calls`.

    Parameters
    ----------
    pipe : DiffusionPipeline
    layout : Layout
        Of its class.
    chain : GuidedChain
        Rule, posteriors and trace.
    concepts : sequence of Concept, optional
        What is unwanted beside the pipeline's own negative prompt.
    denoisers : sequence of callable
        What learned only the unwanted, for pipelines without prompts.
    """

    def __init__(
        self,
        pipe: Any,
        layout: Layout,
        chain: GuidedChain,
        concepts: Sequence[Concept] | None,
        denoisers: Sequence[Denoiser],
    ) -> None:
        self.pipe, self.layout, self.chain = pipe, layout, chain
        self.denoisers = list(denoisers)
        self.hooked: list[nn.Module] = []
        self._call: _Call | None = None
        self._verified = False
        self._told = False
        # What stands in which part of a batch; added ones are encoded anew in every call.
        self.added: list[Concept] = []
        self.negatives: list[int] = []
        self.unconditional: int | None = None
        if layout.calls == "alone":
            return
        if concepts is not None and chain.needs_negative:
            self.added = list(concepts)
            self.negatives = list(range(2, 2 + len(concepts)))
        elif chain.needs_negative:
            self.negatives = [NEGATIVE]
        if chain.needs_unconditional:
            self.unconditional = NEGATIVE
            if concepts is None and not chain.leads:
                # The pipeline's own negative is unwanted: that of no prompt at all comes beside it.
                self.unconditional = 2
                self.added.append(Concept())
        if any(c.embeddings is None and c.label is None for c in self.added):
            self._check_text_encoder()

    def _check_text_encoder(self) -> None:
        names = [n for n in self.pipe.components if n.startswith("text_encoder")]
        if names and all(getattr(self.pipe, name, None) is None for name in names):
            raise ValueError(
                "pipe must have its text encoder for negative_prompts and cfg_scale, which add "
                f"prompts to those of the call; this {type(self.pipe).__name__} has none: give "
                "negative_prompts as embeddings, and without cfg_scale"
            )

    @property
    def avoids_own(self) -> bool:
        """Whether the pipeline's own negative prompt is what is unwanted."""
        return NEGATIVE in self.negatives

    @property
    def used(self) -> list[int]:
        """Parts of the batch that are evaluated."""
        found = {POSITIVE, *self.negatives}
        if self.unconditional is not None:
            found.add(self.unconditional)
        return sorted(found)

    # ------------------------------------------------------------------ what is put in

    def attach(self) -> None:
        """Put hooks on the pipeline's networks as they are now, and remember on which."""
        wanted: dict[int, tuple[nn.Module, Control | None]] = {}
        controls = {control.name: control for control in self.layout.control}
        for name in (*self.layout.network, *controls):
            module = getattr(self.pipe, name, None)
            if isinstance(module, nn.Module):
                wanted[id(module)] = (module, controls.get(name))
        for module in [m for m in self.hooked if id(m) not in wanted]:
            self._take_out(module)
        for module, control in wanted.values():
            if any(module is known for known in self.hooked):
                _registry(module).get_hook(NAME).settle(module)
                continue
            if _registry(module).get_hook(NAME) is not None:
                self.detach()
                raise ValueError(
                    "pipe must not share its network with a pipeline that is guided now: call "
                    "remove_guidance on that one first"
                )
            hook = _Hook(self, control)
            _registry(module).register_hook(hook, NAME)
            hook.settle(module)
            self.hooked.append(module)

    def detach(self) -> None:
        """Take the hooks out of the networks that they were put on."""
        for module in list(self.hooked):
            self._take_out(module)

    def _take_out(self, module: nn.Module) -> None:
        registry = _registry(module)
        registry.remove_hook(NAME, recurse=False)
        if not registry.hooks:
            del module._diffusers_hook  # which another wrapper of the network would find
            inner = registry._module_ref
            left = inner.__dict__.get("forward")
            if getattr(left, "__func__", None) is getattr(type(inner), "forward", None):
                del inner.forward  # the class's own
        self.hooked = [m for m in self.hooked if m is not module]

    # ------------------------------------------------------------------ calls

    def run(self, function: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the pipeline.

        Parameters
        ----------
        function : callable
            The pipeline's own call.
        args, kwargs
            Its arguments.
        """
        if self._call is not None:
            raise ValueError("pipe must not be called again while a guided call of it runs")
        self.attach()
        call = self._call = _Call(self, function, args, kwargs)
        try:
            call.prepare(verify=not self._verified)
            with call.watching_the_scheduler():
                result = function(*args, **kwargs)
            call.check_end()
            self._verified = True
        except BaseException:
            self.chain.forget_unconfirmed()
            raise
        finally:
            self.chain.reset()
            self._call = None
        return result

    def forward(
        self, hook: _Hook, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """In place of a network's forward."""
        call = self._call
        if call is None or call.inside:
            if call is None:
                self._tell_of_strangers()
            return hook.call(module, args, kwargs)
        usual = (self.layout.latents, self.layout.time, *self.layout.text)
        arguments = rows.named(module, args, kwargs, usual)
        with call.evaluating_itself():
            if hook.control is not None:
                return call.control(hook, module, hook.control, arguments)
            return call.network(hook, module, arguments)

    def _tell_of_strangers(self) -> None:
        if self._told:
            return
        self._told = True
        warnings.warn(
            f"the network of a guided {type(self.pipe).__name__} was called by something else (a "
            "pipeline that shares it, or your own code): such calls are not guided",
            stacklevel=4,
        )


def _registry(module: nn.Module) -> Any:
    return HookRegistry.check_if_exists_or_initialize(module)


class _Hook(ModelHook):  # type: ignore[misc]
    """Between a pipeline and one of its networks."""

    def __init__(self, calls: GuidedCalls, control: Control | None) -> None:
        super().__init__()
        self.calls, self.control = calls, control
        self.compiled: Callable[..., Any] | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "the network of a guided pipeline cannot be copied or pickled: the copy would share "
            "the original's guidance. Call remove_guidance(pipe) first"
        )

    def settle(self, module: nn.Module) -> None:
        """Remember a network that is compiled; the hook itself is not to be."""
        if module._compiled_call_impl is not None:
            self.compiled = module._compiled_call_impl
            module._compiled_call_impl = None
        elif getattr(module, "_orig_mod", None) is _registry(module)._module_ref:
            # Wrapped after it had hooks of diffusers, which stay on what is inside.
            self.compiled = module.forward

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """When it is put on a network."""
        self.settle(module)
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:  # diffusers' spelling
        """Leave the network compiled, if it was."""
        if self.compiled is not None:
            module._compiled_call_impl = self.compiled
        return module

    # Only the network is anybody's to compile.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """In place of the network's forward."""
        return self.calls.forward(self, module, args, kwargs)

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The network itself."""
        if self.compiled is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        # What was compiled looks its forward up: there it must find the network's own.
        hooked = module.forward
        module.forward = self.fn_ref.original_forward
        try:
            return self.compiled(*args, **kwargs)
        finally:
            module.forward = hooked


class _Call:
    """A call of the pipeline under way."""

    def __init__(
        self, calls: GuidedCalls, function: Run, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.calls, self.function = calls, function
        self.pipe, self.layout, self.chain = calls.pipe, calls.layout, calls.chain
        self.scheduler = self.pipe.scheduler
        self.arguments = _by_name(function, args, kwargs)
        self.inside = False
        self.beginning: _Beginning | None = None
        self.outputs: list[Any] = []
        # Of the parts of the batch that are added; with one call a prompt, of all.
        self.encoded: dict[int, _Beginning] = {}
        self.probe: _Beginning | None = None
        self.pending: _Pending | None = None
        # What the last step made, and torch's count of changes to its memory then.
        self.last_next: Tensor | None = None
        self.last_version = 0
        # Of control networks in this step: arguments that have rows for all parts, or what their
        # outputs are for an added part.
        self.grown: set[str] = set()
        self.controlled: dict[int, dict[str, Tensor]] = {}
        # With one call a prompt: what they were called with last.
        self.controls: dict[Control, tuple[_Hook, nn.Module, dict[str, Any]]] = {}
        self.images: int | None = None
        self.told_of_changes = False
        # What the network is called with at this step.
        self.shown: dict[str, Any] = {}
        # While the network is differentiated, at a step whose predictions are made.
        self.probing = False

    # ------------------------------------------------------------------ before the call

    def prepare(self, *, verify: bool) -> None:
        """Check the call's arguments, and encode what is added to it."""
        self._check_arguments()
        if self.layout.calls == "alone":
            return
        if self.calls.avoids_own:
            self._check_negative()
        for part, concept in enumerate(self.calls.added, start=2):
            if concept.label is None:
                self.encoded[part] = self._encode(concept, part)
        if self.layout.labels is not None:
            return
        if self.layout.calls == "batch" and self.layout.kept is not None:
            self.encoded[POSITIVE] = self._begin({}, 3)
        if self.layout.calls == "separate":
            # The third time it is the scheduler's turn, which is shown the latents alone.
            self.encoded[NEGATIVE] = self._begin({}, 2 if self.layout.kept is None else 3)
            self.encoded[POSITIVE] = self.encoded[NEGATIVE]
        another = self._another_negative()
        if verify and (another or self.layout.calls == "batch"):
            self.probe = self._begin(another, 2)

    def _check_arguments(self) -> None:
        name, chain, layout = type(self.pipe).__name__, self.chain, self.layout
        device = getattr(self.pipe, "_execution_device", torch.device("cpu"))
        if chain.divergence_probes and torch.is_autocast_enabled(device.type):
            raise ValueError(
                "divergence_probes must be 0 under torch.autocast, whose casts have no forward "
                f"derivative, got {chain.divergence_probes}: call the pipeline outside of it, with "
                "its networks in the precision that they are to have"
            )
        for network in layout.network:
            module = getattr(self.pipe, network, None)
            if getattr(module, "is_cache_enabled", False):
                raise ValueError(
                    f"pipe.{network} must have no cache of its blocks (FirstBlockCache, "
                    "PyramidAttentionBroadcast ...), which would hand one prompt's to another: "
                    f"call pipe.{network}.disable_cache()"
                )
        for argument, allowed in layout.fixed.items():
            value = self.arguments.get(argument, allowed[0])
            if not any(value is a or value == a for a in allowed):
                raise ValueError(
                    f"{argument} of the pipeline's call must be "
                    f"{' or '.join(map(repr, allowed))}, for with it a {name} changes the "
                    f"prediction beyond what guidance knows of, got {value!r}"
                )
        given = any(self.arguments.get(name) is not None for name in layout.overwrites_with)
        if given and chain.tracks and chain.mask is None:
            raise maskless(self.pipe)
        if layout.guidance is not None:
            self._check_guidance_scale()

    def _check_guidance_scale(self) -> None:
        layout, name = self.layout, self.layout.guidance
        assert name is not None
        value = self.arguments.get(name)
        least: Any = min(value) if isinstance(value, list | tuple) and value else value
        if least is None or not float(least) > layout.above:
            raise ValueError(
                f"{name} of the pipeline's call must be > {layout.above:g}, which makes it "
                f"evaluate the negative prompt (its value has no other effect), got {value}. To "
                "guide at some times only, limit the rule: dng_math.LimitedInterval(rule, t_lo, "
                "t_hi)"
            )

    # ------------------------------------------------------------------ prompts

    def _negative_names(self) -> tuple[list[str], list[str]]:
        """Arguments of the call that say its negative prompt: as text, and as embeddings."""
        if self.layout.negatives is not None:
            return [], list(self.layout.negatives)
        named = [p for p in _parameters_of(self.function) if p.startswith("negative_")]
        said = [p for p in named if "prompt" in p or p.endswith("attention_mask")]
        texts = [p for p in said if p.removeprefix("negative_prompt").strip("_23456") == ""]
        return texts, [p for p in said if p not in texts]

    def _prompts_of_the_call(self) -> int | None:
        """How many prompts the call has, None for a single one that is no list."""
        for name in ("prompt", "prompt_embeds"):
            value = self.arguments.get(name)
            if isinstance(value, list | tuple | Tensor):
                return len(value)
        return None

    def _without_negative(self) -> dict[str, Any]:
        texts, embeddings = self._negative_names()
        return dict.fromkeys([*texts, *embeddings])

    def _as_negative(self, text: str) -> dict[str, Any]:
        """Arguments that say a text where the call says its negative prompt, in the same form."""
        texts, _ = self._negative_names()
        if not texts:
            raise ValueError(
                f"negative_prompts must be given as embeddings: a {type(self.pipe).__name__} takes "
                "no negative prompt as text"
            )
        number = self._prompts_of_the_call()
        return self._without_negative() | {texts[0]: text if number is None else [text] * number}

    def _another_negative(self) -> dict[str, Any]:
        """Another negative prompt than the call's, to see what changes with it."""
        texts, embeddings = self._negative_names()
        given = {
            name: self.arguments[name]
            for name in embeddings
            if isinstance(self.arguments.get(name), Tensor)
        }
        if given:
            return {
                name: -1.5 * value if value.is_floating_point() else value
                for name, value in given.items()
            }
        return self._as_negative(ANOTHER_PROMPT) if texts else {}

    def _encode(self, concept: Concept, part: int) -> _Beginning:
        if concept.embeddings is not None:
            number = self._prompts_of_the_call() or 1
            given: dict[str, Any] = self._without_negative()
            for name, value in concept.embeddings.items():
                if len(value) not in (1, number):
                    raise ValueError(
                        f"negative_prompts as embeddings must have 1 row, or {number}, one for "
                        f"each prompt of the call, got {len(value)} for {name!r}"
                    )
                given[name] = value.expand(number, *value.shape[1:])
        elif concept.text is not None:
            given = self._as_negative(concept.text)
        else:
            given = self._unprompted()
        try:
            if concept.text is None and concept.embeddings is None:
                return self._begin_unprompted(given)
            return self._begin(given, 2)
        except (ValueError, TypeError, RuntimeError, AssertionError) as error:
            what = (
                "cfg_scale, which adds the empty prompt,"
                if concept.text is None and concept.embeddings is None
                else f"negative_prompts[{part - 2}]"
            )
            raise ValueError(
                f"{what} cannot be part of this call: {type(self.pipe).__name__} says "
                f"{type(error).__name__}: {error}. Where the call's prompts are embeddings, give "
                "embeddings of the same length"
            ) from error

    def _begin_unprompted(self, given: dict[str, Any]) -> _Beginning:
        """Without a negative prompt; with an empty one where the pipeline cannot do without."""
        separate = self.layout.calls == "separate"
        try:
            found = self._begin(given, 2)
            if not separate or len(found.calls) > 1:
                return found
        except (ValueError, TypeError, AttributeError):
            if not self._negative_names()[0]:
                raise
        return self._begin(self._as_negative(""), 2)

    def _unprompted(self) -> dict[str, Any]:
        """What a pipeline takes as its negative prompt where its user gives none."""
        given = self._without_negative()
        texts, _ = self._negative_names()
        default = _parameters_of(self.function)[texts[0]].default if texts else None
        if isinstance(self.arguments.get("prompt_embeds"), Tensor) and texts:
            return self._as_negative("")
        if isinstance(default, str):
            return self._as_negative(default)
        return given

    def _check_negative(self) -> None:
        """The negative prompt of the call says something, for every image."""
        if self.layout.labels is not None:
            return
        texts, embeddings = self._negative_names()
        given = [self.arguments[n] for n in texts if self.arguments.get(n) is not None]
        embedded = [
            self.arguments[n] for n in embeddings if isinstance(self.arguments.get(n), Tensor)
        ]
        if embedded:
            self._check_embeddings(next(e for e in embedded if e.is_floating_point()))
            return
        for value in given:
            each = value if isinstance(value, list | tuple) else [value]
            blank = [i for i, t in enumerate(each) if not (isinstance(t, str) and t.strip())]
            if not blank:
                return
            raise self._says_nothing(f"prompt {blank[0]} has none")
        raise self._says_nothing("it has none")

    def _says_nothing(self, detail: str) -> ValueError:
        return ValueError(
            "negative_prompt of the pipeline's call must be given, and not be empty: it is what "
            f"{self.chain.rule!r} avoids ({detail})"
        )

    def _check_embeddings(self, negative: Tensor) -> None:
        """Given embeddings are not those of the empty prompt, scaled, padded or repeated."""
        empty = self._empty_embeddings()
        for image, tokens in enumerate(negative):
            if not bool(tokens.any()):
                raise self._says_nothing(f"embeddings {image} are zero")
            if empty is not None and _says_what(tokens, empty) < EMPTY_TOLERANCE:
                raise self._says_nothing(f"embeddings {image} are those of the empty prompt")

    def _empty_embeddings(self) -> Tensor | None:
        """Those of the empty prompt, by token; None if the pipeline cannot encode one."""
        encode = getattr(self.pipe, "encode_prompt", None)
        names = [n for n in self.pipe.components if n.startswith("text_encoder")]
        if encode is None or not any(getattr(self.pipe, n, None) is not None for n in names):
            return None
        _, embeddings = self._negative_names()
        positive = [name.removeprefix("negative_") for name in embeddings]
        given = dict.fromkeys([*positive, *embeddings]) | {"prompt": ""}
        texts, _ = self._negative_names()
        given |= {texts[0]: ""} if texts else {}
        given = {n: v for n, v in given.items() if n in _parameters_of(self.function)}
        try:
            found = self._begin(given, 2)
        except Exception:  # what the call has besides may not go with one prompt
            return None
        part = self._part(found, NEGATIVE)
        for path, value in rows.leaves(found.calls[part]):
            if rows.matches(path, self.layout.text[:1]) and value.ndim >= 2:
                start = 0 if self.layout.calls == "separate" else self._half(NEGATIVE)
                whole = value if self.layout.calls == "separate" else value.chunk(2)[start]
                return whole[0]
        return None

    def _part(self, found: _Beginning, part: int) -> int:
        """Which call of the network has a prompt."""
        if self.layout.calls != "separate":
            return 0
        return self._half(part) if len(found.calls) > 1 else 0

    def _half(self, part: int) -> int:
        """Where the negative or the positive prompt stands, 0 or 1."""
        return part if self.layout.first == "negative" else 1 - part

    # ------------------------------------------------------------------ calls that are only begun

    def _begin(self, given: Mapping[str, Any], networks: int) -> _Beginning:
        """What the pipeline shows its networks at first, with other arguments in its call."""
        found = self.beginning = _Beginning()
        wanted = networks - (self.layout.calls == "batch")
        arguments = {**self.arguments, **given}
        try:
            with (
                _random_numbers_kept(self.arguments),
                _no_progress_bar(self.pipe),
                self.watching_the_scheduler(),
            ):
                self._wanted = wanted
                self.function(**arguments)
        except _Stop:
            pass
        finally:
            self.beginning = None
        if not found.calls:
            raise ValueError(
                f"pipe must call its pipe.{' or pipe.'.join(self.layout.network)} in every call, "
                "and this one did not"
            )
        return found

    def _seen(self, hook: _Hook, module: nn.Module, arguments: dict[str, Any]) -> Any:
        """A call of a network in a beginning."""
        assert self.beginning is not None
        if hook.control is not None:
            self.beginning.control.setdefault(hook.control.name, arguments)
            return hook.call(module, (), arguments)
        # A pipeline may fill a container anew for its next call, and networks take things out.
        self.beginning.calls.append(_copied(arguments))
        if len(self.beginning.calls) >= self._wanted:
            raise _Stop
        # Any answer of the right kind does: nobody looks at what becomes of it.
        if not self.outputs:
            with torch.no_grad():
                self.outputs.append(hook.call(module, (), _copied(arguments)))
        return self.outputs[0]

    # ------------------------------------------------------------------ the scheduler

    @contextmanager
    def watching_the_scheduler(self) -> Iterator[None]:
        """See every step of the pipeline's scheduler, for the length of a block."""
        scheduler = self.scheduler
        step = scheduler.step
        signature = inspect.signature(step)

        @functools.wraps(step)
        def watched(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            sample = given.arguments["sample"]
            if self.beginning is not None:
                self.beginning.shape = sample.shape
                raise _Stop
            self._check_step(given.arguments, sample)
            output = step(*args, **kwargs)
            self._took(sample, output[0])
            return output

        already = scheduler.__dict__.get("step")
        scheduler.step = watched
        try:
            yield
        finally:
            if already is None:
                del scheduler.step
            else:
                scheduler.step = already

    def _eta(self) -> float | None:
        """What the scheduler's step will be given, of DDIM."""
        parameter = inspect.signature(self.scheduler.step).parameters.get("eta")
        if parameter is None:
            return None
        value = self.arguments.get("eta", parameter.default)
        return 0.0 if value is None else float(value)

    def _check_step(self, given: Mapping[str, Any], sample: Tensor) -> None:
        """What the scheduler is given is what guidance made."""
        pending, name = self.pending, type(self.pipe).__name__
        step = self.chain.step
        if pending is None or step is None:
            raise ValueError(
                f"the {name} took a step of its scheduler without a guided prediction: the network "
                "that it calls is not the one that it had when its call began"
            )
        if self.layout.calls == "separate" and pending.calls < 2:
            raise ValueError(
                f"pipe must call its network once for each prompt at every step, and this {name} "
                f"did not at step {step}: {self.layout.guidance or 'its call'} must switch the "
                "negative prompt on, throughout (dng_math.LimitedInterval(rule, t_lo, t_hi) guides "
                "at some times only)"
            )
        timesteps = self.scheduler.timesteps
        at = given["timestep"]
        at = float(at.reshape(-1)[0]) if isinstance(at, Tensor) else float(at)
        if abs(float(timesteps[step]) - at) > 1e-4 * max(1.0, abs(at)):
            raise ValueError(
                f"timestep must be {float(timesteps[step]):g} at step {step} of this run, got "
                f"{at:g}: a step was left out"
            )
        eta = self._eta()
        told = given.get("eta")
        if eta is not None and told is not None and abs(float(told) - eta) > 1e-6:
            raise ValueError(
                f"eta must be the same in the pipeline's call and its scheduler's step, got "
                f"{eta:g} and {float(told):g}"
            )
        self._check_prediction(given["model_output"], pending)
        if self.last_next is not None:
            self._check_changes(self._of_images(sample))
        if pending.x is not None and self.chain.divergence_probes:
            scale = float(self.chain.input_scale)
            if not _near(pending.x, self._of_images(sample) * scale):
                raise ValueError(
                    f"divergence_probes must be 0 for a {name}: what its network is shown is not "
                    "the scheduler's latents"
                )

    def _of_images(self, sample: Tensor) -> Tensor:
        """The rows of images, where a scheduler steps the doubled batch."""
        return sample.chunk(2)[0] if self.layout.doubled_step else sample

    def _check_prediction(self, output: Tensor, pending: _Pending) -> None:
        expected = pending.guided
        if pending.perturbed is not None:
            scale = self.pipe._get_pag_scale(self.scheduler.timesteps[self.chain.step])
            expected = expected + float(scale) * pending.perturbed
        output = self._of_images(output)
        if output.shape != expected.shape:
            raise ValueError(
                f"pipe must hand its scheduler the prediction that its network made, of shape "
                f"{tuple(expected.shape)}, but this {type(self.pipe).__name__} gave it one of "
                f"{tuple(output.shape)}"
            )
        mask = self.chain.mask
        if mask is not None:
            # What is overwritten anyway may be replaced here already.
            self.chain.check_mask(output)
            counts = mask.to(output.device) > 0.5
            output, expected = output * counts, expected * counts
        if not _near(output, expected):
            raise ValueError(
                "pipe must hand its scheduler the guided prediction as it is, but this "
                f"{type(self.pipe).__name__} changed it, by up to "
                f"{float((output.float() - expected.float()).abs().max()):.3g} of "
                f"{float(expected.float().abs().max()):.3g}: leave out what does more in its call "
                "than guidance with the negative prompt (rescaling, perturbed attention, skipped "
                "layers), or, where it replaces a part of the prediction by what it was given "
                "(frames of a video), give a mask= that is 0 there"
            )

    def _check_changes(self, sample: Tensor) -> None:
        """Whether the latents are what the last step made of them."""
        last = self.last_next
        assert last is not None
        untouched = _version(last) == self.last_version
        if self.told_of_changes or not self.chain.tracks or (sample is last and untouched):
            return
        if sample.shape != last.shape:
            raise ValueError(
                f"the batch must stay the same during a run: step {self.chain.step} has latents "
                f"of shape {tuple(sample.shape)}, the step before made {tuple(last.shape)}"
            )
        coarser = sample.dtype if sample.element_size() <= last.element_size() else last.dtype
        same = torch.isclose(
            sample.to(coarser).float(), last.to(coarser).float(), 1e-5, 1e-6, equal_nan=True
        )
        if self.chain.mask is not None:
            same |= self.chain.mask.to(same.device) <= 0.5
        if bool(same.all()) and (untouched or self.chain.mask is not None):
            return
        self.told_of_changes = True
        warnings.warn(
            f"the latents were changed before step {self.chain.step}, by a callback or by the "
            "pipeline itself: what the change says of the unwanted is not in the tracked posterior",
            stacklevel=3,
        )

    def _took(self, sample: Tensor, x_next: Tensor) -> None:
        sample, x_next = self._of_images(sample), self._of_images(x_next)
        self.pending, self.last_next, self.last_version = None, x_next, _version(x_next)
        self.chain.took(sample, x_next)

    def check_end(self) -> None:
        """No prediction is left over."""
        if self.pending is not None:
            raise ValueError(
                f"the last guided prediction of this {type(self.pipe).__name__} never reached its "
                "scheduler"
            )

    # ------------------------------------------------------------------ the network

    @contextmanager
    def evaluating_itself(self) -> Iterator[None]:
        """While guidance evaluates networks itself, which may call each other."""
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def network(self, hook: _Hook, module: nn.Module, arguments: dict[str, Any]) -> Any:
        """A call of the pipeline's network: the guided prediction for every prompt in it."""
        if self.beginning is not None:
            return self._seen(hook, module, arguments)
        if self.pipe.scheduler is not self.scheduler:
            raise ValueError(
                "pipe.scheduler must stay the same during a run: at step "
                f"{self.chain.step} a {type(self.pipe.scheduler).__name__} stands where the run "
                f"began with a {type(self.scheduler).__name__}"
            )
        if self.pending is not None:
            if self.layout.calls == "separate" and self.pending.calls == 1:
                return self._second(arguments)
            raise ValueError(
                f"pipe must call its network once a step and prompt, but this "
                f"{type(self.pipe).__name__} called it once more at step {self.chain.step}: "
                "leave out what does more in its call than guidance with the negative prompt "
                "(skipped layers, self-attention guidance)"
            )
        latents = self._latents(module, arguments)
        self.shown = arguments
        if self.layout.calls == "batch":
            return self._batch(hook, module, arguments, latents)
        if self.layout.calls == "separate":
            return self._separate(hook, module, arguments, latents)
        return self._alone(hook, module, arguments, latents)

    def _latents(self, module: nn.Module, arguments: dict[str, Any]) -> Tensor:
        found = arguments.get(self.layout.latents)
        if isinstance(found, list) and found:
            # Of a row that is a list itself the last entry: pictures stand before it.
            found = torch.stack([row[-1] if isinstance(row, list) else row for row in found])
        if not isinstance(found, Tensor):
            raise ValueError(
                f"pipe must call its {type(module).__name__} with a tensor {self.layout.latents}, "
                f"got {sorted(arguments)}"
            )
        return found

    def _arrive(self, arguments: dict[str, Any], device: torch.device) -> None:
        """A step begins: the first of a run, or the next."""
        chain, scheduler = self.chain, self.scheduler
        told = self._time(arguments)
        if not chain.belongs_to(scheduler):
            if chain.step is not None and scheduler.timesteps is chain.timesteps:
                raise ValueError(
                    f"the run is over: its {type(scheduler).__name__} has "
                    f"{len(scheduler.timesteps)} steps"
                )
            self.last_next = None
            chain.begin(scheduler, _first_step(scheduler, told), eta=self._eta(), device=device)
        step = chain.step
        assert step is not None
        expected = float(scheduler.timesteps[step])
        training = float(getattr(scheduler.config, "num_train_timesteps", 1000))
        if told is not None and abs(told - expected) > SAME_TIME * max(expected, 0.01 * training):
            raise ValueError(
                f"timestep must be {expected:g} at step {step} of this run, got {told:g}: a step "
                f"was left out, or {self.layout.time} of the network is not "
                f"{_UNITS[self.layout.time_unit]}, as the layout of {type(self.pipe).__name__} says"
            )

    def _time(self, arguments: dict[str, Any]) -> float | None:
        """The timestep that the network is told, in the scheduler's unit."""
        if self.layout.time_unit == "other":
            return None
        value = arguments.get(self.layout.time)
        if value is None:
            raise ValueError(
                f"pipe must tell its network the time as {self.layout.time}, as the layout of "
                f"{type(self.pipe).__name__} says, got {sorted(arguments)}"
            )
        if isinstance(value, Tensor):
            flat = value.reshape(-1)
            if self.layout.times:
                least = self.layout.time_unit in ("reversed", "reversed fraction")
                flat = (flat.min() if least else flat.max()).reshape(1)
            if len(flat) > 1 and bool((flat != flat[0]).any()):
                raise ValueError(
                    f"pipe must tell its network one time for all images, got {self.layout.time} "
                    f"from {float(flat.min()):g} to {float(flat.max()):g}"
                )
            value = flat[0]
        t = float(value)
        training = float(getattr(self.scheduler.config, "num_train_timesteps", 1000))
        unit = self.layout.time_unit
        if unit in ("reversed", "reversed fraction"):
            t = (training if unit == "reversed" else 1.0) - t
        return t * training if unit.endswith("fraction") else t

    # ------------------------------------------------------------------ between network and chain

    def _channels(self, prediction: Tensor) -> int:
        """How many channels of an output the scheduler is given."""
        channels = prediction.shape[1]
        if not self.layout.variance:
            return channels
        if self.layout.variance == "always":
            return channels // 2
        # The network's own numbers, of channels or of the patches that they are folded into.
        known = (getattr(self.pipe, name, None) for name in self.layout.network)
        config = next(c for c in (getattr(n, "config", None) for n in known) if c is not None)
        return channels // 2 if config.out_channels == 2 * config.in_channels else channels

    def _kept(self, dimensions: int) -> tuple[slice, ...]:
        """Where in a tensor of all tokens or frames those are that the scheduler steps."""
        assert self.layout.kept is not None
        axis, place = self.layout.kept
        shape = self.encoded[POSITIVE].shape
        if shape is None or len(shape) != dimensions:
            raise ValueError(
                f"pipe must step latents of {dimensions} dimensions, like its network's output, "
                f"but those of this {type(self.pipe).__name__} are {shape}"
            )
        size = shape[axis]
        return (*[slice(None)] * axis, slice(size) if place == "first" else slice(-size, None))

    def _latents_in(self, shown: Tensor, like: Tensor) -> tuple[slice, ...] | None:
        """Where in what the network is shown the scheduler's latents are, beside conditions."""
        sizes = zip(shown.shape, like.shape, strict=False)
        if shown.ndim != like.ndim or any(whole < part for whole, part in sizes):
            return None
        found = [slice(n) for n in like.shape]
        if self.layout.kept is not None and self.layout.kept[1] == "last":
            axis = self.layout.kept[0]
            found[axis] = slice(-like.shape[axis], None)
        return tuple(found)

    def _arranged(self, value: Tensor) -> Tensor:
        """What the pipeline makes of an output or an input of its network for its scheduler."""
        arrange = self.layout.arranged
        return value if arrange is None else arrange(self.pipe, value, self.shown)

    def _as_before(self, arranged: Tensor, like: Tensor) -> Tensor:
        """Of such an arrangement, what the network gave or was shown; the rest is like that."""
        if self.layout.arranged is None:
            return arranged
        places = torch.arange(like.numel(), device=like.device).reshape(like.shape)
        flat = like.reshape(-1).clone()
        flat[self._arranged(places).reshape(-1)] = arranged.reshape(-1)
        return flat.reshape(like.shape)

    def _showing(self, shown: Tensor, x: Tensor) -> Tensor:
        """What the network is shown, with other latents in it."""
        whole = self._arranged(shown).clone()
        place = self._latents_in(whole, x)
        assert place is not None
        whole[place] = x.to(whole.dtype)
        return self._as_before(whole, shown)

    def _to_step(self, prediction: Tensor) -> Tensor:
        """As the scheduler is given it."""
        prediction = self._arranged(prediction)
        if self.layout.kept is not None:
            prediction = prediction[self._kept(prediction.ndim)]
        own = prediction[:, : self._channels(prediction)]
        return own if self.layout.sign > 0 else -own

    def _from_step(self, guided: Tensor, like: Tensor) -> Tensor:
        """As the network would have returned it."""
        own = guided if self.layout.sign > 0 else -guided
        whole = self._arranged(like).clone()
        part = whole if self.layout.kept is None else whole[self._kept(whole.ndim)]
        part[:, : own.shape[1]] = own
        return self._as_before(whole, like)

    def _guide(
        self, predictions: Mapping[int, Tensor], network: Callable[[Tensor], list[Tensor]], x: Any
    ) -> Tensor:
        """The guided prediction, as the scheduler is given it."""
        unconditional = self.calls.unconditional
        positive = self._to_step(predictions[POSITIVE])
        x = None if x is None else self._arranged(x)
        at = None if x is None else self._latents_in(x, positive)
        x = None if at is None else x[at].contiguous()
        self.probing = True
        try:
            guided = self.chain.guide(
                positive,
                [self._to_step(predictions[part]) for part in self.calls.negatives],
                None if unconditional is None else self._to_step(predictions[unconditional]),
                network=None if x is None else network,
                x=x,
            )
        finally:
            self.probing = False
        if self.layout.guided is not None:
            rest = positive[:, self.layout.guided :]
            guided = torch.cat([guided[:, : self.layout.guided], rest], dim=1)
        self.pending = _Pending(guided, x)
        return guided

    # ------------------------------------------------------------------ one batch for all prompts

    def _batch(
        self, hook: _Hook, module: nn.Module, arguments: dict[str, Any], latents: Tensor
    ) -> Any:
        layout = self.layout
        parts = self._parts
        if len(latents) % parts:
            raise self._not_doubled(len(latents))
        batch = len(latents) // parts
        if self.images is None:
            self._check_rows(arguments, batch, parts)
            if self.probe is not None:
                self._check_against_probe(arguments, batch * parts, parts)
        elif batch != self.images:
            raise self._other_batch(batch, len(latents))
        self.images = batch
        self._arrive(arguments, latents.device)
        predict = self._by_growing if self._grows else self._by_replacing
        whole, output = predict(hook, module, arguments, batch, parts)
        first = self._half(POSITIVE)

        def network(at: Tensor) -> list[Tensor]:
            shown: Any = torch.cat([self._showing(part, at) for part in latents.chunk(parts)])
            if isinstance(given := arguments[layout.latents], list):
                rows_and_latents = zip(given, shown, strict=True)
                shown = [[*r[:-1], z] if isinstance(r, list) else z for r, z in rows_and_latents]
            found, _ = predict(hook, module, {**arguments, layout.latents: shown}, batch, parts)
            return [self._to_step(found[part]) for part in (POSITIVE, *self.calls.negatives)]

        x = latents.chunk(parts)[first]
        guided = self._guide(whole, network, x if latents.ndim > 1 else None)
        answer = self._from_step(guided, whole[POSITIVE])
        halves = [answer, answer]
        if parts == 3:
            perturbed = whole[PERTURBED]
            assert self.pending is not None
            self.pending.perturbed = self._to_step(whole[POSITIVE]) - self._to_step(perturbed)
            halves.append(answer - (whole[POSITIVE] - perturbed))
        return _replaced(output, torch.cat(halves))

    @property
    def _parts(self) -> int:
        """Parts of the batch: negative, positive, and with PAG the perturbed positive."""
        perturbed = getattr(self.pipe, "do_perturbed_attention_guidance", False)
        return 3 if self.layout.perturbs and perturbed else 2

    @property
    def _grows(self) -> bool:
        """Whether added prompts are rows of the same batch (PAG tells its parts by their place)."""
        return self.layout.batched is not None and self._parts == 2

    def _by_growing(
        self, hook: _Hook, module: nn.Module, arguments: dict[str, Any], batch: int, parts: int
    ) -> tuple[dict[int, Tensor], Any]:
        """All predictions from one call, to which further prompts are further rows."""
        evaluated = self._to_evaluate(batch, together=False)
        everyone = torch.arange(batch)
        some = everyone if evaluated is None else everyone[evaluated]
        used, negatives = self.calls.used, self.calls.negatives
        members = {part: some if part in negatives else everyone for part in used}
        members = {part: images for part, images in members.items() if len(images)}
        whole = all(len(images) == batch for images in members.values())
        if list(members) == [NEGATIVE, POSITIVE] and whole and not self.grown:
            output = hook.call(module, (), arguments)
            halves = _prediction(output).chunk(2)
            return {part: halves[self._half(part)] for part in (NEGATIVE, POSITIVE)}, output
        assert self.layout.batched is not None
        grown = self._grown(
            arguments, batch, members, self.layout, lambda part: self.encoded[part].calls[0]
        )
        output = hook.call(module, (), grown)
        sizes = [len(images) for images in members.values()]
        found = dict(zip(members, torch.split(_prediction(output), sizes), strict=True))
        for part in negatives:
            images = members.get(part)
            if images is None or len(images) < batch:
                # Rows that were not evaluated hold the positive prediction: no evidence, no push.
                every = found[POSITIVE].clone()
                if images is not None:
                    every[images.to(every.device)] = found[part]
                found[part] = every
        return found, output

    def _to_evaluate(self, batch: int, *, together: bool) -> Tensor | None:
        """Images whose unwanted concepts are predicted at this step; None for all."""
        return None if self.probing else self.chain.to_evaluate(batch, together=together)

    def _grown(
        self,
        arguments: dict[str, Any],
        batch: int,
        members: Mapping[int, Tensor],
        layout: Layout | Control,
        encoded: Callable[[int], Mapping[str, Any]],
    ) -> dict[str, Any]:
        """The arguments with rows for images of every part: 0 negative, 1 positive, 2 ... added."""
        full = 2 + len(self.calls.added)

        def rows_of(path: str, value: Tensor) -> Tensor:
            is_text = rows.matches(path, layout.text)
            if not is_text and not rows.matches(path, layout.batched or ()):
                return value
            if value.ndim == 0 or len(value) == 1:
                return value
            parts = full if any(rows.matches(path, (name,)) for name in self.grown) else 2
            each = len(value) // (parts * batch)
            pieces = []
            for part, images in members.items():
                if part < 2 or parts == full:
                    place = self._half(part) if part < 2 else part
                    source = value
                elif is_text:
                    place, source = self._half(NEGATIVE), rows.at(encoded(part), path)
                else:
                    # An added prompt stands where the negative one does.
                    place, source = self._half(NEGATIVE), value
                at = rows.of_images(place, images, batch, each)
                pieces.append(source[at.to(source.device)].to(value.device, value.dtype))
            return torch.cat(pieces)

        grown: dict[str, Any] = rows.mapped(arguments, rows_of)
        return grown

    def _by_replacing(
        self, hook: _Hook, module: nn.Module, arguments: dict[str, Any], batch: int, parts: int
    ) -> tuple[dict[int, Tensor], Any]:
        """All predictions, each added prompt from a call in which it is the negative one."""
        used = self.calls.used
        added = [part for part in used if part >= 2]
        evaluated = self._to_evaluate(batch, together=True)
        if evaluated is not None and not bool(evaluated.any()):
            skipped = [part for part in self.calls.negatives if part >= 2]
            added = [part for part in added if part not in skipped]
        else:
            skipped = []
        place = self._half(NEGATIVE)
        first = arguments
        taken = None
        if NEGATIVE not in used and added:
            taken = added.pop(0)
            first = self._with_text(arguments, taken, batch)
        output = hook.call(module, (), first)
        pieces = _prediction(output).chunk(parts)
        found = {POSITIVE: pieces[self._half(POSITIVE)]}
        found[NEGATIVE if taken is None else taken] = pieces[place]
        if parts == 3:
            found[PERTURBED] = pieces[2]
        for part in added:
            other = hook.call(module, (), self._with_text(arguments, part, batch))
            found[part] = _prediction(other).chunk(parts)[place]
        for part in skipped:
            found[part] = found[POSITIVE]
        return found, output

    def _with_text(self, arguments: dict[str, Any], part: int, batch: int) -> dict[str, Any]:
        """The arguments with an added prompt in the negative one's rows."""
        concept, parts = self.calls.added[part - 2], self._parts
        controlled = self.controlled.get(part, {})
        if self.layout.whole:
            given = rows.with_text(arguments, self.encoded[part].calls[0], self.layout.text)
            return rows.mapped(
                given, lambda path, value: controlled[path] if path in controlled else value
            )

        def replaced(path: str, value: Any) -> Any:
            if path in controlled:
                return controlled[path].to(value)
            if not rows.matches(path, self.layout.text):
                return value
            size = len(value) // parts
            start = self._half(NEGATIVE) * size
            whole = value.clone()
            if concept.label is not None:
                whole[start : start + size] = concept.label
                return whole
            source = rows.at(self.encoded[part].calls[0], path)
            if source.shape != value.shape:
                raise self._other_shape(path, source, value)
            whole[start : start + size] = source[start : start + size].to(value)
            return whole

        grown: dict[str, Any] = rows.mapped(arguments, replaced)
        return grown

    def _other_shape(self, path: str, source: Tensor, value: Tensor) -> ValueError:
        return ValueError(
            f"negative_prompts must be encoded like the call's prompts, to {path} of shape "
            f"{tuple(value.shape)}, got {tuple(source.shape)}"
        )

    # ------------------------------------------------------------------ what a layout says, checked

    def _not_doubled(self, size: int) -> ValueError:
        return ValueError(
            "pipe must call its network once a step with every latent twice, but this "
            f"{type(self.pipe).__name__} called it with a batch of {size}: "
            f"{self.layout.guidance or 'its call'} must switch the negative prompt on, throughout "
            "(dng_math.LimitedInterval(rule, t_lo, t_hi) guides at some times only)"
        )

    def _other_batch(self, batch: int, size: int) -> ValueError:
        if not getattr(self.pipe, "do_classifier_free_guidance", True):
            return self._not_doubled(size)
        return ValueError(
            f"the batch must stay the same during a run: step {self.chain.step} has {batch} "
            f"images, the step before had {self.images}. A callback that cuts guidance off must "
            "be replaced by dng_math.LimitedInterval(rule, t_lo, t_hi)"
        )

    def _check_rows(self, arguments: dict[str, Any], batch: int, parts: int) -> None:
        """Every tensor has the rows that the layout says."""
        total, layout = batch * parts, self.layout
        needed = self.calls.added or self.chain.skip_below is not None
        text = 0
        for path, value in rows.leaves(arguments):
            is_text = rows.matches(path, layout.text)
            text += is_text
            one = value.ndim == 0 or len(value) == 1
            declared = is_text or rows.matches(path, layout.batched or ())
            if is_text and layout.whole:
                continue
            if declared and not one and len(value) % total and path not in self.grown:
                grown = batch * (2 + len(self.calls.added))
                if any(rows.matches(path, (n,)) for n in self.grown) and not len(value) % grown:
                    continue
                raise ValueError(
                    f"pipe must call its network with rows for every prompt and image, {total} or "
                    f"a multiple, but {path} has {len(value)} (layout of "
                    f"{type(self.pipe).__name__})"
                )
            known = declared or path == layout.latents or rows.matches(path, layout.shared)
            if layout.batched is not None and needed and not known and not one:
                raise ValueError(
                    f"the layout of {type(self.pipe).__name__} does not say whether its network's "
                    f"{path}, of shape {tuple(value.shape)}, has a row for every prompt: give "
                    "apply_guidance a layout= that does"
                )
        if not text:
            raise ValueError(
                f"pipe must show its network the prompt as {' or '.join(layout.text)}, as the "
                f"layout of {type(self.pipe).__name__} says, got {sorted(arguments)}"
            )

    def _check_against_probe(self, arguments: dict[str, Any], total: int, parts: int) -> None:
        """With another negative prompt the negative rows of the text differ, and nothing else."""
        assert self.probe is not None
        other = dict(rows.leaves(self.probe.calls[0]))
        name, differs = type(self.pipe).__name__, False
        place = self._half(NEGATIVE)
        lists = isinstance(arguments[self.layout.latents], list)
        for path, value in rows.leaves(arguments):
            reference = other.get(path)
            if reference is None or any(rows.matches(path, (n,)) for n in self.grown):
                continue
            if lists and rows.matches(path, self.layout.text):
                value, reference = self._changed_row(arguments, path, value, reference, parts)
            if reference.shape != value.shape:
                if rows.matches(path, self.layout.text):
                    differs = True
                    continue
                raise self._undeclared(path)
            if value.ndim == 0 or len(value) < parts or len(value) % parts:
                continue
            pairs = zip(value.chunk(parts), reference.chunk(parts), strict=True)
            changed = [not _near(one, another) for one, another in pairs]
            if not any(changed):
                continue
            if not rows.matches(path, self.layout.text):
                if path in self._controlled():
                    continue
                raise self._undeclared(path)
            mixed = self.layout.whole and all(changed)  # rows are on another axis
            if any(c for part, c in enumerate(changed) if part != place) and not mixed:
                raise ValueError(
                    f"the layout of {name} says that the {self.layout.first} prompt comes first in "
                    f"the batch, but another negative prompt changes other rows of {path}"
                )
            differs = True
        if not differs:
            raise ValueError(
                f"negative_prompt must reach the network, but this {name} shows it the same for "
                "another one: its call does not evaluate a negative prompt"
            )

    @staticmethod
    def _changed_row(
        arguments: dict[str, Any], path: str, value: Tensor, reference: Tensor, parts: int
    ) -> tuple[Tensor, Tensor]:
        """Of a row in a list: zeros, one a part of the batch, and with 1 where the row differs."""
        name, index = path.split(".")[:2]
        part = int(index) * parts // len(arguments[name])
        differs = value.shape != reference.shape or not _near(value, reference)
        return torch.zeros(parts), torch.eye(parts)[part] * differs

    def _controlled(self) -> set[str]:
        """Arguments that come from control networks, which read the prompt."""
        given = [name for control in self.layout.control for name in control.gives]
        assert self.probe is not None
        return {p for p, _ in rows.leaves(self.probe.calls[0]) if rows.matches(p, given)}

    def _undeclared(self, path: str) -> ValueError:
        return ValueError(
            f"the layout of {type(self.pipe).__name__} does not say that its network's {path} "
            "depends on the prompt, but it changes with the negative prompt"
        )

    # ------------------------------------------------------------------ networks beside it

    def control(
        self, hook: _Hook, module: nn.Module, control: Control, arguments: dict[str, Any]
    ) -> Any:
        """A call of a control network, which sees the prompts that are added too."""
        if self.beginning is not None:
            return self._seen(hook, module, arguments)
        if self.layout.calls == "separate":
            self.controls[control] = (hook, module, arguments)
        if not self.calls.added or self.layout.calls != "batch":
            return hook.call(module, (), arguments)
        encoded = {part: b.control.get(control.name) for part, b in self.encoded.items()}
        if any(e is None for e in encoded.values()):
            raise ValueError(f"pipe.{control.name} must be called in the first step already")
        if self._guesses(control, arguments):
            return hook.call(module, (), arguments)
        if not self._grows:
            return self._controlled_apart(hook, module, control, arguments)
        batch = len(next(iter(self.encoded.values())).calls[0][self.layout.latents]) // 2
        members = dict.fromkeys(range(2 + len(self.calls.added)), torch.arange(batch))
        grown = self._grown(arguments, batch, members, control, lambda part: encoded[part] or {})
        self.grown = set(control.gives)
        return hook.call(module, (), grown)

    def _guesses(self, control: Control, arguments: dict[str, Any]) -> bool:
        """Whether a control network is shown the positive prompt only, as in guess mode."""
        main = dict(rows.leaves(next(iter(self.encoded.values())).calls[0]))
        for path, value in rows.leaves(arguments):
            if rows.matches(path, control.text) and path in main:
                return 2 * len(value) == len(main[path])
        return False

    def _controlled_apart(
        self, hook: _Hook, module: nn.Module, control: Control, arguments: dict[str, Any]
    ) -> Any:
        """What a control network says of every added prompt, each in the negative one's place."""
        place = self._half(NEGATIVE)
        for part in range(2, 2 + len(self.calls.added)):
            given = self.encoded[part].control[control.name]

            def replaced(path: str, value: Tensor, given: Any = given) -> Tensor:
                if not rows.matches(path, control.text):
                    return value
                size = len(value) // self._parts
                at = slice(place * size, (place + 1) * size)
                whole = value.clone()
                whole[at] = rows.at(given, path)[at].to(value)
                return whole

            output = hook.call(
                module,
                (),
                rows.with_text(arguments, given, control.text)
                if self.layout.whole
                else rows.mapped(arguments, replaced),
            )
            outputs = [output] if isinstance(output, Mapping) else output
            named = dict(zip(control.gives, outputs, strict=False))
            self.controlled[part] = dict(rows.leaves(named))
        return hook.call(module, (), arguments)

    # ------------------------------------------------------------------ one call a prompt

    def _separate(
        self, hook: _Hook, module: nn.Module, arguments: dict[str, Any], latents: Tensor
    ) -> Any:
        batch = len(latents)
        if self.images is None:
            self._check_separate(arguments)
        elif batch != self.images:
            raise self._other_batch(batch, batch)
        self.images = batch
        self._arrive(arguments, latents.device)
        evaluated = self._to_evaluate(batch, together=True)
        skipping = evaluated is not None and not bool(evaluated.any())
        own = NEGATIVE if self.layout.first == "negative" else POSITIVE

        def predict(given: dict[str, Any]) -> tuple[dict[int, Tensor], Any]:
            found: dict[int, Tensor] = {}
            output: Any = None
            for part in self.calls.used:
                if skipping and part in self.calls.negatives:
                    continue
                shown = given if part == own else self._controlled_for(given, part)
                answer = hook.call(module, (), _copied(shown))
                if part == POSITIVE:
                    output = answer
                found[part] = _prediction(answer)
            for part in self.calls.negatives:
                found.setdefault(part, found[POSITIVE])
            return found, output

        def network(at: Tensor) -> list[Tensor]:
            shown = latents.clone()
            shown[self._latents_in(latents, at) or ...] = at.to(latents.dtype)
            # Caches of a prompt that belong to the run itself are left alone.
            caches = {n: v for n, v in self._text_of(own).items() if not isinstance(v, Tensor)}
            found, _ = predict({**arguments, **caches, self.layout.latents: shown})
            return [self._to_step(found[part]) for part in (POSITIVE, *self.calls.negatives)]

        found, output = predict(arguments)
        guided = self._guide(found, network, latents)
        answer = _replaced(output, self._from_step(guided, found[POSITIVE]))
        self._first_call = (arguments, answer)
        return answer

    def _first_shown(self, part: int) -> dict[str, Any]:
        """The arguments of the call for a prompt when it was begun."""
        half = self._half(POSITIVE if part == POSITIVE else NEGATIVE)
        return self.encoded[part].calls[half]

    def _text_of(self, part: int) -> dict[str, Any]:
        """Those of them that depend on the prompt."""
        shown = self._first_shown(part)
        return {n: v for n, v in shown.items() if rows.matches(n, self.layout.text)}

    def _controlled_for(self, arguments: dict[str, Any], part: int) -> dict[str, Any]:
        """The arguments of a call with another prompt's text, which control networks read too."""
        found = self._for_prompt(arguments, part)
        if part in self.calls.negatives:
            found |= {name: arguments[name] for name in self.layout.blanks}
        for control, (hook, module, seen) in self.controls.items():
            text = {name: found[name] for name in control.text}
            output = hook.call(module, (), {**seen, **text})
            found.update(zip(control.gives, output, strict=False))
        return found

    def _for_prompt(self, arguments: dict[str, Any], part: int) -> dict[str, Any]:
        """The arguments of a call with another prompt's text."""
        names, texts, text = self.layout.text, self._first_shown(part), self._text_of(part)
        found = {
            name: text.get(name) if rows.matches(name, names) else value
            for name, value in arguments.items()
        } | text
        for name in [n for n, v in texts.items() if isinstance(v, Mapping) and n not in names]:
            inner = {k: v for k, v in texts[name].items() if rows.matches(f"{name}.{k}", names)}
            found[name] = {**(found.get(name) or {}), **inner}
        return found

    def _check_separate(self, arguments: dict[str, Any]) -> None:
        """The pipeline makes two calls a step, which differ by their text."""
        name, own = type(self.pipe).__name__, self.encoded[POSITIVE]
        if len(own.calls) < 2:
            raise ValueError(
                f"the pipeline's call must make it evaluate a negative prompt, but this {name} "
                'called its network once in its first step: give it a negative_prompt ("" for '
                f"none){'' if self.layout.guidance is None else f' and a {self.layout.guidance}'}, "
                "and no guider or option that leaves it out"
            )
        if self.probe is not None:
            if len(self.probe.calls) < 2:
                raise ValueError(f"this {name} called its network once for another prompt")
            for part in (NEGATIVE, POSITIVE):
                place = self._half(part)
                changed = self._changed(own.calls[place], self.probe.calls[place])
                if part == POSITIVE and changed:
                    raise ValueError(
                        f"the layout of {name} says that the {self.layout.first} prompt is "
                        f"evaluated first, but another negative prompt changes {changed[0]} of the "
                        "positive one's call"
                    )
                if part == NEGATIVE and not changed:
                    raise ValueError(
                        f"negative_prompt must reach the network, but this {name} shows it the "
                        "same for another one"
                    )
        given = [name for control in self.layout.control for name in control.gives]
        for path in self._changed(*own.calls[:2]):
            if not rows.matches(path, (*self.layout.text, *self.layout.blanks, *given)):
                raise ValueError(
                    f"the layout of {name} does not say that its network's {path} depends on the "
                    "prompt, but it differs between the calls for the two prompts"
                )

    @staticmethod
    def _changed(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
        """Arguments that differ between two calls."""
        first, second = dict(rows.leaves(one)), dict(rows.leaves(other))
        return [
            path
            for path in first.keys() | second.keys()
            if path not in first
            or path not in second
            or first[path].shape != second[path].shape
            or not _near(first[path], second[path])
        ]

    def _second(self, arguments: dict[str, Any]) -> Any:
        """The other call of a step: what it was to be, and the same answer."""
        assert self.pending is not None
        self.pending.calls += 1
        first, answer = self._first_call
        other = NEGATIVE if self.layout.first == "positive" else POSITIVE
        expected = self._for_prompt(first, other)
        given = [name for control in self.layout.control for name in control.gives]
        changed = [p for p in self._changed(expected, arguments) if not rows.matches(p, given)]
        if changed:
            raise ValueError(
                f"pipe must call its network for both prompts with what differs in the first step, "
                f"but at step {self.chain.step} of this {type(self.pipe).__name__} "
                f"{', '.join(sorted(changed))} differ too"
            )
        return answer

    # ------------------------------------------------------------------ no prompts

    def _alone(
        self, hook: _Hook, module: nn.Module, arguments: dict[str, Any], latents: Tensor
    ) -> Any:
        if self.images is not None and len(latents) != self.images:
            raise self._other_batch(len(latents), len(latents))
        self.images = len(latents)
        self._arrive(arguments, latents.device)
        evaluated = self._to_evaluate(len(latents), together=False)
        value = arguments[self.layout.time]
        times = torch.as_tensor(value, device=latents.device).reshape(-1).expand(len(latents))
        denoisers, predictor = self.calls.denoisers, Predictor(self.calls.denoisers, latents.device)

        def network(at: Tensor) -> list[Tensor]:
            at = at.to(latents.dtype)
            own = _prediction(hook.call(module, (), {**arguments, self.layout.latents: at}))
            return [own, *predictor(at, times)]

        def others(positive: Tensor) -> list[Tensor]:
            if not denoisers:
                return []
            with evaluating(denoisers):
                if evaluated is None:
                    return predictor(latents, times)
                found = [positive.clone() for _ in denoisers]
                some = evaluated.to(latents.device)
                if bool(evaluated.any()):
                    parts = predictor(latents[some], times[some])
                    for whole, part in zip(found, parts, strict=True):
                        whole[some] = part
                return found

        output = hook.call(module, (), arguments)
        positive = _prediction(output)
        guided = self.chain.guide(positive, others(positive), network=network, x=latents)
        self.pending = _Pending(guided, latents)
        return _replaced(output, guided)


# ---------------------------------------------------------------------- parts

_UNITS = {
    "timestep": "the scheduler's timestep t",
    "fraction": "t over the number of training timesteps T",
    "reversed": "T - t",
    "reversed fraction": "1 - t/T",
}


def _version(x: Tensor) -> int:
    """How often the memory of a tensor was written to; inference tensors do not count."""
    return 0 if x.is_inference() else x._version


def maskless(pipe: Any) -> ValueError:
    """What is said where latents are overwritten and no mask tells where."""
    return ValueError(
        f"mask must be given: this {type(pipe).__name__} overwrites a part of the latents after "
        "every step; give a tensor that is 1 where it paints and broadcasts to the scheduler's "
        "latents: (1, 1, height, width), (1, 1, frames, 1, 1) or, of tokens, (1, tokens, 1)"
    )


def _first_step(scheduler: Any, told: float | None) -> int:
    """Where in its timesteps a run begins."""
    for counted in ("step_index", "begin_index"):
        index = getattr(scheduler, counted, None)
        if index is not None:
            return int(index)
    if told is None:
        return 0
    timesteps = scheduler.timesteps.detach().double().cpu()
    nearest = float(timesteps[(timesteps - told).abs().argmin()])
    return position(scheduler, nearest)


def _by_name(function: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by their names, with the defaults of those that were left out."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found |= value
        elif kind is not inspect.Parameter.VAR_POSITIONAL:
            found[name] = value
    return found


def _parameters_of(function: Run) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments in containers of their own."""
    found: dict[str, Any] = rows.mapped(arguments, lambda path, value: value)
    return found


def _prediction(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else output[0]
    if isinstance(found, list):
        found = torch.stack(found)
    assert isinstance(found, Tensor)
    return found


def _replaced(output: Any, prediction: Tensor) -> Any:
    """The network's output with another prediction in its place."""
    if isinstance(output, Tensor):
        return prediction
    own: Any = list(prediction) if isinstance(output[0], list) else prediction
    if isinstance(output, tuple):
        return (own, *output[1:])
    first = next(iter(output))
    return type(output)(**{**output, first: own})


def _near(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding of the coarser of two tensors."""
    if a is b:
        return True
    coarse = min(a.element_size(), b.element_size()) < 4 and a.is_floating_point()
    if not a.is_floating_point():
        return bool(torch.equal(a, b.to(a.device, a.dtype)))
    one, other = a.detach().float(), b.detach().to(a.device).float()
    finite = torch.isfinite(one) & torch.isfinite(other)
    same = torch.where(finite, one - other, (one.isnan() != other.isnan()).float() * 1e30)
    size = torch.where(finite, other, 0.0).abs().max() if other.numel() else 0.0
    bound = (SAME_16 if coarse else SAME_32) * size
    return bool((same.abs() <= bound).all())


def _says_what(tokens: Tensor, empty: Tensor) -> float:
    """How much of embeddings (L, D) is not along the empty prompt's (E, D), relative to their size.

    Tools for long and weighted prompts scale embeddings, and chain several of the empty prompt's
    length.
    """
    length = len(empty)
    if tokens.ndim != empty.ndim or tokens.shape[1:] != empty.shape[1:] or len(tokens) % length:
        return 1.0
    found = tokens.detach().float().reshape(-1, length, *tokens.shape[1:]).flatten(1)
    along = empty.detach().float().to(found.device).flatten()
    along = along / along.norm()
    rest = found - (found @ along)[:, None] * along
    return float(rest.norm() / found.norm())


@contextmanager
def _random_numbers_kept(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Leave every generator as it was: the call's own, and the global ones."""
    given = arguments.get("generator")
    generators = given if isinstance(given, list | tuple) else [given]
    states = [(g, g.get_state()) for g in generators if isinstance(g, torch.Generator)]
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for generator, state in states:
            generator.set_state(state)
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002


@contextmanager
def _no_progress_bar(pipe: Any) -> Iterator[None]:
    """Show no bar of a call that is only begun."""
    before = pipe.__dict__.get("_progress_bar_config")
    pipe.__dict__["_progress_bar_config"] = {**(before or {}), "disable": True}
    try:
        yield
    finally:
        if before is None:
            del pipe.__dict__["_progress_bar_config"]
        else:
            pipe.__dict__["_progress_bar_config"] = before
