"""Engines of one head, all used alike: `step(keys)` takes in new keys and loses the oldest; `search(queries, k)`.

Keys are their own values. Attention over what was found is the same function for all that do not bring their own.
What a peer cannot do, it does the way its users do it: an index without deletion is built anew, or deletes by id.
"""

from __future__ import annotations

import functools
import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import perdure

THREADS = int(os.environ.get("NUMBA_NUM_THREADS", "1"))


class Ring:
    """The keys themselves in slots, for engines that search them as they are."""

    def __init__(self, keys: np.ndarray):
        self.keys, self.at = keys.copy(), 0

    def step(self, keys: np.ndarray) -> None:
        self.keys[self.at : self.at + len(keys)] = keys
        self.at = (self.at + len(keys)) % len(self.keys)


class Product(Ring):
    """The float32 product of queries and keys alone, in blocks whose scores stay in cache: no result, a limit."""

    def search(self, queries: np.ndarray, k: int) -> None:
        scores = np.empty((len(queries), min(2048, len(self.keys))), np.float32)
        for first in range(0, len(self.keys), scores.shape[1]):
            keys = self.keys[first : first + scores.shape[1]]
            np.matmul(queries, keys.T, out=scores[:, : len(keys)])


class NumPy(Ring):
    """Product and argpartition."""

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        scores = queries @ self.keys.T
        return np.argpartition(scores, len(self.keys) - k, axis=-1)[:, -k:]


class Torch(Ring):
    """Product and topk."""

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        torch = importlib.import_module("torch")
        return torch.topk(torch.from_numpy(queries) @ torch.from_numpy(self.keys).T, k, dim=-1).indices.numpy()


class Perdure:
    """KNNMemory, validation, values and positions included; its `read` in two halves, search and attention."""

    def __init__(self, keys: np.ndarray, **settings: Any):
        n, d = keys.shape
        self.memory = perdure.KNNMemory(1, 1, d, n, **settings)
        self.memory.write(keys[None, None], keys[None, None])

    def step(self, keys: np.ndarray) -> None:
        self.memory.write(keys[None, None], keys[None, None])
        self.search(keys[:0], 1)  # an index takes in what was written when it is asked: that belongs to the insertion

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        row = self.memory._rows[0]
        self.found = row.search(queries[None], k)
        return self.found[1][0] % row.capacity

    def attend(self, queries: np.ndarray) -> np.ndarray:
        """Over what the last search found, for the same queries."""
        scores, positions = self.found
        return self.memory._rows[0].attend(queries[None], positions, queries.shape[-1] ** -0.5, scores)[0]


class Faiss:
    """A flat or inverted index with ids; the oldest are removed by id."""

    def __init__(self, keys: np.ndarray, lists: int = 0, probes: int = 1):
        faiss = importlib.import_module("faiss")
        faiss.omp_set_num_threads(THREADS)
        self.faiss, (self.n, d), self.written = faiss, keys.shape, len(keys)
        flat = faiss.IndexFlatIP(d)
        if lists:
            self.index = faiss.IndexIVFFlat(flat, d, lists, faiss.METRIC_INNER_PRODUCT)
            self.index.train(keys[np.random.default_rng(0).permutation(self.n)[: 40 * lists]])
            self.index.nprobe = probes
            self.index.add_with_ids(keys, np.arange(self.n))
        else:
            self.index = flat
            self.index.add(keys)
        self.flat = not lists

    def step(self, keys: np.ndarray) -> None:
        m = len(keys)
        oldest = self.written - self.n
        if self.flat:  # ids of a flat index are places, which move up when the first leave
            self.index.remove_ids(self.faiss.IDSelectorRange(0, m))
            self.index.add(keys)
        else:
            self.index.remove_ids(self.faiss.IDSelectorRange(oldest, oldest + m))
            self.index.add_with_ids(keys, np.arange(self.written, self.written + m))
        self.written += m

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        _, ids = self.index.search(queries, k)
        return np.where(ids >= 0, (ids + (self.written - self.n if self.flat else 0)) % self.n, -1)


class FaissProbes:
    """An inverted index of faiss with another number of probes; the first of those who share it writes to it."""

    def __init__(self, shared: dict[str, Faiss], keys: np.ndarray, lists: int, probes: int):
        self.writes, self.probes = not shared, probes
        self.own = shared["index"] if shared else shared.setdefault("index", Faiss(keys, lists))

    def step(self, keys: np.ndarray) -> None:
        if self.writes:
            self.own.step(keys)

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        self.own.index.nprobe = self.probes
        return self.own.search(queries, k)


class Graph(Ring):
    """hnswlib with deleted elements replaced."""

    def __init__(self, keys: np.ndarray, ef: int):
        super().__init__(keys)
        hnswlib = importlib.import_module("hnswlib")
        n, d = keys.shape
        self.index = hnswlib.Index(space="ip", dim=d)
        self.index.init_index(n, M=16, ef_construction=100, allow_replace_deleted=True, random_seed=1)
        self.index.add_items(keys, np.arange(n), num_threads=THREADS)
        self.index.set_ef(ef)

    def step(self, keys: np.ndarray) -> None:
        slots = (self.at + np.arange(len(keys))) % len(self.keys)
        super().step(keys)
        for slot in slots:
            self.index.mark_deleted(int(slot))
        self.index.add_items(keys, slots, num_threads=1, replace_deleted=True)

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        return self.index.knn_query(queries, k=k, num_threads=THREADS)[0].astype(np.int64)


class SameGraph:
    """hnswlib called directly, on the one graph of a memory that nothing is written to, and with its beam."""

    def __init__(self, searched: Perdure):
        self.searched = searched

    def step(self, keys: np.ndarray) -> None:
        """Nothing is written."""

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        index = self.searched.memory._rows[0].index
        (graph,) = next(iter(index.graphs.values()))
        graph.set_ef(max(index.ef, k))
        return graph.knn_query(queries, k=k, num_threads=THREADS)[0].astype(np.int64)


class USearch(Ring):
    """usearch's graph; the oldest are removed by key."""

    def __init__(self, keys: np.ndarray, ef: int):
        super().__init__(keys)
        module = importlib.import_module("usearch.index")
        self.index = module.Index(ndim=keys.shape[1], metric="ip", dtype="f32", connectivity=16, expansion_search=ef)
        self.index.add(np.arange(len(keys)), keys, threads=THREADS)

    def step(self, keys: np.ndarray) -> None:
        slots = (self.at + np.arange(len(keys))) % len(self.keys)
        super().step(keys)
        self.index.remove(slots)
        self.index.add(slots, keys, threads=1)

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        found = self.index.search(queries, k, threads=THREADS)
        return np.asarray(found.keys, np.int64).reshape(len(queries), -1)


class Voyager(Ring):
    """voyager's graph; a slot's new key takes the place of the old one."""

    def __init__(self, keys: np.ndarray, ef: int):
        super().__init__(keys)
        voyager, (n, d) = importlib.import_module("voyager"), keys.shape
        self.index = voyager.Index(voyager.Space.InnerProduct, d, M=16, ef_construction=100, max_elements=n)
        self.index.add_items(keys, np.arange(n), num_threads=THREADS)
        self.index.ef = ef

    def step(self, keys: np.ndarray) -> None:
        slots = (self.at + np.arange(len(keys))) % len(self.keys)
        super().step(keys)
        self.index.add_items(keys, slots, num_threads=THREADS)

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        return self.index.query(queries, k, num_threads=THREADS, query_ef=self.index.ef)[0].astype(np.int64)


class MemorizingTransformersPyTorch:
    """The memory of the package of that name: a graph of faiss, and keys and values in a mapped file.

    It never evicts: past its capacity it forgets everything. So it is given room for all that is to come.
    """

    def __init__(self, keys: np.ndarray, ef: int, room: int = 1 << 14):
        module = importlib.import_module("memorizing_transformers_pytorch.knn_memory")
        self.torch, (self.n, d) = importlib.import_module("torch"), keys.shape
        self.folder, self.written = tempfile.TemporaryDirectory(), 0
        place = str(Path(self.folder.name) / "memory")
        self.memory = module.KNNMemory(d, self.n + room, 1, memmap_filename=place, multiprocessing=False)
        for first in range(0, self.n, 8192):
            self.step(keys[first : first + 8192])
        self.memory.knns[0].index.hnsw.efSearch = ef

    def step(self, keys: np.ndarray) -> None:
        values = np.zeros_like(keys)
        values[:, 0] = (self.written + np.arange(len(keys))) % self.n  # which key it is, for recall
        self.memory.add(self.torch.from_numpy(np.stack([keys, values], axis=1)[None]))
        self.written += len(keys)

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        pairs, mask = self.memory.search(self.torch.from_numpy(queries[None]), k)
        return np.where(mask[0].numpy(), pairs[0, ..., 1, 0].numpy().astype(np.int64), -1)


def engines(keys: np.ndarray, slow: bool, only: str = "") -> dict[str, Any]:
    """Every engine whose package is installed, over `keys`; the graphs only where building them is bearable.

    `only` names, by their beginnings, those to take beside the first.
    """
    lists = 1 << round(np.log2(np.sqrt(len(keys))))
    makers: dict[str, Any] = {
        "float32 product alone": lambda: Product(keys),
        "perdure exact": lambda: Perdure(keys),
        "perdure exact, bfloat16": lambda: Perdure(keys, dtype="bfloat16"),
        "perdure ivf": lambda: Perdure(keys, index="ivf"),
        "numpy argpartition": lambda: NumPy(keys),
        "torch topk": lambda: Torch(keys),
        "faiss Flat": lambda: Faiss(keys),
    }
    shared: dict[str, Faiss] = {}
    for share in (8, 16, 32, 64, 128):
        maker = functools.partial(FaissProbes, shared, keys, lists, lists // share)
        makers[f"faiss IVFFlat, 1/{share} of the lists"] = maker
    if slow:
        makers["perdure hnsw"] = lambda: Perdure(keys, index="hnsw")
        makers["hnswlib ef 128"] = lambda: Graph(keys, 128)
        makers["usearch ef 128"] = lambda: USearch(keys, 128)
        makers["voyager ef 128"] = lambda: Voyager(keys, 128)
        makers["memorizing-transformers-pytorch"] = lambda: MemorizingTransformersPyTorch(keys, 128)
    wanted = tuple(only.split(","))
    makers = {name: maker for name, maker in makers.items() if name.startswith(("float32", *wanted))}
    made = {}
    for name, maker in makers.items():
        try:
            made[name] = maker()
        except ImportError:
            print(f"{name}: not installed")
    return made
