"""The beginning of a guided call: check its arguments and encode the added prompts.

The pipeline itself encodes an added prompt: its call is begun once more with that prompt as the
negative one, and stopped when it first calls its network.  So all options of the call apply to
added prompts too.
"""

from __future__ import annotations

import inspect
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dng_models.pairs.denoisers import Denoiser
from dng_models.pipelines import rows
from dng_models.pipelines.guided_chain import GuidedChain
from dng_models.pipelines.layouts import Layout
from dng_models.pipelines.network_hook import NetworkHook

# Parts of a batch; added prompts are 2, 3 ...
PERTURBED, NEGATIVE, POSITIVE = -1, 0, 1
# A prompt that differs from any user's negative prompt; it is long, so that masks differ too.
ANOTHER_PROMPT = "two red apples on a wooden table beside a window in the morning"
# Relative distance below which embeddings count as the empty prompt's: bfloat16 rounds by 2^-8.
EMPTY_TOLERANCE = 1e-2

Run = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Concept:
    """An unwanted concept: a text, embeddings, or a class; with none of them the empty prompt.

    Attributes
    ----------
    text : str, optional
        The prompt.
    embeddings : mapping of str to Tensor, optional
        Embeddings of the prompt, by the names of the call's arguments.
    label : int, optional
        Number of the class.
    """

    text: str | None = None
    embeddings: Mapping[str, Tensor] | None = None
    label: int | None = None


class Parts:
    """The parts of a batch: 0 the negative prompt, 1 the positive prompt, 2 ... added prompts.

    Parameters
    ----------
    chain : GuidedChain
        Its rule decides which predictions are needed.
    concepts : sequence of Concept, optional
        Unwanted concepts in place of the pipeline's own negative prompt.

    Attributes
    ----------
    added : list of Concept
        Prompts that are encoded anew in every call; an empty Concept is the empty prompt.
    negatives : list of int
        Parts with unwanted concepts, one per concept.
    unconditional : int or None
        Part with the unconditional prediction.
    compared : int
        Part that trackers compare the concepts with.
    """

    def __init__(self, chain: GuidedChain, concepts: Sequence[Concept] | None) -> None:
        self.added: list[Concept] = []
        self.negatives: list[int] = []
        self.unconditional: int | None = None
        if concepts is not None and chain.needs_negative:
            self.added = list(concepts)
            self.negatives = list(range(2, 2 + len(concepts)))
        elif chain.needs_negative:
            self.negatives = [NEGATIVE]
        if chain.needs_unconditional:
            self.unconditional = NEGATIVE
            if concepts is None and not (chain.leads or chain.by_points):
                # The pipeline's negative prompt is the unwanted one: add the empty prompt.
                self.unconditional = 2
                self.added.append(Concept())
        self.compared = POSITIVE
        if chain.reference == "unconditional":
            assert self.unconditional is not None
            self.compared = self.unconditional

    @property
    def avoids_own(self) -> bool:
        """Whether the pipeline's own negative prompt is the unwanted concept."""
        return NEGATIVE in self.negatives

    @property
    def used(self) -> list[int]:
        """The parts that are evaluated, in ascending order."""
        found = {POSITIVE, *self.negatives}
        if self.unconditional is not None:
            found.add(self.unconditional)
        return sorted(found)


class Stop(BaseException):
    """Ends a call that was only begun.  A BaseException, because pipelines may catch Exception."""


@dataclass(eq=False)
class Beginning:
    """What a pipeline showed its networks in the first step of a call that was only begun.

    Attributes
    ----------
    calls : list of dict
        Arguments of each call of the network.
    control : dict of str to dict
        Arguments of the first call of each control network, by its name.
    shape : torch.Size, optional
        Shape of the scheduler's latents; None if the call was stopped before the scheduler's step.
    """

    calls: list[dict[str, Any]] = field(default_factory=list)
    control: dict[str, dict[str, Any]] = field(default_factory=dict)
    shape: torch.Size | None = None


class BegunCall(ABC):
    """A call of a pipeline: its arguments, and the prompts that are added to it.

    Parameters
    ----------
    pipe : DiffusionPipeline
        The guided pipeline.
    layout : Layout
        Layout of the pipeline's class.
    chain : GuidedChain
        Rule, posteriors and trace.
    parts : Parts
        The parts of a batch.
    denoisers : sequence of callable
        Unwanted networks, for pipelines without prompts.
    function : callable
        The pipeline's own call.
    args, kwargs
        Arguments of that call.
    """

    def __init__(
        self,
        pipe: Any,
        layout: Layout,
        chain: GuidedChain,
        parts: Parts,
        denoisers: Sequence[Denoiser],
        function: Run,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.pipe, self.layout, self.chain = pipe, layout, chain
        self.parts, self.denoisers = parts, denoisers
        self.function = function
        self.scheduler = pipe.scheduler
        # The arguments as given, and with all defaults filled in.
        self.given, self.arguments = rows.given_to(function, args, kwargs)
        self.beginning: Beginning | None = None
        self.outputs: list[Any] = []
        # One for each added part; for layouts with separate calls, one for every part.
        self.encoded: dict[int, Beginning] = {}
        self.probe: Beginning | None = None
        # Number of network calls after which a call that is only begun is stopped.
        self._wanted = 0

    @abstractmethod
    def watching_the_scheduler(self) -> AbstractContextManager[None]:
        """Watch every step of the pipeline's scheduler within a block."""

    @contextmanager
    def watching_the_processors(self, *, after: bool = True) -> Iterator[None]:
        """Restore the attention processors (PAG replaces them) after a call that ends early.

        ``after``: restore them also when the call ends normally.
        """
        names = self.layout.network if self.layout.perturbs else ()
        networks: list[Any] = [getattr(self.pipe, name, None) for name in names]
        networks = [network for network in networks if hasattr(network, "attn_processors")]
        before = [dict(network.attn_processors) for network in networks]
        done = False
        try:
            yield
            done = True
        finally:
            for network, processors in zip(networks, before, strict=True):
                now = network.attn_processors
                same = all(now.get(name) is each for name, each in processors.items())
                if not same and (after or not done):
                    network.set_attn_processor(processors)

    def check_result(self, result: Any) -> None:
        """Check that the call did not return a generator, which would make its steps later."""
        if inspect.isgenerator(result):
            result.close()
            raise ValueError(
                f"pipe must make its steps while it is called, but the call of this "
                f"{type(self.pipe).__name__} returns a generator, which makes them later"
            )

    # ------------------------------------------------------------------ before the call

    def prepare(self, *, verify: bool) -> None:
        """Check the call's arguments and encode the added prompts.

        Parameters
        ----------
        verify : bool
            Whether to begin one more call, with another negative prompt, to check the layout.

        Raises
        ------
        ValueError
            If the call cannot be guided as its arguments are.
        """
        self._check_arguments()
        if self.layout.calls == "alone":
            return
        if self.parts.avoids_own:
            self._check_negative()
        check_text_encoder(self.pipe, self.parts)
        for part, concept in enumerate(self.parts.added, start=2):
            if concept.label is None:
                self.encoded[part] = self._encode(concept, part)
        if self.layout.labels is not None:
            return
        if self.layout.calls == "batch" and self.layout.kept is not None:
            self.encoded[POSITIVE] = self._begin({}, 3)
        if self.layout.calls == "separate":
            # With 3 the call is stopped at the scheduler's step, which tells the latents' shape.
            self.encoded[NEGATIVE] = self._begin({}, 2 if self.layout.kept is None else 3)
            self.encoded[POSITIVE] = self.encoded[NEGATIVE]
        another = self._another_negative()
        if verify and (another or self.layout.calls == "batch"):
            self.probe = self._begin(another, 2)

    def _check_arguments(self) -> None:
        name, chain, layout = type(self.pipe).__name__, self.chain, self.layout
        for argument, value in self.given.items():
            for text in _strings_in(value):
                check_text(f"{argument} of the pipeline's call", text)
        device = getattr(self.pipe, "_execution_device", torch.device("cpu"))
        if chain.divergence_probes and torch.is_autocast_enabled(device.type):
            raise ValueError(
                f"{chain.probes} must be 0 under torch.autocast, whose casts have no forward "
                f"derivative, got {chain.divergence_probes}: call the pipeline outside of it, with "
                "its networks in the precision that they are to have"
            )
        for network in (*layout.network, *(control.name for control in layout.control)):
            module = getattr(self.pipe, network, None)
            if chain.divergence_probes and isinstance(module, nn.Module):
                _check_weights_stay(network, module, chain.probes)
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
        if given and chain.tracks and not chain.follows and chain.mask is None:
            raise maskless(self.pipe)
        if layout.guidance_scale is not None:
            self._check_guidance_scale()

    def _check_guidance_scale(self) -> None:
        layout, name = self.layout, self.layout.guidance_scale
        assert name is not None
        value = self.arguments.get(name)
        scales = value if isinstance(value, list | tuple) else [value]
        if not scales or not all(_exceeds(each, layout.above) for each in scales):
            raise ValueError(
                f"{name} of the pipeline's call must be > {layout.above:g}, which makes it "
                f"evaluate the negative prompt (its value has no other effect), got {value!r}. To "
                "guide at some times only, limit the rule: dng_math.LimitedInterval(rule, t_lo, "
                "t_hi)"
            )

    # ------------------------------------------------------------------ prompts

    def _negative_names(self) -> tuple[list[str], list[str]]:
        """Names of the call's arguments for the negative prompt: as text, and as embeddings."""
        if self.layout.negatives is not None:
            return [], list(self.layout.negatives)
        named = [p for p in rows.call_parameters(self.function) if p.startswith("negative_")]
        said = [p for p in named if "prompt" in p or p.endswith("attention_mask")]
        texts = [p for p in said if p.removeprefix("negative_prompt").strip("_23456") == ""]
        return texts, [p for p in said if p not in texts]

    def _prompts_of_the_call(self) -> int | None:
        """Number of prompts of the call; None for a single prompt that is not in a list."""
        _, embeddings = self._negative_names()
        positive = [name.removeprefix("negative_") for name in embeddings]
        for name in ("prompt", *positive):
            value = self.arguments.get(name)
            if isinstance(value, str | Mapping):
                return None
            if isinstance(value, list | tuple | Tensor):
                return len(value)
        return None

    def _without_negative(self) -> dict[str, Any]:
        texts, embeddings = self._negative_names()
        return dict.fromkeys([*texts, *embeddings])

    def _as_negative(self, text: str) -> dict[str, Any]:
        """Arguments with a text as the negative prompt, once for each prompt of the call."""
        texts, _ = self._negative_names()
        if not texts:
            raise ValueError(
                f"negative_prompts must be given as embeddings: a {type(self.pipe).__name__} takes "
                "no negative prompt as text"
            )
        number = self._prompts_of_the_call()
        return self._without_negative() | {texts[0]: text if number is None else [text] * number}

    def _another_negative(self) -> dict[str, Any]:
        """Arguments with another negative prompt than the call's, to see what changes with it."""
        texts, embeddings = self._negative_names()
        given = {n: v for n in embeddings if _is_embeddings(v := self.arguments.get(n))}
        if not given and texts and not lacks_text_encoder(self.pipe):
            return self._as_negative(ANOTHER_PROMPT)
        if not given:
            positive = {n: self.arguments.get(n.removeprefix("negative_")) for n in embeddings}
            given = {n: v for n, v in positive.items() if _is_embeddings(v)}
        return {n: rows.mapped(v, _other_embeddings) for n, v in given.items()}

    def _encode(self, concept: Concept, part: int) -> Beginning:
        if concept.embeddings is not None:
            number = self._prompts_of_the_call() or 1
            given: dict[str, Any] = self._without_negative()
            for name, value in concept.embeddings.items():
                given[name] = _for_prompts(name, value, number)
            own = [value for value in concept.embeddings.values() if value.is_floating_point()]
            if not any(bool(value.any()) for value in own):
                raise ValueError(
                    "negative_prompts as embeddings must say something, but those of "
                    f"negative_prompts[{part - 2}] are {'zero' if own else 'whole numbers'}"
                )
        elif concept.text is not None:
            given = self._as_negative(concept.text)
        else:
            given = self._unprompted()
        try:
            if concept.text is None and concept.embeddings is None:
                return self._begin_unprompted(given)
            return self._begin(given, 2)
        except (ValueError, TypeError, RuntimeError, AssertionError, AttributeError) as error:
            what = (
                "cfg_scale, which adds the empty prompt,"
                if concept.text is None and concept.embeddings is None
                else f"negative_prompts[{part - 2}]"
            )
            raise ValueError(
                f"{what} cannot be part of this call: {type(self.pipe).__name__} says "
                f"{type(error).__name__}: {_in_short(error)}. Where the call's prompts are "
                "embeddings, give embeddings of the same length, and where these are, those of the "
                "call's prompts"
            ) from error

    def _begin_unprompted(self, given: dict[str, Any]) -> Beginning:
        """Begin a call without a negative prompt, or with "" if the pipeline needs one."""
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
        """Arguments with the negative prompt that the pipeline uses when none is given."""
        given = self._without_negative()
        texts, _ = self._negative_names()
        default = rows.call_parameters(self.function)[texts[0]].default if texts else None
        if isinstance(default, str):
            return self._as_negative(default)
        return given

    def _check_negative(self) -> None:
        """Check that the call's negative prompt is not empty, for every image."""
        if self.layout.labels is not None:
            return
        texts, embeddings = self._negative_names()
        given = [_texts_of(v) for n in texts if (v := self.arguments.get(n)) is not None]
        embedded: list[Any] = [self.arguments.get(name) for name in embeddings]
        embedded = [value for value in embedded if _is_embeddings(value)]
        if embedded:
            own = [value for value in embedded if value[0].is_floating_point()]
            if not own:
                raise ValueError(
                    "negative_prompt_embeds of the pipeline's call must be embeddings, got whole "
                    "numbers"
                )
            self._check_embeddings(own[0])
            return
        for prompt in range(max(map(len, given), default=0)):
            # One text encoder's prompt may be blank if another's is not.
            each = [texts[min(prompt, len(texts) - 1)] for texts in given if texts]
            if not any(isinstance(text, str) and text.strip() for text in each):
                raise self._says_nothing(f"prompt {prompt} has none")
        if not given:
            raise self._says_nothing("it has none")

    def _says_nothing(self, detail: str) -> ValueError:
        return ValueError(
            "negative_prompt of the pipeline's call must be given, and not be empty: it is what "
            f"{self.chain.rule!r} avoids ({detail})"
        )

    def _check_embeddings(self, negative: Tensor | Sequence[Tensor]) -> None:
        """Check that embeddings are not the empty prompt's, even scaled, padded or repeated."""
        empty = self._empty_embeddings()
        for image, tokens in enumerate(negative):
            if not bool(tokens.any()):
                raise self._says_nothing(f"embeddings {image} are zero")
            if empty is not None and _says_what(tokens, empty) < EMPTY_TOLERANCE:
                raise self._says_nothing(f"embeddings {image} are those of the empty prompt")

    def _empty_embeddings(self) -> Tensor | None:
        """Embeddings of the empty prompt, by token; None if the pipeline cannot encode one."""
        encode = getattr(self.pipe, "encode_prompt", None)
        names = [n for n in self.pipe.components if n.startswith("text_encoder")]
        if encode is None or not any(getattr(self.pipe, n, None) is not None for n in names):
            return None
        _, embeddings = self._negative_names()
        positive = [name.removeprefix("negative_") for name in embeddings]
        given = dict.fromkeys([*positive, *embeddings]) | {"prompt": ""}
        texts, _ = self._negative_names()
        given |= {texts[0]: ""} if texts else {}
        given = {n: v for n, v in given.items() if n in rows.call_parameters(self.function)}
        try:
            found = self._begin(given, 2)
        except Exception:  # the call's other arguments may not fit a single prompt
            return None
        shown = [
            value
            for path, value in rows.leaves(found.calls[self._part(found, NEGATIVE)])
            if rows.matches(path, self.layout.text[:1]) and value.ndim >= 2
        ]
        if not shown:
            return None
        if self.layout.calls == "separate":
            return shown[0][0]
        # Both prompts are shown: as one tensor each in a list, or as one doubled tensor.
        halves = shown if len(shown) > 1 else [half[0] for half in shown[0].chunk(2)]
        return halves[self._half(NEGATIVE)] if len(halves) == 2 else None

    def _part(self, found: Beginning, part: int) -> int:
        """Index of the network's call that has the prompt."""
        if self.layout.calls != "separate":
            return 0
        return self._half(part) if len(found.calls) > 1 else 0

    def _half(self, part: int) -> int:
        """Position of the negative or positive prompt in the batch or the calls, 0 or 1."""
        return part if self.layout.first == "negative" else 1 - part

    # ------------------------------------------------------------------ calls that are only begun

    def _begin(self, given: Mapping[str, Any], networks: int) -> Beginning:
        """Begin the call with other arguments; what the pipeline shows its networks at first."""
        found = self.beginning = Beginning()
        wanted = networks - (self.layout.calls == "batch")
        # Some pipelines write into the lists that they are given.
        arguments = _in_own_lists({**self.given, **given})
        try:
            with (
                _random_numbers_kept(self.arguments),
                _no_progress_bar(self.pipe),
                self.watching_the_processors(),
                self.watching_the_scheduler(),
            ):
                self._wanted = wanted
                self.check_result(self.function(**arguments))
        except Stop:
            pass
        finally:
            self.beginning = None
        if not found.calls:
            raise ValueError(
                f"pipe must call its pipe.{' or pipe.'.join(self.layout.network)} in every call, "
                "and this one did not"
            )
        return found

    def _seen(self, hook: NetworkHook, module: nn.Module, arguments: dict[str, Any]) -> Any:
        """Record a network's call while a call is only begun, and stop when enough were seen."""
        assert self.beginning is not None
        if hook.control is not None:
            self.beginning.control.setdefault(hook.control.name, arguments)
            return hook.call(module, (), arguments)
        # Copied, because pipelines refill their containers and networks take entries out.
        self.beginning.calls.append(rows.copied(arguments))
        if len(self.beginning.calls) >= self._wanted:
            raise Stop
        # Any output of the right type will do, because its result is never used.
        if not self.outputs:
            with torch.no_grad():
                self.outputs.append(hook.call(module, (), rows.copied(arguments)))
        return self.outputs[0]


# ---------------------------------------------------------------------- parts


def lacks_text_encoder(pipe: Any) -> bool:
    """Whether a pipeline was left without the text encoders that its class has."""
    names = [n for n in pipe.components if n.startswith("text_encoder")]
    return bool(names) and all(getattr(pipe, name, None) is None for name in names)


def check_text_encoder(pipe: Any, parts: Parts) -> None:
    """Raise a ValueError if the pipeline must encode added prompts and has no text encoder."""
    texts = any(c.embeddings is None and c.label is None for c in parts.added)
    if texts and lacks_text_encoder(pipe):
        raise ValueError(
            "pipe must have its text encoder for negative_prompts and cfg_scale, which add "
            f"prompts to those of the call; this {type(pipe).__name__} has none: give "
            "negative_prompts as embeddings, and without cfg_scale"
        )


def maskless(pipe: Any) -> ValueError:
    """The error for a pipeline that overwrites latents while no mask says where."""
    return ValueError(
        f"mask must be given: this {type(pipe).__name__} overwrites a part of the latents after "
        "every step; give a tensor that is 1 where it paints and broadcasts to the scheduler's "
        "latents: (1, 1, height, width), (1, 1, frames, 1, 1) or, of tokens, (1, tokens, 1)"
    )


def _for_prompts(name: str, value: Tensor, number: int) -> Tensor:
    """Embeddings of an unwanted concept, with a row for each prompt of the call."""
    if name.endswith("cu_seqlens"):
        return value  # cumulative lengths, which have no rows
    axis = 1 if name.endswith("_llama3") else 0  # their first axis is the layer
    size = value.shape[axis] if value.ndim > axis else 0
    if size not in (1, number):
        raise ValueError(
            f"negative_prompts as embeddings must have 1 row, or {number}, one for each prompt of "
            f"the call, got {size} for {name!r}"
        )
    shape = list(value.shape)
    shape[axis] = number
    return value.expand(shape)


def _check_weights_stay(name: str, network: nn.Module, probes: str) -> None:
    """Refuse hooks that exchange weights: torch may crash in a forward derivative of such a net."""
    for module in network.modules():
        hooks = getattr(vars(module).get("_diffusers_hook"), "hooks", {})
        for found in ("group_offloading", "layerwise_casting"):
            if found in hooks:
                raise ValueError(
                    f"{probes} must be 0 where pipe.{name} has {found.replace('_', ' ')}, "
                    "which exchanges weights while the network is differentiated"
                )


def check_text(name: str, text: str) -> None:
    """Raise a ValueError for a text that no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{name} must be text that UTF-8 can hold (no half of a surrogate pair), got {text!r}"
        ) from None


def _strings_in(value: Any) -> Iterator[str]:
    """Every string in a value: itself, or in lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings_in(each)
    elif isinstance(value, dict):
        yield from _strings_in([*value, *value.values()])


def _exceeds(value: Any, least: float) -> bool:
    """Whether a value is a number (Python, NumPy or torch) greater than ``least``."""
    try:
        return not isinstance(value, str | bytes) and float(value) > least
    except (TypeError, ValueError, RuntimeError):
        return False


def _in_own_lists(value: Any) -> Any:
    """The arguments, with all lists and dictionaries copied."""
    if isinstance(value, list):
        return [_in_own_lists(each) for each in value]
    if isinstance(value, dict):
        return {name: _in_own_lists(each) for name, each in value.items()}
    return value


def _is_embeddings(value: Any) -> bool:
    """Whether a value is a tensor, or a list with one for each prompt."""
    if isinstance(value, list | tuple) and value:
        return all(isinstance(each, Tensor) for each in value)
    return isinstance(value, Tensor)


def _other_embeddings(path: str, value: Tensor) -> Tensor:
    """Embeddings that differ from the given ones, even if those are zero."""
    return 0.5 - 1.5 * value if value.is_floating_point() else value


def _in_short(error: Exception) -> str:
    """An error's message, cut at 300 characters, since some print whole tensors."""
    said = " ".join(str(error).split())
    return said if len(said) <= 300 else f"{said[:300]} ..."


def _texts_of(value: Any) -> list[str]:
    """One text per prompt; a mapping (frame to text, for videos) is joined into one."""
    if isinstance(value, Mapping):
        return [" ".join(map(str, value.values()))]
    return list(value) if isinstance(value, list | tuple) else [value]


def _says_what(tokens: Tensor, empty: Tensor) -> float:
    """Relative norm of the part of embeddings (L, D) orthogonal to the empty prompt's (E, D).

    1 if the shapes don't fit.  Scale and length don't count, because tools for long and weighted
    prompts scale embeddings and concatenate several of the empty prompt's length.
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
    """Restore every random generator after a block: the call's own and the global ones."""
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
    """Hide the pipeline's progress bar within a block."""
    before = pipe.__dict__.get("_progress_bar_config")
    pipe.__dict__["_progress_bar_config"] = {**(before or {}), "disable": True}
    try:
        yield
    finally:
        if before is None:
            del pipe.__dict__["_progress_bar_config"]
        else:
            pipe.__dict__["_progress_bar_config"] = before
