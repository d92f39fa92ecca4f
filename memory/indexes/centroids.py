"""Centroids of a head's keys: k-means (Lloyd 1982) on a sample, started from the centroids there were.

Where queries ask for inner products, a key belongs to the centroid with which its own is largest, and centroids have
norm 1 (Dhillon & Modha, "Concept decompositions for large sparse text data using clustering", 2001): a query whose
product with a centroid is large has large ones with that centroid's keys, whatever their norms.
"""

from __future__ import annotations

import numpy as np

from ...core.retrieval import unit

BLOCK = 4096  # keys compared with all centroids at once
SAMPLE = 40  # keys a centroid is trained on
COLD, WARM = 8, 4  # rounds without and with centroids to start from


def nearest(keys: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Which of `centroids` (lists, d) is nearest to each of `keys` (m, d), int32 (m,); of unit ones, by direction."""
    half = np.sum(centroids * centroids, axis=1) / 2
    labels = np.empty(len(keys), np.int32)
    for first in range(0, len(keys), BLOCK):
        scores = keys[first : first + BLOCK] @ centroids.T
        scores -= half
        labels[first : first + BLOCK] = scores.argmax(axis=1)
    return labels


def train(
    keys: np.ndarray, lists: int, before: np.ndarray | None, rng: np.random.Generator, directed: bool
) -> np.ndarray:
    """Centroids (lists, d) of `keys` (m, d), at norm 1 if `directed`; where a list stays empty, a key of the sample."""
    sample = keys[rng.choice(len(keys), min(len(keys), SAMPLE * lists), replace=False)]
    rounds, start = WARM, before
    if start is None or len(start) != lists:
        rounds, start = COLD, sample[rng.choice(len(sample), lists, replace=len(sample) < lists)]
    centroids = unit(start) if directed else start.copy()
    for _ in range(rounds):
        labels = nearest(sample, centroids)
        counts = np.bincount(labels, minlength=lists)
        order = np.argsort(labels, kind="stable")
        filled = np.flatnonzero(counts)
        firsts = np.concatenate([[0], np.cumsum(counts)[:-1]])[filled]
        centroids[filled] = np.add.reduceat(sample[order], firsts, axis=0) / counts[filled, None]
        empty = np.flatnonzero(counts == 0)
        centroids[empty] = sample[rng.choice(len(sample), len(empty))]
        centroids = unit(centroids) if directed else centroids
    return centroids
