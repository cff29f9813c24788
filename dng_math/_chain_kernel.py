"""The fused chain: predictions, guidance, step, noise and tracker for one chunk of samples.

A chunk runs all steps before the next one starts, in blocks of BLOCK lanes that stay in cache,
so memory does not depend on the number of steps.  Lane ``i`` of a block always holds the
same sample (blocks start at multiples of BLOCK in the sample index) and lanes never mix, so a
sample's bits do not depend on which others are asked for.

Two ways to the predictions: loops over components (any covariances), and, for many points of
one bandwidth in many dimensions, two matrix products a block.
"""

from __future__ import annotations

import numpy as np

from dng_math import equations
from dng_math._codes import EXACT, FEEDBACK, NO_TRACKER, PERPENDICULAR, RATIO, SAFE, TOWARD
from dng_math._elementary import exp, log
from dng_math._jit import block_kernel, kernel, scalar
from dng_math._mixture_kernels import BLOCK, DIAGONAL, block_groups, exponentiate
from dng_math._rule_kernels import (
    copy,
    divergences,
    fill,
    guide,
    track,
    tracked_odds,
)
from dng_math.noise import INITIAL_STREAM, STEP_STREAM, normal_pair

PAGE = 512  # doubles

step_mean = scalar(equations.step_mean)
take_step = scalar(equations.step)


@block_kernel
def store(source, target, step, first):  # type: ignore[no-untyped-def]
    """target[step, first : first + BLOCK] = source (rows, BLOCK), where target is not empty."""
    if target.size:
        for d in range(source.shape[0]):
            for i in range(BLOCK):
                target[step, first + i, d] = source[d, i]


@block_kernel
def diffuse_parameters(  # type: ignore[no-untyped-def]
    alpha, sigma, kind, log_weight, mean, covariance, peak, diffused, precision, gain, scratch
):
    """Parameters of the mixture at (alpha, sigma), in place.

    covariance, precision and gain are (K, D, 1) or (K, D, D); scratch is (2, D, D).
    """
    components, dimensions = mean.shape
    variance = sigma * sigma
    for k in range(components):
        for d in range(dimensions):
            diffused[k, d] = alpha * mean[k, d]
        log_det = dimensions * 1.8378770664093453  # log 2 pi
        if kind == DIAGONAL:
            for d in range(dimensions):
                c = covariance[k, d, 0]
                v = alpha * alpha * c + variance
                precision[k, d, 0] = 1.0 / v
                gain[k, d, 0] = alpha * c / v
                log_det += log(v)
        else:
            lower, inverse = scratch[0], precision[k]
            for i in range(dimensions):
                for j in range(i + 1):
                    s = alpha * alpha * covariance[k, i, j]
                    if i == j:
                        s += variance
                    for e in range(j):
                        s -= lower[i, e] * lower[j, e]
                    if i == j:
                        lower[i, i] = np.sqrt(s)
                        log_det += log(s)
                    else:
                        lower[i, j] = s / lower[j, j]
            for j in range(dimensions):
                for i in range(dimensions):
                    inverse[i, j] = 0.0
                for i in range(j, dimensions):
                    s = 1.0 if i == j else 0.0
                    for e in range(j, i):
                        s -= lower[i, e] * inverse[e, j]
                    inverse[i, j] = s / lower[i, i]
            # gain = alpha C W^T W
            for i in range(dimensions):
                for j in range(dimensions):
                    s = 0.0
                    for e in range(dimensions):
                        s += covariance[k, i, e] * inverse[j, e]
                    scratch[1, i, j] = alpha * s
            for i in range(dimensions):
                for j in range(dimensions):
                    s = 0.0
                    for e in range(j, dimensions):
                        s += scratch[1, i, e] * inverse[e, j]
                    gain[k, i, j] = s
        peak[k] = log_weight[k] - 0.5 * log_det


@kernel
def matrix_groups(  # type: ignore[no-untyped-def]
    x,
    alpha,
    sigma,
    groups,
    log_weight,
    mean,
    norm_sq,
    centre,
    variance,
    with_trace,
    shifted,
    logits,
    work,
    top,
    total,
    value,
    trace,
    spread,
):
    """block_groups by two matrix products, for spherical components of one variance.

    mean (K, D) and norm_sq (K,) are relative to centre (D,), which keeps the squares small.
    The terms that all components share are left out of top.
    """
    dimensions = x.shape[0]
    v = alpha * alpha * variance + sigma * sigma
    gain = alpha * variance / v
    kept = sigma * sigma / v  # 1 - alpha gain
    for d in range(dimensions):
        shift, row, out = alpha * centre[d], x[d], shifted[d]
        for i in range(BLOCK):
            out[i] = (row[i] - shift) * (alpha / v)
    for g in range(len(groups) - 1):
        first, last = groups[g], groups[g + 1]
        rows = logits[: last - first]
        np.dot(mean[first:last], shifted, rows)
        highest = top[g]
        for i in range(BLOCK):
            highest[i] = -np.inf
        for k in range(last - first):
            c = log_weight[first + k] - norm_sq[first + k] * (0.5 * alpha * alpha / v)
            row = rows[k]
            for i in range(BLOCK):
                row[i] += c
                highest[i] = max(highest[i], row[i])
        exponentiate(rows, last - first, highest, total[g])
        np.dot(mean[first:last].T, rows, value[g])
        inverse, sums = work[2], total[g]
        for i in range(BLOCK):
            inverse[i] = 1.0 / sums[i]
        for d in range(dimensions):
            out = value[g, d]
            for i in range(BLOCK):
                out[i] *= inverse[i]
        if with_trace:
            sp, tr = spread[g], trace[g]
            for i in range(BLOCK):
                sp[i] = 0.0
                tr[i] = gain * dimensions
            for k in range(last - first):
                c, row = norm_sq[first + k], rows[k]
                for i in range(BLOCK):
                    sp[i] += row[i] * c
            for i in range(BLOCK):
                sp[i] *= inverse[i]
            for d in range(dimensions):
                row = value[g, d]
                for i in range(BLOCK):
                    sp[i] -= row[i] * row[i]
            for i in range(BLOCK):
                sp[i] *= kept * kept
        for d in range(dimensions):
            c, row, out = centre[d], x[d], value[g, d]
            for i in range(BLOCK):
                out[i] = kept * (out[i] + c) + gain * row[i]


@block_kernel
def noise_row(seed, first_sample, entry, stream, spare, spare_pair, out):  # type: ignore[no-untyped-def]
    """out[i] = entry of sample first_sample + i; returns the pair whose second lane is spare."""
    pair = entry >> 1
    if entry & 1 and spare_pair == pair:
        for i in range(BLOCK):
            out[i] = spare[i]
        return spare_pair
    for i in range(BLOCK):
        a, b = normal_pair(seed, first_sample + np.uint64(i), np.uint64(pair), np.uint64(stream))
        out[i] = a
        spare[i] = b
    if entry & 1:
        for i in range(BLOCK):
            out[i] = spare[i]
    return pair


@block_kernel
def combine(top, total, value, share, work, x0):  # type: ignore[no-untyped-def]
    """Posterior shares of the groups (G, BLOCK) and the prediction of the whole mixture."""
    n_groups, dimensions = value.shape[0], value.shape[1]
    if n_groups == 1:
        fill(share, 1.0)
        copy(value[0], x0)
        return
    highest, whole = work[0], work[1]
    if n_groups == 2:
        # The usual case, with one exponential: that of the larger group is 1.
        a, b, s, t, p, q = top[0], top[1], total[0], total[1], share[0], share[1]
        for i in range(BLOCK):
            e = exp(-abs(a[i] - b[i]))
            p[i] = s[i] * (1.0 if a[i] >= b[i] else e)
            q[i] = t[i] * (e if a[i] >= b[i] else 1.0)
            whole[i] = p[i] + q[i]
    else:
        for i in range(BLOCK):
            highest[i] = top[0, i]
            whole[i] = 0.0
        for g in range(1, n_groups):
            row = top[g]
            for i in range(BLOCK):
                highest[i] = max(highest[i], row[i])
        for g in range(n_groups):
            row, sums, out = top[g], total[g], share[g]
            for i in range(BLOCK):
                out[i] = sums[i] * exp(row[i] - highest[i])
                whole[i] += out[i]
    for i in range(BLOCK):
        whole[i] = 1.0 / whole[i]
    for g in range(n_groups):
        out = share[g]
        for i in range(BLOCK):
            out[i] *= whole[i]
    for d in range(dimensions):
        out = x0[d]
        row, weight = value[0, d], share[0]
        for i in range(BLOCK):
            out[i] = weight[i] * row[i]
        for g in range(1, n_groups):
            row, weight = value[g, d], share[g]
            for i in range(BLOCK):
                out[i] += weight[i] * row[i]


@kernel
def initial_noise(seed, first_sample, sigma, x):  # type: ignore[no-untyped-def]
    """x (D, BLOCK) = sigma z, from the stream of x_T."""
    spare = np.empty(BLOCK)
    pair = -1
    for d in range(x.shape[0]):
        pair = noise_row(seed, first_sample, d, INITIAL_STREAM, spare, pair, x[d])
        for i in range(BLOCK):
            x[d, i] *= sigma


@kernel
def aligned_pool(rows, chunk):  # type: ignore[no-untyped-def]
    """An uninitialised array (rows, BLOCK), on another page for every chunk.

    Measured, not understood: with buffers that start alike modulo a page two threads took as long
    as one (AMD EPYC); the likely reason is that the allocator gives every thread the same layout.
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
    """The loop of :func:`chain`, on what that has allocated; without reference counts.

    Counts of arrays that two threads allocated side by side share cache lines, and updating
    them would cost more than the arithmetic.
    """
    steps, variances, active = plan
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
    x0, guided, x_next, z, odds, scale, memory, spare, spare_pair = of_samples
    n_blocks, dimensions, _ = x.shape
    n_groups = len(groups) - 1
    has_positive = len(p_log_weight) > 0

    for n in range(len(steps)):
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
            elif rule == TOWARD or rule == PERPENDICULAR or rule == FEEDBACK:
                copy(value[n_groups - 1], positive[0])
            if rule == PERPENDICULAR and len(p_groups) < 3:
                # Opposite of the rest is the forbidden; of everything, nothing: no direction.
                copy(positive[0] if has_positive else value[0], positive[1])
            if tracker != NO_TRACKER:
                tracked_odds(tracker, own_state, tracker_parameters[n, 4], odds)
            if active[n]:
                guide(
                    rule, parameters, n, -alpha / sigma, x0, value, share, log_sum, positive,
                    odds, memory[b], work, scale, guided,
                )  # fmt: skip
            else:
                copy(x0, guided)
                fill(scale, 0.0)

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
                else:
                    for i in range(BLOCK):
                        out[i] = step_mean(row[i], mean_row[i], x_factor, x0_factor)

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

            if tracker != NO_TRACKER and variances[n] > 0.0:
                if with_divergence:
                    divergences(alpha, sigma, share, value, x0, trace, spread, divergence)
                others = positive if tracker == RATIO else value
                score_factor = alpha / (sigma * sigma) / steps[n, 6]
                track(
                    tracker, tracker_parameters[n], variances[n], steps[n, 5], steps[n, 6],
                    with_divergence, score_factor, steps[n, 7], steps[n, 8], now, x_next, x0,
                    others, odds, divergence, work, own_state,
                )  # fmt: skip
            copy(x_next, now)
    for b in range(n_blocks):
        store(x[b], record_x, len(steps), first_lane + b * BLOCK)
        store(state[b], record_state, len(steps), first_lane + b * BLOCK)


@kernel
def chain(  # type: ignore[no-untyped-def]
    seed,
    first_sample,
    x,
    state,
    steps,
    variances,
    active,
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
    """All steps for blocks x (blocks, D, BLOCK) with states (blocks, M, BLOCK), in place.

    steps (N, 9) holds alpha_t, sigma_t, x_factor, x0_factor, sqrt(step_var), the kernel's
    factors of x and x0, eta and beta_ts; variances (N,) is the tracker's, tracker_parameters
    (N, 5) are as `track` takes them, and active (N,) says where the rule acts.  groups bounds the
    concepts and, last, the rest; positive_groups bounds what is led to, where that is not the
    rest, and for Perp-Neg everything else.  The records of all chunks are (N + 1, lanes, ...),
    record_scale (N, lanes, ...), or empty; first_lane is the lane of this chunk's first sample.
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
    carried = dimensions if rule == SAFE else 0
    rows = largest + 4 + dimensions
    rows += n_groups * (dimensions + 7) + 1
    rows += 2 * (dimensions + 2)
    rows += 3 * dimensions + 1 + 2 * concepts
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
        pool[at + 3 * dimensions + 1 : at + 3 * dimensions + 1 + concepts],
        pool[at + 3 * dimensions + 1 + concepts : at + 3 * dimensions + 1 + 2 * concepts],
        np.zeros((n_blocks, carried, BLOCK)),
        np.empty((n_blocks, BLOCK)),
        np.full(n_blocks, -1),
    )
    advance(
        seed,
        first_sample,
        x,
        state,
        (steps, variances, active),
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
