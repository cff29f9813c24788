"""A driver for Triton that counts launches and starts nothing: the host's path without a GPU.

Kernels are compiled for a real architecture, loaded by nobody and launched by a function that
counts.  So what remains of a call is what its host does, apart from Triton's own launcher in C,
which needs the libraries of a driver.  For a process of its own: the driver is Triton's for good.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from dng_kernels import fused

ARCHITECTURE = 90


@triton.jit
def empty(x):  # type: ignore[no-untyped-def]
    """Nothing, for what it costs to start that."""
    pass


class Launcher:
    """Takes the place of the launcher that Triton builds for each kernel.

    Attributes
    ----------
    launched : list of tuple
        The hash of the compiled kernel, and what it was called with, of every launch while
        :attr:`keeps` is true.
    """

    keeps = False
    launched: list[tuple[Any, ...]] = []  # noqa: RUF012

    def __init__(self, src: Any, metadata: Any) -> None:
        self.hash = metadata.hash

    def __call__(self, *launch: Any) -> None:
        if self.keeps:
            self.launched.append((self.hash, *launch))


class _Utils:
    def load_binary(self, *kernel: Any) -> tuple[Any, ...]:
        found = (None, 1, 32, 0, 1024)  # module, function, registers, spills, threads
        return found[: len(_handles())]

    def unload_module(self, module: Any) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**17, "multiprocessor_count": 132, "warpSize": 32}


def _handles() -> tuple[str, ...]:
    """What a compiled kernel takes from the driver, which depends on Triton's version."""
    names = ("module", "function", "n_regs", "n_spills", "n_max_threads")
    code = triton.compiler.CompiledKernel._init_handles.__code__
    return tuple(name for name in names if name in code.co_names)


class StandIn(DriverBase):  # type: ignore[misc]
    """The driver."""

    def __init__(self) -> None:
        self.utils = _Utils()
        self.launcher_cls = Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCHITECTURE, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> None:
        return None


def install() -> None:
    """Make it Triton's driver, and let the kernel take tensors in the host's memory."""
    driver.set_active(StandIn())
    fused.check_device = lambda device: None
