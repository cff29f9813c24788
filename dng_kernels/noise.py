"""The standard normals of samplers, and the keys that identify them."""

from __future__ import annotations

import torch
from torch import Tensor

from dng_kernels import _border, normal
from dng_kernels.plan import LARGEST_STEPS, device_of
from dng_math import checks


def noise_keys(
    seed: int,
    batch: int,
    *,
    first_sample: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Seed and sample index of every row, as a tensor on the device to be passed as ``seed``.

    Samples of different runs, or in any order, can share a batch by stacking rows of keys; sample i
    of a seed is the same in every batch.

    Parameters
    ----------
    seed : int
        In [0, 2^64).
    batch : int
        Number of rows.
    first_sample : int
        Sample index of the first row, in [0, 2^62).
    device : torch.device or str, optional
        Device of the keys; default "cpu".

    Returns
    -------
    Tensor, shape (batch, 2), int64

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid; the message names it, its value and what is allowed.
    """
    bits = _border.seed_bits(seed)
    _border.check_first_sample(first_sample)
    batch = checks.integer("batch", batch, 0)
    return normal.keys_of(bits, batch, first_sample, device_of(device))


def standard_normal(
    seed: int | Tensor,
    shape: tuple[int, ...] | torch.Size,
    *,
    step: int | None = None,
    first_sample: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The standard normals of a step, or, by default, those of x_T.

    Parameters
    ----------
    seed : int or Tensor of shape (B, 2), int64
        As for :func:`dng_step`.
    shape : tuple of int
        Shape (B, ...) of the result.
    step : int, optional
        Below 2^16, for the noise that :func:`dng_step` makes at that step; None for that of x_T.
    first_sample : int
        Sample index of the first row, with an integer seed.
    device : torch.device or str, optional
        Default: that of the seed if it is a tensor, else "cpu".
    dtype : torch.dtype
        float32, float64, float16 or bfloat16; the numbers are made in float32 and converted.

    Returns
    -------
    Tensor, of that shape, in C order

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid; the message names it, its value and what is allowed.
    """
    if _border.transforms_active():
        _border.refuse_transforms(seed=seed)
    shape = _border.shape_of(shape)
    _border.check_dtype("dtype", dtype)
    if isinstance(seed, Tensor):
        place = seed.device if device is None else device_of(device)
        _border.check_keys(seed, shape[0], place)
        keys = seed
    else:
        keys = noise_keys(seed, shape[0], first_sample=first_sample, device=device)
    if step is None:
        step, stream = 0, normal.INITIAL_STREAM
    else:
        step, stream = checks.integer("step", step, 0, LARGEST_STEPS - 1), normal.STEP_STREAM
    elements = torch.Size(shape[1:]).numel()
    if elements > normal.LARGEST_SAMPLE:
        raise ValueError(f"shape must have at most 2**34 elements a sample, got {shape}")
    return normal.normals(keys, elements, step, stream).contiguous().view(shape).to(dtype)
