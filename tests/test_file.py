"""Memories in files: bit-identical when loaded, sealed, replaced whole, refused when odd."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from perdure.memory import disk, file
from perdure.memory.state import pack

import perdure

FIXTURES = Path(__file__).parent / "fixtures"


def same(a, b):
    """Whether two memories would save the same, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a
    )


def counting(dtype="float32", tokens=11):
    """A memory whose contents follow from their place alone, the same on every machine and in every version."""
    memory = perdure.KNNMemory(rows=3, heads=2, dim=4, capacity=8, value_dim=3, dtype=dtype)
    keys = np.arange(3 * 2 * tokens * 4, dtype=np.float32).reshape(3, 2, tokens, 4) / 64 - 1
    memory.write(keys, keys[..., :3] * 2, tags=np.arange(3 * tokens).reshape(3, tokens))
    memory.clear([1])
    return memory


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "memory.safetensors"
    counting().save(path)
    return path


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 11])
def test_a_loaded_memory_is_the_saved_one_and_goes_on_as_it_would(tmp_path, rng, mmap, dtype, tokens):
    memory = counting(dtype, tokens)
    memory.save(tmp_path / "m")
    loaded = perdure.load(tmp_path / "m", mmap=mmap)
    assert type(loaded) is perdure.KNNMemory
    assert same(loaded, memory)
    keys, queries = rng.standard_normal((3, 2, 5, 4)), rng.standard_normal((3, 2, 2, 4))
    for one in (memory, loaded):
        one.write(keys, keys[..., :3])
    assert same(loaded, memory)
    a, b = (one.read(queries, k=3) for one in (memory, loaded))
    assert np.array_equal(a.output, b.output)
    assert np.array_equal(a.neighbours.tags, b.neighbours.tags)
    assert type(a.output) is type(b.output) is np.ndarray


KINDS = {
    "KNNMemory": {"rows": 2, "heads": 2, "dim": 4, "capacity": 20},
    "ContinuousMemory": {"rows": 2, "dim": 4, "basis": 8, "samples": 16, "sticky": True},
    "RecurrentMemory": {"rows": 2, "dim": 4, "capacity": 6},
    "CompressiveMemory": {"rows": 2, "dim": 4, "capacity": 4, "compressed": 3, "rate": 2, "method": "most_used"},
    "HybridMemory": {"rows": 2, "heads": 2, "dim": 4, "capacity": 12, "basis": 8, "eviction": "least_attended"},
}


def lived(memory, step):
    """What a memory answers in one step of its life, in which all that it can learn or draw is used."""
    x = np.random.default_rng(step).standard_normal((2, 2, 5, 4)).astype(np.float32)
    mean, variance = np.full((2, 3), 0.4), np.full((2, 3), 0.01)
    match type(memory).__name__:
        case "KNNMemory":
            memory.write(x, x, tags=step)
            return [memory.read(x, k=3).output]
        case "ContinuousMemory":
            memory.write(x[:, 0], attention=(mean, variance) if step % 2 else None)
            return [memory.read(mean, variance).output]
        case "HybridMemory":
            memory.write(x, x)
            return [memory.read(x, k=3).output]
        case "CompressiveMemory":
            memory.write(x[:, 0])
            memory.attended(np.random.default_rng(step).random((2, 4)))
            return [memory.tokens]
    memory.write(x[:, 0], rows=None)
    if step == 6:
        memory.clear([1])
    return [memory.tokens]


def through_torch(memory, path):
    import torch

    torch.save({name: torch.from_numpy(array) for name, array in memory.state_dict().items()}, path)
    return type(memory).from_state_dict(torch.load(path, weights_only=True))


def through_safetensors(memory, path):
    safetensors.numpy.save_file(memory.state_dict(), path)
    return type(memory).from_state_dict(safetensors.numpy.load_file(path))


WAYS = {
    "state_dict": lambda memory, path: type(memory).from_state_dict(memory.state_dict()),
    "torch.save": through_torch,
    "safetensors": through_safetensors,
    "save": lambda memory, path: memory.save(path) or perdure.load(path),
    "mmap": lambda memory, path: memory.save(path) or perdure.load(path, mmap=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_on_bit_for_bit_whatever_way_it_travelled(tmp_path, kind, way):
    memory = getattr(perdure, kind)(**KINDS[kind])
    for step in range(5):
        lived(memory, step)
    other = WAYS[way](memory, tmp_path / "m")
    assert same(other, memory)
    for step in range(5, 10):
        assert all(np.array_equal(a, b) for a, b in zip(lived(memory, step), lived(other, step), strict=True))
        assert same(other, memory)


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("knn-*")), ids=lambda path: path.name)
@pytest.mark.parametrize("mmap", [False, True])
def test_files_of_every_version_open(path, mmap):
    expected, found = counting().state_dict(), perdure.load(path, mmap=mmap).state_dict()
    for name in ("written", *(f"rows.{i}.{part}" for i in (0, 2) for part in ("keys", "values", "tags"))):
        assert np.array_equal(found[name], expected[name]), name


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*Memory-*")), ids=lambda path: path.name)
def test_files_of_every_kind_and_version_open(path):
    """Each was saved after four steps of `lived`."""
    held, memory = safetensors.numpy.load_file(path), perdure.load(path)
    found = memory.state_dict()
    assert type(memory).__name__ == path.name.partition("-")[0]
    assert all(np.array_equal(held[name], found[name]) for name in held if not name.endswith("config"))
    assert all(np.isfinite(answer).all() for answer in lived(memory, 4))


@pytest.mark.parametrize("name", ["knn", *KINDS])
def test_there_is_a_fixture_of_the_current_version(name):
    assert (FIXTURES / f"{name}-{file.VERSION}.safetensors").is_file()


def test_the_library_of_the_format_reads_the_file(saved):
    arrays, state = safetensors.numpy.load_file(saved), counting().state_dict()
    assert arrays.keys() == state.keys()
    assert all(np.array_equal(arrays[name], state[name]) for name in state)


def test_saving_twice_gives_the_same_bytes(saved, tmp_path):
    counting().save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()


def test_what_a_mapped_memory_changes_stays_its_own(saved):
    before = saved.read_bytes()
    one, other = perdure.load(saved, mmap=True), perdure.load(saved, mmap=True)
    keys = np.full((3, 2, 8, 4), 7.0)
    one.write(keys, keys[..., :3])
    one.clear([0])
    assert same(other, counting())
    assert saved.read_bytes() == before


def test_a_mapped_memory_outlives_the_replacement_of_its_file(saved):
    memory = perdure.load(saved, mmap=True)
    counting(tokens=3).save(saved)
    assert same(memory, counting())
    assert same(perdure.load(saved), counting(tokens=3))


def enormous(path, tokens, dim):
    """A file of that size in which only the header is written: keys and values are a hole."""
    memory = perdure.KNNMemory(rows=1, heads=1, dim=dim, capacity=tokens)
    state = memory.state_dict()
    state["config"] = np.pad(state["config"], (0, -state["config"].size % 8), constant_values=ord(" "))
    state["written"][:] = tokens
    sizes = {"written": [1], "config": [state["config"].size], **dict.fromkeys(("rows.0.keys", "rows.0.values"))}
    header, end = {}, 0
    for name, shape in sizes.items():
        dtype, shape = {"written": "I64", "config": "U8"}.get(name, "F32"), shape or [1, tokens, dim]
        begin, end = end, end + int(np.prod(shape)) * file.DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    about = {"format": "perdure memory", "seal": "0" * 64, "sha256": dict.fromkeys(header, ""), "version": 1}
    header["__metadata__"] = {"perdure": json.dumps(about, separators=(",", ":"))}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as whole:
        whole.write(len(text).to_bytes(8, "little") + text + state["written"].tobytes() + state["config"].tobytes())
        whole.truncate(8 + len(text) + end)
    file._seal(path)


def test_a_mapped_memory_may_be_larger_than_main_memory(tmp_path):
    tokens = 2 * file._memory_of_machine() // (2 * 1024 * 4)
    enormous(tmp_path / "m", tokens, 1024)
    refused(tmp_path / "m", "at most")
    memory = perdure.load(tmp_path / "m", mmap=True)
    assert memory.tokens.tolist() == [tokens]
    assert not memory.at(np.array([[tokens - 1]])).keys.any()


def test_a_mapped_memory_is_not_read_before_it_is_used(saved):
    memory, whole = perdure.load(saved), bytearray(saved.read_bytes())
    keys = memory.state_dict()["rows.0.keys"].tobytes()
    assert whole.count(keys) == 1
    at = whole.index(keys)
    whole[at : at + len(keys)] = b"\xff" * len(keys)
    saved.write_bytes(whole)
    assert np.isnan(perdure.load(saved, mmap=True).state_dict()["rows.0.keys"]).all()
    refused(saved, "checksum", mmap=True, verify=True)


# ---- what is refused ------------------------------------------------------------------------------------------------


def refused(path, match, **options):
    with pytest.raises(perdure.FileError, match=match):
        perdure.load(path, **options)


@pytest.mark.parametrize("mmap", [False, True])
def test_flipped_bytes_of_the_header_are_noticed(saved, tmp_path, mmap):
    whole = saved.read_bytes()
    for place in (*range(64), *range(64, 8 + int.from_bytes(whole[:8], "little"), 5)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        (tmp_path / "damaged").write_bytes(damaged)
        refused(tmp_path / "damaged", "damaged", mmap=mmap)


def test_flipped_bytes_of_the_arrays_are_noticed(saved, tmp_path):
    whole = saved.read_bytes()
    for place in range(8 + int.from_bytes(whole[:8], "little"), len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        (tmp_path / "damaged").write_bytes(damaged)
        refused(tmp_path / "damaged", "checksum")
        refused(tmp_path / "damaged", "checksum", mmap=True, verify=True)


def test_every_length_but_the_right_one_is_noticed(saved, tmp_path):
    whole = saved.read_bytes()
    for length in {*range(0, len(whole), 7), len(whole) - 1}:
        (tmp_path / "damaged").write_bytes(whole[:length])
        refused(tmp_path / "damaged", "damaged")
    (tmp_path / "damaged").write_bytes(whole + b"\0")
    refused(tmp_path / "damaged", "damaged")


def test_a_newer_version_is_refused_by_name(saved):
    saved.write_bytes(saved.read_bytes().replace(b'\\"version\\":1', b'\\"version\\":7'))
    refused(saved, r"format version 1 or older, got version 7.*Upgrade perdure")


def test_another_file_of_the_format_is_refused(tmp_path):
    safetensors.numpy.save_file(counting().state_dict(), tmp_path / "m")
    refused(tmp_path / "m", "made by perdure's save")


def resealed(path, change):
    """Change the header, an equal length kept, and seal it again, as one who knows the format can."""
    whole = bytearray(path.read_bytes())
    length = int.from_bytes(whole[:8], "little")
    header = change(bytes(whole[8 : 8 + length]))
    assert len(header) == length
    zeroed = re.sub(rb'(seal\\":\\")[0-9a-f]{64}', rb"\g<1>" + b"0" * 64, header)
    sealed = re.sub(rb'(seal\\":\\")0{64}', rb"\g<1>" + file._digest(zeroed).encode(), zeroed)
    whole[8 : 8 + length] = sealed
    path.write_bytes(whole)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"dtype":"F32"', b'"dtype":"F99"'),
        (b'"dtype":"F32"', b'"dtype":"C64"'),
        (b'"shape":[3]', b'"shape":[4]'),
        (b'"rows.0.keys":', b'"rows.2.keys":'),
        (b'"rows.0.keys":', b'"rows.9.keys":'),
        (b'"data_offsets":[0,64]', b'"data_offsets":[8,64]'),
        (b'"data_offsets":[0,64]', b'"data_offsets":[-8,6]'),
        (b"perdure memory", b"perdure mammal"),
    ],
)
@pytest.mark.parametrize("mmap", [False, True])
def test_a_header_that_lies_is_refused_even_when_sealed(saved, old, new, mmap):
    resealed(saved, lambda header: header.replace(old, new, 1))
    refused(saved, "memory.safetensors", mmap=mmap)


@pytest.mark.parametrize(
    "config",
    [
        {"rows": 10**12},
        {"rows": "3"},
        {"rows": None},
        {"heads": 0},
        {"dim": 10**18},
        {"capacity": 2**70},
        {"space": "../../etc"},
        {"unknown": 1},
        {"dtype": "object"},
    ],
)
def test_a_configuration_that_lies_is_refused_without_being_obeyed(tmp_path, config):
    state = counting().state_dict()
    honest = json.loads(state.pop("config").tobytes())
    honest.pop("kind")

    file.save_arrays(pack("KNNMemory", honest | config, state), tmp_path / "m")
    if config == {"capacity": 2**70}:
        return  # more than was ever written is a lie nobody is hurt by
    refused(tmp_path / "m", "expected")


def test_a_kind_nobody_knows_is_refused(saved):
    whole = saved.read_bytes()
    safe = safetensors.numpy.load(whole)
    safe["config"] = np.frombuffer(b'{"kind": "os.system"}', np.uint8)
    with pytest.raises(perdure.ArgumentError, match=r"os\.system"):
        file.revive(safe)


def test_only_memories_are_saved(tmp_path):
    with pytest.raises(perdure.ArgumentError, match="KNNMemory"):
        perdure.save({"keys": np.zeros(3)}, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_file_over_the_limit_is_refused_before_it_is_read(saved):
    refused(saved, "at most 100 bytes", largest=100)
    with open(saved, "r+b") as whole:
        whole.truncate(1 << 40)
    refused(saved, "at most")
    refused(saved, "header", mmap=True)


@pytest.mark.parametrize("verb", ["load", "save"])
def test_links_pipes_and_folders_are_refused(saved, tmp_path, verb):
    before = saved.read_bytes()
    os.symlink(saved, tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, nature in {"link": "symbolic link", "pipe": "pipe", "folder": "folder"}.items():
        with pytest.raises(perdure.FileError, match=f"a regular file, got a {nature}"):
            counting().save(tmp_path / name) if verb == "save" else perdure.load(tmp_path / name)
    assert saved.read_bytes() == before


@pytest.mark.parametrize("path", [None, 3, "a\0b", "nowhere/at/all", ""])
def test_no_path_is_no_file(path):
    with pytest.raises(perdure.FileError):
        perdure.load(path)
    with pytest.raises(perdure.FileError):
        counting().save(path)


# ---- whole or not at all --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(saved, monkeypatch, step):
    before = saved.read_bytes()

    def failing(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, step, failing)
    with pytest.raises(perdure.FileError, match="No space left"):
        counting(tokens=3).save(saved)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_seal_that_the_system_takes_in_pieces_is_whole(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(disk.os, "pwrite", lambda descriptor, part, start: pwrite(descriptor, part[:5], start))
    counting().save(tmp_path / "m")
    assert same(perdure.load(tmp_path / "m"), counting())


def test_a_name_may_be_as_long_as_the_system_takes(tmp_path):
    counting().save(tmp_path / ("n" * 255))
    assert same(perdure.load(tmp_path / ("n" * 255)), counting())


def test_without_the_package_the_install_line_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(perdure.MissingPackageError, match=r'pip install "perdure\[store\]"'):
        counting().save(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
