"""Guided calls of pipelines whose network sees both prompts in one doubled batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dng_models.pipelines import rows
from dng_models.pipelines.call_begun import NEGATIVE, PERTURBED, POSITIVE
from dng_models.pipelines.call_watched import WatchedCall
from dng_models.pipelines.layouts import Control, Layout
from dng_models.pipelines.network_hook import NetworkHook

Look = Callable[[Mapping[int, Tensor]], None]


class BatchCall(WatchedCall):
    """Calls the network once per step; arguments as for :class:`~.call_begun.BegunCall`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # Outputs of control networks in this step: names of the network's arguments that already
        # have rows for all parts, or the arguments' values for each added part.
        self.grown: set[str] = set()
        self.controlled: dict[int, dict[str, Tensor]] = {}
        # The text arguments of the first step, for layouts with ``whole``.
        self.first_text: dict[str, Tensor] = {}

    def evaluate(
        self, hook: NetworkHook, module: nn.Module, arguments: dict[str, Any], latents: Tensor
    ) -> Any:
        """Evaluate all prompts, in one batch or in several of the same size."""
        layout = self.layout
        parts = self._parts
        if len(latents) % parts or (self.images is None and self._cuts_off()):
            raise self._not_doubled(len(latents))
        batch = len(latents) // parts
        if self.images is None:
            self._check_rows(arguments, batch, parts)
            if self.parts.avoids_own:
                self._check_shown(arguments, parts)
            if self.probe is not None:
                self._check_against_probe(arguments, parts)
        elif batch != self.images:
            raise self._other_batch(batch, len(latents))
        self.images = batch
        self._arrive(arguments, latents.device)
        if layout.whole and self.parts.added:
            self._check_same_text(arguments)
        predict = self._by_growing if self._grows else self._by_replacing
        x = latents.chunk(parts)[self._half(POSITIVE)] if latents.ndim > 1 else None

        def look(found: Mapping[int, Tensor]) -> None:
            self._look(found, x)

        asked = look if self.chain.asks else None
        whole, output = predict(hook, module, arguments, batch, parts, asked)

        def network(at: Tensor) -> list[Tensor]:
            shown: Any = torch.cat([self._showing(part, at) for part in latents.chunk(parts)])
            if isinstance(given := arguments[layout.latents], list):
                rows_and_latents = zip(given, shown, strict=True)
                shown = [[*r[:-1], z] if isinstance(r, list) else z for r, z in rows_and_latents]
            found, _ = predict(hook, module, {**arguments, layout.latents: shown}, batch, parts)
            used = (self.parts.compared, *self.parts.negatives)
            return [self._to_step(found[part]) for part in used]

        guided = self._guide(whole, network, x)
        answer = self._from_step(guided, whole[POSITIVE])
        halves = [answer, answer]
        if parts == 3:
            perturbed = whole[PERTURBED]
            assert self.pending is not None
            self.pending.perturbed = self._to_step(whole[POSITIVE]) - self._to_step(perturbed)
            halves.append(answer - (whole[POSITIVE] - perturbed))
        return rows.replaced(output, torch.cat(halves))

    @property
    def _parts(self) -> int:
        """Number of parts of the batch: negative, positive, and with PAG the perturbed positive."""
        perturbed = getattr(self.pipe, "do_perturbed_attention_guidance", False)
        return 3 if self.layout.perturbs and perturbed else 2

    @property
    def _grows(self) -> bool:
        """Whether added prompts become rows of the same batch; with PAG the batch must not grow."""
        return self.layout.batched is not None and self._parts == 2

    def _by_growing(
        self,
        hook: NetworkHook,
        module: nn.Module,
        arguments: dict[str, Any],
        batch: int,
        parts: int,
        look: Look | None = None,
    ) -> tuple[dict[int, Tensor], Any]:
        """Make all predictions in one call; added prompts are further rows of its batch.

        With ``look``, called once the others are made, the negatives are predicted in a second one.
        """
        everyone, negatives = torch.arange(batch), self.parts.negatives
        members = {part: everyone for part in self.parts.used if part not in negatives}
        if look is None:
            members = dict(sorted({**members, **self._members(batch, together=False)}.items()))
        found, output = self._in_one_call(hook, module, arguments, batch, members)
        if look is not None:
            look(found)
            members = self._members(batch, together=False)
            if members:
                found |= self._in_one_call(hook, module, arguments, batch, members)[0]
        for part in negatives:
            images = members.get(part)
            if images is None or len(images) < batch:
                # Skipped rows get the positive prediction: no evidence, and no guidance.
                every = found[POSITIVE].clone()
                if images is not None:
                    every[images.to(every.device)] = found[part]
                found[part] = every
        return found, output

    def _in_one_call(
        self,
        hook: NetworkHook,
        module: nn.Module,
        arguments: dict[str, Any],
        batch: int,
        members: Mapping[int, Tensor],
    ) -> tuple[dict[int, Tensor], Any]:
        """The predictions for the given images of some parts, by the parts, and the output."""
        whole = all(len(images) == batch for images in members.values())
        if list(members) == [NEGATIVE, POSITIVE] and whole and not self.grown:
            output = hook.call(module, (), arguments)
            halves = rows.prediction(output).chunk(2)
            found = {part: halves[self._half(part)] for part in (NEGATIVE, POSITIVE)}
        else:
            assert self.layout.batched is not None
            grown = self._grown(
                arguments, batch, members, self.layout, lambda part: self.encoded[part].calls[0]
            )
            output = hook.call(module, (), grown)
            sizes = [len(images) for images in members.values()]
            found = dict(zip(members, torch.split(rows.prediction(output), sizes), strict=True))
        return found, output

    def _grown(
        self,
        arguments: dict[str, Any],
        batch: int,
        members: Mapping[int, Tensor],
        layout: Layout | Control,
        encoded: Callable[[int], Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Arguments with rows for the given images of every part (0 negative, 1 positive, ...)."""
        full = 2 + len(self.parts.added)

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
                    # Added prompts share the negative prompt's rows.
                    place, source = self._half(NEGATIVE), value
                at = rows.of_images(place, images, batch, each)
                pieces.append(source[at.to(source.device)].to(value.device, value.dtype))
            return torch.cat(pieces)

        grown: dict[str, Any] = rows.mapped(arguments, rows_of)
        return grown

    def _by_replacing(
        self,
        hook: NetworkHook,
        module: nn.Module,
        arguments: dict[str, Any],
        batch: int,
        parts: int,
        look: Look | None = None,
    ) -> tuple[dict[int, Tensor], Any]:
        """Make all predictions; each added prompt takes the negative one's place in a call.

        With ``look``, it is called before the negatives are predicted.
        """
        used, negatives = self.parts.used, self.parts.negatives
        added = [part for part in used if part >= 2]
        # The negative half of the batch is evaluated in any case.
        free = {NEGATIVE} if NEGATIVE in used else set(added[:1])
        needed = negatives
        if look is not None:
            needed = []
        elif self.chain.asking is not None or not free >= set(negatives):
            needed = list(self._members(batch, together=True))
        added = [part for part in added if part in needed or part not in negatives]
        place = self._half(NEGATIVE)
        first = arguments
        taken = None
        if NEGATIVE not in used and added:
            taken = added.pop(0)
            first = self._with_text(arguments, taken, batch)
        output = hook.call(module, (), first)
        pieces = rows.prediction(output).chunk(parts)
        found = {POSITIVE: pieces[self._half(POSITIVE)]}
        found[NEGATIVE if taken is None else taken] = pieces[place]
        if parts == 3:
            found[PERTURBED] = pieces[2]
        if look is not None:
            look(found)
            added = list(self._members(batch, together=True))
        for part in added:
            other = hook.call(module, (), self._with_text(arguments, part, batch))
            found[part] = rows.prediction(other).chunk(parts)[place]
        for part in negatives:
            found.setdefault(part, found[POSITIVE])
        return found, output

    def _with_text(self, arguments: dict[str, Any], part: int, batch: int) -> dict[str, Any]:
        """The arguments, with an added prompt in the negative prompt's rows."""
        concept, parts = self.parts.added[part - 2], self._parts
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

    # ------------------------------------------------------------------ checks against the layout

    def _check_rows(self, arguments: dict[str, Any], batch: int, parts: int) -> None:
        """Check that every tensor has the rows that the layout declares."""
        total, layout = batch * parts, self.layout
        needed = self.parts.added or self.chain.skip_below is not None
        text = 0
        for path, value in rows.leaves(arguments):
            is_text = rows.matches(path, layout.text)
            text += is_text
            one = value.ndim == 0 or len(value) == 1
            declared = is_text or rows.matches(path, layout.batched or ())
            if is_text and layout.whole:
                continue
            if declared and not one and len(value) % total and path not in self.grown:
                grown = batch * (2 + len(self.parts.added))
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

    def _check_shown(self, arguments: dict[str, Any], parts: int) -> None:
        """Check that the negative prompt's embeddings are not zeros (some pipelines' default)."""
        for path, value in rows.leaves(arguments):
            if not rows.matches(path, self.layout.text[:1]) or self.layout.whole:
                continue
            if value.is_floating_point() and value.ndim > 1 and not len(value) % parts:
                negative = value.chunk(parts)[self._half(NEGATIVE)]
                if not bool(negative.flatten(1).any(1).all()):
                    raise self._says_nothing(
                        f"this {type(self.pipe).__name__} shows its network zeros for it, as some "
                        "do where only negative_prompt_2 is given: give negative_prompt too"
                    )

    def _check_same_text(self, arguments: dict[str, Any]) -> None:
        """Check that the text is still that of the first step, with which prompts were added."""
        found = [
            (path, value)
            for path, value in rows.leaves(arguments)
            if rows.matches(path, self.layout.text)
        ]
        if not self.first_text:
            self.first_text = dict(found)
        for path, value in found:
            first = self.first_text.get(path)
            if first is None or first.shape != value.shape or not rows.near(value, first):
                raise ValueError(
                    f"the prompts must stay the same during a run of a {type(self.pipe).__name__} "
                    f"with negative_prompts or cfg_scale, but at step {self.chain.step} its "
                    f"{path} is another one than at the first: change none in a callback"
                )

    def _check_against_probe(self, arguments: dict[str, Any], parts: int) -> None:
        """Check that another negative prompt changes the negative rows of the text, and only those.

        The reference is ``probe``, a call that was begun with another negative prompt.
        """
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
            changed = [not rows.near(one, another) for one, another in pairs]
            if not any(changed):
                continue
            if not rows.matches(path, self.layout.text):
                if path in self._controlled():
                    continue
                raise self._undeclared(path)
            mixed = self.layout.whole and all(changed)  # the rows may lie on another axis
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
        """Stand-ins for a list's row: zeros, one per part; the same with a 1 if the row differs."""
        name, index = path.split(".")[:2]
        part = int(index) * parts // len(arguments[name])
        differs = value.shape != reference.shape or not rows.near(value, reference)
        return torch.zeros(parts), torch.eye(parts)[part] * differs

    def _controlled(self) -> set[str]:
        """Names of the arguments that are outputs of control networks, which read the prompt."""
        given = [name for control in self.layout.control for name in control.gives]
        assert self.probe is not None
        return {p for p, _ in rows.leaves(self.probe.calls[0]) if rows.matches(p, given)}

    def _undeclared(self, path: str) -> ValueError:
        return ValueError(
            f"the layout of {type(self.pipe).__name__} does not say that its network's {path} "
            "depends on the prompt, but it changes with the negative prompt"
        )

    # ------------------------------------------------------------------ control networks

    def evaluate_control(
        self, hook: NetworkHook, module: nn.Module, control: Control, arguments: dict[str, Any]
    ) -> Any:
        """Evaluate a control network for the pipeline's prompts and the added ones."""
        if not self.parts.added:
            return hook.call(module, (), arguments)
        encoded = {part: b.control.get(control.name) for part, b in self.encoded.items()}
        if any(e is None for e in encoded.values()):
            raise ValueError(f"pipe.{control.name} must be called in the first step already")
        if self._guesses(control, arguments):
            return hook.call(module, (), arguments)
        if not self._grows:
            return self._controlled_apart(hook, module, control, arguments)
        batch = len(next(iter(self.encoded.values())).calls[0][self.layout.latents]) // 2
        members = dict.fromkeys(range(2 + len(self.parts.added)), torch.arange(batch))
        grown = self._grown(arguments, batch, members, control, lambda part: encoded[part] or {})
        self.grown = set(control.gives)
        return hook.call(module, (), grown)

    def _guesses(self, control: Control, arguments: dict[str, Any]) -> bool:
        """Whether the control network sees only the positive prompt, as in guess mode."""
        main = dict(rows.leaves(next(iter(self.encoded.values())).calls[0]))
        for path, value in rows.leaves(arguments):
            if rows.matches(path, control.text) and path in main:
                return 2 * len(value) == len(main[path])
        return False

    def _controlled_apart(
        self, hook: NetworkHook, module: nn.Module, control: Control, arguments: dict[str, Any]
    ) -> Any:
        """Evaluate a control network once for each added prompt, in the negative one's place."""
        place = self._half(NEGATIVE)
        for part in range(2, 2 + len(self.parts.added)):
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
