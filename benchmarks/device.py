"""Devices on which a step is timed: a CPU by wall time, a GPU by its events."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import harness

# Modes of a contender: launched call by call, or replayed from a CUDA graph.
PLAIN, GRAPH = "plain", "graph"


@dataclass(frozen=True)
class Device:
    """A device, its clock, and its abilities.

    ``kernel`` says whether the Triton kernel runs there; ``cache`` is the size in bytes that the
    input sets together must exceed (0: one set will do); ``capture`` makes a graph replay of a
    lap; ``launches`` counts the device operations of a call; ``free`` gives the free memory in
    bytes; ``least_lap`` is how many seconds a lap of many steps should take.  Of a GPU,
    ``peak`` is what its memory moves at most, in bytes per second, if torch tells it, and ``host``
    times what the host does to start a call.
    """

    name: str
    place: torch.device
    clock: Callable[[Callable[[], object]], float]
    kernel: bool = False
    cache: int = 0
    capture: Callable[[Callable[[], object]], Callable[[], object]] | None = None
    launches: Callable[[Callable[[], object]], int | None] = lambda run: None
    free: Callable[[], float] = lambda: math.inf
    least_lap: float = 0.005
    peak: float | None = None
    host: Callable[[Callable[[], object]], float] | None = None


def named_devices() -> dict[str, str]:
    """Further columns that describe the machine: the GPU, and torch's number of threads."""
    return {"gpu": harness.gpu(), "torch_threads": str(torch.get_num_threads())}


# ---------------------------------------------------------------------- a CPU


def cpu_device() -> Device:
    return Device("cpu", torch.device("cpu"), awake, free=_free_on_cpu)


def awake(run: Callable[[], object]) -> float:
    """Seconds of wall time, after a pause and with torch's threads awake again.

    The first parallel operation after a pause waits for the threads, on some machines for
    milliseconds.
    """
    time.sleep(harness.PAUSE)
    spare = torch.zeros(2**18)
    for _ in range(3):
        spare.add_(1.0)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _free_on_cpu() -> float:
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):  # this system does not say
        return math.inf


# ---------------------------------------------------------------------- a GPU


def gpu_device() -> Device:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(
        "gpu",
        torch.device("cuda"),
        event_clock,
        kernel=True,
        cache=properties.L2_cache_size,
        capture=captured,
        launches=device_operations,
        free=lambda: float(torch.cuda.mem_get_info()[0]),
        least_lap=0.002,
        peak=peak_bandwidth(properties),
        host=host_clock,
    )


def peak_bandwidth(properties: object) -> float | None:
    """Bytes per second that a card's memory moves at most; None if torch does not tell.

    Memory moves data twice a tick: at both edges of a clock that torch gives in kHz, over a bus
    whose width it gives in bits.
    """
    clock = getattr(properties, "memory_clock_rate", None)
    width = getattr(properties, "memory_bus_width", None)
    return 2.0 * clock * 1e3 * width / 8.0 if clock and width else None


HOST_CALLS = 16  # so few that the device's queue of launches does not fill up
HOST_LAPS = 5


def host_clock(run: Callable[[], object]) -> float:
    """Seconds that the host takes for a call, while the device works off what it was told."""
    laps = []
    for _ in range(HOST_LAPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            run()
        laps.append((time.perf_counter() - start) / HOST_CALLS)
    torch.cuda.synchronize()
    return statistics.median(laps)


def event_clock(run: Callable[[], object]) -> float:
    """Seconds between two events on the device, recorded before and after the call."""
    cuda: Any = torch.cuda
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def captured(lap: Callable[[], object]) -> Callable[[], object]:
    """Capture a lap in a CUDA graph; the replay keeps the lap, so its kernels stay loaded."""
    # One-time work (compiling, workspaces, library handles) must not be captured.
    cuda: Any = torch.cuda
    side = cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        lap()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lap()

    def replay(captured: object = lap) -> None:
        graph.replay()

    return replay


def device_operations(run: Callable[[], object]) -> int | None:
    """Number of kernels and copies of a call; None where the profiler cannot see the device."""
    run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    kinds = [str(event.device_type) for event in profile.events() or []]
    return sum(kind.endswith("CUDA") for kind in kinds) or None
