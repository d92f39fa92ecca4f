"""`perdure search` and `perdure bench`: what they print and save, and what they refuse."""

import numpy as np
import pytest
from perdure.bindings.cli import main

import perdure


@pytest.fixture
def files(tmp_path, rng):
    keys, queries = rng.standard_normal((50, 4)), rng.standard_normal((7, 4))
    np.save(tmp_path / "keys.npy", keys)
    np.savetxt(tmp_path / "queries.csv", queries, delimiter=",", header="a,b,c,d", comments="", fmt="%.17g")
    return keys, queries, str(tmp_path / "keys.npy"), str(tmp_path / "queries.csv")


@pytest.mark.parametrize("space", ["ip", "cosine", "l2"])
def test_the_nearest_are_printed_and_saved(files, tmp_path, capsys, space):
    keys, queries, *paths = files
    out = tmp_path / "near.npz"
    assert main(["search", *paths, "--k", "3", "--space", space, "--out", str(out)]) == 0
    near = perdure.top_k(queries, keys, 3, space)
    with np.load(out) as saved:
        np.testing.assert_array_equal(saved["positions"], near.positions)
        np.testing.assert_allclose(saved["scores"], near.scores, rtol=1e-12)
    said = capsys.readouterr().out
    assert "7 queries among 50 keys of 4 numbers" in said
    assert f"    0  {near.positions[0, 0]}: {near.scores[0, 0]:.4g}" in said


def test_more_neighbours_than_keys_are_all_keys(files, tmp_path):
    out = tmp_path / "near.npz"
    assert main(["search", *files[2:], "--k", "1000", "--out", str(out)]) == 0
    with np.load(out) as saved:
        np.testing.assert_array_equal(np.sort(saved["positions"]), np.broadcast_to(np.arange(50), (7, 50)))


def test_bad_input_is_one_line_and_exit_code_2(files, tmp_path, capsys):
    *_, keys, queries = files
    np.save(tmp_path / "wide.npy", np.ones((3, 5)))
    np.save(tmp_path / "nan.npy", np.array([[np.nan] * 4]))
    wrong = {
        "queries: expected rows of 4 numbers": [keys, str(tmp_path / "wide.npy")],
        "queries: expected finite numbers": [keys, str(tmp_path / "nan.npy")],
        "keys: expected a readable file": [str(tmp_path / "none"), queries],
        "--k: expected a whole number of at least 1": [keys, queries, "--k", "0"],
        "--out: expected a path in an existing folder": [keys, queries, "--out", "/nowhere/at/all"],
    }
    for message, arguments in wrong.items():
        assert main(["search", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"perdure search: {message}")
        assert said.count("\n") == 1


def test_the_benchmark_times_every_way(capsys):
    assert main(["bench", "--keys", "300", "--queries", "5", "--dim", "8", "--k", "400", "--runs", "1"]) == 0
    said = capsys.readouterr().out
    assert "300 keys, 5 queries, 8 numbers each, float32, the 400 nearest" in said
    for way in ("KNNMemory.search, exact", "perdure.top_k", "NumPy: product, argpartition", "PyTorch: matmul, topk"):
        assert f"\n{way}" in said
    assert said.count(" x\n") == 6
    assert main(["bench", "--keys", "0"]) == 2
