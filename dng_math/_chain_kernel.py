"""The fused chain: predictions, guidance, step, noise and tracker for one chunk of samples.

A chunk runs all steps before the next one starts, in blocks of BLOCK lanes that stay in cache,
so memory does not depend on the number of steps.  Lane ``i`` of a block always holds the
same sample (blocks start at multiples of BLOCK in the sample index) and lanes never mix, so a
sample's bits do not depend on which other samples are drawn.

Predictions are computed by loops over components (any covariances) or, for many spherical
components of one variance, by two matrix products per block.
"""

from __future__ import annotations

import numpy as np

from dng_math import equations
from dng_math._codes import (
    EXACT,
    FEEDBACK,
    NO_TRACKER,
    PATH,
    PATH_BASE,
    PERPENDICULAR,
    POINTWISE,
    RATIO,
    TOWARD,
    TOWARD_BY_STEP,
)
from dng_math._elementary import exp, log
from dng_math._jit import block_kernel, kernel, scalar
from dng_math._mixture_kernels import BLOCK, block_groups
from dng_math._prediction_kernels import (
    PAGE,
    combine,
    diffuse_parameters,
    matrix_groups,
    noise_row,
    store,
)
from dng_math._rule_kernels import (
    copy,
    divergences,
    fill,
    guide,
    pointwise_log_p,
    track,
    track_path,
    tracked_odds,
)
from dng_math.noise import STEP_STREAM

step_mean = scalar(equations.step_mean)
take_step = scalar(equations.step)
toward = scalar(equations.toward)
log_weight_of = scalar(equations.log_weight)


@kernel
def aligned_pool(rows, chunk):  # type: ignore[no-untyped-def]
    """Uninitialised array (rows, BLOCK), page-aligned and shifted by chunk % 16 pages.

    The shift is an empirical fix: with buffers that start alike in every thread, two threads took
    as long as one (measured on AMD EPYC).  The likely reason is that the allocator gives every
    thread the same layout.
    """
    raw = np.empty(rows * BLOCK + 17 * PAGE)
    start = (-raw.ctypes.data % (8 * PAGE)) // 8 + (chunk % 16) * PAGE
    return raw[start : start + rows * BLOCK].reshape((rows, BLOCK))


@block_kernel
def advance(  # type: ignore[no-untyped-def]
    seed,
    first_sample,
    x,
    state,
    memory,
    log_ratio,
    span,
    plan,
    way,
    model,
    target,
    guidance,
    records,
    diffused,
    p_diffused,
    scratch,
    of_groups,
    of_positive,
    of_samples,
):
    """Run the loop of :func:`chain` on the buffers allocated there, without reference counts.

    Reference counts of arrays that two threads allocate side by side share cache lines, and
    updating them would cost more than the arithmetic.
    """
    steps, variances, active, of_steps, beneath, points = plan
    kind, matrix, with_divergence = way
    groups, log_weight, mean, covariance, norm_sq, centre = model
    p_groups, p_log_weight, p_mean, p_covariance, p_norm_sq = target
    rule, parameters, tracker, tracker_parameters = guidance
    first_lane, record_x, record_scale, record_state, record_exact = records
    peak, moved, no_low, precision, gain = diffused
    p_peak, p_moved, p_no_low, p_precision, p_gain = p_diffused
    square, logits, work, shifted = scratch
    top, total, value, trace, spread, share, log_sum, divergence = of_groups
    p_top, p_total, positive = of_positive
    x0, guided, x_next, z, started, odds, scale, spare, spare_pair = of_samples
    has_cfg, cfg_factor, swapped, from_other = (
        beneath[0] != 0.0,
        1.0 - beneath[1] if beneath[2] != 0.0 else beneath[1],
        beneath[2] != 0.0,
        beneath[3] != 0.0,
    )
    weighed = log_ratio.size > 0
    n_blocks, dimensions, _ = x.shape
    n_groups = len(groups) - 1
    has_positive = len(p_log_weight) > 0

    for n in range(span[0], span[1]):
        alpha, sigma, x_factor, x0_factor, deviation = (
            steps[n, 0],
            steps[n, 1],
            steps[n, 2],
            steps[n, 3],
            steps[n, 4],
        )
        if not matrix:
            diffuse_parameters(
                alpha, sigma, kind, log_weight, mean, covariance,
                peak, moved, precision, gain, square,
            )  # fmt: skip
            if has_positive:
                diffuse_parameters(
                    alpha, sigma, kind, p_log_weight, p_mean, p_covariance,
                    p_peak, p_moved, p_precision, p_gain, square,
                )  # fmt: skip
        for b in range(n_blocks):
            now, own_state = x[b], state[b]
            if matrix:
                matrix_groups(
                    now, alpha, sigma, groups, log_weight, mean, norm_sq, centre,
                    covariance[0, 0, 0], with_divergence, shifted, logits, work,
                    top, total, value, trace, spread,
                )  # fmt: skip
            else:
                block_groups(
                    now, groups, peak, moved, no_low, kind, precision, mean, gain,
                    True, with_divergence, logits, work, top, total, value, trace, spread,
                )  # fmt: skip
            combine(top, total, value, share, work, x0)
            if rule == EXACT or record_exact.size:
                for g in range(n_groups):
                    row, sums, out = top[g], total[g], log_sum[g]
                    for i in range(BLOCK):
                        out[i] = row[i] + log(sums[i])
            if has_positive and matrix:
                matrix_groups(
                    now, alpha, sigma, p_groups, p_log_weight, p_mean,
                    p_norm_sq, centre, covariance[0, 0, 0], False, shifted, logits, work,
                    p_top, p_total, positive, trace, spread,
                )  # fmt: skip
            elif has_positive:
                block_groups(
                    now, p_groups, p_peak, p_moved, p_no_low, kind, p_precision, p_mean,
                    p_gain, True, False, logits, work, p_top, p_total, positive, trace, spread,
                )  # fmt: skip
            elif (
                rule == TOWARD
                or rule == PERPENDICULAR
                or rule == FEEDBACK
                or rule == TOWARD_BY_STEP
            ):
                copy(value[n_groups - 1], positive[0])
            if rule == PERPENDICULAR and len(p_groups) < 3:
                # The opposite of the rest is the forbidden concept.  If positive is everything,
                # there is no opposite, and equal predictions make the direction zero.
                copy(positive[0] if has_positive else value[0], positive[1])
            start, reference, led = x0, x0, x0
            if has_cfg:
                # Towards the positive prediction, which is that of all groups if `swapped`.
                for d in range(dimensions):
                    ours, theirs, out = x0[d], positive[0, d], started[d]
                    for i in range(BLOCK):
                        out[i] = toward(ours[i], theirs[i] - ours[i], cfg_factor)
                start = started
                if from_other:
                    reference = positive[0]
                if not swapped:
                    led = positive[0]
            if tracker != NO_TRACKER:
                tracked_odds(tracker, own_state, tracker_parameters[n, 4], odds)
            if rule == POINTWISE:
                own = 1 if has_cfg else 0
                if from_other:
                    pointwise_log_p(
                        parameters[1], p_top[own], p_total[own], p_top[:1], p_total[:1], odds[0]
                    )
                else:
                    pointwise_log_p(parameters[1], p_top[own], p_total[own], top, total, odds[0])
            if tracker == PATH or tracker == PATH_BASE:
                before = max(n - 1, 0)  # the step that led here
                divergences(alpha, sigma, share, value, x0, trace, spread, divergence)
                track_path(
                    tracker, tracker_parameters[before], n == 0, steps[n], now, x0, value, odds,
                    divergence, memory[b], work, own_state,
                )  # fmt: skip
                tracked_odds(tracker, own_state, tracker_parameters[n, 4], odds)
            if active[n]:
                guide(
                    rule, parameters, of_steps[n], n, -alpha / sigma, start, reference, led, x0,
                    beneath, value, share, log_sum, positive, points, odds, memory[b], work, scale,
                    guided,
                )  # fmt: skip
            else:
                copy(start, guided)
                fill(scale, 0.0)

            noise_shift, shift_sq = work[0], work[1]
            for i in range(BLOCK):
                noise_shift[i] = 0.0
                shift_sq[i] = 0.0
            for d in range(dimensions):
                out, mean_row, row = x_next[d], guided[d], now[d]
                if deviation > 0.0:
                    spare_pair[b] = noise_row(
                        seed, first_sample + np.uint64(b * BLOCK), n * dimensions + d,
                        STEP_STREAM, spare[b], spare_pair[b], z,
                    )  # fmt: skip
                    for i in range(BLOCK):
                        centre_next = step_mean(row[i], mean_row[i], x_factor, x0_factor)
                        out[i] = take_step(centre_next, deviation, z[i])
                    if weighed:
                        base = start[d]
                        for i in range(BLOCK):
                            shift = x0_factor * (mean_row[i] - base[i])
                            noise_shift[i] += z[i] * shift
                            shift_sq[i] += shift * shift
                else:
                    for i in range(BLOCK):
                        out[i] = step_mean(row[i], mean_row[i], x_factor, x0_factor)

            if weighed:
                row = log_ratio[b]
                for i in range(BLOCK):
                    row[i] = (
                        log_weight_of(noise_shift[i], shift_sq[i], deviation)
                        if deviation > 0.0
                        else 0.0
                    )
            store(now, record_x, n, first_lane + b * BLOCK)
            store(scale, record_scale, n, first_lane + b * BLOCK)
            store(own_state, record_state, n, first_lane + b * BLOCK)
            if record_exact.size:
                for i in range(BLOCK):
                    highest = log_sum[0, i]
                    for g in range(1, n_groups):
                        highest = max(highest, log_sum[g, i])
                    whole = 0.0
                    for g in range(n_groups):
                        whole += exp(log_sum[g, i] - highest)
                    for k in range(n_groups - 1):
                        record_exact[n, first_lane + b * BLOCK + i, k] = (
                            log_sum[k, i] - highest - log(whole)
                        )

            if PATH > tracker > NO_TRACKER and variances[n] > 0.0:
                if with_divergence:
                    divergences(alpha, sigma, share, value, x0, trace, spread, divergence)
                others = positive if tracker == RATIO else value
                score_factor = alpha / (sigma * sigma) / steps[n, 6]
                track(
                    tracker, tracker_parameters[n], variances[n], steps[n, 5], steps[n, 6],
                    with_divergence, score_factor, steps[n, 7], steps[n, 8], now, x_next, reference,
                    others, odds, divergence, work, own_state,
                )  # fmt: skip
            copy(x_next, now)
    if span[1] < len(steps):
        return
    for b in range(n_blocks):
        store(x[b], record_x, len(steps), first_lane + b * BLOCK)
        store(state[b], record_state, len(steps), first_lane + b * BLOCK)


@kernel
def chain(  # type: ignore[no-untyped-def]
    seed,
    first_sample,
    x,
    state,
    memory,
    log_ratio,
    first_step,
    last_step,
    steps,
    variances,
    active,
    of_steps,
    beneath,
    points,
    kind,
    matrix,
    groups,
    log_weight,
    mean,
    covariance,
    norm_sq,
    centre,
    positive_groups,
    positive_log_weight,
    positive_mean,
    positive_covariance,
    positive_norm_sq,
    rule,
    parameters,
    tracker,
    tracker_parameters,
    with_divergence,
    first_lane,
    record_x,
    record_scale,
    record_state,
    record_exact,
):
    """Run some steps for blocks x (blocks, D, BLOCK) and states (blocks, M, BLOCK), in place.

    Steps are first_step to last_step - 1.  memory (blocks, rows, BLOCK) is what rules and path
    trackers carry, zero before the first step.  log_ratio (blocks, BLOCK) receives the log ratio of
    densities of the last step, unless it is empty.  of_steps (N, 1) has what a rule reads of each
    step.  beneath (5,) says whether there is classifier-free guidance beneath the rule, its scale,
    whether the groups are the parts of its positive end, and whether the negative is measured from
    the other end than that of the groups, and whether contrastive CFG multiplies it by its positive
    factor.  points (K, D) are SPELL's.

    steps (N, 15) holds alpha_t, sigma_t, x_factor, x0_factor, sqrt(step_var), the transition's
    factors of x and x0, eta, beta_ts, and the six numbers of the way here (PathWay). variances (N,)
    are those the tracker divides by, tracker_parameters (N, 5) are as `track` takes them, and
    active (N,) marks the steps where the rule acts. groups holds the component boundaries of the
    concepts and, last, of the rest; positive_groups those of the positive, if it is not the rest,
    and for Perp-Neg of all other components. Records of all chunks have shape (N + 1, lanes, ...),
    record_scale (N, lanes, ...), or are empty; first_lane is the lane of this chunk's first sample.
    """
    n_blocks, dimensions, _ = x.shape
    concepts = state.shape[1]
    n_groups = len(groups) - 1
    components = len(log_weight)
    positives = len(positive_log_weight)
    largest = positives
    for g in range(n_groups):
        largest = max(largest, groups[g + 1] - groups[g])

    diffused = (
        np.empty(components),
        np.empty((components, dimensions)),
        np.zeros((components, dimensions)),
        np.empty(covariance.shape),
        np.empty(covariance.shape),
    )
    p_diffused = (
        np.empty(positives),
        np.empty((positives, dimensions)),
        np.zeros((positives, dimensions)),
        np.empty(positive_covariance.shape),
        np.empty(positive_covariance.shape),
    )
    rows = largest + 4 + dimensions
    rows += n_groups * (dimensions + 7) + 1
    rows += 2 * (dimensions + 2)
    rows += 4 * dimensions + 1 + 2 * concepts
    pool = aligned_pool(rows, first_lane // (n_blocks * BLOCK))
    at = 0
    scratch = (
        np.empty((2, dimensions, dimensions)),
        pool[at : at + largest],
        pool[at + largest : at + largest + 4],
        pool[at + largest + 4 : at + largest + 4 + dimensions],
    )
    at += largest + 4 + dimensions
    of_groups = (
        pool[at : at + n_groups],
        pool[at + n_groups : at + 2 * n_groups],
        pool[at + 6 * n_groups : at + (6 + dimensions) * n_groups].reshape(
            (n_groups, dimensions, BLOCK)
        ),
        pool[at + 2 * n_groups : at + 3 * n_groups],
        pool[at + 3 * n_groups : at + 4 * n_groups],
        pool[at + 4 * n_groups : at + 5 * n_groups],
        pool[at + 5 * n_groups : at + 6 * n_groups],
        pool[at + (6 + dimensions) * n_groups : at + (7 + dimensions) * n_groups + 1],
    )
    at += n_groups * (dimensions + 7) + 1
    of_positive = (
        pool[at : at + 2],
        pool[at + 2 : at + 4],
        pool[at + 4 : at + 4 + 2 * dimensions].reshape((2, dimensions, BLOCK)),
    )
    at += 2 * (dimensions + 2)
    of_samples = (
        pool[at : at + dimensions],
        pool[at + dimensions : at + 2 * dimensions],
        pool[at + 2 * dimensions : at + 3 * dimensions],
        pool[at + 3 * dimensions],
        pool[at + 3 * dimensions + 1 : at + 4 * dimensions + 1],
        pool[at + 4 * dimensions + 1 : at + 4 * dimensions + 1 + concepts],
        pool[at + 4 * dimensions + 1 + concepts : at + 4 * dimensions + 1 + 2 * concepts],
        np.empty((n_blocks, BLOCK)),
        np.full(n_blocks, -1),
    )
    advance(
        seed,
        first_sample,
        x,
        state,
        memory,
        log_ratio,
        (first_step, last_step),
        (steps, variances, active, of_steps, beneath, points),
        (kind, matrix, with_divergence),
        (groups, log_weight, mean, covariance, norm_sq, centre),
        (
            positive_groups,
            positive_log_weight,
            positive_mean,
            positive_covariance,
            positive_norm_sq,
        ),
        (rule, parameters, tracker, tracker_parameters),
        (first_lane, record_x, record_scale, record_state, record_exact),
        diffused,
        p_diffused,
        scratch,
        of_groups,
        of_positive,
        of_samples,
    )
