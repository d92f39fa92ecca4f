"""Every kernel at sizes on and around its tiles: what the sanitizers watch. `python -m cuda_host.sweep [OLD NEW]`.

With two arguments the first text is replaced by the second in retrieve.cu: a fault that the sanitizers should find.
"""

from __future__ import annotations

import sys

import numpy as np
from perdure.backends import cuda

import cuda_host


def retrievals(rng):
    for q, n, d, k in ((1, 1, 1, 1), (33, 65, 33, 64), (5, 300, 131, 20), (3, 600, 65, 3)):
        queries, keys = (rng.standard_normal((2, rows, d), np.float32) for rows in (q, n))
        for space in ("ip", "l2", "cosine"):
            for mask in (None, rng.random((2, q, n)) < 0.5):
                cuda.retrieve(queries, keys, k, space, mask, n // 2)


def stored(rng):
    for dtype in ("bfloat16", "float16", "int8"):
        for q, n, d, k in ((129, 64, 1, 1), (3, 129, 127, 33)):
            queries, scales = rng.standard_normal((2, q, d), np.float32), rng.random((2, n), np.float32)
            keys = rng.integers(-100, 100, (2, n, d)).astype(np.int8 if dtype == "int8" else np.int16)
            cuda.retrieve_stored(queries, keys, scales if dtype == "int8" else None, dtype, k, "ip", n // 2)


def attentions(rng, dtype):
    for q, n, k, d, dv in ((1, 1, 1, 1, 1), (5, 40, 33, 33, 65), (4, 9, 256, 32, 32)):
        arrays = [rng.standard_normal((2, *shape)).astype(dtype) for shape in ((q, d), (n, d), (n, dv))]
        call = *arrays, rng.integers(-1, n, (2, q, k)), 0.3
        output, lse = cuda.attention(*call, None, n // 2)
        cuda.attention_backward(*call, n // 2, output, output.copy(), lse.copy(), True)


def densities(rng, dtype):
    for q, functions, e, bins in ((1, 1, 1, 1), (33, 33, 65, 128), (200, 32, 64, 129)):
        mean, variance, centers, widths = (
            rng.random(n).astype(dtype) + dtype(0.1) for n in (q, q, functions, functions)
        )
        B, edges = rng.standard_normal((2, functions, e)).astype(dtype), np.linspace(0, 1, bins + 1, dtype=dtype)
        cuda.systematic(mean[None], bins, 0.5)
        for density in ("gaussian", "truncated_gaussian"):
            cuda.expected(B, mean, variance, centers, widths, density)
        for density in ("gaussian", "sparsemax", "biweight"):
            cuda.histogram(mean, variance, edges, density)


def main(*fault: str) -> None:
    rng = np.random.default_rng(0)
    if fault:
        text = cuda.source("retrieve.cu")
        assert fault[0] in text
        built = cuda_host.compile_text("faulty", text.replace(*fault))
        cuda_host.library = lambda file: built
    with cuda_host.registered():
        if fault:
            queries, keys = (rng.standard_normal((n, 33), np.float32) for n in (33, 300))
            cuda.retrieve(queries, keys, 3, "l2", None, 0)
            return
        retrievals(rng)
        stored(rng)
        for dtype in (np.float32, np.float64):
            attentions(rng, dtype)
            densities(rng, dtype)
            cuda.unit(rng.standard_normal((5, 33)).astype(dtype))
    print(*sorted(set(cuda_host.launched)))


if __name__ == "__main__":
    main(*sys.argv[1:])
