"""Keys and queries as whole numbers of 7 or 8 bits, with what is needed to bound the error of a score made from them.

A key k is kept as k' = scale·code, a query q as q' = scale·code. By Cauchy-Schwarz

    |q·k - q'·k'|  <=  |q| |k - k'|  +  |q - q'| |k'|

so two numbers a key, `error` >= |k - k'| and `size` >= |k'|, and two a query bound every score's error. `error` also
takes in all rounding: of the float32 chain that defines the score, and of evaluating the bound itself.

The codes of a key are unsigned, shifted by OFFSET, and those of a query signed: that is what the CPU multiplies. With
7 bits a key, sums of two products fit 16 bits, which is what AVX2 adds; AVX-512 VNNI adds four in 32 bits, with 8.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from . import machine

OFFSET = 128 if machine.dots() else 64
KEY_LEVELS, QUERY_LEVELS = OFFSET - 1, 127
PACKED = 4  # components multiplied together, a word of 32 bits
LEAST, MOST = 2.0**-40, 2.0**40  # norms between which neither the codes nor the bound leave float32's normal range


@njit(cache=True, nogil=True)
def encode_keys(keys, slot, codes, scale, error, size):
    """Put keys (m, d) into codes (panels, words, lanes x 4), scale, error and size (panels, lanes) from `slot` on.

    A key out of range gets an infinite error: it is a candidate for every query.
    """
    lanes, d = scale.shape[1], keys.shape[1]
    slack = (d + 16) * 2.0**-23
    for i in range(keys.shape[0]):
        panel, lane = (slot + i) // lanes, (slot + i) % lanes
        largest, norm = 0.0, 0.0
        for c in range(d):
            x = np.float64(keys[i, c])
            largest, norm = max(largest, abs(x)), norm + x * x
        norm = math.sqrt(norm)
        fits = norm == 0 or LEAST <= norm <= MOST
        step = np.float32(largest / KEY_LEVELS) if fits and norm > 0 else np.float32(0)
        missed, kept = 0.0, 0.0
        for c in range(codes.shape[1] * PACKED):
            x = np.float64(keys[i, c]) if c < d else 0.0
            code = np.rint(x / step) if step > 0 else 0.0
            codes[panel, c // PACKED, lane * PACKED + c % PACKED] = np.uint8(np.int64(code) + OFFSET)
            missed, kept = missed + (x - code * step) ** 2, kept + (code * step) ** 2
        scale[panel, lane] = step
        error[panel, lane] = (math.sqrt(missed) + slack * norm) * (1 + 1e-6) if fits else np.inf
        size[panel, lane] = math.sqrt(kept) * (1 + 1e-6) if fits else 0.0


@njit(cache=True, nogil=True)
def encode_queries(queries, group_size, codes, sums, reach, slip):
    """Put queries (q, d) into codes (groups, words, group_size x 4), and of each, in units of its scale, the bounds of

    its norm, `reach`, and of what its codes miss, `slip`; `sums` is OFFSET times the sum of its codes. A query out of
    range gets an infinite slip.
    """
    for i in range(queries.shape[0]):
        group, place, d = i // group_size, i % group_size, queries.shape[1]
        largest, norm = 0.0, 0.0
        for c in range(d):
            x = np.float64(queries[i, c])
            largest, norm = max(largest, abs(x)), norm + x * x
        norm = math.sqrt(norm)
        sums[i] = 0
        if not LEAST <= norm <= MOST:
            reach[i], slip[i] = 1, np.inf
            continue
        step, missed, total = largest / QUERY_LEVELS, 0.0, 0
        for c in range(d):
            x = np.float64(queries[i, c])
            code = np.rint(x / step)
            codes[group, c // PACKED, place * PACKED + c % PACKED] = np.int8(code)
            missed, total = missed + (x - code * step) ** 2, total + np.int64(code)
        sums[i] = OFFSET * total
        reach[i], slip[i] = norm / step * (1 + 1e-6), math.sqrt(missed) / step * (1 + 1e-6)
