"""A heap of the k best (score, position) a query has met: the worst of them stands first, ready to be replaced."""

from __future__ import annotations

from numba import njit


@njit(cache=True, nogil=True)
def worse(score, position, other_score, other_position):
    """Whether the first entry comes after the other: lower score, or the older of equals."""
    return score < other_score or (score == other_score and position < other_position)


@njit(cache=True, nogil=True)
def sift(scores, positions, root, size):
    """Restore the heap below `root`: no entry is worse than its parent."""
    while True:
        child = 2 * root + 1
        if child >= size:
            return
        if child + 1 < size and worse(scores[child + 1], positions[child + 1], scores[child], positions[child]):
            child += 1
        if not worse(scores[child], positions[child], scores[root], positions[root]):
            return
        scores[root], scores[child] = scores[child], scores[root]
        positions[root], positions[child] = positions[child], positions[root]
        root = child


@njit(cache=True, nogil=True)
def offer(score, position, scores, positions):
    """Put the entry in the place of the worst one, if it is better."""
    if worse(scores[0], positions[0], score, position):
        scores[0], positions[0] = score, position
        sift(scores, positions, 0, scores.shape[0])


@njit(cache=True, nogil=True)
def order(scores, positions):
    """Sort every heap (rows, k), best first."""
    for i in range(scores.shape[0]):
        heap, where = scores[i], positions[i]
        for last in range(heap.shape[0] - 1, 0, -1):
            heap[0], heap[last] = heap[last], heap[0]
            where[0], where[last] = where[last], where[0]
            sift(heap, where, 0, last)
