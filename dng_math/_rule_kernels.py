"""The rules and the trackers of the fused chain, on blocks of BLOCK lanes.

They are those of :mod:`dng_math.rules` and :mod:`dng_math.trackers`, for predictions of x0, with
the arithmetic of :mod:`dng_math.equations` compiled.
"""

from __future__ import annotations

from dng_math import equations
from dng_math._codes import (
    CONTRASTIVE,
    EXACT,
    FEEDBACK,
    LOG_ODDS,
    NEGATIVE,
    PAPER,
    PATH,
    PATH_BASE,
    PERPENDICULAR,
    SAFE,
    TOWARD,
    TRACKED,
    UNGUIDED,
)
from dng_math._elementary import exp, log
from dng_math._jit import block_kernel, scalar
from dng_math._mixture_kernels import BLOCK
from dng_math.rules import PerpNeg

LARGEST_LOG_RATIO = 700.0  # e^700 is still a double
ROUNDING_SQ = PerpNeg.ROUNDING_SQ

step_mean = scalar(equations.step_mean)
toward = scalar(equations.toward)
away = scalar(equations.away)
dynamic_scale = scalar(equations.dynamic_scale)
perpendicular = scalar(equations.perpendicular)
contrastive_scale = scalar(equations.contrastive_scale)
safe_correction = scalar(equations.safe_correction)
safe_momentum = scalar(equations.safe_momentum)
feedback_scale = scalar(equations.feedback_scale)
log_likelihood_ratio = scalar(equations.log_likelihood_ratio)
log_odds_ratio = scalar(equations.log_odds_ratio)
tracker_update = scalar(equations.tracker_update)
divergence_correction = scalar(equations.divergence_correction)
rest_divergence_gap = scalar(equations.rest_divergence_gap)
path_rate = scalar(equations.path_rate)
path_end = scalar(equations.path_end)
path_log_ratio = scalar(equations.path_log_ratio)


@block_kernel
def copy(source, target):  # type: ignore[no-untyped-def]
    """target = source, (rows, BLOCK); a slice assignment would take Numba seconds to compile."""
    for d in range(source.shape[0]):
        row, out = source[d], target[d]
        for i in range(BLOCK):
            out[i] = row[i]


@block_kernel
def fill(target, number):  # type: ignore[no-untyped-def]
    """target = number, (rows, BLOCK)."""
    for d in range(target.shape[0]):
        out = target[d]
        for i in range(BLOCK):
            out[i] = number


@block_kernel
def tracked_odds(tracker, state, cap, odds):  # type: ignore[no-untyped-def]
    """p / (1 - p) from the tracker's state (e^L for feedback guidance)."""
    for k in range(state.shape[0]):
        row, out = state[k], odds[k]
        if tracker == PAPER or tracker == PATH_BASE:
            for i in range(BLOCK):
                p = exp(row[i])
                out[i] = p / (1.0 - p)
        else:
            for i in range(BLOCK):
                out[i] = exp(min(row[i], cap))


@block_kernel
def guide(  # type: ignore[no-untyped-def]
    rule, p, step, to_noise, x0, value, share, log_sum, positive, odds, memory, work, scale, guided
):
    """Write guided x0 (D, BLOCK) and scale (M, BLOCK); p are the rule's parameters.

    positive (2, D, BLOCK) holds the positive prediction and, for Perp-Neg, that of all other
    components.
    """
    dimensions, concepts = x0.shape[0], scale.shape[0]
    g = p[0]
    a, b = work[0], work[1]
    if rule == UNGUIDED or rule == SAFE or rule == EXACT or (rule == TRACKED and concepts > 1):
        copy(x0, guided)  # these rules add to the base or keep it
    if rule == UNGUIDED:
        fill(scale, 0.0)
    elif rule == TOWARD:
        fill(scale, g)
        for d in range(dimensions):
            base, other, out = x0[d], positive[0, d], guided[d]
            for i in range(BLOCK):
                out[i] = toward(base[i], other[i] - base[i], g)
    elif rule == NEGATIVE:
        fill(scale, g)
        for d in range(dimensions):
            base, other, out = x0[d], value[0, d], guided[d]
            for i in range(BLOCK):
                out[i] = away(base[i], other[i] - base[i], g)
    elif rule == SAFE:
        threshold, slope, momentum_scale, decay, absolute, warmup = (
            p[1],
            p[2],
            p[3],
            p[4],
            p[5],
            p[6],
        )
        applied = step >= warmup and to_noise != 0.0
        row = scale[0]
        for i in range(BLOCK):
            row[i] = 0.0
        for d in range(dimensions):
            base, other, out, momentum = x0[d], value[0, d], guided[d], memory[d]
            for i in range(BLOCK):
                difference = (other[i] - base[i]) * to_noise
                magnitude = abs(difference)
                gated = magnitude if absolute != 0.0 else -difference
                s = min(1.0, slope * magnitude) if gated < threshold else 0.0
                correction = safe_correction(s, difference, momentum_scale, momentum[i])
                momentum[i] = safe_momentum(momentum[i], correction, decay)
                a[i] = correction
                row[i] += s
            if applied:
                for i in range(BLOCK):
                    out[i] = away(base[i], a[i] / to_noise, g)
        factor = g / dimensions if applied else 0.0
        for i in range(BLOCK):
            row[i] *= factor
    elif rule == PERPENDICULAR:
        fill(scale, g)
        positive_scale = p[1]
        for i in range(BLOCK):
            a[i] = 0.0
            b[i] = 0.0
        for d in range(dimensions):
            base, other, pos, opposite = x0[d], value[0, d], positive[0, d], positive[1, d]
            for i in range(BLOCK):
                direction = pos[i] - opposite[i]
                a[i] += direction * direction
                b[i] += (other[i] - base[i]) * direction
        floor = work[2]
        for i in range(BLOCK):
            floor[i] = 0.0
        for d in range(dimensions):
            base = x0[d]
            for i in range(BLOCK):
                floor[i] += base[i] * base[i] * ROUNDING_SQ
        for i in range(BLOCK):
            b[i] = b[i] / a[i] if a[i] > floor[i] else 0.0
        for d in range(dimensions):
            base, other, out = x0[d], value[0, d], guided[d]
            pos, opposite = positive[0, d], positive[1, d]
            for i in range(BLOCK):
                rest = perpendicular(other[i] - base[i], pos[i] - opposite[i], b[i])
                out[i] = away(toward(base[i], pos[i] - base[i], positive_scale), rest, g)
    elif rule == CONTRASTIVE:
        row = scale[0]
        for i in range(BLOCK):
            a[i] = 0.0
        for d in range(dimensions):
            base, other = x0[d], value[0, d]
            for i in range(BLOCK):
                difference = other[i] - base[i]
                a[i] += difference * difference
        factor = -p[1] * to_noise * to_noise
        for i in range(BLOCK):
            row[i] = contrastive_scale(g, exp(factor * a[i]))
        for d in range(dimensions):
            base, other, out = x0[d], value[0, d], guided[d]
            for i in range(BLOCK):
                out[i] = away(base[i], other[i] - base[i], row[i])
    elif rule == EXACT:
        # As in DynamicNegativeGuidance._guide_exactly: differences to the rest stay finite.
        rest = log_sum[concepts]
        for k in range(concepts):
            row, own, weight = scale[k], log_sum[k], share[k]
            for i in range(BLOCK):
                row[i] = g * exp(min(own[i] - rest[i], LARGEST_LOG_RATIO))
            for d in range(dimensions):
                other, from_rest, out = value[k, d], value[concepts, d], guided[d]
                for i in range(BLOCK):
                    out[i] = away(out[i], other[i] - from_rest[i], g * weight[i])
    elif rule == TRACKED:
        p_max = p[1]
        if concepts == 1:
            cap, row, o = p_max / (1.0 - p_max), scale[0], odds[0]
            for i in range(BLOCK):
                row[i] = dynamic_scale(g, min(o[i], cap), 1.0)
            for d in range(dimensions):
                base, other, out = x0[d], value[0, d], guided[d]
                for i in range(BLOCK):
                    out[i] = away(base[i], other[i] - base[i], row[i])
            return
        for i in range(BLOCK):
            a[i] = 0.0
        for k in range(concepts):
            row, o = scale[k], odds[k]
            for i in range(BLOCK):
                row[i] = o[i] / (1.0 + o[i])
                a[i] += row[i]
        for i in range(BLOCK):
            b[i] = min(1.0, p_max / max(a[i], 1e-300))
            a[i] = 1.0 - b[i] * a[i]
        for k in range(concepts):
            row = scale[k]
            for i in range(BLOCK):
                row[i] = dynamic_scale(g, row[i] * b[i], a[i])
            for d in range(dimensions):
                base, other, out = x0[d], value[k, d], guided[d]
                for i in range(BLOCK):
                    out[i] = away(out[i], other[i] - base[i], row[i])
    elif rule == FEEDBACK:
        pi, row, o = p[1], scale[0], odds[0]
        for i in range(BLOCK):
            row[i] = feedback_scale(o[i], pi)
        for d in range(dimensions):
            base, other, out = x0[d], positive[0, d], guided[d]
            for i in range(BLOCK):
                out[i] = toward(base[i], other[i] - base[i], row[i])


@block_kernel
def track(  # type: ignore[no-untyped-def]
    tracker,
    t,
    variance,
    x_factor,
    x0_factor,
    with_divergence,
    score_factor,
    eta,
    beta,
    x,
    x_next,
    x0,
    others,
    odds,
    divergence,
    work,
    state,
):
    """Update the tracker's state (M, BLOCK); t = temperature, offset, offset_nats, low, high.

    others (M or more, D, BLOCK) are the predictions compared with x0; divergence holds the
    divergence of each group's score and, last, of the whole mixture's.
    """
    temperature, offset, nats, low, high = t[0], t[1], t[2], t[3], t[4]
    dimensions = x0.shape[0]
    gap_sq, residual_gap = work[0], work[1]
    whole = divergence[len(divergence) - 1]
    for k in range(state.shape[0]):
        for i in range(BLOCK):
            gap_sq[i] = 0.0
            residual_gap[i] = 0.0
        for d in range(dimensions):
            base, other, now, then = x0[d], others[k, d], x[d], x_next[d]
            for i in range(BLOCK):
                gap = x0_factor * (other[i] - base[i])
                residual = then[i] - step_mean(now[i], base[i], x_factor, x0_factor)
                gap_sq[i] += gap * gap
                residual_gap[i] += residual * gap
        row, o = state[k], odds[k]
        for i in range(BLOCK):
            if tracker == LOG_ODDS:
                ratio = log_odds_ratio(o[i], gap_sq[i], residual_gap[i], variance)
            else:
                ratio = log_likelihood_ratio(gap_sq[i], residual_gap[i], variance)
            if with_divergence:
                gap = divergence[k, i] - whole[i]
                if tracker == LOG_ODDS:
                    score_gap_sq = gap_sq[i] * (score_factor * score_factor)
                    gap = rest_divergence_gap(o[i], gap, score_gap_sq)
                ratio += divergence_correction(eta, beta, gap)
            updated = tracker_update(row[i], ratio, variance, temperature, offset, nats)
            if tracker != LOG_ODDS:
                updated = min(updated, high)
            row[i] = max(updated, low)


@block_kernel
def divergences(alpha, sigma, share, value, x0, trace, spread, out):  # type: ignore[no-untyped-def]
    """Divergence of the score of each group (G, BLOCK) and, in the last row, of the mixture.

    The Jacobian of E[x0 | x] is alpha / sigma^2 times the covariance of x0, and by Tweedie
    div s = (alpha tr J - D) / sigma^2.
    """
    n_groups, dimensions = value.shape[0], value.shape[1]
    ratio = alpha / (sigma * sigma)
    whole = out[n_groups]
    for i in range(BLOCK):
        whole[i] = 0.0
    for g in range(n_groups):
        row, sp, tr, weight = out[g], spread[g], trace[g], share[g]
        for i in range(BLOCK):
            row[i] = tr[i] + ratio * sp[i]
            whole[i] += weight[i] * row[i]
        for d in range(dimensions):
            own, base = value[g, d], x0[d]
            for i in range(BLOCK):
                difference = own[i] - base[i]
                whole[i] += weight[i] * (ratio * difference * difference)
    for g in range(n_groups + 1):
        row = out[g]
        for i in range(BLOCK):
            row[i] = (alpha * row[i] - dimensions) / (sigma * sigma)


@block_kernel
def track_path(  # type: ignore[no-untyped-def]
    tracker, t, first, step, x, x0, others, odds, divergence, memory, work, state
):
    """Update the state (M, BLOCK) of a path tracker at a point, before the step from it.

    t is as for :func:`track`, of the step that led here, and ``high`` is the cap of the odds (their
    logarithm for PATH, of p for PATH_BASE).  step is this one's row, with the numbers of the way
    here.  memory (D + M D + M, BLOCK) holds the previous x, the differences of its predictions of
    x0, and its rates; it is overwritten with those of this point.
    """
    temperature, nats, low, high = t[0], t[2], t[3], t[4]
    alpha, sigma = step[0], step[1]
    here, there, pull, pull_0, weight, weight_0 = (
        step[9],
        step[10],
        step[11],
        step[12],
        step[13],
        step[14],
    )
    dimensions, concepts = x0.shape[0], state.shape[0]
    product, after, before = work[0], work[1], work[2]
    whole = divergence[len(divergence) - 1]
    cap = high if tracker == PATH_BASE else high - log(1.0 + exp(high))  # log p_max
    for k in range(concepts):
        for i in range(BLOCK):
            product[i] = 0.0
            after[i] = 0.0
            before[i] = 0.0
        for d in range(dimensions):
            base, other, now = x0[d], others[k, d], x[d]
            x_0, gap_0 = memory[d], memory[dimensions + k * dimensions + d]
            for i in range(BLOCK):
                gap = other[i] - base[i]
                product[i] += gap * (2.0 * now[i] - alpha * (other[i] + base[i]))
                moved = here * now[i] + there * x_0[i]
                after[i] += gap * moved
                before[i] += gap_0[i] * moved
                gap_0[i] = gap
        row, o, rates = state[k], odds[k], memory[dimensions + concepts * dimensions + k]
        for i in range(BLOCK):
            gap = sigma * sigma * (divergence[k, i] - whole[i])
            rate = path_rate(product[i] * (-alpha / (sigma * sigma)), gap)
            start = path_end(pull_0 * before[i], rates[i], weight_0)
            end = path_end(pull * after[i], rate, weight)
            if first:
                start = -rate
                end = -rate
            rates[i] = rate
            now_odds, next_odds = 0.0, 0.0
            if tracker == PATH:
                now_odds = o[i]
                level = row[i]
                log_p = min(level, 0.0) - log(1.0 + exp(-abs(level)))
                p = exp(min(log_p + temperature * 0.5 * (start + end), cap))
                next_odds = p / (1.0 - p)
            ratio = path_log_ratio(start, end, now_odds, next_odds)
            updated = row[i] + temperature * ratio + nats
            if tracker == PATH_BASE:
                updated = min(updated, high)
            row[i] = max(updated, low)
    for d in range(dimensions):
        now, x_0 = x[d], memory[d]
        for i in range(BLOCK):
            x_0[i] = now[i]
