"""The network of a modular pipeline as its guider sees it, to evaluate it again at other latents.

A path tracker needs forward derivatives of the network, and a guider is given predictions.  But
pipelines show it the network before each prediction, so that a hook can note the call.  Which of
its inputs the latents are, and that the pipeline takes the output as it is, is read from the
tensors themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dng_models.pairs.divergence import Predictions

_ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-4}  # relative; half precision: 1e-2


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of the network: its inputs, by place or name, and what it returned."""

    network: nn.Module
    inputs: dict[int | str, Any]
    output: Tensor

    def latents(self, x: Tensor) -> int | str | None:
        """The input that holds the latents x, alone or with others behind them; None if none."""
        for name, value in self.inputs.items():
            if isinstance(value, Tensor) and _holds(value, x):
                return name
        return None

    def at(self, name: int | str, x: Tensor) -> Tensor:
        """The prediction at other latents, of their shape."""
        given = self.inputs[name]
        now = x.to(given.dtype)
        if given.shape[1] > x.shape[1]:
            now = torch.cat([now, given[:, x.shape[1] :]], dim=1)
        inputs = {**self.inputs, name: now}
        places = [inputs[key] for key in inputs if isinstance(key, int)]
        named = {key: value for key, value in inputs.items() if isinstance(key, str)}
        return _tensor(self.network(*places, **named))[:, : x.shape[1]]


class SeenNetwork:
    """The calls of the network that a guider was shown in a step."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._hook: Any = None

    def watch(self, network: nn.Module) -> None:
        """Note the network's next call, until :meth:`unwatch`."""

        def seen(module: nn.Module, places: Any, named: dict[str, Any], output: Any) -> None:
            inputs: dict[int | str, Any] = dict(enumerate(places))
            inputs.update(named)
            self._calls.append(_Call(module, inputs, _tensor(output)))

        self.unwatch()
        self._hook = network.register_forward_hook(seen, with_kwargs=True)

    def unwatch(self) -> None:
        """Note no further calls."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def forget(self) -> None:
        """Forget the calls of the step before."""
        self._calls = []

    def at_other_latents(
        self, x: Tensor, predictions: Sequence[Tensor]
    ) -> tuple[Tensor, Predictions]:
        """The latents that the network was shown, and a function of them that predicts again.

        Parameters
        ----------
        x : Tensor, shape (B, ...)
            The network's input at this step, up to rounding.
        predictions : sequence of Tensor, shape (B, ...) each
            What the pipeline gave the guider, in the order of the calls.

        Returns
        -------
        x : Tensor, shape (B, ...)
            As the network was shown it, to the last bit.
        network : callable
            Maps a tensor like x to the predictions.

        Raises
        ------
        ValueError
            If the calls that were seen do not explain the predictions.
        """
        found: list[tuple[_Call, int | str]] = []
        for call, prediction in zip(self._calls, predictions, strict=False):
            name = call.latents(x)
            if name is not None and _holds(call.output, prediction):
                found.append((call, name))
        if len(found) < len(predictions):
            raise ValueError(
                "the tracker's probes must be 0 in this pipeline: it shows its guider no network "
                "whose input is the latents and whose output is the prediction, so that there is "
                "no derivative. dng_models.apply_guidance follows a path in other pipelines"
            )
        first, name = found[0]
        shown = first.inputs[name][:, : x.shape[1]]
        return shown, lambda at: [call.at(name, at) for call, name in found]


def _tensor(output: Any) -> Tensor:
    """The prediction in a network's output."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def _holds(value: Tensor, x: Tensor) -> bool:
    """Whether the first entries of a tensor, along its second dimension, are x."""
    fits = value.ndim == x.ndim > 1 and value.shape[1] >= x.shape[1]
    if not fits or value.shape[:1] + value.shape[2:] != x.shape[:1] + x.shape[2:]:
        return False
    if not value.is_floating_point():
        return False
    first = value[:, : x.shape[1]]
    allowed = max(_ALLOWED.get(each.dtype, 1e-2) for each in (value, x))
    size = float(x.abs().max())
    return bool((first.double() - x.double()).abs().max() <= allowed * size)
