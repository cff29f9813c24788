"""The step as one Triton kernel: every tensor is read once and written once.

It computes what :mod:`dng_kernels.naive` does, with :mod:`dng_math.equations` compiled.

One program takes one chunk of a sample.  The length of a chunk depends on the sample's size and the
dtype alone, so a sample's result does not depend on the batch.  A program writes down the two sums
over its chunk and increments the sample's counter; the program that increments it last adds up the
chunks in their order and updates the state.  Only integers are added atomically, so two runs are
bit-equal.

The two sums are one number of 64 bits that is never zero, in a place that was zero: whoever reads
it sees both or none.  So nothing orders the sums and the counter, which would be a wait for memory
each; the last program waits for what it does not see yet, and that is on its way.

Some rules need sums over a sample before they can guide (NEED_SUMS in plan.py).  Their programs
draw tickets: the programs with a sample's first tickets compute the sums, and the others wait for
them and then take the step.  Only a running program draws a ticket, and the first ones never wait,
so there is no deadlock in whatever order programs are started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dng_kernels import normal
from dng_kernels.layout import SUMS, chunking, is_channels_last, readable
from dng_kernels.naive import Inputs, StepResult
from dng_kernels.plan import COLUMN, GUIDE, LARGEST, NEED_SUMS, STEP, UPDATE, WIDTH, Variant
from dng_math import _codes, equations

# ------------------------------------------------ equations, compiled


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of pure arithmetic, compiled into the kernels that call it.

    The interpreter runs the function as it is: wrapped, it would look for ``triton.language`` in
    a module that must not import it.
    """
    jitted = triton.jit(function)
    return jitted if isinstance(jitted, triton.JITFunction) else function


toward = _compiled(equations.toward)
away = _compiled(equations.away)
dynamic_scale = _compiled(equations.dynamic_scale)
feedback_scale = _compiled(equations.feedback_scale)
contrastive_scale = _compiled(equations.contrastive_scale)
contrastive_attraction = _compiled(equations.contrastive_attraction)
geometric_scale = _compiled(equations.geometric_scale)
regulating_evidence = _compiled(equations.regulating_evidence)
regulating_scale = _compiled(equations.regulating_scale)
log_weight = _compiled(equations.log_weight)
perpendicular = _compiled(equations.perpendicular)
safe_correction = _compiled(equations.safe_correction)
safe_momentum = _compiled(equations.safe_momentum)
step_mean = _compiled(equations.step_mean)
step = _compiled(equations.step)
step_residual = _compiled(equations.step_residual)
log_likelihood_ratio = _compiled(equations.log_likelihood_ratio)
log_odds_ratio = _compiled(equations.log_odds_ratio)
tracker_update = _compiled(equations.tracker_update)
divergence_correction = _compiled(equations.divergence_correction)
rest_divergence_gap = _compiled(equations.rest_divergence_gap)
minus_two_log = _compiled(normal.minus_two_log)
sine = _compiled(normal.sine)
cosine = _compiled(normal.cosine)

_STEP, _GUIDE, _UPDATE = tl.constexpr(STEP), tl.constexpr(GUIDE), tl.constexpr(UPDATE)
_TRACKED, _FEEDBACK = tl.constexpr(_codes.TRACKED), tl.constexpr(_codes.FEEDBACK)
_TOWARD, _SAFE = tl.constexpr(_codes.TOWARD), tl.constexpr(_codes.SAFE)
_CONTRASTIVE = tl.constexpr(_codes.CONTRASTIVE)
_PERPENDICULAR = tl.constexpr(_codes.PERPENDICULAR)
_GEOMETRIC, _REGULATED = tl.constexpr(_codes.GEOMETRIC), tl.constexpr(_codes.REGULATED)
_PAPER, _LOG_ODDS = tl.constexpr(_codes.PAPER), tl.constexpr(_codes.LOG_ODDS)
_LARGEST = tl.constexpr(LARGEST)
_WIDTH = tl.constexpr(WIDTH)
_X_FACTOR = tl.constexpr(COLUMN["x_factor"])
_FACTOR = tl.constexpr(COLUMN["factor"])
_DEVIATION = tl.constexpr(COLUMN["deviation"])
_KERNEL_X_FACTOR = tl.constexpr(COLUMN["transition_x_factor"])
_KERNEL_FACTOR = tl.constexpr(COLUMN["transition_factor"])
_X_DRIFT = tl.constexpr(COLUMN["x_drift"])
_DRIFT = tl.constexpr(COLUMN["drift"])
_VARIANCE = tl.constexpr(COLUMN["variance"])
_ACTIVE = tl.constexpr(COLUMN["active"])
_APPLIED = tl.constexpr(COLUMN["applied"])
_TO_NOISE = tl.constexpr(COLUMN["to_noise"])
_FROM_NOISE = tl.constexpr(COLUMN["from_noise"])
_X0_X_FACTOR = tl.constexpr(COLUMN["x0_x_factor"])
_X0_FACTOR = tl.constexpr(COLUMN["x0_factor"])
_CLIP = tl.constexpr(COLUMN["clip"])
_CFG_SCALE = tl.constexpr(COLUMN["cfg_scale"])
_GUIDANCE_SCALE = tl.constexpr(COLUMN["guidance_scale"])
_TEMPERATURE = tl.constexpr(COLUMN["temperature"])
_OFFSET = tl.constexpr(COLUMN["offset"])
_OFFSET_NATS = tl.constexpr(COLUMN["offset_nats"])
_LOW = tl.constexpr(COLUMN["low"])
_HIGH = tl.constexpr(COLUMN["high"])
_LOG_ODDS_CAP = tl.constexpr(COLUMN["log_odds_cap"])
_ETA = tl.constexpr(COLUMN["eta"])
_BETA = tl.constexpr(COLUMN["beta"])
_SCORE_FACTOR = tl.constexpr(COLUMN["score_factor"])
_THRESHOLD = tl.constexpr(COLUMN["threshold"])
_SLOPE = tl.constexpr(COLUMN["slope"])
_MOMENTUM_SCALE = tl.constexpr(COLUMN["momentum_scale"])
_MOMENTUM_DECAY = tl.constexpr(COLUMN["momentum_decay"])
_ABSOLUTE = tl.constexpr(COLUMN["absolute"])
_POSITIVE_SCALE = tl.constexpr(COLUMN["positive_scale"])
_ROUNDING_SQ = tl.constexpr(COLUMN["rounding_sq"])
_CONTRASTIVE_TEMPERATURE = tl.constexpr(COLUMN["contrastive_temperature"])
_ATTRACTION = tl.constexpr(COLUMN["attraction"])
_PI, _ADDED = tl.constexpr(COLUMN["pi"]), tl.constexpr(COLUMN["added"])
_LENGTH = tl.constexpr(COLUMN["length"])
_GAIN, _RATE, _LEAD = (tl.constexpr(COLUMN[name]) for name in ("gain", "rate", "lead"))

_STEP_STREAM = tl.constexpr(normal.STEP_STREAM)
_TO_UNIT, _HALF_UNIT = tl.constexpr(normal.TO_UNIT), tl.constexpr(normal.HALF_UNIT)
_TO_ANGLE = tl.constexpr(normal.TO_ANGLE)
_HALF_ROOT = tl.constexpr(normal.HALF_ROOT)

# Where the kernel takes its noise from.
NO_NOISE, GIVEN, SEED, KEYS = range(4)
_GIVEN, _SEED, _KEYS = tl.constexpr(GIVEN), tl.constexpr(SEED), tl.constexpr(KEYS)

_SUMS = tl.constexpr(SUMS)
# With so many chunks at most, a program reads their sums before it knows whether it is the last.
_FEW_CHUNKS = tl.constexpr(32)


# ------------------------------------------------ standard normals


@triton.jit
def philox(seed, sample, group, tag):
    """Four random words for each counter, uint32, as :func:`dng_kernels.normal.philox`.

    The compiler sees that words have 32 bits: a product of two is one instruction, where a product
    of 64-bit integers would be two.
    """
    c0, c1 = sample.to(tl.uint32), (sample >> 32).to(tl.uint32)
    c2, c3 = group.to(tl.uint32), tag.to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def normal_pair(radius_word, angle_word):
    """Two independent standard normals from uint32 words, as in :mod:`dng_kernels.normal`."""
    u = radius_word.to(tl.float32) * _TO_UNIT + _HALF_UNIT
    bits = u.to(tl.int32, bitcast=True)
    power = (bits - _HALF_ROOT) & -0x800000
    f = (bits - power).to(tl.float32, bitcast=True) - 1.0
    radius = tl.sqrt(minus_two_log(power.to(tl.float32), f))
    rest = (angle_word << 2).to(tl.int32, bitcast=True).to(tl.float32) * _TO_ANGLE
    s, c = sine(rest), cosine(rest)
    # Two bits say the quarter turn: sine and cosine are exchanged in an odd one, the sine is
    # negative in the last two, the cosine in the middle ones.
    turned = angle_word + 0x20000000
    odd = (turned & 0x40000000) != 0
    sin = signed(tl.where(odd, c, s), turned)
    cos = signed(tl.where(odd, s, c), turned + 0x40000000)
    return radius * cos, radius * sin


@triton.jit
def signed(value, word):
    """The value, its sign changed where the highest bit of a word is 1."""
    bits = value.to(tl.uint32, bitcast=True) ^ (word & 0x80000000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def four_normals(seed, sample, group, tag):
    """The normals of the elements 4 group ... 4 group + 3."""
    c0, c1, c2, c3 = philox(seed, sample, group, tag)
    z0, z1 = normal_pair(c0, c1)
    z2, z3 = normal_pair(c2, c3)
    return z0, z1, z2, z3


@triton.jit
def normals(
    seed,
    sample,
    tag,
    first,
    D,
    channels,
    CHANNELS_LAST: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normals for the places first ... first + BLOCK - 1 in memory; first is a multiple of 8.

    A thread makes TOGETHER of them, 4 or 8, that lie together: what it reads and writes at once, so
    that threads need not exchange them.
    """
    if CHANNELS_LAST:
        # Normals are numbered by the elements in C order: every place computes its element.
        place = first + tl.arange(0, BLOCK).to(tl.int64)
        if D.dtype == tl.int32:
            # Divisions of 64 bits would take longer than the normals.
            place, D, channels = place.to(tl.uint32), D.to(tl.uint32), channels.to(tl.uint32)
        element = (place % channels) * (D // channels) + place // channels
        c0, c1, c2, c3 = philox(seed, sample, element >> 2, tag)
        late = (element & 2) != 0
        cos, sin = normal_pair(tl.where(late, c2, c0), tl.where(late, c3, c1))
        return tl.where((element & 1) != 0, sin, cos)
    if TOGETHER == 8:
        group = (first >> 2) + 2 * tl.arange(0, BLOCK // 8).to(tl.int64)
        a0, a1, a2, a3 = four_normals(seed, sample, group, tag)
        b0, b1, b2, b3 = four_normals(seed, sample, group + 1, tag)
        z0, z1 = tl.interleave(a0, b0), tl.interleave(a1, b1)
        z2, z3 = tl.interleave(a2, b2), tl.interleave(a3, b3)
    else:
        group = (first >> 2) + tl.arange(0, BLOCK // 4).to(tl.int64)
        z0, z1, z2, z3 = four_normals(seed, sample, group, tag)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


# ------------------------------------------------ one sample


@triton.jit
def clamp(value, low, high):
    """Clamp to [low, high]; NaN stays NaN, on a GPU too."""
    value = tl.maximum(value, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def one_minus_exp(a):
    """1 - e^a for a <= 0, without cancellation."""
    series = a * (1.0 + a * (0.5 + a * (1.0 / 6 + a * (1.0 / 24 + a * (1.0 / 120)))))
    return tl.where(a > -0.1, -series, 1.0 - tl.exp(a))


@triton.jit
def tracked_odds(row, state, TRACKER: tl.constexpr):
    """p / (1 - p) of a posterior, e^L of a ratio."""
    if TRACKER == _LOG_ODDS:
        state = clamp(state, -_LARGEST, tl.load(row + _LOG_ODDS_CAP))
        return tl.exp(state)
    state = clamp(state, tl.load(row + _LOW), tl.load(row + _HIGH))
    if TRACKER == _PAPER:
        return tl.exp(state) / one_minus_exp(state)
    return tl.exp(state)


@triton.jit
def decay_of(row, norm_sq):
    """Contrastive CFG's exp(-tau |difference|^2), of a difference of predictions."""
    to_noise = tl.load(row + _TO_NOISE)
    return tl.exp(-tl.load(row + _CONTRASTIVE_TEMPERATURE) * to_noise * to_noise * norm_sq)


@triton.jit
def evidence(row, a, b):
    """CRG's b of a step, from |delta|^2 and (eps_third - eps) . delta; as in naive.py."""
    to_noise = tl.load(row + _TO_NOISE)
    return to_noise * to_noise * regulating_evidence(2.0 * tl.load(row + _LEAD) * b, a)


@triton.jit
def weight_of(row, scale, norm_sq, residual_dot):
    """The log weight of a step, as in naive.py; 0 without noise."""
    k = tl.load(row + _FACTOR) * scale
    deviation = tl.load(row + _DEVIATION)
    noisy = deviation > 0
    deviation = tl.where(noisy, deviation, 1.0)
    noise_shift = -k * (residual_dot + k * norm_sq) / deviation
    return tl.where(noisy, log_weight(noise_shift, k * k * norm_sq, deviation), 0.0)


@triton.jit
def scale_of(row, odds, state, D, a, b, c, RULE: tl.constexpr):
    """The scale of a sample; a, b and c are the rule's own sums, see :func:`chunk_sums`."""
    guidance_scale = tl.load(row + _GUIDANCE_SCALE)
    if RULE == _TRACKED:
        scale = dynamic_scale(guidance_scale, odds, 1.0)
    elif RULE == _FEEDBACK:
        scale = feedback_scale(odds, tl.load(row + _PI)) + tl.load(row + _ADDED)
    elif RULE == _CONTRASTIVE:
        scale = contrastive_scale(guidance_scale, decay_of(row, a))
    elif RULE == _GEOMETRIC:
        known = a > tl.load(row + _ROUNDING_SQ) * c
        # length sqrt(D)/|delta|; D may be a constant here, of which there is no root.
        distance = tl.sqrt(tl.where(known, a, 1.0) / tl.maximum(D, 1))
        scale = tl.where(known, geometric_scale(tl.load(row + _LENGTH), distance), 0.0)
    elif RULE == _REGULATED:
        gain, to_noise = tl.load(row + _GAIN), tl.load(row + _TO_NOISE)
        surplus = 0.5 * gain * evidence(row, a, b) + state - tl.load(row + _THRESHOLD)
        known = a > tl.load(row + _ROUNDING_SQ) * c
        known = (known & (surplus > 0)) & (to_noise != 0)
        norm_sq = tl.where(known, a * (to_noise * to_noise), 1.0)
        scale = regulating_scale(guidance_scale, surplus, gain, norm_sq)
        scale = tl.where(known, scale, 0.0)
    else:
        scale = guidance_scale
    return tl.load(row + _ACTIVE) * scale


@triton.jit
def updated_state(
    row,
    state,
    odds,
    gap_sq,
    residual_gap,
    divergence,
    TRACKER: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """State at the cleaner end of the step; unchanged where the variance is 0."""
    transition_factor = tl.load(row + _KERNEL_FACTOR)
    variance = tl.load(row + _VARIANCE)
    low, high = tl.load(row + _LOW), tl.load(row + _HIGH)
    moves = variance > 0
    variance = tl.where(moves, variance, 1.0)
    if DIVERGENCE and TRACKER == _LOG_ODDS:
        score_gap_sq = tl.load(row + _SCORE_FACTOR) * gap_sq
        divergence = rest_divergence_gap(odds, divergence, score_gap_sq)
    gap_sq = transition_factor * transition_factor * gap_sq
    residual_gap = transition_factor * residual_gap
    if TRACKER == _LOG_ODDS:
        log_ratio = log_odds_ratio(odds, gap_sq, residual_gap, variance)
        start = state
    else:
        log_ratio = log_likelihood_ratio(gap_sq, residual_gap, variance)
        start = clamp(state, low, high)
    if DIVERGENCE:
        eta, beta = tl.load(row + _ETA), tl.load(row + _BETA)
        log_ratio += divergence_correction(eta, beta, divergence)
    updated = tracker_update(
        start,
        clamp(log_ratio, -_LARGEST, _LARGEST),
        variance,
        tl.load(row + _TEMPERATURE),
        tl.load(row + _OFFSET),
        tl.load(row + _OFFSET_NATS),
    )
    return tl.where(moves, clamp(updated, low, high), state)


@triton.jit
def packed(a, b):
    """Two numbers in float32 as 64 bits, of which the highest is 1; ``a`` is not negative."""
    high = (a.to(tl.int32, bitcast=True) | -0x80000000).to(tl.int64)
    return (high << 32) | b.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def added_up(pairs, there):
    """The sums of both numbers of pairs that were packed, and how many of them are missing."""
    a = ((pairs >> 32).to(tl.int32) & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    b = pairs.to(tl.int32).to(tl.float32, bitcast=True)
    return tl.sum(a), tl.sum(b), tl.sum((there & (pairs >= 0)).to(tl.int32))


@triton.jit
def finish(
    row,
    sample,
    scale,
    state,
    odds,
    a,
    b,
    seen,
    divergence,
    state_next,
    scale_out,
    weight_out,
    D,
    RULE: tl.constexpr,
    TRACKER: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """Write state, scale and weight of a sample, from the sums a and b over all of it.

    Or, for CRG, from the evidence that was seen.
    """
    if state_next is not None:
        if RULE == _REGULATED:
            tl.store(state_next + sample, state + tl.load(row + _RATE) * seen)
        else:
            if DIVERGENCE:
                div = tl.load(divergence + sample).to(tl.float32)
            else:
                div = 0.0
            updated = updated_state(row, state, odds, a, b, div, TRACKER, DIVERGENCE)
            tl.store(state_next + sample, updated)
    if weight_out is not None:
        tl.store(weight_out + sample, weight_of(row, scale, a, b))
    if scale_out is not None:
        if RULE == _SAFE:
            # An empty sample has no mean: 0 / 0 must not happen.
            mean = a / tl.maximum(D, 1)
            scale = tl.load(row + _GUIDANCE_SCALE) * tl.load(row + _APPLIED) * mean
        tl.store(scale_out + sample, scale)


# ------------------------------------------------ one block of one sample


@triton.jit
def x0_of(x, prediction, x_factor, factor, clip):
    """x0 of a prediction, in [-clip, clip]."""
    return clamp(step_mean(x, prediction, x_factor, factor), -clip, clip)


@triton.jit
def chunk_sums(
    eps,
    eps_neg,
    eps_third,
    first,
    end,
    RULE: tl.constexpr,
    READS_THIRD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums that a rule needs before it can guide, over the places first ... end - 1.

    With direction = eps_third - eps they are |delta|^2 and, for its positive factor, |direction|^2
    for contrastive CFG; |direction|^2, delta . direction and |eps|^2 for Perp-Neg; |delta|^2,
    delta . direction and |eps|^2 for CRG; for GeoGuide the first and the last of these.
    """
    a = tl.zeros([BLOCK], tl.float32)
    b = tl.zeros([BLOCK], tl.float32)
    c = tl.zeros([BLOCK], tl.float32)
    lane = tl.arange(0, BLOCK)
    for start in range(first, end, BLOCK):
        inside = lane < end - start
        e = tl.load(eps + start + lane, mask=inside, other=0.0).to(tl.float32)
        n = tl.load(eps_neg + start + lane, mask=inside, other=0.0).to(tl.float32)
        delta = n - e
        if (RULE == _PERPENDICULAR or RULE == _REGULATED) or READS_THIRD:
            direction = tl.load(eps_third + start + lane, mask=inside, other=0.0).to(tl.float32) - e
        if RULE == _PERPENDICULAR:
            a += direction * direction
            b += delta * direction
            c += e * e
        else:
            a += delta * delta
        if RULE == _CONTRASTIVE and READS_THIRD:
            b += direction * direction
        if RULE == _REGULATED:
            b += delta * direction
        if RULE == _GEOMETRIC or RULE == _REGULATED:
            c += e * e
    return tl.sum(a), tl.sum(b), tl.sum(c)


@triton.jit
def chunk_step(
    row,
    tag,
    seed,
    sample_index,
    scale,
    second,
    x,
    x_next_in,
    eps,
    eps_neg,
    eps_third,
    noise,
    momentum,
    x_next,
    guided_out,
    momentum_out,
    early_e,
    early_n,
    early_now,
    early_z,
    first,
    end,
    D,
    channels,
    MODE: tl.constexpr,
    RULE: tl.constexpr,
    TRACKER: tl.constexpr,
    CFG: tl.constexpr,
    CLIP: tl.constexpr,
    DRIFT: tl.constexpr,
    READS_THIRD: tl.constexpr,
    NOISE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ONCE: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Guide, take the step and add up, for the places first ... end - 1 of a sample.

    ``second`` is Perp-Neg's projection, or what contrastive CFG's positive factor adds to 1.  With
    ONCE there is one block; with EARLY, too, and what it loads was loaded before.  Returns
    |delta|^2 and residual . delta if a posterior is tracked; the sum of the elementwise scale for
    SLD.
    """
    if CFG:
        cfg_scale = tl.load(row + _CFG_SCALE)
        if RULE == _CONTRASTIVE and READS_THIRD:
            cfg_scale += tl.load(row + _ACTIVE) * tl.load(row + _ATTRACTION) * second
    if CLIP:
        clip = tl.load(row + _CLIP)
        x0_x_factor, x0_factor = tl.load(row + _X0_X_FACTOR), tl.load(row + _X0_FACTOR)
    if MODE == _UPDATE:
        x_factor, factor = tl.load(row + _KERNEL_X_FACTOR), tl.load(row + _KERNEL_FACTOR)
    if MODE == _STEP:
        x_factor, factor = tl.load(row + _X_FACTOR), tl.load(row + _FACTOR)
        deviation = 0.0
        if NOISE:
            deviation = tl.load(row + _DEVIATION)
        if DRIFT:
            x_drift, drift = tl.load(row + _X_DRIFT), tl.load(row + _DRIFT)
    if MODE != _UPDATE and RULE == _SAFE:
        strength = tl.load(row + _GUIDANCE_SCALE) * tl.load(row + _APPLIED)
        to_noise, from_noise = tl.load(row + _TO_NOISE), tl.load(row + _FROM_NOISE)
        threshold, slope = tl.load(row + _THRESHOLD), tl.load(row + _SLOPE)
        momentum_scale, decay = tl.load(row + _MOMENTUM_SCALE), tl.load(row + _MOMENTUM_DECAY)
        absolute, active = tl.load(row + _ABSOLUTE) > 0, tl.load(row + _ACTIVE) > 0
    if MODE != _UPDATE and RULE == _PERPENDICULAR:
        positive_scale = tl.load(row + _ACTIVE) * tl.load(row + _POSITIVE_SCALE)

    a = tl.zeros([BLOCK], tl.float32)
    b = tl.zeros([BLOCK], tl.float32)
    lane = tl.arange(0, BLOCK)
    # One block is no loop, which the assembler would unroll.
    length = BLOCK if ONCE else end - first
    for offset in range(0, length, BLOCK):
        start = first + offset
        inside = lane < end - start
        # All loads come first, so that they are in flight together.
        if EARLY:
            e, n = early_e.to(tl.float32), early_n.to(tl.float32)
        else:
            e = tl.load(eps + start + lane, mask=inside, other=0.0).to(tl.float32)
            n = tl.load(eps_neg + start + lane, mask=inside, other=0.0).to(tl.float32)
        if CFG or RULE == _PERPENDICULAR:
            third = tl.load(eps_third + start + lane, mask=inside, other=0.0).to(tl.float32)
        if EARLY:
            now = early_now.to(tl.float32)
        elif MODE != _GUIDE:
            now = tl.load(x + start + lane, mask=inside, other=0.0).to(tl.float32)
        if MODE == _UPDATE:
            then = tl.load(x_next_in + start + lane, mask=inside, other=0.0).to(tl.float32)
        if EARLY:
            z = early_z.to(tl.float32)
        elif NOISE == _GIVEN:
            z = tl.load(noise + start + lane, mask=inside, other=0.0).to(tl.float32)
        if RULE == _SAFE and MODE != _UPDATE:
            kept = tl.load(momentum + start + lane, mask=inside, other=0.0)
        if NOISE == _SEED or NOISE == _KEYS:
            TOGETHER: tl.constexpr = 4 if x.dtype.element_ty == tl.float32 else 8
            z = normals(seed, sample_index, tag, start, D, channels, CHANNELS_LAST, TOGETHER, BLOCK)

        delta = n - e
        if MODE == _UPDATE:
            if CLIP:
                e = x0_of(now, e, x0_x_factor, x0_factor, clip)
                delta = tl.where(inside, x0_of(now, n, x0_x_factor, x0_factor, clip) - e, 0.0)
            a += delta * delta
            b += (then - step_mean(now, e, x_factor, factor)) * delta
        else:
            base = e
            push = 0.0
            if CFG:
                base = toward(third, e - third, cfg_scale)
                push = base - e
            if RULE == _SAFE:
                difference = delta * to_noise
                compared = difference
                if READS_THIRD:
                    compared = (n - third) * to_noise
                magnitude = tl.abs(compared)
                gated = tl.where(absolute, magnitude, -compared)
                s = tl.where(gated < threshold, tl.minimum(slope * magnitude, 1.0), 0.0)
                correction = safe_correction(s, difference, momentum_scale, kept)
                if momentum_out is not None:
                    following = safe_momentum(kept, correction, decay)
                    following = tl.where(active, following, kept)
                    tl.store(momentum_out + start + lane, following, mask=inside)
                guided = away(base, correction * from_noise, strength)
                a += tl.where(inside, s, 0.0)
            elif RULE == _PERPENDICULAR:
                direction = third - e
                guided = away(
                    toward(base, direction, positive_scale),
                    perpendicular(delta, direction, second),
                    scale,
                )
            elif RULE == _TOWARD or RULE == _FEEDBACK:
                guided = toward(base, delta, scale)
                shift = toward(push, delta, scale)
            else:
                guided = away(base, delta, scale)
                shift = away(push, delta, scale)
            if guided_out is not None:
                tl.store(guided_out + start + lane, guided, mask=inside)
            if MODE == _STEP:
                if CLIP:
                    e = x0_of(now, e, x0_x_factor, x0_factor, clip)
                    guided = x0_of(now, guided, x0_x_factor, x0_factor, clip)
                    delta = tl.where(inside, x0_of(now, n, x0_x_factor, x0_factor, clip) - e, 0.0)
                    shift = guided - e
                if not NOISE:
                    z = tl.zeros([BLOCK], tl.float32)
                then = step(step_mean(now, guided, x_factor, factor), deviation, z)
                tl.store(x_next + start + lane, then, mask=inside)
                if TRACKER:
                    residual = step(factor * shift, deviation, z)
                    if DRIFT:
                        residual = step_residual(
                            now, e, shift, z, x_drift, drift, factor, deviation
                        )
                    a += delta * delta
                    b += residual * delta
    # Together: threads exchange both in one go.
    return tl.split(tl.sum(tl.join(a, b), axis=0))


# ------------------------------------------------ the kernel


# These numbers tell nothing about alignment: don't compile for their values.
@triton.jit(do_not_specialize=["chunks", "batch", "channels", "seed", "first_sample"])
def fused_step(
    table,
    index,
    x,
    x_next_in,
    eps,
    eps_neg,
    eps_third,
    noise,
    momentum,
    keys,
    state,
    divergence,
    x_next,
    guided_out,
    momentum_out,
    state_next,
    scale_out,
    weight_out,
    counters,
    partials,
    D,
    chunk,
    chunks,
    batch,
    x_stride,
    x_next_in_stride,
    eps_stride,
    eps_neg_stride,
    eps_third_stride,
    noise_stride,
    momentum_stride,
    x_next_stride,
    guided_out_stride,
    momentum_out_stride,
    channels,
    seed: tl.int64,
    first_sample: tl.int64,
    MODE: tl.constexpr,
    RULE: tl.constexpr,
    TRACKER: tl.constexpr,
    CFG: tl.constexpr,
    CLIP: tl.constexpr,
    DRIFT: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    READS_THIRD: tl.constexpr,
    NOISE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SLOTS: tl.constexpr,
    FLAT: tl.constexpr,
    ONCE: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per chunk, or two for rules that need the sums first; see the module."""
    TWO_PASSES: tl.constexpr = (MODE != _UPDATE) and (
        (RULE == _CONTRASTIVE or RULE == _PERPENDICULAR)
        or (RULE == _GEOMETRIC or RULE == _REGULATED)
    )
    SINGLE: tl.constexpr = SLOTS == 1
    SUMMED: tl.constexpr = (state_next is not None) or (RULE == _SAFE and scale_out is not None)
    if FLAT:
        program = tl.program_id(0)
        sample = (program // chunks).to(tl.int64)
        part = program % chunks
    else:
        part = tl.program_id(0)
        sample = tl.program_id(1).to(tl.int64)
    first = part.to(tl.int64) * chunk
    step_index = tl.load(index)
    early_e, early_n, early_now, early_z = 0.0, 0.0, 0.0, 0.0
    if EARLY:
        # Before the row and the state, each of which waits for the one before.
        place = first + tl.arange(0, BLOCK)
        within = place < D
        early_e = tl.load(eps + sample * eps_stride + place, mask=within, other=0.0)
        early_n = tl.load(eps_neg + sample * eps_neg_stride + place, mask=within, other=0.0)
        early_now = tl.load(x + sample * x_stride + place, mask=within, other=0.0)
        early_z = tl.load(noise + sample * noise_stride + place, mask=within, other=0.0)
        # Or the assembler, which spares registers, would move these loads behind those.
        tl.debug_barrier()
    row = table + step_index * _WIDTH
    adds_up = False
    if TWO_PASSES and not SINGLE:
        program = tl.atomic_add(counters, 1, sem="relaxed")
        sample = (program // (2 * chunks)).to(tl.int64)
        part = program % (2 * chunks)
        adds_up = part < chunks
        part = part % chunks
        first = part.to(tl.int64) * chunk
    end = tl.minimum(first + chunk, D)
    arrived = counters + 2 + sample
    left = counters + 2 + batch + sample
    sums = partials + (sample * chunks) * _SUMS
    pairs = partials.to(tl.pointer_type(tl.int64), bitcast=True) + sample * chunks
    slot = tl.arange(0, SLOTS)

    if x is not None:
        x += sample * x_stride
    if x_next_in is not None:
        x_next_in += sample * x_next_in_stride
    eps += sample * eps_stride
    eps_neg += sample * eps_neg_stride
    if eps_third is not None:
        eps_third += sample * eps_third_stride
    if noise is not None:
        noise += sample * noise_stride
    if momentum is not None:
        momentum += sample * momentum_stride
    if x_next is not None:
        x_next += sample * x_next_stride
    if guided_out is not None:
        guided_out += sample * guided_out_stride
    if momentum_out is not None:
        momentum_out += sample * momentum_out_stride

    if adds_up:
        a, b, c = chunk_sums(eps, eps_neg, eps_third, first, end, RULE, READS_THIRD, BLOCK)
        own = sums + part * _SUMS
        tl.store(own, a)
        tl.store(own + 1, b)
        tl.store(own + 2, c)
        tl.debug_barrier()
        tl.atomic_add(arrived, 1, sem="release")
    else:
        odds = 0.0
        before = 0.0
        second = 0.0
        seen = 0.0
        a, b, c = 0.0, 0.0, 0.0
        if TRACKER or RULE == _REGULATED:
            before = tl.load(state + sample)
        if TRACKER:
            odds = tracked_odds(row, before, TRACKER)
        if TWO_PASSES:
            if SINGLE:
                a, b, c = chunk_sums(eps, eps_neg, eps_third, first, end, RULE, READS_THIRD, BLOCK)
            else:
                while tl.atomic_add(arrived, 0, sem="acquire") < chunks:
                    pass
                tl.debug_barrier()
                there = slot < chunks
                # ".cg" bypasses the first-level cache, which may hold older numbers.
                at = sums + slot * _SUMS
                a = tl.sum(tl.load(at, mask=there, other=0.0, cache_modifier=".cg"))
                b = tl.sum(tl.load(at + 1, mask=there, other=0.0, cache_modifier=".cg"))
                c = tl.sum(tl.load(at + 2, mask=there, other=0.0, cache_modifier=".cg"))
            if RULE == _PERPENDICULAR:
                known = a > tl.load(row + _ROUNDING_SQ) * c
                second = tl.where(known, b / tl.where(known, a, 1.0), 0.0)
            if RULE == _CONTRASTIVE and READS_THIRD:
                second = contrastive_attraction(decay_of(row, b)) - 1.0
            if RULE == _REGULATED:
                seen = evidence(row, a, b)
        scale = scale_of(row, odds, before, D, a, b, c, RULE)
        sample_index = first_sample + sample
        if NOISE == _KEYS:
            seed = tl.load(keys + 2 * sample)
            sample_index = tl.load(keys + 2 * sample + 1)
        tag = step_index.to(tl.int64) | (_STEP_STREAM << 16)
        a, b = chunk_step(
            row,
            tag,
            seed.to(tl.int64),
            sample_index,
            scale,
            second,
            x,
            x_next_in,
            eps,
            eps_neg,
            eps_third,
            noise,
            momentum,
            x_next,
            guided_out,
            momentum_out,
            early_e,
            early_n,
            early_now,
            early_z,
            first,
            end,
            D,
            channels,
            MODE,
            RULE,
            TRACKER,
            CFG,
            CLIP,
            DRIFT,
            READS_THIRD,
            NOISE,
            CHANNELS_LAST,
            ONCE,
            EARLY,
            BLOCK,
        )
        last = part == 0  # any program, if there is nothing to add up and nothing to clear
        there = slot < chunks
        found = tl.zeros([SLOTS], tl.int64)
        if TWO_PASSES and not SINGLE:
            tl.debug_barrier()
            last = tl.atomic_add(left, 1, sem="acq_rel") == chunks - 1
        elif SUMMED and not SINGLE:
            own_pair = packed(a, b)
            tl.atomic_add(pairs + part, own_pair, sem="relaxed")
            if SLOTS <= _FEW_CHUNKS:
                # On the way together with the number of programs that arrived before.
                found = tl.load(pairs + slot, mask=there, other=0, volatile=True)
                found = tl.where(slot == part, own_pair, found)
            last = tl.atomic_add(arrived, 1, sem="relaxed") == chunks - 1
        if last:
            # Triton 3.3 does not accept chains of three conditions, hence the parentheses.
            if (SUMMED and not SINGLE) and not TWO_PASSES:
                a, b, missing = added_up(found, there)
                while missing > 0:
                    found = tl.load(pairs + slot, mask=there, other=0, volatile=True)
                    a, b, missing = added_up(found, there)
            finish(
                row,
                sample,
                scale,
                before,
                odds,
                a,
                b,
                seen,
                divergence,
                state_next,
                scale_out,
                weight_out,
                D,
                RULE,
                TRACKER,
                DIVERGENCE,
            )
            # Reset what the next launch expects at zero.
            if (SUMMED and not SINGLE) and not TWO_PASSES:
                tl.debug_barrier()  # until no warp waits for a chunk's sums
                tl.store(pairs + slot, tl.zeros([SLOTS], tl.int64), mask=there)
            if TWO_PASSES and not SINGLE:
                tl.store(left, 0)
                if tl.atomic_add(counters + 1, 1, sem="acq_rel") == batch - 1:
                    tl.store(counters, 0)
                    tl.store(counters + 1, 0)
            if (TWO_PASSES or SUMMED) and not SINGLE:
                tl.store(arrived, 0)


# ------------------------------------------------ the launch


def arguments(
    inputs: Inputs,
    outputs: StepResult,
    variant: Variant,
    table: Tensor,
    index: Tensor,
    seed: int | None,
    first_sample: int,
    counters: Tensor,
    partials: Tensor,
) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid of a launch and every argument of the kernel by name, in the kernel's order."""
    layout = outputs.eps_guided if inputs.x is None else inputs.x
    assert layout is not None  # which it is only in UPDATE, and there x is read
    channels_last = is_channels_last(layout)
    batch = len(layout)
    elements = layout[0].numel()
    # Large blocks would make the kernels spill that need many registers.
    heavy = _is_heavy(variant.cfg, variant.clip, variant.drift, channels_last, elements)
    block, chunk, chunks = chunking(elements, 4 if heavy else layout.element_size())
    strides = {}
    events: dict[str, Tensor | None] = {}
    written = (outputs.x_next, outputs.eps_guided, outputs.momentum)
    for name, tensor in zip(_EVENTS, (*inputs[:7], *written), strict=True):
        if tensor is None:
            events[name], strides[f"{name}_stride"] = None, 0
        else:
            events[name], strides[f"{name}_stride"] = readable(tensor, channels_last)
    two_passes = variant.mode != UPDATE and variant.rule in NEED_SUMS
    single = chunks == 1
    noise = GIVEN if inputs.noise is not None else KEYS if inputs.keys is not None else NO_NOISE
    if seed is not None:
        noise = SEED
    # An axis of samples saves a division before the first load.
    flat = batch > LARGEST_AXIS or (two_passes and not single)
    programs = batch * chunks * (2 if two_passes and not single else 1)
    grid = (programs, 1) if flat else (chunks, batch)
    return grid, {
        "table": table,
        "index": index,
        **{name: events[name] for name in _EVENTS[:_READ]},
        "keys": inputs.keys,
        "state": inputs.state,
        "divergence": inputs.divergence_gap,
        **{name: events[name] for name in _EVENTS[_READ:]},
        "state_next": outputs.state,
        "scale_out": outputs.scale,
        "weight_out": outputs.log_weight,
        "counters": counters,
        "partials": partials,
        "D": elements,
        "chunk": chunk,
        "chunks": chunks,
        "batch": batch,
        **strides,
        "channels": layout.shape[1] if channels_last else 1,
        "seed": 0 if seed is None else seed,
        "first_sample": first_sample,
        "MODE": variant.mode,
        "RULE": variant.rule,
        "TRACKER": variant.tracker,
        "CFG": variant.cfg,
        "CLIP": variant.clip,
        "DRIFT": variant.drift,
        "DIVERGENCE": variant.divergence,
        "READS_THIRD": variant.reads_third,
        "NOISE": noise,
        "CHANNELS_LAST": channels_last,
        "SLOTS": 1 << (chunks - 1).bit_length(),
        "FLAT": flat,
        "ONCE": chunk == block,
        # A chunk of one block can be loaded at once; with more registers in use, nothing is gained.
        "EARLY": chunk == block
        and variant.mode == STEP
        and noise == GIVEN
        and not (heavy or two_passes or variant.rule == _codes.SAFE),
        "BLOCK": block,
    }


LARGEST_AXIS = 65535  # programs along the second axis of a grid

# Tensors (B, ...) that the kernel reads, and those that it writes.
_EVENTS = (
    *("x", "x_next_in", "eps", "eps_neg", "eps_third", "noise", "momentum"),
    *("x_next", "guided_out", "momentum_out"),
)
_READ = 7


def _is_heavy(cfg: bool, clip: bool, drift: bool, channels_last: bool, elements: int) -> bool:
    """Whether a kernel needs more registers than common ones."""
    return cfg or clip or drift or channels_last or elements % 16 != 0


def options(named: dict[str, Any]) -> dict[str, Any]:
    """How a kernel with these arguments is compiled.

    Fusing multiplications and additions is enabled explicitly, not left to a default.  Common
    kernels take at most 64 registers; for those that need more the limit is lifted, or the compiler
    would spill some to run more programs at once.
    """
    names = ("CFG", "CLIP", "DRIFT", "CHANNELS_LAST", "D")
    heavy = _is_heavy(*(named[name] for name in names))
    common = {"num_warps": 4, "enable_fp_fusion": True}
    return common | {"maxnreg": 255} if heavy else common


# ------------------------------------------------ compiled kernels, launched directly

# Arguments are tensors or None, then numbers, then constants.
_TENSORS = 2 + len(_EVENTS) + 8
_CONSTANTS = _TENSORS + 4 + len(_EVENTS) + 3
_INT32 = 2**31

# Kernels that were compiled, by what they were compiled for.
_COMPILED: dict[tuple[Any, ...], Any] = {}


def specialization(device: torch.device, values: Sequence[Any]) -> tuple[Any, ...]:
    """What a kernel is compiled for: the device, and something of every argument.

    Tensors count by dtype and by whether their address is a multiple of 16; numbers by whether they
    are 1, are multiples of 16 and fit 32 bits; constants by value.  That is what Triton looks at,
    and for numbers that the kernel does not specialise on it is more.
    """
    key: list[Any] = [device]
    for value in values[:_TENSORS]:
        key += (None,) if value is None else (value.dtype, value.data_ptr() % 16 == 0)
    for value in values[_TENSORS:_CONSTANTS]:
        key += (value == 1, value % 16 == 0, -_INT32 <= value < _INT32)
    key += values[_CONSTANTS:]
    return tuple(key)


def check_device(device: torch.device) -> None:
    """Refuse tensors that the compiled kernel cannot read."""
    if device.type != "cuda" and isinstance(fused_step, triton.JITFunction):
        raise ValueError(
            f"backend must not be 'triton' for tensors on {device}: the kernel runs on a GPU, or "
            "anywhere in Triton's interpreter (TRITON_INTERPRET=1, set before Triton is imported)"
        )


def prepared(grid: tuple[int, ...], named: dict[str, Any]) -> Callable[..., Any] | None:
    """What launches the kernel for these arguments, in their order; None if it is not compiled yet.

    Launched the usual way, Triton compares all arguments and all globals that the kernel reads at
    every launch, which takes several times as long as the launch itself.  A kernel that is kept
    here is called by Triton's convention for compiled kernels, ``kernel[grid](*arguments)``: it
    takes the current device and stream, and runs the launch hooks of profilers.  Nothing else in
    this package knows that convention.
    """
    if not isinstance(fused_step, triton.JITFunction) or fused_step.pre_run_hooks:
        return None
    kernel = _COMPILED.get(specialization(named["eps"].device, list(named.values())))
    return None if kernel is None else kernel[(*grid, 1)]


def launch(grid: tuple[int, ...], named: dict[str, Any]) -> None:
    """Launch the kernel on the current device, and keep it if it had to be compiled."""
    launcher = prepared(grid, named)
    if launcher is not None:
        launcher(*named.values())
        return
    kernel = fused_step[grid](**named, **options(named))
    if isinstance(fused_step, triton.JITFunction) and hasattr(kernel, "packed_metadata"):
        _COMPILED[specialization(named["eps"].device, list(named.values()))] = kernel


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """A block in which the device is the current one, for which Triton compiles and launches."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()


def run(*given: Any) -> None:
    """Launch the kernel; arguments as for :func:`arguments`."""
    grid, named = arguments(*given)
    device = named["eps"].device
    check_device(device)
    with on_device(device):
        launch(grid, named)
