"""The process that an experiment runs in, those beside it, and the device that it uses."""

from __future__ import annotations

from functools import cached_property

import torch
from accelerate import PartialState


class Place:
    """Processes and device, found out when they are first asked for.

    Parameters
    ----------
    device : torch.device or str, optional
        Default: the accelerator of this process, else the CPU.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self._device = device

    @cached_property
    def processes(self) -> PartialState:
        """The process and those beside it, which ``accelerate launch`` started."""
        on_cpu = self._device is not None and self.device.type == "cpu"
        return PartialState(cpu=True) if on_cpu else PartialState()

    @cached_property
    def device(self) -> torch.device:
        """Where the networks run."""
        if self._device is None:
            return torch.device(self.processes.device)
        try:
            device = torch.device(self._device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"device must be one that is here, got {str(self._device)!r} "
                f"({str(error).splitlines()[0]})"
            ) from None
        return device
