"""A guided call under way: its scheduler's steps, and conversions between network and chain.

Runs and steps are recognised by calls, not by the contents of tensors: a run begins with the
pipeline's call; a step begins with the network's call and ends with the scheduler's.  What the
scheduler is given is compared with the guided prediction.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dng_models.pipelines import rows
from dng_models.pipelines.call_begun import POSITIVE, BegunCall, Stop
from dng_models.pipelines.layouts import Control
from dng_models.pipelines.network_hook import NetworkHook
from dng_models.pipelines.scheduler_reading import position

# Relative tolerance of times: a 16-bit network is given them to about three digits.
SAME_TIME = 1e-2

_UNITS = {
    "timestep": "the scheduler's timestep t",
    "fraction": "t over the number of training timesteps T",
    "reversed": "T - t",
    "reversed fraction": "1 - t/T",
}


@dataclass(eq=False)
class Pending:
    """A guided prediction on its way to the scheduler.

    Attributes
    ----------
    guided : Tensor
        The prediction, as the scheduler must be given it.
    x : Tensor, optional
        The scheduler's latents as the network was shown them; None where it was shown others.
    perturbed : Tensor, optional
        The difference that PAG adds to the prediction, times its scale.
    calls : int
        Number of network calls in this step.
    """

    guided: Tensor
    x: Tensor | None
    perturbed: Tensor | None = None
    calls: int = 1


class WatchedCall(BegunCall):
    """A call whose network and scheduler are watched; arguments as for :class:`BegunCall`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # Whether guidance itself is evaluating networks, which may call each other.
        self.inside = False
        # To tell whose code runs: the pipeline's in this thread, or a callback of the caller.
        self.thread = threading.get_ident()
        self.in_callback = False
        # Watched schedulers, each with the instance's own ``step`` before, if it had one.
        self.watched: list[tuple[Any, Any]] = []
        self.pending: Pending | None = None
        # The last step's result, and torch's version counter of its memory then.
        self.last_next: Tensor | None = None
        self.last_version = 0
        self.images: int | None = None
        self.told_of_changes = False
        # The network's arguments at this step.
        self.shown: dict[str, Any] = {}
        # Whether ``chain.guide`` runs, which may differentiate the network: nothing is skipped.
        self.probing = False

    # ------------------------------------------------------------------ whose code runs

    def is_strange(self) -> bool:
        """Whether the current call comes from other code than the pipeline's own."""
        return self.in_callback or threading.get_ident() != self.thread

    def with_own_code(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments, with callbacks wrapped so that their calls are not guided."""
        # Diffusers' own callbacks call no networks, and pipelines recognise them by their class.
        own = {
            name: self._of_the_caller(value)
            for name, value in kwargs.items()
            if name.startswith("callback") and callable(value)
            if not hasattr(value, "tensor_inputs")
        }
        return {**kwargs, **own}

    def _of_the_caller(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            self.in_callback = True
            try:
                return function(*args, **kwargs)
            finally:
                self.in_callback = False

        return called

    # ------------------------------------------------------------------ the scheduler

    @contextmanager
    def watching_the_scheduler(self) -> Iterator[None]:
        """Watch every step of the pipeline's scheduler within a block."""
        self._watch(self.scheduler)
        try:
            yield
        finally:
            while self.watched:
                scheduler, already = self.watched.pop()
                if already is None:
                    del scheduler.step
                else:
                    scheduler.step = already

    def _watch(self, scheduler: Any) -> None:
        step = scheduler.step
        signature = inspect.signature(step)
        if "sample" not in signature.parameters:
            # Somebody wrapped the step on the instance: take the class's signature.
            signature = inspect.signature(type(scheduler).step.__get__(scheduler))

        @functools.wraps(step)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.is_strange():
                return step(*args, **kwargs)
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            sample = given.arguments["sample"]
            if self.beginning is not None:
                self.beginning.shape = sample.shape
                raise Stop
            self._check_step(given.arguments, sample)
            output = step(*args, **kwargs)
            self._took(sample, output[0])
            return output

        self.watched.append((scheduler, scheduler.__dict__.get("step")))
        scheduler.step = watched

    def _eta(self) -> float | None:
        """The eta that the scheduler's step will be given (DDIM); None if it takes none."""
        parameter = inspect.signature(self.scheduler.step).parameters.get("eta")
        if parameter is None:
            return None
        value = self.arguments.get("eta", parameter.default)
        return 0.0 if value is None else float(value)

    def _check_step(self, given: Mapping[str, Any], sample: Tensor) -> None:
        """Check that the scheduler is given the guided prediction, at the expected step."""
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
                f"did not at step {step}: {self.layout.guidance_scale or 'its call'} must switch "
                "the negative prompt on, throughout (dng_math.LimitedInterval(rule, t_lo, t_hi) "
                "guides at some times only)"
            )
        timesteps = self.scheduler.timesteps
        at = given["timestep"]
        at = float(at.reshape(-1)[0]) if isinstance(at, Tensor) else float(at)
        if abs(float(timesteps[step]) - at) > 1e-4 * max(1.0, abs(at)):
            raise ValueError(
                f"timestep must be {float(timesteps[step]):g} at step {step} of this run, got "
                f"{at:g}: a step was left out"
            )
        counted = getattr(self.scheduler, "step_index", None)
        if counted is not None and int(counted) != step:
            raise ValueError(
                f"pipe.scheduler must be stepped by its {name} alone during a run, but it counts "
                f"step {int(counted)} where that is at step {step}: leave it alone in callbacks"
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
            if not rows.near(pending.x, self._of_images(sample) * scale):
                raise ValueError(
                    f"{self.chain.probes} must be 0 for a {name}: what its network is shown is not "
                    "the scheduler's latents"
                )

    def _of_images(self, sample: Tensor) -> Tensor:
        """One row per image, also where the scheduler steps the doubled batch."""
        return sample.chunk(2)[0] if self.layout.doubled_step else sample

    def _check_prediction(self, output: Tensor, pending: Pending) -> None:
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
            # The pipeline may already have replaced the part that it overwrites.
            self.chain.check_mask(output)
            counts = mask.to(output.device) > 0.5
            output, expected = output * counts, expected * counts
        if not rows.near(output, expected):
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
        """Warn once if the latents are not those that the last step returned."""
        last = self.last_next
        assert last is not None
        untouched = _version(last) == self.last_version
        known = not self.chain.tracks or self.chain.follows
        if self.told_of_changes or known or (sample is last and untouched):
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
        """Check that the last guided prediction reached the scheduler."""
        if self.pending is not None:
            raise ValueError(
                f"the last guided prediction of this {type(self.pipe).__name__} never reached its "
                "scheduler"
            )

    # ------------------------------------------------------------------ the network

    @contextmanager
    def evaluating_itself(self) -> Iterator[None]:
        """Mark a block in which guidance itself evaluates networks, which may call each other."""
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def network(self, hook: NetworkHook, module: nn.Module, arguments: dict[str, Any]) -> Any:
        """Answer a call of the pipeline's network with the guided prediction for every prompt.

        Parameters
        ----------
        hook : NetworkHook
            The hook that was called.
        module : nn.Module
            The network.
        arguments : dict
            The network's arguments by name.

        Returns
        -------
        object
            The network's output, with the guided prediction in it.

        Raises
        ------
        ValueError
            If the call does not fit the run or the layout.
        """
        if self.pipe.scheduler is not self.scheduler and self.chain.step is None:
            # The pipeline exchanged its scheduler in the call, before the first step.
            self.scheduler = self.pipe.scheduler
            self._watch(self.scheduler)
        if self.beginning is not None:
            return self._seen(hook, module, arguments)
        if self.pipe.scheduler is not self.scheduler:
            raise ValueError(
                "pipe.scheduler must stay the same during a run: at step "
                f"{self.chain.step} a {type(self.pipe.scheduler).__name__} stands where the run "
                f"began with a {type(self.scheduler).__name__}"
            )
        if self.pending is not None:
            return self.again(arguments)
        latents = self._latents(module, arguments)
        self.shown = arguments
        return self.evaluate(hook, module, arguments, latents)

    def control(
        self, hook: NetworkHook, module: nn.Module, control: Control, arguments: dict[str, Any]
    ) -> Any:
        """Answer a call of a control network; arguments as for :meth:`network`."""
        if self.beginning is not None:
            return self._seen(hook, module, arguments)
        return self.evaluate_control(hook, module, control, arguments)

    @abstractmethod
    def evaluate(
        self, hook: NetworkHook, module: nn.Module, arguments: dict[str, Any], latents: Tensor
    ) -> Any:
        """Evaluate all prompts at the first call of a step, and return the guided output."""

    def again(self, arguments: dict[str, Any]) -> Any:
        """Answer a further call of the network in the same step; an error unless overridden."""
        raise ValueError(
            f"pipe must call its network once a step and prompt, but this "
            f"{type(self.pipe).__name__} called it once more at step {self.chain.step}: "
            "leave out what does more in its call than guidance with the negative prompt "
            "(skipped layers, self-attention guidance)"
        )

    def evaluate_control(
        self, hook: NetworkHook, module: nn.Module, control: Control, arguments: dict[str, Any]
    ) -> Any:
        """Evaluate a control network for all prompts and return its output."""
        return hook.call(module, (), arguments)

    def _latents(self, module: nn.Module, arguments: dict[str, Any]) -> Tensor:
        found = arguments.get(self.layout.latents)
        if isinstance(found, list) and found:
            # In a row that is itself a list the latents come last, after pictures.
            found = torch.stack([row[-1] if isinstance(row, list) else row for row in found])
        if not isinstance(found, Tensor):
            raise ValueError(
                f"pipe must call its {type(module).__name__} with a tensor {self.layout.latents}, "
                f"got {sorted(arguments)}"
            )
        return found

    def _arrive(self, arguments: dict[str, Any], device: torch.device) -> None:
        """Begin a step: the first of a run, or the next one."""
        chain, scheduler = self.chain, self.scheduler
        told = self._time(arguments)
        if not chain.belongs_to(scheduler):
            if chain.step is not None and scheduler.timesteps is chain.timesteps:
                raise ValueError(
                    f"the run is over: its {type(scheduler).__name__} has "
                    f"{len(scheduler.timesteps)} steps"
                )
            if chain.step is not None and 0 < chain.step < len(chain.timesteps):
                raise ValueError(
                    f"the {type(scheduler).__name__} must keep its timesteps during a run, and "
                    f"they were set anew at step {chain.step} of {len(chain.timesteps)}: a "
                    "callback, or another pipeline with the same scheduler, began a run of its own"
                )
            self.last_next = None
            chain.begin(
                scheduler,
                _first_step(scheduler, told),
                eta=self._eta(),
                noise_of_limited=bool(self.arguments.get("use_clipped_model_output")),
                device=device,
            )
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
        """The timestep that the network is given, in the scheduler's unit."""
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
        """Number of an output's channels that the scheduler is given."""
        channels = prediction.shape[1]
        if not self.layout.variance:
            return channels
        if self.layout.variance == "always":
            return channels // 2
        # The network's configured numbers, which count channels or patches of them.
        known = (getattr(self.pipe, name, None) for name in self.layout.network)
        config = next(c for c in (getattr(n, "config", None) for n in known) if c is not None)
        return channels // 2 if config.out_channels == 2 * config.in_channels else channels

    def _kept(self, dimensions: int) -> tuple[slice, ...]:
        """Index of the tokens or frames that the scheduler steps, among all of them."""
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
        """Index of the scheduler's latents in the network's input, beside any conditions."""
        sizes = zip(shown.shape, like.shape, strict=False)
        if shown.ndim != like.ndim or any(whole < part for whole, part in sizes):
            return None
        found = [slice(n) for n in like.shape]
        if self.layout.kept is not None and self.layout.kept[1] == "last":
            axis = self.layout.kept[0]
            found[axis] = slice(-like.shape[axis], None)
        return tuple(found)

    def _arranged(self, value: Tensor) -> Tensor:
        """An output or input of the network, rearranged as the pipeline does for its scheduler."""
        arrange = self.layout.arranged
        return value if arrange is None else arrange(self.pipe, value, self.shown)

    def _as_before(self, arranged: Tensor, like: Tensor) -> Tensor:
        """Undo :meth:`_arranged`; elements that it leaves out are taken from ``like``."""
        if self.layout.arranged is None:
            return arranged
        places = torch.arange(like.numel(), device=like.device).reshape(like.shape)
        flat = like.reshape(-1).clone()
        flat[self._arranged(places).reshape(-1)] = arranged.reshape(-1)
        return flat.reshape(like.shape)

    def _showing(self, shown: Tensor, x: Tensor) -> Tensor:
        """The network's input, with other latents in it."""
        whole = self._arranged(shown).clone()
        place = self._latents_in(whole, x)
        assert place is not None
        whole[place] = x.to(whole.dtype)
        return self._as_before(whole, shown)

    def _to_step(self, prediction: Tensor) -> Tensor:
        """Convert a prediction to the form that the scheduler is given."""
        prediction = self._arranged(prediction)
        if self.layout.kept is not None:
            prediction = prediction[self._kept(prediction.ndim)]
        own = prediction[:, : self._channels(prediction)]
        return own if self.layout.sign > 0 else -own

    def _from_step(self, guided: Tensor, like: Tensor) -> Tensor:
        """Convert a guided prediction to the form that the network returns; undoes _to_step."""
        own = guided if self.layout.sign > 0 else -guided
        whole = self._arranged(like).clone()
        part = whole if self.layout.kept is None else whole[self._kept(whole.ndim)]
        part[:, : own.shape[1]] = own
        return self._as_before(whole, like)

    def _guide(
        self, predictions: Mapping[int, Tensor], network: Callable[[Tensor], list[Tensor]], x: Any
    ) -> Tensor:
        """The guided prediction, in the form that the scheduler is given."""
        unconditional = self.parts.unconditional
        positive = self._to_step(predictions[POSITIVE])
        x = self._stepped(x, positive)
        self.probing = True
        try:
            guided = self.chain.guide(
                positive,
                [self._to_step(predictions[part]) for part in self.parts.negatives],
                None if unconditional is None else self._to_step(predictions[unconditional]),
                network=None if x is None else network,
                x=x,
            )
        finally:
            self.probing = False
        if self.layout.guided is not None:
            rest = positive[:, self.layout.guided :]
            guided = torch.cat([guided[:, : self.layout.guided], rest], dim=1)
        self.pending = Pending(guided, x)
        return guided

    def _stepped(self, x: Tensor | None, positive: Tensor) -> Tensor | None:
        """The scheduler's latents in what the network is shown; None where they are not in it."""
        x = None if x is None else self._arranged(x)
        at = None if x is None else self._latents_in(x, positive)
        return None if x is None or at is None else x[at].contiguous()

    def _look(self, predictions: Mapping[int, Tensor], x: Tensor | None) -> None:
        """Let the rule look at the images that the predictions without the negatives imply."""
        unconditional = self.parts.unconditional
        positive = self._to_step(predictions[POSITIVE])
        self.chain.look(
            positive,
            None if unconditional is None else self._to_step(predictions[unconditional]),
            x=self._stepped(x, positive),
        )

    def _to_evaluate(self, batch: int, *, together: bool) -> Tensor | None:
        """Mask of the images whose unwanted concepts are predicted at this step; None for all."""
        return None if self.probing else self.chain.to_evaluate(batch, together=together)

    def _members(self, batch: int, *, together: bool) -> dict[int, Tensor]:
        """The images for which each unwanted part is predicted at this step; no empty ones."""
        evaluated = self._to_evaluate(batch, together=together)
        everyone, negatives = torch.arange(batch), self.parts.negatives
        if evaluated is None:
            return dict.fromkeys(negatives, everyone)
        each = evaluated if evaluated.ndim == 2 else [evaluated] * len(negatives)
        found = {part: everyone[own] for part, own in zip(negatives, each, strict=True)}
        return {part: images for part, images in found.items() if len(images)}

    def _cuts_off(self) -> bool:
        """Whether the pipeline itself reports that this call evaluates only the positive prompt."""
        known = self.layout.guidance_scale is not None and self.layout.above >= 1.0
        return known and not getattr(self.pipe, "do_classifier_free_guidance", True)

    def _not_doubled(self, size: int) -> ValueError:
        name = type(self.pipe).__name__
        networks = [getattr(self.pipe, network, None) for network in self.layout.network]
        configs = [getattr(network, "config", None) for network in networks]
        if any(getattr(c, "time_cond_proj_dim", None) is not None for c in configs):
            return ValueError(
                f"pipe must evaluate its negative prompt, and this {name} does not: its network is "
                "distilled, and told guidance_scale itself (time_cond_proj_dim). Take the network "
                "that it was distilled from"
            )
        return ValueError(
            "pipe must call its network once a step with every latent twice, but this "
            f"{name} called it with a batch of {size}: "
            f"{self.layout.guidance_scale or 'its call'} must switch the negative prompt on, "
            "throughout (dng_math.LimitedInterval(rule, t_lo, t_hi) guides at some times only)"
        )

    def _other_batch(self, batch: int, size: int) -> ValueError:
        if not getattr(self.pipe, "do_classifier_free_guidance", True):
            return self._not_doubled(size)
        return ValueError(
            f"the batch must stay the same during a run: step {self.chain.step} has {batch} "
            f"images, the step before had {self.images}. A callback that cuts guidance off must "
            "be replaced by dng_math.LimitedInterval(rule, t_lo, t_hi)"
        )


def _version(x: Tensor) -> int:
    """Torch's count of writes to a tensor's memory; 0 for inference tensors, which have none."""
    return 0 if x.is_inference() else x._version


def _first_step(scheduler: Any, told: float | None) -> int:
    """Index of the timestep at which a run begins."""
    for counted in ("step_index", "begin_index"):
        index = getattr(scheduler, counted, None)
        if index is not None:
            return int(index)
    if told is None:
        return 0
    timesteps = scheduler.timesteps.detach().cpu().double()
    nearest = int((timesteps - told).abs().argmin())
    if hasattr(scheduler, "index_for_timestep"):
        # The scheduler decides: of a repeated timestep it takes the second.
        return int(scheduler.index_for_timestep(scheduler.timesteps[nearest]))
    return position(scheduler, float(timesteps[nearest]))
