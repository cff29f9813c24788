"""Exponential, logarithm, sine and cosine as branch-free double arithmetic.

A loop that calls the C library's functions stays scalar.  These are a few fused multiply-adds
each, so LLVM turns a loop over them into SIMD code (eight lanes with AVX-512), and they give the
same bits on every machine.  The polynomials interpolate at
Chebyshev nodes (errors below 5e-16 of a term that is itself small); each function is within
one unit in the last place, which the tests check against 50-digit references.
"""

from __future__ import annotations

import numpy as np

from dng_math._jit import bits_float, float_bits, fma, scalar

LOG2_E = 1.4426950408889634
LN2_HIGH = 0.6931471803691238  # 32 significant bits: n * LN2_HIGH is exact for |n| < 2^21
LN2_LOW = 1.9082149292705877e-10
ROUND = 6755399441055744.0  # 1.5 * 2^52: adding it leaves the nearest integer in the low bits
EXP_MIN = -708.0  # below, exp is subnormal and is flushed to zero
EXP_MAX = 709.0  # above, exp is capped: callers keep their arguments below


@scalar
def exp(x):  # type: ignore[no-untyped-def]
    """e^x for x <= 709; 0 below -708, e^709 above 709."""
    clipped = min(max(x, EXP_MIN), EXP_MAX)
    shifted = fma(clipped, LOG2_E, ROUND)
    n = shifted - ROUND
    r = fma(-n, LN2_LOW, fma(-n, LN2_HIGH, clipped))
    p = fma(r, 2.510038549551032e-08, 2.7620088445409746e-07)
    p = fma(r, p, 2.7557268459997064e-06)
    p = fma(r, p, 2.4801521295954376e-05)
    p = fma(r, p, 0.00019841269863053618)
    p = fma(r, p, 0.0013888888917213717)
    p = fma(r, p, 0.008333333333330062)
    p = fma(r, p, 0.04166666666662413)
    p = fma(r, p, 0.16666666666666669)
    p = fma(r, p, 0.5000000000000001)
    mantissa = 1.0 + fma(r * r, p, r)
    # The low bits of `shifted` hold n; moving them to the exponent field multiplies by 2^n.
    result = bits_float(float_bits(mantissa) + (float_bits(shifted) << np.uint64(52)))
    return result if x >= EXP_MIN else 0.0


@scalar
def log(x):  # type: ignore[no-untyped-def]
    """Natural logarithm of a positive normal double."""
    # Subtracting the bits of sqrt(1/2) rounds the exponent so that m lies in [0.707, 1.415).
    bits = float_bits(x) - np.uint64(0x3FE6A09E667F3BCD)
    exponent = np.int64(bits) >> np.int64(52)
    m = bits_float((bits & np.uint64(0x000FFFFFFFFFFFFF)) + np.uint64(0x3FE6A09E667F3BCD))
    n = np.float64(exponent)
    f = m - 1.0
    s = f / (2.0 + f)  # log(m) = 2 atanh(s)
    z = s * s
    p = fma(z, 0.14616585424888623, 0.15331710618210773)
    p = fma(z, p, 0.18182889455674947)
    p = fma(z, p, 0.22222211130259878)
    p = fma(z, p, 0.2857142862600327)
    p = fma(z, p, 0.39999999999899444)
    p = fma(z, p, 0.666666666666667)
    half_square = 0.5 * f * f
    tail = fma(s, fma(z, p, half_square), n * LN2_LOW)  # 2 atanh(s) = f - f^2/2 + s(f^2/2 + z p)
    return fma(n, LN2_HIGH, f - (half_square - tail))


@scalar
def sine_cosine_turn(bits):  # type: ignore[no-untyped-def]
    """(sin, cos) of 2 pi u, u = bits / 2^64, from the 64 bits of u."""
    quadrant = (bits + np.uint64(0x2000000000000000)) >> np.uint64(62)
    t = np.float64(np.int64(bits - (quadrant << np.uint64(62)))) * 5.421010862427522e-20
    w = t * t  # |t| <= 1/8: an eighth of a turn
    p = fma(w, 3.7808650697534167, -15.093804042841079)
    p = fma(w, p, 42.05868501748958)
    p = fma(w, p, -76.70585970425508)
    p = fma(w, p, 81.60524927594797)
    p = fma(w, p, -41.341702240399634)
    p = fma(w, p, 6.283185307179586)
    sine = t * p
    q = fma(w, -1.6990328650055457, 7.903206845861561)
    q = fma(w, q, -26.426253274804587)
    q = fma(w, q, 60.24464135269435)
    q = fma(w, q, -85.45681720664378)
    q = fma(w, q, 64.93939402266824)
    q = fma(w, q, -19.739208802178716)
    cosine = fma(w, q, 1.0)
    odd = (quadrant & np.uint64(1)) == np.uint64(1)
    s = cosine if odd else sine
    c = sine if odd else cosine
    # sin changes sign in quadrants 2 and 3, cos in 1 and 2; the sign bit is bit 63.
    s_sign = (quadrant & np.uint64(2)) << np.uint64(62)
    c_sign = ((quadrant + np.uint64(1)) & np.uint64(2)) << np.uint64(62)
    return bits_float(float_bits(s) ^ s_sign), bits_float(float_bits(c) ^ c_sign)
