"""How many threads torch uses on a CPU, decided by the size of the work.

This module is here, and not beside its users, because figures, benchmarks, tests and experiments
may all import ``dng_models``, and because it needs no torch until it has threads to set.
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
    """About how many multiplications one call of the largest network costs.

    Parameters
    ----------
    shape : sequence of int
        Of the batch that it is called with.
    networks : iterable
        Torch modules, of which every weight is taken to meet every element of the batch (in a
        convolution it does but for the lower resolutions); any other callable is taken to have
        2^18 weights, so that up to 8,192 elements are small to it.
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
    """As many of torch's threads on the CPU as the work is worth; then as many as before.

    The rule: work of less than 2^31 multiplications a call (about 50 ms on one core) runs on one
    thread, and larger work on as many as torch is set to.  Between the many small operations of
    such a call several threads mostly wait for each other, and where another process wants the
    cores too, each wait lasts until the system lets the last of them run.  On two cores with
    other processes beside, in microseconds a call, on one thread and on two: a score of four
    Gaussians at 1,024 points of eight dimensions 65 and 450, at 256 points 14 and 500; in
    milliseconds: a UNet of 0.4 million weights on 64 images of 8 x 8 pixels 26 and 125, on 8 of
    28 x 28 pixels 58 and 370.  Larger work gains on idle cores, and is left to torch's own choice.

    Parameters
    ----------
    work : int, optional
        Multiplications of one call of a network: :func:`work_of`, or a product of sizes.
    count : int, optional
        A number of threads instead, for what must have the same bits wherever it runs, or is
        there to be timed.  At least 1.  With neither, torch keeps what it is set to.

    Notes
    -----
    By its work nothing ever gets more threads than were set around it.  Where torch is not
    installed nothing is done.  The setting is the process's, and not to be changed by two Python
    threads at a time.

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
    """Torch, where it is installed."""
    if "torch" not in sys.modules and find_spec("torch") is None:
        return None
    try:
        import torch
    except ImportError:  # there, and said to be missing (tests do so), or broken
        return None
    return torch
