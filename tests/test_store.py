"""Stores: what is committed is there again, what is not is not, and nobody gets what is another's."""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from perdure.memory import bodies, catalogue, engine, kinds, schema, writer
from perdure.memory.guard import Guard
from perdure.memory.protocol import Memory

import perdure

FIXTURES = Path(__file__).parent / "fixtures"
CONFIG = {"rows": 2, "heads": 2, "dim": 4, "capacity": 40}
SHAPE = {"kind": "knn", "clip": None, **CONFIG}


def segment(seed=0, n=5, rows=2, dim=4):
    return np.random.default_rng(seed).standard_normal((rows, 2, n, dim)).astype(np.float32)


def same(a, b):
    a, b = (m if isinstance(m, dict) else m.state_dict() for m in (a, b))
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and np.array_equal(a[n], b[n]) for n in a)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


@pytest.fixture(params=["bodies inline", "bodies in their file"])
def anywhere(request, monkeypatch):
    """Small bodies in the database, or in the file of bodies, as large ones are."""
    if request.param != "bodies inline":
        monkeypatch.setattr(engine, "INLINE", 0)


def reopened(store, path, **options):
    store.close()
    return perdure.open(path, **options)


# ---- committed and not ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("anywhere")
def test_what_was_committed_is_there_again_and_goes_on_as_it_would(path):
    twin = perdure.KNNMemory(**CONFIG)
    store = perdure.open(path)
    for step in range(12):
        memory = store.memory("user-42", **SHAPE)
        keys = segment(step, n=step)
        for one in (memory, twin):
            match step % 4:
                case 0:
                    one.write(keys, keys)
                case 1:
                    one.write(keys, values=keys, tags=step)
                case 2:
                    one.write(keys[:1], keys[:1], rows=[1], mask=np.arange(step)[None] % 2 == 0)
                case 3:
                    one.clear([step % 2])
        store.commit()
        if step % 5 == 4:
            store.checkpoint()
        if step % 3 == 2:
            store = reopened(store, path)
        assert same(store.memory("user-42"), twin), step
    store.verify()
    queries = segment(99)
    a, b = store.memory("user-42").read(queries, k=3), twin.read(queries, k=3)
    assert np.array_equal(a.output, b.output)
    store.close()


@pytest.mark.usefixtures("anywhere")
def test_what_was_not_committed_is_gone(path):
    with perdure.open(path) as store:
        store.memory("a", **SHAPE).write(segment(1), segment(1))
    store = perdure.open(path)
    before = store.memory("a").state_dict()
    store.memory("a").write(segment(2), segment(2))
    store.memory("b", **SHAPE)
    store.delete("a")
    assert store.names() == ["b"]
    store = reopened(store, path)
    assert store.names() == ["a"]
    assert same(store.memory("a"), before)
    store.close()


KINDS = {
    "knn": {"rows": 2, "heads": 2, "dim": 4, "capacity": 20},
    "continuous": {"rows": 2, "dim": 4, "basis": 8, "samples": 16},
    "recurrent": {"rows": 2, "dim": 4, "capacity": 6},
    "compressive": {"rows": 2, "dim": 4, "capacity": 4, "compressed": 3, "rate": 2, "method": "most_used"},
    "hybrid": {"rows": 2, "heads": 2, "dim": 4, "capacity": 60, "basis": 8},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_stored_saved_and_repeated_to_the_bit(path, tmp_path, kind):
    config, before = KINDS[kind], None
    for step in range(6):
        with perdure.open(path) as store:
            memory = store.memory(kind, kind=kind, **config)
            assert before is None or same(memory, before)
            for _ in range(2):
                keys = segment(step)
                memory.write(*((keys, keys) if "heads" in config else (keys[:, 0],)))
                match kind:
                    case "continuous":
                        memory.write(keys[:, 0], attention=(np.full((2, 3), 0.4), np.full((2, 3), 0.01)))
                    case "compressive":
                        memory.attended(np.ones((2, 2)) * step)
                    case "hybrid":
                        memory.read(keys, k=2)
            if step == 3:
                memory.clear([1])
            memory.save(tmp_path / "copy")
            for mmap in (False, True):
                assert same(perdure.load(tmp_path / "copy", mmap=mmap), memory)
            before = memory.state_dict()
            if step == 4:
                store.checkpoint()


def test_what_changes_while_a_commit_passes_is_left_to_the_next(path, monkeypatch):
    keep = perdure.CompressiveMemory.attended

    def attended(self, weights):
        store.commit()  # by another thread, in the midst of the call
        store.memory("b").write(segment()[:, 0])
        store.commit()  # the cache holds one memory
        keep(self, weights)

    monkeypatch.setattr(perdure.CompressiveMemory, "attended", attended)
    store = perdure.open(path, cache=1)
    for name in "ab":
        store.memory(name, kind="compressive", **KINDS["compressive"]).write(segment()[:, 0])
    twin = perdure.CompressiveMemory.from_state_dict(store.memory("a").state_dict())
    store.memory("a").attended(np.ones((2, 2)))
    keep(twin, np.ones((2, 2)))
    assert same(store.memory("a"), twin)
    store.commit()
    store = reopened(store, path)
    assert same(store.memory("a"), twin)
    store.close()


def test_a_with_block_that_fails_commits_nothing(path):
    def failing():
        with perdure.open(path) as store:
            store.memory("a", **SHAPE)
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    with perdure.open(path) as store:
        assert store.names() == []


def test_one_commit_is_one_moment_for_all_memories(path, monkeypatch):
    with perdure.open(path) as store:
        for name in "abc":
            store.memory(name, **SHAPE)
    store = perdure.open(path)
    for name in "abc":
        store.memory(name).write(segment(1), segment(1))
    put, calls = engine.Engine.put_facts, []
    monkeypatch.setattr(engine.Engine, "put_facts", lambda self, facts: calls.append(1) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.commit()
    assert calls
    with perdure.open(path, readonly=True) as reader:
        assert [int(reader.memory(name).tokens.sum()) for name in "abc"] == [0, 0, 0]
    monkeypatch.setattr(engine.Engine, "put_facts", put)
    store.commit()  # everything waited for another try
    store = reopened(store, path)
    assert [int(store.memory(name).tokens.sum()) for name in "abc"] == [10, 10, 10]
    store.verify()
    store.close()


@pytest.mark.parametrize("taken", [False, True])
def test_a_commit_that_is_interrupted_writes_nothing_twice(path, monkeypatch, taken):
    with perdure.open(path) as store:
        store.memory("a", **SHAPE)
    store = perdure.open(path)
    store.memory("a").write(segment(), segment())
    before = store.stats()["perdure_store_waiting_bytes"]

    def interrupt(*anything):
        raise KeyboardInterrupt

    if taken:
        monkeypatch.setattr(catalogue.ledger, "put_call", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.commit()
        monkeypatch.undo()
    else:  # between two instructions
        entry = store.memory("a")._entry
        store._catalogue._wait_again(entry, entry.waiting, False)
    assert store.stats()["perdure_store_waiting_bytes"] == before
    store.commit()
    store = reopened(store, path)
    assert store.memory("a").tokens.tolist() == [5, 5]
    store.close()


def test_what_the_caller_does_to_its_arrays_later_changes_nothing(path):
    keys = segment()
    with perdure.open(path) as store:
        memory = store.memory("a", **SHAPE)
        memory.write(keys, keys)
        keys[:] = 7
        before = memory.state_dict()
    with perdure.open(path) as store:
        assert same(store.memory("a"), before)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_arrays_of_other_frameworks_are_repeated_as_they_were_written(path, dtype):
    import torch

    keys = torch.from_numpy(segment().astype(np.float64)).to(getattr(torch, dtype))
    with perdure.open(path) as store:
        memory = store.memory("a", **SHAPE, dtype="float32")
        memory.write(keys, keys.to(keys.dtype), mask=torch.ones(2, 5, dtype=torch.bool))
        assert isinstance(memory.read(keys, k=2).output, torch.Tensor)
        before = memory.state_dict()
    with perdure.open(path) as store:
        assert same(store.memory("a"), before)


@pytest.mark.parametrize("wrong", ["shape", "nan", "mask", "rows", "argument", "object"])
def test_a_rejected_write_changes_nothing_and_is_not_remembered(path, wrong):
    keys = segment()
    with perdure.open(path) as store:
        memory = store.memory("a", **SHAPE)
        memory.write(keys, keys)
        before = memory.state_dict()
        arguments = {"keys": keys, "values": keys}
        arguments |= {
            "shape": {"values": keys[:1]},
            "nan": {"keys": keys * np.nan},
            "mask": {"mask": np.ones((2, 4), bool)},
            "rows": {"rows": [0, 7]},
            "argument": {"colour": 3},
            "object": {"tags": np.array([None])},
        }[wrong]
        with pytest.raises((perdure.ArgumentError, TypeError)):
            memory.write(**arguments)
        assert same(memory, before)
    with perdure.open(path) as store:
        assert same(store.memory("a"), before)


@pytest.mark.parametrize("kind", ["knn", "hybrid"])
def test_rows_to_clear_are_any_row_numbers_and_nothing_else(path, kind):
    with perdure.open(path) as store:
        memory = store.memory("a", kind=kind, **KINDS[kind])
        for rows in ([0], iter([0]), (0,), np.array([0]), range(1)):
            memory.write(segment(), segment())
            store.commit()
            memory.clear(rows)
            assert memory.tokens[0] == 0
        for rows in (0, [2], [-1], [0, 0], "0", [None]):
            with pytest.raises(perdure.ArgumentError, match="rows"):
                memory.clear(rows)
        before = memory.state_dict()
    with perdure.open(path) as store:
        assert same(store.memory("a"), before)


def damaged(x, fault):
    """`x` (rows, ..., n, dim) with a fault, or empty, or of another dtype."""
    match fault:
        case "nan" | "inf" | "-inf":
            x = x.copy()
            x[-1, ..., -1, 0] = float(fault)
            return x
        case "huge":
            return x.astype(np.float64) * 1e300
        case "dim":
            return x[..., :-1]
        case "rows":
            return np.concatenate([x, x])
        case "axes":
            return x[0, ..., 0]
        case "empty":
            return x[..., :0, :]
        case "object":
            return x.astype(object)
        case "list":
            return x.tolist()
    return x.astype(fault)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_written_a_memory_takes_it_whole_or_stays_as_it_is(path, kind):
    good = segment(1) if "heads" in KINDS[kind] else segment(1)[:, 0]
    twice = 1 + ("heads" in KINDS[kind])
    refused = (
        "nan",
        "inf",
        "-inf",
        "huge",
        "dim",
        "rows",
        "axes",
        "object",
        "list",
        "int64",
        "complex64",
        "bool",
        "S4",
    )
    with perdure.open(path) as store:
        memory = store.memory(kind, kind=kind, **KINDS[kind])
        memory.write(*[good] * twice)
        store.commit()
        before = memory.state_dict()
        for fault in refused:
            for place in range(twice):
                arrays = [good] * twice
                arrays[place] = damaged(good, fault)
                with pytest.raises(perdure.PerdureError):
                    memory.write(*arrays)
                assert same(memory, before), f"{fault} in argument {place}"
        memory.write(*[damaged(good, "empty")] * twice)
        assert same(memory, before)
        if "mask" in inspect.signature(kinds.class_of(kind).write).parameters:
            memory.write(*[good] * twice, mask=np.zeros((2, 5), bool))
            assert same(memory, before)
        for dtype in ("float16", "float64"):
            memory.write(*[good.astype(dtype)] * twice)
    with perdure.open(path) as store:
        assert all(np.isfinite(array).all() for array in store.memory(kind).state_dict().values())


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "user-42",
        "../../etc/passwd",
        "/",
        "a" * 1024,
        "'; DROP TABLE memories; --",
        "nul\0inside",
        "zwölf ∞",
        " ",
        "CON",
    ],
)
def test_any_text_is_a_name_and_never_a_path(path, name):
    with perdure.open(path) as store:
        store.memory(name, **SHAPE).write(segment(), segment())
    with perdure.open(path) as store:
        assert store.names() == [name]
        assert store.memory(name).tokens.tolist() == [5, 5]
    assert [p.name for p in path.parent.iterdir()] == ["store"]


@pytest.mark.parametrize("name", ["", "a" * 1025, None, 3, b"bytes", "\ud800"])
def test_what_is_no_name_is_refused(path, name):
    with perdure.open(path) as store, pytest.raises(perdure.ArgumentError, match="name"):
        store.memory(name, **SHAPE)


def test_a_memory_is_what_it_was_made_as(path):
    with perdure.open(path) as store:
        with pytest.raises(perdure.ArgumentError, match="Give its kind"):
            store.memory("a")
        store.memory("a", **SHAPE)
        assert store.memory("a", **SHAPE).kind == "knn"
        assert store.memory("a").capacity == 40
        with pytest.raises(perdure.ArgumentError, match="40, as 'a' was made with"):
            store.memory("a", capacity=41)
        with pytest.raises(perdure.ArgumentError, match="knn"):
            store.memory("a", kind="continuous")
        with pytest.raises(perdure.ArgumentError, match="one of knn"):
            store.memory("b", kind="os.system")
        assert store.names() == ["a"]


@pytest.mark.parametrize("kind", KINDS)
def test_settings_that_are_unknown_missing_or_wrong_are_named(path, kind):
    config = KINDS[kind]
    wrong = [({**config, "colour": 3}, "colour")]
    wrong += [({k: v for k, v in config.items() if k != gone}, f"{gone}: expected a value") for gone in ("rows", "dim")]
    wrong += [({**config, "dim": value}, "dim") for value in (0, -1, 1.5, "4", None, [4], np.arange(3))]
    with perdure.open(path) as store:
        for settings, match in wrong:
            with pytest.raises(perdure.ArgumentError, match=match):
                store.memory("a", kind=kind, **settings)
        for setting in config:
            for value in (object(), {}, [[]], "no such thing", float("nan"), b""):
                with contextlib.suppress(perdure.PerdureError):  # nothing else may come
                    store.memory(f"{setting}", kind=kind, **{**config, setting: value})
                    store.delete(f"{setting}")
        for kind in (["knn"], 3, "", "KNNMemory"):
            with pytest.raises(perdure.ArgumentError, match="kind: expected one of knn"):
                store.memory("a", kind=kind, **config)
        assert store.names() == []


def test_settings_may_be_numbers_of_any_kind(path):
    shape = {**SHAPE, "capacity": np.int64(40), "target_recall": np.float32(0.5)}
    with perdure.open(path) as store:
        store.memory("a", **shape)
    with perdure.open(path) as store:
        assert store.memory("a", **shape).capacity == store.memory("a", **SHAPE).capacity == 40


def test_a_stored_memory_is_a_memory(path, tmp_path):
    with perdure.open(path) as store:
        memory = store.memory("a", **SHAPE)
        memory.write(segment(), segment())
        assert isinstance(memory, Memory)
        assert memory.nbytes > 0
        assert repr(memory) == "<StoredMemory 'a', kind 'knn'>"
        memory.save(tmp_path / "copy")
        assert same(perdure.load(tmp_path / "copy"), memory)
        with pytest.raises(AttributeError):
            memory.capacity = 3
        with pytest.raises(perdure.ArgumentError, match="store"):
            type(memory).from_state_dict({})


def filled_for_fixture(store):
    """What tests/fixtures/store-1 was made with: numbers that follow from their place alone."""
    keys = np.arange(2 * 2 * 300 * 4, dtype=np.float32).reshape(2, 2, 300, 4) / 64 - 1
    memory = store.memory("a", **SHAPE | {"capacity": 1000})
    memory.write(keys, keys, tags=3)  # large enough for the file of bodies
    store.commit()
    memory.write(keys[:, :, :5], keys[:, :, :5], tags=4, source="page")
    memory.clear([1])
    store.memory("../b", kind="continuous", rows=1, dim=4, basis=8).write(keys[:1, 0])
    store.commit()


@pytest.mark.parametrize("old", sorted(FIXTURES.glob("store-*")), ids=lambda old: old.name)
def test_stores_of_every_version_open(path, tmp_path, old):
    shutil.copytree(old, path)
    with perdure.open(path) as store, perdure.open(tmp_path / "new") as new:
        store.verify()
        filled_for_fixture(new)
        assert store.names() == ["../b", "a"]
        found, expected = (s.memory("a").state_dict() for s in (store, new))
        for name in ("written", "rows.0.keys", "rows.0.values", "rows.0.tags"):
            assert np.array_equal(found[name], expected[name]), name
        found, expected = (s.memory("../b").state_dict()["coefficients"] for s in (store, new))
        assert np.allclose(found, expected, atol=1e-4)
        store.checkpoint()


def test_there_is_a_fixture_of_the_current_version():
    assert (FIXTURES / f"store-{schema.VERSION}").is_dir()


# ---- forgetting -----------------------------------------------------------------------------------------------------


def traces(path, canary):
    return [file.name for file in path.iterdir() if canary in file.read_bytes()]


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("how", ["delete", "clear", "clear rows", "overwrite"])
@pytest.mark.parametrize("between", ["nothing", "checkpoint", "reopen"])
def test_after_a_checkpoint_no_trace_is_left(path, how, between):
    marked = np.full((2, 2, 5, 4), np.frombuffer(b"KANA", np.float32)[0])
    marked[1] = 1
    store = perdure.open(path)
    for name in ("before", "the KANARY itself", "after"):
        store.memory(name, **SHAPE).write(segment(), segment())
    store.memory("the KANARY itself").write(marked, marked)
    store.commit()
    if between == "checkpoint":
        store.checkpoint()
    elif between == "reopen":
        store = reopened(store, path)
    assert traces(path, b"KANAKANA")
    memory = store.memory("the KANARY itself")
    match how:
        case "delete":
            store.delete("the KANARY itself")
        case "clear":
            store.clear("the KANARY itself")
        case "clear rows":
            memory.clear([0])
        case "overwrite":
            memory.write(segment(n=40), segment(n=40))
            memory.clear([1])
    store.checkpoint()
    assert traces(path, b"KANAKANA") == []
    if how == "delete":
        assert traces(path, b"KANARY itself") == []
        with pytest.raises(perdure.StoreError, match="deleted"):
            memory.write(segment(), segment())
        with pytest.raises(perdure.StoreError, match="deleted"):
            memory.read(segment(), k=1)
    assert store.memory("before").tokens.tolist() == store.memory("after").tokens.tolist() == [5, 5]
    store.verify()
    store.close()


@pytest.fixture
def scattered(path, monkeypatch):
    """A store whose last body has free room before it, to which a checkpoint moves it."""
    monkeypatch.setattr(engine, "INLINE", 0)
    with perdure.open(path) as store:
        for name in "abcdef":
            store.memory(name, **SHAPE).write(segment(n=40), segment(n=40))
        store.commit()
        for name in "abcde":
            store.delete(name)
        store.commit()
        yield store


def test_a_reader_finds_what_moved_while_it_read(scattered, path, monkeypatch):
    get, moved = engine.Engine.get, []

    def late(self, memory, number):
        if not moved:
            moved.append(scattered._catalogue.give_back())
        return get(self, memory, number)

    monkeypatch.setattr(engine.Engine, "get", late)
    before = (path / "bodies").stat().st_size
    with perdure.open(path, readonly=True) as reader:
        assert same(reader.memory("f"), scattered.memory("f"))
    assert moved
    assert (path / "bodies").stat().st_size < before


def test_what_could_not_be_moved_stays_where_it_was(scattered, path, monkeypatch):
    class Failing:
        def __init__(self, connection):
            self.connection = connection

        def __getattr__(self, name):
            return getattr(self.connection, name)

        def execute(self, text, *rest):
            if text == "COMMIT":
                self.connection.execute("ROLLBACK")
                raise sqlite3.OperationalError("disk I/O error")
            return self.connection.execute(text, *rest)

    whole = scattered._engine.connection
    monkeypatch.setattr(scattered._engine, "connection", Failing(whole))
    with pytest.raises(perdure.StoreError, match="disk"):
        scattered._catalogue.give_back()
    monkeypatch.setattr(scattered._engine, "connection", whole)
    scattered.memory("new", **SHAPE).write(segment(9, n=40), segment(9, n=40))  # into room that is free
    scattered.commit()
    scattered.verify()
    scattered.checkpoint()
    scattered.verify()


@pytest.mark.parametrize("where", ["database", "bodies"])
def test_the_search_for_traces_finds_those_of_a_store_that_leaves_them(path, monkeypatch, where):
    monkeypatch.setattr(schema, "PRAGMAS", (*schema.PRAGMAS, "secure_delete = OFF"))
    monkeypatch.setattr(catalogue.Catalogue, "give_back", lambda self: None)
    if where == "bodies":
        monkeypatch.setattr(engine, "INLINE", 0)
    marked = np.full((2, 2, 5, 4), np.frombuffer(b"KANA", np.float32)[0])
    with perdure.open(path) as store:
        for name in ("before", "marked", "after"):
            store.memory(name, **SHAPE).write(segment(), segment())
        store.memory("marked").write(marked, marked)
        store.commit()
        store.delete("marked")
        store.checkpoint()
        assert traces(path, b"KANAKANA")


def test_a_checkpoint_reads_only_what_it_compacts(path):
    with perdure.open(path) as store:
        for i in range(6):
            store.memory(f"{i}", **SHAPE).write(segment(n=20), segment(n=20))
        store.commit()
        for i in range(6):
            n = 40 if i == 1 else 1
            store.memory(f"{i}").write(segment(n=n), segment(n=n))
        store.memory("2").clear([0])
    with perdure.open(path) as store:
        store.checkpoint()
        assert store.stats()["perdure_store_loads_total"] == 2
        assert store.stats()["perdure_store_states_total"] == 2
        store.verify()


def test_a_name_can_be_used_again(path):
    with perdure.open(path) as store:
        store.memory("a", **SHAPE).write(segment(), segment())
        store.commit()
        store.delete("a")
        store.memory("a", **(SHAPE | {"dim": 3}))
    with perdure.open(path) as store:
        assert store.memory("a").dim == 3
        assert store.memory("a").tokens.tolist() == [0, 0]
        store.verify()


def test_a_store_of_many_shrinks_when_most_is_deleted(path):
    with perdure.open(path) as store:
        for i in range(40):
            store.memory(f"{i}", **SHAPE | {"capacity": 4000}).write(segment(i, 2000), segment(i, 2000))
        store.checkpoint()
        full = store.stats()["perdure_store_disk_bytes"]
        for i in range(39):
            store.delete(f"{i}")
        store.checkpoint()
        store.checkpoint()
        assert store.stats()["perdure_store_disk_bytes"] < 0.2 * full
        assert np.array_equal(store.memory("39").state_dict()["rows.0.keys"], segment(39, 2000)[0])
    with perdure.open(path) as store:
        store.verify()


# ---- several processes, several threads -----------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_a_reader_is_not(path):
    with perdure.open(path) as store:
        store.memory("a", **SHAPE).write(segment(), segment())
        store.commit()
        with pytest.raises(perdure.StoreError, match="open for writing already"):
            perdure.open(path)
        code = f"import perdure; perdure.open({str(path)!r})"
        home = str(Path(perdure.__file__).parents[1])
        other = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": home}
        )
        assert "StoreError" in other.stderr
        with perdure.open(path, readonly=True) as reader:
            assert reader.memory("a").tokens.tolist() == [5, 5]
            for change in (
                lambda: reader.memory("a").write(segment(), segment()),
                lambda: reader.memory("a").clear(),
                reader.commit,
                reader.checkpoint,
                lambda: reader.delete("a"),
            ):
                with pytest.raises(perdure.StoreError, match="for writing, got one open for reading"):
                    change()
            with pytest.raises(perdure.ArgumentError):
                reader.memory("b", **SHAPE)


@pytest.mark.usefixtures("anywhere")
def test_a_reader_follows_the_writer(path):
    with perdure.open(path) as store:
        memory = store.memory("a", **SHAPE)
        store.commit()
        with perdure.open(path, readonly=True) as reader:
            copy = reader.memory("a")
            for step in range(8):
                memory.write(segment(step), segment(step))
                if step == 3:
                    memory.clear([1])
                assert not same(copy, memory)
                store.commit()
                if step == 5:
                    store.checkpoint()
                assert not same(copy, memory) or step == 5
                reader.refresh()
                assert same(copy, memory)
            store.delete("a")
            store.memory("b", **SHAPE)
            store.commit()
            assert reader.names() == ["b"]
            with pytest.raises(perdure.StoreError, match="deleted"):
                copy.read(segment(), k=1)


def test_after_a_kill_a_reader_and_a_writer_find_what_was_committed(path):
    ready, go = os.pipe()
    child = os.fork()
    if not child:
        store = perdure.open(path)
        store.memory("a", **SHAPE).write(segment(), segment())
        store.commit()
        store.memory("a").write(segment(), segment())
        os.write(go, b"x")
        threading.Event().wait()
    os.read(ready, 1)
    os.kill(child, 9)
    os.waitpid(child, 0)
    with perdure.open(path, readonly=True) as reader:
        assert reader.memory("a").tokens.tolist() == [5, 5]
    with perdure.open(path) as store:
        assert store.memory("a").tokens.tolist() == [5, 5]
        store.verify()


def test_a_log_that_is_gone_or_cut_after_a_kill_is_noticed(path, tmp_path):
    with perdure.open(path) as store:
        store.memory("a", **SHAPE).write(segment(), segment())
    store = perdure.open(path)
    store.memory("a").write(segment(1), segment(1))
    store.commit()
    shutil.copytree(path, tmp_path / "killed")
    store.close()
    log = tmp_path / "killed" / (schema.FILE + "-wal")
    whole = log.read_bytes()
    for left in (whole[:0], whole[:-100], whole[:40] + bytes(len(whole) - 40)):
        log.write_bytes(left)
        for readonly in (False, True):
            with pytest.raises(perdure.FileError, match="the 2 commits that were acknowledged, got 1"):
                perdure.open(tmp_path / "killed", readonly=readonly)
        log.with_name(schema.FILE + "-shm").unlink(missing_ok=True)
        log.write_bytes(whole)
        shutil.copytree(tmp_path / "killed", tmp_path / "whole")
        with perdure.open(tmp_path / "whole") as store:
            assert store.memory("a").tokens.tolist() == [10, 10]
        shutil.rmtree(tmp_path / "whole")
    log.unlink()
    (tmp_path / "killed" / writer.LOCK).unlink()
    with perdure.open(tmp_path / "killed") as store:  # as the error says
        assert store.memory("a").tokens.tolist() == [5, 5]
        store.verify()


@pytest.mark.parametrize("note", [b"", b"\0" * 20, b"9 comm", b"9 commits 00000000\n", b"-1", b"9" * 100])
def test_a_note_that_is_none_claims_nothing(path, note):
    with perdure.open(path) as store:
        store.memory("a", **SHAPE)
    (path / writer.LOCK).write_bytes(note)
    for readonly in (True, False):
        with perdure.open(path, readonly=readonly) as store:
            assert store.names() == ["a"]


def in_child(action):
    """What `action` raises in a forked child, by name."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            action()
            os.write(writing, b"nothing")
        except BaseException as error:
            os.write(writing, type(error).__name__.encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading, "rb") as pipe:
        return pipe.read().decode()


def test_a_forked_child_gets_a_clear_error_and_leaves_the_parent_alone(path):
    with perdure.open(path) as store:
        memory = store.memory("a", **SHAPE)
        memory.write(segment(), segment())
        store.commit()
        for action in (store.commit, lambda: memory.read(segment(), k=1), lambda: memory.write(segment(), segment())):
            assert in_child(action) == "ForkError"
        assert in_child(store.close) == "nothing"
        for readonly in (False, True):
            assert in_child(lambda readonly=readonly: perdure.open(path, readonly=readonly)) == "ForkError"
        memory.write(segment(), segment())
        store.commit()
    with perdure.open(path) as store:
        assert store.memory("a").tokens.tolist() == [10, 10]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_what_a_thread_of_its_parent_held(path):
    store, inside, leave = perdure.open(path), threading.Event(), threading.Event()

    def hold():
        with store._session.using():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()

    def end_of_block():
        signal.alarm(20)
        with store:
            pass

    assert in_child(lambda: signal.alarm(20) or store.close()) == "nothing"
    assert in_child(end_of_block) == "ForkError"
    leave.set()
    thread.join()
    store.close()


def test_a_store_that_is_dropped_gives_its_files_back(path):
    store = perdure.open(path)
    store.memory("a", **SHAPE)
    store.commit()
    descriptors = len(os.listdir("/dev/fd"))
    del store
    gc.collect()
    assert len(os.listdir("/dev/fd")) < descriptors
    with perdure.open(path) as store:
        assert store.names() == ["a"]


def test_a_closed_store_can_be_read_where_nothing_can_be_written(path, monkeypatch):
    with perdure.open(path) as store:
        store.memory("a", **SHAPE).write(segment(), segment())
    before = sorted(os.listdir(path))
    monkeypatch.setattr(schema.os, "access", lambda folder, mode: False)
    with perdure.open(path, readonly=True) as reader:
        assert reader.memory("a").tokens.tolist() == [5, 5]
        reader.verify()
        assert sorted(os.listdir(path)) == before


def test_threads_share_a_store(path):
    store = perdure.open(path, cache=1)  # everything leaves main memory as soon as it can
    names = [f"{i}" for i in range(6)]
    for name in names:
        store.memory(name, **SHAPE | {"capacity": 10_000})
    store.commit()
    failures, written = [], dict.fromkeys(names, 0)

    def work(number):
        try:
            rng = np.random.default_rng(number)
            for _ in range(25):
                name = names[rng.integers(6)]
                memory = store.memory(name)
                if number < 6:
                    memory = store.memory(names[number])
                    memory.write(segment(number, 3), segment(number, 3))
                    written[names[number]] += 3
                    if rng.random() < 0.2:
                        store.commit()
                else:
                    tokens = memory.tokens
                    assert tokens[0] % 3 == 0
                    found = memory.read(segment(int(name)), k=2).neighbours.positions
                    assert found.max() < memory.tokens[0] + 3
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    store.checkpoint()
    store = reopened(store, path)
    assert {name: int(store.memory(name).tokens[0]) for name in names} == written
    store.verify()
    store.close()


# ---- bounds ---------------------------------------------------------------------------------------------------------


def test_quotas_refuse_before_anything_changes(path):
    big = segment(n=200)
    with perdure.open(path, quota=60_000, buffer=30_000) as store:
        memory = store.memory("a", **SHAPE | {"capacity": 10_000}, quota=40_000)
        repeatedly = lambda memory: [(store.commit(), memory.write(big, big)) for _ in range(10)]  # noqa: E731
        with pytest.raises(perdure.QuotaError, match="Call commit"):
            [memory.write(big, big) for _ in range(10)]
        before = memory.state_dict()
        assert store.stats()["perdure_store_waiting_bytes"] <= 30_000
        with pytest.raises(perdure.QuotaError, match="quota of the memory"):
            repeatedly(memory)
        assert int(memory.tokens[0]) >= int(before["written"][0])
        other = store.memory("b", **SHAPE | {"capacity": 10_000})
        with pytest.raises(perdure.QuotaError, match="quota of the store"):
            repeatedly(other)
        store.checkpoint()
        assert sum(store.sizes().values()) <= 60_000
        store.delete("a")
        store.commit()
        other.write(big, big)


@pytest.mark.parametrize("kind", KINDS)
def test_no_commit_takes_more_than_the_quotas(path, kind):
    numbers = np.random.default_rng(0)
    with perdure.open(path, quota=70_000) as store:
        larger = {name: 300 for name in KINDS[kind] if name in ("capacity", "compressed")}
        memory = store.memory("a", kind=kind, quota=40_000, **KINDS[kind] | larger)
        for step in range(60):
            keys = segment(step, n=int(numbers.integers(1, 60)))
            with contextlib.suppress(perdure.QuotaError):
                memory.write(*((keys, keys) if "heads" in KINDS[kind] else (keys[:, 0],)))
            if step % 7 == 0:
                store.checkpoint() if step % 3 == 0 else store.commit()
                assert store.sizes()["a"] <= 40_000
        with pytest.raises(perdure.QuotaError, match="quota of the store"):  # also memories that hold nothing
            [store.memory(f"{i}", kind=kind, **KINDS[kind]) for i in range(100)]
        store.commit()
        assert sum(store.sizes().values()) <= 70_000


def test_a_full_ring_may_be_written_for_ever_under_its_quota(path):
    with perdure.open(path, quota=30_000) as store:
        memory = store.memory("a", **SHAPE)
        for step in range(50):
            memory.write(segment(step, 20), segment(step, 20))
            store.commit()
            assert store.sizes()["a"] <= 30_000
    with perdure.open(path) as store:
        assert np.array_equal(store.memory("a").state_dict()["rows.0.keys"][:, 20:], segment(49, 20)[0])


def test_the_cache_holds_few_and_forgets_nothing(path):
    with perdure.open(path, cache=20_000) as store:
        for i in range(30):
            store.memory(f"{i}", **SHAPE).write(segment(i, 30), segment(i, 30))
            store.commit()
        stats = store.stats()
        assert stats["perdure_store_cache_bytes"] <= 20_000
        assert stats["perdure_store_memories_open"] < 30
        assert stats["perdure_store_evictions_total"] > 0
        for i in range(30):
            assert np.array_equal(store.memory(f"{i}").state_dict()["rows.1.keys"], segment(i, 30)[1])


def test_memories_that_hold_nothing_leave_the_cache_too_and_few_are_looked_at(path, monkeypatch):
    counted, nbytes = [0], Guard.nbytes.fget
    monkeypatch.setattr(Guard, "nbytes", property(lambda self: counted.append(1) or nbytes(self)))
    with perdure.open(path, cache=100_000) as store:
        for i in range(200):
            store.memory(f"{i}", **SHAPE)
            if i % 20 == 0:
                store.commit()
        store.commit()
        assert store.stats()["perdure_store_memories_open"] < 60
        assert len(counted) < 200 * 10
    with perdure.open(path) as store:
        counted.clear()
        for i in range(200):
            assert store.memory(f"{i}").capacity == 40
        assert len(counted) < 200 * 4


def test_what_waits_does_not_leave_the_cache(path):
    with perdure.open(path, cache=1) as store:
        for i in range(4):
            store.memory(f"{i}", **SHAPE).write(segment(i), segment(i))
        assert store.stats()["perdure_store_memories_open"] == 4
        store.commit()
        assert store.stats()["perdure_store_memories_open"] == 1


def test_calls_that_overwrite_one_another_are_rewritten_as_a_state(path, monkeypatch):
    monkeypatch.setattr(catalogue, "FEWEST_BYTES", 5000)
    with perdure.open(path) as store:
        memory = store.memory("a", **SHAPE)
        for step in range(40):
            memory.write(segment(step), segment(step))
            store.commit()
            assert store.sizes()["a"] < 25_000
        assert 1 < store.stats()["perdure_store_states_total"] < 20
        growing = store.memory("b", **SHAPE | {"capacity": 10_000})
        store.commit()
        before = store.stats()["perdure_store_states_total"]
        for step in range(40):
            growing.write(segment(step), segment(step))
            store.commit()
        assert store.stats()["perdure_store_states_total"] == before  # nothing is wasted, so nothing is rewritten
    with perdure.open(path) as store:
        assert np.array_equal(store.memory("a").state_dict()["rows.0.keys"][:, -5:], segment(39)[0])
        store.verify()


def test_stats_and_log(path, caplog):
    with caplog.at_level(logging.DEBUG, "perdure.store"), perdure.open(path) as store:
        store.memory("a", **SHAPE).write(segment(), segment())
        store.commit()
        store.checkpoint()
        stats = store.stats()
    assert stats["perdure_store_commits_total"] == 1
    assert stats["perdure_store_checkpoints_total"] == 1
    assert all(name.startswith("perdure_store_") and float(value) >= 0 for name, value in stats.items())
    assert [record.message for record in caplog.records] == ["opened", "committed", "checkpoint"]
    assert caplog.records[0].store == str(path)


def test_nothing_is_printed(path):
    code = f"""
import numpy as np, perdure
store = perdure.open({str(path)!r})
memory = store.memory("a", kind="knn", rows=1, heads=1, dim=2, capacity=4)
memory.write(np.ones((1, 1, 2, 2)), np.ones((1, 1, 2, 2)))
store.close()
"""
    home = str(Path(perdure.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ | {"PYTHONPATH": home})
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# ---- strangers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER t AFTER INSERT ON records BEGIN DELETE FROM memories; END",
        "CREATE VIEW v AS SELECT * FROM records",
        "CREATE TABLE more (a)",
        "CREATE INDEX i ON memories (epoch)",
        "DROP TABLE facts",
        "ALTER TABLE records ADD COLUMN more",
        "PRAGMA application_id = 7",
        "PRAGMA user_version = 0",
    ],
)
def test_a_database_with_another_schema_is_refused(path, statement):
    perdure.open(path).close()
    with sqlite3.connect(path / schema.FILE) as connection:
        connection.execute(statement)
    connection.close()
    for readonly in (False, True):
        with pytest.raises(perdure.FileError, match="another database"):
            perdure.open(path, readonly=readonly)


def test_a_newer_store_is_refused_by_name(path):
    perdure.open(path).close()
    with sqlite3.connect(path / schema.FILE) as connection:
        connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(perdure.FileError, match=r"version 1 or older, got version 9.*Upgrade perdure"):
        perdure.open(path)


@pytest.mark.parametrize("name", [schema.FILE, schema.FILE + "-wal", schema.FILE + "-shm", writer.LOCK, bodies.FILE])
@pytest.mark.parametrize("nature", ["link", "pipe", "folder"])
def test_links_pipes_and_folders_in_a_store_are_refused(path, tmp_path, name, nature):
    perdure.open(path).close()
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    (path / name).unlink(missing_ok=True)
    match nature:
        case "link":
            os.symlink(outside, path / name)
        case "pipe":
            os.mkfifo(path / name)
        case "folder":
            (path / name).mkdir()
    with pytest.raises(perdure.FileError, match="a regular file"):
        perdure.open(path)
    assert outside.read_bytes() == b"precious"


def test_a_store_is_a_folder_and_no_link_to_one(path, tmp_path):
    perdure.open(path).close()
    os.symlink(path, tmp_path / "link")
    (tmp_path / "file").write_bytes(b"")
    for name in ("link", "file"):
        with pytest.raises(perdure.FileError, match="expected a folder"):
            perdure.open(tmp_path / name)
    for readonly, name in ((True, "missing"), (False, "missing/deeper")):
        with pytest.raises(perdure.FileError, match=r"nothing there|No such file"):
            perdure.open(tmp_path / name, readonly=readonly)
    assert path.stat().st_mode & 0o777 == 0o700


def test_a_store_is_only_for_its_owner_whoever_made_the_folder(path):
    path.mkdir(mode=0o755)
    with perdure.open(path) as store:
        store.memory("a", **SHAPE).write(segment(), segment())
        store.commit()
        names = ("store.sqlite", "store.sqlite-wal", "store.sqlite-shm", "bodies", "lock")
        assert {file.name: file.stat().st_mode & 0o777 for file in path.iterdir()} == dict.fromkeys(names, 0o600)


@pytest.mark.parametrize("name", [b"a?mode=memory#b%20&c", b"\xff", "zwölf ∞".encode(), b" "])
def test_a_folder_may_be_called_anything(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    try:
        path.mkdir()
    except OSError:
        pytest.skip("not on this file system")
    for _ in range(2):
        with perdure.open(path) as store:
            store.memory("a", **SHAPE)
    assert [os.fsencode(file.name) for file in tmp_path.iterdir()] == [name]
    assert (path / schema.FILE).is_file()


def test_a_store_stays_where_it_was_opened(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with perdure.open("store") as store:
        store.memory("a", **SHAPE).write(segment(), segment())
        store.commit()
        before = store.stats()
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir("elsewhere")
        assert store.stats() == before
        assert before["perdure_store_log_bytes"] > 0
        with pytest.raises(perdure.FileError, match="a path"):
            perdure.open("")
    assert os.listdir() == []


def test_a_closed_store_says_so(path):
    store = perdure.open(path)
    memory = store.memory("a", **SHAPE)
    store.close()
    store.close()
    for action in (store.commit, store.names, lambda: memory.tokens, lambda: memory.write(segment(), segment())):
        with pytest.raises(perdure.StoreError, match="an open store, got a closed one"):
            action()
