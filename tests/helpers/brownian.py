"""A stand-in for torchsde, whose Brownian motion diffusers' DPMSolverSDEScheduler takes."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch


class BrownianInterval:
    """W(t_b) - W(t_a) of one path for each image, at times that are asked for from high to low."""

    def __init__(self, *, size: tuple[int, ...], dtype: torch.dtype, **_: Any) -> None:
        self.size, self.dtype = size, dtype
        self.known: dict[float, torch.Tensor] = {}

    def __call__(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return self.at(float(high)) - self.at(float(low))

    def at(self, time: float) -> torch.Tensor:
        """The path at a time that is known, or below all that are."""
        if not self.known:
            self.known[time] = torch.zeros(self.size, dtype=self.dtype)
        if time not in self.known:
            last = min(self.known)
            assert time < last, (time, last)
            step = math.sqrt(last - time) * torch.randn(self.size, dtype=self.dtype)
            self.known[time] = self.known[last] - step
        return self.known[time]


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """Make DPMSolverSDEScheduler usable in this test, with torchsde or without it."""
    if importlib.util.find_spec("torchsde") is not None:
        return
    module = ModuleType("torchsde")
    module.BrownianInterval = BrownianInterval  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "torchsde", module)
    name = "diffusers.schedulers.scheduling_dpmsolver_sde"
    patch.delitem(sys.modules, name, raising=False)
    loaded = importlib.import_module(name)
    patch.setattr(diffusers, "DPMSolverSDEScheduler", loaded.DPMSolverSDEScheduler, raising=False)
