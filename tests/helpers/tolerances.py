"""All tolerances of the tests, each with its reason.

A tolerance bounds :func:`error`, which is relative for values above one and absolute below: the
accuracy of a value near zero depends on the size of the terms that cancelled.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# Float64 against 50 digits.  A log-density is a sum of D + 3 terms, each rounded to 1e-16 of
# itself.  The tolerance allows two digits for the number of terms, and two for their cancellation.
LOG_PROB = 1e-12

# log p(c|x) is a difference of two log-densities.  Where they are large and close, its error is
# 1e-16 of their size, not of its own: squared distances of 1e4 widths leave twelve digits.
LOG_POSTERIOR = 1e-10

# The score is the difference of a point and a mean, divided by a variance.  The subtraction cancels
# up to six digits at the smallest noise of the schedules.
SCORE = 1e-10

# A chain of 1000 steps in float64 against its transcription in NumPy.  The two round differently,
# and a step neither grows nor shrinks the difference much.  That makes 1000 times 1e-16, and four
# digits for the posterior, which multiplies the errors of a distance by 1/(2v), up to 1e4 in the
# last steps.
CHAIN = 1e-9

# One step in float64, or a thousand of them through smooth networks, against the transcription.
# The latter subtracts two squared norms of D v, divides by 2 v, and forms A from sigma_s^2 - V,
# which costs at most five of sixteen digits.
STEP = 1e-10

# One step in float32 against float64, in units of one rounding of its largest terms (the function
# ``rounding`` of tests/kernels/test_step.py).  The table's entry, the product, the sum and the
# exponential of a scale round once each; SLD's momentum takes five such operations.
STEP_UNITS = 8

# Log posteriors in float32 after 50 steps of 16,384 numbers a sample.  The rounding of the added
# products is random, so that a step costs 6e-8 of its log ratio; ten errors may have the same sign.
LOG_POSTERIOR_FLOAT32 = 1e-6

# A chain of 20 steps of an exact mixture in float64.  Both sides round differently at every step,
# and a difference grows by two digits while a sample is still between components.
WHOLE_CHAIN = 1e-11

# The same chain in float32: a step rounds by 6e-8 instead of 1e-16.
CHAIN_FLOAT32 = 1e-4

# Quadrature against closed forms or against 50 digits.  Gauss-Legendre panels converge to 1e-13;
# the rest is for functions of the integrals (a logarithm, a quantile) and for SciPy's quadrature.
QUADRATURE = 1e-9


def error(actual: Any, expected: Any) -> float:
    """Largest |actual - expected| / max(|expected|, 1); infinite when one is NaN.

    Equal infinities have no error.  ``expected`` is broadcast against ``actual``.
    """
    actual, expected = np.broadcast_arrays(
        np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    )
    with np.errstate(invalid="ignore"):
        gap = np.abs(actual - expected) / np.maximum(np.abs(expected), 1.0)
    gap = np.where(actual == expected, 0.0, gap)
    return float(np.where(np.isnan(gap), np.inf, gap).max(initial=0.0))
