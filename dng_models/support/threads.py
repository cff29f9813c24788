"""How many threads torch uses on a CPU, decided by the size of the work.

Figures, benchmarks, tests and experiments all use it.  Torch is imported only when there are
threads to set.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

SMALL_WORK = 2**31
UNKNOWN_WEIGHTS = 2**18


def work_of(shape: Sequence[int], networks: Iterable[object]) -> int:
    """Estimate how many multiplications one call of the largest network costs.

    The estimate is elements of the batch times weights.  That is right for a convolution at full
    resolution, and too high at lower resolutions.

    Parameters
    ----------
    shape : sequence of int
        Shape of the batch that the network is called with.
    networks : iterable
        Torch modules, or other callables, which are assumed to have 2^18 weights: fewer than 8,192
        elements then count as small work.

    Returns
    -------
    int
        Number of multiplications.
    """
    weights = [
        sum(each.numel() for each in network.parameters())
        if hasattr(network, "parameters")
        else UNKNOWN_WEIGHTS
        for network in networks
    ]
    return math.prod(shape) * max(weights, default=1)


@contextmanager
def torch_threads(*, work: int | None = None, count: int | None = None) -> Iterator[None]:
    """Set torch's CPU threads by the amount of work; restore the old number afterwards.

    The rule: work of less than 2^31 multiplications a call (about 50 ms on one core) runs on one
    thread, and larger work on as many as torch is set to.  A call with little work consists of
    many small operations, between which several threads mostly wait for each other; where another
    process wants the cores too, each wait lasts until the system has run the last thread.
    Measured on two cores shared with other processes, on one thread and on two: a score of four
    Gaussians in eight dimensions takes 65 and 450 us at 1,024 points, 14 and 500 us at 256; a UNet
    of 0.4 million weights takes 26 and 125 ms on 64 images of 8 x 8 pixels, 58 and 370 ms on 8
    images of 28 x 28.  Larger work gains from idle cores and keeps torch's own choice.

    Parameters
    ----------
    work : int, optional
        Multiplications of one call of a network: :func:`work_of`, or a product of sizes.
    count : int, optional
        Number of threads, at least 1, instead of ``work``: for computations that must give the
        same bits on every machine, and for timing.  With neither, torch's setting stays.

    Notes
    -----
    ``work`` never raises the number of threads.  Nothing happens where torch is not installed.
    The setting belongs to the whole process: two Python threads must not change it at a time.

    Raises
    ------
    TypeError
        If both are given.
    ValueError
        If ``count`` is below 1.
    """
    if work is not None and count is not None:
        raise TypeError(f"one of work and count may be given, got {work} and {count}")
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if work is not None:
        count = 1 if work < SMALL_WORK else None
    torch = _torch()
    if torch is None or count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _torch() -> Any:
    """The torch module; None where it is not installed."""
    if "torch" not in sys.modules and find_spec("torch") is None:
        return None
    try:
        import torch
    except ImportError:  # the installation is broken, or a test blocks the import
        return None
    return torch
