"""Dynamic Negative Guidance as a diffusers guider, for modular pipelines.

A guider decides which predictions a step makes and combines them.  DNG also needs the latents, from
whose path the posterior is tracked.  A small block in the denoising loop shows them::

    blocks = add_latents_block(StableDiffusionXLAutoBlocks())
    pipe = blocks.init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")
    pipe.load_components()
    pipe.update_components(guider=DynamicNegativeGuider(18, prior=0.01, temperature=0.3))

The block is needed even where a pipeline passes its latents to the guider, because only the
scheduler tells what a step does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.modular_pipelines import (
    BlockState,
)
from torch import Tensor

from dng_math import DynamicNegativeGuidance, checks
from dng_math.rules import LimitedInterval, Reference, Rule
from dng_math.schedules import TrackerVariance
from dng_math.trackers import TrackerName
from dng_models.pairs.divergence import Predictions
from dng_models.pipelines.call_begun import check_text
from dng_models.pipelines.guided_chain import GuidedChain
from dng_models.pipelines.guider_network import SeenNetwork
from dng_models.pipelines.trace import Trace
from dng_models.pipelines.transitions import scheduler_run

try:
    from diffusers.guiders.guider_utils import GuiderOutput
except ImportError:  # diffusers 0.35, whose guiders have another interface
    GuiderOutput = None

NO_NEGATIVE = (
    "negative_prompt must be given to the pipeline: dynamic negative guidance leads away from it"
)
# Names under which denoisers take the prompt's embeddings by token.
TOKENS = ("prompt_embeds", "encoder_hidden_states", "cap_feats")
# A prompt whose embeddings differ from the empty one's; it is long, so that masks differ too.
UNLIKE_EMPTY = "a photograph of two red apples on a wooden table beside a window in the morning"


@dataclass(frozen=True, eq=False)
class _Shown:
    """What :meth:`DynamicNegativeGuider.show_latents` was given for a step."""

    scheduler: Any
    latents: Tensor
    timestep: Tensor | float
    mask: Tensor | None
    eta: float | None


class DynamicNegativeGuider(BaseGuidance):  # type: ignore[misc]
    """DNG (arXiv 2410.14398, Eqs. 10 and 12) as a guider of modular pipelines.

    ``guided = base - lambda (negative - base)`` with lambda = g p/(1 - p) for each image, where p
    is the tracked posterior of the negative prompt, and base is the positive prediction or, with
    ``cfg_scale``, ``unconditional + cfg_scale (positive - unconditional)``.  diffusers calls the
    negative prompt's prediction ``pred_uncond``.

    The configuration is saved and loaded like that of diffusers' guiders, without the embeddings
    that the guider carries (:meth:`set_negative`, :meth:`set_unconditional`).  In a pipeline with
    two guiders for one chain (Wan 2.2), set the same object as both.

    Parameters
    ----------
    guidance_scale, prior, temperature, offset, offset_nats, p_min, p_max, tracker, variance, \
    probes, reference
        As for :meth:`dng_math.DynamicNegativeGuidance.tracked`, as numbers.  ``tracker="path"``
        evaluates the network again at every step, with a forward derivative.  The reference says
        what the negative is measured from, and its posterior relative to; "unconditional" needs
        ``cfg_scale``.
    cfg_scale : float, optional
        Scale of classifier-free guidance beneath the rule.  It takes a third prediction per step;
        :meth:`encode_unconditional` gives the guider the prompt for it.
    start, stop : float
        Fractions of the steps between which guidance acts, 0 <= start <= stop <= 1, start < 1.
        The posterior is tracked outside them too.
    enabled : bool
        Whether to guide; if not, the positive prediction is used unchanged.  (The loop of Stable
        Diffusion XL enables every guider.)

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.
    ImportError
        If diffusers is older than 0.36.
    """

    _input_predictions = ["pred_cond", "pred_uncond", "pred_empty"]  # noqa: RUF012

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        guidance_scale: float = 1.0,
        prior: float = 0.01,
        temperature: float = 1.0,
        offset: float = 0.0,
        offset_nats: float = 0.0,
        p_min: float = 1e-6,
        p_max: float = 0.99,
        tracker: TrackerName = "paper",
        variance: TrackerVariance = "matched",
        cfg_scale: float | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        probes: int = 1,
        reference: Reference = "positive",
    ) -> None:
        if GuiderOutput is None:
            raise ImportError(
                "DynamicNegativeGuider needs diffusers 0.36 or newer, whose guiders have another "
                f"interface; this is {diffusers.__version__}. dng_models.apply_guidance works here"
            )
        checks.real("start", start, "in [0, 1)", 0.0, 1.0, closed="[)")
        checks.real("stop", stop, f"in [start, 1] = [{start}, 1]", start, 1.0, closed="[]")
        checks.boolean("enabled", enabled)
        checks.finite("temperature", temperature)
        super().__init__(start, stop, enabled)
        self.rule = DynamicNegativeGuidance.tracked(
            guidance_scale,
            prior,
            temperature,
            offset,
            offset_nats=offset_nats,
            p_min=p_min,
            p_max=p_max,
            tracker=tracker,
            variance=variance,
            probes=probes,
            reference=reference,
        )
        self.trace = Trace()
        self._cfg_scale = cfg_scale
        self._interval = (start, stop)
        self._guides = enabled
        self._at, self._of, self._prepared = 0, 1, 0
        self._shown: _Shown | None = None
        self._negative: dict[str, Any] | None = None
        self._unconditional: dict[str, Any] | None = None
        self._captured: dict[str, tuple[Any, Any]] | None = None
        # Refuses an invalid cfg_scale.
        chain = GuidedChain(self.rule, cfg_scale=cfg_scale)
        chain.check_prompted()
        self._follows = chain.follows
        self._network = SeenNetwork()
        self._chain: GuidedChain | None = None

    # ------------------------------------------------------------------ called by diffusers

    def enable(self) -> None:
        """Switch guidance on."""
        super().enable()
        self._guides = True

    def disable(self) -> None:
        """Switch guidance off: use the positive prediction unchanged."""
        super().disable()
        self._guides = False

    @property
    def num_conditions(self) -> int:
        """Number of predictions per step: 2, with ``cfg_scale`` 3, and 1 if disabled.

        It is the same at every step: pipelines ask before the first one whether to encode a
        negative prompt, and the posterior is tracked also outside [start, stop].
        """
        if not self._guides:
            return 1
        return 2 if self._cfg_scale is None else 3

    @property
    def is_conditional(self) -> bool:
        """Whether the positive prediction is being made."""
        return self._prepared == 1

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        """Begin a step; pipelines call it.

        Parameters
        ----------
        step : int
            Index of the loop's step, from 0; one that is not after the last begins a new run.
        num_inference_steps : int
            Number of steps of the loop.
        timestep : Tensor
            The timestep that the network is given.
        """
        super().set_state(step, num_inference_steps, timestep)
        if step == 0 or step <= self._at:
            self._chain = None
        self._at, self._of, self._prepared = step, num_inference_steps, 0
        self._network.forget()

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Begin a prediction; pipelines call it."""
        super().prepare_models(denoiser)
        self._prepared += 1
        if self._follows and self._guides:
            self._network.watch(denoiser)

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        """End a prediction; pipelines call it."""
        super().cleanup_models(denoiser)
        self._network.unwatch()

    def prepare_inputs(self, data: Mapping[str, Any]) -> list[BlockState]:
        """The network's inputs for each prediction; pipelines call it.

        Parameters
        ----------
        data : mapping of str to tuple or other value
            Inputs by name: pairs for the positive and the negative prompt, other values for all.

        Returns
        -------
        list of BlockState
            One for each prediction, in the order positive, negative, unconditional.

        Raises
        ------
        ValueError
            If no negative prompt was given, or carried embeddings are missing or do not fit.
        """
        if self._captured is not None:
            self._captured |= {
                name: value for name, value in data.items() if isinstance(value, tuple)
            }
        images = _images(data)
        batches = []
        for kind in self._input_predictions[: self.num_conditions]:
            fields = {name: self._field(kind, name, value, images) for name, value in data.items()}
            batches.append(BlockState(**fields, **{self._identifier_key: kind}))
        if self.needs_negative_prompt:
            self._check_negative(data)
        return batches

    def prepare_inputs_from_block_state(
        self, data: BlockState, input_fields: Mapping[str, str | tuple[str, str]]
    ) -> list[BlockState]:
        """As :meth:`prepare_inputs`, from named fields of a block state; pipelines call it.

        Parameters
        ----------
        data : BlockState
            The state with the fields.
        input_fields : mapping of str to str or (str, str)
            For each input the name of a field for all predictions, or the names of a field for the
            positive and one for the negative prompt.

        Returns
        -------
        list of BlockState
        """
        found: dict[str, Any] = {}
        for name, source in input_fields.items():
            if isinstance(source, tuple):
                found[name] = tuple(getattr(data, each, None) for each in source)
            elif hasattr(data, source):
                found[name] = getattr(data, source)
        return self.prepare_inputs(found)

    def forward(
        self,
        pred_cond: Tensor,
        pred_uncond: Tensor | None = None,
        pred_empty: Tensor | None = None,
    ) -> Any:
        """The guided prediction; pipelines call it.

        Parameters
        ----------
        pred_cond, pred_uncond, pred_empty : Tensor, shape (B, ...)
            Predictions for the positive, the negative and, with ``cfg_scale``, the unconditional
            prompt.

        Returns
        -------
        GuiderOutput
            The guided ``pred``, with ``pred_cond`` and ``pred_uncond`` as given: some pipelines
            rescale ``pred`` to their norm.

        Raises
        ------
        ValueError
            If the latents of this step were not shown, or no negative prompt was given.
        """
        pred = pred_cond
        if self._guides and self._captured is None:
            assert pred_uncond is not None
            pred = self._guided(pred_cond, pred_uncond, pred_empty)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    # ------------------------------------------------------------------ called by the loop

    def show_latents(
        self,
        scheduler: Any,
        latents: Tensor,
        timestep: Tensor | float,
        *,
        mask: Tensor | None = None,
        eta: float | None = None,
    ) -> None:
        """Show the guider a step before its predictions are made; :class:`ShowLatents` calls it.

        Parameters
        ----------
        scheduler : SchedulerMixin
            The scheduler, with its timesteps set.
        latents : Tensor, shape (B, ...)
            The scheduler's latents, not scaled to the network's input.
        timestep : Tensor or float
            One of the scheduler's timesteps.
        mask : Tensor, optional
            1 where the scheduler's steps decide the latents, 0 where something overwrites them;
            broadcasts to the latents.  Read at the first step of a run.
        eta : float, optional
            The eta that the scheduler's step is given (DDIM); read at the first step of a run.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, its value and what is allowed.
        """
        if isinstance(scheduler, type) or not (
            hasattr(scheduler, "step") and hasattr(scheduler, "timesteps")
        ):
            raise TypeError(f"scheduler must be a scheduler of diffusers, got {scheduler!r}")
        if not isinstance(latents, Tensor):
            raise TypeError(f"latents must be a tensor, got {latents!r}")
        right = timestep.numel() >= 1 if isinstance(timestep, Tensor) else _is_number(timestep)
        if not right:
            raise TypeError(
                f"timestep must be a number or a tensor of at least one, got {timestep!r}"
            )
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a tensor or None, got {mask!r}")
        if eta is not None:
            checks.real("eta", eta, "in [0, 1]", 0.0, 1.0, closed="[]")
        self._shown = _Shown(scheduler, latents, timestep, mask, eta)

    @property
    def needs_negative_prompt(self) -> bool:
        """Whether the pipeline's call must give a negative prompt."""
        return self._guides and self._negative is None and self._captured is None

    # ------------------------------------------------------------------ carried embeddings

    def set_negative(self, embeddings: Mapping[str, Any] | None) -> None:
        """Carry the negative prompt, for pipelines that take none (Flux2).

        The prompt that the pipeline has in its place is then the unconditional one.

        Parameters
        ----------
        embeddings : mapping of str to Tensor, or None
            Embeddings by the names of the denoiser's arguments, such as ``prompt_embeds``, with
            rows for one image or for all.  None: use the pipeline's own negative prompt.

        Raises
        ------
        TypeError
            If ``embeddings`` is something else, or empty.
        """
        self._negative = _carried("embeddings", embeddings)

    def set_unconditional(self, embeddings: Mapping[str, Any] | None) -> None:
        """Carry the unconditional prompt for ``cfg_scale``; arguments as :meth:`set_negative`."""
        self._unconditional = _carried("embeddings", embeddings)

    def encode_negative(self, pipe: Any, prompt: str, **call: Any) -> None:
        """Have a pipeline encode the negative prompt, and carry it.

        The pipeline makes one step with it as its prompt, and the image is thrown away.

        Parameters
        ----------
        pipe : ModularPipeline
            A pipeline with this guider.
        prompt : str
            The unwanted concept.
        call
            Other arguments that the pipeline's call needs (height, width, images ...).

        Raises
        ------
        ValueError
            If the prompt is empty, or the pipeline does not have this guider or shows it no prompt.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt must be a non-empty str, got {prompt!r}")
        check_text("prompt", prompt)
        self.set_negative({name: pair[0] for name, pair in self._capture(pipe, prompt, call)})

    def encode_unconditional(self, pipe: Any, **call: Any) -> None:
        """Have a pipeline encode its unconditional prompt, and carry it.

        It is the prompt that the pipeline uses when no negative prompt is given: the empty one, or
        zeros.  The pipeline makes one step, and the image is thrown away.

        Parameters
        ----------
        pipe : ModularPipeline
            A pipeline with this guider.
        call
            Other arguments that the pipeline's call needs (height, width, images ...).

        Raises
        ------
        ValueError
            If the pipeline does not have this guider or shows it no prompt.
        """
        self.set_unconditional(
            {name: pair[1] for name, pair in self._capture(pipe, UNLIKE_EMPTY, call)}
        )

    def _capture(
        self, pipe: Any, prompt: str, call: Mapping[str, Any]
    ) -> list[tuple[str, tuple[Any, Any]]]:
        """Inputs that depend on the text, by name: each a pair, with the prompt and without it."""
        if not any(part is self for part in getattr(pipe, "components", {}).values()):
            raise ValueError(
                "pipe must be a modular pipeline with this guider: call "
                f"pipe.update_components(guider=guider) first, got a {type(pipe).__name__}"
            )
        # Some pipelines have no unconditional prompt unless an empty negative one is given.
        for negative in ({}, {"negative_prompt": ""}):
            with self._capturing() as pairs:
                pipe(**{"prompt": prompt, "num_inference_steps": 1, **negative, **call})
            if any(pair[1] is not None for pair in pairs.values()):
                break
        found = [(name, pair) for name, pair in pairs.items() if not _equal(*pair)]
        if not any(name in TOKENS for name, _ in found):
            raise ValueError(
                f"pipe must show its guider a prompt and an unconditional prompt, a "
                f"{type(pipe).__name__} shows {sorted(pairs)}; give the embeddings themselves to "
                "set_negative and set_unconditional"
            )
        return found

    @contextmanager
    def _capturing(self) -> Iterator[dict[str, tuple[Any, Any]]]:
        self._captured = {}
        try:
            yield self._captured
        finally:
            self._captured = None
            self._shown = self._chain = None

    # ------------------------------------------------------------------ a step

    def _field(self, kind: str, name: str, value: Any, images: int) -> Any:
        """The network's input of one name for one of the predictions."""
        if not isinstance(value, tuple):
            return value
        positive, other = value[0], value[1]
        if kind == "pred_cond" or self._captured is not None:
            return positive
        if kind == "pred_uncond":
            if self._negative is None:
                return other
            return _take(self._negative, name, (positive, other), images, "set_negative")
        if self._unconditional is not None:
            return _take(self._unconditional, name, (positive, other), images, "set_unconditional")
        if self._negative is None:
            raise ValueError(
                "the guider must carry the unconditional prompt for cfg_scale="
                f"{self._cfg_scale}: call guider.encode_unconditional(pipe) first, or give its "
                "embeddings to guider.set_unconditional"
            )
        return other

    def _check_negative(self, data: Mapping[str, Any]) -> None:
        """Refuse a missing or empty negative prompt: guidance away from it means something else."""
        if self._at > 0:
            return
        pairs = {name: value for name, value in data.items() if isinstance(value, tuple)}
        missing = all(pair[1] is None for pair in pairs.values())
        for name in TOKENS:
            if name in pairs:
                empty = None if self._unconditional is None else self._unconditional.get(name)
                missing = missing or _is_nothing(pairs[name][1], empty)
        if missing:
            raise ValueError(NO_NEGATIVE)

    def _guided(self, positive: Tensor, negative: Tensor, empty: Tensor | None) -> Tensor:
        shown, self._shown = self._shown, None
        if shown is None:
            raise ValueError(
                "the latents of this step were not shown to the guider: build the pipeline of "
                "blocks that show them, dng_models.add_latents_block(blocks).init_pipeline(...); "
                "in a loop of your own, call guider.show_latents before the predictions of every "
                "step"
            )
        if self._chain is None:
            rule = self._rule(shown)
            self._chain = GuidedChain(
                rule,
                cfg_scale=self._cfg_scale,
                mask=shown.mask,
                trace=self.trace,
                has_network=self._follows,
            )
        self._chain.observe(
            shown.scheduler, shown.latents, shown.timestep, scaled=False, eta=shown.eta
        )
        # Networks that also read tokens of a given image return predictions for those too.
        own = slice(None)
        if positive.ndim == shown.latents.ndim == 3:
            own = slice(shown.latents.shape[1])
        compared = positive[:, own], negative[:, own]
        x = network = None
        if self._follows:
            scaled = shown.latents * self._chain.input_scale
            if empty is not None and self._chain.reference == "unconditional":
                seen = *compared, empty[:, own]
                x, of_all = self._network.at_other_latents(scaled, seen)
                network = _last_first(of_all)
            else:
                x, network = self._network.at_other_latents(scaled, compared)
        guided = self._chain.guide(
            *compared, None if empty is None else empty[:, own], network=network, x=x
        )
        if guided.shape == positive.shape:
            return guided
        return torch.cat([guided, positive[:, shown.latents.shape[1] :]], dim=1)

    def _rule(self, shown: _Shown) -> Rule:
        """The rule, limited to the interval from ``start`` to ``stop`` in steps of this loop."""
        start, stop = self._interval
        if start == 0 and stop == 1:
            return self.rule
        run = scheduler_run(shown.scheduler)
        time, t = run.coefficients.time, float(shown.timestep)
        first = int(np.argmin(np.abs(run.timesteps - t))) - self._at
        low, high = math.floor(start * self._of), math.floor(stop * self._of) - 1
        low, high = first + low, min(first + high, len(time) - 1)
        if high < low:
            return LimitedInterval(self.rule, 0.0, 0.0)  # time is above 0 at every step
        return LimitedInterval(self.rule, float(time[high]), float(time[low]))


def _last_first(of_all: Predictions) -> Predictions:
    """The unconditional and the negative prediction, of all three."""

    def network(at: Tensor) -> list[Tensor]:
        _, negative, unconditional = of_all(at)
        return [unconditional, negative]

    return network


# ---------------------------------------------------------------------- embeddings


def _carried(name: str, embeddings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if embeddings is None:
        return None
    right = isinstance(embeddings, Mapping) and all(
        isinstance(key, str) and not isinstance(value, str | bytes | None)
        for key, value in embeddings.items()
    )
    if not right or not embeddings:
        told = type(embeddings).__name__
        if isinstance(embeddings, Mapping):
            told = str({key: type(value).__name__ for key, value in embeddings.items()})
        raise TypeError(
            f"{name} must be a mapping of the denoiser's names to tensors, or None, got {told}"
        )
    return dict(embeddings)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value)


def _images(data: Mapping[str, Any]) -> int:
    """Number of rows of the network's inputs; 1 if no input tells."""
    for name in TOKENS:
        value = data.get(name)
        value = value[0] if isinstance(value, tuple) else value
        if isinstance(value, Tensor | list):
            return len(value)
    return 1


def _take(
    carried: Mapping[str, Any], name: str, pair: tuple[Any, Any], images: int, setter: str
) -> Any:
    """The carried value, repeated for all images; if none is carried, the value of both prompts."""
    if name not in carried:
        if _equal(*pair):
            return pair[0]
        raise ValueError(
            f"embeddings given to guider.{setter} must also have {name!r}, which depends on the "
            f"prompt; they have {sorted(carried)}"
        )
    value, like = carried[name], pair[0]
    if not isinstance(value, Tensor | list):
        return value
    if len(value) not in (1, images):
        raise ValueError(f"{name} must have rows for 1 or {images} images, got {len(value)}")
    times = images // len(value)
    if isinstance(value, list):
        return times * value
    if isinstance(like, Tensor):
        value = value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
    return value.repeat(times, *[1] * (value.ndim - 1))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool((a == b).all())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_equal(*pair) for pair in zip(a, b, strict=True))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return bool(a == b)


def _is_nothing(embedding: Any, empty: Any) -> bool:
    """Whether an embedding stands for no prompt: None, zeros, or the empty prompt's."""
    if embedding is None:
        return True
    if not isinstance(embedding, Tensor):
        return False
    if not bool(embedding.any()):
        return True
    if not isinstance(empty, Tensor) or empty.shape[1:] != embedding.shape[1:]:
        return False
    return bool((embedding == empty.to(embedding)).all())
