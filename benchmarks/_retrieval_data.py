"""Keys and queries to search: drifting clusters, normal numbers, one key repeated, and those of a real language model.

Queries of attention are not noisy copies of keys: they are projected by another matrix, and indexes that do well on
copies can do badly on them. So one data set is the real thing, of SmolLM2-135M reading the documentation of Python.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import pydoc
from collections.abc import Iterator
from pathlib import Path

import numpy as np

LAYER, HEAD = 9, 0  # whose keys: a third of the way up, like the memory layer of Memorizing Transformers
READ = 73728  # tokens are read in multiples of this, so that what was read can be used again
CHUNK = 1024  # tokens the model reads at once


def clusters(n: int, d: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """500 clusters around a centre that drifts, and noisy copies of keys as queries."""
    centres = rng.standard_normal((500, d)).astype(np.float32)
    drift = np.cumsum(rng.standard_normal((n // 512 + 1, d)), axis=0, dtype=np.float32) * np.float32(0.05)
    keys = centres[rng.integers(0, 500, n)] + 0.5 * rng.standard_normal((n, d)).astype(np.float32)
    keys += np.repeat(drift, 512, axis=0)[:n]
    queries = keys[rng.integers(0, n, n)] + 0.3 * rng.standard_normal((n, d)).astype(np.float32)
    return keys, queries


def normal(n: int, d: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Nothing to be found: the worst case of every index that hopes for structure."""
    return rng.standard_normal((n, d), dtype=np.float32), rng.standard_normal((n, d), dtype=np.float32)


def identical(n: int, d: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One key, over and over: no bound tells one from another."""
    keys, queries = normal(n, d, rng)
    return np.repeat(keys[:1], n, axis=0), queries


def attention(n: int, d: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Keys and queries, at unit norm as Memorizing Transformers has them, of one head while the model reads.

    Without rotary positions: memories carry none. Kept in the user's cache folder once computed (minutes).
    """
    if d != 64:
        raise SystemExit("the model's heads are 64 wide: run with --dim=64")
    many = -(-n // READ) * READ
    place = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "perdure" / f"attention-{many}.npz"
    if not place.exists():
        keys, queries = read_by_model(many)
        place.parent.mkdir(parents=True, exist_ok=True)
        np.savez(place, keys=keys, queries=queries)
    with np.load(place) as kept:
        keys, queries = kept["keys"][:n], kept["queries"][:n]
    return tuple(a / np.linalg.norm(a, axis=1, keepdims=True) for a in (keys, queries))


def read_by_model(n: int) -> tuple[np.ndarray, np.ndarray]:
    import torch
    from perdure.bindings.pretrained import smollm2

    pretrained = smollm2()
    model = pretrained.model.model
    model.layers = model.layers[: LAYER + 1]
    parts: dict[str, list[np.ndarray]] = {"k_proj": [], "q_proj": []}
    for name, kept in parts.items():

        def keep(module, given, result, kept=kept):
            kept.append(result[0, :, HEAD * 64 : (HEAD + 1) * 64].float().numpy())

        getattr(model.layers[LAYER].self_attn, name).register_forward_hook(keep)
    tokens: list[int] = []
    for text in documentation():
        tokens += pretrained.tokenizer(text)["input_ids"]
        if len(tokens) >= n:
            break
    with torch.no_grad():
        for first in range(0, n, CHUNK):
            model(torch.tensor([tokens[first : min(first + CHUNK, n)]]), use_cache=False)
    return tuple(np.concatenate(parts[name])[:n].astype(np.float32) for name in ("k_proj", "q_proj"))


def documentation() -> Iterator[str]:
    """Documentation of the standard library and of what is installed beside it, in a fixed order."""
    names = [*sorted(m.name for m in pkgutil.iter_modules() if not m.name.startswith("_")), "numpy", "scipy"]
    for name in names:
        if name in ("antigravity", "this", "idlelib", "turtledemo", "test"):
            continue
        try:
            module = importlib.import_module(name)
        except BaseException:  # some modules do not import everywhere, in whatever way
            continue
        parts = [getattr(module, "__doc__", None) or ""]
        for _, member in sorted(vars(module).items(), key=lambda item: item[0]):
            if inspect.isfunction(member) or inspect.isclass(member):
                parts.append(inspect.getdoc(member) or "")
        yield pydoc.plain("\n\n".join(parts))


DATA = {"clusters": clusters, "normal": normal, "identical": identical, "attention": attention}
