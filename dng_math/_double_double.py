"""Double-double arithmetic: a number as the exact sum of two doubles, about 32 digits.

Far from a narrow component the squared distances are of order 1e24, and a posterior needs their
difference.  In double precision that is rounding noise; here its error is about 1e-7 nats (Dekker
1971; Hida, Li and Bailey 2001, "sloppy" sums replaced by accurate ones).
"""

from __future__ import annotations

from dng_math._jit import fma, scalar


@scalar
def two_sum(a, b):  # type: ignore[no-untyped-def]
    """a + b exactly."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


@scalar
def quick_two_sum(a, b):  # type: ignore[no-untyped-def]
    """a + b exactly, for |a| >= |b|."""
    s = a + b
    return s, b - (s - a)


@scalar
def two_product(a, b):  # type: ignore[no-untyped-def]
    """a * b exactly."""
    p = a * b
    return p, fma(a, b, -p)


@scalar
def add(a, a_low, b, b_low):  # type: ignore[no-untyped-def]
    """Sum of two double-doubles."""
    s, e = two_sum(a, b)
    t, f = two_sum(a_low, b_low)
    s, e = quick_two_sum(s, e + t)
    return quick_two_sum(s, e + f)


@scalar
def multiply(a, a_low, b, b_low):  # type: ignore[no-untyped-def]
    """Product of two double-doubles."""
    p, e = two_product(a, b)
    return quick_two_sum(p, e + (a * b_low + a_low * b))


@scalar
def divide(a, a_low, b, b_low):  # type: ignore[no-untyped-def]
    """Quotient of two double-doubles, by two corrections of the double quotient."""
    q1 = a / b
    p, e = multiply(q1, 0.0, b, b_low)
    r, r_low = add(a, a_low, -p, -e)
    q2 = r / b
    p, e = multiply(q2, 0.0, b, b_low)
    r, r_low = add(r, r_low, -p, -e)
    q, e = quick_two_sum(q1, q2)
    return add(q, e, r / b, 0.0)


@scalar
def square_root(a, a_low):  # type: ignore[no-untyped-def]
    """Square root of a positive double-double, by one Newton step (Karp and Markstein 1997)."""
    x = a**0.5
    p, e = two_product(x, x)
    r, _ = add(a, a_low, -p, -e)
    return quick_two_sum(x, r / (2.0 * x))
