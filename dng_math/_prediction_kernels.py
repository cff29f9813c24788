"""Compiled predictions of x0 by a mixture and by its groups, for blocks of samples."""

from __future__ import annotations

import numpy as np

from dng_math._elementary import exp, log
from dng_math._jit import block_kernel, kernel
from dng_math._mixture_kernels import BLOCK, DIAGONAL, exponentiate
from dng_math._rule_kernels import (
    copy,
    fill,
)
from dng_math.noise import normal_pair

PAGE = 512  # doubles in a memory page


@block_kernel
def store(source, target, step, first):  # type: ignore[no-untyped-def]
    """target[step, first : first + BLOCK] = source (rows, BLOCK), unless target is empty."""
    if target.size:
        for d in range(source.shape[0]):
            for i in range(BLOCK):
                target[step, first + i, d] = source[d, i]


@block_kernel
def diffuse_parameters(  # type: ignore[no-untyped-def]
    alpha, sigma, kind, log_weight, mean, covariance, peak, diffused, precision, gain, scratch
):
    """Write the parameters of the mixture at (alpha, sigma): peak, diffused, precision, gain.

    covariance, precision and gain are (K, D, 1) or (K, D, D); for full covariances precision
    holds the inverse Cholesky factor.  scratch is (2, D, D).
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
    """Do the work of block_groups by two matrix products, for spherical components of one variance.

    mean (K, D) and norm_sq (K,) are relative to centre (D,), which keeps the squares small.
    Terms that all components share are left out of top.
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
    """Set out[i] to the normal number ``entry`` of sample first_sample + i.

    Normals come in pairs: spare keeps the second ones, and the number of their pair is returned.
    """
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
        # The usual case needs one exponential only: that of the larger group is 1.
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
