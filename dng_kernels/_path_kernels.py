"""The update of a path tracker as two Triton kernels: sums in one pass over memory, then states.

A sample's chunks depend on its size alone, and their sums are added in order, so a result does not
depend on the batch.  The second kernel has one program a sample, and waits for the first like any
launch; it costs a launch, and no atomic operation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dng_kernels._path_numbers import Level, Numbers
from dng_kernels.fused import _compiled, check_device, on_device
from dng_kernels.layout import SUMS, chunking, is_channels_last, readable
from dng_math import equations
from dng_math.trackers import PathWay

path_rate = _compiled(equations.path_rate)
path_end = _compiled(equations.path_end)
path_log_ratio = _compiled(equations.path_log_ratio)

_SUMS = tl.constexpr(SUMS)


@triton.jit(do_not_specialize=["chunks"])
def path_sums(
    x,
    eps,
    eps_neg,
    kept_x,
    kept_delta,
    partials,
    D,
    chunk,
    chunks,
    x_stride,
    eps_stride,
    eps_neg_stride,
    kept_stride,
    twice_on_x,
    on_prediction,
    here,
    there,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The three sums over a chunk of a sample; x and the difference are kept for the next point."""
    part = tl.program_id(0) % chunks
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    x += sample * x_stride
    eps += sample * eps_stride
    eps_neg += sample * eps_neg_stride
    kept_x += sample * kept_stride
    kept_delta += sample * kept_stride
    first = part.to(tl.int64) * chunk
    end = tl.minimum(first + chunk, D)
    lane = tl.arange(0, BLOCK)
    a = tl.zeros([BLOCK], tl.float32)
    b = tl.zeros([BLOCK], tl.float32)
    c = tl.zeros([BLOCK], tl.float32)
    for start in range(first, end, BLOCK):
        inside = lane < end - start
        now = tl.load(x + start + lane, mask=inside, other=0.0).to(tl.float32)
        e = tl.load(eps + start + lane, mask=inside, other=0.0).to(tl.float32)
        n = tl.load(eps_neg + start + lane, mask=inside, other=0.0).to(tl.float32)
        if not FIRST:
            then = tl.load(kept_x + start + lane, mask=inside, other=0.0)
            gone = tl.load(kept_delta + start + lane, mask=inside, other=0.0)
        delta = n - e
        a += delta * (twice_on_x * now + on_prediction * (e + n))
        if not FIRST:
            moved = here * now + there * then
            b += delta * moved
            c += gone * moved
        tl.store(kept_x + start + lane, now, mask=inside)
        tl.store(kept_delta + start + lane, delta, mask=inside)
    own = partials + (sample * chunks + part) * _SUMS
    tl.store(own, tl.sum(a))
    tl.store(own + 1, tl.sum(b))
    tl.store(own + 2, tl.sum(c))


@triton.jit(do_not_specialize=["chunks"])
def path_states(
    partials,
    kept_rate,
    state,
    divergence,
    following,
    chunks,
    variance,
    on_prediction,
    pull_factor,
    before_factor,
    weight,
    weight_before,
    temperature,
    offset,
    low,
    high,
    log_p_max,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """The state of one sample from the sums of its chunks."""
    sample = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    there = slot < chunks
    at = partials + (sample * chunks + slot) * _SUMS
    a = tl.sum(tl.load(at, mask=there, other=0.0))
    b = tl.sum(tl.load(at + 1, mask=there, other=0.0))
    c = tl.sum(tl.load(at + 2, mask=there, other=0.0))
    level = tl.load(state + sample)
    rate = path_rate(on_prediction * a, variance * tl.load(divergence + sample))
    if FIRST:
        before = -rate
        after = -rate
    else:
        after = path_end(pull_factor * b, rate, weight)
        before = path_end(before_factor * c, tl.load(kept_rate + sample), weight_before)
    odds = 0.0
    next_odds = 0.0
    if REST:
        odds = tl.exp(tl.minimum(level, high))
        # log p of the log-odds, without overflow: the logarithm is of a number in [1, 2].
        log_p = tl.minimum(level, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(level)))
        guess = log_p + temperature * 0.5 * (before + after)
        p = tl.exp(tl.minimum(guess, log_p_max))
        next_odds = p / (1.0 - p)
    ratio = path_log_ratio(before, after, odds, next_odds)
    updated = level + temperature * ratio + offset
    if not REST:
        updated = tl.minimum(updated, high)
    tl.store(following + sample, tl.maximum(updated, low))
    tl.store(kept_rate + sample, rate)


def run(
    kept: tuple[Tensor, Tensor, Tensor],
    first: bool,
    x: Tensor,
    eps: Tensor,
    eps_neg: Tensor,
    state: Tensor,
    divergence_gap: Tensor,
    at: Level,
    way: PathWay,
    numbers: Numbers,
) -> Tensor:
    """Launch both kernels for a checked call of :func:`dng_kernels.update_path`."""
    check_device(x.device)
    kept_x, kept_delta, kept_rate = kept
    channels_last = is_channels_last(kept_x)
    events = [readable(each, channels_last) for each in (x, eps, eps_neg, kept_x)]
    batch, elements = len(x), x[0].numel()
    block, chunk, chunks = chunking(elements, 4)
    partials = torch.empty(batch * chunks * SUMS, dtype=torch.float32, device=x.device)
    following = torch.empty_like(state)
    with on_device(x.device):
        path_sums[(batch * chunks,)](
            *(tensor for tensor, _ in events[:3]),
            kept_x,
            kept_delta,
            partials,
            elements,
            chunk,
            chunks,
            *(stride for _, stride in events),
            2.0 * at.on_x,
            at.on_prediction,
            way.here,
            way.there,
            FIRST=first,
            BLOCK=block,
        )
        path_states[(batch,)](
            partials,
            kept_rate,
            state,
            divergence_gap,
            following,
            chunks,
            at.sigma**2,
            at.on_prediction,
            way.pull,
            way.pull_before,
            way.weight,
            way.weight_before,
            numbers.temperature,
            numbers.offset,
            numbers.low,
            numbers.high,
            numbers.log_p_max,
            FIRST=first,
            REST=numbers.rest,
            SLOTS=1 << (chunks - 1).bit_length(),
        )
    return following
