"""Denoisers: networks and other callables that give a prediction at a batch and a time.

:class:`Predictor` evaluates several of them at one point, in one call or one after the other, and
checks what they return.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

Denoiser = Callable[[Tensor, Tensor], Any]


Evaluation = Literal["auto", "separate", "stacked"]


EVALUATIONS: tuple[Evaluation, ...] = ("auto", "separate", "stacked")


@dataclass(frozen=True, eq=False)
class Labelled:
    """Denoiser made of a class-conditional network and a fixed label.

    Denoisers that share a network are evaluated in one batch.

    Parameters
    ----------
    net : callable
        ``net(x, t, class_labels=labels)``, such as a UNet2DModel with class embeddings.
    label : int
        Label of every image; for the unconditional prediction, the network's index for "no label".
    """

    net: Callable[..., Any]
    label: int

    def __call__(self, x: Tensor, t: Tensor) -> Any:
        """Return the network's output for x (B, ...) and t (B,); the prediction has x's shape."""
        return self.net(x, t, class_labels=torch.full_like(t, self.label))


def device_of(denoiser: object) -> torch.device:
    """Device of a network's parameters; the CPU for a denoiser without parameters."""
    while isinstance(denoiser, Labelled):
        denoiser = denoiser.net
    if isinstance(denoiser, nn.Module):
        return next((p.device for p in denoiser.parameters()), torch.device("cpu"))
    return torch.device("cpu")


def _unwrapped(output: Any) -> Tensor:
    return getattr(output, "sample", output) if not isinstance(output, Tensor) else output


@contextmanager
def evaluating(denoisers: Sequence[Denoiser]) -> Iterator[None]:
    """Put the networks in evaluation mode in this block, and restore their mode afterwards."""
    nets = [d.net if isinstance(d, Labelled) else d for d in denoisers]
    training = [net for net in nets if isinstance(net, nn.Module) and net.training]
    for net in training:
        net.eval()
    try:
        yield
    finally:
        for net in training:
            net.train()


class Predictor:
    """Evaluates all denoisers at (x, t), in as few network calls as possible.

    Parameters
    ----------
    denoisers : sequence of callable
        As for :func:`dng_models.pairs.sampling.sample`.
    device : torch.device
        Device of the denoisers.
    evaluation, autocast
        As for :func:`dng_models.pairs.sampling.sample`.
    names : sequence of str, optional
        Names of the denoisers in messages; default "denoisers[0]" and so on.

    Raises
    ------
    ValueError
        If ``evaluation`` is "stacked" and the denoisers cannot be stacked.
    """

    def __init__(
        self,
        denoisers: Sequence[Denoiser],
        device: torch.device,
        evaluation: Evaluation = "auto",
        autocast: torch.dtype | None = None,
        *,
        names: Sequence[str] | None = None,
    ) -> None:
        self.denoisers = denoisers
        self.names = names or [f"denoisers[{i}]" for i in range(len(denoisers))]
        self.device = device
        self.autocast = autocast
        self.stacked: Callable[[Tensor, Tensor], Tensor] | None = None
        wanted = evaluation == "stacked" or (evaluation == "auto" and device.type == "cuda")
        if wanted and len(denoisers) > 1:
            obstacle = _unlike(denoisers)
            if obstacle is None:
                self.stacked = _stack(denoisers)
            elif evaluation == "stacked":
                raise ValueError(f"evaluation='stacked' needs networks of one shape: {obstacle}")

    def __call__(self, x: Tensor, t: int | Tensor) -> list[Tensor]:
        """Return one prediction of the shape of x for each denoiser.

        Parameters
        ----------
        x : Tensor, shape (B, ...)
        t : int or Tensor, shape (B,)
            A training timestep, or the time of every image, passed to the networks unchanged.

        Raises
        ------
        TypeError, ValueError
            If a denoiser does not return floating-point predictions of the shape of x.
        """
        if isinstance(t, Tensor):
            times = t
        else:
            times = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        context = (
            nullcontext()
            if self.autocast is None
            else torch.autocast(self.device.type, dtype=self.autocast)
        )
        with context:
            predictions = self._predictions(x, times)
        for name, prediction in zip(self.names, predictions, strict=True):
            _check_prediction(name, prediction, x)
        # 16-bit predictions need no cast when x is float32.
        return [p.to(x.dtype) if x.dtype == torch.float64 else p for p in predictions]

    def _predictions(self, x: Tensor, times: Tensor) -> list[Tensor]:
        if self.stacked is not None:
            return list(self.stacked(x, times))
        found: dict[int, Tensor] = {}
        for i, denoiser in enumerate(self.denoisers):
            if i in found:
                continue
            if not isinstance(denoiser, Labelled):
                found[i] = _unwrapped(denoiser(x, times))
                continue
            mates = {
                j: other
                for j, other in enumerate(self.denoisers)
                if isinstance(other, Labelled) and other.net is denoiser.net
            }
            labels = torch.cat([torch.full_like(times, mate.label) for mate in mates.values()])
            output = denoiser.net(
                x.repeat(len(mates), *[1] * (x.ndim - 1)),
                times.repeat(len(mates)),
                class_labels=labels,
            )
            found |= dict(zip(mates, _unwrapped(output).chunk(len(mates)), strict=True))
        return [found[i] for i in range(len(self.denoisers))]


def _check_prediction(name: str, prediction: Any, x: Tensor) -> None:
    """Raise an error unless a denoiser's output is a prediction for x."""
    wanted = f"predictions of shape {tuple(x.shape)}, tensors of floating-point numbers"
    if not isinstance(prediction, Tensor):
        raise TypeError(
            f"{name} must return {wanted} or outputs with one as their sample, got a "
            f"{type(prediction).__name__}"
        )
    if not prediction.is_floating_point():
        raise TypeError(f"{name} must return {wanted}, got {prediction.dtype}")
    if prediction.shape != x.shape:
        raise ValueError(f"{name} must return {wanted}, got shape {tuple(prediction.shape)}")


def _unlike(denoisers: Sequence[Denoiser]) -> str | None:
    """Why the denoisers cannot share one stacked network; None if they can."""
    first = denoisers[0]
    for denoiser in denoisers:
        if not isinstance(denoiser, nn.Module) or not isinstance(first, nn.Module):
            return f"{type(denoiser).__name__} is not a torch module"
        if type(denoiser) is not type(first):
            return f"{type(first).__name__} and {type(denoiser).__name__}"
        settings = [
            {k: v for k, v in dict(getattr(net, "config", {})).items() if not k.startswith("_")}
            for net in (first, denoiser)
        ]
        if settings[0] != settings[1]:
            differ = sorted(k for k in settings[0] if settings[0][k] != settings[1].get(k))
            return f"their configurations differ in {', '.join(differ)}"
        shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in (first, denoiser)]
        if shapes[0] != shapes[1]:
            return "their parameters have different shapes"
    return None


def _stack(denoisers: Sequence[Any]) -> Callable[[Tensor, Tensor], Tensor]:
    parameters, buffers = stack_module_state(list(denoisers))
    skeleton = copy.deepcopy(denoisers[0]).to("meta")

    def one(weights: dict[str, Tensor], kept: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
        return _unwrapped(functional_call(skeleton, (weights, kept), (x, t)))

    every = torch.vmap(one, in_dims=(0, 0, None, None))
    return lambda x, t: every(parameters, buffers, x, t)
