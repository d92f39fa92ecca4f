"""exp and erf without branches or calls, so that the compiler turns loops over them into vector instructions.

Their loops must not be compiled with "reassoc": exp rounds by adding a large number and taking it away again.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.extending import intrinsic, overload

SMALLEST = -87.0  # of an argument: e^-87 is float32's smallest normal number, and nothing beside a peak of 1


@intrinsic
def bits_of(typing_context, number):
    """The bits of a float, as an integer of its size."""
    integer = types.int64 if number == types.float64 else types.int32

    def cast(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return integer(number), cast


@intrinsic
def number_of(typing_context, bits):
    """The float that has these bits."""
    number = types.float64 if bits == types.int64 else types.float32

    def cast(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return number(bits), cast


def exp(x):
    """e^x for x in [-87, 0], to 2 units in the last place; below -87 as at -87."""
    return math.exp(max(x, SMALLEST))


@overload(exp)
def _exp(x):
    # x = n ln 2 + r with n whole: the sum with the large number has n in its last bits, and 2^n is made of them
    if x == types.float32:
        f = np.float32
        smallest, large, log2_e = f(SMALLEST), f(1.5 * 2**23), f(1 / math.log(2))
        ln_2, ln_2_rest = f(0.693359375), f(math.log(2) - 0.693359375)
        c7, c6, c5, c4, c3, c2, one = (f(1 / math.factorial(k)) for k in (7, 6, 5, 4, 3, 2, 1))
        bias, mantissa = np.int32(127), np.int32(23)

        def exp_32(x):
            x = max(x, smallest)
            shifted = x * log2_e + large
            n = shifted - large
            r = x - n * ln_2
            r = r - n * ln_2_rest
            p = c7 * r + c6
            p = p * r + c5
            p = p * r + c4
            p = p * r + c3
            p = p * r + c2
            p = p * r + one
            p = p * r + one
            return p * number_of(np.int32((bits_of(shifted) + bias) << mantissa))

        return exp_32
    c12, c11, c10, c9, c8, c7, c6, c5, c4, c3 = (1 / math.factorial(k) for k in range(12, 2, -1))
    large, log2_e = 1.5 * 2**52, 1 / math.log(2)
    ln_2, ln_2_rest = 6.93147180369123816490e-01, 1.90821492927058770002e-10
    bias, mantissa = np.int64(1023), np.int64(52)

    def exp_64(x):
        x = max(x, SMALLEST)
        shifted = x * log2_e + large
        n = shifted - large
        r = x - n * ln_2
        r = r - n * ln_2_rest
        p = c12 * r + c11
        p = p * r + c10
        p = p * r + c9
        p = p * r + c8
        p = p * r + c7
        p = p * r + c6
        p = p * r + c5
        p = p * r + c4
        p = p * r + c3
        p = p * r + 0.5
        p = p * r + 1.0
        p = p * r + 1.0
        return p * number_of((bits_of(shifted) + bias) << mantissa)

    return exp_64


def erf(x):
    """The error function; to 2e-7 in float32, exactly in float64."""
    return math.erf(x)


@overload(erf)
def _erf(x):
    if x != types.float32:
        return lambda x: math.erf(x)
    # an odd rational function of x on [-4, 4], beyond which erf is 1 to rounding
    f = np.float32
    limit = f(4)
    a13, a11, a9, a7 = (
        f(-2.72614225801306e-10),
        f(2.77068142495902e-08),
        f(-2.10102402082508e-06),
        f(-5.69250639462346e-05),
    )
    a5, a3, a1 = f(-7.34990630326855e-04), f(-2.95459980854025e-03), f(-1.60960333262415e-02)
    b8, b6, b4, b2, b0 = (
        f(-1.45660718464996e-05),
        f(-2.13374055278905e-04),
        f(-1.68282697438203e-03),
        f(-7.37332916720468e-03),
        f(-1.42647390514189e-02),
    )

    def erf_32(x):
        x = min(max(x, -limit), limit)
        s = x * x
        p = a13 * s + a11
        p = p * s + a9
        p = p * s + a7
        p = p * s + a5
        p = p * s + a3
        p = p * s + a1
        q = b8 * s + b6
        q = q * s + b4
        q = q * s + b2
        q = q * s + b0
        return x * p / q

    return erf_32
