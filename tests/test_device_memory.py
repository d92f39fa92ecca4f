"""KNNMemory on a device: what it gives and keeps is what it would give and keep in main memory.

The devices are PyTorch's CPU and a second device of array-api-strict, which refuses to mix with the first and to travel
to NumPy unasked: code that runs there copies nothing to main memory by accident.
"""

from __future__ import annotations

import copy

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from perdure.backends import devices, parcels
from perdure.backends.devices import memory_of
from perdure.bindings.torch import MemorizingAttention, ops
from perdure.core import positions
from perdure.memory import device_row, knn, overflow, sticky, timeline

import perdure

DEVICES = {"strict": array_api_strict.Device("device1"), "torch": torch.device("cpu")}
GPUS = {"cuda": "cuda", "torch-cuda": torch.device("cuda")}
each_device = pytest.mark.parametrize(
    "device",
    [*DEVICES.values(), *(pytest.param(gpu, marks=pytest.mark.gpu) for gpu in GPUS.values())],
    ids=DEVICES | GPUS,
)
SIZES = {"rows": 2, "heads": 2, "dim": 3, "value_dim": 5, "capacity": 70}


def pair(device, ring=None, **settings):
    settings = {**SIZES, **settings}
    return perdure.KNNMemory(**settings), perdure.KNNMemory(**settings, device=device, device_capacity=ring)


def tokens(rng, n, rows=2):
    return rng.standard_normal((rows, 2, n, 3)), rng.standard_normal((rows, 2, n, 5))


def assert_same_state(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(theirs[name], array, err_msg=name)


def assert_same_reading(a, b, queries, k):
    found, expected = b.search(queries, k), a.search(queries, k)
    np.testing.assert_array_equal(found.positions, expected.positions)
    for name in ("scores", "keys", "values"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
    read, wanted = b.read(queries, k), a.read(queries, k)
    np.testing.assert_allclose(read.output, wanted.output, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(read.lse, wanted.lse, rtol=1e-5, atol=1e-5)
    for one, other in ((found.tags, expected.tags), (read.neighbours.tags, wanted.neighbours.tags)):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(one, other)


@each_device
@settings(max_examples=10)
@given(data=st.data())
def test_any_history_is_kept_as_in_main_memory(device, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    halves = () if device is DEVICES["strict"] else ("bfloat16", "float16")  # of which the array API knows nothing
    dtype = data.draw(st.sampled_from(("float32", "float64", "int8", *halves)))
    space, ring = data.draw(st.sampled_from(("ip", "cosine", "l2"))), data.draw(st.sampled_from((None, 1, 7, 64, 70)))
    host, there = pair(device, ring, dtype=dtype, space=space)
    exact = dtype not in ("int8", *halves) and space == "ip"  # then no sum is rounded, and ties are drawn too
    for _ in range(data.draw(st.integers(1, 6))):
        step = data.draw(st.sampled_from(("write", "write", "masked", "tagged", "clear", "one row")))
        n = data.draw(st.sampled_from((0, 1, 6, 33, 64, 150)))
        rows = [1] if step == "one row" else None
        keys, values = tokens(rng, n, 1 if rows else 2)
        keys = keys.round() if exact else keys
        for memory in (host, there):
            if step == "clear":
                memory.clear([0])
            else:
                memory.write(
                    keys,
                    values,
                    rows=rows,
                    mask=np.arange(2 * n).reshape(2, n) % 3 > 0 if step == "masked" else None,
                    tags=np.arange(2 * n).reshape(2, n) if step == "tagged" else None,
                )
    assert_same_state(host, there)
    assert there.tokens.tolist() == host.tokens.tolist()
    queries = rng.standard_normal((2, 4, 3, 3))
    assert_same_reading(host, there, queries.round() if exact else queries, data.draw(st.sampled_from((1, 5, 80))))
    for moved in (there.to("cpu"), there.to(device, 9), copy.deepcopy(there), host.to(device)):
        assert_same_state(host, moved)
        keys, values = tokens(rng, 10)
        before = there.state_dict()
        moved.write(keys, values)
        assert_same_state(there, perdure.KNNMemory.from_state_dict(before))


@each_device
def test_long_keys_are_shortened(device, rng):
    host, there = pair(device, max_norm=0.5)
    keys, values = tokens(rng, 40)
    for memory in (host, there):
        memory.write(keys, values)
    assert_same_reading(host, there, keys[:, :, :4], 5)


@each_device
def test_arrays_come_back_where_they_came_from(device, rng):
    _, there = pair(device)
    keys, values = tokens(rng, 20)
    there.write(keys, values)
    for array in (
        torch.from_numpy(keys),
        torch.from_numpy(keys).to(torch.bfloat16),
        array_api_strict.asarray(keys, device=array_api_strict.Device("device1")),
        keys.astype(np.float16),
    ):
        read = there.read(array, k=3)
        assert type(read.output) is type(array)
        assert read.output.dtype == array.dtype
        assert read.output.device == array.device


def test_the_device_is_not_left(monkeypatch, rng):
    """A device of array-api-strict is left through `to_device` alone."""
    device = DEVICES["strict"]
    _, there = pair(device)
    keys, values = (array_api_strict.asarray(a, device=device) for a in tokens(rng, 100))

    def leave(*args, **kwargs):
        raise AssertionError("something was copied to main memory")

    monkeypatch.setattr(type(keys), "to_device", leave)
    there.write(keys, values)
    read, near = there.read(keys, 5), there.search(keys, 5)
    there.clear([0])
    _, small = pair(device, 20)
    small.write(keys, values)  # what leaves the ring is on its way, and waits
    assert {a.device for a in (read.output, read.lse, near.positions, near.scores, near.values)} == {device}
    with pytest.raises(AssertionError, match="copied"):
        there.state_dict()


@each_device
def test_a_file_loads_on_either_side(device, rng, tmp_path):
    host, there = pair(device, 30)
    keys, values = tokens(rng, 100)
    for memory, name in ((host, "host"), (there, "there")):
        memory.write(keys, values)
        memory.save(tmp_path / name)
    assert (tmp_path / "host").read_bytes() == (tmp_path / "there").read_bytes()
    assert_same_state(host, perdure.load(tmp_path / "there"))


@each_device
def test_rows_are_selected_and_forgotten_on_the_device(device, rng):
    host, there = pair(device, 20)
    keys, values = tokens(rng, 50)
    for memory in (host, there):
        memory.write(keys, values)
    assert_same_state(host.select([1, 1, 0]), there.select([1, 1, 0]))
    at = np.array([[0, 49, -1], [30, 31, 2]])
    np.testing.assert_array_equal(there.at(at).keys, host.at(at).keys)
    assert "20 of them on" in there.explain()
    assert "30 more in main memory" in there.explain()
    assert there.recall(keys[:, :, :2], 3) == 1
    assert there.nbytes > 0
    there.clear()
    assert there.read(keys[:, :, :1]).lse.max() == -np.inf


@each_device
def test_a_rejected_write_changes_nothing(device, rng):
    _, there = pair(device, 20)
    keys, values = tokens(rng, 50)
    there.write(keys, values)
    before = there.state_dict()
    broken = values.copy()
    broken[1, 0, 3, 0] = np.nan
    with pytest.raises(perdure.NonFiniteError):
        there.write(keys, broken)
    with pytest.raises(perdure.FrameworkError, match="an array of numpy"):
        there.write(keys, torch.from_numpy(values))
    assert all((before[name] == array).all() for name, array in there.state_dict().items())


@pytest.mark.parametrize("ring", [None, 40])
def test_out_of_memory_leaves_the_memory_as_it_was(monkeypatch, rng, ring):
    class OutOfMemoryError(RuntimeError):
        """As PyTorch's and CuPy's are called."""

    _, there = pair(DEVICES["torch"], ring)
    keys, values = tokens(rng, 30)
    there.write(keys[:, :, :10], values[:, :, :10])
    before = there.state_dict()
    xp, calls = there._place.xp, []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) > 3:  # in the midst of the second row
            raise OutOfMemoryError("tried to allocate 2.00 GiB")
        return torch.empty(*args, **kwargs)

    for row in there._rows:
        row.arrays = {name: a[:, :10] for name, a in row.arrays.items()}  # so that more has to be allocated
    monkeypatch.setattr(xp, "empty", full)
    with pytest.raises(perdure.DeviceMemoryError, match=r"free memory on cpu, got tried .* device_capacity"):
        there.write(keys, values)
    monkeypatch.undo()
    assert isinstance(perdure.DeviceMemoryError("a", "b", "c", "d"), MemoryError)
    assert_same_state(perdure.KNNMemory.from_state_dict(before), there)
    there.write(keys, values)
    assert there.tokens.tolist() == [40, 40]


class Failing:
    """A namespace whose n-th allocation finds the device full."""

    def __init__(self, xp, n):
        self.xp, self.left = xp, n

    def __getattr__(self, name):
        found = getattr(self.xp, name)
        if name not in ("empty", "full", "asarray", "zeros", "take", "stack"):
            return found

        def allocating(*args, **kwargs):
            self.left -= 1
            if self.left < 0:
                raise MemoryError("tried to allocate 2.00 GiB")
            return found(*args, **kwargs)

        return allocating


@pytest.mark.parametrize("ring", [None, 12])
def test_whichever_allocation_fails_nothing_has_changed(monkeypatch, rng, ring):
    """Growing, tagged and masked, with tokens that leave the ring, in the first row or the second."""
    failures, n = 0, 0
    while n == failures:
        _, there = pair(DEVICES["strict"], ring)
        keys, values = (array_api_strict.asarray(a, device=DEVICES["strict"]) for a in tokens(rng, 30))
        there.write(keys[:, :, :10, :], values[:, :, :10, :])
        before = there.state_dict()
        failing = Failing(there._place.xp, n)
        with monkeypatch.context() as patch:
            for module in (device_row, knn, parcels):
                patch.setattr(module, "namespace", lambda array, failing=failing: failing)
            for place in {id(o): o for o in (there._place, *(row.place for row in there._rows))}.values():
                object.__setattr__(place, "xp", failing)
            try:
                there.write(keys, values, mask=np.arange(60).reshape(2, 30) % 3 > 0, tags=7)
            except perdure.DeviceMemoryError:
                failures += 1
            finally:
                object.__setattr__(there._place, "xp", failing.xp)
        if failures > n:
            assert_same_state(perdure.KNNMemory.from_state_dict(before), there)
        n += 1
    assert failures > 8
    assert there.tokens.tolist() == [30, 30]


@each_device
def test_what_leaves_the_ring_is_copied_before_it_is_written_over(device, rng):
    """Nobody looks at main memory until the end, and more is on its way than may be at once."""
    host, there = pair(device, 9)
    for _ in range(25):
        keys, values = tokens(rng, 5)
        for memory in (host, there):
            memory.write(keys, values)
    assert len(there._rows[0].older._waiting) == overflow.MOST_WAITING
    copied = copy.deepcopy(there)
    assert_same_reading(host, there, rng.standard_normal((2, 2, 3, 3)), 60)
    assert there._rows[0].older._waiting == []
    assert_same_state(host, copied)


@each_device
def test_a_parcel_is_what_was_sent(device, rng):
    place = devices.place_of(device)
    for numbers in (rng.standard_normal((2, 3)), rng.integers(-9, 9, (2, 3)).astype(np.int8)):
        sent = place.xp.asarray(numbers.copy(), device=place.device)
        parcel = parcels.send(sent[:, 1:])
        sent[:, 1:] = place.xp.zeros_like(sent[:, 1:])
        assert parcel.take().dtype == numbers.dtype
        np.testing.assert_array_equal(parcel.take(), numbers[:, 1:])


def test_other_errors_are_not_taken_for_a_full_device():
    with pytest.raises(KeyError), memory_of("cpu"):
        raise KeyError("x")


def test_a_state_says_nothing_of_devices():
    state = perdure.KNNMemory(**SIZES).state_dict()
    text = state["config"].tobytes().replace(b"{", b'{"device": "cuda", ', 1)
    with pytest.raises(perdure.ArgumentError, match="config"):
        perdure.KNNMemory.from_state_dict({**state, "config": np.frombuffer(text, np.uint8)})


def test_the_memory_of_a_layer_follows_it(monkeypatch):
    outputs = []
    for followed in (set(), {"cpu"}):
        monkeypatch.setattr(ops, "FOLLOWED_TO", followed)
        torch.manual_seed(0)
        layer, memory = MemorizingAttention(dim=16, heads=2, segment=4, capacity=20, k=3), None
        for x in torch.randn(9, 2, 4, 16):
            output, memory = layer(x, memory)
        output.sum().backward()
        assert memory.memory.device == (torch.device("cpu") if followed else "cpu")
        assert isinstance(memory.memory.device, str) != bool(followed)
        outputs.append((output.detach(), layer.query.weight.grad, memory.memory.state_dict()))
    (one, gradient, state), (other, same_gradient, same_state) = outputs
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(gradient, same_gradient)
    assert all((state[name] == array).all() for name, array in same_state.items())


# ---- the durable store, and a signal ---------------------------------------------------------------------------------


@each_device
def test_a_store_is_the_same_from_every_device(device, rng, tmp_path):
    """Written here and there in turns: on the disk, and to who reads, there is no difference."""
    shape = {"kind": "knn", "rows": 1, "heads": 2, "dim": 3, "capacity": 40}
    parts = rng.standard_normal((6, 1, 2, 12, 3)).astype(np.float32)
    for name, homes in (
        ("host", [{}] * 3),
        ("there", [{"device": device, "device_capacity": 9}, {}, {"device": device}]),
    ):
        for i, home in enumerate(homes):
            with perdure.open(tmp_path / name) as store:
                memory = store.memory("a", **shape, **home)
                assert isinstance(memory.device, str) != bool(home)
                for part in parts[2 * i : 2 * i + 2]:
                    memory.write(part, part)
    with perdure.open(tmp_path / "host", readonly=True) as host, perdure.open(tmp_path / "there") as there:
        assert_same_state(host.memory("a"), there.memory("a"))
        on_device = there.memory("a", device=device)  # an open one moves
        assert not isinstance(on_device.device, str)
        assert_same_reading(host.memory("a"), on_device, parts[0, :, :, :4], 7)
        assert_same_state(host.memory("a"), on_device)


def test_what_a_store_cannot_hold_on_a_device_is_refused(tmp_path):
    with perdure.open(tmp_path / "store") as store:
        with pytest.raises(perdure.ArgumentError, match=r"device: expected None for kind 'recurrent'"):
            store.memory("a", kind="recurrent", rows=1, dim=3, capacity=4, device=DEVICES["torch"])
        with pytest.raises(perdure.ArgumentError, match='device: expected "cpu"'):
            store.memory("a", kind="knn", **SIZES, device="gpu")
        assert store.names() == []


@each_device
@pytest.mark.parametrize("sticky", [False, True])
def test_a_signal_is_kept_on_its_device(device, sticky, rng, tmp_path):
    settings = {"rows": 2, "dim": 3, "basis": 16, "samples": 32, "sticky": sticky, "dtype": "float64"}
    host, there = perdure.ContinuousMemory(**settings), perdure.ContinuousMemory(**settings, device=device)
    looks = rng.random((2, 4, 5)), rng.uniform(1e-3, 0.1, (2, 4, 5))
    for i in range(4):
        x = rng.standard_normal((2, 20, 3))
        for memory in (host, there):
            memory.write(x, attention=looks if i else None)
        assert there.device == devices.place_of(device).device
    mean, variance = rng.random((2, 6)), rng.uniform(1e-3, 0.1, (2, 6))
    seen, expected = there.read(mean, variance), host.read(mean, variance)
    assert type(seen.output) is np.ndarray
    np.testing.assert_allclose(seen.output, expected.output, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(seen.lse, expected.lse)
    np.testing.assert_allclose(there.shown([0, 0.3, 1]), host.shown([0, 0.3, 1]), rtol=1e-9)
    there.save(tmp_path / "there")
    for moved in (perdure.load(tmp_path / "there"), host.to(device), there.to("cpu"), copy.deepcopy(there)):
        np.testing.assert_allclose(moved.state_dict()["coefficients"], host.state_dict()["coefficients"], atol=1e-9)
    with pytest.raises(perdure.ArgumentError, match="device_capacity"):
        there.to(device, 5)


def test_where_a_gpu_looked_stays_on_it(monkeypatch, rng):
    """Nothing of a sticky write waits for the device: here PyTorch's CPU is taken for one that cannot be looked at."""
    torch_cpu = DEVICES["torch"]
    settings = {"rows": 2, "dim": 3, "basis": 16, "samples": 32, "dtype": "float64"}
    host, there = perdure.ContinuousMemory(**settings), perdure.ContinuousMemory(**settings, device=torch_cpu)
    looks = rng.random((2, 9)), rng.uniform(1e-3, 0.1, (2, 9))
    seen = []
    for i in range(70):
        x, attention = rng.standard_normal((2, 20, 3)), looks if i else None
        host.write(x, attention)
        with monkeypatch.context() as patch:
            for module in (sticky, positions):
                patch.setattr(module, "inspectable", lambda array: seen.append(type(array)) or False)
            there.write(torch.from_numpy(x), attention and tuple(map(torch.from_numpy, attention)))
    assert set(seen) == {torch.Tensor}
    assert len(there._signals.timeline._waiting) == timeline.MOST_WAITING
    np.testing.assert_allclose(there.shown([0.1, 0.7]), host.shown([0.1, 0.7]), rtol=1e-6)
    np.testing.assert_allclose(there.signal([0.5]).numpy(), host.signal([0.5]), atol=1e-9)


# ---- devices that are not there: this needs a machine without a GPU, and tells so -----------------------------------

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: its absence cannot be tested")


@no_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_named_with_what_to_do(device):
    with pytest.raises(perdure.BackendError, match=r"CuPy or PyTorch to compute.*cupy.*torch.*nvidia-smi"):
        perdure.KNNMemory(**SIZES, device=device)


@no_gpu
def test_a_device_object_that_does_not_compute_is_told_at_once(rng):
    with pytest.raises(perdure.BackendError, match=r"device of torch: expected cuda to compute, got .*nvidia-smi"):
        perdure.KNNMemory(**SIZES, device=torch.device("cuda"))
    memory = perdure.KNNMemory(**SIZES)
    memory.write(*tokens(rng, 5))
    with pytest.raises(perdure.BackendError):
        memory.to("cuda")
    assert memory.tokens.tolist() == [5, 5]


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", 0, object()])
def test_what_is_no_device_is_refused(device):
    with pytest.raises(perdure.ArgumentError, match=r'device: expected "cpu", "cuda"'):
        devices.place_of(device)


@pytest.mark.parametrize(("setting", "value"), [("index", "ivf"), ("dtype", "bfloat16"), ("device_capacity", 0)])
def test_what_a_device_does_not_offer_is_refused(setting, value):
    with pytest.raises(perdure.ArgumentError, match=setting):
        perdure.KNNMemory(**SIZES, device=DEVICES["strict"], **{setting: value})


def test_auto_is_exact_on_a_device_and_chooses_in_main_memory(rng):
    there = perdure.KNNMemory(**SIZES, device=DEVICES["strict"], index="auto")
    there.write(*tokens(rng, 5))
    here = there.to("cpu")
    assert "auto: exact" in here.explain()
    queries = tokens(rng, 3)[0]
    for memory in (here, here.to(DEVICES["strict"])):
        near, expected = memory.search(queries, 4), there.search(queries, 4)
        np.testing.assert_array_equal(np.asarray(near.positions), np.asarray(expected.positions))
