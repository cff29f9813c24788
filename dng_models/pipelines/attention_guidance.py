"""Guided calls of pipelines by rules that act on the attention to the prompt (NAG, VSF, NASA).

Unlike under the rules of prediction space, the pipeline's own classifier-free guidance keeps its
effect, and may be off.  The network's hook tells the guided processors
(:mod:`.attention_processors`) which rows of its batch are the positive prompt's.  A gate needs two
predictions beside the guided one, for the positive and for the negative prompt; they and the guided
one become rows of the same batch, and the posterior is tracked from the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from dng_math import checks
from dng_math.rules import AttentionRule, LimitedInterval, Rule, Unguided, innermost
from dng_math.trackers import LogOddsTracker, PaperTracker, PathTracker
from dng_models.pipelines import rows
from dng_models.pipelines.attention_processors import (
    AttentionState,
    CrossAttention,
    GuidedProcessor,
    JointAttention,
    ProcessorsInPlace,
    Rows,
    cross_layers,
    guiding,
    joint_layers,
)
from dng_models.pipelines.call_begun import (
    POSITIVE,
    Concept,
    Run,
    lacks_text_encoder,
)
from dng_models.pipelines.call_watched import Pending, WatchedCall
from dng_models.pipelines.guided_call import GuidedCalls
from dng_models.pipelines.guided_chain import GuidedChain
from dng_models.pipelines.guided_run import GuidedRun
from dng_models.pipelines.layouts import Layout
from dng_models.pipelines.network_hook import NetworkHook
from dng_models.pipelines.trace import RunTrace, Trace


def acts_on_attention(rule: Rule | Sequence[Rule]) -> TypeGuard[Rule]:
    """Whether a rule, or the rule inside limited intervals, acts on attention.

    Raises
    ------
    ValueError
        If a sequence of rules holds one that does.
    """
    if isinstance(rule, Sequence) and not isinstance(rule, str):
        if any(acts_on_attention(each) for each in rule):
            raise ValueError(
                "rule must be one rule, and not a sequence, where it acts on attention: write what "
                f"is unwanted into one negative prompt, with commas; got {checks.shown(rule)}"
            )
        return False
    return isinstance(innermost(rule), AttentionRule)


def attention_calls(
    pipe: Any,
    layout: Layout,
    rule: Rule,
    concepts: Sequence[Concept] | None,
    *,
    trace: Trace,
    options: Mapping[str, Any],
) -> AttentionCalls:
    """Check the arguments of :func:`dng_models.apply_guidance` for a rule of attention.

    Parameters
    ----------
    pipe : DiffusionPipeline
        The pipeline.
    layout : Layout
        Layout of its class.
    rule : Rule
        A rule for which :func:`acts_on_attention` is true.
    concepts : sequence of Concept, optional
        The unwanted concept in place of the call's negative prompt.
    trace : Trace
        The trace that records the runs.
    options : mapping
        The other arguments of :func:`dng_models.apply_guidance` that were given.

    Returns
    -------
    AttentionCalls

    Raises
    ------
    ValueError
        If the pipeline has no attention that the rule knows, or an option cannot be with it.
    """
    inner = innermost(rule)
    assert isinstance(inner, AttentionRule)
    _attention_of(pipe, layout, inner)
    if concepts is not None and len(concepts) > 1:
        raise ValueError(
            f"negative_prompts must be one for {inner!r}, got {len(concepts)}: write what is "
            "unwanted into one text, with commas"
        )
    for name, value in options.items():
        if name in _OF_A_GATE and inner.gate is not None:
            continue
        if isinstance(value, Tensor) or value not in (None, 0, _DEFAULTS.get(name)):
            raise ValueError(
                f"{name} must be left out for {inner!r}, got {checks.shown(value)}: "
                f"{_REASONS.get(name, 'it is for rules of prediction space')}"
            )
    return AttentionCalls(pipe, layout, rule, concepts, _chain(inner, trace, options))


_DEFAULTS = {"reference": "positive"}
_OF_A_GATE = ("mask", "initial_log_posterior")
_REASONS = {
    "cfg_scale": "the guidance_scale of the pipeline's call keeps its effect",
    "negative_template": "the negative text is read by the network as it is",
    "mask": "it is for the posterior of a gate",
    "initial_log_posterior": "it is for the posterior of a gate",
}


def _chain(rule: AttentionRule, trace: Trace, options: Mapping[str, Any]) -> GuidedChain:
    """The chain that tracks the gate's posterior, or one that is never begun."""
    if rule.gate is None:
        return GuidedChain(Unguided(), trace=trace)
    posterior = rule.gate.posterior
    if isinstance(posterior, PathTracker) and posterior.probes:
        raise ValueError(
            "gate must have a tracker of transitions (tracker='paper' or 'log-odds') in a "
            "pipeline: a path tracker needs the predictions of a point before the gate opens "
            f"there, got {rule.gate!r}"
        )
    if rule.gate.reference != "positive":
        raise ValueError(
            "gate must have reference='positive' in a pipeline, whose positive prediction it "
            f"compares the negative one with, got {rule.gate!r}"
        )
    given = {name: options[name] for name in _OF_A_GATE if options.get(name) is not None}
    return GateChain(rule.gate, trace=trace, has_network=False, **given)


def _attention_of(
    pipe: Any, layout: Layout, rule: AttentionRule
) -> tuple[nn.Module, type[GuidedProcessor]]:
    """The pipeline's network, and the kind of its attention to the prompt."""
    name = type(pipe).__name__
    attribute = next((n for n in layout.network if getattr(pipe, n, None) is not None), "unet")
    network: Any = getattr(pipe, attribute, None)
    whole = getattr(network, "_orig_mod", network)
    bare = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    if layout.calls == "batch" and isinstance(bare, UNet2DConditionModel):
        kind: type[GuidedProcessor] = CrossAttention
        layers = list(cross_layers(whole))
        projected = bare.config.encoder_hid_dim_type not in (None, "ip_image_proj")
        projected |= getattr(bare, "text_encoder_hid_proj", None) is not None
        if projected or any(layer.added_kv_proj_dim is not None for _, layer in layers):
            raise ValueError(
                f"pipe must show its attention the text as its network is given it for {rule!r}, "
                f"and the network of a {name} projects it first, or adds it to the image's keys: "
                f"{_INSTEAD}"
            )
    elif layout.calls == "batch" and isinstance(bare, SD3Transformer2DModel):
        kind, layers = JointAttention, list(joint_layers(whole))
    else:
        raise ValueError(
            "pipe must attend to its prompt in a UNet2DConditionModel (Stable Diffusion 1, 2 and "
            f"XL) or an SD3Transformer2DModel for {rule!r}, got a {name} with a "
            f"{type(bare).__name__} as pipe.{attribute}: {_INSTEAD}"
        )
    if not layers:
        raise ValueError(
            f"pipe must have a network with attention to its prompt for {rule!r}, and that of this "
            f"{name} has none: {_INSTEAD}"
        )
    return network, kind


_INSTEAD = (
    "take a rule of prediction space, such as dng_math.NegativePrompting or "
    "DynamicNegativeGuidance.tracked, which need no access to the attention"
)


class GateChain(GuidedChain):
    """Tracks the posterior that opens a gate; the prediction is made elsewhere.

    Parameters and errors as for :class:`GuidedChain`.
    """

    prediction: Tensor
    scale: Tensor

    def posterior(self, like: Tensor) -> Tensor:
        """p(c | x) at the step under way, before its predictions are made.

        Parameters
        ----------
        like : Tensor, shape (B, ...)
            The latents.

        Returns
        -------
        Tensor, shape (B,)
            At most the tracker's p_max.
        """
        run = self._shown()
        if not run.begun:
            self._posteriors.begin(run, like)
        tracker = run.plan.tracker
        assert run.state is not None and isinstance(tracker, PaperTracker | LogOddsTracker)
        return run.log_posterior(run.state).exp().clamp(max=tracker.p_max)

    def _guided(
        self, run: GuidedRun, positive: Tensor, others: list[Tensor], unconditional: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The prediction that was made, and the scale that it was made with."""
        return self.prediction, self.scale


class AttentionCalls(GuidedCalls):
    """Guides the calls of a pipeline by a rule of attention.

    Parameters
    ----------
    pipe : DiffusionPipeline
        The pipeline.
    layout : Layout
        Layout of the pipeline's class.
    rule : Rule
        The rule, or limited intervals around it.
    concepts : sequence of Concept, optional
        The unwanted concept in place of the call's negative prompt.
    chain : GuidedChain
        Tracks the posterior of the rule's gate; its trace records the runs.
    """

    def __init__(
        self,
        pipe: Any,
        layout: Layout,
        rule: Rule,
        concepts: Sequence[Concept] | None,
        chain: GuidedChain,
    ) -> None:
        super().__init__(pipe, layout, chain, None, [])
        self.rule = rule
        self.concept = None if concepts is None else concepts[0]
        if self.concept is not None and self.concept.text is not None and lacks_text_encoder(pipe):
            raise ValueError(
                f"pipe must have its text encoder for negative_prompts as text, and this "
                f"{type(pipe).__name__} has none: give them as embeddings"
            )

    def run(self, function: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the pipeline under guidance; as for :class:`GuidedCalls`."""
        if self._call is not None:
            raise ValueError("pipe must not be called again while a guided call of it runs")
        self.attach()
        call = self._call = AttentionCall(
            self.pipe,
            self.layout,
            self.chain,
            self.parts,
            [],
            function,
            args,
            kwargs,
            rule=self.rule,
            concept=self.concept,
        )
        try:
            call.prepare(verify=False)
            own = call.with_own_code(call.own_arguments())
            with call.watching_the_scheduler(), call.guiding_attention():
                result = function(**own)
            call.check_result(result)
            call.check_end()
        except BaseException:
            call.forget_unconfirmed()
            raise
        finally:
            self.chain.reset()
            self._call = None
        return result


@dataclass(frozen=True, eq=False)
class _Group:
    """Rows of a batch: some images of a part, with some text arguments of the negative prompt."""

    part: int
    images: Tensor
    negative: tuple[str, ...] = ()


class AttentionCall(WatchedCall):
    """A call whose network attends under guidance.

    Parameters
    ----------
    args
        As for :class:`~.call_begun.BegunCall`.
    rule : Rule
        The rule, or limited intervals around it.
    concept : Concept, optional
        What is unwanted; None: the call's negative prompt, in place of which the pipeline's
        classifier-free guidance then gets none.
    """

    def __init__(self, *args: Any, rule: Rule, concept: Concept | None) -> None:
        super().__init__(*args)
        self.whole_rule, self.concept = rule, concept
        inner = innermost(rule)
        assert isinstance(inner, AttentionRule)
        self.rule: AttentionRule = inner
        self.attended, self.kind = _attention_of(self.pipe, self.layout, inner)
        self.batch = 0
        self.state: AttentionState | None = None
        # The negative prompt's text arguments, with one row for each image.
        self.negative: dict[str, Tensor] = {}
        self.placed = ProcessorsInPlace()
        self.record: RunTrace | None = None

    # ------------------------------------------------------------------ before the call

    def prepare(self, *, verify: bool) -> None:
        """Check the call's arguments and encode the negative prompt."""
        self._check_call()
        begun = self._begin(self._negative_as_positive(), 2)
        arguments = begun.calls[0]
        latents = self._latents(self.attended, arguments)
        self.batch = (self._prompts_of_the_call() or 1) * self._images_per_prompt()
        parts = self._parts_of(len(latents))
        for path, value in rows.leaves(arguments):
            if rows.matches(path, (*self.layout.text, "encoder_attention_mask")):
                found = value.chunk(parts)[self._place(parts)]
                # Some pipelines leave embeddings that they are given with a row for each prompt.
                repeats = self.batch // len(found) if self.batch % len(found) == 0 else 1
                self.negative[path] = found.repeat_interleave(max(repeats, 1), dim=0)
        text = self.negative.get("encoder_hidden_states")
        if text is None:
            raise ValueError(
                f"pipe must show its network the prompt as encoder_hidden_states for "
                f"{self.rule!r}, got {sorted(arguments)}"
            )
        self.state = AttentionState(self.rule, text, self._bias(text))

    def _check_call(self) -> None:
        if self.layout.perturbs and self.arguments.get("pag_scale"):
            raise ValueError(
                f"pag_scale of the pipeline's call must be 0 for {self.rule!r}, which cannot be "
                f"combined with perturbed attention, got {self.arguments['pag_scale']!r}"
            )
        if self.arguments.get("skip_guidance_layers") is not None:
            raise ValueError(
                f"skip_guidance_layers of the pipeline's call must be None for {self.rule!r}, "
                f"for a {type(self.pipe).__name__} calls its network once more for it"
            )
        if self.concept is None:
            self._check_negative()

    def _says_nothing(self, detail: str) -> ValueError:
        return ValueError(
            "negative_prompt of the pipeline's call must be given, and not be empty, or "
            f"negative_prompts of apply_guidance: it is what {self.rule!r} avoids ({detail})"
        )

    def _images_per_prompt(self) -> int:
        return int(self.arguments.get("num_images_per_prompt") or 1)

    def _negative_as_positive(self) -> dict[str, Any]:
        """Arguments with the unwanted in the positive prompt's place, and no negative prompt.

        So it is encoded whether or not the pipeline evaluates negative prompts.
        """
        texts, embeddings = self._negative_names()
        number = self._prompts_of_the_call()
        if self.concept is None:
            found = {
                n: v for n in (*texts, *embeddings) if (v := self.arguments.get(n)) is not None
            }
        elif self.concept.text is not None:
            if not texts:
                raise ValueError(
                    "negative_prompts must be given as embeddings: a "
                    f"{type(self.pipe).__name__} takes no negative prompt as text"
                )
            found = {texts[0]: self.concept.text}
        else:
            found = dict(self.concept.embeddings or {})
        if number is not None:
            found = {name: _for_each(name, value, number) for name, value in found.items()}
        names = [name.removeprefix("negative_") for name in (*texts, *embeddings)]
        shown = {name.removeprefix("negative_"): value for name, value in found.items()}
        # Of embeddings the same ones are the negative prompt, in place of an empty one that a
        # pipeline without text encoder could not make.
        both = {name: value for name, value in found.items() if name in embeddings}
        return {**self._without_negative(), **both, **dict.fromkeys(names), **shown}

    def own_arguments(self) -> dict[str, Any]:
        """Arguments of the call itself, with the unwanted taken out of classifier-free guidance.

        Raises
        ------
        ValueError
            If the pipeline cannot encode the empty prompt, which takes its place.
        """
        if self.concept is not None:
            return dict(self.given)
        given = {**self.given, **self._unprompted()}
        if lacks_text_encoder(self.pipe):
            try:
                self._begin(self._unprompted(), 2)
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(
                    "negative_prompts of apply_guidance must be given, as embeddings: this "
                    f"{type(self.pipe).__name__} has no text encoder, with which the empty prompt "
                    "could take the negative prompt's place in classifier-free guidance"
                ) from error
        return given

    def _bias(self, text: Tensor) -> Tensor | None:
        """What a UNet adds to the logits of masked tokens, as it computes it from the mask."""
        mask = self.negative.get("encoder_attention_mask")
        return None if mask is None else ((1 - mask.to(text.dtype)) * -10000.0).unsqueeze(1)

    @contextmanager
    def guiding_attention(self) -> Iterator[None]:
        """Put the guided processors into the network within a block."""
        assert self.state is not None
        with guiding(self.attended, self.state, self.kind) as self.placed:
            yield

    # ------------------------------------------------------------------ the scheduler

    def _check_step(self, given: Mapping[str, Any], sample: Tensor) -> None:
        if self.pending is None:
            raise ValueError(
                f"the {type(self.pipe).__name__} took a step of its scheduler without a guided "
                "prediction: the network that it calls is not the one that it had when its call "
                "began"
            )
        if self.rule.gate is not None and self.last_next is not None:
            self._check_changes(self._of_images(sample))

    def _took(self, sample: Tensor, x_next: Tensor) -> None:
        if self.rule.gate is not None:
            super()._took(sample, x_next)
        self.pending = None
        if self.record is not None:
            self.record.unconfirmed = False

    def forget_unconfirmed(self) -> None:
        """Remove the run from the trace if none of its steps was completed."""
        self.chain.forget_unconfirmed()
        runs = self.chain.trace.runs
        if self.record is not None and self.record.unconfirmed and self.record in runs:
            runs.remove(self.record)

    # ------------------------------------------------------------------ the network

    def network(self, hook: NetworkHook, module: nn.Module, arguments: dict[str, Any]) -> Any:
        """Answer a call of the pipeline's network; as for :class:`WatchedCall`."""
        if self.beginning is not None:
            return super().network(hook, module, arguments)
        self.placed.check()
        return super().network(hook, module, arguments)

    def evaluate(
        self, hook: NetworkHook, module: nn.Module, arguments: dict[str, Any], latents: Tensor
    ) -> Any:
        """Evaluate the network with the positive prompt's rows guided."""
        parts = self._parts_of(len(latents))
        if self.rule.gate is not None:
            return self._evaluate_gated(hook, module, arguments, latents, parts)
        timestep, time = self._when(arguments)
        acts = _acts(self.whole_rule, time)
        positive = self._place(parts)
        guided = slice(positive * self.batch, (positive + 1) * self.batch)
        if not acts:
            output = hook.call(module, (), arguments)
        elif self.kind is CrossAttention:
            with self._on(Rows(guided)):
                output = hook.call(module, (), arguments)
        else:
            everyone = torch.arange(self.batch)
            groups = [_Group(part, everyone) for part in range(parts)]
            groups.append(_Group(positive, everyone, self.layout.text[:1]))
            with self._on(Rows(guided, slice(len(latents), len(latents) + self.batch))):
                output = hook.call(module, (), self._grown(arguments, parts, groups))
            output = rows.replaced(output, rows.prediction(output)[: len(latents)])
        self.pending = Pending(rows.prediction(output), None)
        strength = self.rule.strength if acts else 0.0
        self._record(timestep, time, torch.full((self.batch,), strength))
        return output

    def _evaluate_gated(
        self,
        hook: NetworkHook,
        module: nn.Module,
        arguments: dict[str, Any],
        latents: Tensor,
        parts: int,
    ) -> Any:
        """Evaluate positive and negative prompt, and guide the images whose gate is open."""
        chain, everyone = self.chain, torch.arange(self.batch)
        assert isinstance(chain, GateChain)
        self._arrive(arguments, latents.device)
        positive = self._place(parts)
        x = latents.chunk(parts)[positive]
        opening = self.rule.opening(chain.posterior(x))
        if not _acts(self.whole_rule, self._when(arguments)[1]):
            opening = torch.zeros_like(opening)
        some = torch.nonzero(opening.cpu() > 0).flatten()
        groups = [_Group(part, everyone) for part in range(parts)]
        groups.append(_Group(positive, everyone, self.layout.text))
        guided = twins = None
        if len(some):
            start = len(latents) + self.batch
            guided, stop = slice(start, start + len(some)), start + 2 * len(some)
            groups.append(_Group(positive, some))
            if self.kind is JointAttention:
                twins = slice(guided.stop, stop)
                groups.append(_Group(positive, some, self.layout.text[:1]))
        grown = self._grown(arguments, parts, groups)
        if guided is None:
            output = hook.call(module, (), grown)
        else:
            opened = opening[some.to(opening.device)]
            with self._on(Rows(guided, twins, some, opened)):
                output = hook.call(module, (), grown)
        sizes = [len(group.images) for group in groups]
        found = list(torch.split(rows.prediction(output), sizes))
        plain, negative = found[positive], found[parts]
        answer = plain
        if guided is not None:
            answer = plain.clone()
            answer[some.to(answer.device)] = found[parts + 1]
        chain.prediction = self._to_step(answer)
        chain.scale = self.rule.strength * opening
        chain.guide(self._to_step(plain), [self._to_step(negative)], x=x)
        self.pending = Pending(answer, None)
        return rows.replaced(output, torch.cat([*found[:positive], answer]))

    @contextmanager
    def _on(self, guided: Rows) -> Iterator[None]:
        """Guide some rows of the network's batch within a block."""
        assert self.state is not None
        self.state.rows = guided
        try:
            yield
        finally:
            self.state.rows = None

    def _grown(
        self, arguments: dict[str, Any], parts: int, groups: Sequence[_Group]
    ) -> dict[str, Any]:
        """Arguments with the rows of some groups."""
        layout, total = self.layout, parts * self.batch

        def rows_of(path: str, value: Tensor) -> Tensor:
            if value.ndim == 0 or len(value) == 1 < total:
                return value
            if not rows.matches(path, (*layout.text, *(layout.batched or ()))):
                if rows.matches(path, layout.shared) or len(value) == 1:
                    return value
                raise ValueError(
                    f"the layout of {type(self.pipe).__name__} does not say whether its network's "
                    f"{path}, of shape {tuple(value.shape)}, has a row for every prompt: give "
                    "apply_guidance a layout= that does"
                )
            if len(value) % total:
                raise ValueError(
                    f"pipe must call its network with rows for every prompt and image, {total} or "
                    f"a multiple, but {path} has {len(value)} (layout of "
                    f"{type(self.pipe).__name__})"
                )
            each, pieces = len(value) // total, []
            for group in groups:
                other = rows.matches(path, group.negative)
                source = self.negative[path].to(value) if other else value
                part = 0 if other else group.part
                at = rows.of_images(part, group.images, self.batch, each)
                pieces.append(source[at.to(source.device)])
            if len({piece.shape[1:] for piece in pieces}) > 1:
                raise ValueError(
                    f"negative_prompts must be encoded like the call's prompts for {self.rule!r} "
                    f"in a {type(self.pipe).__name__}, to {path} of shape "
                    f"{tuple(value.shape[1:])}, got {tuple(self.negative[path].shape[1:])}"
                )
            return torch.cat(pieces)

        grown: dict[str, Any] = rows.mapped(arguments, rows_of)
        return grown

    def _parts_of(self, size: int) -> int:
        """Number of prompts in a batch: 2 under classifier-free guidance, 1 without."""
        if size not in (self.batch, 2 * self.batch):
            raise ValueError(
                f"pipe must call its network with one or two rows for each of {self.batch} images "
                f"(prompts times num_images_per_prompt) for {self.rule!r}, but this "
                f"{type(self.pipe).__name__} called it with {size}"
            )
        return size // self.batch

    def _place(self, parts: int) -> int:
        """Position of the positive prompt in the batch."""
        return self._half(POSITIVE) if parts == 2 else 0

    def _when(self, arguments: dict[str, Any]) -> tuple[float, float]:
        """The step's timestep, and its diffusion time in [0, 1]."""
        timestep = self._time(arguments) or 0.0
        training = float(getattr(self.scheduler.config, "num_train_timesteps", 1000))
        return timestep, min(max(timestep / training, 0.0), 1.0)

    def _record(self, timestep: float, time: float, scale: Tensor) -> None:
        if self.record is None:
            self.record = RunTrace(type(self.scheduler).__name__, None)
            self.chain.trace.runs.append(self.record)
        self.record.add(len(self.record.steps), timestep, time, None, scale)


def _acts(rule: Rule, time: float) -> bool:
    """Whether a rule of attention acts at a diffusion time, within any limited intervals."""
    while isinstance(rule, LimitedInterval):
        if not rule.t_lo <= time <= rule.t_hi:
            return False
        rule = rule.rule
    assert isinstance(rule, AttentionRule)
    return rule.acts_at(time)


def _for_each(name: str, value: Any, number: int) -> Any:
    """A negative prompt, with an entry for each prompt of the call."""
    if isinstance(value, str):
        return [value] * number
    if isinstance(value, Tensor) and len(value) == 1:
        return value.expand(number, *value.shape[1:])
    return value
