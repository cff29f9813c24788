"""Guided calls of pipelines that call their network once for each prompt, or have no prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dng_models.pairs.denoisers import Predictor, evaluating
from dng_models.pipelines import rows
from dng_models.pipelines.call_begun import NEGATIVE, POSITIVE
from dng_models.pipelines.call_watched import Pending, WatchedCall
from dng_models.pipelines.layouts import Control
from dng_models.pipelines.network_hook import NetworkHook


class SeparateCall(WatchedCall):
    """Calls the network once per step for each prompt.

    Arguments as for :class:`dng_models.pipelines.call_begun.BegunCall`.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # Hook, module and arguments of the last call of each control network.
        self.controls: dict[Control, tuple[NetworkHook, nn.Module, dict[str, Any]]] = {}

    def evaluate(
        self, hook: NetworkHook, module: nn.Module, arguments: dict[str, Any], latents: Tensor
    ) -> Any:
        """Evaluate all prompts at the first of the two calls of a step."""
        batch = len(latents)
        if self.images is None:
            self._check_separate(arguments)
        elif batch != self.images:
            raise self._other_batch(batch, batch)
        self.images = batch
        self._arrive(arguments, latents.device)
        own = NEGATIVE if self.layout.first == "negative" else POSITIVE
        negatives = self.parts.negatives

        def predict(given: dict[str, Any], parts: Iterable[int]) -> tuple[dict[int, Tensor], Any]:
            found: dict[int, Tensor] = {}
            output: Any = None
            for part in parts:
                shown = given if part == own else self._controlled_for(given, part)
                answer = hook.call(module, (), rows.copied(shown))
                if part == POSITIVE:
                    output = answer
                found[part] = rows.prediction(answer)
            return found, output

        predicted = [part for part in self.parts.used if part not in negatives]
        if self.chain.asks:
            found, output = predict(arguments, predicted)
            self._look(found, latents)
            found |= predict(arguments, self._members(batch, together=True))[0]
        else:
            predicted = sorted([*predicted, *self._members(batch, together=True)])
            found, output = predict(arguments, predicted)
        for part in negatives:
            found.setdefault(part, found[POSITIVE])

        def network(at: Tensor) -> list[Tensor]:
            shown = latents.clone()
            shown[self._latents_in(latents, at) or ...] = at.to(latents.dtype)
            # Use the caches of the begun call, so that those of the run itself stay unchanged.
            caches = {n: v for n, v in self._text_of(own).items() if not isinstance(v, Tensor)}
            at_x, _ = predict({**arguments, **caches, self.layout.latents: shown}, predicted)
            used = (self.parts.compared, *negatives)
            return [self._to_step(at_x.get(part, at_x[POSITIVE])) for part in used]

        guided = self._guide(found, network, latents)
        answer = rows.replaced(output, self._from_step(guided, found[POSITIVE]))
        self._first_call = (arguments, answer)
        return answer

    def _first_shown(self, part: int) -> dict[str, Any]:
        """The arguments for a prompt in the call that was only begun."""
        half = self._half(POSITIVE if part == POSITIVE else NEGATIVE)
        return self.encoded[part].calls[half]

    def _text_of(self, part: int) -> dict[str, Any]:
        """The arguments of :meth:`_first_shown` that depend on the prompt."""
        shown = self._first_shown(part)
        return {n: v for n, v in shown.items() if rows.matches(n, self.layout.text)}

    def _controlled_for(self, arguments: dict[str, Any], part: int) -> dict[str, Any]:
        """The arguments with another prompt's text, and control networks evaluated for it."""
        found = self._for_prompt(arguments, part)
        if part in self.parts.negatives:
            found |= {name: arguments[name] for name in self.layout.blanks}
        for control, (hook, module, seen) in self.controls.items():
            text = {name: found[name] for name in control.text}
            output = hook.call(module, (), {**seen, **text})
            found.update(zip(control.gives, output, strict=False))
        return found

    def _for_prompt(self, arguments: dict[str, Any], part: int) -> dict[str, Any]:
        """The arguments with another prompt's text."""
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
        """Check that the pipeline makes two calls per step, which differ only in their text."""
        name, own = type(self.pipe).__name__, self.encoded[POSITIVE]
        needed = self.layout.guidance_scale
        if len(own.calls) < 2:
            raise ValueError(
                f"the pipeline's call must make it evaluate a negative prompt, but this {name} "
                'called its network once in its first step: give it a negative_prompt ("" for '
                f"none){'' if needed is None else f' and a {needed}'}, and no "
                "guider or option that leaves it out"
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
        """Names of the arguments that differ between two calls."""
        first, second = dict(rows.leaves(one)), dict(rows.leaves(other))
        return [
            path
            for path in first.keys() | second.keys()
            if path not in first
            or path not in second
            or first[path].shape != second[path].shape
            or not rows.near(first[path], second[path])
        ]

    def again(self, arguments: dict[str, Any]) -> Any:
        """Check the arguments of a step's second call, and return the first call's answer."""
        assert self.pending is not None
        if self.pending.calls > 1:
            return super().again(arguments)
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

    def evaluate_control(
        self, hook: NetworkHook, module: nn.Module, control: Control, arguments: dict[str, Any]
    ) -> Any:
        """Call a control network, and remember the call so that it can be repeated."""
        self.controls[control] = (hook, module, arguments)
        return hook.call(module, (), arguments)


class AloneCall(WatchedCall):
    """Calls the network once per step, without a prompt.

    Arguments as for :class:`dng_models.pipelines.call_begun.BegunCall`.
    """

    def evaluate(
        self, hook: NetworkHook, module: nn.Module, arguments: dict[str, Any], latents: Tensor
    ) -> Any:
        """Evaluate the network, and the unwanted networks beside it."""
        if self.images is not None and len(latents) != self.images:
            raise self._other_batch(len(latents), len(latents))
        self.images = len(latents)
        self._arrive(arguments, latents.device)
        evaluated = self._to_evaluate(len(latents), together=False)
        value = arguments[self.layout.time]
        times = torch.as_tensor(value, device=latents.device).reshape(-1).expand(len(latents))
        denoisers = self.denoisers
        names = ["unwanted"] if len(denoisers) == 1 else None
        predictor = Predictor(denoisers, latents.device, names=names)

        def network(at: Tensor) -> list[Tensor]:
            at = at.to(latents.dtype)
            own = rows.prediction(hook.call(module, (), {**arguments, self.layout.latents: at}))
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
        positive = rows.prediction(output)
        guided = self.chain.guide(positive, others(positive), network=network, x=latents)
        self.pending = Pending(guided, latents)
        return rows.replaced(output, guided)
