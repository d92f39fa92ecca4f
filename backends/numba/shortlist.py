"""Exact search of many queries in a few thousand keys: all scores of some queries at once, then the best picked out.

Where keys are few, so many of them are among the k best of those visited so far that a scan which stops at each would
spend more time on them than on the scores. Here the scores of a query are kept until all are there. The k-th largest of
the maxima of disjoint sets of keys is a bound that k keys are sure to reach and few others do: those few are sorted.
"""

from __future__ import annotations

import numpy as np
from numba import config, njit, types
from numba.extending import intrinsic

from .panels import grouped
from .scan import below, many, many_l2
from .tile import MANY, highest_bit
from .vectors import Vectors

LONGEST = 1 << 14  # keys up to which this is faster than a scan, whose sums never leave the registers
RESIDENT = 1 << 18  # bytes of scores that stay in the second-level cache until they are looked through
WORD = 64  # scores compared at once, a bit each
HALVINGS = 12  # of the range that the k-th largest maximum lies in


def sets(k: int) -> int:
    """Disjoint sets of keys whose maxima are looked at: so many that few of the k best share one."""
    return -(-4 * k // WORD) * WORD


def worthwhile(queries: int, stored: int, k: int) -> bool:
    """Whether `shortlisted` is the way to find the k best of so many keys."""
    return queries > MANY[1] and 2 * sets(k) <= stored <= LONGEST


def shortlisted(
    queries: np.ndarray, panels: np.ndarray, scales: np.ndarray, stored: int, start: int, k: int, l2: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ages (q, k), best first, ties to the newest, of keys that are a ring whose oldest is at `start`."""
    q, size = queries.shape[0], MANY[1]
    best, places = np.empty((q, k), queries.dtype), np.empty((q, k), np.int64)
    together = max(RESIDENT // (size * stored * queries.itemsize), 1)
    pick(panels, scales, stored, start, grouped(queries, size), together, sets(k), best, places, l2)
    return best, places


@intrinsic
def compiled_reached(typing, scores, first, bound):
    """A word with one bit for each of the WORD scores from `first` on that is at least `bound`."""

    def generate(context, builder, signature, args):
        vectors = Vectors(builder, context.get_value_type(signature.args[0].dtype), WORD)
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        some = vectors.load(vectors.at(data, args[1]))
        return vectors.bits(builder.fcmp_ordered(">=", some, vectors.spread(args[2])))

    return types.int64(scores, types.int64, scores.dtype), generate


def plain_reached(scores, first, bound):
    some = scores[first : first + WORD] >= bound
    return int(np.uint64(sum(1 << int(lane) for lane in np.flatnonzero(some))).astype(np.int64))


@intrinsic
def compiled_raise_to(typing, maxima, at, scores, first):
    """Raise WORD of `maxima`, from `at` on, to the scores from `first` on where these are larger."""

    def generate(context, builder, signature, args):
        vectors = Vectors(builder, context.get_value_type(signature.args[0].dtype), WORD)
        held, new = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2))
        here = vectors.at(held, args[1])
        before, after = vectors.load(here), vectors.load(vectors.at(new, args[3]))
        vectors.store(builder.select(builder.fcmp_ordered(">", after, before), after, before), here)
        return context.get_dummy_value()

    return types.void(maxima, types.int64, scores, types.int64), generate


def plain_raise_to(maxima, at, scores, first):
    some = maxima[at : at + WORD]
    np.maximum(some, scores[first : first + WORD], out=some)


reached = plain_reached if config.DISABLE_JIT else compiled_reached
raise_to = plain_raise_to if config.DISABLE_JIT else compiled_raise_to


@njit(cache=True, nogil=True)
def reached_by(maxima, k):
    """A number that at least k of `maxima` reach, and as a rule no more than a few others."""
    low, high = maxima[0], maxima[0]
    for i in range(maxima.shape[0]):
        low, high = min(low, maxima[i]), max(high, maxima[i])
    half = maxima.dtype.type(0.5)
    for _ in range(HALVINGS):
        middle = half * low + half * high
        count = 0
        for i in range(maxima.shape[0]):
            count += maxima[i] >= middle
        if count >= k:
            low = middle
        else:
            high = middle
        if count == k:
            break
    return low


@njit(cache=True, nogil=True)
def pick(panels, scales, stored, start, groups, together, sets, best, places, l2):
    """Fill best and places (q, k) with scores and ages of the k best of the keys in slots below `stored`, best first.

    The keys are a ring whose oldest is at slot `start`. `together` groups of queries are scored at once.
    """
    queries, span = MANY[1], MANY[0] * panels.shape[2]
    columns = -(-stored // sets) * sets
    scores = np.empty((together * queries, max(columns, -(-stored // span) * span)), groups.dtype)
    tile, hits = np.empty(queries * span, groups.dtype), np.empty(queries, np.int64)
    bounds = np.full(groups.shape[0] * queries, -np.inf, groups.dtype)
    maxima = np.empty(sets, groups.dtype)
    for first in range(0, groups.shape[0], together):
        last = min(first + together, groups.shape[0])
        for block in range(-(-stored // span)):
            for group in range(first, last):
                if l2:
                    many_l2(panels, scales, block * MANY[0], groups, group, bounds, tile, hits)
                else:
                    many(panels, scales, block * MANY[0], groups, group, bounds, tile, hits)
                for j in range(queries):
                    row = scores[(group - first) * queries + j]
                    for lane in range(span):
                        row[block * span + lane] = tile[j * span + lane]
        for i in range(first * queries, min(last * queries, best.shape[0])):
            row = scores[i - first * queries]
            row[stored:] = -np.inf
            maxima[:] = row[:sets]
            for low in range(sets, columns, sets):
                for c in range(0, sets, WORD):
                    raise_to(maxima, c, row, low + c)
            bound = reached_by(maxima, best.shape[1])
            best[i] = -np.inf
            collect(row, 0, start, stored - start, bound, best[i], places[i])
            collect(row, start, stored, -start, bound, best[i], places[i])


@njit(cache=True, nogil=True)
def collect(row, low, high, shift, bound, scores, positions):
    """Sort in the scores of a `row`, those in slots low <= s < high, at positions s + shift, that reach the bound.

    The newest come first and an entry moves up past lower scores only, so of equal scores the newest stays ahead.
    """
    last = scores.shape[0] - 1
    for first in range((high - 1) // WORD * WORD, low - WORD, -WORD):
        word = reached(row, first, bound) & below(high - first) & ~below(max(low - first, 0))
        while word != 0:
            lane = highest_bit(word)
            word &= below(lane)
            score = row[first + lane]
            if score > scores[last]:
                at = last
                while at > 0 and scores[at - 1] < score:
                    scores[at], positions[at] = scores[at - 1], positions[at - 1]
                    at -= 1
                scores[at], positions[at] = score, first + lane + shift
