"""`perdure fit` on real files, and the pictures."""

import numpy as np
import pytest
from perdure.bindings import plot
from perdure.bindings.cli import main

import perdure


@pytest.fixture
def csv(tmp_path):
    t = np.linspace(0, 6, 150)
    path = tmp_path / "signal.csv"
    np.savetxt(path, np.stack([np.sin(t), np.cos(t)], -1), delimiter=",", header="a,b", comments="")
    return path


def test_a_csv_is_fitted_saved_and_drawn(csv, tmp_path, capsys):
    out, picture = tmp_path / "out.npy", tmp_path / "out.png"
    assert main(["fit", str(csv), "--basis", "32", "--out", str(out), "--plot", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "150 samples of 2 on 32 functions" in said
    assert np.load(out).shape == (32, 2)
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_what_is_said_of_a_fit_is_true_of_it(tmp_path, capsys):
    path = tmp_path / "one.csv"
    path.write_text("7\n")
    assert main(["fit", str(path), "--basis", "128", "--ridge", "1e-3", "--plot", str(tmp_path / "one.PNG")]) == 0
    assert "degrees of freedom 1.0\n" in capsys.readouterr().out
    assert (tmp_path / "one.PNG").exists()


@pytest.mark.parametrize("option", ["--out", "--plot"])
def test_what_is_read_is_not_overwritten(tmp_path, capsys, option):
    path, link = tmp_path / "x.png", tmp_path / "link.png"
    path.write_text("1\n2\n")
    link.symlink_to(path)
    for name in (path, link):
        assert main(["fit", str(path), option, str(name)]) == 2
    assert path.read_text() == "1\n2\n"
    assert capsys.readouterr().err.count(option) == 2


def test_an_npy_is_read_as_a_stream(tmp_path, capsys):
    path, picture = tmp_path / "x.npy", tmp_path / "x.png"
    np.save(path, np.sin(np.arange(1000) / 50).astype(np.float32))
    assert main(["fit", str(path), "--segment", "128", "--basis", "64", "--ridge", "1e-3", "--plot", str(picture)]) == 0
    assert "horizon" in capsys.readouterr().out
    assert picture.exists()


@pytest.mark.parametrize("text", ["1 2\n3 4\n", "1;2\n3;4", "x\ty\n1\t2\n3\t4\n", "\ufeff1,2\n\n# note\n3,4\n"])
def test_common_layouts_are_understood(tmp_path, text):
    from perdure.bindings.samples import read_samples

    path = tmp_path / "x.csv"
    path.write_text(text, encoding="utf-8")
    assert read_samples("file", path).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("content", "arguments"),
    [
        (b"", []),
        (b"a,b\n", []),
        (b"1,2\n3\n", []),
        (b"1,x\n2,3\n", []),
        (b"1\nnan\n", []),
        (b"\x00\xff\xfe", []),
        (b"\x93NUMPY\x01\x00broken", []),
        (b"1\n2\n", ["--basis", "0"]),
        (b"1\n2\n", ["--basis", "many"]),
        (b"1\n2\n", ["--ridge", "-1"]),
        (b"1\n2\n", ["--ridge", "much"]),
        (b"1\n2\n", ["--segment", "0"]),
        (b"1\n2\n", ["--segment", "1", "--contraction", "2"]),
        (b"1\n2\n", ["--segment", "1", "--ridge", "gcv"]),
        (b"1\n2\n", ["--out", "/nowhere/at/all.npy"]),
        (b"1\n2\n", ["--out", "/"]),
        (b"1\n2\n", ["--out", "/dev/full"]),
        (b"1\n2\n", ["--plot", "picture.foo"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, content, arguments):
    path = tmp_path / "bad"
    path.write_bytes(content)
    assert main(["fit", str(path), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("perdure fit: ")


def test_no_file_or_a_folder_is_named(tmp_path, capsys):
    assert main(["fit", str(tmp_path / "none.csv")]) == 2
    assert main(["fit", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_a_pickle_is_never_loaded(tmp_path, capsys):
    path = tmp_path / "x.npy"
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    assert main(["fit", str(path)]) == 2


def test_pictures_show_what_they_are_given(rng, tmp_path):
    memory = perdure.ContinuousMemory(1, 2, 32)
    with pytest.raises(perdure.ArgumentError):
        plot.retained(memory)
    for _ in range(3):
        memory.write(rng.standard_normal((1, 40, 2)))
    x = rng.standard_normal((40, 2))
    fitted = perdure.fit(x, perdure.gaussian_basis(16))
    figures = [
        perdure.plot.signal(fitted, x),
        plot.signal(fitted, components=[1]),
        plot.attention(rng.random((5, 16))),
        plot.retained(memory),
        plot.error(memory.report(), fitted.report(), names=["memory", "fit"]),
    ]
    for i, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{i}.png")
        assert figure.axes[0].get_xlabel()
    assert len(figures[0].axes[0].lines) == 4
    assert len(figures[1].axes[0].lines) == 1
    for call in (
        lambda: plot.signal(fitted, components=[7]),
        lambda: plot.signal(fitted, rng.random((4, 5))),
        lambda: plot.signal(memory.signal),
        lambda: plot.attention(rng.random(5)),
        lambda: plot.error(),
        lambda: plot.signal("a"),
        lambda: plot.signal(fitted, x, positions=[0.1, 0.2]),
        lambda: plot.signal(fitted, "abc"),
        lambda: plot.signal(fitted, components=1),
        lambda: plot.error("a"),
        lambda: plot.error(memory.report(), names=5),
        lambda: plot.retained("x"),
        lambda: plot.retained(perdure.HybridMemory(1, 1, 2, 4, basis=32)),
        lambda: plot.attention(np.full((2, 3), np.nan)),
        lambda: plot.attention(-np.ones((2, 3))),
        lambda: plot.attention(np.ones((0, 3))),
        lambda: plot.attention("a"),
    ):
        with pytest.raises(perdure.ArgumentError):
            call()
