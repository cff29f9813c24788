"""The process that an experiment runs in, those beside it, and the device that it uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from dng_models.class_removal import files


@contextmanager
def only_writer(folder: Path | str, processes: PartialState | Accelerator) -> Iterator[None]:
    """Be the only ones that write to a folder: all processes of a launch count as one writer.

    Each of them enters; the main one holds the lock.

    Raises
    ------
    OSError
        In every process, as :func:`dng_models.class_removal.files.only_writer`.
    """
    refused: list[OSError | None] = [None]
    with ExitStack() as stack:
        if processes.is_main_process:
            try:
                stack.enter_context(files.only_writer(folder))
            except OSError as error:
                refused = [error]
        if processes.num_processes > 1:
            broadcast_object_list(refused)
        if refused[0] is not None:
            raise refused[0]
        yield


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

    def only_writer(self, folder: Path | str) -> AbstractContextManager[None]:
        """Be the only ones that write to a folder; :func:`only_writer`."""
        return only_writer(folder, self.processes)

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
