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
SUMS = 3  # numbers that each chunk writes, at most

# Elements of a block, at most, by the bytes of an element of x.  Microseconds in a graph on H100,
# blocks of 1024 and of 2048, DNG with given noise (Triton 3.6):
#
#                              float32            bfloat16
#     SD latents, batch 1      4.20  4.20         3.60  3.63
#     SD latents, batch 64     13.2  14.3         8.65  8.42
#     SDXL latents, batch 64   34.9  34.4         22.5  19.5
#     2^26 elements             440   439          254   227     and from a seed 259, 224
#
# Kernels that need many registers have blocks of 1024: with more they would spill.
LARGEST_BLOCKS = {2: 2048, 4: 1024, 8: 1024}


def chunking(elements: int, width: int) -> tuple[int, int, int]:
    """Elements per block and per chunk, and chunks per sample.

    They depend on the sample's size and on the bytes of an element alone, and so does the order in
    which the sums of a sample are added: not on the batch or on the device.
    """
    block = min(LARGEST_BLOCKS[width], max(128, 1 << max(0, elements - 1).bit_length()))
    chunk = block * max(1, -(-elements // (block * MOST_CHUNKS)))
    return block, chunk, max(1, -(-elements // chunk))


def workspace(batch: int, elements: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Counters and room for the chunks' sums; zero, as every launch expects and leaves it.

    But for the sums of rules that need them first, which are written before they are read.
    """
    chunks = max(chunking(elements, width)[2] for width in LARGEST_BLOCKS)
    counters = torch.zeros(2 + 2 * batch, dtype=torch.int32, device=device)
    return counters, torch.zeros(batch * chunks * SUMS, dtype=torch.float32, device=device)
