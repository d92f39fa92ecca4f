"""Approximate indexes: exact for what they look at, as good as they promise, and safe under every kind of use."""

from __future__ import annotations

import copy
import threading
import warnings

import numpy as np
import pytest
from perdure.backends.numba import coded_lists
from perdure.memory.indexes import audit, auto, centroids, costs, hnsw, ivf

import perdure

APPROXIMATE = ["ivf", "hnsw", "auto"]


@pytest.fixture
def small(monkeypatch):
    """Indexes that begin to approximate at a size that tests can afford."""
    monkeypatch.setattr(ivf, "FIRST", 256)
    monkeypatch.setattr(hnsw, "SMALLEST", 64)
    monkeypatch.setattr(auto, "EVERY", 2)


def clustered(rng, n, d=8, clusters=12, shift=0.0):
    centres = np.random.default_rng(5).standard_normal((clusters, d)) * 3 + shift
    return (centres[rng.integers(0, clusters, n)] + rng.standard_normal((n, d))).astype(np.float32)


def filled(index, rng, n=900, capacity=600, **kwargs):
    memory = perdure.KNNMemory(1, 1, 8, capacity, index=index, **kwargs)
    keys = clustered(rng, n)[None, None]
    for first in range(0, n, 100):
        memory.write(keys[:, :, first : first + 100], keys[:, :, first : first + 100])
    return memory, keys


@pytest.mark.parametrize("fails_at", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_lists_that_a_failure_left_half_made_are_made_anew(small, rng, monkeypatch, fails_at, dtype):
    keys, queries = clustered(rng, 700).reshape(1, 1, 700, 8).repeat(2, axis=1), clustered(rng, 9)[None, None]
    memory = perdure.KNNMemory(1, 2, 8, 600, index="ivf", target_recall=1.0, dtype=dtype)
    memory.write(keys[:, :, :500], keys[:, :, :500])
    kind = type(perdure.backends.registry.load("numba").make_lists(2, 8, "ip", np.dtype(dtype)))
    written, calls = kind.write, []

    def write(*arguments):
        calls.append(1)
        if len(calls) == fails_at + 1:
            raise MemoryError
        return written(*arguments)

    monkeypatch.setattr(kind, "write", write)
    for new in (None, keys[:, :, 500:]):  # as lists are made, two heads, and as they go on
        if new is not None:
            memory.write(new, new)
        try:
            memory.search(queries.repeat(2, axis=1), 8)
        except MemoryError:
            memory.search(queries.repeat(2, axis=1), 8)
    expected = perdure.KNNMemory(1, 2, 8, 600, dtype=dtype)
    expected.write(keys, keys)
    wanted, found = (each.search(queries.repeat(2, axis=1), 8).positions for each in (expected, memory))
    assert len(calls) > fails_at
    np.testing.assert_array_equal(found, wanted)


def test_a_graph_whose_beam_was_widened_claims_no_recall(small, rng):
    memory, _ = filled("hnsw", rng)
    assert "recall not measured" in memory.explain()


@pytest.mark.parametrize("space", ["ip", "cosine", "l2"])
@pytest.mark.parametrize("index", APPROXIMATE)
def test_hits_are_scored_exactly_and_enough(small, rng, index, space):
    memory, keys = filled(index, rng, space=space)
    exact = perdure.KNNMemory(1, 1, 8, 600, space=space)
    exact.write(keys, keys)
    for q in (1, 3, 40):
        queries = clustered(rng, q)[None, None]
        near, every = memory.search(queries, 10), exact.search(queries, 600)
        assert (near.positions >= 300).all()
        assert (np.diff(near.scores, axis=-1) <= 0).all()
        for mine, scores, all_positions, all_scores in zip(
            near.positions[0, 0], near.scores[0, 0], every.positions[0, 0], every.scores[0, 0], strict=True
        ):
            assert len(set(mine)) == 10
            order = np.argsort(all_positions)
            np.testing.assert_array_equal(scores, all_scores[order][mine - 300])
        np.testing.assert_array_equal(near.keys[0, 0], keys[0, 0][near.positions[0, 0]])
    assert memory.recall(clustered(rng, 40)[None, None], 10) >= 0.9


@pytest.mark.parametrize("index", APPROXIMATE)
def test_ties_go_to_the_newest(small, rng, index):
    memory = perdure.KNNMemory(1, 1, 2, 500, index=index)
    memory.write(np.ones((1, 1, 700, 2)), np.ones((1, 1, 700, 2)))
    near = memory.search(np.ones((1, 1, 2, 2)), 5)
    if index == "hnsw":  # a graph walks past equals; only its choice of candidates is free
        assert (near.scores == 2).all()
    else:
        np.testing.assert_array_equal(near.positions[0, 0], [[699, 698, 697, 696, 695]] * 2)


@pytest.mark.parametrize("index", APPROXIMATE)
def test_saved_and_copied_memories_go_on_alike(small, rng, index):
    memory, _ = filled(index, rng)
    queries = clustered(rng, 5)[None, None]
    for _ in range(3):
        memory.search(queries, 7)
    others = [perdure.KNNMemory.from_state_dict(memory.state_dict()), copy.deepcopy(memory), memory.select([0])]
    for _ in range(12):
        segment, queries = clustered(rng, 90)[None, None], clustered(rng, 5)[None, None]
        results = []
        for one in (memory, *others):
            one.write(segment, segment)
            results.append(one.search(queries, 7))
        for result in results[1:]:
            np.testing.assert_array_equal(result.positions, results[0].positions)
            np.testing.assert_array_equal(result.scores, results[0].scores)


@pytest.mark.parametrize("index", ["ivf", "hnsw", "auto"])
def test_altered_states_of_indexes_are_refused(small, rng, index):
    memory, keys = filled(index, rng)
    memory.search(keys[:, :, :3], 2)
    state = memory.state_dict()
    learned = [name for name in state if ".index." in name]
    assert learned
    for name in learned:
        for bad in (np.full_like(state[name], -5), state[name][..., :0]):
            if name.endswith(("audit", "centroids", "waiting")) and bad.shape == state[name].shape:
                continue  # any numbers will do
            with pytest.raises(perdure.ArgumentError):
                perdure.KNNMemory.from_state_dict({**state, name: bad})


@pytest.mark.parametrize("index", APPROXIMATE)
def test_a_cleared_row_gives_nothing_of_the_old(small, rng, index):
    memory, keys = filled(index, rng)
    memory.search(keys[:, :, :3], 2)
    memory.clear()
    memory.write(-keys[:, :, :20], -keys[:, :, :20])
    near = memory.search(keys[:, :, :9], 30)
    assert near.positions.max() < 20
    assert (near.positions[..., 20:] == -1).all()
    np.testing.assert_array_equal(np.sort(near.positions[0, 0, 0, :20]), np.arange(20))


@pytest.mark.parametrize("index", APPROXIMATE)
def test_more_than_a_list_or_graph_holds(small, rng, index):
    """k neighbours come back whenever k are stored."""
    memory, keys = filled(index, rng)
    near = memory.search(keys[:, :, :2], 600)
    np.testing.assert_array_equal(np.sort(near.positions[0, 0, 0]), np.arange(300, 900))


def test_lists_follow_a_drifting_stream(small, rng):
    """After many turnovers the recall is that of a memory built anew over the same keys."""
    memory = perdure.KNNMemory(1, 1, 8, 2000, index="ivf")
    stream = np.concatenate([clustered(rng, 500, shift=turn / 4) for turn in range(40)])[None, None]
    for first in range(0, stream.shape[2], 500):
        memory.write(stream[:, :, first : first + 500], stream[:, :, first : first + 500])
        memory.search(stream[:, :, first : first + 4], 10)
    fresh = perdure.KNNMemory(1, 1, 8, 2000, index="ivf")
    fresh.write(stream[:, :, -2000:], stream[:, :, -2000:])
    queries = clustered(rng, 200, shift=39 / 4)[None, None]
    for _ in range(8):
        fresh.search(queries[:, :, :50], 10)
        memory.search(queries[:, :, :50], 10)
    assert memory.recall(queries, 10) >= 0.95 * fresh.recall(queries, 10)
    assert "inverted lists" in memory.explain()


def test_lists_and_the_formula_agree(small, rng):
    memory, _ = filled("ivf", rng, target_recall=0.6)
    queries = clustered(rng, 30)[None, None]
    for _ in range(4):
        memory.search(queries, 5)
    assert memory._rows[0].index.probes < memory._rows[0].index.centroids.shape[1]
    again = copy.deepcopy(memory)
    near = memory.search(queries, 5)
    with perdure.backend("numpy"):
        reference = again.search(queries, 5)
    np.testing.assert_array_equal(near.positions, reference.positions)
    np.testing.assert_allclose(near.scores, reference.scores, rtol=1e-5, atol=1e-4)


def test_centroids_are_where_the_keys_are(rng):
    keys = clustered(rng, 3000, clusters=4)
    made = centroids.train(keys, 4, None, rng, False)
    apart = np.linalg.norm(made[:, None] - made[None], axis=-1)[~np.eye(4, dtype=bool)].min()
    assert apart > 1
    labels = centroids.nearest(keys, made)
    expected = np.linalg.norm(keys[:, None] - made[None], axis=-1).argmin(axis=1)
    assert (labels == expected).mean() > 0.999


def test_graphs_warn_when_queries_are_unlike_any_key(small, rng, monkeypatch):
    monkeypatch.setattr(hnsw, "MOST", 64)
    keys = rng.standard_normal((1, 1, 3000, 8)).astype(np.float32)
    keys *= np.exp(2 * rng.standard_normal((1, 1, 3000, 1)))  # under "ip", graphs of such keys are hard to walk
    memory = perdure.KNNMemory(1, 1, 8, 3000, index="hnsw", target_recall=1.0)
    memory._rows[0].index.segment = 3000
    memory.write(keys, keys)
    queries = rng.standard_normal((1, 1, 300, 8))

    def search_often():
        for _ in range(40):
            memory.search(queries, 100)

    with pytest.warns(perdure.RecallWarning, match="target_recall"):
        search_often()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.search(queries, 100)  # once is enough


def test_an_audit_counts_what_is_missing():
    exact = np.array([[[5, 4, 3, -1]]])
    assert audit.overlap(exact, exact) == 1
    assert audit.overlap(np.array([[[5, 1, 0, -1]]]), exact) == pytest.approx(1 / 3)
    assert audit.overlap(np.full((1, 1, 4), -1), np.full((1, 1, 4), -1)) == 1


def test_auto_chooses_by_use():
    def estimate(n, queries, written, target=0.95):
        return auto.estimate(n, 64, queries, written, target, auto.Costs())

    small, large, sealed = estimate(2_000, 512, 512), estimate(1_000_000, 512, 512), estimate(1_000_000, 1, 0)
    assert min(small, key=small.get) == "exact"
    assert min(large, key=large.get) == "ivf"
    assert sealed["hnsw"] < sealed["exact"]
    assert estimate(1_000_000, 1, 512)["hnsw"] > sealed["hnsw"]
    assert estimate(1_000_000, 512, 512, target=0.999)["ivf"] > large["ivf"]
    everything = estimate(1_000_000, 512, 512, target=1.0)
    assert min(everything, key=everything.get) == "exact"


def test_auto_changes_its_mind_and_says_so(small, rng, monkeypatch):
    memory, _ = filled("auto", rng, costs={"lists": 1e-6, "trained": 1e-6})
    queries = clustered(rng, 4)[None, None]
    before = memory.search(queries, 5)
    index = memory._rows[0].index
    for _ in range(4):
        memory.search(queries, 5)
    assert index.name == "ivf"
    assert "auto: ivf" in memory.explain()
    assert "costs given" in memory.explain()
    after = memory.search(queries, 5)
    assert audit.overlap(after.positions, before.positions) >= 0.8


@pytest.mark.parametrize(("queries", "searches"), [(4, 10), (40, 2)])
def test_auto_makes_no_index_before_it_would_have_paid(small, rng, queries, searches):
    """Lists of 600 keys cost as much here as they save with 38 queries, however many of those come at once."""
    memory, _ = filled("auto", rng, costs={"lists": 1e-6, "few": 1.0, "trained": 3.0})
    asked, names = clustered(rng, queries)[None, None], []
    for i in range(searches):
        memory.search(asked, 5)
        names.append(memory._rows[0].index.name)
        memory = copy.deepcopy(memory) if i == 4 else memory
    assert names == ["exact"] * (searches - 1) + ["ivf"]


def test_auto_leaves_lists_that_are_searched_whole_and_does_not_come_back(small, rng, monkeypatch):
    """Keys without any order: what audits then ask for is remembered, in copies too."""
    monkeypatch.setattr(auto, "LEAST", 100)
    memory = perdure.KNNMemory(1, 1, 32, 1000, index="auto", costs={"trained": 1e-6})
    keys, queries = (rng.standard_normal((1, 1, n, 32)).astype(np.float32) for n in (900, 60))
    memory.write(keys, keys)
    names = []
    for i in range(12):
        memory.search(queries, 5)
        names.append(memory._rows[0].index.name)
        memory = copy.deepcopy(memory) if i == 8 else memory
    assert names == ["exact", "ivf", "ivf", *["exact"] * 9]


def test_auto_chooses_sooner_where_searches_are_large(small, rng, monkeypatch):
    """A model that reads a document asks for hundreds of queries at once, and rarely."""
    monkeypatch.setattr(auto, "EVERY", 16)
    for q, searches in ((auto.MANY, 2), (auto.MANY - 1, 16)):
        memory, _ = filled("auto", rng, costs={"lists": 1e-6, "trained": 1e-6})
        queries = clustered(rng, q)[None, None]
        for _ in range(searches - 1):
            memory.search(queries, 5)
        assert "auto: exact" in memory.explain()
        memory.search(queries, 5)
        assert "auto: ivf" in memory.explain()


@pytest.mark.parametrize("index", ["exact", *APPROXIMATE])
def test_many_threads_may_read_at_once(small, rng, index):
    memory, keys = filled(index, rng)
    queries = clustered(rng, 6)[None, None]
    exact = perdure.top_k(queries[0, 0], keys[0, 0, 300:], 5)
    failures = []

    def ask():
        try:
            for _ in range(10):
                near = memory.search(queries, 5)
                assert audit.overlap(near.positions[0, 0] - 300, exact.positions) >= 0.7
        except Exception as error:
            failures.append(error)

    workers = [threading.Thread(target=ask) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


@pytest.mark.parametrize("bad", [0, 1.5, -1, np.nan, "0.9"])
def test_impossible_recalls_are_refused(bad):
    with pytest.raises(perdure.ArgumentError):
        perdure.KNNMemory(1, 1, 1, 1, target_recall=bad)


def test_costs_are_measured_once_and_kept(tmp_path, monkeypatch, rng):
    """The first memory that asks measures; the next process reads; a file that was spoilt is refused by name."""
    place, calls = tmp_path / "new" / "costs.json", []
    monkeypatch.setenv("PERDURE_COSTS", str(place))
    monkeypatch.setattr(auto, "LEAST", 100)
    monkeypatch.setattr(auto, "EVERY", 1)
    monkeypatch.setattr(costs, "measured", lambda: calls.append(1) or costs.Costs(lists=1e-6, source="measured"))
    costs.machine_costs.cache_clear()
    for source in ("measured", "measured", f"from {place}"):
        if source != "measured":
            costs.machine_costs.cache_clear()  # another process
        memory, _ = filled("auto", rng)
        memory.search(clustered(rng, 4)[None, None], 5)
        assert f"costs {source}" in memory.explain()
    assert len(calls) == 1
    costs.machine_costs.cache_clear()
    place.write_text('{"lists": -1}')
    memory, _ = filled("auto", rng)
    with pytest.raises(perdure.ArgumentError, match="PERDURE_COSTS"):
        memory.search(clustered(rng, 4)[None, None], 5)
    costs.machine_costs.cache_clear()


def test_costs_can_be_measured_here(monkeypatch):
    for name, count in (("KEYS", 512), ("MANY", 8), ("GRAPH", 256)):
        monkeypatch.setattr(costs, name, count)
    made = costs.measured()
    assert all(0 < number < 1e9 for number in made.constants().values())
    assert made == costs.Costs.given(made.constants(), made.source)


@pytest.mark.parametrize("bad", [{"speed": 1.0}, {"lists": 0.0}, {"few": "x"}, [1.0]])
def test_impossible_costs_are_refused(bad):
    with pytest.raises(perdure.ArgumentError, match="costs"):
        perdure.KNNMemory(1, 1, 1, 1, index="auto", costs=bad)


def test_drift_over_ten_turnovers_costs_no_recall(small, rng):
    """Lists that followed the stream find at least .95 of what freshly made ones find, with as many probes."""
    capacity, memory = 1000, perdure.KNNMemory(1, 1, 8, 1000, index="ivf")
    for turn in range(1, 42):
        segment = clustered(rng, 250, shift=turn / 4)[None, None]
        memory.write(segment, segment)
        memory.search(segment[:, :, :4], 10)
        if turn in (16, 41):  # three and more than nine times everything has been replaced
            kept = memory.at(memory.written[:, None] - 1 - np.arange(capacity)[None, ::-1])
            fresh = perdure.KNNMemory(1, 1, 8, capacity, index="ivf")
            fresh.write(kept.keys, kept.values)
            queries = clustered(rng, 200, shift=turn / 4)[None, None]
            fresh.search(queries[:, :, :4], 10)
            fresh._rows[0].index.probing.probes = memory._rows[0].index.probes
            for one in (fresh, memory):
                one._rows[0].index.audit.queries = -1000  # no audits now
            assert memory.recall(queries, 10) >= 0.95 * fresh.recall(queries, 10)


def test_a_row_filled_before_it_is_asked_has_one_graph(small, rng):
    """Until it loses a token: then a graph a segment, none of which holds a token that has left."""
    memory = perdure.KNNMemory(1, 1, 8, 600, index="hnsw")
    keys = clustered(rng, 700)[None, None]
    memory.write(keys[:, :, :600], keys[:, :, :600])
    memory.search(keys[:, :, :2], 3)
    index = memory._rows[0].index
    assert list(index.graphs) == [(0, 600 // index.segment * index.segment)]
    again = copy.deepcopy(memory)
    np.testing.assert_array_equal(again.search(keys, 3).positions, memory.search(keys, 3).positions)
    memory.write(keys[:, :, 600:], keys[:, :, 600:])
    near = memory.search(keys, 600)
    np.testing.assert_array_equal(np.sort(near.positions[0, 0, 0]), np.arange(100, 700))
    assert len(index.graphs) > 1
    assert all(first >= 100 for first, _ in index.graphs)


def test_few_agreeing_queries_are_not_trusted(rng):
    """All neighbours in the first list, for one query or for many; then queries of another kind."""
    probing = ivf.Probing(32, 0.95)
    for queries, expected in ((1, 32), (20, 32), (1000, 1)):
        probing.observe(np.zeros((1, queries, 8), int), np.ones((1, queries, 8), bool))
        assert probing.probes == expected
    probing.observe(np.full((1, 1000, 8), 20), np.ones((1, 1000, 8), bool))
    assert probing.probes == 21
    probing.lose(1.0, 1000)
    probing.choose()
    assert probing.probes == 32  # what codes miss no list makes up for


@pytest.mark.parametrize("kind", ["alike", "skewed"])
def test_lists_find_the_wanted_share(rng, kind):
    """Of queries like the keys, and of a kind of which a tenth have their neighbours everywhere."""
    keys = clustered(rng, 8000, clusters=40)[None, None]
    memory = perdure.KNNMemory(1, 1, 8, 8000, index="ivf")
    memory.write(keys, keys)

    def asked():
        queries = clustered(rng, 256, clusters=40)
        if kind == "skewed":
            queries[::10] = rng.standard_normal((26, 8)) / 8
        return queries[None, None]

    for _ in range(8):
        memory.search(asked(), 16)
    memory._rows[0].index.audit.queries = -(1 << 20)  # no audits now
    assert np.mean([memory.recall(asked(), 16) for _ in range(4)]) >= 0.95
    assert memory._rows[0].index.probes < memory._rows[0].index.probing.lists


def test_candidates_that_codes_cannot_tell_apart_are_cut(small, rng, monkeypatch):
    """In lists the better half goes on: k different keys are found, with the scores they have."""
    monkeypatch.setattr(coded_lists, "FEWER", 0)
    keys = rng.standard_normal((1, 1, 1, 8)) + 1e-4 * rng.standard_normal((1, 1, 2000, 8))
    keys, queries = keys.astype(np.float32), rng.standard_normal((1, 1, 100, 8)).astype(np.float32)
    near = {}
    for index, k in (("exact", 2000), ("ivf", 5)):
        memory = perdure.KNNMemory(1, 1, 8, 2000, index=index, target_recall=0.5)
        memory.write(keys, keys)
        for _ in range(4):
            near[index] = memory.search(queries, k)
    scores = np.empty((100, 2000), np.float32)
    np.put_along_axis(scores, near["exact"].positions[0, 0], near["exact"].scores[0, 0], -1)
    positions = near["ivf"].positions[0, 0]
    assert all(len(set(some)) == 5 and min(some) >= 0 for some in positions)
    np.testing.assert_array_equal(np.take_along_axis(scores, positions, -1), near["ivf"].scores[0, 0])


def test_one_graph_over_many_segments_gives_as_many_as_it_holds(small, rng):
    memory = perdure.KNNMemory(1, 1, 8, 1024, index="hnsw")
    keys = clustered(rng, 1024)[None, None]
    memory.write(keys, keys)
    assert memory._rows[0].index.segment < 300
    assert (memory.search(keys[:, :, :3], 300).positions >= 0).all()


def test_a_refused_graph_stays_refused_when_saved(small, rng):
    memory, _ = filled("auto", rng, costs={"walked": 1e-6, "built": 1e-6})
    queries = clustered(rng, 4)[None, None]
    for _ in range(4):
        memory.search(queries, 5)
    index = memory._rows[0].index
    assert index.name == "hnsw"
    index.index.audit.warned = True
    for _ in range(2):
        memory.search(queries, 5)
    assert index.name != "hnsw"
    again = copy.deepcopy(memory)
    for _ in range(4):
        again.search(queries, 5)
    assert again._rows[0].index.name != "hnsw"


def test_more_lists_are_searched_as_the_stream_becomes_harder(small, rng, monkeypatch):
    """Long after the first queries, audits go on with the stream: what they found of keys that have left fades."""
    monkeypatch.setattr(audit, "EARLY", 256)
    memory = perdure.KNNMemory(1, 1, 8, 4000, index="ivf")
    easy = clustered(rng, 4000, clusters=40)[None, None]
    memory.write(easy, easy)
    for _ in range(60):
        memory.search(clustered(rng, 32, clusters=40)[None, None], 8)
    before = memory._rows[0].index.probes
    for _ in range(48):  # three turnovers
        segment = rng.standard_normal((1, 1, 250, 8)).astype(np.float32)
        memory.write(segment, segment)
        memory.search(rng.standard_normal((1, 1, 16, 8)).astype(np.float32), 8)
    assert memory._rows[0].index.probes > before
    memory._rows[0].index.audit.queries = -(1 << 20)  # no audits now
    assert memory.recall(rng.standard_normal((1, 1, 500, 8)).astype(np.float32), 8) >= 0.95


def test_what_graphs_cannot_hold_is_refused(small, rng):
    """They are made in float32, whatever is stored."""
    memory, keys = filled("hnsw", rng, dtype="float64")
    memory.search(keys[:, :, :3], 2)
    before = memory.written
    with pytest.raises(perdure.NonFiniteError, match="keys"):
        memory.write(1e150 * keys.astype(np.float64), keys.astype(np.float64))
    assert memory.written == before
    with pytest.raises(perdure.NonFiniteError, match="queries"):
        memory.search(1e150 * keys.astype(np.float64), 2)
