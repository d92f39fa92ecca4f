"""HybridMemory: exact while it fits, smooth beyond, and attention decides what stays."""

import numpy as np
import pytest
import torch
from perdure.memory.protocol import Memory

import perdure


def hybrid(rows=2, heads=2, dim=4, capacity=20, **settings):
    return perdure.HybridMemory(rows, heads, dim, capacity, **{"basis": 32, "slots": 64, "segment": 32, **settings})


def segment(rng, n, rows=2, heads=2, dim=4):
    return rng.standard_normal((rows, heads, n, dim)).astype(np.float32)


@pytest.mark.parametrize("eviction", ["fifo", "least_attended"])
def test_while_nothing_has_left_it_is_the_exact_memory(rng, eviction):
    memory, exact = hybrid(eviction=eviction), perdure.KNNMemory(2, 2, 4, 20)
    for n in (3, 0, 9):
        keys, values = segment(rng, n), segment(rng, n)
        memory.write(keys, values)
        exact.write(keys, values)
        queries = segment(rng, 5, heads=4)
        got, wanted = memory.read(queries, k=4), exact.read(queries, k=4)
        assert np.allclose(got.output, wanted.output, atol=1e-6)
        assert np.allclose(got.lse, wanted.lse, atol=1e-6)
        assert np.array_equal(got.neighbours.positions, wanted.neighbours.positions)
    assert isinstance(memory, Memory)
    assert not memory.older.tokens.any()


@pytest.mark.parametrize("eviction", ["fifo", "least_attended"])
def test_no_token_is_lost_or_counted_twice(rng, eviction):
    memory = hybrid(eviction=eviction)
    total = np.zeros(2, int)
    for n in (7, 25, 3, 1, 60):
        mask = rng.random((2, n)) < 0.8
        memory.write(segment(rng, n), segment(rng, n), mask=mask)
        memory.read(segment(rng, 3), k=5)
        total += mask.sum(1)
        assert memory.tokens.tolist() == total.tolist()
        assert (memory.recent.tokens == np.minimum(total, 20)).all()
        positions = memory.read(segment(rng, 1), k=20).neighbours.positions
        for row in range(2):
            held = positions[row, 0, 0]
            assert len(set(held)) == len(held[held >= 0]) + (held < 0).any()
            assert held.max() == total[row] - 1 or eviction == "least_attended"
    assert memory.nbytes > 0


def test_what_left_is_still_read(rng):
    """Constant values come back whatever is attended to, and a scene of long ago can still be asked for."""
    memory = hybrid(rows=1, heads=1, capacity=16, basis=64, contraction=0.8)
    scenes = np.eye(4, dtype=np.float32) * 6
    for scene in scenes:
        keys = np.repeat(scene[None, None, None], 64, axis=2)
        memory.write(keys, keys)
    assert memory.recent.tokens[0] == 16
    for i, scene in enumerate(scenes):
        seen = memory.read(scene[None, None, None], k=8, scale=1.0).output[0, 0, 0]
        assert np.argmax(seen) == i
        assert seen[i] > 4
    whole = memory.read(np.zeros((1, 1, 1, 4), np.float32), k=16)
    assert np.isclose(whole.lse[0, 0, 0], np.log(256), atol=0.05)  # every token counts once
    assert np.allclose(whole.output[0, 0, 0], 1.5, atol=0.3)


def test_attended_tokens_stay_longer(rng):
    needle = np.full((1, 1, 1, 4), 5, np.float32)
    kept = {}
    for eviction in ("fifo", "least_attended"):
        memory = hybrid(rows=1, heads=1, capacity=32, eviction=eviction)
        memory.write(needle, needle)
        for _ in range(20):
            memory.read(needle, k=4)
            memory.write(segment(rng, 8, 1, 1), segment(rng, 8, 1, 1))
        kept[eviction] = 0 in memory.read(needle, k=32).neighbours.positions
    assert kept == {"fifo": False, "least_attended": True}


@pytest.mark.parametrize("eviction", ["fifo", "least_attended"])
def test_a_saved_memory_goes_on_bit_for_bit(rng, eviction):
    memory = hybrid(eviction=eviction)
    for n in (9, 30):
        memory.write(segment(rng, n), segment(rng, n))
        memory.read(segment(rng, 3), k=5)
    other = perdure.HybridMemory.from_state_dict({k: torch.from_numpy(v) for k, v in memory.state_dict().items()})
    keys, queries = segment(rng, 40), segment(rng, 3)
    results = []
    for m in (memory, other):
        m.clear([1])
        for _ in range(2):
            m.write(keys, keys)
            results.append(m.read(queries, k=5))
    assert np.array_equal(results[0].output, results[2].output)
    assert np.array_equal(results[1].output, results[3].output)
    assert np.array_equal(results[1].lse, results[3].lse)


def test_rows_do_not_mix_and_torch_comes_back(rng):
    together, alone = hybrid(sticky=False), hybrid(rows=1, sticky=False)  # sticky rows draw from one generator in turn
    for n in (9, 30, 14):
        keys = segment(rng, n)
        together.write(torch.from_numpy(keys), torch.from_numpy(keys))
        alone.write(keys[1:], keys[1:])
    queries = segment(rng, 3)
    got = together.read(torch.from_numpy(queries), k=5)
    wanted = alone.read(queries[1:], k=5)
    assert isinstance(got.output, torch.Tensor)
    assert np.allclose(got.output[1:].numpy(), wanted.output, atol=1e-5)
    together.clear()
    empty = together.read(torch.from_numpy(queries), k=5)
    assert not empty.output.any()
    assert torch.isinf(empty.lse).all()


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (perdure.ShapeError, lambda m, x: m.write(x[:1], x)),
        (perdure.ShapeError, lambda m, x: m.write(x, x[..., :2])),
        (perdure.NonFiniteError, lambda m, x: m.write(x * np.nan, x)),
        (perdure.NonFiniteError, lambda m, x: m.write(x, x * np.inf)),
        (perdure.NonFiniteError, lambda m, x: m.write(x, np.full_like(x, 4e18))),  # fits alone, not beside the others
        (perdure.FrameworkError, lambda m, x: m.write(x, torch.from_numpy(x))),
        (perdure.ArgumentError, lambda m, x: m.read(x, scale="a")),
        (perdure.ShapeError, lambda m, x: m.write(x, x, mask=np.ones((2, 2), bool))),
        (perdure.ArgumentError, lambda m, x: m.write(x, x, rows=[0, 3])),
        (perdure.ArgumentError, lambda m, x: m.read(x, k=0)),
        (perdure.ShapeError, lambda m, x: m.read(x[..., :3])),
        (perdure.ArgumentError, lambda m, x: m.clear([9])),
        (perdure.ArgumentError, lambda m, x: m.from_state_dict({})),
    ],
)
def test_a_rejected_call_changes_nothing(rng, error, call):
    memory = hybrid()
    memory.write(segment(rng, 30), segment(rng, 30))
    before = memory.state_dict()
    with pytest.raises(error):
        call(memory, segment(rng, 5))
    after = memory.state_dict()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_hopeless_settings_are_refused():
    compat = {"compat": "infinite-former"}  # its 128 bins are not the slots, so that no write would be accepted
    for settings in ({"eviction": "random"}, {"slots": 0}, {"capacity": 0}, {"contraction": 1.5}, compat):
        with pytest.raises(perdure.ArgumentError):
            hybrid(**settings)


@pytest.mark.parametrize("eviction", ["fifo", "least_attended"])
def test_what_the_signal_refuses_has_left_no_row(rng, eviction):
    """Of row 0 enough leaves to be fitted without a ridge, of row 1 too little: neither is written to."""
    memory = hybrid(capacity=4, basis=perdure.gaussian_basis(64, 0.0238), ridge=0, samples=8, eviction=eviction)
    memory.write(segment(rng, 4), segment(rng, 4))
    memory.read(segment(rng, 3), k=2)
    before = memory.state_dict()
    mask = np.arange(128) < np.array([[128], [2]])
    with pytest.raises(perdure.ArgumentError):
        memory.write(segment(rng, 128), segment(rng, 128), mask=mask)
    after = memory.state_dict()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    memory.write(segment(rng, 128), segment(rng, 128))
    assert memory.tokens.tolist() == [132, 132]


def test_exact_tokens_beyond_the_nearest_have_no_part(rng):
    memory = hybrid(rows=1, heads=1, capacity=16)
    keys = segment(rng, 256, 1, 1)
    memory.write(keys, keys)
    for k in (1, 5, 16, 40):
        whole = memory.read(np.zeros((1, 1, 1, 4), np.float32), k=k).lse[0, 0, 0]
        assert np.isclose(whole, np.log(240 + min(k, 16)), atol=1e-5)


def test_no_queries_and_no_rows_are_no_mistake(rng):
    memory = hybrid()
    for _ in range(2):
        none, nobody = memory.read(segment(rng, 0, heads=4), k=3), memory.read(segment(rng, 5, rows=0), k=3, rows=[])
        assert none.output.shape == (2, 4, 0, 4)
        assert none.lse.shape == (2, 4, 0)
        assert none.neighbours.positions.shape == (2, 4, 0, 3)
        assert nobody.output.shape == (0, 2, 5, 4)
        assert nobody.lse.shape == (0, 2, 5)
        memory.write(segment(rng, 5, rows=0), segment(rng, 5, rows=0), rows=[])
        assert memory.tokens[0] in (0, 30)
        memory.write(segment(rng, 30), segment(rng, 30))


@pytest.mark.parametrize(
    ("part", "settings"), [("older", {"rows": 1}), ("older", {"heads": 1}), ("recent", {"dim": 5})]
)
def test_parts_of_another_memory_are_not_taken_for_its_own(part, settings):
    own, other = hybrid().state_dict(), hybrid(**settings).state_dict()
    mixed = own | {name: array for name, array in other.items() if name.startswith(part)}
    with pytest.raises(perdure.ArgumentError):
        perdure.HybridMemory.from_state_dict(mixed)
