"""Keys and queries as whole numbers of 7 or 8 bits, with what is needed to bound the error of a score made from them.

A key k is kept as k' = scale·code, a query q as q' = scale·code. By Cauchy-Schwarz

    |q·k - q'·k'|  <=  |q| |k - k'|  +  |q - q'| |k'|

so two numbers a key, `error` >= |k - k'| and `size` >= |k'|, and two a query bound every score's error. `error` also
takes in all rounding: of the float32 chain that defines the score, and of evaluating the bound itself.

Keys are coded less a `centre`, their mean as it once was: keys of attention have much in common, and what they have in
common adds the same to all scores of a query. So bounds are bounds on q·(k - centre), which rank keys as well.

The codes of a key are unsigned, shifted by OFFSET, and those of a query signed: that is what the CPU multiplies.
AVX-512 VNNI adds four products in 32 bits, and 8 bits serve both. AVX2 adds two in 16 bits, 127·63·2 with 7 bits, and
another two fit beside them, so that the costly step from 16 to 32 bits is taken half as often.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from . import machine

OFFSET = 128 if machine.dots() else 64
KEY_LEVELS, QUERY_LEVELS = OFFSET - 1, 127 if machine.dots() else 63
PACKED = 4  # components multiplied together, a word of 32 bits
TOGETHER = 1 if machine.dots() else 2  # words a step of the tile takes
LEAST, MOST = 2.0**-40, 2.0**40  # norms between which neither the codes nor the bound leave float32's normal range


def words_for(d: int) -> int:
    """Words that hold d components, in whole steps of the tile."""
    return -(-d // (PACKED * TOGETHER)) * TOGETHER


def centre_of(keys: np.ndarray) -> np.ndarray:
    """The mean (d,) of keys (m, d), in float64; 0 where it is out of range, or there are none."""
    mean = np.sum(keys, axis=0, dtype=np.float64) / max(len(keys), 1)
    return np.where(np.abs(mean) <= MOST, mean, 0.0)


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def encode_keys(keys, slots, centre, codes, scale, error, size):
    """Put keys (m, d), less the centre (d,), at `slots` (m,) of codes (panels, words, lanes x 4), scale, error and size

    (panels, lanes).

    A key out of range gets an infinite error: it is a candidate for every query.
    """
    lanes, d = scale.shape[1], keys.shape[1]
    slack = (d + 16) * 2.0**-23
    line = np.full(codes.shape[1] * PACKED, OFFSET, np.uint8)
    words, line_words = codes.view(np.uint32), line.view(np.uint32)
    for i in range(keys.shape[0]):
        panel, lane = slots[i] // lanes, slots[i] % lanes
        largest, norm = 0.0, 0.0
        for c in range(d):
            x = np.float64(keys[i, c])
            largest, norm = max(largest, abs(x - centre[c])), norm + x * x
        norm = math.sqrt(norm)
        fits = norm == 0 or LEAST <= norm <= MOST
        step = np.float32(largest / KEY_LEVELS) if fits and largest >= LEAST else np.float32(0)
        inverse = 1 / np.float64(step) if step > 0 else 0.0
        missed, kept = 0.0, 0.0
        for c in range(d):
            x = np.float64(keys[i, c]) - centre[c]
            code = np.rint(x * inverse)
            line[c] = np.uint8(np.int32(code) + np.int32(OFFSET))
            missed, kept = missed + (x - code * step) ** 2, kept + (code * step) ** 2
        for w in range(codes.shape[1]):
            words[panel, w, lane] = line_words[w]
        scale[panel, lane] = step
        kept = math.sqrt(kept)
        error[panel, lane] = (math.sqrt(missed) + slack * (norm + kept)) * (1 + 1e-6) if fits else np.inf
        size[panel, lane] = kept * (1 + 1e-6) if fits else 0.0


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
