"""The loops under :class:`dng_math.GaussianMixture`.

Components come sorted into groups (a forbidden concept, the rest, ...).  For every point and
group a kernel computes the log-sum-exp of the log joint densities, and the mean of
``base_k + gain_k (x - m_k)`` under the group's responsibilities.  That mean is the score for base 0
and gain minus the precision; it is the posterior mean of x0 for base the mean of x0 and gain
alpha C (alpha^2 C + sigma^2)^-1.

``block_groups`` works on BLOCK points at a time, one per lane, so that every loop over lanes is
SIMD code.  ``refined_groups`` does the same in double-double, for points whose squared distances
are so large that double precision loses their differences.
"""

from __future__ import annotations

import numpy as np

from dng_math import _double_double as dd
from dng_math._elementary import exp, log
from dng_math._jit import block_kernel, kernel

BLOCK = 256  # lanes: enough to amortise the bookkeeping of a loop, few enough to stay in cache
DIAGONAL, FULL = 0, 1  # spherical components are diagonal ones with equal entries


@block_kernel
def block_logits(  # type: ignore[no-untyped-def]
    x, log_weight, mean, mean_low, kind, precision, first, last, logits, top, work
):
    """logits[k - first] = log w_k N(x; m_k, C_k) for first <= k < last, and their maximum."""
    dimensions = x.shape[0]
    square, u = work[0], work[1]
    for k in range(first, last):
        c, out = log_weight[k], logits[k - first]
        if kind == DIAGONAL:
            m, low, p, row = mean[k, 0], mean_low[k, 0], precision[k, 0, 0], x[0]
            for i in range(BLOCK):
                v = (row[i] - m) - low
                square[i] = p * (v * v)
            for d in range(1, dimensions):
                m, low, p, row = mean[k, d], mean_low[k, d], precision[k, d, 0], x[d]
                for i in range(BLOCK):
                    v = (row[i] - m) - low
                    square[i] += p * (v * v)
        else:
            for i in range(BLOCK):
                square[i] = 0.0
            for d in range(dimensions):
                # precision holds the inverse Cholesky factor W: |W (x - m)|^2.
                for i in range(BLOCK):
                    u[i] = 0.0
                for e in range(d + 1):
                    m, low, p, row = mean[k, e], mean_low[k, e], precision[k, d, e], x[e]
                    for i in range(BLOCK):
                        u[i] += p * ((row[i] - m) - low)
                for i in range(BLOCK):
                    square[i] += u[i] * u[i]
        if k == first:
            for i in range(BLOCK):
                out[i] = c - 0.5 * square[i]
                top[i] = out[i]
        else:
            for i in range(BLOCK):
                out[i] = c - 0.5 * square[i]
                top[i] = max(top[i], out[i])


@block_kernel
def exponentiate(logits, count, top, total):  # type: ignore[no-untyped-def]
    """Turn logits into weights e^(logit - top), with their sum; log-sum-exp = top + log total."""
    row = logits[0]
    if count == 1:
        for i in range(BLOCK):
            row[i] = 1.0
            total[i] = 1.0
        return
    for i in range(BLOCK):
        row[i] = exp(row[i] - top[i])
        total[i] = row[i]
    for k in range(1, count):
        row = logits[k]
        for i in range(BLOCK):
            row[i] = exp(row[i] - top[i])
            total[i] += row[i]


@block_kernel
def component_value(x, mean, mean_low, kind, base, gain, k, d, out):  # type: ignore[no-untyped-def]
    """out = (base_k + gain_k (x - m_k))_d."""
    b = base[k, d]
    if kind == DIAGONAL:
        m, low, g, row = mean[k, d], mean_low[k, d], gain[k, d, 0], x[d]
        for i in range(BLOCK):
            out[i] = b + g * ((row[i] - m) - low)
    else:
        for i in range(BLOCK):
            out[i] = b
        for e in range(x.shape[0]):
            m, low, g, row = mean[k, e], mean_low[k, e], gain[k, d, e], x[e]
            for i in range(BLOCK):
                out[i] += g * ((row[i] - m) - low)


@block_kernel
def block_groups(  # type: ignore[no-untyped-def]
    x,
    groups,
    log_weight,
    mean,
    mean_low,
    kind,
    precision,
    base,
    gain,
    with_value,
    with_trace,
    logits,
    work,
    top,
    total,
    value,
    trace,
    spread,
):
    """Log-sum-exps and mean values of all groups for one block of points, lanes last.

    Shapes: x (D, BLOCK); groups (G + 1,) boundaries; log_weight (K,), including -log det / 2;
    mean, mean_low, base (K, D); precision, gain (K, D, 1) or (K, D, D); logits
    (largest group, BLOCK) and work (4, BLOCK) scratch; top and total (G, BLOCK), value
    (G, D, BLOCK), trace and spread (G, BLOCK) results.  The log-sum-exp is top + log total,
    trace is the mean of tr gain_k and spread that of |value_k - value|^2.
    """
    dimensions = x.shape[0]
    inverse, component = work[2], work[3]
    for g in range(len(groups) - 1):
        first, last = groups[g], groups[g + 1]
        count = last - first
        highest, sums = top[g], total[g]
        block_logits(
            x, log_weight, mean, mean_low, kind, precision, first, last, logits, highest, work
        )
        exponentiate(logits, count, highest, sums)
        if not with_value:
            continue
        if count > 1:
            for i in range(BLOCK):
                inverse[i] = 1.0 / sums[i]
        else:
            for i in range(BLOCK):
                inverse[i] = 1.0
        for d in range(dimensions):
            out = value[g, d]
            for i in range(BLOCK):
                out[i] = 0.0
            for k in range(count):
                weight = logits[k]
                b = base[first + k, d]
                if kind == DIAGONAL:
                    m, low, row = mean[first + k, d], mean_low[first + k, d], x[d]
                    slope = gain[first + k, d, 0]
                    for i in range(BLOCK):
                        out[i] += weight[i] * (b + slope * ((row[i] - m) - low))
                else:
                    component_value(x, mean, mean_low, kind, base, gain, first + k, d, component)
                    for i in range(BLOCK):
                        out[i] += weight[i] * component[i]
            for i in range(BLOCK):
                out[i] *= inverse[i]
        if not with_trace:
            continue
        tr, sp = trace[g], spread[g]
        for i in range(BLOCK):
            tr[i] = 0.0
            sp[i] = 0.0
        for k in range(count):
            row = logits[k]
            t = 0.0
            for d in range(dimensions):
                t += gain[first + k, d, 0 if kind == DIAGONAL else d]
            for i in range(BLOCK):
                tr[i] += row[i] * t
            for d in range(dimensions):
                component_value(x, mean, mean_low, kind, base, gain, first + k, d, component)
                out = value[g, d]
                for i in range(BLOCK):
                    difference = component[i] - out[i]
                    sp[i] += row[i] * (difference * difference)
        for i in range(BLOCK):
            tr[i] *= inverse[i]
            sp[i] *= inverse[i]


@kernel
def evaluate(  # type: ignore[no-untyped-def]
    x,
    groups,
    log_weight,
    mean,
    mean_low,
    kind,
    precision,
    base,
    gain,
    with_value,
    with_trace,
    log_sum,
    value,
    trace,
    spread,
):
    """Run block_groups on points x (N, D).

    Results: log_sum (G, N), value (G, N, D), trace and spread (G, N).
    """
    n, dimensions = x.shape
    n_groups = len(groups) - 1
    largest = 0
    for g in range(n_groups):
        largest = max(largest, groups[g + 1] - groups[g])
    logits = np.empty((largest, BLOCK))
    work = np.empty((4, BLOCK))
    lanes = np.empty((dimensions, BLOCK))
    top, total = np.empty((n_groups, BLOCK)), np.empty((n_groups, BLOCK))
    block_value = np.empty((n_groups, dimensions, BLOCK))
    block_trace = np.empty((n_groups, BLOCK))
    block_spread = np.empty((n_groups, BLOCK))
    for start in range(0, n, BLOCK):
        count = min(BLOCK, n - start)
        for d in range(dimensions):
            for i in range(count):
                lanes[d, i] = x[start + i, d]
            for i in range(count, BLOCK):
                lanes[d, i] = x[start, d]
        block_groups(
            lanes,
            groups,
            log_weight,
            mean,
            mean_low,
            kind,
            precision,
            base,
            gain,
            with_value,
            with_trace,
            logits,
            work,
            top,
            total,
            block_value,
            block_trace,
            block_spread,
        )
        for g in range(n_groups):
            for i in range(count):
                log_sum[g, start + i] = top[g, i] + log(total[g, i])
            if with_value:
                for d in range(dimensions):
                    for i in range(count):
                        value[g, start + i, d] = block_value[g, d, i]
            if with_trace:
                for i in range(count):
                    trace[g, start + i] = block_trace[g, i]
                    spread[g, start + i] = block_spread[g, i]


@kernel
def inverse_factors(cov, cov_low, factor, factor_low, log_det):  # type: ignore[no-untyped-def]
    """Compute W = L^-1, with C = L L^T, and log det C in double-double.

    cov and factor have shape (K, D, D), log_det (K,).  Returns the index of the first C that is
    not positive definite, or -1 if all are.
    """
    components, dimensions, _ = cov.shape
    low = np.empty((dimensions, dimensions, 2))
    for k in range(components):
        log_det[k] = 0.0
        for i in range(dimensions):
            for j in range(i + 1):
                s, t = cov[k, i, j], cov_low[k, i, j]
                for e in range(j):
                    p, q = dd.multiply(low[i, e, 0], low[i, e, 1], low[j, e, 0], low[j, e, 1])
                    s, t = dd.add(s, t, -p, -q)
                if i == j:
                    if not s > 0.0:
                        return k
                    log_det[k] += np.log(s) + t / s
                    low[i, i, 0], low[i, i, 1] = dd.square_root(s, t)
                else:
                    low[i, j, 0], low[i, j, 1] = dd.divide(s, t, low[j, j, 0], low[j, j, 1])
        for j in range(dimensions):
            for i in range(j):
                factor[k, i, j] = 0.0
                factor_low[k, i, j] = 0.0
            for i in range(j, dimensions):
                s, t = (1.0, 0.0) if i == j else (0.0, 0.0)
                for e in range(j, i):
                    p, q = dd.multiply(
                        low[i, e, 0], low[i, e, 1], factor[k, e, j], factor_low[k, e, j]
                    )
                    s, t = dd.add(s, t, -p, -q)
                factor[k, i, j], factor_low[k, i, j] = dd.divide(s, t, low[i, i, 0], low[i, i, 1])
    return -1


@kernel
def precisions(cov, cov_low, factor, factor_low, precision, shrink):  # type: ignore[no-untyped-def]
    """Compute P = W^T W and C P in double-double, rounded at the end; all arrays (K, D, D).

    C commutes with the matrix that W belongs to, so C P is symmetric.  The terms of its entries
    can be larger than the result by the condition number, and double precision would lose it.
    """
    components, dimensions, _ = cov.shape
    p = np.empty((dimensions, dimensions, 2))
    for k in range(components):
        for i in range(dimensions):
            for j in range(i + 1):
                s, t = 0.0, 0.0
                for e in range(i, dimensions):
                    a, b = dd.multiply(
                        factor[k, e, i], factor_low[k, e, i], factor[k, e, j], factor_low[k, e, j]
                    )
                    s, t = dd.add(s, t, a, b)
                p[i, j, 0], p[i, j, 1] = s, t
                p[j, i, 0], p[j, i, 1] = s, t
                precision[k, i, j] = s
                precision[k, j, i] = s
        for i in range(dimensions):
            for j in range(i + 1):
                s, t = 0.0, 0.0
                for e in range(dimensions):
                    a, b = dd.multiply(cov[k, i, e], cov_low[k, i, e], p[e, j, 0], p[e, j, 1])
                    s, t = dd.add(s, t, a, b)
                shrink[k, i, j] = s
                shrink[k, j, i] = s


@kernel
def refined_groups(  # type: ignore[no-untyped-def]
    x,
    groups,
    log_weight,
    mean,
    mean_low,
    kind,
    variance,
    variance_low,
    with_score,
    top,
    log_sum,
    score,
    trace,
    spread,
):
    """Log-sum-exps, scores and their divergences with squared distances in double-double.

    variance is (K, D, 1) for diagonal components, the inverse Cholesky factor (K, D, D) for
    full ones.  top (N,) is the largest log joint density and log_sum (G, N) is relative to
    it, so that differences keep the accuracy of double-double.
    """
    n, dimensions = x.shape
    components = len(log_weight)
    square = np.empty((components, 2))
    z = np.empty((dimensions, 2))
    logit = np.empty(components)
    own = np.empty((components, dimensions))
    for i in range(n):
        best = 0
        for k in range(components):
            s, t = 0.0, 0.0
            for d in range(dimensions):
                if kind == DIAGONAL:
                    a, b = dd.two_sum(x[i, d], -mean[k, d])
                    a, b = dd.add(a, b, -mean_low[k, d], 0.0)
                    p, q = dd.multiply(a, b, a, b)
                    p, q = dd.divide(p, q, variance[k, d, 0], variance_low[k, d, 0])
                    if with_score:
                        own[k, d] = -a / variance[k, d, 0]
                else:
                    p, q = 0.0, 0.0
                    for e in range(d + 1):
                        a, b = dd.two_sum(x[i, e], -mean[k, e])
                        a, b = dd.add(a, b, -mean_low[k, e], 0.0)
                        a, b = dd.multiply(a, b, variance[k, d, e], variance_low[k, d, e])
                        p, q = dd.add(p, q, a, b)
                    z[d, 0], z[d, 1] = p, q
                    p, q = dd.multiply(p, q, p, q)
                s, t = dd.add(s, t, p, q)
            if with_score and kind == FULL:
                for d in range(dimensions):
                    p, q = 0.0, 0.0
                    for e in range(d, dimensions):
                        a, b = dd.multiply(
                            z[e, 0], z[e, 1], variance[k, e, d], variance_low[k, e, d]
                        )
                        p, q = dd.add(p, q, a, b)
                    own[k, d] = -p
            square[k, 0], square[k, 1] = s, t
            if log_weight[k] - 0.5 * s > log_weight[best] - 0.5 * square[best, 0]:
                best = k
        top[i] = log_weight[best] - 0.5 * square[best, 0]
        for k in range(components):
            a, b = dd.add(square[best, 0], square[best, 1], -square[k, 0], -square[k, 1])
            logit[k] = 0.5 * a + (log_weight[k] - log_weight[best])
        for g in range(len(groups) - 1):
            largest = -np.inf
            for k in range(groups[g], groups[g + 1]):
                largest = max(largest, logit[k])
            total = 0.0
            for k in range(groups[g], groups[g + 1]):
                total += np.exp(logit[k] - largest)
            log_sum[g, i] = largest + np.log(total)
            if not with_score:
                continue
            for d in range(dimensions):
                score[g, i, d] = 0.0
            trace[g, i] = 0.0
            spread[g, i] = 0.0
            for k in range(groups[g], groups[g + 1]):
                r = np.exp(logit[k] - largest) / total
                for d in range(dimensions):
                    score[g, i, d] += r * own[k, d]
                    if kind == DIAGONAL:
                        trace[g, i] -= r / variance[k, d, 0]
                    else:
                        for e in range(d + 1):
                            trace[g, i] -= r * variance[k, d, e] * variance[k, d, e]
            for k in range(groups[g], groups[g + 1]):
                r = np.exp(logit[k] - largest) / total
                for d in range(dimensions):
                    spread[g, i] += r * (own[k, d] - score[g, i, d]) ** 2
