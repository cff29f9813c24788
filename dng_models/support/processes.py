"""The processes of an experiment's launch, and the device that it uses."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

import dng_math
from dng_models.support import files


@contextmanager
def only_writer(folder: Path | str, processes: PartialState | Accelerator) -> Iterator[None]:
    """Lock a folder for all processes of a launch, which count as one writer.

    Every process enters the block; the main one holds the lock.

    Parameters
    ----------
    folder : Path or str
    processes : PartialState or Accelerator
        The processes of the launch.

    Raises
    ------
    OSError
        As :func:`dng_models.support.files.only_writer`, and in every process.
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


def is_cpu(device: torch.device | None) -> bool:
    """Whether a run is on the CPU; of no device, whether there is nothing else.

    Accelerate must be told: else each process that torchrun starts takes itself for the only one.
    """
    return not torch.accelerator.is_available() if device is None else device.type == "cpu"


class Place:
    """Processes and device of a run, determined on first access.

    Parameters
    ----------
    device : torch.device or str, optional
        Default: the accelerator of this process, else the CPU.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self._device = device

    @cached_property
    def processes(self) -> PartialState:
        """State of this process and of the others that ``accelerate launch`` started."""
        on_cpu = is_cpu(None if self._device is None else self.device)
        return PartialState(cpu=True) if on_cpu else PartialState()

    def only_writer(self, folder: Path | str) -> AbstractContextManager[None]:
        """Lock a folder for the processes of this launch, as the function :func:`only_writer`."""
        return only_writer(folder, self.processes)

    @cached_property
    def device(self) -> torch.device:
        """Device of the networks; a ValueError if it is not available on this machine."""
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


def versions(*packages: str, device: torch.device | None = None) -> dict[str, str]:
    """Versions that numbers depend on: Python, the packages and, with a device, this toolkit.

    Parameters
    ----------
    *packages : str
        Names of installed distributions.
    device : torch.device, optional
        Where the numbers are made; its name is told too.
    """
    told = {"python": platform.python_version()}
    if device is not None:
        own = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        told |= {"device": own, "dng": dng_math.__version__}
    return told | {package: version(package) for package in packages}
