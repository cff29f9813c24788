"""The rules and the trackers of the fused chain, on blocks of BLOCK lanes.

They are those of :mod:`dng_math.rules` and :mod:`dng_math.trackers`, for predictions of x0, with
the arithmetic of :mod:`dng_math.equations` compiled.
"""

from __future__ import annotations

import math

import numpy as np

from dng_math import equations
from dng_math._codes import (
    CONTRASTIVE,
    EXACT,
    FEEDBACK,
    GEOMETRIC,
    LOG_ODDS,
    NEGATIVE,
    PAPER,
    PATH,
    PATH_BASE,
    PERPENDICULAR,
    POINTWISE,
    REGULATED,
    SAFE,
    SHIELDED,
    TOWARD,
    TOWARD_BY_STEP,
    TRACKED,
    UNGUIDED,
)
from dng_math._elementary import exp, log
from dng_math._jit import block_kernel, scalar
from dng_math._mixture_kernels import BLOCK
from dng_math.rules import ROUNDING_SQ
from dng_math.trackers import LARGEST_WEIGHED

SMALLEST_SHARE, SMALLEST_DISTANCE = 1e-300, 1e-150  # of GeoGuide and SPELL
LOG_LARGEST_WEIGHED = math.log(LARGEST_WEIGHED)
LARGEST_WEIGHT = LARGEST_WEIGHED / (1.0 - LARGEST_WEIGHED)
LARGEST_LOG_RATIO = 700.0  # e^700 is still a double

step_mean = scalar(equations.step_mean)
toward = scalar(equations.toward)
away = scalar(equations.away)
dynamic_scale = scalar(equations.dynamic_scale)
perpendicular = scalar(equations.perpendicular)
contrastive_scale = scalar(equations.contrastive_scale)
contrastive_attraction = scalar(equations.contrastive_attraction)
geometric_scale = scalar(equations.geometric_scale)
regulating_evidence = scalar(equations.regulating_evidence)
regulating_scale = scalar(equations.regulating_scale)
shield = scalar(equations.shield)
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
    rule, p, of_step, step, to_noise, start, reference, led, x0, beneath, value, share, log_sum,
    positive, points, odds, memory, work, scale, guided,
):  # fmt: skip
    """Write guided x0 (D, BLOCK) and scale (M, BLOCK); p are the rule's parameters.

    start is the prediction that guidance is added to, reference what the negative is measured
    from, led the positive prediction of classifier-free guidance beneath, and x0 that of all
    groups; without it all four are the same.  beneath (5,) is as the chain takes it.  positive
    (2, D, BLOCK) holds the other prediction of classifier-free guidance, or the one that a rule
    leads to and, for Perp-Neg, that of all other components; the last is that of a rule's points.
    of_step (1,) is the number that a rule has of the step.
    """
    dimensions, concepts = x0.shape[0], scale.shape[0]
    g = p[0]
    a, b = work[0], work[1]
    if (
        rule == UNGUIDED
        or rule == SAFE
        or rule == EXACT
        or rule == SHIELDED
        or (rule == TRACKED and concepts > 1)
    ):
        copy(start, guided)  # these rules add to the base or keep it
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
            base, ref, other, out = start[d], reference[d], value[0, d], guided[d]
            for i in range(BLOCK):
                out[i] = away(base[i], other[i] - ref[i], g)
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
            base, ref, other, out, momentum = (
                start[d],
                reference[d],
                value[0, d],
                guided[d],
                memory[d],
            )
            pos = led[d]
            for i in range(BLOCK):
                difference = (other[i] - ref[i]) * to_noise
                compared = (other[i] - pos[i]) * to_noise
                magnitude = abs(compared)
                gated = magnitude if absolute != 0.0 else -compared
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
            b[i] = 0.0
        for d in range(dimensions):
            ref, other = reference[d], value[0, d]
            for i in range(BLOCK):
                difference = other[i] - ref[i]
                a[i] += difference * difference
        factor = -p[1] * to_noise * to_noise
        for i in range(BLOCK):
            row[i] = contrastive_scale(g, exp(factor * a[i]))
        base_row = start
        if beneath[4] != 0.0:
            for d in range(dimensions):
                ours, theirs = x0[d], positive[0, d]
                for i in range(BLOCK):
                    difference = theirs[i] - ours[i]
                    b[i] += difference * difference
            for i in range(BLOCK):
                b[i] = contrastive_attraction(exp(factor * b[i])) * beneath[1]
                if beneath[2] != 0.0:
                    b[i] = 1.0 - b[i]
            for d in range(dimensions):
                ours, theirs, out = x0[d], positive[0, d], guided[d]
                for i in range(BLOCK):
                    out[i] = toward(ours[i], theirs[i] - ours[i], b[i])
            base_row = guided
        for d in range(dimensions):
            base, ref, other, out = base_row[d], reference[d], value[0, d], guided[d]
            for i in range(BLOCK):
                out[i] = away(base[i], other[i] - ref[i], row[i])
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
                base, ref, other, out = start[d], reference[d], value[0, d], guided[d]
                for i in range(BLOCK):
                    out[i] = away(base[i], other[i] - ref[i], row[i])
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
                ref, other, out = reference[d], value[k, d], guided[d]
                for i in range(BLOCK):
                    out[i] = away(out[i], other[i] - ref[i], row[i])
    elif rule == FEEDBACK:
        pi, row, o = p[1], scale[0], odds[0]
        for i in range(BLOCK):
            row[i] = feedback_scale(o[i], pi) + of_step[0]
        for d in range(dimensions):
            base, other, out = x0[d], positive[0, d], guided[d]
            for i in range(BLOCK):
                out[i] = toward(base[i], other[i] - base[i], row[i])
    elif rule == TOWARD_BY_STEP:
        fill(scale, of_step[0])
        for d in range(dimensions):
            base, other, out = x0[d], positive[0, d], guided[d]
            for i in range(BLOCK):
                out[i] = toward(base[i], other[i] - base[i], of_step[0])
    elif rule == GEOMETRIC:
        # Where the reference is all groups together, the direction from the rest is the same and
        # accurate where negative and reference agree to rounding.
        parts = beneath[3] == 0.0
        floor, row = work[2], scale[0]
        for i in range(BLOCK):
            a[i] = 0.0
            floor[i] = 0.0
        for d in range(dimensions):
            base, other = start[d], value[0, d]
            ref = value[1, d] if parts else reference[d]
            for i in range(BLOCK):
                difference = other[i] - ref[i]
                a[i] += difference * difference
                floor[i] += base[i] * base[i] * ROUNDING_SQ
        rest = share[1]
        for i in range(BLOCK):
            known = a[i] > floor[i]
            b[i] = geometric_scale(of_step[0], np.sqrt(a[i])) if known else 0.0
            row[i] = b[i] / max(rest[i], SMALLEST_SHARE) if parts else b[i]
        for d in range(dimensions):
            base, other, out = start[d], value[0, d], guided[d]
            ref = value[1, d] if parts else reference[d]
            for i in range(BLOCK):
                out[i] = away(base[i], other[i] - ref[i], b[i])
    elif rule == POINTWISE:
        # odds holds log p, and positive the points' prediction last.
        other_rows = positive[1] if beneath[0] != 0.0 else positive[0]
        log_p, cap = odds[0], log(p[2])
        for i in range(BLOCK):
            a[i] = exp(min(log_p[i], cap))
            a[i] = dynamic_scale(g, a[i], 1.0 - a[i])
        for m in range(concepts):
            copy(work[:1], scale[m : m + 1])
        for d in range(dimensions):
            base, ref, other, out = start[d], reference[d], other_rows[d], guided[d]
            for i in range(BLOCK):
                out[i] = away(base[i], other[i] - ref[i], a[i])
    elif rule == REGULATED:
        floor, norm_sq, row, evidence = work[2], work[3], scale[0], memory[0]
        for i in range(BLOCK):
            a[i] = 0.0
            b[i] = 0.0
            floor[i] = 0.0
            norm_sq[i] = 0.0
        for d in range(dimensions):
            base, ref, other = start[d], reference[d], value[0, d]
            for i in range(BLOCK):
                from_null, from_negative = base[i] - ref[i], base[i] - other[i]
                a[i] += from_null * from_null
                b[i] += from_negative * from_negative
                norm_sq[i] += (other[i] - ref[i]) * (other[i] - ref[i])
                floor[i] += base[i] * base[i] * ROUNDING_SQ
        square = to_noise * to_noise
        for i in range(BLOCK):
            seen = regulating_evidence(a[i], b[i]) * square
            surplus = 0.5 * p[1] * seen + evidence[i] - p[2]
            acts = surplus > 0.0 and norm_sq[i] > floor[i] and square > 0.0
            row[i] = regulating_scale(g, surplus, p[1], norm_sq[i] * square) if acts else 0.0
            evidence[i] += of_step[0] * seen
        for d in range(dimensions):
            base, ref, other, out = start[d], reference[d], value[0, d], guided[d]
            for i in range(BLOCK):
                out[i] = away(base[i], other[i] - ref[i], row[i])
    elif rule == SHIELDED:
        fill(scale, 0.0)
        for k in range(points.shape[0]):
            for i in range(BLOCK):
                a[i] = 0.0
            for d in range(dimensions):
                base, point = start[d], points[k, d]
                for i in range(BLOCK):
                    difference = base[i] - point
                    a[i] += difference * difference
            for i in range(BLOCK):
                distance = max(np.sqrt(a[i]), SMALLEST_DISTANCE)
                b[i] = g * max(shield(p[1], distance), 0.0)
            for d in range(dimensions):
                base, out, point = start[d], guided[d], points[k, d]
                for i in range(BLOCK):
                    out[i] = toward(out[i], base[i] - point, b[i])
            for m in range(concepts):
                row = scale[m]
                for i in range(BLOCK):
                    row[i] += b[i]


@block_kernel
def pointwise_log_p(  # type: ignore[no-untyped-def]
    prior, own_top, own_total, whole_top, whole_total, log_p
):
    """log(prior density/whole density) of a row of points, (BLOCK,), and of groups (G, BLOCK)."""
    for i in range(BLOCK):
        highest = whole_top[0, i]
        for g in range(1, whole_top.shape[0]):
            highest = max(highest, whole_top[g, i])
        total = 0.0
        for g in range(whole_top.shape[0]):
            total += whole_total[g, i] * exp(whole_top[g, i] - highest)
        log_p[i] = log(prior) + (own_top[i] - highest) + (log(own_total[i]) - log(total))


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
    cap = min(high - log(1.0 + exp(high)), LOG_LARGEST_WEIGHED)  # for PATH: log p_max at most
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
                now_odds = min(o[i], LARGEST_WEIGHT)
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
