"""How a batch lies in memory, and how a kernel cuts its samples into chunks."""

from __future__ import annotations

import torch
from torch import Tensor


def batch_stride(tensor: Tensor, channels_last: bool) -> int | None:
    """Distance between samples if each is one dense run of numbers in that order, else None.

    There may be gaps between samples, or a sample may repeat: half of a doubled batch and some
    channels of a network's output are dense in this sense.
    """
    if tensor.is_contiguous() and not channels_last:
        return tensor.numel() // max(1, tensor.shape[0])
    shape, strides = tensor.shape[1:], tensor.stride()[1:]
    axes = list(range(len(shape)))[::-1]
    if channels_last:
        axes = [0, *axes[:-1]]
    run = 1
    for axis in axes:
        if shape[axis] != 1:
            if strides[axis] != run:
                return None
            run *= shape[axis]
    return tensor.stride(0) if len(tensor) > 1 else run


def is_channels_last(tensor: Tensor) -> bool:
    """Whether every sample is dense with the channels varying fastest, and is not in C order."""
    return (
        not tensor.is_contiguous()
        and tensor.ndim > 2
        and batch_stride(tensor, False) is None
        and batch_stride(tensor, True) is not None
    )


def empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty output in the order of the input: channels last if it is so, else C order."""
    if tensor.is_contiguous():
        return torch.empty_like(tensor, dtype=dtype)
    if is_channels_last(tensor):
        shape = tensor.movedim(1, -1).shape
        return torch.empty(shape, dtype=dtype, device=tensor.device).movedim(-1, 1)
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device)


def readable(tensor: Tensor, channels_last: bool) -> tuple[Tensor, int]:
    """The tensor and its batch stride, copied if a kernel cannot read it as it lies."""
    stride = batch_stride(tensor, channels_last)
    if stride is None:
        if channels_last:
            tensor = tensor.movedim(1, -1).contiguous().movedim(-1, 1)
        else:
            tensor = tensor.contiguous()
        stride = tensor[:1].numel()
    return tensor, stride


# ---------------------------------------------------------------------- chunks of a sample

MOST_CHUNKS = 1024  # a sample: one program adds up their sums at once
SUMS = 3  # numbers that each chunk writes
LARGEST_BLOCK = 1024


def chunking(elements: int) -> tuple[int, int, int]:
    """Elements per block and per chunk, and chunks per sample, from the sample's size alone."""
    block = min(LARGEST_BLOCK, max(128, 1 << max(0, elements - 1).bit_length()))
    chunk = block * max(1, -(-elements // (block * MOST_CHUNKS)))
    return block, chunk, max(1, -(-elements // chunk))


def workspace(batch: int, elements: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Counters, zero before and after every launch, and room for the chunks' sums."""
    _, _, chunks = chunking(elements)
    counters = torch.zeros(2 + 2 * batch, dtype=torch.int32, device=device)
    return counters, torch.empty(batch * chunks * SUMS, dtype=torch.float32, device=device)
