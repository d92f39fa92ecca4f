"""Keys and queries as whole numbers of 7 or 8 bits, with what is needed to bound the error of a score made from them.

A key k is kept as k' = scale·code, a query q as q' = scale·code. By Cauchy-Schwarz

    |q·k - q'·k'|  <=  |q| |k - k'|  +  |q - q'| |k'|

so two numbers a key, `error` >= |k - k'| and `size` >= |k'|, and two a query bound every score's error. `error` also
takes in all rounding: of the float32 chain that defines the score, and of evaluating the bound itself.

Keys are coded less a `centre`, their mean as it once was: keys of attention have much in common, and what they have in
common adds the same to all scores of a query. So bounds are bounds on q·(k - centre), which rank keys as well.

The codes of a key are unsigned, shifted by OFFSET, and those of a query signed: that is what the CPU multiplies.
AVX-512 VNNI adds four products in 32 bits, where all fit. AVX2 adds two in 16 bits, and there the sums go on for a
CHUNK of words, two beside one another. They may wrap on the way, for they end at Σ code·code without the offset, and
that fits: scales are chosen so that the codes that meet in such a sum have norms of at most LIMIT, on both sides, and
LIMIT² < 2^15. For numbers that are spread as usual this costs nothing, since 6 or 7 bits are used as fully.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from . import machine

PACKED = 4  # components multiplied together, a word of 32 bits
HALVES = 1 if machine.dots() else 2  # sums a word of them has
CHUNK = 1 << 16 if machine.dots() else 16  # words added up before sums are widened
OFFSET, KEY_LEVELS, QUERY_LEVELS = (128, 127, 127) if machine.dots() else (80, 79, 103)  # 2·(80 + 79)·103 < 2^15
LIMIT = math.inf if machine.dots() else 181.0
ROUNDED = math.sqrt(CHUNK * PACKED / HALVES) / 2  # the most that rounding adds to the norm of the codes of a sum
LEAST, MOST = 2.0**-40, 2.0**40  # norms between which neither the codes nor the bound leave float32's normal range


def words_for(d: int) -> int:
    """Words that hold d components."""
    return -(-d // PACKED)


def centre_of(keys: np.ndarray) -> np.ndarray:
    """The mean (d,) of keys (m, d), in float64; 0 where it is out of range, or there are none."""
    mean = np.sum(keys, axis=0, dtype=np.float64) / max(len(keys), 1)
    return np.where(np.abs(mean) <= MOST, mean, 0.0)


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def coarseness(vector, levels):
    """The finest step to divide `vector`, whole words, by and round: codes are at most `levels`, and their sums fit.

    Each of a word's components has its own maximum and sum, so that they make a register.
    """
    a, b, c, d, most = 0.0, 0.0, 0.0, 0.0, 0.0
    for first in range(0, vector.shape[0], CHUNK * PACKED):
        aa, bb, cc, dd = 0.0, 0.0, 0.0, 0.0
        for at in range(first, min(first + CHUNK * PACKED, vector.shape[0]), PACKED):
            a, aa = max(a, abs(vector[at])), aa + vector[at] * vector[at]
            b, bb = max(b, abs(vector[at + 1])), bb + vector[at + 1] * vector[at + 1]
            c, cc = max(c, abs(vector[at + 2])), cc + vector[at + 2] * vector[at + 2]
            d, dd = max(d, abs(vector[at + 3])), dd + vector[at + 3] * vector[at + 3]
        most = max(most, aa + bb, cc + dd) if HALVES > 1 else 0.0
    return max(max(a, b, c, d) / levels, math.sqrt(most) / (LIMIT - ROUNDED))


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def encode_keys(keys, slots, centre, codes, scale, error, size):
    """Put keys (m, d), less the centre (d,), at `slots` (m,) of codes (panels, words, lanes x 4), scale, error and size

    (panels, lanes).

    A key out of range gets an infinite error: it is a candidate for every query.
    """
    lanes, d = scale.shape[1], keys.shape[1]
    slack = (d + 16) * 2.0**-23
    line, centred = np.full(codes.shape[1] * PACKED, OFFSET, np.uint8), np.zeros(codes.shape[1] * PACKED)
    words, line_words = codes.view(np.uint32), line.view(np.uint32)
    for i in range(keys.shape[0]):
        panel, lane = slots[i] // lanes, slots[i] % lanes
        norm = 0.0
        for c in range(d):
            x = np.float64(keys[i, c])
            centred[c], norm = x - centre[c], norm + x * x
        norm = math.sqrt(norm)
        fits = norm == 0 or LEAST <= norm <= MOST
        step = np.float32(coarseness(centred, KEY_LEVELS)) if fits else np.float32(0)
        inverse = 1 / np.float64(step) if step >= LEAST / KEY_LEVELS else 0.0
        missed, kept = 0.0, 0.0
        for c in range(d):
            code = np.rint(centred[c] * inverse)
            line[c] = np.uint8(np.int32(code) + np.int32(OFFSET))
            missed, kept = missed + (centred[c] - code * step) ** 2, kept + (code * step) ** 2
        for w in range(codes.shape[1]):
            words[panel, w, lane] = line_words[w]
        scale[panel, lane] = step
        kept = math.sqrt(kept)
        error[panel, lane] = (math.sqrt(missed) + slack * (norm + kept)) * (1 + 1e-6) if fits else np.inf
        size[panel, lane] = kept * (1 + 1e-6) if fits else 0.0


@njit(cache=True, nogil=True)
def encode_queries(queries, group_size, codes, starts, reach, slip):
    """Put queries (q, d) into codes (groups, words, group_size x 4), and of each, in units of its scale, the bounds of

    its norm, `reach`, and of what its codes miss beside its norm, `slip`; `starts` (q, chunks) is minus OFFSET times
    the sums of its codes. A query out of range gets an infinite slip.
    """
    totals = np.zeros(HALVES, np.int64)
    d = queries.shape[1]
    vector = np.zeros(codes.shape[1] * PACKED)
    for i in range(queries.shape[0]):
        group, place, norm = i // group_size, i % group_size, 0.0
        for c in range(d):
            vector[c] = queries[i, c]
            norm += vector[c] * vector[c]
        norm = math.sqrt(norm)
        if not LEAST <= norm <= MOST:
            starts[i], reach[i], slip[i] = 0, 1, np.inf
            continue
        step, missed = coarseness(vector, QUERY_LEVELS), 0.0
        for chunk in range(starts.shape[1]):
            totals[:] = 0
            for c in range(chunk * CHUNK * PACKED, min((chunk + 1) * CHUNK * PACKED, d)):
                code = np.rint(vector[c] / step)
                codes[group, c // PACKED, place * PACKED + c % PACKED] = np.int8(code)
                missed += (vector[c] - code * step) ** 2
                totals[c % PACKED * HALVES // PACKED] -= OFFSET * np.int64(code)
            starts[i, chunk] = side_by_side(totals)
        reach[i], slip[i] = norm / step * (1 + 1e-6), math.sqrt(missed) / norm * (1 + 1e-6)


@njit(cache=True, nogil=True)
def side_by_side(totals):
    """One number of 32 bits with one total, or with two, of 16 bits each, the first in its lower half."""
    if HALVES == 1:
        return np.int32(totals[0])
    word = (totals[1] & 0xFFFF) << 16 | (totals[0] & 0xFFFF)
    return np.int32(word - (word >> 31 << 32))
