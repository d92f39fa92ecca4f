"""What guards a stored memory: keys of a common length, and a bound on what one source may write."""

from __future__ import annotations

import numpy as np
import pytest

import perdure

CONFIG = {"rows": 2, "heads": 2, "dim": 64, "capacity": 20_000}


def keys(seed, n, rows=2):
    return np.random.default_rng(seed).standard_normal((rows, 2, n, 64)).astype(np.float32)


def mass_of_tag(memory, queries, tag, n):
    """Mean share of the attention over everything that falls on tokens with that tag."""
    near = memory.search(queries, k=n)
    weights = np.einsum("rhqd,rhqkd->rhqk", queries, near.keys.astype(np.float64)) / 8
    weights = np.exp(weights - weights.max(-1, keepdims=True))
    return float(((weights * (near.tags == tag)).sum(-1) / weights.sum(-1)).mean())


@pytest.fixture
def store(tmp_path):
    with perdure.open(tmp_path / "store") as store:
        yield store


def poisoned(memory, length, at="later"):
    honest, poison = keys(0, 2000), keys(1, 5)
    poison *= length / np.linalg.norm(poison, axis=-1, keepdims=True)
    if at == "later":
        memory.write(honest, honest, tags=0)
        memory.write(poison, poison, tags=1)
    else:
        both = np.concatenate([honest[:, :, :500], poison, honest[:, :, 500:]], axis=2)
        memory.write(both, both, tags=np.tile(np.repeat([0, 1, 0], [500, 5, 1500]), (2, 1)))
    return mass_of_tag(memory, keys(2, 20), 1, 2005)


@pytest.mark.parametrize("at", ["later", "in the midst"])
def test_poisoned_keys_get_at_most_twice_their_share_of_attention(store, at):
    share = 5 / 2005
    assert poisoned(store.memory("clipped", kind="knn", **CONFIG), 800, at) < 2 * share
    assert poisoned(store.memory("as it comes", kind="knn", clip=None, **CONFIG), 800, at) > 100 * share


def test_ordinary_keys_are_not_touched(store):
    memory, given = store.memory("a", kind="knn", **CONFIG), keys(0, 3000)
    memory.write(given, given)
    stored = memory.state_dict()["rows.0.keys"]
    assert (stored == given[0]).all(-1).mean() > 0.999
    assert np.array_equal(memory.state_dict()["rows.0.values"], given[0])


def test_many_small_steps_do_not_move_the_measure_far(store):
    memory = store.memory("a", kind="knn", **CONFIG)
    memory.write(keys(0, 1000), keys(0, 1000))
    for step in range(20):
        long = keys(step, 10) * 10
        memory.write(long, long)
    assert np.linalg.norm(memory.state_dict()["rows.0.keys"], axis=-1).max() < 1.6 * 8 * 1.3


def test_a_row_is_measured_by_its_own_keys(store):
    memory = store.memory("a", kind="knn", **CONFIG)
    small = keys(0, 400, rows=1) / 100
    memory.write(small, small, rows=[1])
    large = keys(1, 400, rows=1)
    memory.write(large, large, rows=[0])
    assert (memory.state_dict()["rows.0.keys"] == large[0]).all(-1).mean() > 0.99


def test_after_a_clear_the_measure_starts_anew(store):
    memory = store.memory("a", kind="knn", **CONFIG)
    memory.write(keys(0, 400) / 100, keys(0, 400))
    memory.clear([0])
    memory.write(keys(1, 400, rows=1), keys(1, 400, rows=1), rows=[0])
    assert (memory.state_dict()["rows.0.keys"] == keys(1, 400, rows=1)[0]).all(-1).mean() > 0.99


def test_the_measure_survives_reopening_and_rewriting(tmp_path):
    states = []
    for reopen in (False, True):
        store = perdure.open(tmp_path / f"{reopen}")
        for step in range(8):
            memory = store.memory("a", kind="knn", **CONFIG)
            given = keys(step, 100) * (1 + step)
            memory.write(given, given)
            if reopen:
                store.checkpoint() if step % 3 == 0 else store.commit()
                store.close()
                store = perdure.open(tmp_path / f"{reopen}")
        states.append(store.memory("a").state_dict())
        store.close()
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


def test_zero_keys_and_masked_keys_do_no_harm(store):
    memory = store.memory("a", kind="knn", **CONFIG)
    given = keys(0, 10)
    given[:, :, :5] = 0
    memory.write(given, given, mask=np.zeros((2, 10), bool))
    memory.write(given * 0, given)
    memory.write(given, given)
    assert memory.tokens.tolist() == [20, 20]
    assert np.isfinite(memory.state_dict()["rows.0.keys"]).all()


def test_a_source_may_write_so_much_and_no_more(store):
    memory = store.memory("a", kind="knn", source_quota=50, **CONFIG)
    for _ in range(2):
        memory.write(keys(0, 10), keys(0, 10), source="page 1")  # 20 tokens: two rows of 10
    before = memory.state_dict()
    with pytest.raises(perdure.QuotaError, match="at most 50 tokens from one source, got 60 from 'page 1'"):
        memory.write(keys(0, 10), keys(0, 10), source="page 1")
    assert all(np.array_equal(before[name], memory.state_dict()[name]) for name in before)
    memory.write(keys(0, 10), keys(0, 10), source="page 1", mask=np.eye(2, 10, dtype=bool))
    memory.write(keys(0, 10), keys(0, 10), source="page 2")
    memory.write(keys(0, 100), keys(0, 100))
    memory.clear()
    memory.write(keys(0, 25), keys(0, 25), source="page 1")


@pytest.mark.parametrize("source", ["", "x" * 1025, "\ud800", 3, True, ("a",), ["a"], b"a", object()])
def test_what_is_no_source_is_refused_before_anything_changes(store, source):
    memory = store.memory("a", kind="knn", **CONFIG)
    with pytest.raises(perdure.ArgumentError, match="source: expected a text of 1 to 1024 bytes"):
        memory.write(keys(0, 10), keys(0, 10), source=source)
    assert memory.tokens.tolist() == [0, 0]
    store.commit()


@pytest.mark.parametrize(
    "rows", [np.array([0]), [np.int64(0)], (0,), range(1), iter([0])], ids=lambda r: type(r).__name__
)
def test_keys_are_clipped_however_their_rows_are_named(store, rows):
    memory = store.memory("a", kind="knn", **CONFIG)
    memory.write(keys(0, 300), keys(0, 300))
    memory.write(keys(1, 5, rows=1) * 100, keys(1, 5, rows=1), rows=rows)
    assert memory.tokens.tolist() == [305, 300]
    assert np.linalg.norm(memory.state_dict()["rows.0.keys"], axis=-1).max() < 1.6 * 8 * 1.3


@pytest.mark.parametrize("padding", [200, 256, 400])
def test_a_padding_of_zeros_does_not_end_the_clipping(store, padding):
    memory = store.memory("a", kind="knn", **CONFIG)
    memory.write(keys(0, padding) * 0, keys(0, padding))
    memory.write(keys(0, 300), keys(0, 300))
    memory.write(keys(1, 5) * 100, keys(1, 5))
    assert np.linalg.norm(memory.state_dict()["rows.0.keys"], axis=-1).max() < 1.6 * 8 * 1.3


@pytest.mark.parametrize("clip", [1, 0.5, -2, float("nan"), float("inf"), "2", True])
def test_a_clip_that_means_nothing_is_refused(store, clip):
    with pytest.raises(perdure.ArgumentError, match="clip"):
        store.memory("a", kind="knn", clip=clip, **CONFIG)
